"""Model folders that widgets choose from: what is listed, what is said of any other name, and where a listed one lies."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from ..mova.errors import InputError
from ..mova.lipsync.landmarks import TASK, TASK_PAGE
from ..mova.lora.files import BESIDE, ENDINGS
from . import host

AUTO = "auto"


@dataclass(frozen=True)
class Shelf:
    """One of ComfyUI's model folders, or one kind of file in it. Only what is listed is ever opened.

    A sentence is `unchosen` or `unlisted`, then `advice`; {name} is what was given, {root} the folder to put things in, {found} what is listed.
    """

    place: str  # ComfyUI's name of the model folder
    empty: str  # the name that stands for no choice: the only entry where there is nothing
    unchosen: str  # said of `empty`
    unlisted: str  # said of any other name that is not listed
    advice: str  # how both go on
    marker: str = ""  # entries are the folders with a file of this name,
    endings: tuple[str, ...] = ()  # or, without a marker, files with one of these endings
    beside: tuple[str, ...] = ()  # files that have such an ending and are none
    most: int = sys.maxsize  # names in one sentence

    def entries(self) -> dict[str, Path]:
        """What is there now, by the name shown: the path below its root with forward slashes."""
        found = host.walk_folders(self.place, self.marker) if self.marker else host.list_files(self.place, self.endings)
        return {name: path for name, path in found.items() if path.name not in self.beside}

    def choices(self) -> list[str]:
        """The choices of a widget, never empty."""
        return list(self.entries()) or [self.empty]

    def check(self, name: str) -> str | None:
        """What to do when `name` is not listed; None when it is."""
        names = list(self.entries())
        if name in names:
            return None
        sentence = (self.unchosen if name == self.empty else self.unlisted) + self.advice
        more = f" and {len(names) - self.most} more" if len(names) > self.most else ""
        return sentence.format(name=name, root=host.first_root(self.place), found=", ".join(names[: self.most]) + more or "none")

    def path(self, name: str) -> Path:
        """Where a listed name lies; InputError for any other."""
        if (complaint := self.check(name)) is not None:
            raise InputError(complaint)
        return self.entries()[name]


def advise_download(words: str, repository: str) -> str:
    """The advice for model folders; `repository` is one to begin with."""
    folder = f"{{root}}{os.sep}{repository.split('/')[1]}"
    return f" Found there: {{found}}. Download {words}, for example with 'hf download {repository} --local-dir {folder}', press R in ComfyUI and choose it."


MODELS = Shelf(
    place="mova",
    marker="model_index.json",
    empty="put a MOVA folder into models/mova",
    unchosen="No model is chosen.",
    unlisted="'{name}' is no folder with model_index.json in {root}.",
    advice=advise_download("a MOVA checkpoint", "OpenMOSS-Team/MOVA-360p"),
)
LANGUAGE_MODELS = Shelf(  # what writes prompts, where many packs keep it
    place="LLM",
    marker="config.json",
    empty="put a language model into models/LLM",
    unchosen="No model is chosen.",
    unlisted="'{name}' is no folder with config.json in {root}.",
    advice=advise_download("a language model that sees", "Qwen/Qwen3-VL-4B-Instruct"),
)
EARS = Shelf(
    place="audio_encoders",
    endings=(".safetensors", ".pt", ".pth", ".bin"),
    empty="put a CAT, EAT or SSLAM file into models/audio_encoders",
    unchosen="No audio encoder is chosen.",
    unlisted="'{name}' is not in {root}.",
    advice=" Found there: {found}. Put a CAT, EAT or SSLAM file (.safetensors or .pt) into {root}, press R in ComfyUI and choose it.",
)
LORAS = Shelf(
    place="loras",
    endings=ENDINGS,
    beside=BESIDE,
    empty="put a LoRA into models/loras",
    unchosen="No LoRA is chosen.",
    unlisted="'{name}' is no LoRA in {root}.",
    advice=" Found there: {found}. Put a LoRA for MOVA or Wan 14B (.safetensors or .pt) into {root}, press R in ComfyUI and choose it.",
    most=20,  # people have hundreds
)
LANDMARKERS = Shelf(
    place="mova_eval",
    endings=(".task",),
    empty=AUTO,
    unchosen=f"{{root}} holds no {TASK}",
    unlisted="{root} holds no '{name}'",
    advice=f", with which faces are found: download it from {TASK_PAGE} into that folder.",
)
SYNCNETS = Shelf(
    place="mova_eval",
    endings=(".safetensors", ".model", ".pth", ".pt"),
    empty=AUTO,
    unchosen="The method is syncnet, but {root} holds no SyncNet weights: put syncnet_v2.model there, or choose motion.",
    unlisted="{root} holds no '{name}': choose a file that is there, or auto.",
    advice="",
)
