"""How fast devices compute, from published timings of the reference (spec/performance.md 1.3, 1.4, 1.6)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

PAGE_CACHE, DISK = 8e9, 3.5e9  # bytes/s at which layers arrive on a GPU, read by several threads: files that RAM holds, files that it does not (1.6, assumed)

CALIBRATED = "calibrated on published timings of such cards, usually 5 to 10 % off"
SCALED = "scaled from other cards by its peak, perhaps 25 % off"


@dataclass(frozen=True)
class Device:
    """What computes. memory: bytes of a GPU, None = the CPU. Rates: FLOP/s of attention by kernel and of linear layers, bytes/s of memory."""

    name: str
    memory: float | None
    attention: dict[str, float] = field(default_factory=dict)  # empty: nothing is known of its speed
    linear: float = math.nan
    bandwidth: float = math.nan
    source: str = ""

    def least_seconds(self, attention: float, linear: float) -> float:
        """For so many FLOPs with the fastest kernel and nothing else to do; an unknown device counts as the fastest known."""
        rates = self if self.attention else max(CARDS, key=lambda known: known.linear)
        return attention / max(rates.attention.values()) + linear / rates.linear


def card(name: str, gigabytes: float, attention: float, linear: float, bandwidth: float, source: str, cudnn: float | None = None) -> Device:
    """memory in GB, attention and linear in TFLOP/s, bandwidth in TB/s."""
    kernels = {"auto": cudnn or attention, "flash": attention, "cudnn": cudnn or attention}
    return Device(name, gigabytes * 1e9, {kernel: rate * 1e12 for kernel, rate in kernels.items()}, linear * 1e12, bandwidth * 1e12, source)


# bf16 (1.3, 1.4). On Hopper mova.attention chooses cuDNN, by far the faster kernel there.
CARDS = (
    card("RTX 3060", 12, 22, 22, 0.36, SCALED),
    card("RTX 4060", 8, 28.5, 28.5, 0.272, SCALED),
    card("RTX 3090", 24, 64, 64, 0.936, SCALED),
    card("RTX 4090", 24, 164, 160, 1.008, CALIBRATED),
    card("RTX 5090", 32, 195, 195, 1.79, SCALED),
    card("A100", 80, 217, 217, 1.94, SCALED),
    card("H100", 80, 370, 750, 3.35, CALIBRATED, cudnn=595),
    card("H200", 141, 370, 750, 4.3, CALIBRATED, cudnn=595),
)
GPUS = {device.name: device for device in CARDS}
SIBLING = r"(?!.*\b(?:Ti|SUPER|Laptop|Mobile|PCIe|NVL|D)\b)"  # other cards are sold under the same number


def find_device(name: str, memory: float | None) -> Device:
    """A device by its driver's name, such as "NVIDIA GeForce RTX 4090", with `memory` bytes (None = the CPU)."""
    for known in CARDS:
        if re.search(rf"\b{known.name}\b{SIBLING}", name):
            return Device(name, memory, known.attention, known.linear, known.bandwidth, known.source)
    return Device(name, memory)
