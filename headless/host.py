"""Stand-ins for the small part of ComfyUI that nodes import: comfy_api.latest, folder_paths, comfy.model_management, comfy.utils.

Written from their public signatures (0.12.2). What these do not know raises, so that nothing passes here on something made up.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from enum import Enum
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from . import WorkflowError, say

# Keywords by which an input may be declared; the first of a type may also be given by position.
SOCKET = ("display_name", "optional", "tooltip", "lazy", "extra_dict", "raw_link", "advanced")
WIDGET = (*SOCKET, "default", "socketless", "force_input")
KEYWORDS = {
    "INT": (*WIDGET, "min", "max", "step", "control_after_generate", "display_mode"),
    "FLOAT": (*WIDGET, "min", "max", "step", "round", "display_mode"),
    "STRING": (*WIDGET, "multiline", "placeholder", "dynamic_prompts"),
    "BOOLEAN": (*WIDGET, "label_on", "label_off"),
    "COMBO": ("options", *WIDGET[:-1], "control_after_generate", "upload", "image_folder", "remote"),
}
EVERY_KEYWORD = sorted({name for names in KEYWORDS.values() for name in names})
TYPES = ("Int", "Float", "String", "Boolean", "Combo", "Image", "Mask", "Latent", "Audio", "Video", "Vae", "Conditioning", "Model", "Clip", "Sigmas", "Noise")
FLAGS = ("is_input_list", "is_output_node", "is_deprecated", "is_experimental", "is_dev_only", "is_api_node", "not_idempotent")
TIMES = {"year": "%Y", "month": "%m", "day": "%d", "hour": "%H", "minute": "%M", "second": "%S"}  # what %year% in a file name means


def declare(known: dict[str, Any], given: dict[str, Any], **fixed: Any) -> SimpleNamespace:
    """The known attributes, those given changed. TypeError for a keyword that the real one does not have."""
    if unknown := sorted(set(given) - set(known)):
        raise TypeError(f"unexpected keyword arguments: {', '.join(unknown)}")
    return SimpleNamespace(**{**known, **given, **fixed})


def build_input(io_type: str, id: str, first: Any = None, **given: Any) -> SimpleNamespace:
    """One declared input; every keyword of any input is an attribute, None when it was not given."""
    known = KEYWORDS.get(io_type, SOCKET)
    item = declare({**dict.fromkeys(known), known[0]: first}, given, id=id, io_type=io_type)
    fixed = {"optional": bool(item.optional), "is_widget": io_type in KEYWORDS and not given.get("force_input")}
    return SimpleNamespace(**{**dict.fromkeys(EVERY_KEYWORD), **vars(item), **fixed})


def build_output(io_type: str, id: str | None = None, display_name: str | None = None, **given: Any) -> SimpleNamespace:
    return declare({"tooltip": None, "is_output_list": False}, given, io_type=io_type, id=id, display_name=display_name)


def build_type(io_type: str) -> SimpleNamespace:
    return SimpleNamespace(io_type=io_type, Type=Any, Input=partial(build_input, io_type), Output=partial(build_output, io_type))


def build_schema(node_id: str, **given: Any) -> SimpleNamespace:
    lists = {name: [] for name in ("inputs", "outputs", "hidden", "search_aliases")}
    return declare({**lists, **dict.fromkeys(FLAGS, False), **dict.fromkeys(("display_name", "category", "description"))}, given, node_id=node_id)


class NodeOutput:
    """What a node returns. Expanding and blocking the graph, which the real one can, are not supported and raise TypeError."""

    def __init__(self, *args: Any, ui: Any = None) -> None:
        self.args, self.result, self.ui = args, args or None, ui


class ComfyNode:
    @classmethod
    def GET_SCHEMA(cls) -> SimpleNamespace:
        cls.SCHEMA = cls.define_schema()
        return cls.SCHEMA


class ComfyExtension:
    async def on_load(self) -> None: ...


def show(text: str) -> SimpleNamespace:
    """What a node shows on the page: here a line of text."""
    return SimpleNamespace(as_dict=lambda: {"text": (text,)})


ui = SimpleNamespace(
    PreviewText=lambda value: show(value),
    PreviewImage=lambda image, animated=False, cls=None: show(f"preview: {image.shape[0]} x {image.shape[2]}x{image.shape[1]} px"),
    PreviewAudio=lambda audio, cls=None: show(f"preview: {audio['waveform'].shape[-1] / audio['sample_rate']:.2f} s of sound"),
)
Hidden = Enum("Hidden", {name: name.upper() for name in ("unique_id", "prompt", "extra_pnginfo", "dynprompt")})
io = SimpleNamespace(
    **{name: build_type(name.upper()) for name in TYPES}, AnyType=build_type("*"), Custom=build_type, Schema=build_schema,
    ComfyNode=ComfyNode, NodeOutput=NodeOutput, Hidden=Hidden, NumberDisplay=Enum("NumberDisplay", {name: name for name in ("number", "slider")}),
    MultiType=SimpleNamespace(Input=lambda id, types, **given: build_input(",".join(kind.io_type for kind in types), id, **given)),
)  # fmt: skip


class FolderPaths(ModuleType):
    """The directories of this run. A name from a workflow never reaches outside of them (WorkflowError)."""

    supported_pt_extensions = {".ckpt", ".pt", ".pt2", ".bin", ".pth", ".safetensors", ".pkl", ".sft"}

    def __init__(self, models: Path, inputs: Path, outputs: Path, scratch: str) -> None:
        super().__init__("folder_paths")
        self.models_dir = os.path.abspath(models)
        self.places = {"input": os.path.abspath(inputs), "output": os.path.abspath(outputs), "temp": scratch, "user": scratch}
        for place, path in self.places.items():
            setattr(self, f"get_{place}_directory", partial(str, path))
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
        file, where = re.fullmatch(r"(.*?)(?: \[(input|output|temp)\])?", name, re.DOTALL).groups()
        return inside(self.places[where] if where else default_dir or self.places["input"], file)

    def exists_annotated_filepath(self, name: str) -> bool:
        return os.path.isfile(self.get_annotated_filepath(name))

    def get_save_image_path(self, filename_prefix: str, output_dir: str, image_width: int = 0, image_height: int = 0) -> tuple[str, str, int, str, str]:
        """(folder, name, first free number, sub-folder, prefix); the folder is made. Files are called NAME_00001_.ending."""
        for word, value in {"width": image_width, "height": image_height, **TIMES}.items():
            filename_prefix = filename_prefix.replace(f"%{word}%", time.strftime(str(value)))
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


def get_torch_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class ProgressBar:
    """Progress on stderr: one line that updates on a terminal, at most five lines elsewhere."""

    def __init__(self, total: int, node_id: Any = None) -> None:
        self.total, self.current, self.quarter = total, 0, -1

    def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
        self.total = max(total or self.total, 1)
        self.current = min(value, self.total)
        if sys.stderr.isatty():
            print(f"\r  {100 * self.current // self.total} % ", end="\n" if self.current == self.total else "", file=sys.stderr, flush=True)
        elif self.quarter < (quarter := 4 * self.current // self.total):
            self.quarter = quarter
            say(f"  {25 * quarter} %")

    def update(self, value: int) -> None:
        self.update_absolute(self.current + value)


def build_module(name: str, **members: Any) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(members)
    return module


@contextlib.contextmanager
def installed(models: Path, inputs: Path, outputs: Path) -> Iterator[None]:
    """The stand-ins under ComfyUI's names while the block runs; latent_preview and comfy.nested_tensor stay absent. WorkflowError inside a real ComfyUI."""
    if getattr(sys.modules.get("comfy_api.latest"), "__file__", None):
        raise WorkflowError("ComfyUI runs in this process: queue the workflow there. headless is for machines without it.")
    devices = {**dict.fromkeys(("get_torch_device", "text_encoder_device", "vae_device"), get_torch_device),
               **dict.fromkeys(("intermediate_device", "unet_offload_device"), partial(torch.device, "cpu"))}  # fmt: skip
    management = build_module("comfy.model_management", **devices, throw_exception_if_processing_interrupted=lambda: None,
                              free_memory=lambda memory_required, device, keep_loaded=(): [], soft_empty_cache=lambda force=False: torch.cuda.empty_cache(),
                              InterruptProcessingException=KeyboardInterrupt)  # fmt: skip
    utils, latest = build_module("comfy.utils", ProgressBar=ProgressBar), build_module("comfy_api.latest", ComfyExtension=ComfyExtension, io=io, ui=ui)
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
