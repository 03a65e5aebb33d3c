"""Latents without their VAE: the space the denoiser works in, and which latents a span of seconds covers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .checkpoint import open_component
from .errors import InputError
from .video_vae import read_vae_config


@dataclass(frozen=True)
class LatentSpace:
    """Where the denoiser works, beside the video VAE's own space: mean and std per channel. temporal: pixel frames per latent frame."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    temporal: int

    def normalize(self, latents: Tensor) -> Tensor:
        """VAE space [B, 16, T, h, w] -> the denoiser's, float32; the arithmetic of `VideoVAE.normalize`."""
        mean, std = self.statistics(latents)
        return (latents.float() - mean) * (1 / std)

    def denormalize(self, latents: Tensor) -> Tensor:
        """The denoiser's space [B, 16, T, h, w] -> VAE space, float32."""
        mean, std = self.statistics(latents)
        return latents.float() * std + mean

    def statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        if latents.ndim != 5 or latents.shape[1] != len(self.mean):
            raise InputError(f"The video latents are {list(latents.shape)}: [B, {len(self.mean)}, T, h, w] is needed, as the Wan 2.1 VAE makes them.")
        mean, std = (torch.tensor(values, device=latents.device).view(-1, 1, 1, 1) for values in (self.mean, self.std))
        return mean, std

    def frames(self, length: int) -> int:
        """Pixel frames of a clip of `length` latent frames."""
        return self.temporal * (length - 1) + 1


def open_latent_space(folder: str | Path) -> LatentSpace:
    """Reads `folder/video_vae/config.json` of a checkpoint; the weights stay closed. CheckpointError when it is not a Wan 2.1 VAE's."""
    config = read_vae_config(open_component(folder, "video_vae"))
    return LatentSpace(config.latents_mean, config.latents_std, config.scale_factor_temporal)


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
