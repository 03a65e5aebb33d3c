"""The bridge between the towers: in every shared layer the picture hears the sound and the sound sees the picture (spec/mova.md 3.7)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attention
from .errors import CheckpointError
from .layers import ROPE_BASE, map_rows, update_rows
from .towers import Grid

TEMPORAL_STRIDE = 4  # pixel frames per latent frame after the first (the video VAE)
ADALN_EPS = 1e-5
NORM_EPS = 1e-6

# Which of the first min(visual, audio) layers talk to each other.
STRATEGIES = {
    "full": lambda n: range(n),
    "shallow_focus": lambda n: range(min(10, n // 3)),
    "distributed": lambda n: range(0, n, 3),
    "progressive": lambda n: [i for i in range(n) if i < 8 or (i - 8) % 3 == 0],
    "custom": lambda n: [i for i in (0, 2, 4, 6, 8, 12, 16, 20) if i < n],
}


@dataclass(frozen=True)
class BridgeConfig:
    """config.json of dual_tower_bridge; the defaults are the released values."""

    visual_layers: int = 40
    audio_layers: int = 30
    visual_hidden_dim: int = 5120
    audio_hidden_dim: int = 1536
    audio_fps: float = 50.0
    head_dim: int = 128
    interaction_strategy: str = "full"
    apply_cross_rope: bool = True
    apply_first_frame_bias_in_rope: bool = False
    trainable_condition_scale: bool = False
    pooled_adaln: bool = False

    def __post_init__(self) -> None:
        if self.interaction_strategy not in STRATEGIES:
            raise CheckpointError(f"dual_tower_bridge: interaction_strategy is {self.interaction_strategy!r}; known are {', '.join(STRATEGIES)}.")
        if self.head_dim < 2 or self.head_dim % 2 or self.visual_hidden_dim % self.head_dim or self.audio_hidden_dim % self.head_dim:
            raise CheckpointError(f"dual_tower_bridge: head_dim {self.head_dim} must be even and divide {self.visual_hidden_dim} and {self.audio_hidden_dim}.")

    @property
    def layers(self) -> list[int]:
        return list(STRATEGIES[self.interaction_strategy](min(self.visual_layers, self.audio_layers)))


class AlignedRope(NamedTuple):
    """Rotary tables on the common clock of both streams: (cos, sin), each [L, 1, head_dim]."""

    video: tuple[Tensor, Tensor]
    audio: tuple[Tensor, Tensor]


class Attend(nn.Module):
    """Cross-attention weights; queries of width `dim`, keys and values read from width `other`."""

    def __init__(self, dim: int, other: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(dim, dim), nn.Linear(other, dim), nn.Linear(other, dim), nn.Linear(dim, dim)
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps=NORM_EPS), nn.RMSNorm(dim, eps=NORM_EPS)


class FramePooling(nn.Module):
    """One vector per latent frame: a learned probe attends over the tokens of the frame."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 1, dim))
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.layernorm = nn.LayerNorm(dim, eps=NORM_EPS)

    def forward(self, video: Tensor, grid: Grid) -> Tensor:
        frames = video.unflatten(1, (grid[0], -1)).flatten(0, 1)  # [B * T, h2 * w2, D]
        pooled, _ = self.attention(self.probe.expand(len(frames), -1, -1), frames, frames, need_weights=False)
        return self.layernorm(pooled).view(len(video), grid[0], -1)  # [B, T, D]


class AdaLN(nn.Module):
    """Norm shifted and scaled by another stream."""

    def __init__(self, dim: int, other: int) -> None:
        super().__init__()
        self.linear = nn.Linear(other, 2 * dim)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        scale, shift = self.linear(F.silu(temb)).chunk(2, dim=-1)
        return F.layer_norm(x, x.shape[-1:], eps=ADALN_EPS) * (1 + scale) + shift


