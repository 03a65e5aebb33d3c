"""The video and the audio tower: tokens in, velocity out (spec/mova.md 3.2 to 3.6, 3.8)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import CheckpointError
from .layers import Block, collapse_padding, frequencies, map_rows, rope_table, shifted_norm, sinusoid

Grid = tuple[int, int, int]  # tokens along time, rows, columns

# Switches of the Wan family that MOVA leaves off; weights trained with them on need parts that are not built here.
UNUSED_SWITCHES = (
    "has_image_input",
    "has_image_pos_emb",
    "has_ref_conv",
    "add_control_adapter",
    "seperated_timestep",
    "fuse_vae_embedding_in_latents",
    "require_clip_embedding",
)
OOBLECK_STEP = 4 / (44100 / 2048)  # position units per latent of the legacy audio VAE


@dataclass(frozen=True)
class TowerConfig:
    """config.json of video_dit and video_dit_2; the defaults are the released values (spec/mova.md 2.3)."""

    dim: int = 5120
    in_dim: int = 36
    ffn_dim: int = 13824
    out_dim: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    eps: float = 1e-6
    patch_size: tuple[int, ...] = (1, 2, 2)
    num_heads: int = 40
    num_layers: int = 40
    has_image_input: bool = False
    has_image_pos_emb: bool = False
    has_ref_conv: bool = False
    add_control_adapter: bool = False
    seperated_timestep: bool = False
    fuse_vae_embedding_in_latents: bool = False
    require_clip_embedding: bool = False

    def __post_init__(self) -> None:
        sizes = (self.dim, self.in_dim, self.ffn_dim, self.out_dim, self.text_dim, self.freq_dim, self.num_heads, self.num_layers, *self.patch_size)
        if min(sizes) < 1 or self.freq_dim % 2 or self.dim % (2 * self.num_heads):
            raise CheckpointError(
                f"config.json describes no tower: dim {self.dim} must be an even multiple of num_heads {self.num_heads}, and every size at least 1."
            )
        if on := [name for name in UNUSED_SWITCHES if getattr(self, name)]:
            raise CheckpointError(f"config.json switches on {', '.join(on)}: MOVA has none of them; this checkpoint is of another model of the Wan family.")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


@dataclass(frozen=True)
class AudioTowerConfig(TowerConfig):
    """config.json of audio_dit."""

    dim: int = 1536
    in_dim: int = 128
    ffn_dim: int = 8960
    out_dim: int = 128
    patch_size: tuple[int, ...] = (1,)
    num_heads: int = 12
    num_layers: int = 30
    vae_type: str = "dac"


class Head(nn.Module):
    """Modulated norm and the projection to velocity."""

    def __init__(self, dim: int, out: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.modulation = nn.Parameter(torch.empty(1, 2, dim))
        self.head = nn.Linear(dim, out)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x [B, L, D], t [B, D] -> [B, L, out]. Each sample reads its own t (the reference mixes them in a batch)."""
        shift, scale = (self.modulation + t.unsqueeze(1)).chunk(2, dim=1)  # [B, 1, D]
        (out,) = map_rows(x, lambda part, rows: (self.head(shifted_norm(part, shift, scale, self.eps)),))
        return out


class Tower(nn.Module):
    """What both towers share: time, prompt, blocks, head."""

    patch_embedding: nn.Module

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        dim = config.dim
        self.config = config
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(dim, config.ffn_dim, config.num_heads, config.eps) for _ in range(config.num_layers))
        patch_volume = torch.Size(config.patch_size).numel()
        self.head = Head(dim, config.out_dim * patch_volume, config.eps)

    def time(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps [...] 0..1000 -> t [..., D] and t_mod [..., 1, 6, D] in float32, with the weights as stored (spec 1.4)."""
        first, second, project = self.time_embedding[0], self.time_embedding[2], self.time_projection[1]
        t = linear_float32(F.silu(linear_float32(sinusoid(timestep, self.config.freq_dim), first)), second)
        return t, linear_float32(F.silu(t), project).unflatten(-1, (1, 6, -1))

    def read_prompt(self, context: Tensor) -> tuple[Tensor, Tensor | None]:
        """Text embeddings [B, L, text_dim] -> tokens of this tower [B, n, D] with padding collapsed, and its logit bias."""
        context, bias = collapse_padding(context)
        return self.text_embedding(context), bias


class VideoTower(Tower):
    """One video expert: latents [B, in_dim, T, h, w] <-> tokens [B, T*h2*w2, D]."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__(config)
        self.patch_embedding = nn.Conv3d(config.in_dim, config.dim, kernel_size=config.patch_size, stride=config.patch_size)

    def embed(self, latents: Tensor) -> tuple[Tensor, Grid]:
        volume = self.patch_embedding(latents)  # [B, D, T, h2, w2]
        return volume.flatten(2).transpose(1, 2).contiguous(), tuple(volume.shape[2:])

    def predict(self, x: Tensor, t: Tensor, grid: Grid) -> Tensor:
        """Tokens -> velocity [B, out_dim, T, h, w]; inside a patch the channel varies fastest (spec 3.4)."""
        patches = self.head(x, t).unflatten(-1, (*self.config.patch_size, -1)).unflatten(1, grid)  # [B, T, h2, w2, pf, ph, pw, C]
        return patches.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def rope(self, grid: Grid) -> Tensor:
        """A share of every head for each axis; each share has its own exponent (spec 3.5)."""
        side = 2 * (self.config.head_dim // 6)
        shares = (self.config.head_dim - 2 * side, side, side)
        angles = [torch.arange(n, dtype=torch.float64)[:, None] * frequencies(share) for n, share in zip(grid, shares, strict=True)]
        frame, row, column = (angle.view([-1 if i == axis else 1 for i in range(3)] + [angle.shape[-1]]) for axis, angle in enumerate(angles))
        return rope_table(torch.cat([part.expand(*grid, -1) for part in (frame, row, column)], dim=-1).flatten(0, 2))


class AudioTower(Tower):
    """The sound: latents [B, in_dim, Ta] <-> tokens [B, Ta, D]."""

    config: AudioTowerConfig

    def __init__(self, config: AudioTowerConfig) -> None:
        super().__init__(config)
        self.patch_embedding = nn.Conv1d(config.in_dim, config.dim, kernel_size=config.patch_size, stride=config.patch_size)

    def embed(self, latents: Tensor) -> Tensor:
        return self.patch_embedding(latents).transpose(1, 2).contiguous()

    def predict(self, x: Tensor, t: Tensor) -> Tensor:
        return self.head(x, t).transpose(1, 2)  # [B, out_dim, Ta]

    def rope(self, length: int) -> Tensor:
        positions = torch.arange(length, dtype=torch.float64)[:, None]
        if self.config.vae_type != "oobleck":
            return rope_table(positions * frequencies(self.config.head_dim))
        rotating = frequencies(self.config.head_dim - 4 * (self.config.head_dim // 6))  # the legacy codec turns only the frame share
        angles = torch.zeros(length, self.config.head_dim // 2, dtype=torch.float64)
        angles[:, : len(rotating)] = positions * OOBLECK_STEP * rotating
        return rope_table(angles)


def linear_float32(x: Tensor, layer: nn.Linear) -> Tensor:
    """The layer in float32, whatever its weights are stored in."""
    return F.linear(x, layer.weight.float(), layer.bias.float())
