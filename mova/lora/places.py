"""Where the layers of a LoRA file belong in a model, and whether they fit there."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..errors import LoraError
from .adapters import Adapter
from .deltas import Delta
from .files import LoraFile
from .keys import SECOND, LayerNames, guess_family, name_layers, split_path
from .report import TOWERS, guess_expert, made_for_sound

PARTS = ("high", "low", "audio", "bridge")
CHOICES = ("auto", "high", "low", "both", "audio")  # where a file goes that names no tower
EXPERTS = {"high": ("high",), "low": ("low",), "both": ("high", "low")}
INPUTS = "patch_embedding"  # the layer that differs among Wan's models by what they read beside noise: text to video, image to video, MOVA
TAKEN = "MOVA takes LoRAs for MOVA, Wan 2.2 A14B and Wan 2.1 14B."

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]  # of every tensor, by part and name


class Places:
    """Where the layers of a file belong in a model."""

    def __init__(self, file: LoraFile, expert: str, shapes: Shapes, adapters: list[Adapter]) -> None:
        self.file, self.shapes, self.guessed = file, shapes, False
        self.names: dict[str, LayerNames] = {part: name_layers(shapes[part]) for part in ("high", "audio", "bridge")}
        self.experts, self.why = self.choose_experts(expert)
        self.sound = expert == "audio" or (expert == "auto" and made_for_sound(file) and any(map(self.fits_sound, adapters)))
        self.counts: dict[str, int] = dict.fromkeys(PARTS, 0)  # layers found

    def choose_experts(self, expert: str) -> tuple[tuple[str, ...], str]:
        """The experts that a file for "a video expert" goes to, and why."""
        if any(SECOND.search(key) for key in self.file.tensors):
            return EXPERTS["high"], "its keys name both experts"
        if expert in EXPERTS:
            return EXPERTS[expert], "as asked"
        guessed, why = guess_expert(self.file)
        return EXPERTS[guessed], why

    def find(self, adapter: Adapter) -> dict[str, list[tuple[str, Delta]]] | None:
        """By part, the tensors that an adapter changes and how; None where the model has no such layer. LoraError for another shape."""
        told, inside = split_path(adapter.path)
        for part in self.candidates(told):
            if (layer := self.names["high" if part in EXPERTS else part].find(inside)) is None:
                continue
            parts = self.experts if part == "both" else (part,)
            self.guessed |= part == "both"
            found = {each: self.fit(adapter, each, layer) for each in parts}
            if not all(found.values()):
                return None
            for each in parts:
                self.counts[each] += 1
            return found
        return None

    def fits_sound(self, adapter: Adapter) -> bool:
        """Whether a layer of the audio tower has the name and the shape of an adapter."""
        layer = self.names["audio"].find(split_path(adapter.path)[1])
        return layer is not None and any(
            fits(delta, self.shapes["audio"].get(f"{layer}.{leaf}")) for leaf, deltas in adapter.changes.items() for delta in deltas
        )

    def candidates(self, told: str | None) -> tuple[str, ...]:
        """Parts that a layer may belong to; "both" = the experts chosen for the file."""
        if told is None:
            return ("audio",) if self.sound else ("both", "bridge")
        return ("both",) if told == "expert" else (told,)

    def fit(self, adapter: Adapter, part: str, layer: str) -> list[tuple[str, Delta]]:
        """The tensors of a layer and their changes; none where it lacks one or reads other inputs than the LoRA's model."""
        found = []
        for leaf, deltas in adapter.changes.items():
            name = next((name for name in (f"{layer}.{leaf}", layer) if name in self.shapes[part]), None)
            if name is None:
                return []
            for delta in deltas:
                if not fits(delta, self.shapes[part][name]):
                    if layer == INPUTS:
                        return []
                    self.refuse(adapter, part, name, delta)
                found.append((name, delta))
        return found

    def refuse(self, adapter: Adapter, part: str, name: str, delta: Delta) -> None:
        sound = " If it was trained on MOVA's audio tower, choose expert 'audio'." if fits(delta, self.shapes["audio"].get(name)) and part != "audio" else ""
        raise LoraError(
            f"{self.file.label}: {adapter.path} changes a tensor of {' x '.join(map(str, delta.shape))}, but {name} of this model's {TOWERS[part]} is "
            f"{' x '.join(map(str, self.shapes[part][name]))}. {name_family(self.file)}{TAKEN}{sound}"
        )


def refuse_file(file: LoraFile, total: int, unmatched: list[str]) -> None:
    """LoraError for a file that hardly fits."""
    raise LoraError(f"{file.label}: {len(unmatched)} of {total} layers fit no layer of this model (first: {unmatched[0][:120]}). {name_family(file)}{TAKEN}")


def name_family(file: LoraFile) -> str:
    family = guess_family(file.tensors, {key: tuple(tensor.shape) for key, tensor in file.tensors.items()})
    return f"It looks like a LoRA for {family}; " if family else ""


def fits(delta: Delta, shape: tuple[int, ...] | None) -> bool:
    """Whether a tensor of that shape can be changed by a delta; None has none."""
    return shape is not None and delta.shape == (shape[0], math.prod(shape[1:]))
