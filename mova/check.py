"""The first minute with real weights: does this checkpoint behave like MOVA on this machine?

Every value stands beside what is normal, in a form to paste into a bug report. Nothing is judged that random weights could
not show; quality is for eyes and ears.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .audio_vae import load_audio_vae
from .denoiser import Denoiser, load_denoiser
from .image import check_size, image_condition
from .pipeline import draw_noise
from .text import load_text_encoder
from .video_vae import load_video_vae

FRAMES, FPS = 17, 24.0
PROMPTS = ("A red ball bounces on a wooden floor. The audio shows dull knocks.", "A violinist plays in a dark hall. The audio shows a slow melody.")
TONE = 440.0  # Hz
TIMES = {"high": 1000.0, "low": 875.0}


@dataclass(frozen=True)
class Finding:
    """One measured value and what is normal for released weights."""

    name: str
    value: str
    normal: str
    good: bool

    def __str__(self) -> str:
        return f"{'ok  ' if self.good else 'LOOK'}  {self.name:<44} {self.value:<24} normal: {self.normal}"


def check(
    folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, residency: str = "auto", height: int = 352, width: int = 640
) -> Iterator[Finding]:
    """Findings one by one as they are measured. CheckpointError when a part is incomplete."""
    check_size(height, width, FRAMES)
    yield Finding("machine", f"torch {torch.__version__}, {device}", f"any; this is {platform.platform()}", True)
    denoiser = load_denoiser(folder, device=device, dtype=dtype, residency=residency)
    yield Finding("video_dit, video_dit_2, audio_dit, bridge", "all tensors, all shapes", "all", True)
    context = yield from check_text(folder, device, dtype)
    condition = yield from check_picture(folder, device, dtype, height, width)
    yield from check_sound(folder, device, dtype)
    yield from check_denoiser(denoiser, context, condition)


def check_text(folder: str | Path, device: str | torch.device, dtype: torch.dtype | None) -> Iterator[Finding]:
    """-> the embeddings of both prompts [2, 512, text_dim]."""
    start = time.perf_counter()
    encoder = load_text_encoder(folder, device=device, dtype=dtype)
    embedded = encoder.encode(list(PROMPTS)).float().cpu()
    encoder.release()
    yield Finding("text: two prompts", f"{time.perf_counter() - start:.1f} s, {finite(embedded)}", "finite", bool(torch.isfinite(embedded).all()))
    yield Finding("text: the prompts differ by", f"{relative(embedded[0], embedded[1]):.2f}", "0.3 .. 1.5", 0.3 < relative(embedded[0], embedded[1]) < 1.5)
    return embedded


def check_picture(folder: str | Path, device: str | torch.device, dtype: torch.dtype | None, height: int, width: int) -> Iterator[Finding]:
    """-> the condition [1, 20, T, h, w] of a drawn picture."""
    vae, picture = load_video_vae(folder, device=device, dtype=dtype), draw_picture(height, width)
    latents = vae.encode(picture[None])
    error = (vae.decode(latents)[0].cpu() - picture).square().mean().item()
    psnr = -10 * math.log10(max(error, 1e-12))
    yield Finding("video VAE: a picture there and back", f"{psnr:.1f} dB PSNR", "above 25 dB", psnr > 25)
    spread = vae.normalize(latents).std().item()
    yield Finding("video VAE: spread of the latents", f"{spread:.2f}", "0.3 .. 2", 0.3 < spread < 2)
    return image_condition(vae, picture, height=height, width=width, num_frames=FRAMES)


def check_sound(folder: str | Path, device: str | torch.device, dtype: torch.dtype | None) -> Iterator[Finding]:
    vae = load_audio_vae(folder, device=device, dtype=dtype)
    clock = torch.arange(2 * vae.sample_rate) / vae.sample_rate
    tone = 0.3 * torch.sin(2 * math.pi * min(TONE, vae.sample_rate / 8) * clock)
    heard = vae.decode(vae.encode(tone[None, None], vae.sample_rate))[0, 0, : len(tone)].cpu()
    snr = 10 * math.log10(tone.square().mean().item() / max((heard - tone).square().mean().item(), 1e-12))
    yield Finding("audio VAE: a tone there and back", f"{snr:.1f} dB SNR", "above 3 dB", snr > 3)
    pitch, wanted = (loudest_frequency(sound, vae.sample_rate) for sound in (heard, tone))
    yield Finding("audio VAE: pitch of the tone", f"{pitch:.0f} Hz", f"{wanted:.0f} Hz", abs(pitch - wanted) < 0.02 * wanted)


def check_denoiser(denoiser: Denoiser, context: Tensor, condition: Tensor) -> Iterator[Finding]:
    """One step per expert, and whether prompt and bridge matter."""
    length = denoiser.audio_clock().latent_length(FRAMES, FPS)
    video, audio = draw_noise(0, (1, denoiser.video_channels, *condition.shape[2:]), (1, denoiser.audio_channels, length))
    try:
        for expert, timestep in TIMES.items():
            start = time.perf_counter()
            full = denoiser.velocity(video, audio, condition, context[:1], timestep, expert=expert)
            yield Finding(
                f"{expert} expert: one pass of {FRAMES} frames",
                f"{time.perf_counter() - start:.1f} s, {finite(*full)}",
                "finite",
                all(bool(torch.isfinite(v).all()) for v in full),
            )
            for name, velocity, noise in (("video", full[0], video), ("audio", full[1], audio)):
                match = correlation(velocity, noise)
                yield Finding(f"{expert} expert: {name} velocity follows the noise", f"{match:.2f}", "above 0.4 (near 0: wrong weights)", match > 0.4)
            other = denoiser.velocity(video, audio, condition, context[1:], timestep, expert=expert)
            alone = denoiser.velocity(video, audio, condition, context[:1], timestep, expert=expert, a2v_scale=0.0, v2a_scale=0.0)
            for what, changed in (("another prompt", other), ("no bridge", alone)):
                moved = [relative(a, b) for a, b in zip(changed, full, strict=True)]
                yield Finding(f"{expert} expert: {what} changes picture, sound", f"{moved[0]:.3f}, {moved[1]:.3f}", "both above 0.003", min(moved) > 0.003)
    finally:
        denoiser.release()


def draw_picture(height: int, width: int) -> Tensor:
    """A smooth picture with edges, [H, W, 3] in 0..1."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    disc = ((x - 0.6) ** 2 * (width / height) ** 2 + (y - 0.45) ** 2 < 0.06).float()
    return torch.stack((x * (1 - disc) + 0.9 * disc, y * (1 - disc) + 0.5 * disc, 0.6 - 0.4 * x * y - 0.1 * disc), dim=-1)


def finite(*tensors: Tensor) -> str:
    return "finite" if all(bool(torch.isfinite(tensor).all()) for tensor in tensors) else "NaN or infinite"


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp_min(1e-12)).item()


def correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1].item()


def loudest_frequency(sound: Tensor, sample_rate: int) -> float:
    spectrum = torch.fft.rfft(sound * torch.hann_window(len(sound))).abs()
    return spectrum.argmax().item() * sample_rate / len(sound)
