"""Latents without their VAE's weights: the space the denoiser works in, and which latents a span of seconds covers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InputError


@dataclass(frozen=True)
class LatentSpace:
    """Where the denoiser works, beside the video VAE's own space: mean and std per channel. temporal: pixel frames per latent frame."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    temporal: int

    def normalize(self, latents: Tensor) -> Tensor:
        """VAE space [B, 16, T, h, w] -> the denoiser's, float32: (z - mean) / std per channel."""
        mean, std = self.statistics(latents)
        return (latents.float() - mean) * (1 / std)

    def denormalize(self, latents: Tensor) -> Tensor:
        """The denoiser's space [B, 16, T, h, w] -> VAE space, float32: z * std + mean per channel."""
        mean, std = self.statistics(latents)
        return latents.float() * std + mean

    def statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        if latents.ndim != 5 or latents.shape[1] != len(self.mean):
            raise InputError(
                f"The video latents are {list(latents.shape)}: [B, {len(self.mean)}, T, h, w] is needed, with the {len(self.mean)} channels of the Wan 2.1 VAE."
            )
        mean, std = (torch.tensor(values, device=latents.device).view(-1, 1, 1, 1) for values in (self.mean, self.std))
        return mean, std

    def frames(self, length: int) -> int:
        """Pixel frames of a clip of `length` latent frames."""
        return self.temporal * (length - 1) + 1


def video_span(length: int, start: float, end: float | None, fps: float, temporal: int) -> Tensor:
    """[length] bool: the latent frames whose middle lies in start..end (seconds, None = to the end) of a clip at `fps`.

    The first latent frame is one pixel frame, each further one `temporal` pixel frames.
    """
    if not 0 < fps < math.inf:
        raise InputError(f"fps is {fps}; a positive number of frames per second is needed.")
    middles = torch.arange(length) * temporal - (temporal - 1) / 2 + 0.5
    middles[0] = 0.5
    return within(middles / fps, start, end)


def audio_span(length: int, start: float, end: float | None, rate: float) -> Tensor:
    """[length] bool: the audio latents whose middle lies in start..end (seconds, None = to the end); rate: latents per second."""
    return within((torch.arange(length) + 0.5) / rate, start, end)


def fit_sound(waveform: Tensor, sample_rate: float, seconds: float) -> Tensor:
    """[B, C, S] cut, or followed by silence, to last `seconds`."""
    return F.pad(waveform, (0, max(math.ceil(sample_rate * seconds), 1) - waveform.shape[-1]))


def within(middles: Tensor, start: float, end: float | None) -> Tensor:
    if end is not None and end <= start:
        raise InputError(f"The span from {start} to {end} seconds is empty: give an end behind the start, or 0 for the end of the clip.")
    return (middles >= start) & (middles < (math.inf if end is None else end))
