"""`python -m bench.overlap`: the real feeder and slabs, driven by a link and a compute that only sleep, against spec/performance.md 1.6. Prints JSON.

A layer of W bytes over a link of B bytes/s beside T seconds of compute: hidden when W / B <= T, else the link sets the pace.
Uneven arrival needs one slab more than even arrival.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Sequence
from time import perf_counter, sleep

import torch

from mova.slabs import Feeder, Layout, Slab, Turn

LAYERS = 40
COMPUTE = 0.02  # seconds
CPU = torch.device("cpu")
# Seconds a layer takes to arrive, in units of compute, over and over: name -> pattern.
ARRIVALS = {"quarter": (0.25,), "half": (0.5,), "just hidden": (0.9,), "too slow": (1.5,), "far too slow": (3.0,), "uneven": (1.6, 0.2, 0.2)}


class SleepingLink:
    """Fills a slab by letting the time of a transfer pass."""

    device = CPU

    def __init__(self, seconds: Sequence[float]) -> None:
        self.seconds = itertools.cycle(seconds)

    def fill(self, slab: Slab, turn: Turn) -> None:
        sleep(next(self.seconds))
        slab.holds, slab.names = turn.key, turn.names


def run(transfers: Sequence[float], compute: float, slabs: int, layers: int = LAYERS) -> float:
    """Seconds from the first layer's arrival to the end of the last, with real threads."""
    names = frozenset({"weight"})
    room = [Slab([Layout([("weight", (1,), torch.float32)])], CPU) for _ in range(slabs)]
    turns = itertools.cycle(room)
    feeder = Feeder(SleepingLink(transfers), (Turn(("high", i), names) for i in range(layers)), lambda turn: next(turns))
    start = math.inf
    for _ in range(layers):
        _, slab = feeder.take()
        start = min(start, perf_counter())
        sleep(compute)
        slab.give_back()
    seconds = perf_counter() - start
    feeder.stop()
    return seconds


def predict(transfers: Sequence[float], compute: float, slabs: int, layers: int = LAYERS) -> float:
    """The same without threads: a transfer waits for the one before it and for its slab, compute for its transfer."""
    arrived, done = 0.0, [0.0] * slabs  # done[i]: when the work of the layer that last had slab i ended
    first, now = transfers[0], 0.0
    for i, transfer in zip(range(layers), itertools.cycle(transfers), strict=False):
        arrived = max(arrived, done[i % slabs]) + transfer
        now = done[i % slabs] = max(arrived, now) + compute
    return now - first


def slabs_needed(transfers: Sequence[float], compute: float) -> int:
    """The depth formula of 1.6: one at work, what arrives meanwhile, and one more where arrival is uneven."""
    return 1 + math.ceil(sum(transfers) / len(transfers) / compute) + (len(set(transfers)) > 1)


def measure(pattern: Sequence[float], slabs: int) -> dict[str, object]:
    """Stalls: the share of the time in which nothing is computed, as it was and as the pipeline and the formula (for even arrival) have it."""
    transfers, work = [COMPUTE * part for part in pattern], LAYERS * COMPUTE
    mean = sum(pattern) / len(pattern)
    return {
        "slabs": slabs,
        "slabs_needed": slabs_needed(transfers, COMPUTE),
        "stalled": round(1 - work / run(transfers, COMPUTE, slabs), 3),
        "predicted": round(1 - work / predict(transfers, COMPUTE, slabs), 3),
        "formula": round(max(0.0, 1 - 1 / mean), 3),
    }


def main() -> None:
    argparse.ArgumentParser(
        prog="bench.overlap", description="How much of the transfers the feeder hides, with transfers and compute that sleep, as JSON."
    ).parse_args()
    results = {name: [measure(pattern, slabs) for slabs in (2, 3)] for name, pattern in ARRIVALS.items()}
    print(json.dumps({"benchmark": "overlap", "compute_seconds": COMPUTE, "layers": LAYERS, "arrivals": results}, indent=2))


if __name__ == "__main__":
    main()
