"""Where weights live: mapped files -> the device, layer by layer (spec/performance.md section 3).

A layer is what is computed together: video block i of the active expert and, while they last, audio block i and both
bridge directions. `resident` keeps the active expert, the audio tower and the bridge on the device (on the CPU in the
stored dtype: views of the mapped files, nothing is copied). `stream` has two slabs of one layer each and fills one while
the other computes; slabs are allocated once, for both experts.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .bridge import Bridge, Conditioner
from .errors import InputError
from .layers import Block
from .towers import AudioTower, VideoTower

log = logging.getLogger("mova")

MODES = ("auto", "resident", "stream")
EXPERTS = ("high", "low")
SLABS = 2
ACTIVATION_RESERVE = 8 * 2**30  # bytes to leave free beside resident weights: enough for 193 frames at 360p
DIRECTIONS = {"to_video": "audio_to_video_conditioners", "to_audio": "video_to_audio_conditioners"}


@dataclass
class Layer:
    """The modules of one layer, weights in place; None where the audio tower has ended or the bridge is silent."""

    video: Block
    audio: Block | None
    to_video: Conditioner | None
    to_audio: Conditioner | None


@dataclass
class Report:
    """What moved since loading."""

    mode: str
    why: str
    bytes_moved: int = 0
    copies: int = 0
    slab_bytes: int = 0  # at most, at any time
    slabs_allocated: int = 0


@dataclass
class Parts:
    """Every module of the denoiser, on the meta device until placed, and the mapped tensors of its files by key."""

    experts: dict[str, VideoTower]
    audio: AudioTower
    bridge: Bridge
    tensors: dict[str, dict[str, Tensor]] = field(repr=False)  # of "high", "low", "audio", "bridge"

    def module(self, name: str) -> nn.Module:
        return self.experts[name] if name in EXPERTS else getattr(self, name)

    def layer(self, expert: str, i: int) -> Layer:
        to_video, to_audio = (getattr(self.bridge, name) for name in DIRECTIONS.values())
        audio = self.audio.blocks[i] if i < len(self.audio.blocks) else None
        speaks = str(i) in to_video
        return Layer(self.experts[expert].blocks[i], audio, to_video[str(i)] if speaks else None, to_audio[str(i)] if speaks else None)

    def sources(self, expert: str, i: int) -> dict[str, Tensor]:
        """The stored tensors of layer i, by the name they have in a slab."""
        places = {"video": (expert, f"blocks.{i}."), "audio": ("audio", f"blocks.{i}.")}
        places |= {direction: ("bridge", f"{name}.{i}.") for direction, name in DIRECTIONS.items()}
        found = {}
        for place, (part, prefix) in places.items():
            found |= {place + "." + key[len(prefix) :]: tensor for key, tensor in self.tensors[part].items() if key.startswith(prefix)}
        return found

    def bytes(self, dtype: torch.dtype) -> int:
        """What is needed at once: one expert, the audio tower, the bridge."""
        return sum(tensor.numel() for name in ("high", "audio", "bridge") for tensor in self.tensors[name].values()) * dtype.itemsize


class Residency:
    """Brings weights to the device when they are computed with, and takes them away again."""

    def __init__(self, parts: Parts, device: torch.device, dtype: torch.dtype, mode: str = "auto") -> None:
        self.parts, self.device, self.dtype = parts, device, dtype
        self._report = Report(*choose_mode(parts, device, dtype, mode))
        self.placed: set[str] = set()
        self.slabs: dict[tuple[str, int], Slab] = {}  # the layer each slab holds or is being filled with, oldest first
        self.reader: ThreadPoolExecutor | None = None
        log.info("MOVA weights: %s (%s)", self._report.mode, self._report.why)

    def report(self) -> Report:
        return self._report

    def enter(self, expert: str) -> VideoTower:
        """Makes an expert the active one; the other's weights leave the device."""
        self.take_away(EXPERTS[1 - EXPERTS.index(expert)])
        for name in (expert, "audio", "bridge"):
            self.bring(name)
        return self.parts.experts[expert]

    def walk(self, expert: str, then: str | None = None) -> Iterator[Layer]:
        """The layers of the active expert in order, each ready to compute; `then`: the expert whose first layer comes next."""
        count = len(self.parts.experts[expert].blocks)
        if self._report.mode == "resident":
            yield from (self.parts.layer(expert, i) for i in range(count))
            return
        plan = [(expert, i) for i in range(count)] + ([(then, 0)] if then else [])
        for turn in range(count):
            slab, *_ = [self.request(layer) for layer in plan[turn : turn + SLABS]]
            yield slab.wait(self.parts.layer(*plan[turn]))
            slab.computed()

    def request(self, layer: tuple[str, int]) -> Slab:
        """The slab of a layer; filling starts now when no slab holds it, in the place of the oldest."""
        slab = self.slabs.pop(layer, None)
        if slab is None:
            slab = self.slabs.pop(next(iter(self.slabs))) if len(self.slabs) == SLABS else self.make_slab()
            sources = self.parts.sources(*layer)
            slab.filled = self.start_reader().submit(slab.fill, sources)
            self._report.bytes_moved += sum(slab.weights[name].nbytes for name in sources)
            self._report.copies += len(sources)
        self.slabs[layer] = slab
        return slab

    def make_slab(self) -> Slab:
        slab = Slab(self.parts, self.device, self.dtype)
        in_use = (len(self.slabs) + 1) * sum(tensor.nbytes for tensor in slab.weights.values())
        self._report.slab_bytes = max(self._report.slab_bytes, in_use)
        self._report.slabs_allocated += 1
        return slab

    def start_reader(self) -> ThreadPoolExecutor:
        if self.reader is None:
            self.reader = ThreadPoolExecutor(1, thread_name_prefix="mova-weights")
        return self.reader

    def release(self) -> None:
        """Leaves nothing on the device."""
        if self.reader is not None:
            self.reader.shutdown(wait=True)
            self.reader = None
        self.slabs.clear()
        for name in list(self.placed):
            self.take_away(name)

    def bring(self, name: str) -> None:
        if name in self.placed:
            return
        moved = {key: tensor.to(self.device, self.dtype) for key, tensor in self.parts.tensors[name].items() if self.stays(key)}
        self.parts.module(name).load_state_dict(moved, assign=True, strict=False)
        self.placed.add(name)
        copied = [new.nbytes for key, new in moved.items() if new.data_ptr() != self.parts.tensors[name][key].data_ptr()]
        self._report.bytes_moved += sum(copied)
        self._report.copies += len(copied)

    def stays(self, key: str) -> bool:
        """Whether a tensor is on the device all along: everything, or (streaming) what lies outside the layers."""
        return self._report.mode == "resident" or not key.startswith(("blocks.", *DIRECTIONS.values()))

    def take_away(self, name: str) -> None:
        if name in self.placed:
            self.parts.module(name).to("meta")
            self.placed.remove(name)


