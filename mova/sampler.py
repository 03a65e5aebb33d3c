"""From noise to clean latents: guidance, Euler steps in float32, kept regions, cancel (spec/mova.md 4.3 to 4.7)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .denoiser import Branch, Denoiser, OnLayer, StepTimes
from .errors import InputError, SamplingError
from .resume import Kept, KeptRun, Resume, open_run
from .schedule import Grid, choose_experts, make_grid

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Step:
    """What a callback sees after step `index` (0-based) of `total`."""

    index: int
    total: int
    timestep: float  # what the model was told for the video, 0..1000
    sigma: float
    audio_sigma: float
    expert: str  # high | low
    video: Tensor  # predicted clean latents [B, 16, T, h, w], normalised
    audio: Tensor  # predicted clean latents [B, Ca, Ta]


OnStep = Callable[[Step], None]


@dataclass(frozen=True)
class Guidance:
    """How far the prompt (cfg, per stream) and the bridge are followed; 1 = not amplified."""

    cfg: float
    audio_cfg: float
    bridge: float

    @property
    def plain(self) -> bool:
        """Whether one pass is enough."""
        return self.cfg == self.audio_cfg == self.bridge == 1

    @property
    def passes(self) -> int:
        """Forwards per step."""
        return 1 if self.plain else 2 if self.bridge == 1 else 3

    def branches(self, context: Tensor, negative: Tensor | None) -> list[Branch]:
        """One pass, two (prompt) or three (prompt and bridge); the full one first."""
        if self.plain:
            return [Branch(context)]
        if negative is None:
            raise InputError(
                f"negative_context is missing: guidance (cfg {self.cfg}, audio_cfg {self.audio_cfg}, bridge {self.bridge}) compares with it; set all to 1 to do without."
            )
        guided = [Branch(context), Branch(negative)]
        return guided if self.bridge == 1 else [*guided, Branch(negative, a2v_scale=0.0, v2a_scale=0.0)]

    def combine(self, passes: list[Pair]) -> Pair:
        """The guided velocity of both streams."""
        if len(passes) == 1:
            return passes[0]
        video, audio = (self.combine_stream([pair[stream] for pair in passes], scale) for stream, scale in enumerate((self.cfg, self.audio_cfg)))
        return video, audio

    def combine_stream(self, passes: list[Tensor], scale: float) -> Tensor:
        """negative + scale * (positive - negative); with a third pass, bridge guidance replaces the plain negative."""
        positive, negative, *unbridged = passes
        start = negative if not unbridged else unbridged[0] + self.bridge * (negative - unbridged[0])
        return start + scale * (positive - negative)


@dataclass(frozen=True)
class Plan:
    """The steps of a run: the grids of both streams and what the model is told in each step."""

    video: Grid
    audio: Grid
    times: list[StepTimes]


def plan_steps(
    denoiser: Denoiser, *, steps: int, shift: float | None, audio_shift: float | None, boundary: float | None, schedule: str, denoise: float
) -> Plan:
    """The steps of `sample` for these values (None = the checkpoint's own); InputError names the value that is off."""
    config, ratio = denoiser.schedule, denoiser.boundary_ratio if boundary is None else boundary
    if not 0 <= ratio <= 1:
        raise InputError(f"boundary is {ratio}; it is a share of the noise, 0 to 1 (0.9 in the release).")
    video = make_grid(config, steps, shift=shift, schedule=schedule, denoise=denoise)
    audio = make_grid(config, steps, shift=shift if audio_shift is None else audio_shift, schedule=schedule, denoise=denoise)
    experts = choose_experts(video.timesteps, ratio * config.num_train_timesteps)
    return Plan(video, audio, [StepTimes(*step) for step in zip(video.timesteps.split(1), audio.timesteps.split(1), experts, strict=True)])


class Stream:
    """One stream on its way from noise to clean, with the cells that are kept."""

    def __init__(self, name: str, noise: Tensor, start: Tensor | None, mask: Tensor | None, grid: Grid, device: torch.device) -> None:
        self.name, self.grid = name, grid
        self.noise = noise.to(device, torch.float32)
        self.start = None if start is None else fit(start, self.noise, f"{name}_start").to(self.noise)
        self.mask = None if mask is None else check_mask(name, mask, self.noise, self.start)
        if self.start is None and grid.sigmas[0] < 1:
            raise InputError(f"{name}_start is missing: denoise below 1 starts from clean {name} latents.")
        self.x = self.noise if self.start is None else self.noised(0)

    def noised(self, k: int) -> Tensor:
        """The clean start at the noise level of step k."""
        sigma = self.grid.sigmas[k].item()
        return (1 - sigma) * self.start + sigma * self.noise

    def entering(self, k: int) -> Tensor:
        """The latents the model sees in step k: kept cells follow the clean start, noised as far as the others."""
        if self.mask is not None:
            self.x = self.mask * self.x + (1 - self.mask) * self.noised(k)
        return self.x

    def advance(self, k: int, velocity: Tensor, total: int) -> Tensor:
        """Euler step k; returns the predicted clean latents. SamplingError when the numbers are lost."""
        clean = self.x - self.grid.sigmas[k].item() * velocity
        self.x = self.x + velocity * (self.grid.path[k + 1] - self.grid.path[k]).item()
        if not torch.isfinite(self.x).all():
            raise SamplingError(
                f"step {k + 1} of {total}: the {self.name} latents are no longer finite. Try precision bf16 or fp32, a lower cfg, or without LoRA; "
                "if it stays, the weights or the condition hold NaN ('python -m mova check' tells)."
            )
        return clean

    def finished(self) -> Tensor:
        """The result; cells with mask 0 are the clean start, bit for bit."""
        return self.x if self.mask is None else self.mask * self.x + (1 - self.mask) * self.start


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    *,
    context: Tensor,
    negative_context: Tensor | None = None,
    condition: Tensor,
    video_noise: Tensor,
    audio_noise: Tensor,
    steps: int = 50,
    cfg: float = 5.0,
    audio_cfg: float | None = None,
    bridge_guidance: float = 1.0,
    shift: float | None = None,
    audio_shift: float | None = None,
    boundary: float | None = None,
    schedule: str = "reference",
    denoise: float = 1.0,
    video_start: Tensor | None = None,
    audio_start: Tensor | None = None,
    video_mask: Tensor | None = None,
    audio_mask: Tensor | None = None,
    fps: float = 24.0,
    resume: Resume | None = None,
    on_step: OnStep | None = None,
    on_layer: OnLayer | None = None,
) -> Pair:
    """Makes a clip's latents -> (video [B, 16, T, h, w], audio [B, Ca, Ta]), float32, normalised, where the noise was.

    context, negative_context [B or 1, L, text_dim]; condition [B or 1, 20, T, h, w]; noises as the results.
    cfg, audio_cfg (None = cfg): how strictly picture and sound follow the prompt; bridge_guidance: each other (1 = off).
    None for shift, audio_shift (= shift), boundary (0..1): the checkpoint's own. schedule: reference | simple.
    denoise 0..1 below 1 starts from video_start and audio_start (clean latents). *_mask: 1 = make, 0 = keep *_start,
    broadcastable to the stream. resume: where the run is kept while it lasts; one that is there already is gone on with,
    bit for bit as if it had never stopped. on_step(Step) after every step, on_layer(done, total) after every layer of every step:
    raise in either to cancel. InputError for values that do not fit, SamplingError when latents become NaN or infinite.
    """
    plan = plan_steps(denoiser, steps=steps, shift=shift, audio_shift=audio_shift, boundary=boundary, schedule=schedule, denoise=denoise)
    guidance = choose_guidance(cfg, audio_cfg, bridge_guidance)
    video = Stream("video", video_noise, video_start, video_mask, plan.video, denoiser.device)
    audio = Stream("audio", audio_noise, audio_start, audio_mask, plan.audio, denoiser.device)
    branches = guidance.branches(context, negative_context)
    settings = dict(steps=steps, shift=shift, audio_shift=audio_shift, boundary=boundary, schedule=schedule, denoise=denoise, fps=fps, **vars(guidance))
    tensors = dict(
        context=context, negative_context=None if guidance.plain else negative_context, condition=condition, video_noise=video_noise, audio_noise=audio_noise,
        video_start=video_start, audio_start=audio_start, video_mask=video_mask, audio_mask=audio_mask,
    )  # fmt: skip
    with denoiser.prepare(video.x, audio.x, condition, branches, plan.times, fps) as run, open_run(resume, denoiser, settings, tensors) as record:
        done = restore(record, video, audio)
        for k, step in list(enumerate(plan.times))[done:]:
            velocities = guidance.combine(run.velocities(video.entering(k), audio.entering(k), k, on_layer))
            clean = [stream.advance(k, velocity, steps) for stream, velocity in zip((video, audio), velocities, strict=True)]
            record.note(Kept(k + 1, video.x, audio.x))
            if on_step is not None:
                on_step(Step(k, steps, step.video.item(), plan.video.sigmas[k].item(), plan.audio.sigmas[k].item(), step.expert, *clean))
    return video.finished().to(video_noise.device), audio.finished().to(audio_noise.device)