class Conditioner(nn.Module):
    """One direction in one layer: x reads y and is moved by what it finds."""

    def __init__(self, dim: int, other: int, config: BridgeConfig, pooled: bool = False) -> None:
        super().__init__()
        self.heads = dim // config.head_dim
        self.y_norm = nn.LayerNorm(other, eps=NORM_EPS)
        self.inner = Attend(dim, other)
        if config.trainable_condition_scale:
            self.condition_scale = nn.Parameter(torch.empty(1))
        if pooled:
            self.per_frame_pooling, self.adaln = FramePooling(other, self.heads), AdaLN(dim, other)

    def forward(self, x: Tensor, y: Tensor, ropes: tuple | None, scale: float | Tensor | None = None, grid: Grid | None = None) -> Tensor:
        """x [B, Lx, D], which is given up, y [B, Ly, Dy]; ropes of (x, y) or None; scale None = the trained one, else 1; grid for frame pooling."""
        k, v = map_rows(y, lambda part, rows: self.keys(part, ropes and at(ropes[1], rows)))  # [B, Ly, D]
        asking = self.normalise(x, y, grid)
        if scale is None:
            scale = getattr(self, "condition_scale", 1.0)

        def hear(part: Tensor, rows: slice) -> Tensor:
            q = self.inner.norm_q(self.inner.q(asking[:, rows]))
            q = q if ropes is None else rotate_halves(q, at(ropes[0], rows), self.heads)
            return self.inner.o(attention(q, k, v, self.heads)).mul_(scale).add_(part)

        return update_rows(x, hear)

    def keys(self, y: Tensor, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        seen = self.y_norm(y)
        k = self.inner.norm_k(self.inner.k(seen))
        return k if rope is None else rotate_halves(k, rope, self.heads), self.inner.v(seen)

    def normalise(self, x: Tensor, y: Tensor, grid: Grid | None) -> Tensor:
        """x as the query reads it: as it is, or (pooled AdaLN) normalised by the frames of y at the same time."""
        if not hasattr(self, "adaln"):
            return x
        frames = self.per_frame_pooling(y, grid)
        return self.adaln(x, F.interpolate(frames.transpose(1, 2), size=x.shape[1], mode="linear").transpose(1, 2))


class Bridge(nn.Module):
    """Both directions of every layer that talks."""

    def __init__(self, config: BridgeConfig) -> None:
        super().__init__()
        self.config = config
        video, audio = config.visual_hidden_dim, config.audio_hidden_dim
        self.audio_to_video_conditioners = nn.ModuleDict({str(i): Conditioner(video, audio, config) for i in config.layers})
        self.video_to_audio_conditioners = nn.ModuleDict({str(i): Conditioner(audio, video, config, config.pooled_adaln) for i in config.layers})

    def rope(self, grid: Grid, audio_length: int, fps: float, dtype: torch.dtype) -> AlignedRope | None:
        """Positions in audio latents: token j of the sound at j, latent frame i of the picture at its time * audio_fps."""
        config = self.config
        if not config.apply_cross_rope:
            return None
        frame = torch.arange(grid[0], dtype=torch.float32)
        position = frame * (config.audio_fps / (fps / TEMPORAL_STRIDE))
        if config.apply_first_frame_bias_in_rope:  # the first latent frame is one pixel frame long, the others four
            position = torch.where(frame > 0, (1 / fps + (frame - 1) * (TEMPORAL_STRIDE / fps)) * config.audio_fps, 0.0)
        video = position.repeat_interleave(grid[1] * grid[2])
        return AlignedRope(half_table(video, config.head_dim, dtype), half_table(torch.arange(audio_length, dtype=torch.float32), config.head_dim, dtype))


def at(rope: tuple[Tensor, Tensor], rows: slice) -> tuple[Tensor, Tensor]:
    return rope[0][rows], rope[1][rows]


def half_table(position: Tensor, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cos, sin) [L, 1, dim] for the split-halves rotation; angles in float32, the tables in `dtype`."""
    inverse = 1.0 / ROPE_BASE ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    angles = torch.outer(position, inverse).repeat(1, 2).unsqueeze(1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate_halves(x: Tensor, rope: tuple[Tensor, Tensor], heads: int) -> Tensor:
    """Rotates (k, k + d/2) of every head of [B, L, heads * d], in the dtype of x."""
    x, (cos, sin) = x.unflatten(-1, (heads, -1)), rope
    half = x.shape[-1] // 2
    rotated = x * cos
    rotated[..., :half].sub_(x[..., half:] * sin[..., :half])
    rotated[..., half:].add_(x[..., :half] * sin[..., half:])
    return rotated.flatten(2)