class Slab:
    """Room on the device for one layer. On CUDA filling runs on a stream of its own; events order it against compute."""

    filled: Future[None]

    def __init__(self, parts: Parts, device: torch.device, dtype: torch.dtype) -> None:
        first = parts.layer("high", next(iter(parts.bridge.config.layers), 0))
        shapes = nn.ModuleDict({name: copy.deepcopy(module) for name, module in vars(first).items() if module is not None})
        self.modules = shapes.to(dtype).to_empty(device=device)
        self.weights = dict(self.modules.state_dict(keep_vars=True))
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.ready, self.free = (torch.cuda.Event(), torch.cuda.Event()) if self.stream else (None, None)

    def fill(self, sources: dict[str, Tensor]) -> None:
        """Copies a layer in; runs on the reading thread."""
        with torch.no_grad(), torch.cuda.stream(self.stream):
            if self.stream:
                self.stream.wait_event(self.free)
            for name, source in sources.items():
                self.weights[name].copy_(source, non_blocking=True)
            if self.stream:
                self.ready.record(self.stream)

    def wait(self, shape: Layer) -> Layer:
        """The layer once it is filled, with the parts that `shape` has."""
        self.filled.result()
        if self.stream:
            torch.cuda.current_stream(self.stream.device).wait_event(self.ready)
        return Layer(**{name: self.modules[name] if part is not None else None for name, part in vars(shape).items()})

    def computed(self) -> None:
        """The slab may be filled again once what was launched so far has run."""
        if self.stream:
            self.free.record(torch.cuda.current_stream(self.stream.device))


def choose_mode(parts: Parts, device: torch.device, dtype: torch.dtype, mode: str) -> tuple[str, str]:
    """(mode, why)."""
    if mode not in MODES:
        raise InputError(f"residency is {mode!r}; choose {', '.join(MODES)}.")
    if mode != "auto":
        return mode, "as asked"
    if device.type == "cpu":
        stored = all(tensor.dtype == dtype for tensors in parts.tensors.values() for tensor in tensors.values())
        return ("resident", "views of the mapped files") if stored else ("stream", f"converted to {dtype} layer by layer")
    if device.type == "cuda":
        need, free = parts.bytes(dtype), torch.cuda.mem_get_info(device)[0]
        fits = need + ACTIVATION_RESERVE <= free
        figures = f"{need / 2**30:.1f} GiB of weights and {ACTIVATION_RESERVE / 2**30:.0f} GiB of activations, {free / 2**30:.1f} GiB free"
        return ("resident", figures) if fits else ("stream", figures)
    return "resident", f"no streaming on {device.type}"
