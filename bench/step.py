"""`python -m bench.step --dtype bfloat16`: how long one guided step takes in mova and in the plain baseline, and how far apart their results are. Prints JSON.

One process and one thread count for both; steps alternate (mova, plain, mova, plain, ...) so that a busy machine slows both. mova runs through `mova.sample`;
its first step, which also reads the prompts, is reported beside the others and not counted, and so is the baseline's.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

import mova

from . import mid_model, plain
from .mid_model import Inputs

CFG = 5.0
EXPERT = "video_dit"  # one expert for the whole run: the switch reads the prompts again, which belongs to the set-up


class PlainRun:
    """The baseline's sampling loop, one timed step per call."""

    def __init__(self, model: plain.PlainMova, inputs: Inputs, steps: int) -> None:
        self.model, self.inputs, self.seconds = model, inputs, []
        self.video, self.audio = inputs.video, inputs.audio
        self.train = plain.sigma_table(1000, mid_model.SCHEDULER)
        self.times = 1000 * plain.sigma_table(steps, mid_model.SCHEDULER)

    def step(self) -> tuple[Tensor, Tensor]:
        """Advances both latents; returns the guided velocities."""
        start, k = perf_counter(), len(self.seconds)
        contexts = (self.inputs.positive, self.inputs.negative)
        velocities = plain.guided_velocity(self.model, self.video, self.audio, self.inputs.condition, contexts, self.times[k], CFG, EXPERT)
        end = plain.nearest_sigma(self.times[k + 1], self.train) if k + 1 < len(self.times) else 0.0
        distance = end - plain.nearest_sigma(self.times[k], self.train)
        self.video, self.audio = self.video + velocities[0] * distance, self.audio + velocities[1] * distance
        self.seconds.append(perf_counter() - start)
        return velocities


def measure(folder: Path, inputs: Inputs, repeats: int) -> dict[str, object]:
    """Times `repeats` steps of each side after one that is not counted, and compares the first velocities and the last latents."""
    denoiser, baseline = mova.load_denoiser(folder), PlainRun(plain.load_plain(folder), inputs, repeats + 1)
    seconds: list[float] = []
    first: list[tuple[Tensor, Tensor]] = []  # guided velocities of the first step, where the inputs are the same: mova, plain

    def on_step(step: mova.Step) -> None:
        nonlocal start
        seconds.append(perf_counter() - start)
        velocities = baseline.step()
        if step.index == 0:  # sigma is 1 here: what mova predicts as clean is noise - velocity
            first.extend([(inputs.video - step.video, inputs.audio - step.audio), velocities])
        start = perf_counter()

    start = perf_counter()
    video, audio = mova.sample(
        denoiser, context=inputs.positive, negative_context=inputs.negative, condition=inputs.condition,
        video_noise=inputs.video, audio_noise=inputs.audio, steps=repeats + 1, cfg=CFG, boundary=0.0, on_step=on_step,
    )  # fmt: skip
    return {
        "ratio": round(statistics.median(seconds[1:]) / statistics.median(baseline.seconds[1:]), 4),
        "ratio_of_neighbours": spread([ours / theirs for ours, theirs in zip(seconds[1:], baseline.seconds[1:], strict=True)]),
        "mova_seconds": spread(seconds[1:]),
        "plain_seconds": spread(baseline.seconds[1:]),
        "first_step_seconds": {"mova": round(seconds[0], 4), "plain": round(baseline.seconds[0], 4)},
        "difference": {"first_velocity": compare(*first), "last_latents": compare((video, audio), (baseline.video, baseline.audio))},
        "first_velocity_to_float32": distances_to_float32(folder, inputs, first),
    }


def distances_to_float32(folder: Path, inputs: Inputs, first: list[tuple[Tensor, Tensor]]) -> dict[str, object]:
    """Against the baseline on the same weights in float32: a difference between two bfloat16 runs does not tell which one is off."""
    exact = PlainRun(plain.load_plain(folder).float(), inputs, 1).step()
    return {name: compare(velocities, exact) for name, velocities in zip(("mova", "plain"), first, strict=True)}


def spread(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 4), "min": round(min(values), 4), "max": round(max(values), 4)}


def compare(ours: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> dict[str, dict[str, float]]:
    return {
        stream: {"max_abs": float((one - other).abs().max()), "rel_l2": float((one - other).norm() / other.norm())}
        for stream, one, other in zip(("video", "audio"), ours, expected, strict=True)
    }


def describe_machine() -> dict[str, object]:
    return {
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "multiplies_bfloat16_natively": torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
    }


def cpu_name() -> str:
    """Linux tells the model name only in /proc/cpuinfo."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.step", description="Times a guided step of mova against the plain baseline on a random model and prints JSON.")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    parser.add_argument("--size", choices=mid_model.SIZES, default="mid")
    parser.add_argument("--repeats", type=int, default=7, help="counted steps of each side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="keep the random model here and use it again (mid size: 5.8 GB in float32); default: a temporary folder")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    size = mid_model.SIZES[given.size]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        folder = (given.folder or Path(temporary)) / f"{given.size}-{given.dtype}"
        if not (folder / "model_index.json").is_file():
            mid_model.write_mid_model(folder, getattr(torch, given.dtype), size=size)
        result = measure(folder, mid_model.mid_inputs(size=size), given.repeats)
    print(json.dumps({"benchmark": "guided step", "dtype": given.dtype, "size": given.size, "repeats": given.repeats} | result | describe_machine(), indent=2))


if __name__ == "__main__":
    main()