def restore(record: KeptRun, video: Stream, audio: Stream) -> int:
    """Puts both streams where the kept run stopped; returns how many steps are done."""
    kept = record.read()
    if kept is None:
        return 0
    video.x, audio.x = kept.video.to(video.x), kept.audio.to(audio.x)
    return kept.done


def fit(given: Tensor, noise: Tensor, name: str) -> Tensor:
    """`given` with the batch of the noise; InputError when the shapes differ otherwise."""
    if given.ndim != noise.ndim or given.shape[1:] != noise.shape[1:] or given.shape[0] not in (1, noise.shape[0]):
        raise InputError(f"{name} is {list(given.shape)}; {list(noise.shape)} is needed, as the noise.")
    return given.expand_as(noise)


def check_mask(name: str, mask: Tensor, noise: Tensor, start: Tensor | None) -> Tensor:
    """The mask in float32 beside the noise; InputError when it does not fit or nothing is there to keep."""
    if start is None:
        raise InputError(f"{name}_mask keeps cells of {name}_start, which is missing.")
    try:
        fits = torch.broadcast_shapes(mask.shape, noise.shape) == noise.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise InputError(f"{name}_mask is {list(mask.shape)}; it must broadcast to the stream, {list(noise.shape)}.")
    if not ((mask >= 0) & (mask <= 1)).all():
        raise InputError(f"{name}_mask must lie in 0 (keep) .. 1 (make).")
    return mask.to(noise)


def choose_guidance(cfg: float, audio_cfg: float | None, bridge: float) -> Guidance:
    """InputError unless the scales are finite numbers; audio_cfg None = cfg."""
    for name, value in (("cfg", cfg), ("audio_cfg", audio_cfg or 0.0), ("bridge_guidance", bridge)):
        if not math.isfinite(value):
            raise InputError(f"{name} is {value}; a finite number is needed.")
    return Guidance(cfg, cfg if audio_cfg is None else audio_cfg, bridge)
