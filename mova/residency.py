"""Where weights live: mapped files -> the device, layer by layer (spec/performance.md section 3).

A layer is what is computed together: video block i of the active expert and, while they last, audio block i and both
bridge directions. Three ways to have it, decided for every run by what is free then:
views     on the CPU, in the stored dtype: parameters are views of the mapped files, nothing is copied;
resident  every layer of the active expert has a slab of its own;
stream    some layers (evenly spread, as many as fit) have a slab of their own, the others take turns in a few.
Both experts use the same slabs, and the switch between them is only the next entry of the plan.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from .bridge import Bridge, Conditioner
from .cards import DISK, PAGE_CACHE
from .checkpoint import TensorEntry
from .errors import InputError
from .fp8 import fixed_dtypes
from .layers import Block
from .slabs import Feeder, Key, Layout, Link, Slab, Traffic, Turn
from .towers import AudioTower, VideoTower

log = logging.getLogger("mova")

MODES = ("auto", "resident", "stream")
EXPERTS = ("high", "low")
SLABS = 2  # that streamed layers take turns in at least: one computes, one is filled
MARGIN = 2**30  # bytes of device memory left to the allocator and the host
DIRECTIONS = {"to_video": "audio_to_video_conditioners", "to_audio": "video_to_audio_conditioners"}
LAYERS = ("blocks.", *DIRECTIONS.values())  # how the names of tensors within layers begin
PREPARATION = ("text_embedding", "time_embedding", "time_projection")  # used before the first layer of a run only
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

    def module(self, name: str) -> nn.Module:
        return self.experts[name] if name in EXPERTS else getattr(self, name)

    def layer(self, expert: str, i: int) -> Layer:
        to_video, to_audio = (getattr(self.bridge, name) for name in DIRECTIONS.values())
        audio = self.audio.blocks[i] if i < len(self.audio.blocks) else None
        speaks = str(i) in to_video
        return Layer(self.experts[expert].blocks[i], audio, to_video[str(i)] if speaks else None, to_audio[str(i)] if speaks else None)

    def sources(self, key: Key) -> dict[str, TensorEntry]:
        """The stored tensors of a layer, by the name they have in a slab ("video.ffn.0.weight", "to_audio.inner.q.bias", ...)."""
        expert, i = key
        places = {"video": (expert, f"blocks.{i}."), "audio": ("audio", f"blocks.{i}.")}
        places |= {direction: ("bridge", f"{name}.{i}.") for direction, name in DIRECTIONS.items()}
        found = {}
        for place, (part, prefix) in places.items():
            found |= {place + "." + name[len(prefix) :]: entry for name, entry in self.entries[part].items() if name.startswith(prefix)}
        return found

    def dtypes(self, name: str, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """What the tensors of a module are computed with as, by key: `dtype`, or as stored where they are quantized."""
        return dict.fromkeys(self.tensors[name], dtype) | fixed_dtypes(self.module(name))

    def slots(self, key: Key, dtype: torch.dtype) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
        """What a slab must hold for a layer: name, shape and dtype; the keys of the prompt last, since most visits do without them."""
        sources, fixed = self.sources(key), {}
        for place, module in vars(self.layer(*key)).items():
            fixed |= fixed_dtypes(module, place) if module is not None else {}
        for name in sorted(sources, key=lambda name: (is_text_key(name), name)):
            yield name, sources[name].shape, fixed.get(name, dtype)

    def bytes(self, dtype: torch.dtype) -> int:
        """What is computed with in one step: one expert, the audio tower, the bridge."""
        used = {name: self.dtypes(name, dtype) for name in ("high", "audio", "bridge")}
        return sum(tensor.numel() * used[name][key].itemsize for name in used for key, tensor in self.tensors[name].items())


@dataclass(frozen=True)
class Placement:
    """Which layers have a slab of their own, and in how many the others take turns; no slabs at all = views."""

    mode: str
    why: str
    own: frozenset[int] = frozenset()
    shared: int = 0


@dataclass(frozen=True)
class Job:
    """A run as far as it matters to where weights live: bytes beside the layers, and seconds of compute on one layer at least."""

    activations: int
    layer_seconds: float = math.inf


@dataclass(frozen=True)
class Room:
    """Bytes of device memory to be had, and of RAM (None = not known)."""

    free: int
    ram: int | None = None


@dataclass
class Report:
    """What was decided, and what moved since loading."""

    mode: str
    why: str
    resident_layers: int
    bytes_moved: int
    copies: int
    slab_bytes: int
    pinned_bytes: int
    allocations_in_loop: int


class Residency:
    """Brings weights to the device when they are computed with, and takes them away again."""

    def __init__(self, parts: Parts, device: torch.device, dtype: torch.dtype, mode: str = "auto") -> None:
        if mode not in MODES:
            raise InputError(f"residency is {mode!r}; choose {', '.join(MODES)}.")
        self.parts, self.device, self.dtype, self.mode = parts, device, dtype, mode
        self.traffic = Traffic()
        self.placement: Placement | None = None
        self.placed: set[str] = set()
        self.own: dict[int, Slab] = {}
        self.shared: list[Slab] = []
        self.link: Link | None = None
        self.feeder: Feeder | None = None
        self.allocations_before: int | None = None  # of the device's memory, when the first step of a run was through

    # ---------------------------------------------------------------- figures

    @cached_property
    def layer_sources(self) -> dict[Key, dict[str, TensorEntry]]:
        return {(expert, i): self.parts.sources((expert, i)) for expert in EXPERTS for i in range(self.parts.count)}

    @cached_property
    def layouts(self) -> dict[Key, Layout]:
        """Of every layer; those of one kind (the same tensors of the same dtypes) share theirs."""
        kinds: dict[tuple, Layout] = {}
        slots = {key: tuple(self.parts.slots(key, self.dtype)) for key in self.layer_sources}
        return {key: kinds.setdefault(needed, Layout(needed)) for key, needed in slots.items()}

    def kinds(self, i: int) -> set[Layout]:
        """What a slab must have room for that layer i of either expert is to live in."""
        return {self.layouts[expert, i] for expert in EXPERTS}

    @cached_property
    def sizes(self) -> list[int]:
        """Bytes of a slab of its own, for every layer."""
        return [max(layout.nbytes for layout in self.kinds(i)) for i in range(self.parts.count)]

    @cached_property
    def stored(self) -> bool:
        """Whether the files hold what is computed in."""
        used = {name: self.parts.dtypes(name, self.dtype) for name in self.parts.tensors}
        return all(tensor.dtype == used[name][key] for name, tensors in self.parts.tensors.items() for key, tensor in tensors.items())

    def report(self) -> Report:
        placement = self.placement or Placement("not decided", "nothing was computed yet")
        traffic = self.traffic
        return Report(
            placement.mode,
            placement.why,
            len(placement.own),
            traffic.bytes_moved,
            traffic.copies,
            traffic.slab_bytes,
            traffic.pinned_bytes,
            traffic.allocations_in_loop,
        )

    @property
    def empty(self) -> bool:
        """Whether nothing is on the device and no thread is at work."""
        return not (self.placed or self.own or self.shared or self.link or self.feeder)

    def held_bytes(self) -> int:
        """Of slabs, on the device now."""
        return sum(slab.buffer.nbytes for slab in (*self.own.values(), *self.shared))

    # ---------------------------------------------------------------- a run

    def wanted_bytes(self, activations: int) -> int:
        """Free device memory that a run makes use of; with less, more layers stream."""
        slabs = SLABS * max(self.sizes) if self.mode == "stream" else sum(self.sizes)
        return slabs + activations + MARGIN

    def settle(self, activations: int, layer_seconds: float = math.inf) -> None:
        """Decides where layers live for a run whose activations take so many bytes, and which computes so long on a layer at least.

        What does not suit it leaves the device.
        """
        room = Room(free_bytes(self.device) + self.held_bytes(), available_ram())
        placement = choose_placement(self, Job(activations, layer_seconds), room)
        if self.placement is None or (placement.own, placement.shared) != (self.placement.own, self.placement.shared):
            self.release()
            log.info("MOVA weights: %s (%s)", placement.mode, placement.why)
            self.placement = placement

    def shrink(self) -> bool:
        """After the device ran out of memory: the next smaller placement, if there is one."""
        self.release()
        kept = len(self.placement.own) // 2
        if not self.placement.own:
            return False
        self.mode = "stream"
        why = f"the device ran out of memory with {len(self.placement.own)} layers resident"
        self.placement = Placement("stream", why, spread(kept, self.parts.count), self.placement.shared or SLABS)
        log.warning("MOVA weights: %s; now %d of %d.", why, kept, self.parts.count)
        return True

    def begin(self, visits: list[tuple[str, bool]]) -> None:
        """Starts filling slabs for a run: the expert of every step, and whether it still has to read the prompts."""
        if self.placement.mode == "views":
            return
        if self.link is None:
            self.link = Link(self.layouts, self.device, self.layer_sources, self.traffic)
            self.own = {i: Slab(self.kinds(i), self.device) for i in sorted(self.placement.own)}
            self.shared = [Slab(set(self.layouts.values()), self.device) for _ in range(self.placement.shared)]
            self.traffic.slab_bytes = max(self.traffic.slab_bytes, self.held_bytes())
        taking_turns = itertools.cycle(self.shared)
        self.feeder = Feeder(self.link, self.plan(visits), lambda turn: self.own.get(turn.key[1]) or next(taking_turns))

    def plan(self, visits: list[tuple[str, bool]]) -> Iterator[Turn]:
        for expert, reads_prompts in visits:
            for i in range(self.parts.count):
                names = self.layer_sources[expert, i]
                yield Turn((expert, i), frozenset(names if reads_prompts else (name for name in names if not is_text_key(name))))

    def end(self) -> None:
        """Stops filling; the slabs stay for the next run."""
        if self.feeder is not None:
            self.feeder.stop()
            self.feeder = None
        if self.allocations_before is not None:
            self.traffic.allocations_in_loop += device_allocations(self.device) - self.allocations_before
            self.allocations_before = None

    def walk(self, expert: str) -> Iterator[Layer]:
        """The layers of an expert in order, each ready to compute; after `begin`, as its next step says."""
        for i in range(self.parts.count):
            layer = self.parts.layer(expert, i)
            if self.feeder is None:
                yield layer
                continue
            turn, slab = self.feeder.take()
            seat(layer, slab)
            try:
                yield layer
            finally:
                slab.give_back()
        if self.allocations_before is None:
            self.allocations_before = device_allocations(self.device)

    # ---------------------------------------------------------------- what lies outside the layers

    def enter(self, expert: str) -> VideoTower:
        """Makes an expert the active one: embeddings and heads are on the device, the other expert's are not."""
        self.take_away(EXPERTS[1 - EXPERTS.index(expert)])
        for name in (expert, "audio", "bridge"):
            self.bring(name)
        return self.parts.experts[expert]

    def bring(self, name: str) -> None:
        if name in self.placed:
            return
        whole, dtypes = self.placement.mode == "views", self.parts.dtypes(name, self.dtype)
        moved = {key: tensor.to(self.device, dtypes[key]) for key, tensor in self.parts.tensors[name].items() if whole or not key.startswith(LAYERS)}
        self.parts.module(name).load_state_dict(moved, assign=True, strict=False)
        self.placed.add(name)
        self.traffic.bytes_moved += 0 if whole else sum(tensor.nbytes for tensor in moved.values())

    def put_preparation_away(self) -> None:
        """Once prompts and times are read, what read them leaves the device."""
        if self.placement.mode != "views":
            for name in self.placed - {"bridge"}:
                for part in PREPARATION:
                    getattr(self.parts.module(name), part).to("meta")
            self.placed.clear()  # incomplete now: the next run brings them again

    def take_away(self, name: str) -> None:
        self.parts.module(name).to("meta")
        self.placed.discard(name)

    def release(self) -> None:
        """Leaves nothing on the device."""
        self.end()
        if self.link is not None:
            self.link.close()
            self.link = None
        self.own, self.shared = {}, []
        for name in (*EXPERTS, "audio", "bridge"):
            self.take_away(name)


