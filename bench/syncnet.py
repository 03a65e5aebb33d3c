"""`python -m bench.syncnet`: SyncNet's embeddings as the pack makes them, against the plain network called for one window at a time. Prints JSON.

One process and one thread count for both, taking turns. Weights are random. Where other programs compute, two threads wait for each other after every
layer, which slows single windows far more than chunks: take the ratio from an idle machine, or with --threads 1. `floor_seconds` is what the network's
multiplications take at the rate of a large matrix product measured in between: on a CPU, no batching gets far below.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from time import perf_counter

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mova.lipsync.face_crop import SIDE
from mova.lipsync.mfcc import mfcc
from mova.lipsync.syncnet import COLUMNS, COLUMNS_PER_FRAME, SAMPLES_PER_FRAME, WINDOW, SyncNet, SyncNetwork

from .step import compare, describe_machine, spread

MATRIX = 2048  # side of the product that tells how fast this machine multiplies


@torch.no_grad()
def embed_one_by_one(network: SyncNetwork, film: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
    """Lips and sounds [n,1024], a call of each half for every window."""
    lips, sounds, columns = [], [], mfcc(samples).float()
    for i in range(len(film) - WINDOW):
        window = film[i : i + WINDOW].flip(-1).float().permute(3, 0, 1, 2)[None].contiguous()  # [1, 3, 5, 224, 224]
        lips.append(network.embed_lips(window))
        start = i * COLUMNS_PER_FRAME
        sounds.append(network.embed_sounds(columns[None, None, :, start : start + COLUMNS].contiguous()))
    return torch.cat(lips), torch.cat(sounds)


def measure(windows: int, repeats: int) -> dict[str, object]:
    torch.manual_seed(0)
    network = SyncNetwork().eval()
    syncnet = SyncNet(copy.deepcopy(network))
    film = torch.randint(0, 256, (windows + WINDOW, SIDE, SIDE, 3), dtype=torch.uint8)
    samples = (torch.randn(len(film) * SAMPLES_PER_FRAME) * 3000).round()
    matrix = torch.randn(MATRIX, MATRIX)
    runs: dict[str, Callable[[], object]] = {
        "plain": lambda: embed_one_by_one(network, film, samples),
        "mova": lambda: syncnet.embed(film, samples, lambda done: None),
        "matrix": lambda: matrix @ matrix,
    }
    with FlopCounterMode(display=False) as counter:
        results = {name: run() for name, run in runs.items() if name != "matrix"}
    flops = counter.get_total_flops() / len(results)  # both multiply the same
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = perf_counter()
            run()
            seconds[name].append(perf_counter() - start)
    floors = [flops * each / (2 * MATRIX**3) for each in seconds["matrix"]]
    return {
        "speed_up": spread([plain / ours for plain, ours in zip(seconds["plain"], seconds["mova"], strict=True)]),
        "speed_up_at_the_floor": spread([plain / floor for plain, floor in zip(seconds["plain"], floors, strict=True)]),
        "plain_seconds": spread(seconds["plain"]),
        "mova_seconds": spread(seconds["mova"]),
        "floor_seconds": spread(floors),
        "gflop_per_window": round(flops / windows / 1e9, 3),
        "difference": compare(results["mova"], results["plain"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.syncnet", description="Times SyncNet's embeddings against one window at a time and prints JSON.")
    parser.add_argument("--windows", type=int, default=64, help="of 5 frames; 25 a second")
    parser.add_argument("--repeats", type=int, default=7, help="counted runs of each side")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    counts = {"windows": given.windows, "repeats": given.repeats}
    print(json.dumps({"benchmark": "SyncNet embeddings"} | counts | measure(given.windows, given.repeats) | describe_machine(), indent=2))


if __name__ == "__main__":
    main()
