"""Room for layers on the device, filled ahead of compute (spec/performance.md 3.1).

A slab holds the weights of one layer in one piece of memory, laid out as that kind of layer needs. A feeding thread walks
the plan of a run: it has each layer read into pinned host memory, sends it over on a stream of its own, and hands the slab
to the executing thread. Events order copies against compute; neither waits for the other on the host, and nothing is
allocated while the loop runs.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .checkpoint import TensorEntry
from .reading import Reader

log = logging.getLogger("mova")

ALIGNMENT = 256  # bytes; what copy engines and tensor cores like
HOST_BUFFERS = 3
AHEAD = 64  # resident layers announced ahead of compute at most

Key = tuple[str, int]  # of a layer: expert, number


class Turn(NamedTuple):
    """One visit of a layer: which tensors of it are needed, by name."""

    key: Key
    names: frozenset[str]


class Slot(NamedTuple):
    start: int
    end: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Layout:
    """Where each tensor of a layer lies in a slab; names in the order given, so that what is left out comes last."""

    def __init__(self, tensors: Iterable[tuple[str, tuple[int, ...], torch.dtype]]) -> None:
        self.slots: dict[str, Slot] = {}
        end = 0
        for name, shape, dtype in tensors:
            start, end = end, end + -(-torch.Size(shape).numel() * dtype.itemsize // ALIGNMENT) * ALIGNMENT
            self.slots[name] = Slot(start, end, tuple(shape), dtype)
        self.nbytes = end

    def carve(self, buffer: Tensor) -> dict[str, Tensor]:
        """Views of a byte buffer."""
        views = {}
        for name, slot in self.slots.items():
            used = torch.Size(slot.shape).numel() * slot.dtype.itemsize
            views[name] = buffer[slot.start : slot.start + used].view(slot.dtype).view(slot.shape)
        return views

    def ranges(self, names: Iterable[str]) -> list[tuple[int, int]]:
        """The fewest byte ranges that cover these tensors."""
        joined: list[tuple[int, int]] = []
        for start, end, *_ in sorted(self.slots[name] for name in names):
            if joined and joined[-1][1] == start:
                joined[-1] = joined[-1][0], end
            else:
                joined.append((start, end))
        return joined


class Slab:
    """One layer's weights on the device, as parameters by name; for layers of any of the kinds given."""

    def __init__(self, kinds: Iterable[Layout], device: torch.device) -> None:
        kinds = list(kinds)
        self.buffer = torch.empty(max(layout.nbytes for layout in kinds), dtype=torch.uint8, device=device)
        self.kinds = {layout: {name: nn.Parameter(view, requires_grad=False) for name, view in layout.carve(self.buffer).items()} for layout in kinds}
        self.weights: dict[str, nn.Parameter] = {}  # of the layer it holds
        self.holds: Key | None = None
        self.names: frozenset[str] = frozenset()
        self.returned = threading.Event()  # set when the executing thread has launched what it needed
        self.filled, self.used = (torch.cuda.Event(), torch.cuda.Event()) if device.type == "cuda" else (None, None)
        self.give_back()  # work launched before this may still use the memory as something else

    def give_back(self) -> None:
        """To be called by the executing thread when the layer's work is launched."""
        if self.used is not None:
            self.used.record()
        self.returned.set()


@dataclass
class Traffic:
    """What moved."""

    bytes_moved: int = 0
    copies: int = 0
    allocations_in_loop: int = 0  # of device memory after the first step of a run
    slab_bytes: int = 0  # at most, at any time
    pinned_bytes: int = 0


@dataclass
class HostBuffer:
    """Host memory of one layer on its way to the device; pinned for CUDA, where `sent` tells when it may be written again."""

    memory: Tensor
    kinds: dict[Layout, dict[str, Tensor]]
    sent: torch.cuda.Event | None