def is_text_key(name: str) -> bool:
    return any(part in name for part in TEXT_KEYS)


def seat(layer: Layer, slab: Slab) -> None:
    """Makes the slab's weights the parameters of the layer's modules."""
    for place, module in vars(layer).items():
        if module is not None:
            for path, owner in module.named_modules(prefix=place):
                for leaf in [leaf for leaf, weight in owner._parameters.items() if weight is not None]:
                    owner._parameters[leaf] = slab.weights[f"{path}.{leaf}"]


def spread(count: int, total: int) -> frozenset[int]:
    """`count` of `total` layers, evenly: what streams between them has time to arrive."""
    return frozenset(i for i in range(total) if (i + 1) * count // total > i * count // total)


def device_allocations(device: torch.device) -> int:
    """How often PyTorch has asked the device for memory so far; a loop that is warm asks no more."""
    return torch.cuda.memory_stats(device).get("num_device_alloc", 0) if device.type == "cuda" else 0


def free_bytes(device: torch.device) -> int:
    """Device memory that could be had now."""
    if device.type != "cuda":
        return 0
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def available_ram() -> int | None:
    """RAM that programs and the page cache can have; None where psutil, which ComfyUI brings, is absent."""
    try:
        import psutil
    except ImportError:
        return None
    return psutil.virtual_memory().available


def slabs_needed(arrival: float, compute: float) -> int:
    """In how many slabs streamed layers take turns (spec/performance.md 1.6), from the seconds a layer travels and computes.

    Two hide an arrival that takes less than half of the compute, however uneven; beyond, one more evens it out. An arrival
    that takes longer than the compute sets the pace whatever the depth.
    """
    return SLABS if not arrival > compute / 2 else SLABS + 1


def choose_placement(residency: Residency, job: Job, room: Room) -> Placement:
    """What fits beside the activations of the run, in a sentence."""
    device, count, mode, sizes = residency.device.type, residency.parts.count, residency.mode, residency.sizes
    everything = Placement("resident", "as asked", frozenset(range(count)))
    if device == "cpu" and mode != "stream" and residency.stored:
        return Placement("views", "the stored dtype on the CPU: views of the mapped files")
    if mode == "resident":
        return everything
    spare, cached = room.free - job.activations - MARGIN, room.ram is None or room.ram >= sum(sizes)
    from_disk = "" if cached else f"; {room.ram / 2**30:.1f} GiB of RAM do not hold the weights, so they come from disk again and again"
    shared = slabs_needed(max(sizes) / (PAGE_CACHE if cached else DISK), job.layer_seconds)
    shared = shared if shared * max(sizes) <= spare else SLABS
    if mode == "stream":
        return Placement("stream", f"as asked, in {shared} slabs{from_disk}", shared=shared)
    if device == "cpu":
        return Placement("stream", f"converted to {residency.dtype} layer by layer{from_disk}", shared=SLABS)
    if device != "cuda":
        return Placement("resident", f"no streaming on {device}", everything.own)
    why = f"{room.free / 2**30:.1f} GiB free, {job.activations / 2**30:.1f} for activations, {sum(sizes) / 2**30:.1f} for all {count} layers"
    if sum(sizes) <= spare:
        return Placement("resident", why, everything.own)
    why += from_disk
    fitting = [own for own in (spread(kept, count) for kept in range(count)) if sum(sizes[i] for i in own) + shared * max(sizes) <= spare]
    return Placement("stream", why, fitting[-1] if fitting else frozenset(), shared)
