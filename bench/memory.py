"""`python -m bench.memory`: anonymous memory while loading and sampling, what streaming costs in time, memory of the VAE decode by clip length, frames
that the condition takes to encode. Prints JSON. --large: experts of 1 GB.

Anonymous memory is what cannot be given back to the system; pages of the mapped checkpoint can. Each case runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import torch

import mova
from mova.demo_model import write_demo_model
from mova.denoiser import Branch, JointRun, StepTimes

from . import mid_model

STATUS = Path("/proc/self/status")
POLL_SECONDS = 0.002
LENGTHS = (5, 25)  # latent frames of the decoded clips
PICTURE = (12, 12)  # latent height and width: 96 x 96 pixels
SMALL = mid_model.SIZES["memory"]
LARGE = replace(SMALL, video_heads=20, video_ffn=3072)  # 1.0 GB an expert in bfloat16
# (dtype, residency) -> the case that tells what the activations take, since it has every weight in place: views of the file, or slabs for all layers
SAMPLED = {("bfloat16", "auto"): None, ("bfloat16", "stream"): "bfloat16, auto", ("float32", "resident"): None, ("float32", "auto"): "float32, resident"}
TIMED_GRID = (5, 12, 12)  # T, h, w: enough tokens that compute takes longer than reading
REPEATS = 3
FILM = 193  # frames


class AnonymousPeak:
    """The most anonymous memory of this process while the block runs, beyond what it had before: `bytes`."""

    bytes = 0

    def __enter__(self) -> AnonymousPeak:
        self.before, self.running = anonymous_bytes(), True
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.running = False
        self.thread.join()

    def watch(self) -> None:
        while self.running:
            self.bytes = max(self.bytes, anonymous_bytes() - self.before)
            threading.Event().wait(POLL_SECONDS)


def anonymous_bytes() -> int:
    line = next(line for line in STATUS.read_text(encoding="ascii").splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def sample_case(folder: Path, dtype: str, residency: str) -> dict[str, object]:
    """Loads a checkpoint and samples four steps across the expert boundary."""
    inputs = mid_model.mid_inputs(size=SMALL)
    first_step: list[float] = []
    start = perf_counter()
    with AnonymousPeak() as peak:
        denoiser = mova.load_denoiser(folder, dtype=getattr(torch, dtype), residency=residency)
        mova.sample(
            denoiser, context=inputs.positive, negative_context=inputs.negative, condition=inputs.condition,
            video_noise=inputs.video, audio_noise=inputs.audio, steps=4, on_step=lambda step: first_step.append(perf_counter() - start),
        )  # fmt: skip
    expert = sum(tensor.numel() for tensor in denoiser.parts.tensors["high"].values()) * getattr(torch, dtype).itemsize
    return {
        "peak_anonymous_bytes": peak.bytes,
        "one_expert_bytes": expert,
        "peak_in_experts": round(peak.bytes / expert, 3),
        "seconds_to_first_step": round(first_step[0], 3),
        "report": vars(denoiser.report()),
    }


def time_case(folder: Path) -> dict[str, object]:
    """Guided steps in float32 with all layers in slabs of their own, and with layers converted one by one as they are needed, taking turns."""
    inputs = mid_model.mid_inputs(size=replace(SMALL, latent_grid=TIMED_GRID))
    timestep = torch.tensor([inputs.timestep])
    steps, branches = [StepTimes(timestep, timestep, "high")] * (REPEATS + 1), [Branch(inputs.positive), Branch(inputs.negative)]
    seconds: dict[str, list[float]] = {"resident": [], "stream": []}
    with ExitStack() as stack, torch.no_grad():
        runs: dict[str, JointRun] = {}
        for mode in seconds:
            denoiser = mova.load_denoiser(folder, dtype=torch.float32, residency=mode)
            runs[mode] = stack.enter_context(denoiser.prepare(inputs.video, inputs.audio, inputs.condition, branches, steps, 24.0))
        for k in range(len(steps)):
            for mode, run in runs.items():
                start = perf_counter()
                run.velocities(inputs.video, inputs.audio, k)
                seconds[mode].append(perf_counter() - start)
    medians = {mode: round(statistics.median(found[1:]), 4) for mode, found in seconds.items()}  # the first step reads the prompts
    return {"median_seconds": medians, "streamed_to_resident": round(medians["stream"] / medians["resident"], 4)}


def decode_case(folder: Path, length: int) -> dict[str, int]:
    """Decodes a clip frame by frame, as the film writer takes it."""
    vae = mova.load_video_vae(folder)
    latents = torch.randn(1, 16, length, *PICTURE, generator=torch.Generator().manual_seed(0))
    for _ in vae.decode_stream(latents[:, :, :2], tiling="off"):  # what the allocator keeps is there before the measurement
        continue
    with AnonymousPeak() as peak:
        frames = sum(len(chunk) for chunk in vae.decode_stream(latents, tiling="off"))
    return {"frames": frames, "peak_anonymous_bytes": peak.bytes}


def encode_case(folder: Path) -> dict[str, int]:
    """How many frames of the condition film are encoded until it stands still."""
    vae, encoded = mova.load_video_vae(folder), []
    vae.network.encoder.register_forward_pre_hook(lambda _, args: encoded.append(args[0].shape[2]))
    mova.image_condition(vae, torch.rand(32, 32, 3, generator=torch.Generator().manual_seed(0)), height=32, width=32, num_frames=FILM)
    return {"frames": FILM, "encoded": sum(encoded)}


def run_alone(*words: object) -> dict:
    """The same module in a fresh process -> what it printed. Freed tensors go back to the system at once, or peaks would tell of the allocator's habits."""
    environment = os.environ | ({} if "time" in words else {"MALLOC_MMAP_THRESHOLD_": "65536"})
    done = subprocess.run([sys.executable, "-m", "bench.memory", *map(str, words)], check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout)


