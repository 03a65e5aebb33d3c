"""Where weights live: mapped files -> the device, layer by layer (spec/performance.md section 3).

A layer is what is computed together: video block i of the active expert and, while they last, audio block i and both
bridge directions. Three ways to have it, decided for every run by what is free then:
views     on the CPU, in the stored dtype: parameters are views of the mapped files, nothing is copied;
resident  every layer of the active expert has a slab of its own;
stream    some layers (evenly spread, as many as fit) have a slab of their own, the others take turns in a few.
Both experts use the same slabs, and the switch between them is only the next entry of the plan.
LoRAs are added to a layer when a slab is filled with it (mova.lora.stack), so with them there are slabs on the CPU, too.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from .cards import DISK, PAGE_CACHE
from .errors import InputError
from .fp8 import QuantizedLinear
from .lora import Changes
from .lora.stack import LayerChanges, adapt_layer, adapt_tensors, list_factors
from .parts import EXPERTS, LAYERS, Layer, Parts, is_text_key, pick_layer
from .reading import Source
from .slabs import Feeder, Key, Layout, Link, Slab, Traffic, Turn
from .towers import VideoTower

log = logging.getLogger("mova")

MODES = ("auto", "resident", "stream")
SLABS = 2  # that streamed layers take turns in at least: one computes, one is filled
MARGIN = 2**30  # bytes of device memory left to the allocator and the host
PREPARATION = ("text_embedding", "time_embedding", "time_projection")  # used before the first layer of a run only


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

    def __init__(self, parts: Parts, device: torch.device, dtype: torch.dtype, mode: str = "auto", changes: Changes | None = None) -> None:
        if mode not in MODES:
            raise InputError(f"residency is {mode!r}; choose {', '.join(MODES)}.")
        self.parts, self.device, self.dtype, self.mode = parts, device, dtype, mode
        self.changes = changes or {}  # of LoRAs, by part and tensor
        self.traffic = Traffic()
        self.placement: Placement | None = None
        self.most = parts.count  # layers that have a slab of their own; fewer once the device ran out of memory
        self.placed: set[str] = set()
        self.own: dict[int, Slab] = {}
        self.shared: list[Slab] = []
        self.link: Link | None = None
        self.feeder: Feeder | None = None
        self.allocations_before: int | None = None  # of the device's memory, when the first step of a run was through

    # ---------------------------------------------------------------- figures

    @cached_property
    def layer_sources(self) -> dict[Key, dict[str, Source]]:
        """What a slab is filled with, by its name there: a layer's tensors, and the factors of what LoRAs change in them."""
        return {key: self.parts.sources(key) | list_factors(self.layer_changes[key]) for key in self.parts.keys()}

    @cached_property
    def layer_changes(self) -> dict[Key, LayerChanges]:
        return {key: pick_layer(key, self.changes) for key in self.parts.keys()}

    @cached_property
    def layouts(self) -> dict[Key, Layout]:
        """Of every layer; those of one kind (the same tensors of the same dtypes) share theirs."""
        kinds: dict[tuple, Layout] = {}
        slots = {key: tuple(self.parts.slots(key, sources, self.dtype)) for key, sources in self.layer_sources.items()}
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
        """Whether the files hold what is computed with."""
        if self.changes:
            return False
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
        placement = limit(choose_placement(self, Job(activations, layer_seconds), room), self.most, self.parts.count)
        if self.placement is None or (placement.own, placement.shared) != (self.placement.own, self.placement.shared):
            self.release()
            log.info("MOVA weights: %s (%s)", placement.mode, placement.why)
            self.placement = placement

    def shrink(self) -> bool:
        """After the device ran out of memory: `settle` keeps half as many layers from now on; False when there are none to give up."""
        self.release()
        if not self.placement.own:
            return False
        self.most = len(self.placement.own) // 2
        log.warning("MOVA weights: the device ran out of memory with %d layers resident; now %d of %d.", len(self.placement.own), self.most, self.parts.count)
        return True

    def begin(self, visits: list[tuple[str, bool]]) -> None:
        """Starts filling slabs for a run: the expert of every step, and whether it still has to read the prompts."""
        if self.placement.mode == "views":
            return
        if self.link is None:
            self.link = Link(self.layouts, self.device, self.layer_sources, self.traffic, self.adapt if self.changes else None)
            self.own = {i: Slab(self.kinds(i), self.device) for i in sorted(self.placement.own)}
            self.shared = [Slab(set(self.layouts.values()), self.device) for _ in range(self.placement.shared)]
            self.traffic.slab_bytes = max(self.traffic.slab_bytes, self.held_bytes())
        taking_turns = itertools.cycle(self.shared)
        self.feeder = Feeder(self.link, self.plan(visits), lambda turn: self.own.get(turn.key[1]) or next(taking_turns))

    def adapt(self, slab: Slab, turn: Turn) -> None:
        """Adds what LoRAs change to a layer that has just been filled."""
        slab.sides = adapt_layer(self.layer_changes[turn.key], {name: weight.data for name, weight in slab.weights.items()}, turn.names, self.dtype)

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
                unseat_sides(layer)
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
        adapt_tensors(self.changes.get(name, {}), moved)
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


def seat(layer: Layer, slab: Slab) -> None:
    """Makes the slab's weights the parameters of the layer's modules."""
    for place, module in vars(layer).items():
        if module is not None:
            for path, owner in module.named_modules(prefix=place):
                for leaf in [leaf for leaf, weight in owner._parameters.items() if weight is not None]:
                    owner._parameters[leaf] = slab.weights[f"{path}.{leaf}"]
                if path in slab.sides:
                    owner.sides = slab.sides[path]


def unseat_sides(layer: Layer) -> None:
    """Side branches belong to the slab; a layer that kept them would keep their memory."""
    for module in filter(None, vars(layer).values()):
        for owner in module.modules():
            if isinstance(owner, QuantizedLinear):
                owner.sides = ()


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


def limit(placement: Placement, most: int, count: int) -> Placement:
    """The same with at most so many of `count` layers in a slab of their own."""
    if len(placement.own) <= most:
        return placement
    return Placement("stream", f"{most} of {count} layers stay, as the device ran out of memory with more", spread(most, count), placement.shared or SLABS)


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
    if device == "cpu" and residency.changes and room.ram is not None and sum(sizes) + job.activations + MARGIN <= room.ram:
        return Placement("resident", f"LoRAs are added once per expert, in {sum(sizes) / 2**30:.1f} GiB of RAM", everything.own)
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
