"""LoRAs: which file, how loud in which tower, and what of it fits the model (spec/mova.md 0.4, 7).

Base weights are never touched: changes are added where weights arrive to be computed with (mova.lora.stack).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

from ..errors import LoraError
from .adapters import Adapter, list_kinds, list_ranks, read_adapters
from .deltas import Change
from .files import LoraFile, read_lora_file
from .places import CHOICES, PARTS, Places, Shapes, refuse_file
from .report import LoraReport, trigger_words

Changes = dict[str, dict[str, list[Change]]]  # of every tensor, by part and name


@dataclass(frozen=True)
class Lora:
    """A LoRA file (or its trainer's folder) and how strongly it acts: 1 = as trained, 0 = not at all, negative = the opposite.

    alpha None = as the file says; scale 1 where it says nothing that can be trusted. expert: where a file goes that names no
    tower, as those for Wan do: high | low | both | audio, or auto, by its name and keys. LoraError for values that are no numbers.
    """

    path: str | Path
    alpha: float | None = None
    video_high: float = 1.0
    video_low: float = 1.0
    audio: float = 1.0
    bridge: float = 1.0
    expert: str = "auto"

    def __post_init__(self) -> None:
        numbers = {"alpha": self.alpha or 0.0, **{f"the strength of {part}": self.strength(part) for part in PARTS}}
        if wrong := [f"{name} is {value!r}" for name, value in numbers.items() if not (isinstance(value, Real) and math.isfinite(value))]:
            raise LoraError(f"{self.path}: {wrong[0]}; a finite number is needed.")
        if self.expert not in CHOICES:
            raise LoraError(f"{self.path}: expert is {self.expert!r}; choose {', '.join(CHOICES)}.")

    def strength(self, part: str) -> float:
        """In a part of the denoiser: high, low, audio or bridge."""
        return {"high": self.video_high, "low": self.video_low, "audio": self.audio, "bridge": self.bridge}[part]


@dataclass(frozen=True)
class LoadedLora:
    """A LoRA matched with a model."""

    lora: Lora
    report: LoraReport
    changes: Changes = field(repr=False)

    @property
    def settings(self) -> dict[str, Any]:
        """How a clip was made with it, as JSON values."""
        return {"file": self.report.label, "alpha": self.lora.alpha, "strength": {part: self.lora.strength(part) for part in self.report.towers}}

    @property
    def identity(self) -> dict[str, Any]:
        """What makes two runs differ, as JSON values: a file that is replaced has another size or time."""
        return self.settings | {"stamp": list(self.report.stamp)}


def load_lora(lora: Lora, shapes: Shapes) -> LoadedLora:
    """Reads a LoRA and finds the tensors it changes among `shapes`. LoraError for files that are damaged or made for another model."""
    return match_lora(read_lora_file(lora.path), lora, shapes)


def match_lora(file: LoraFile, lora: Lora, shapes: Shapes) -> LoadedLora:
    adapters, others = read_adapters(file, lora.alpha)
    places = Places(file, lora.expert, shapes, adapters)
    matched: list[Adapter] = []
    unmatched: list[str] = []
    changes: Changes = {part: {} for part in PARTS}
    changed: dict[tuple[str, str], str] = {}  # tensor -> path of the adapter that changes it
    for adapter in adapters:
        found = places.find(adapter)
        if found is None:
            unmatched.append(adapter.path)
            continue
        matched.append(adapter)
        for part, deltas in found.items():
            for name, delta in deltas:
                if (other := changed.setdefault((part, name), adapter.path)) != adapter.path:
                    raise LoraError(f"{file.path} changes one layer twice, as {other} and as {adapter.path}: it is damaged, or two LoRAs in one.")
                if strength := lora.strength(part):
                    changes[part].setdefault(name, []).append(Change(delta, strength))
    unmatched += others
    if 2 * len(matched) < len(matched) + len(unmatched):
        refuse_file(file, len(matched) + len(unmatched), unmatched)
    report = describe_lora(file, lora, places, matched, unmatched, changes)
    return LoadedLora(lora, report, changes)


def describe_lora(file: LoraFile, lora: Lora, places: Places, matched: list[Adapter], unmatched: list[str], changes: Changes) -> LoraReport:
    status = file.path.stat()
    return LoraReport(
        file.label,
        stamp=(file.path.name, status.st_size, status.st_mtime_ns),
        kinds=tuple(list_kinds(matched)),
        ranks=tuple(list_ranks(matched)),
        scales=tuple(dict.fromkeys(adapter.scale for adapter in matched if adapter.scale)),
        towers={part: count for part, count in places.counts.items() if count},
        strengths={part: lora.strength(part) for part in PARTS},
        why=places.why if places.guessed else "",
        matched=len(matched),
        unmatched=tuple(unmatched),
        nbytes=count_bytes(changes),
        words=trigger_words(file.metadata),
    )


def count_bytes(changes: Changes) -> int:
    """RAM that the numbers take; tensors of both experts share theirs."""
    deltas = [change.delta for tensors in changes.values() for found in tensors.values() for change in found]
    return sum({id(tensor): tensor.nbytes for delta in deltas for tensor in delta.tensors.values()}.values())


def parse_lora(text: str) -> Lora:
    """robot.safetensors:0.8 -> a LoRA at strength 0.8 in every tower; a path may hold colons itself."""
    path, _, strength = text.rpartition(":")
    try:
        loud = float(strength) if path else 1.0
    except ValueError:  # the colon was the path's
        path, loud = text, 1.0
    return Lora(path or text, video_high=loud, video_low=loud, audio=loud, bridge=loud)
