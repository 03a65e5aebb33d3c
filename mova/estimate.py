"""What a clip will cost before it is made: time, GPU memory, RAM (the model of spec/performance.md section 1).

The work is counted from the checkpoint's own sizes; how fast a card does it comes from published timings of the reference
(1.3, 1.4). So the result is a prediction, never a measurement.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .cards import PAGE_CACHE, Device
from .checkpoint import open_component
from .denoiser import Denoiser, activation_bytes
from .errors import InputError
from .image import check_size
from .parts import Parts
from .residency import MARGIN, MODES, slabs_needed
from .schedule import MAX_STEPS
from .slabs import ring_bytes
from .video_vae import read_vae_config
from .work import TEXT_TOKENS, Work, add, forward_work

MAX_PASSES = 3  # prompt, negative prompt, bridge guidance

# Read and written per video block and bridge layer by what is no matrix product, in units of the video's tokens x width (1.2, eager).
TRAFFIC_UNITS, BRIDGE_TRAFFIC_UNITS = 70.8, 15.1
PROCESS_BYTES = 2_000_000_000  # RAM of Python, PyTorch and the host (1.7)


def step_seconds(parts: Parts, work: Work, unit: int, passes: int, device: Device, kernel: str) -> float:
    """Of one step with all weights in place (1.3); nan where the rate is not known. unit: bytes of one video activation."""
    units = TRAFFIC_UNITS * len(parts.experts["high"].blocks) + BRIDGE_TRAFFIC_UNITS * len(parts.bridge.config.layers)
    forward = work.attention / device.attention.get(kernel, math.nan) + work.linear / device.linear + units * unit / device.bandwidth
    return passes * forward


@dataclass(frozen=True)
class Estimate:
    """What a clip is predicted to cost. Bytes are peaks; nan seconds = unknown. On the CPU everything is in RAM."""

    settings: str
    device: Device
    kernel: str
    mode: str  # resident | stream
    steps: int
    flops_per_step: float
    seconds_per_step: float
    weights_bytes: int  # of weights on the device
    activation_bytes: int
    decoding_bytes: int  # of the video VAE, without tiles
    ram_bytes: int  # what the system cannot take back

    @property
    def minutes(self) -> float:
        """Of sampling."""
        return self.steps * self.seconds_per_step / 60

    @property
    def vram_bytes(self) -> int:
        return 0 if self.device.memory is None else max(self.weights_bytes + self.activation_bytes, self.decoding_bytes)

    def __str__(self) -> str:
        made = f"Predicted, not measured, for {self.settings}, on {self.device.name}."
        lines = (self.headline(), made, self.time(), self.gpu_memory(), self.ram(), self.advice())
        return "\n".join(line for line in lines if line)

    def headline(self) -> str:
        """What fits on a node."""
        time = "time unknown" if math.isnan(self.seconds_per_step) else span(self.steps * self.seconds_per_step)
        return f"{time}, {gb(self.vram_bytes)} VRAM, {gb(self.ram_bytes)} RAM"

    def time(self) -> str:
        work = f"{self.flops_per_step / 1e15:.3g} PFLOP"
        if math.isnan(self.seconds_per_step):
            return f"Time: unknown. A step is {work}, but nothing is known of how fast {self.device.name} does it with attention '{self.kernel}'."
        return f"Sampling: {span(self.steps * self.seconds_per_step)}, {span(self.seconds_per_step)} per step of {work}; {self.device.source}."

    def gpu_memory(self) -> str:
        if self.device.memory is None:
            return ""
        layers = {"resident": "all layers", "stream": "a few layers at a time, more where more is free"}[self.mode]
        sampling = (
            f"{gb(self.weights_bytes + self.activation_bytes)} while sampling ({gb(self.weights_bytes)} of weights, {layers}; the rest grows with the clip)"
        )
        found = f"GPU memory: {sampling}, {gb(self.decoding_bytes)} while decoding (less in tiles)."
        if self.vram_bytes <= self.device.memory:
            return found
        remedy = {"resident": "choose residency auto or stream", "stream": "choose a smaller or shorter clip"}[self.mode]
        return f"{found} That does not fit in {gb(self.device.memory)}: {remedy}."

    def ram(self) -> str:
        return f"RAM: {gb(self.ram_bytes)} that cannot be given back. The weights stay in their files; free RAM keeps them at hand."

    def advice(self) -> str:
        fastest = max(self.device.attention, key=self.device.attention.__getitem__, default=self.kernel)
        faster = self.device.attention.get(fastest, 0) > self.device.attention.get(self.kernel, 0)
        return f"Attention '{fastest}' in Load MOVA Model is faster on this card." if faster else ""


def gb(count: float) -> str:
    return f"{count / 1e9:.3g} GB"


def span(seconds: float) -> str:
    unit, size = next((unit, size) for unit, size, limit in (("s", 1, 120), ("minutes", 60, 7200), ("hours", 3600, math.inf)) if seconds < limit)
    return f"{seconds / size:.3g} {unit}"


def estimate(
    denoiser: Denoiser,
    device: Device,
    *,
    height: int,
    width: int,
    num_frames: int,
    steps: int = 50,
    passes: int = 2,
    residency: str = "auto",
    fps: float = 24.0,
) -> Estimate:
    """What num_frames pictures of height x width px cost in `steps` steps of `passes` forwards (1 = cfg 1, 2 = guided, 3 = with bridge guidance).

    residency: resident | stream | auto (resident when that fits the device). InputError for values that `sample` would refuse.
    """
    check_values(height, width, num_frames, steps, passes, residency)
    parts, cpu, vae = denoiser.parts, device.memory is None, open_component(denoiser.folder, "video_vae")
    config, stored = read_vae_config(vae), {entry.dtype for entry in vae.index.values()}
    latents = ((num_frames - 1) // config.scale_factor_temporal + 1, *(side // config.scale_factor_spatial for side in (height, width)))
    tokens = denoiser.count_tokens((1, config.z_dim, *latents))
    work = add(forward_work(parts, tokens, denoiser.audio_clock().latent_length(num_frames, fps)).values())
    activations = activation_bytes(denoiser, tokens, passes, passes if cpu else 1, TEXT_TOKENS)  # the CPU runs all passes at once
    decoding = config.decode_bytes(height, width, 4 if "F32" in stored else 2)
    layers = denoiser.residency.sizes
    mapped = cpu and residency != "stream" and denoiser.residency.stored
    if residency == "auto":
        fits = mapped or bool(denoiser.loras) if cpu else sum(layers) + activations + MARGIN <= device.memory
        residency = "resident" if fits else "stream"
    compute = step_seconds(parts, work, tokens * parts.experts["high"].config.dim * denoiser.dtype.itemsize, passes, device, denoiser.attention)
    slabs = slabs_needed(max(layers) / PAGE_CACHE, math.inf if cpu else passes * device.least_seconds(*work) / parts.count)
    weights = sum(layers) if residency == "resident" else slabs * max(layers)
    own = (0 if mapped else weights) + max(activations, decoding) if cpu else ring_bytes(max(layers))
    return Estimate(
        settings=f"{width}x{height}, {num_frames} frames, {steps} steps of {passes} passes, {residency}",
        device=device,
        kernel=denoiser.attention,
        mode=residency,
        steps=steps,
        flops_per_step=passes * work.total,
        seconds_per_step=compute if residency == "resident" else max(compute, sum(layers) / PAGE_CACHE),  # nan stays nan
        weights_bytes=weights,
        activation_bytes=activations,
        decoding_bytes=decoding,
        ram_bytes=PROCESS_BYTES + num_frames * height * width * 3 * 4 + own + sum(lora.report.nbytes for lora in denoiser.loras),  # the film is float32
    )


def check_values(height: int, width: int, num_frames: int, steps: int, passes: int, residency: str) -> None:
    check_size(height, width, num_frames)
    if not 1 <= steps <= MAX_STEPS:
        raise InputError(f"steps is {steps}; 1 to {MAX_STEPS} are possible (50 is the released default).")
    if not 1 <= passes <= MAX_PASSES:
        raise InputError(f"passes is {passes}; 1 (no guidance), 2 (guided) and 3 (with bridge guidance) are possible.")
    if residency not in MODES:
        raise InputError(f"residency is {residency!r}; choose {', '.join(MODES)}.")
