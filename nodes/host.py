"""Every touch of ComfyUI beside comfy_api.latest: folders, devices and memory, progress, preview, cancel."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.utils
import folder_paths
import torch
from comfy import model_management
from torch import Tensor

from ..mova.errors import InputError
from ..mova.sampler import Step

OWN_PLACES = ("mova", "mova_eval", "LLM")  # folders below models/, and their names in extra_model_paths.yaml, that ComfyUI does not know by itself
DEPTH = 4  # sub-folders searched for model folders, so that a link in a circle ends
TEXT_SECONDS = 0.2  # between two states of a text that grows
PREVIEW_SECONDS = 1 / 6  # per latent frame of 4 pictures: a moving preview at the clip's own speed, 24 pictures per second

# ---------------------------------------------------------------- model folders


def register_folders() -> None:
    for place in OWN_PLACES:
        folder_paths.add_model_folder_path(place, os.path.join(folder_paths.models_dir, place))


def first_root(place: str) -> Path:
    """Where things for one of ComfyUI's model folders are put: it may have several roots."""
    return Path(folder_paths.get_folder_paths(place)[0])


def walk_folders(place: str, marker: str) -> dict[str, Path]:
    """Folders that hold a file called `marker`, by the name shown: the path below their root with forward slashes."""
    found: dict[str, Path] = {}
    for root in map(Path, folder_paths.get_folder_paths(place)):
        for folder, inside, files in os.walk(root, followlinks=True):
            below = Path(folder).relative_to(root)
            if marker in files:
                found.setdefault(below.as_posix() if below.parts else root.name, Path(folder))
            if marker in files or len(below.parts) == DEPTH:
                inside.clear()
    return dict(sorted(found.items()))


def list_files(place: str, endings: tuple[str, ...]) -> dict[str, Path]:
    """Files with one of these endings, by the name shown: with forward slashes on every system."""
    names = [name for name in folder_paths.get_filename_list(place) if name.lower().endswith(endings)]
    found = {name.replace("\\", "/"): folder_paths.get_full_path(place, name) for name in names}
    return {name: Path(path) for name, path in found.items() if path}  # a broken link is listed and leads nowhere


def input_directory() -> Path:
    return Path(os.path.abspath(folder_paths.get_input_directory()))


def input_folder(name: str) -> Path:
    """A folder inside ComfyUI's input directory; InputError for what is none or lies elsewhere."""
    root = str(input_directory())
    path = os.path.abspath(os.path.join(root, name.strip()))
    if not name.strip() or "\0" in name or not path.startswith(os.path.join(root, "")):
        raise InputError(f"'{name}' is no folder inside of {root}: put the recordings into a folder there and give its name, such as 'my_sounds'.")
    if not os.path.isdir(path):
        inside = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        raise InputError(f"There is no folder '{name}' in {root}. Folders there: {', '.join(inside[:20]) or 'none'}.")
    return Path(path)


def output_folder(*names: str) -> Path:
    """A folder below ComfyUI's output directory; it is made by who writes into it."""
    return Path(folder_paths.get_output_directory(), *names)


def user_folder() -> Path:
    """Where settings and caches are kept; ComfyUI does not serve user folders that begin with two underscores."""
    return Path(folder_paths.get_user_directory()) / "__mova"


def kept_runs() -> Path:
    """Where unfinished runs are kept; made when it is not there."""
    folder = user_folder() / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def text_cache() -> Path:
    return user_folder() / "text_cache"


def prompt_service() -> Path:
    """The settings of the service that writes prompts; there need not be such a file."""
    return user_folder() / "prompt.json"


# ---------------------------------------------------------------- devices and memory


def torch_device() -> torch.device:
    return model_management.get_torch_device()


def describe_device(device: torch.device) -> tuple[str, int | None]:
    """(name, bytes of memory) of a GPU, such as "NVIDIA GeForce RTX 4090"; (type, None) of what has no memory of its own."""
    if device.type != "cuda":
        return device.type, None
    return torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory


def text_device() -> torch.device:
    return model_management.text_encoder_device()


def vae_device() -> torch.device:
    return model_management.vae_device()


def intermediate_device() -> torch.device:
    """Where what goes from node to node lies."""
    return model_management.intermediate_device()


def free_memory(need: int, device: torch.device) -> None:
    """Asks ComfyUI to put away models of its own until `need` bytes are free on the device."""
    model_management.free_memory(need, device)


@contextmanager
def placed(part: Any, need: int, device: torch.device) -> Iterator[Any]:
    """A VAE or an ear of ours on the device while the block runs; afterwards, however it ends, it is on the CPU again. need: bytes made free before, 0 = none."""
    if need:
        free_memory(need, device)
    try:
        yield part.to(device)
    finally:
        part.to("cpu")


# ---------------------------------------------------------------- progress, preview, cancel


def check_cancel() -> None:
    """Raises ComfyUI's interrupt when the user asked for it; call it from the thread that executes the node."""
    model_management.throw_exception_if_processing_interrupted()


class ChunkProgress:
    """Bar and cancel of a VAE's or text encoder's work; to be called with (done, total)."""

    def __init__(self) -> None:
        self.bar = comfy.utils.ProgressBar(1)

    def __call__(self, done: int, total: int) -> None:
        check_cancel()
        self.bar.update_absolute(done, total)


class TextProgress:
    """A text that grows on a node of the page, and cancel; to be called with the text so far."""

    def __init__(self, node_id: str) -> None:
        self.node_id, self.text, self.shown = node_id, "", 0.0

    def __call__(self, text: str) -> None:
        check_cancel()
        if text != self.text and time.monotonic() - self.shown >= TEXT_SECONDS:
            self.text, self.shown = text, time.monotonic()
            show_text(self.node_id, text)


class SamplingProgress:
    """Bar, moving preview and cancel of one sampling run; its methods are the sampler's callbacks."""

    def __init__(self, steps: int, device: torch.device) -> None:
        self.steps, self.step, self.layers = steps, 0, 1
        self.bar = comfy.utils.ProgressBar(steps)
        self.previewer = find_previewer(device)
        self.clean: Tensor | None = None  # predicted clean latents of the last step
        self.frame, self.shown = 0, 0.0

    def on_layer(self, done: int, total: int) -> None:
        check_cancel()
        self.layers = total
        due = time.monotonic() - self.shown >= PREVIEW_SECONDS
        self.bar.update_absolute(self.step * total + done, self.steps * total, self.next_picture() if due else None)

    def on_step(self, step: Step) -> None:
        check_cancel()
        self.step, self.clean = step.index + 1, step.video[:1].cpu()
        self.bar.update_absolute(self.step * self.layers, self.steps * self.layers, self.next_picture())

    def next_picture(self) -> tuple | None:
        """The next latent frame of the clip as the host shows it; None where there is no previewer, or nothing predicted yet."""
        if self.previewer is None or self.clean is None:
            return None
        self.frame = (self.frame + 1) % self.clean.shape[2]
        self.shown = time.monotonic()
        return self.previewer.decode_latent_to_preview_image("JPEG", self.clean[:, :, self.frame : self.frame + 1])


def find_previewer(device: torch.device) -> Any | None:
    """The host's previewer for Wan latents; None when previews are switched off or the host has none."""
    try:
        import latent_preview
        from comfy.latent_formats import Wan21
    except ImportError:
        return None
    return latent_preview.get_previewer(device, Wan21())


def show_text(node_id: str, text: str) -> None:
    """Writes on a node of the page while it runs; does nothing where there is no page."""
    try:
        from server import PromptServer
    except ImportError:
        return
    PromptServer.instance.send_progress_text(text, node_id)