def measure(folder: Path, size: mid_model.Size) -> dict[str, object]:
    twin, demo = folder / "twin", folder / "demo"
    mid_model.write_mid_model(twin, torch.bfloat16, size=size)
    write_demo_model(demo)
    short, long = (run_alone("--case", "decode", "--folder", demo, "--length", length) for length in LENGTHS)
    slope = (long["peak_anonymous_bytes"] - short["peak_anonymous_bytes"]) / (long["frames"] - short["frames"])
    frame = PICTURE[0] * PICTURE[1] * 64 * 3 * 4
    return {
        "sampling": measure_sampling(twin),
        "step": run_alone("--case", "time", "--folder", twin),
        "decode": {"short": short, "long": long, "slope_bytes_per_frame": round(slope), "one_frame_bytes": frame},
        "condition": run_alone("--case", "encode", "--folder", demo),
    }


def measure_sampling(folder: Path) -> dict[str, dict]:
    """Every case by name; where layers take turns, with the bar of spec/performance.md 5.1: two slabs, a fifth more, and activations."""
    cases = {}
    for dtype, residency in SAMPLED:
        cases[f"{dtype}, {residency}"] = run_alone("--case", "sample", "--folder", folder, "--dtype", dtype, "--residency", residency)
    for (dtype, residency), whole in SAMPLED.items():
        if whole:
            case, slabs = cases[f"{dtype}, {residency}"], cases[f"{dtype}, {residency}"]["report"]["slab_bytes"]
            activations = cases[whole]["peak_anonymous_bytes"] - cases[whole]["report"]["slab_bytes"]
            case |= {"activation_bytes": activations, "bar_bytes": round(1.2 * slabs + activations)}
            case["bar_is_met"] = case["peak_anonymous_bytes"] < case["bar_bytes"]
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.memory", description="Memory of loading, sampling and decoding on random models, as JSON (Linux).")
    parser.add_argument("--large", action="store_true", help="experts of 1 GB instead of 0.4 (3 GB of temporary disk)")
    parser.add_argument("--case", choices=("all", "sample", "time", "decode", "encode"), default="all")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--residency", default="auto")
    parser.add_argument("--length", type=int, default=LENGTHS[0])
    given = parser.parse_args()
    if not STATUS.is_file():
        parser.error("anonymous memory is read from /proc/self/status, which only Linux has")
    cases = {
        "sample": lambda: sample_case(given.folder, given.dtype, given.residency),
        "time": lambda: time_case(given.folder),
        "decode": lambda: decode_case(given.folder, given.length),
        "encode": lambda: encode_case(given.folder),
    }
    if given.case == "all":
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
            result = {"benchmark": "memory"} | measure(Path(temporary), LARGE if given.large else SMALL)
    else:
        result = cases[given.case]()
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