class Link:
    """The way from the files into slabs: directly where the device is the CPU, through a ring of host buffers otherwise."""

    def __init__(self, layouts: Mapping[Key, Layout], device: torch.device, sources: Mapping[Key, dict[str, TensorEntry]], traffic: Traffic) -> None:
        self.layouts, self.device, self.sources, self.traffic = layouts, device, sources, traffic
        self.reader = Reader()
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.ring = [] if device.type == "cpu" else self.make_ring()

    def make_ring(self) -> list[HostBuffer]:
        """As many buffers as the system lets us pin; one that is not pinned where it lets none, which is slower."""
        ring: list[HostBuffer] = []
        try:
            while len(ring) < HOST_BUFFERS:
                ring.append(self.make_buffer(pinned=self.stream is not None))
        except RuntimeError as error:  # WSL and some drivers allow little
            log.warning("Only %d of %d host buffers could be pinned (%s): weights may arrive later than they are needed.", len(ring), HOST_BUFFERS, error)
        return ring or [self.make_buffer(pinned=False)]

    def make_buffer(self, pinned: bool) -> HostBuffer:
        kinds = set(self.layouts.values())
        memory = torch.empty(max(layout.nbytes for layout in kinds), dtype=torch.uint8, pin_memory=pinned)
        self.traffic.pinned_bytes += memory.nbytes if pinned else 0
        return HostBuffer(memory, {layout: layout.carve(memory) for layout in kinds}, torch.cuda.Event() if self.stream is not None else None)

    def fill(self, slab: Slab, turn: Turn) -> None:
        """Brings a layer into a slab; on CUDA the copy is only launched when this returns."""
        layout, sources = self.layouts[turn.key], self.sources[turn.key]
        slab.weights = slab.kinds[layout]
        names = [name for name in layout.slots if name in turn.names]
        if not self.ring:
            self.reader.read([(sources[name], slab.weights[name].data) for name in names])
            self.traffic.copies += len(names)
        else:
            self.send(slab, layout, [(name, sources[name]) for name in names])
        self.traffic.bytes_moved += sum(slab.weights[name].nbytes for name in names)
        slab.holds, slab.names = turn.key, turn.names

    def send(self, slab: Slab, layout: Layout, wanted: list[tuple[str, TensorEntry]]) -> None:
        host = self.ring.pop(0)
        self.ring.append(host)
        if host.sent is not None:
            host.sent.synchronize()  # the reading side may wait; the executing thread never does
        self.reader.read([(entry, host.kinds[layout][name]) for name, entry in wanted])
        with torch.cuda.stream(self.stream):  # None: no CUDA, copies run where they stand
            if self.stream is not None:
                self.stream.wait_event(slab.used)
            for start, end in layout.ranges(name for name, _ in wanted):
                slab.buffer[start:end].copy_(host.memory[start:end], non_blocking=True)
                self.traffic.copies += 1
            if self.stream is not None:
                slab.filled.record(self.stream)
                host.sent.record(self.stream)

    def close(self) -> None:
        self.reader.close()
        if self.stream is not None:
            self.stream.synchronize()
        self.ring.clear()


class Feeder:
    """Fills slabs in the order of a plan, as far ahead as there is room. One run; `take` gives the slabs in that order."""

    def __init__(self, link: Link, plan: Iterable[Turn], choose_slab: Callable[[Turn], Slab]) -> None:
        self.link, self.plan, self.choose_slab = link, plan, choose_slab
        self.ready: queue.Queue[tuple[Turn, Slab] | BaseException] = queue.Queue(AHEAD)
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.feed, name="mova-feed", daemon=True)
        self.thread.start()

    @torch.no_grad()
    def feed(self) -> None:
        try:
            for turn in self.plan:
                slab = self.choose_slab(turn)
                self.wait_for(slab.returned)
                if self.stopped.is_set():
                    return
                if slab.holds != turn.key or not turn.names <= slab.names:
                    slab.holds = None  # a fill that fails leaves nothing that looks whole
                    self.link.fill(slab, turn)
                slab.returned.clear()
                self.hand_over((turn, slab))
        except BaseException as error:  # raised again in the executing thread, by take
            self.hand_over(error)

    def wait_for(self, event: threading.Event) -> None:
        while not event.wait(0.1) and not self.stopped.is_set():
            continue

    def hand_over(self, item: tuple[Turn, Slab] | BaseException) -> None:
        while not self.stopped.is_set():
            try:
                return self.ready.put(item, timeout=0.1)
            except queue.Full:
                continue
        if not isinstance(item, BaseException):
            item[1].returned.set()  # nobody will take it, and the next run waits for it

    def take(self) -> tuple[Turn, Slab]:
        """The next slab, filled as far as work launched from now on is concerned. Raises what went wrong while filling."""
        item = self.ready.get()
        if isinstance(item, BaseException):
            raise item
        if item[1].filled is not None:
            torch.cuda.current_stream(self.link.device).wait_event(item[1].filled)
        return item

    def stop(self) -> None:
        """Ends the thread; slabs handed over but not taken count as given back."""
        self.stopped.set()
        self.thread.join()
        while not self.ready.empty():
            item = self.ready.get_nowait()
            if not isinstance(item, BaseException):
                item[1].returned.set()
