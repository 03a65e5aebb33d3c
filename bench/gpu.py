"""`make bench-gpu`, or `python -m bench.gpu --rows ceilings block`: what only an NVIDIA GPU can show (spec/performance.md 5.2).

Every row is printed and merged into bench/results/<gpu>-<date>.json as soon as it is measured, so that rows can run in calls of their own. Random weights of
the released size: valid for time, memory, bytes and closeness, not for anything about the clip. Numbers of a row that a machine cannot do are a sentence.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import re
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter
from unittest.mock import patch

import torch
from torch import Tensor

import mova
from mova.demo_model import CONFIGS, write_demo_model
from mova.denoiser import Branch, Denoiser, StepTimes
from mova.video_vae import FeatureCache, VideoVAE, VideoVAEConfig, import_network
from mova.work import add, forward_work

from .ceilings import RIVALS, ceilings, forget_files
from .gpu_meters import GPU, Figure, clean_gpu, memory, or_sentence, seconds, spread
from .mid_model import Inputs, Size, mid_inputs
from .released_model import RELEASED, RELEASED_720P, TWO_LAYERS, write_released_model

RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")
SIZES = {"360p": RELEASED, "720p": RELEASED_720P}
PIXELS = {"360p": (352, 640), "720p": (720, 1280)}
CAPS = {"360p": (6, 8, 12, 16, 24), "720p": (12,)}  # GiB
DECODED = 9  # latent frames


# ---------------------------------------------------------------- row: correctness


def distance(actual: Tensor, expected: Tensor) -> float:
    """Relative L2 error."""
    actual, expected = actual.double().cpu(), expected.double().cpu()
    return float((actual - expected).norm() / expected.norm())


def correctness(folder: Path) -> dict[str, Figure]:
    """The small model in float32: CPU against GPU, and every residency on the GPU against the others, bit for bit."""
    write_demo_model(folder / "demo")
    text, sound = CONFIGS["video_dit"]["text_dim"], CONFIGS["audio_dit"]["in_dim"]
    generator = torch.Generator().manual_seed(0)
    names = {
        "context": (1, 40, text), "negative_context": (1, 40, text), "condition": (1, 20, 5, 12, 16),
        "video_noise": (1, 16, 5, 12, 16), "audio_noise": (1, sound, 35),
    }  # fmt: skip
    given = {name: torch.randn(shape, generator=generator) for name, shape in names.items()}

    def clip(device: torch.device, residency: str, attention: str = "auto") -> tuple[Tensor, Tensor]:
        denoiser = mova.load_denoiser(folder / "demo", device=device, residency=residency)
        denoiser.attention = attention
        clips = [mova.sample(denoiser, **given, steps=6) for _ in range(2)]  # the second run meets slabs that hold something
        denoiser.release()
        assert all(torch.equal(*pair) for pair in zip(*clips, strict=True)), "two runs of one model differ"
        return clips[0]

    expected, resident = clip(CPU, "auto"), clip(GPU, "resident")
    found: dict[str, Figure] = {f"{stream}_gpu_to_cpu_rel_l2": distance(a, b) for stream, a, b in zip(("video", "audio"), resident, expected, strict=True)}
    found["stream_equals_resident"] = all(torch.equal(a, b) for a, b in zip(clip(GPU, "stream"), resident, strict=True))
    found["kernels"] = {name: or_sentence(lambda name=name: distance(clip(GPU, "resident", name)[0], resident[0])) for name in (*RIVALS, "math")}
    return found


# ---------------------------------------------------------------- rows: steps


def take_steps(denoiser: Denoiser, inputs: Inputs, experts: list[str], on_layer: Callable[[int, int], None] | None = None) -> dict[str, object]:
    """Guided steps with the experts in this order; the first of each reads the prompts and is not among the counted ones. Velocities of the last on the CPU."""
    timestep = torch.tensor([inputs.timestep])
    times, branches = [StepTimes(timestep, timestep, expert) for expert in experts], [Branch(inputs.positive), Branch(inputs.negative)]
    video, audio, condition = (tensor.to(GPU) for tensor in (inputs.video, inputs.audio, inputs.condition))
    took, mallocs, moved = [], [], []
    loaded = perf_counter()
    with torch.no_grad(), denoiser.prepare(video, audio, condition, branches, times, 24.0) as run:
        for k in range(len(experts)):
            start, before = perf_counter(), denoiser.report().bytes_moved
            velocities = run.velocities(video, audio, k, on_layer)
            torch.cuda.synchronize()
            took.append(perf_counter() - start)
            mallocs.append(torch.cuda.memory_stats().get("num_device_alloc", 0))
            moved.append(denoiser.report().bytes_moved - before)
            if k == 0:
                to_first_step = perf_counter() - loaded
    counted = [took[k] for k in range(len(experts)) if k and experts[k] == experts[k - 1]]
    return {
        "seconds_per_step": spread(counted or took),
        "seconds_to_first_step": round(to_first_step, 3),
        "all_steps": [round(one, 4) for one in took],
        "device_allocations_after_first_step": mallocs[-1] - mallocs[0],
        "bytes_per_step": statistics.median(moved[1:]),  # the first fills what lies ahead, the last has nothing ahead
        "report": asdict(denoiser.report()),
        "velocities": [tensor.cpu() for pair in velocities for tensor in pair],
    } | memory()


def step_flops(denoiser: Denoiser, size: Size) -> float:
    tokens = math.prod(size.latent_grid) // 4
    return 2 * add(forward_work(denoiser.parts, tokens, size.audio_length).values()).total


def measured(denoiser: Denoiser, size: Size, experts: list[str]) -> dict[str, object]:
    result = take_steps(denoiser, mid_inputs(size=size), experts)
    return result | {"tflops": round(step_flops(denoiser, size) / result["seconds_per_step"]["median"] / 1e12, 1)}


def without_velocities(result: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in result.items() if name != "velocities"}


def block(folder: Path) -> dict[str, Figure]:
    """A guided step of two layers, one with sound and bridge and one without, by kernel and compiled; every layer on the device."""
    model, found = write_released_model(folder / "two-layers", TWO_LAYERS, GPU), {}
    for size, full in SIZES.items():
        for kernel, compiled in (("auto", False), *((rival, False) for rival in RIVALS), ("auto", True)):
            with clean_gpu():
                name = f"{size}, {kernel}{', compiled' if compiled else ''}"
                found[name] = or_sentence(lambda full=full, kernel=kernel, compiled=compiled: block_case(model, full, kernel, compiled))
    return found


def block_case(model: Path, full: Size, kernel: str, compiled: bool) -> dict[str, object]:
    denoiser = mova.load_denoiser(model, device=GPU, residency="resident", compile=compiled)
    denoiser.attention = kernel
    ends: list[float] = []

    def on_layer(done: int, total: int) -> None:
        torch.cuda.synchronize()
        ends.append(perf_counter())

    size = replace(TWO_LAYERS, latent_grid=full.latent_grid)
    result = measured(denoiser, size, ["high"] * 4)
    take_steps(denoiser, mid_inputs(size=size), ["high"] * 3, on_layer)
    denoiser.release()
    unit = math.prod(size.latent_grid) // 4 * 5120 * 2
    beside = result["peak_allocated"] - result["report"]["slab_bytes"]
    return without_velocities(result) | {"seconds_of_second_layer": round(ends[-1] - ends[-2], 5), "peak_without_slabs_u": round(beside / unit, 2)}


def resident(folder: Path) -> dict[str, Figure]:
    """Full steps at 360p with every layer on the device."""
    model, found = write_released_model(folder / "released", RELEASED, GPU), {}
    for kernel in ("auto", "cudnn"):
        with clean_gpu():
            found[kernel] = or_sentence(lambda kernel=kernel: full_case(model, "resident", kernel)[0])
    return found


def full_case(model: Path, residency: str, kernel: str = "auto", experts: tuple[str, ...] = ("high",) * 4) -> tuple[dict[str, object], list[Tensor]]:
    denoiser = mova.load_denoiser(model, device=GPU, residency=residency)
    denoiser.attention = kernel
    result = measured(denoiser, RELEASED, list(experts))
    denoiser.release()
    return without_velocities(result), result["velocities"]


def offload(folder: Path) -> dict[str, Figure]:
    """Full steps at 360p streamed, from the page cache and from a disk that nothing was read from, over the switch of experts; against resident ones."""
    model = write_released_model(folder / "released", RELEASED, GPU)
    with clean_gpu():
        kept, expected = full_case(model, "resident")
    found: dict[str, Figure] = {"resident": kept}
    for source in ("page_cache", "disk"):
        if source == "disk":
            forget_files(model)
        with clean_gpu():
            found[source], velocities = full_case(model, "stream", experts=("high",) * 4 if source == "disk" else ("high",) * 4 + ("low",) * 3)
        if source == "disk":  # the low expert of the other run says other things
            found["stream_equals_resident"] = all(torch.equal(a, b) for a, b in zip(velocities, expected, strict=True))
    waiting = found["page_cache"]["seconds_per_step"]["median"] - kept["seconds_per_step"]["median"]
    steps = found["page_cache"]["all_steps"]
    return found | {"exposed_seconds_per_step": round(waiting, 4), "switch_seconds": round(steps[4] - statistics.median(steps[1:4]), 4)}


def caps(folder: Path) -> dict[str, Figure]:
    """Streamed steps where PyTorch may use only so much of the device: does it complete?"""
    model, total = write_released_model(folder / "released", RELEASED, GPU), torch.cuda.get_device_properties(GPU).total_memory
    found: dict[str, Figure] = {}
    for size, limits in CAPS.items():
        for limit in limits:
            with clean_gpu():
                torch.cuda.set_per_process_memory_fraction(limit * 2**30 / total)
                found[f"{size} in {limit} GiB"] = or_sentence(lambda size=size: capped_case(model, SIZES[size]))
                torch.cuda.set_per_process_memory_fraction(1.0)
    return found


def capped_case(model: Path, size: Size) -> dict[str, object]:
    denoiser = mova.load_denoiser(model, device=GPU, residency="stream")
    try:
        return without_velocities(measured(denoiser, size, ["high"] * 2))
    finally:
        denoiser.release()


# ---------------------------------------------------------------- row: VAE


def vae(folder: Path) -> dict[str, Figure]:
    """The Wan 2.1 VAE at full size with random weights: the condition with and without early stop, decoding, and the channels-last layout."""
    found = {}
    for size, (height, width) in PIXELS.items():
        with clean_gpu():
            found[size] = or_sentence(lambda height=height, width=width: vae_case(height, width))
    return found


def vae_case(height: int, width: int) -> dict[str, object]:
    with GPU:
        network = import_network()().eval().requires_grad_(False).bfloat16()
    vae, picture = VideoVAE(network, VideoVAEConfig()), torch.rand(height, width, 3)
    latents = torch.randn(1, 16, DECODED, height // 8, width // 8)

    def encode() -> Tensor:
        return mova.image_condition(vae, picture, height=height, width=width, num_frames=193, tiling="off")

    def decode() -> None:
        for _ in vae.decode_stream(latents, tiling="off"):
            continue

    never = property(lambda cache: False, lambda cache, value: None)
    stopped, early = timed(encode)
    encoding = memory()
    with patch.object(FeatureCache, "still", never):
        whole, full = timed(encode)
    torch.cuda.reset_peak_memory_stats()
    found = {
        "encode_seconds": round(early, 3),
        "encode_all_frames_seconds": round(full, 3),
        "early_stop_is_bit_equal": torch.equal(stopped, whole),
        "encode_memory": encoding,
        "decode_seconds_per_latent_frame": {"contiguous": decode_rate(decode)},
        "decode_memory": memory(),
    }
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv3d):
            layer.to(memory_format=torch.channels_last_3d)
    found["decode_seconds_per_latent_frame"]["channels_last_3d"] = or_sentence(lambda: decode_rate(decode))
    return found


def timed(work: Callable[[], Tensor]) -> tuple[Tensor, float]:
    start = perf_counter()
    result = work()
    return result, perf_counter() - start  # the result is on the CPU: everything has been waited for


def decode_rate(decode: Callable[[], None]) -> float:
    return round(seconds(decode, repeats=2)["median"] / DECODED, 4)


# ---------------------------------------------------------------- the run

ROWS = {row.__name__: row for row in (correctness, ceilings, block, resident, offload, caps, vae)}


def describe() -> dict[str, str]:
    return {
        "gpu": torch.cuda.get_device_name(GPU),
        "driver": said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": str(torch.backends.cudnn.version()),
        "python": platform.python_version(),
        "commit": said_by("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"),
        "cpus": str(os.cpu_count()),
        "date": datetime.date.today().isoformat(),
    }


def said_by(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def keep(results: Path, row: str, found: dict[str, Figure]) -> Path:
    """Adds a row to the file of this GPU and day."""
    machine = describe()
    file = results / f"{re.sub(r'[^a-z0-9]+', '-', machine['gpu'].lower()).strip('-')}-{machine['date']}.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"machine": machine, "rows": {}}
    known["rows"][row] = found
    results.mkdir(parents=True, exist_ok=True)
    fresh = file.with_suffix(".part")
    fresh.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    fresh.replace(file)
    return file


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.gpu", description="Benchmarks on an NVIDIA GPU with random weights of the released size, as JSON.")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="all of them take half an hour on an H200")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "mova-bench", help="for random weights, 40 GB; used again if there")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("an NVIDIA GPU that PyTorch can use is needed, and there is none here. 'python -m bench' runs what any machine can show.")
    for row in given.rows:
        with clean_gpu():
            found = ROWS[row](given.folder)
        print(json.dumps({row: found}, indent=2), flush=True)
        keep(given.results, row, found)


if __name__ == "__main__":
    main()
