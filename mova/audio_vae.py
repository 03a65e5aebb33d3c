"""The audio VAE of a checkpoint (`audio_vae/`): sound to latents and back, a DAC with a continuous bottleneck (spec/mova.md 3.11)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .checkpoint import Component, check_tensors, open_component, read_config
from .errors import CheckpointError, InputError
from .resampling import resample

DILATIONS = (1, 3, 9)  # of the three residual units of a stage
SOUND_BYTES = 2048  # peak per sample: eight float32 tensors of the last stage's 64 channels


@dataclass(frozen=True)
class AudioVAEConfig:
    """audio_vae/config.json; the defaults are the released values. `latent_dim` null means encoder_dim * 2 per stage."""

    encoder_dim: int = 128
    encoder_rates: tuple[int, ...] = (2, 3, 4, 5, 8)
    latent_dim: int | None = 128
    decoder_dim: int = 2048
    decoder_rates: tuple[int, ...] = (8, 5, 4, 3, 2)
    sample_rate: int = 48000
    continuous: bool = True

    def __post_init__(self) -> None:
        sizes = (self.encoder_dim, self.decoder_dim, self.sample_rate, self.latent_channels, *self.encoder_rates, *self.decoder_rates)
        if min(sizes) < 1 or math.prod(self.encoder_rates) != math.prod(self.decoder_rates) or self.decoder_dim >> len(self.decoder_rates) < 1:
            raise CheckpointError(
                f"audio_vae/config.json describes no audio VAE ({dataclasses.asdict(self)}): sizes must be positive and both rates have the same product."
            )
        if not self.continuous:
            raise CheckpointError("audio_vae/config.json says continuous: false (a codec with codebooks). MOVA needs the continuous audio VAE of its release.")

    @property
    def hop(self) -> int:
        """Samples per latent."""
        return math.prod(self.encoder_rates)

    @property
    def latent_channels(self) -> int:
        return self.encoder_dim * 2 ** len(self.encoder_rates) if self.latent_dim is None else self.latent_dim

    def latent_length(self, num_frames: int, fps: float) -> int:
        """Latents that cover a clip of `num_frames` pictures at `fps`."""
        if num_frames < 1 or not 0 < fps < math.inf:
            raise InputError(f"{num_frames} frames at {fps} fps have no length: give at least one frame and a positive frame rate.")
        samples = int(self.sample_rate * num_frames / fps)
        return (samples - 1) // self.hop + 1


class Snake(nn.Module):
    """x + sin(alpha x)^2 / alpha per channel, as the reference rounds it: the reciprocal in alpha's stored dtype, the rest in float32."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (self.alpha * x).sin_().square_().mul_((self.alpha + 1e-9).reciprocal()).add_(x)


class Chain(nn.Module):
    """Layers one after another, under the name the released file has for them."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class ResidualUnit(Chain):
    def __init__(self, channels: int, dilation: int) -> None:
        wide = nn.Conv1d(channels, channels, 7, dilation=dilation, padding=3 * dilation)
        super().__init__(Snake(channels), wide, Snake(channels), nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class EncoderStage(Chain):
    """[B, C, L] -> [B, 2C, L / stride]."""

    def __init__(self, channels: int, stride: int) -> None:
        down = nn.Conv1d(channels, 2 * channels, 2 * stride, stride=stride, padding=math.ceil(stride / 2))
        super().__init__(*(ResidualUnit(channels, dilation) for dilation in DILATIONS), Snake(channels), down)


class DecoderStage(Chain):
    """[B, C, L] -> [B, C/2, L * stride]."""

    def __init__(self, channels: int, stride: int) -> None:
        half = channels // 2
        up = nn.ConvTranspose1d(channels, half, 2 * stride, stride=stride, padding=math.ceil(stride / 2), output_padding=stride % 2)
        super().__init__(Snake(channels), up, *(ResidualUnit(half, dilation) for dilation in DILATIONS))


class Encoder(Chain):
    """[B, 1, hop * Ta] -> [B, Ca, Ta]."""

    def __init__(self, config: AudioVAEConfig) -> None:
        widths = [config.encoder_dim << stage for stage in range(len(config.encoder_rates) + 1)]
        stages = [EncoderStage(width, rate) for width, rate in zip(widths, config.encoder_rates, strict=False)]
        last = nn.Conv1d(widths[-1], config.latent_channels, 3, padding=1)
        super().__init__(nn.Conv1d(1, widths[0], 7, padding=3), *stages, Snake(widths[-1]), last)


class Decoder(nn.Module):
    """[B, Ca, Ta] -> [B, 1, hop * Ta]."""

    def __init__(self, config: AudioVAEConfig) -> None:
        super().__init__()
        widths = [config.decoder_dim >> stage for stage in range(len(config.decoder_rates) + 1)]
        stages = [DecoderStage(width, rate) for width, rate in zip(widths, config.decoder_rates, strict=False)]
        first, last = nn.Conv1d(config.latent_channels, widths[0], 7, padding=3), nn.Conv1d(widths[-1], 1, 7, padding=3)
        self.model = nn.Sequential(first, *stages, Snake(widths[-1]), last, nn.Tanh())

    def forward(self, latents: Tensor) -> Tensor:
        return self.model(latents)


class Posterior(NamedTuple):
    """What the encoder says about the latents: mean and log variance, both [B, Ca, Ta]."""

    mean: Tensor
    logvar: Tensor

    @property
    def kl(self) -> Tensor:
        """Divergence from the unit normal, [B]."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar).mean(dim=(1, 2))


