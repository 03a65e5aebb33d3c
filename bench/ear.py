"""`python -m bench.ear`: how long CAT takes for the features of 10 s of sound at its base size, beside the plain matrix products and convolutions this needs. JSON.

Random weights. Both sides run in one process and take turns, so that a busy machine slows both. The second part streams an hour through a small encoder,
since what could grow with the length does not depend on the encoder's size, and reports memory.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import sys
from collections.abc import Callable, Iterator
from time import perf_counter, process_time

import torch
import torch.nn.functional as F
from torch import Tensor

from cat_encoder import Checkpoint, Encoder
from cat_encoder.config import PRESETS, Architecture, cat_architecture
from cat_encoder.frontend import FRAMES, MEL_BINS
from cat_encoder.trunk import AudioTransformer

from .step import describe_machine, spread

SMALL = cat_architecture(channels=(16, 24), width=48, depth=2, heads=4)
RATE, SECONDS = 48_000, 10
PIECE = 5  # s of a streamed sound that come at once


def make_encoder(architecture: Architecture) -> Encoder:
    torch.manual_seed(0)
    return Encoder(Checkpoint(architecture, AudioTransformer(architecture).initialise().state_dict(), origin="random weights"))


def products(architecture: Architecture) -> Iterator[Callable[[], Tensor]]:
    """Every product and convolution of one window as a plain torch call on tensors of its own (spec/cat.md 2.1, 2.3); no bias, norm, activation or copy."""
    width, tokens = architecture.width, FRAMES // architecture.patch * architecture.bands
    rows, inputs = FRAMES * MEL_BINS, 1  # cells and channels of the map so far
    for kernel, channels in zip(architecture.kernels, (*architecture.channels, width), strict=True):
        rows //= kernel**2
        yield linear(rows, inputs * kernel**2, channels)
        inputs = channels
        if architecture.stem == "multi" and rows > tokens:
            for _ in range(2):
                yield from (linear(rows, channels, channels), linear(rows, channels, channels))
                yield depthwise(rows, channels)
                yield from (linear(rows, channels, 4 * channels), linear(rows, 4 * channels, channels))
            yield linear(tokens, channels * rows // tokens, width)  # the branch
    if architecture.stem == "multi":
        yield linear(tokens, width, width)
    hidden, heads, length = int(width * architecture.mlp_ratio), architecture.heads, tokens + 1
    for _ in range(architecture.depth):
        yield linear(length, width, 3 * width)
        yield batched((heads, length, width // heads), (heads, width // heads, length))
        yield batched((heads, length, length), (heads, length, width // heads))
        yield from (linear(length, width, width), linear(length, width, hidden), linear(length, hidden, width))


def linear(rows: int, inputs: int, outputs: int) -> Callable[[], Tensor]:
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    return lambda: x @ weight.T


def batched(left: tuple[int, ...], right: tuple[int, ...]) -> Callable[[], Tensor]:
    a, b = torch.randn(left), torch.randn(right)
    return lambda: a @ b


def depthwise(rows: int, channels: int) -> Callable[[], Tensor]:
    side = math.isqrt(rows // (FRAMES // MEL_BINS))
    x = torch.randn(1, channels, rows // side, side).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels, 1, 5, 5)
    return lambda: F.conv2d(x, weight, padding=2, groups=channels)


def measure(encoder: Encoder, batch: int, repeats: int) -> dict[str, object]:
    sound, plain = 0.1 * torch.randn(batch, 1, RATE * SECONDS), list(products(encoder.architecture))
    work = {"features": lambda: encoder.features(sound, RATE), "products": lambda: [product() for _ in range(batch) for product in plain]}
    wall: dict[str, list[float]] = {name: [] for name in work}
    cpu: dict[str, list[float]] = {name: [] for name in work}  # of all threads: what other programs take does not count
    for _ in range(repeats + 1):  # the first turn warms up
        for name, do in work.items():
            start, busy = perf_counter(), process_time()
            do()
            wall[name].append(perf_counter() - start)
            cpu[name].append(process_time() - busy)
    return {
        "ratio": round(statistics.median(wall["features"][1:]) / statistics.median(wall["products"][1:]), 4),
        "ratio_of_fastest": round(min(wall["features"][1:]) / min(wall["products"][1:]), 4),
        "ratio_of_cpu_time": round(min(cpu["features"][1:]) / min(cpu["products"][1:]), 4),
        "seconds": {name: spread(taken[1:]) for name, taken in wall.items()},
        "cpu_seconds": {name: spread(taken[1:]) for name, taken in cpu.items()},
    }


def stream(encoder: Encoder, seconds: int) -> dict[str, object]:
    """Memory (peak of the process) after two minutes and after all of a sound that comes in pieces, as a file would be read."""
    generator, columns, peaks, start = torch.Generator().manual_seed(0), 0, {}, perf_counter()
    pieces = (0.1 * torch.randn(1, 1, RATE * PIECE, generator=generator) for _ in range(seconds // PIECE))
    for features in encoder.stream(pieces, RATE):
        columns += features.columns.shape[1]
        peaks["end" if features.start > 120 else "2_minutes"] = peak_mib()
    return {"sound_seconds": seconds, "columns": columns, "peak_mib_after": peaks, "seconds": round(perf_counter() - start, 1)}


def peak_mib() -> int:
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.ear", description="Times the features of 10 s of sound against the plain products they need and prints JSON.")
    parser.add_argument("--size", choices=PRESETS, default="cat-base")
    parser.add_argument("--repeats", type=int, default=5, help="counted turns of each side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--hour", type=int, default=3600, metavar="SECONDS", help="length of the streamed sound (0 = none)")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    results: dict[str, object] = {"benchmark": "features of 10 s", "size": given.size, "repeats": given.repeats}
    results |= {"stream": stream(make_encoder(SMALL), given.hour)} if given.hour else {}  # first: the peak of a process never falls
    encoder = make_encoder(PRESETS[given.size])
    results |= {f"batch_{batch}": measure(encoder, batch, given.repeats) for batch in given.batches}
    print(json.dumps(results | describe_machine(), indent=2))


if __name__ == "__main__":
    main()
