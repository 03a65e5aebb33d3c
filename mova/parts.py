"""The modules of the denoiser, the layers they are computed in, and where the bytes of a layer lie."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from .bridge import Bridge, Conditioner
from .checkpoint import TensorEntry
from .fp8 import fixed_dtypes
from .layers import Block
from .reading import Held, Source
from .slabs import Key
from .towers import AudioTower, VideoTower

T = TypeVar("T")

EXPERTS = ("high", "low")
FOLDERS = {"high": "video_dit", "low": "video_dit_2", "audio": "audio_dit", "bridge": "dual_tower_bridge"}  # of a checkpoint
DIRECTIONS = {"to_video": "audio_to_video_conditioners", "to_audio": "video_to_audio_conditioners"}
LAYERS = ("blocks.", *DIRECTIONS.values())  # how the names of tensors within layers begin
TEXT_KEYS = ("cross_attn.k.", "cross_attn.v.", "cross_attn.norm_k.")  # used once per prompt and expert


@dataclass
class Layer:
    """The modules of one layer, weights in place; None where the audio tower has ended or the bridge is silent."""

    video: Block
    audio: Block | None
    to_video: Conditioner | None
    to_audio: Conditioner | None


@dataclass
class Parts:
    """Every module of the denoiser, on the meta device until placed, with the tensors of its files."""

    experts: dict[str, VideoTower]
    audio: AudioTower
    bridge: Bridge
    tensors: dict[str, dict[str, Tensor]] = field(repr=False)  # of "high", "low", "audio", "bridge": views of the mapped files by key
    entries: dict[str, dict[str, TensorEntry]] = field(repr=False)  # the same: where the bytes lie

    @property
    def count(self) -> int:
        return len(self.experts["high"].blocks)

    def keys(self) -> list[Key]:
        """Of the layers of both experts."""
        return [(expert, i) for expert in EXPERTS for i in range(self.count)]

    def module(self, name: str) -> nn.Module:
        return self.experts[name] if name in EXPERTS else getattr(self, name)

    def layer(self, expert: str, i: int) -> Layer:
        to_video, to_audio = (getattr(self.bridge, name) for name in DIRECTIONS.values())
        audio = self.audio.blocks[i] if i < len(self.audio.blocks) else None
        speaks = str(i) in to_video
        return Layer(self.experts[expert].blocks[i], audio, to_video[str(i)] if speaks else None, to_audio[str(i)] if speaks else None)

    def bare(self) -> Parts:
        """The same files with modules of their own, on the meta device."""
        parameters = [parameter for name in self.tensors for parameter in self.module(name).parameters()]
        memo = {id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False) for parameter in parameters}
        return Parts(*copy.deepcopy((self.experts, self.audio, self.bridge), memo), self.tensors, self.entries)

    def shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Of every tensor, by part and name."""
        return {name: {key: tuple(tensor.shape) for key, tensor in tensors.items()} for name, tensors in self.tensors.items()}

    def sources(self, key: Key) -> dict[str, TensorEntry]:
        """The stored tensors of a layer, by the name they have in a slab ("video.ffn.0.weight", "to_audio.inner.q.bias", ...)."""
        return pick_layer(key, self.entries)

    def dtypes(self, name: str, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """What the tensors of a module are computed with as, by key: `dtype`, or as stored where they are quantized."""
        return dict.fromkeys(self.tensors[name], dtype) | fixed_dtypes(self.module(name))

    def slots(self, key: Key, sources: Mapping[str, Source], dtype: torch.dtype) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
        """What a slab must hold for a layer: name, shape and dtype; the keys of the prompt last, since most visits do without them."""
        fixed = {name: source.tensor.dtype for name, source in sources.items() if isinstance(source, Held)}
        for place, module in vars(self.layer(*key)).items():
            fixed |= fixed_dtypes(module, place) if module is not None else {}
        for name in sorted(sources, key=lambda name: (is_text_key(name), name)):
            yield name, sources[name].shape, fixed.get(name, dtype)

    def bytes(self, dtype: torch.dtype) -> int:
        """What is computed with in one step: one expert, the audio tower, the bridge."""
        used = {name: self.dtypes(name, dtype) for name in ("high", "audio", "bridge")}
        return sum(tensor.numel() * used[name][key].itemsize for name in used for key, tensor in self.tensors[name].items())


def pick_layer(key: Key, parts: Mapping[str, Mapping[str, T]]) -> dict[str, T]:
    """What belongs to a layer among things by part and tensor, by the name a tensor has in a slab."""
    expert, i = key
    places = {"video": (expert, f"blocks.{i}."), "audio": ("audio", f"blocks.{i}.")}
    places |= {direction: ("bridge", f"{name}.{i}.") for direction, name in DIRECTIONS.items()}
    return {
        f"{place}.{name[len(prefix) :]}": value
        for place, (part, prefix) in places.items()
        for name, value in parts.get(part, {}).items()
        if name.startswith(prefix)
    }


def is_text_key(name: str) -> bool:
    return any(part in name for part in TEXT_KEYS)
