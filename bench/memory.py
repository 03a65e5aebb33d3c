"""`python -m bench.memory`: anonymous memory while loading and sampling, memory of the VAE decode by clip length, time to the first step. Prints JSON.

Anonymous memory is what cannot be given back to the system; pages of the mapped checkpoint can. Each case runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from time import perf_counter

import torch

import mova
from mova.demo_model import write_demo_model

from . import mid_model

STATUS = Path("/proc/self/status")
POLL_SECONDS = 0.002
LENGTHS = (5, 45)  # latent frames of the decoded clips
PICTURE = (24, 24)  # latent height and width: 192 x 192 pixels


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
    inputs = mid_model.mid_inputs(size=mid_model.SIZES["memory"])
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


def decode_case(folder: Path, length: int) -> dict[str, int]:
    """Decodes a clip frame by frame, as the film writer takes it."""
    vae = mova.load_video_vae(folder)
    latents = torch.randn(1, 16, length, *PICTURE, generator=torch.Generator().manual_seed(0))
    for _ in vae.decode_stream(latents[:, :, :2], tiling="off"):  # what the allocator keeps is there before the measurement
        continue
    with AnonymousPeak() as peak:
        frames = sum(len(chunk) for chunk in vae.decode_stream(latents, tiling="off"))
    return {"frames": frames, "peak_anonymous_bytes": peak.bytes}


def run_alone(*words: object) -> dict:
    """The same module in a fresh process -> what it printed."""
    done = subprocess.run([sys.executable, "-m", "bench.memory", *map(str, words)], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def measure(folder: Path) -> dict[str, object]:
    twin, demo = folder / "twin", folder / "demo"
    mid_model.write_mid_model(twin, torch.bfloat16, size=mid_model.SIZES["memory"])
    write_demo_model(demo)
    cases = (("bfloat16", "auto"), ("float32", "auto"))  # as stored: views of the file; converted: layer by layer
    sampling = {
        f"{dtype}, {residency}": run_alone("--case", "sample", "--folder", twin, "--dtype", dtype, "--residency", residency) for dtype, residency in cases
    }
    short, long = (run_alone("--case", "decode", "--folder", demo, "--length", length) for length in LENGTHS)
    slope = (long["peak_anonymous_bytes"] - short["peak_anonymous_bytes"]) / (long["frames"] - short["frames"])
    frame = PICTURE[0] * PICTURE[1] * 64 * 3 * 4
    return {"sampling": sampling, "decode": {"short": short, "long": long, "slope_bytes_per_frame": round(slope), "one_frame_bytes": frame}}


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.memory", description="Memory of loading, sampling and decoding on random models, as JSON (Linux).")
    parser.add_argument("--case", choices=("all", "sample", "decode"), default="all")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--residency", default="auto")
    parser.add_argument("--length", type=int, default=LENGTHS[0])
    given = parser.parse_args()
    if not STATUS.is_file():
        parser.error("anonymous memory is read from /proc/self/status, which only Linux has")
    if given.case == "sample":
        result = sample_case(given.folder, given.dtype, given.residency)
    elif given.case == "decode":
        result = decode_case(given.folder, given.length)
    else:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
            result = measure(Path(temporary))
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
