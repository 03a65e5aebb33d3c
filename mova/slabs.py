"""Room for layers on the device, filled ahead of compute (spec/performance.md 3.1).

A slab holds the weights of one layer in one stretch of memory, laid out as that kind of layer needs. A feeding thread walks
the plan of a run: it has each layer read into pinned host memory, a piece at a time, sends the pieces over on a stream of
its own, each while the next is read, and hands the slab to the executing thread. Events order copies against compute;
neither waits for the other on the host, and nothing is allocated on the device while the loop runs.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .reading import Reader, Source

log = logging.getLogger("mova")

ALIGNMENT = 256  # bytes; what copy engines and tensor cores like
HOST_BUFFERS = 4  # pieces in flight: read into, waiting, on their way
PIECE_BYTES = 2**28  # of a layer at a time
LEAST_BYTES = 2**20  # per piece, where little memory can be pinned; more than any row of a weight
AHEAD = 64  # resident layers announced ahead of compute at most

Key = tuple[str, int]  # of a layer: expert, number
Sides = dict[str, Any]  # what acts beside a linear of the layer, by the linear's path
Adapt = Callable[["Slab", "Turn"], None]


class Turn(NamedTuple):
    """One visit of a layer: which tensors of it are needed, by name."""

    key: Key
    names: frozenset[str]


class Slot(NamedTuple):
    start: int
    end: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Rows(NamedTuple):
    """Rows of one stored tensor, and the bytes they have in a slab."""

    entry: Source
    start: int
    end: int
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

    def pieces(self, wanted: Iterable[tuple[str, Source]], most: int) -> Iterator[list[Rows]]:
        """Cuts tensors, given in the order of their slots, into groups of neighbouring rows that span at most `most` bytes."""
        piece: list[Rows] = []
        for name, entry in wanted:
            slot, count, done = self.slots[name], entry.shape[0] if entry.shape else 1, 0
            row = torch.Size(slot.shape).numel() * slot.dtype.itemsize // count
            while done < count:
                start = slot.start + done * row
                begin = align_down(piece[0].start if piece else start)
                neighbour = not piece or start - piece[-1].end < ALIGNMENT
                fitting = min(count - done, (begin + most - start) // row) if neighbour else 0
                if fitting <= 0:
                    yield piece
                    piece = []
                    continue
                piece.append(Rows(entry.rows(done, done + fitting), start, start + fitting * row, slot.dtype))
                done += fitting
        yield piece


def ring_bytes(largest: int) -> int:
    """Host memory through which layers of at most so many bytes pass; a power of two, to which PyTorch rounds pinned memory up anyway."""
    return HOST_BUFFERS * min(PIECE_BYTES, 2 ** max(largest, LEAST_BYTES).bit_length())


def align_down(position: int) -> int:
    return position // ALIGNMENT * ALIGNMENT


class Slab:
    """One layer's weights on the device, as parameters by name; for layers of any of the kinds given."""

    def __init__(self, kinds: Iterable[Layout], device: torch.device) -> None:
        kinds = list(kinds)
        self.buffer = torch.empty(max(layout.nbytes for layout in kinds), dtype=torch.uint8, device=device)
        self.kinds = {layout: {name: nn.Parameter(view, requires_grad=False) for name, view in layout.carve(self.buffer).items()} for layout in kinds}
        self.weights: dict[str, nn.Parameter] = {}  # of the layer it holds
        self.sides: Sides = {}
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
    """Host memory of one piece on its way to the device; pinned for CUDA, where `sent` tells when it may be written again."""

    memory: Tensor
    sent: torch.cuda.Event | None


class Link:
    """The way from the files into slabs: directly where the device is the CPU, through a ring of host buffers otherwise.

    `adapt` changes the weights of a slab that was filled, on the device, before the layer computes.
    """

    def __init__(
        self, layouts: Mapping[Key, Layout], device: torch.device, sources: Mapping[Key, dict[str, Source]], traffic: Traffic, adapt: Adapt | None = None
    ) -> None:
        self.layouts, self.device, self.sources, self.traffic, self.adapt = layouts, device, sources, traffic, adapt
        self.reader = Reader()
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.ring = [] if device.type == "cpu" else self.make_ring()

    def make_ring(self) -> list[HostBuffer]:
        """One block of host memory in as many buffers; smaller where the system lets us pin less, not pinned where it lets us pin nothing."""
        size = ring_bytes(max(layout.nbytes for layout in self.layouts.values()))
        while self.stream is not None and size >= HOST_BUFFERS * LEAST_BYTES:
            try:
                return self.cut_ring(torch.empty(size, dtype=torch.uint8, pin_memory=True))
            except RuntimeError as error:  # WSL and some drivers allow little
                log.warning("%.0f MB of host memory could not be pinned (%s): trying half of it.", size / 1e6, error)
                size //= 2
        return self.cut_ring(torch.empty(ring_bytes(PIECE_BYTES), dtype=torch.uint8))

    def cut_ring(self, block: Tensor) -> list[HostBuffer]:
        self.traffic.pinned_bytes = block.nbytes if self.stream is not None and block.is_pinned() else 0
        return [HostBuffer(memory, torch.cuda.Event() if self.stream is not None else None) for memory in block.chunk(HOST_BUFFERS)]

    def fill(self, slab: Slab, turn: Turn) -> None:
        """Brings a layer into a slab; on CUDA the last copies are only launched when this returns."""
        layout, sources = self.layouts[turn.key], self.sources[turn.key]
        slab.weights = slab.kinds[layout]
        wanted = [(name, sources[name]) for name in layout.slots if name in turn.names]
        if self.ring:
            self.send(slab, layout, wanted)
        else:
            self.reader.read([(entry, slab.weights[name].data) for name, entry in wanted])
            self.traffic.copies += len(wanted)
        if self.adapt is not None:
            with torch.cuda.stream(self.stream):
                self.adapt(slab, turn)
        if self.stream is not None:
            slab.filled.record(self.stream)
        self.traffic.bytes_moved += sum(slab.weights[name].nbytes for name, _ in wanted)
        slab.holds, slab.names = turn.key, turn.names

    def send(self, slab: Slab, layout: Layout, wanted: list[tuple[str, Source]]) -> None:
        if self.stream is not None:
            self.stream.wait_event(slab.used)
        for piece in layout.pieces(wanted, self.ring[0].memory.nbytes):
            host = self.ring.pop(0)
            self.ring.append(host)
            if host.sent is not None:
                host.sent.synchronize()  # the reading side may wait; the executing thread never does
            begin, start, end = align_down(piece[0].start), piece[0].start, piece[-1].end
            self.reader.read([(rows.entry, host.memory[rows.start - begin : rows.end - begin].view(rows.dtype).view(rows.entry.shape)) for rows in piece])
            with torch.cuda.stream(self.stream):  # None: no CUDA, copies run where they stand
                slab.buffer[start:end].copy_(host.memory[start - begin : end - begin], non_blocking=True)
            self.traffic.copies += 1
            if host.sent is not None:
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

    @torch.inference_mode()  # as ComfyUI runs nodes: what was made so may be written to only so
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
