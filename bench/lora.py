"""`python -m bench.lora --dtype bfloat16`: what a LoRA on every layer adds to a guided step. Prints JSON.

One process and one thread count; steps with and without LoRA alternate, so that a busy machine slows both. Where all layers have a
place of their own, the LoRA is added in the first step of an expert only (`first_step`); where they stream, in every step.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter, process_time, thread_time

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import mova
from mova.denoiser import Denoiser, JointRun, StepTimes
from mova.lora.deltas import Change, Delta, merge
from mova.sampler import choose_guidance

from . import mid_model
from .mid_model import Inputs
from .step import CFG, describe_machine, spread

EXPERT = "high"
STEPS_PER_EXPERT = 25  # of a run of 50, on average


def write_lora(file: Path, denoiser: Denoiser, rank: int, dtype: torch.dtype, seed: int = 0) -> Path:
    """A random LoRA on every linear of the layers of one expert, the audio tower and the bridge."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for part, name in (("high", "video_dit"), ("audio", "audio_dit"), ("bridge", "dual_tower_bridge")):
        for key, tensor in denoiser.parts.tensors[part].items():
            if tensor.ndim == 2 and not key.startswith(("text", "time", "head")):
                path, (rows, columns) = f"{name}.{key.removesuffix('.weight')}", tensor.shape
                tensors[f"{path}.lora_A.weight"] = (torch.randn(rank, columns, generator=generator) / columns**0.5).to(dtype)
                tensors[f"{path}.lora_B.weight"] = (0.1 * torch.randn(rows, rank, generator=generator) / rank**0.5).to(dtype)
    save_file(tensors, file)
    return file


class TimedRun:
    """Guided steps of one denoiser on the same inputs, one per call."""

    def __init__(self, stack: ExitStack, denoiser: Denoiser, inputs: Inputs, steps: int) -> None:
        self.denoiser, self.inputs, self.seconds, self.work = denoiser, inputs, [], []
        times = [StepTimes(torch.tensor([inputs.timestep]), torch.tensor([inputs.timestep]), EXPERT)] * steps
        branches = choose_guidance(CFG, None, 1.0).branches(inputs.positive, inputs.negative)
        self.run: JointRun = stack.enter_context(denoiser.prepare(inputs.video, inputs.audio, inputs.condition, branches, times, 24.0))

    def step(self) -> None:
        start, work = perf_counter(), process_time()
        with torch.no_grad():
            self.run.velocities(self.inputs.video, self.inputs.audio, len(self.seconds))
        self.seconds.append(perf_counter() - start)
        self.work.append(process_time() - work)


def time_adding(denoiser: Denoiser) -> list[float]:
    """Seconds of processor time that the feeding thread spends on adding LoRAs, one entry per layer from now on."""
    add, spent = denoiser.residency.adapt, []

    def timed(*args: object) -> None:
        start = thread_time()
        add(*args)
        spent.append(thread_time() - start)

    denoiser.residency.adapt = timed
    return spent


def measure(folder: Path, lora: Path, inputs: Inputs, residency: str, repeats: int) -> dict[str, object]:
    plain = mova.load_denoiser(folder, residency=residency)
    adapted = plain.with_loras([mova.Lora(lora)])
    adding = time_adding(adapted)
    with ExitStack() as stack:
        pair = [TimedRun(stack, denoiser, inputs, repeats + 1) for denoiser in (adapted, plain)]
        for _ in range(repeats + 1):
            for run in pair:
                run.step()
    ours, theirs = pair
    placements = [denoiser.report().mode for denoiser in (adapted, plain)]
    for denoiser in (adapted, plain):
        denoiser.release()
    layers = adapted.parts.count
    once = sum(adding[:layers])  # of the first visit, which adds to the keys of the prompt, too
    return {
        "placements": {"lora": placements[0], "plain": placements[1]},
        "adding_to_all_layers_once": {
            "cpu_seconds": round(once, 4),
            "share_of_a_step": round(once / statistics.median(theirs.work[1:]), 4),
            "share_of_a_run": round(once / statistics.median(theirs.work[1:]) / STEPS_PER_EXPERT, 4),  # where layers stay: once per expert
        },
        "added_per_step": round(len(adding) / layers / (repeats + 1), 2),
        "ratio": round(statistics.median(ours.seconds[1:]) / statistics.median(theirs.seconds[1:]), 4),
        "ratio_of_neighbours": spread([one / other for one, other in zip(ours.seconds[1:], theirs.seconds[1:], strict=True)]),
        "cpu_ratio": round(statistics.median(ours.work[1:]) / statistics.median(theirs.work[1:]), 4),
        "lora_seconds": spread(ours.seconds[1:]),
        "plain_seconds": spread(theirs.seconds[1:]),
        "first_step": {"lora": round(ours.seconds[0], 4), "plain": round(theirs.seconds[0], 4)},
        "lora_megabytes": round(adapted.loras[0].report.nbytes / 1e6, 1),
    }


def compare_ways(rows: int, columns: int, tokens: int, rank: int, dtype: torch.dtype, repeats: int = 9) -> dict[str, float]:
    """Milliseconds of processor time for one linear: itself, the LoRA merged into its weight (once), and beside it (in every step)."""
    weight, x, (down, up) = torch.randn(rows, columns).to(dtype), torch.randn(tokens, columns).to(dtype), (torch.randn(rank, columns), torch.randn(rows, rank))
    factors, out = {"down": down.to(dtype), "up": up.to(dtype)}, torch.empty(tokens, rows, dtype=dtype)
    change = Change(Delta("low rank", factors, 0.01), 1.0)
    ways = {
        "linear": lambda: F.linear(x, weight),
        "merging": lambda: merge(weight, [(change, factors)]),
        "side_branch": lambda: out.add_(F.linear(F.linear(x, factors["down"]), factors["up"])),
    }
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):  # in turns
        for name, work in ways.items():
            start = process_time()
            work()
            spent[name].append(process_time() - start)
    return {name: round(1000 * min(times), 3) for name, times in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="bench.lora", description="Times guided steps with and without a LoRA on every layer of a random model and prints JSON."
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    parser.add_argument("--size", choices=mid_model.SIZES, default="mid")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5, help="counted steps of each side")
    parser.add_argument("--threads", type=int, default=1, help="1 = what the feeding thread does is counted exactly")
    parser.add_argument("--folder", type=Path, help="keep the random model here and use it again; default: a temporary folder")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    size, dtype = mid_model.SIZES[given.size], getattr(torch, given.dtype)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        folder = (given.folder or Path(temporary)) / f"{given.size}-{given.dtype}"
        if not (folder / "model_index.json").is_file():
            mid_model.write_mid_model(folder, dtype, size=size)
        lora = write_lora(Path(temporary) / "random.safetensors", mova.load_denoiser(folder), given.rank, dtype)
        inputs = mid_model.mid_inputs(size=size)
        ways = compare_ways(size.video_ffn, size.video_heads * size.head_dim, 2 * math.prod(size.latent_grid) // 4, given.rank, dtype)
        results = {"milliseconds_of_one_linear": ways} | {
            residency: measure(folder, lora, inputs, residency, given.repeats) for residency in ("auto", "stream")
        }
    print(json.dumps({"benchmark": "lora", "dtype": given.dtype, "size": given.size, "rank": given.rank} | results | describe_machine(), indent=2))


if __name__ == "__main__":
    main()
