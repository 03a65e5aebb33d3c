"""Stand-ins for the part of ComfyUI that nodes import, from its public signatures (0.12.2), without its checks: only ComfyUI tells if a node is right."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from enum import Enum
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from . import WorkflowError, say

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
SETTINGS = ("display_name", "tooltip", "default", "options", "min", "max", "step", "control_after_generate", "advanced", "multiline", "force_input")
TYPES = ("Int", "Float", "String", "Boolean", "Combo", "Image", "Mask", "Latent", "Audio", "Video", "Vae", "Conditioning", "Model", "Clip", "Sigmas", "Noise")


def build_socket(io_type: str, id: str | None = None, first: Any = None, *, optional: bool = False, **given: Any) -> SimpleNamespace:
    """A declared input or output: keywords are attributes, SETTINGS that are not given are None. `first` is the name shown, or the choices of a list."""
    known = {**dict.fromkeys(SETTINGS), "options" if io_type == "COMBO" else "display_name": first, "is_output_list": False, **given}
    return SimpleNamespace(**known, id=id, io_type=io_type, optional=optional, is_widget=io_type in WIDGETS and not known["force_input"])


def build_type(io_type: str) -> SimpleNamespace:
    socket = partial(build_socket, io_type)
    return SimpleNamespace(io_type=io_type, Type=Any, Input=socket, Output=socket)


def build_schema(node_id: str, **given: Any) -> SimpleNamespace:
    lists = {name: [] for name in ("inputs", "outputs", "hidden", "search_aliases")}
    words = dict.fromkeys(("display_name", "category", "description"))
    return SimpleNamespace(**{**lists, **words, "is_input_list": False, "is_output_node": False, **given}, node_id=node_id)


class NodeOutput:
    """What a node returns. Expanding and blocking the graph, which the real one can, are not supported and raise TypeError."""

    def __init__(self, *args: Any, ui: Any = None) -> None:
        self.args, self.result, self.ui = args, args or None, ui


class ComfyNode:
    @classmethod
    def GET_SCHEMA(cls) -> SimpleNamespace:
        cls.SCHEMA = cls.define_schema()
        return cls.SCHEMA


def show(value: str) -> SimpleNamespace:
    """What a node shows on the page: here a line of text."""
    return SimpleNamespace(as_dict=lambda: {"text": (value,)})


ui = SimpleNamespace(
    PreviewText=show,
    PreviewImage=lambda image, animated=False, cls=None: show(f"preview: {image.shape[0]} x {image.shape[2]}x{image.shape[1]} px"),
    PreviewAudio=lambda audio, cls=None: show(f"preview: {audio['waveform'].shape[-1] / audio['sample_rate']:.2f} s of sound"),
)
io = SimpleNamespace(
    **{name: build_type(name.upper()) for name in TYPES}, AnyType=build_type("*"), Custom=build_type, Schema=build_schema,
    ComfyNode=ComfyNode, NodeOutput=NodeOutput, NumberDisplay=Enum("NumberDisplay", "number slider"), Hidden=Enum("Hidden", "unique_id prompt extra_pnginfo"),
    MultiType=SimpleNamespace(Input=lambda id, types, **given: build_socket(",".join(kind.io_type for kind in types), id, **given)),
)  # fmt: skip


class FolderPaths(ModuleType):
    """The directories of this run. A name from a workflow never reaches outside of them (WorkflowError)."""

    supported_pt_extensions = {".ckpt", ".pt", ".pt2", ".bin", ".pth", ".safetensors", ".pkl", ".sft"}

    def __init__(self, models: Path, inputs: Path, outputs: Path, scratch: str) -> None:
        super().__init__("folder_paths")
        self.models_dir = os.path.abspath(models)
        for place, path in {"input": inputs, "output": outputs, "temp": scratch, "user": scratch}.items():
            setattr(self, f"get_{place}_directory", partial(os.path.abspath, path))
        standard = ("checkpoints", "loras", "vae", "text_encoders", "diffusion_models", "clip_vision", "audio_encoders")
        self.folder_names_and_paths = {name: ([os.path.join(self.models_dir, name)], self.supported_pt_extensions) for name in standard}

    def add_model_folder_path(self, folder_name: str, full_folder_path: str, is_default: bool = False) -> None:
        paths = self.folder_names_and_paths.setdefault(folder_name, ([], set()))[0]
        if full_folder_path not in paths:
            paths.insert(0 if is_default else len(paths), full_folder_path)

    def get_folder_paths(self, folder_name: str) -> list[str]:
        return list(self.folder_names_and_paths[folder_name][0])

    def get_filename_list(self, folder_name: str) -> list[str]:
        paths, endings = self.folder_names_and_paths[folder_name]
        files = {os.path.relpath(os.path.join(at, name), path) for path in paths for at, _, names in os.walk(path, followlinks=True) for name in names}
        return sorted(name for name in files if not endings or os.path.splitext(name)[1].lower() in endings)

    def get_full_path(self, folder_name: str, filename: str) -> str | None:
        return next((file for path in self.get_folder_paths(folder_name) if os.path.isfile(file := inside(path, filename))), None)

    def get_full_path_or_raise(self, folder_name: str, filename: str) -> str:
        if path := self.get_full_path(folder_name, filename):
            return path
        raise FileNotFoundError(f"{filename} is in none of the folders {', '.join(self.get_folder_paths(folder_name))}.")

    def get_annotated_filepath(self, name: str, default_dir: str | None = None) -> str:
        return inside(default_dir or self.get_input_directory(), name)

    def get_save_image_path(self, filename_prefix: str, output_dir: str, image_width: int = 0, image_height: int = 0) -> tuple[str, str, int, str, str]:
        """(folder, name, first free number, sub-folder, prefix); the folder is made. Files are called NAME_00001_.ending."""
        folder, name = os.path.split(inside(output_dir, filename_prefix))
        os.makedirs(folder, exist_ok=True)
        taken = re.compile(re.escape(name) + r"_(\d+)_", re.IGNORECASE)  # a case-blind file system must not overwrite either
        counter = max((int(match[1]) for match in map(taken.match, os.listdir(folder)) if match), default=0) + 1
        return folder, name, counter, os.path.dirname(os.path.normpath(filename_prefix)), filename_prefix


def inside(folder: str, name: str) -> str:
    """The path of `name` below `folder`. WorkflowError when it leads anywhere else."""
    path = os.path.abspath(os.path.join(folder, name))  # links are followed: who made them meant it
    if "\0" in name or not path.startswith(os.path.join(os.path.abspath(folder), "")):
        raise WorkflowError(f"'{name}' leads out of {folder}: give a name inside of it.")
    return path


class ProgressBar:
    """Progress on stderr, a line for every tenth."""

    def __init__(self, total: int, node_id: Any = None) -> None:
        self.total, self.current, self.tenth = total, 0, -1

    def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
        self.total, self.current = max(total or self.total, 1), value
        if self.tenth < (tenth := 10 * self.current // self.total):
            self.tenth = tenth
            say(f"  {10 * tenth} %")

    def update(self, value: int) -> None:
        self.update_absolute(self.current + value)


def build_module(name: str, **members: Any) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(members)
    return module


@contextlib.contextmanager
def installed(models: Path, inputs: Path, outputs: Path) -> Iterator[None]:
    """The stand-ins under ComfyUI's names while the block runs; latent_preview and comfy.nested_tensor stay absent."""
    gpu, cpu = partial(torch.device, "cuda" if torch.cuda.is_available() else "cpu"), partial(torch.device, "cpu")
    management = build_module(
        "comfy.model_management", get_torch_device=gpu, text_encoder_device=gpu, vae_device=gpu, intermediate_device=cpu, unet_offload_device=cpu,
        free_memory=lambda memory_required, device, keep_loaded=(): [], soft_empty_cache=lambda force=False: torch.cuda.empty_cache(),
        throw_exception_if_processing_interrupted=lambda: None, InterruptProcessingException=KeyboardInterrupt,
    )  # fmt: skip
    utils, latest = build_module("comfy.utils", ProgressBar=ProgressBar), build_module("comfy_api.latest", ComfyExtension=object, io=io, ui=ui)
    parents = build_module("comfy", __path__=[], model_management=management, utils=utils), build_module("comfy_api", __path__=[], latest=latest)
    with tempfile.TemporaryDirectory(prefix="headless-") as scratch:
        modules = {module.__name__: module for module in (*parents, management, utils, latest, FolderPaths(models, inputs, outputs, scratch))}
        before = {name: sys.modules[name] for name in modules if name in sys.modules}
        sys.modules.update(modules)
        try:
            yield
        finally:
            for name in modules:
                del sys.modules[name]
            sys.modules.update(before)