class DAC(nn.Module):
    """The network; parameter names are those of the released file (224 tensors at release size)."""

    def __init__(self, config: AudioVAEConfig) -> None:
        super().__init__()
        channels = config.latent_channels
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv1d(channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv1d(channels, channels, 1)
        self.decoder = Decoder(config)

    def encode(self, waveform: Tensor) -> Posterior:
        """[B, 1, hop * Ta] -> mean and log variance [B, Ca, Ta]."""
        mean, logvar = self.quant_conv(self.encoder(waveform)).chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, latents: Tensor) -> Tensor:
        """[B, Ca, Ta] -> [B, 1, hop * Ta] in -1..1."""
        return self.decoder(self.post_quant_conv(latents))


class AudioVAE:
    """Sound <-> audio latents. Computes in float32; latents are raw, without any normalisation."""

    def __init__(self, config: AudioVAEConfig, weights: dict[str, Tensor], device: str | torch.device = "cpu") -> None:
        self.config = config
        self.hop = config.hop
        self.sample_rate = config.sample_rate
        self.latent_channels = config.latent_channels
        self.weights = weights  # on the CPU, mapped where possible: moving back there costs no copy
        with torch.device("meta"):
            self.model = DAC(config).requires_grad_(False)
        self.to(device)

    def to(self, device: str | torch.device) -> AudioVAE:
        """Moves the weights; inputs follow, outputs stay there."""
        placed = {key: tensor.to(device) for key, tensor in self.weights.items()}
        self.model.load_state_dict(placed, assign=True)
        self.device = torch.device(device)
        return self

    def peak_bytes(self, samples: int) -> int:
        """Memory to have free on the device before so many samples are encoded or decoded."""
        return samples * SOUND_BYTES + sum(weight.nbytes for weight in self.weights.values())

    def encode(self, waveform: Tensor, sample_rate: int) -> Tensor:
        """Waveform [B, C, S] in -1..1 at any rate -> latents [B, Ca, ceil(S' / hop)], the posterior mean. InputError for what is no sound."""
        return self.posterior(waveform, sample_rate).mean

    @torch.no_grad()
    def posterior(self, waveform: Tensor, sample_rate: int) -> Posterior:
        """As `encode`, with the log variance. Channels are averaged, then resampled, then zero-padded right to whole latents."""
        check_sound(waveform, "waveform", "[batch, channels, samples]")
        mono = waveform.to(self.device, torch.float32).mean(dim=1, keepdim=True)  # [B, 1, S]
        mono = resample(mono, sample_rate, self.sample_rate)
        return self.model.encode(nn.functional.pad(mono, (0, -mono.shape[-1] % self.hop)))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, Ca, Ta] -> waveform [B, 1, hop * Ta] at `sample_rate`, float32, untrimmed."""
        check_sound(latents, "audio latents", f"[batch, {self.latent_channels}, length]")
        if latents.shape[1] != self.latent_channels:
            raise InputError(
                f"The audio latents have {latents.shape[1]} channels, but this audio VAE has {self.latent_channels}: they come from another model."
            )
        return self.model.decode(latents.to(self.device, torch.float32))


def load_audio_vae(folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> AudioVAE:
    """Opens `folder/audio_vae`. dtype rounds the weights (None = as stored); the computation is float32 in any case.

    Weights may be fused (.weight) or weight-normed (.weight_g, .weight_v). CheckpointError when the folder does not hold a MOVA audio VAE.
    """
    component = open_component(folder, "audio_vae")
    config = read_config(AudioVAEConfig, component.config, str(component.folder / "config.json"))
    with torch.device("meta"):
        model = DAC(config)
    return AudioVAE(config, read_weights(component, model, dtype), device)


def read_weights(component: Component, model: DAC, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The state dict of `model` from its file: convolutions float32, snake alphas as stored, both after rounding to `dtype`."""
    check_tensors(component, stored_shapes(model, weight_normed=any(key.endswith(".weight_g") for key in component.index)))
    weights = component.tensors()
    for scale in [key for key in weights if key.endswith(".weight_g")]:
        name = scale.removesuffix("_g")
        weights[name] = fuse_weight_norm(weights.pop(scale), weights.pop(f"{name}_v"))
    if dtype is not None:
        weights = {key: tensor.to(dtype) for key, tensor in weights.items()}
    return {key: tensor if key.endswith(".alpha") else tensor.float() for key, tensor in weights.items()}


def stored_shapes(model: DAC, weight_normed: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the file. The convolutions around the bottleneck never have a weight norm."""
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    if weight_normed:
        for key in [key for key in shapes if key.startswith(("encoder.", "decoder.")) and key.endswith(".weight")]:
            shape = shapes.pop(key)
            shapes |= {f"{key}_g": (shape[0], 1, 1), f"{key}_v": shape}
    return shapes


def fuse_weight_norm(scale: Tensor, direction: Tensor) -> Tensor:
    """g * v / |v|, the norm over all but the first dimension; a stored dtype below float32 is kept."""
    norm = direction.float().norm(dim=(1, 2), keepdim=True)
    return (direction.float() * (scale.float() / norm)).to(direction.dtype)


def check_sound(tensor: Tensor, name: str, layout: str) -> None:
    """InputError unless the tensor is a non-empty, finite float tensor of three dimensions."""
    if not isinstance(tensor, Tensor) or tensor.dim() != 3 or not tensor.is_floating_point():
        given = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise InputError(f"The {name} must be a float tensor {layout}, given was {given}.")
    if tensor.numel() == 0:
        raise InputError(f"The {name} is empty ({list(tensor.shape)}): give at least one sample of one channel.")
    if not torch.isfinite(tensor).all():
        raise InputError(f"The {name} contains NaN or infinite values: the sound is damaged before it reaches the audio VAE.")
