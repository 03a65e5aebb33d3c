"""MOVA's joint forward and guided step as plainly as the formulas read (spec/mova.md sections 3 and 4): what the benchmarks measure against, and a second opinion on mova/.

Nothing is cached but the position tables of a shape, nothing is fused, batched, shortened or done in place: each guidance branch is a full pass that
projects all text rows again. The bfloat16 rounding is the reference's eager one (section 0, item 3). Covers what the release uses: the "full" bridge
without pooling, the "dac" audio RoPE, no image tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

Config = dict[str, Any]
Rotation = Callable[[Tensor], Tensor]  # turns heads [B, L, H, d] by their positions


# Positions (3.5, 3.7.3)
def pair_table(places: Sequence[Tensor], dims: Sequence[int]) -> Tensor:
    """Complex128 [L, 1, sum(dims)/2]: for each axis e^(i * place * 10000^(-2k/dim)), beside each other, the same for all heads."""
    angles = [torch.outer(place.double(), 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)) for place, dim in zip(places, dims, strict=True)]
    return torch.polar(torch.ones(1, dtype=torch.float64), torch.cat(angles, dim=1))[:, None]


def video_table(grid: tuple[int, int, int], head_dim: int) -> Tensor:
    side = 2 * (head_dim // 6)
    return pair_table(torch.cartesian_prod(*(torch.arange(size) for size in grid)).unbind(1), (head_dim - 2 * side, side, side))


def rotate_pairs(x: Tensor, table: Tensor) -> Tensor:
    """Neighbouring values as complex numbers, turned in complex128 and rounded once."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))  # [B, L, H, d/2]
    return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)


def bridge_table(positions: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [L, 1, head_dim] of the bridge: angles in float32, rounded to `dtype`."""
    steps = 1.0 / 10000.0 ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(positions, steps)
    angles = torch.cat([angles, angles], dim=1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate_halves(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = table
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def video_positions(frames: int, fps: float, audio_fps: float, first_frame_bias: bool) -> Tensor:
    """Latent frames in units of audio latents, float32 [T]."""
    index = torch.arange(frames, dtype=torch.float32)
    if not first_frame_bias:
        return index * (audio_fps / (fps / 4))
    return torch.where(index == 0, 0.0, 1 / fps + (index - 1) * 4 / fps) * audio_fps


# Layers (3.1, 3.6, 3.7.2)
class Attention(nn.Module):
    """Queries from one stream, keys and values from the same or another; q and k normed over the full width."""

    def __init__(self, dim: int, source_dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(dim, dim), nn.Linear(source_dim, dim), nn.Linear(source_dim, dim), nn.Linear(dim, dim)
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps=eps), nn.RMSNorm(dim, eps=eps)
        self.heads = heads

    def forward(self, x: Tensor, source: Tensor, turn_q: Rotation | None = None, turn_k: Rotation | None = None) -> Tensor:
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(source)), self.v(source)
        q, k, v = (each.unflatten(-1, (self.heads, -1)) for each in (q, k, v))  # [B, L, H, d]
        if turn_q and turn_k:
            q, k = turn_q(q), turn_k(k)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.o(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        dim, heads, eps = config["dim"], config["num_heads"], config["eps"]
        self.self_attn, self.cross_attn = Attention(dim, dim, heads, eps), Attention(dim, dim, heads, eps)
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=eps, elementwise_affine=False) for _ in range(2))
        self.norm3 = nn.LayerNorm(dim, eps=eps)
        self.ffn = nn.Sequential(nn.Linear(dim, config["ffn_dim"]), nn.GELU("tanh"), nn.Linear(config["ffn_dim"], dim))
        self.modulation = nn.Parameter(torch.empty(1, 6, dim))

    def forward(self, x: Tensor, context: Tensor, t_mod: Tensor, turn: Rotation) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + t_mod).chunk(6, dim=1)  # each [B, 1, D]
        h = self.norm1(x) * (1 + scale1) + shift1
        x = x + gate1 * self.self_attn(h, h, turn, turn)
        x = x + self.cross_attn(self.norm3(x), context)
        return x + gate2 * self.ffn(self.norm2(x) * (1 + scale2) + shift2)


class Head(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config["dim"], eps=config["eps"], elementwise_affine=False)
        self.head = nn.Linear(config["dim"], config["out_dim"] * math.prod(config["patch_size"]))
        self.modulation = nn.Parameter(torch.empty(1, 2, config["dim"]))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        shift, scale = (self.modulation + t[:, None]).chunk(2, dim=1)  # each [B, 1, D]
        return self.head(self.norm(x) * (1 + scale) + shift)


class Tower(nn.Module):
    """One transformer, video (three patch sizes) or audio (one), with the released state-dict names (2.4)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        dim, patch = config["dim"], tuple(config["patch_size"])
        convolution = nn.Conv3d if len(patch) == 3 else nn.Conv1d
        self.patch_embedding = convolution(config["in_dim"], dim, kernel_size=patch, stride=patch)
        self.text_embedding = nn.Sequential(nn.Linear(config["text_dim"], dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(config["freq_dim"], dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config["num_layers"]))
        self.head = Head(config)
        self.freq_dim, self.head_dim = config["freq_dim"], dim // config["num_heads"]

    def embed_time(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """t [B, D] and t_mod [B, 6, D] in float32, whatever the weights are stored in."""
        first, second, last = self.time_embedding[0], self.time_embedding[2], self.time_projection[1]
        t = float32_linear(second, F.silu(float32_linear(first, sinusoid(self.freq_dim, timestep))))
        return t, float32_linear(last, F.silu(t)).unflatten(1, (6, -1))

    def patchify(self, latents: Tensor) -> Tensor:
        return self.patch_embedding(latents).flatten(2).transpose(1, 2).contiguous()  # [B, L, D]; a transposed view picks other bfloat16 kernels


def float32_linear(layer: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.float(), layer.bias.float())


def sinusoid(dim: int, timestep: Tensor) -> Tensor:
    """cos half, then sin half, [B, dim] in float32 from float64 (3.2)."""
    angles = torch.outer(timestep.double(), 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2)))
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


def unpatchify(tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
    b, (t, h, w) = len(tokens), grid  # a token holds (row, column, channel), channel fastest
    return tokens.view(b, t, h, w, 2, 2, -1).permute(0, 6, 1, 2, 4, 3, 5).reshape(b, -1, t, 2 * h, 2 * w)


class Conditioner(nn.Module):
    """One direction of the bridge at one layer: x takes from y."""

    def __init__(self, dim: int, source_dim: int, head_dim: int) -> None:
        super().__init__()
        self.y_norm = nn.LayerNorm(source_dim, eps=1e-6)
        self.inner = Attention(dim, source_dim, dim // head_dim, 1e-6)

    def forward(self, x: Tensor, y: Tensor, turn_x: Rotation | None, turn_y: Rotation | None) -> Tensor:
        return self.inner(x, self.y_norm(y), turn_x, turn_y)


class Bridge(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        video, audio, head_dim = config["visual_hidden_dim"], config["audio_hidden_dim"], config["head_dim"]
        layers = range(min(config["visual_layers"], config["audio_layers"]))
        self.audio_to_video_conditioners = nn.ModuleList(Conditioner(video, audio, head_dim) for _ in layers)
        self.video_to_audio_conditioners = nn.ModuleList(Conditioner(audio, video, head_dim) for _ in layers)
        self.config, self.scale = config, 1.0

    def rotations(self, grid: tuple[int, int, int], length: int, fps: float, dtype: torch.dtype) -> tuple[Rotation | None, Rotation | None]:
        if not self.config["apply_cross_rope"]:
            return None, None
        places = video_positions(grid[0], fps, self.config["audio_fps"], self.config["apply_first_frame_bias_in_rope"]).repeat_interleave(grid[1] * grid[2])
        video = bridge_table(places, self.config["head_dim"], dtype)
        audio = bridge_table(torch.arange(length, dtype=torch.float32), self.config["head_dim"], dtype)
        return lambda x: rotate_halves(x, video), lambda x: rotate_halves(x, audio)


# The joint forward (3.9) and the guided step (4.3, 4.6)
class PlainMova(nn.Module):
    def __init__(self, configs: dict[str, Config]) -> None:
        """configs: folder name -> the values of its config.json."""
        super().__init__()
        self.video_dit, self.video_dit_2, self.audio_dit = (Tower(configs[name]) for name in ("video_dit", "video_dit_2", "audio_dit"))
        self.dual_tower_bridge = Bridge(configs["dual_tower_bridge"])
        self.tables: dict[tuple, tuple] = {}  # (grid, length, fps, dtype) -> the four rotations

    def rotations(self, grid: tuple[int, int, int], length: int, fps: float, dtype: torch.dtype) -> tuple:
        key = (grid, length, fps, dtype, *self.dual_tower_bridge.config.values())
        if key not in self.tables:
            video, audio = video_table(grid, self.video_dit.head_dim), pair_table([torch.arange(length)], [self.audio_dit.head_dim])
            own = (lambda x: rotate_pairs(x, video), lambda x: rotate_pairs(x, audio))
            self.tables[key] = (*own, *self.dual_tower_bridge.rotations(grid, length, fps, dtype))
        return self.tables[key]

    def forward(self, latents: Tensor, audio_latents: Tensor, context: Tensor, times: Tensor, expert: str, fps: float = 24.0) -> tuple[Tensor, Tensor]:
        """latents [B,36,T,h,w], audio_latents [B,Ca,Ta], context [B,512,text_dim], times [2, 1 or B] (video, audio) -> velocities in the weights' dtype."""
        tower, audio_tower, bridge = getattr(self, expert), self.audio_dit, self.dual_tower_bridge
        dtype = tower.head.modulation.dtype
        (t, t_mod), (audio_t, audio_t_mod) = tower.embed_time(times[0]), audio_tower.embed_time(times[1])
        t, t_mod, audio_t, audio_t_mod = (each.to(dtype) for each in (t, t_mod, audio_t, audio_t_mod))
        text, audio_text = tower.text_embedding(context.to(dtype)), audio_tower.text_embedding(context.to(dtype))
        grid = (latents.shape[2], latents.shape[3] // 2, latents.shape[4] // 2)
        x, a = tower.patchify(latents.to(dtype)), audio_tower.patchify(audio_latents.to(dtype))  # [B, Lv, D], [B, Ta, Da]
        turn, audio_turn, bridge_turn, bridge_audio_turn = self.rotations(grid, a.shape[1], fps, dtype)
        for i, block in enumerate(tower.blocks):
            if i < len(audio_tower.blocks):  # both directions read the states from before this layer
                to_video, to_audio = bridge.audio_to_video_conditioners[i], bridge.video_to_audio_conditioners[i]
                x, a = x + bridge.scale * to_video(x, a, bridge_turn, bridge_audio_turn), a + bridge.scale * to_audio(a, x, bridge_audio_turn, bridge_turn)
                a = audio_tower.blocks[i](a, audio_text, audio_t_mod, audio_turn)
            x = block(x, text, t_mod, turn)
        return unpatchify(tower.head(x, t), grid), audio_tower.head(a, audio_t).transpose(1, 2)


def load_plain(folder: str | Path) -> PlainMova:
    """A released-layout folder in its stored dtype."""
    names = ("video_dit", "video_dit_2", "audio_dit", "dual_tower_bridge")
    with torch.device("meta"):
        model = PlainMova({name: json.loads((Path(folder) / name / "config.json").read_text(encoding="utf-8")) for name in names})
    for name in names:
        model.get_submodule(name).load_state_dict(load_file(Path(folder) / name / "diffusion_pytorch_model.safetensors"), assign=True)
    return model.requires_grad_(False)


def sigma_table(steps: int, config: Config) -> Tensor:
    """The shifted sigmas of `steps` steps with extra_one_step, float32; each times 1000 is its timestep (4.1)."""
    base = torch.linspace(config.get("sigma_max", 1.0), config.get("sigma_min", 0.003 / 1.002), steps + 1)[:-1]
    return config["shift"] * base / (1 + (config["shift"] - 1) * base)


def nearest_sigma(timestep: Tensor, train: Tensor) -> Tensor:
    return train[(train * 1000 - timestep).abs().argmin()]  # the reference steps on its 1000-entry train grid (4.3)


def guided_velocity(
    model: PlainMova, video: Tensor, audio: Tensor, condition: Tensor, contexts: tuple[Tensor, Tensor], timestep: Tensor, cfg: float, expert: str
) -> tuple[Tensor, Tensor]:
    """Two full passes (positive, then negative), then guidance in float32; timestep is a 0-d tensor, the same for both streams."""
    latents, times = torch.cat([video, condition], dim=1), timestep.expand(2, 1)
    (video_pos, audio_pos), (video_neg, audio_neg) = ((v.float() for v in model(latents, audio, context, times, expert)) for context in contexts)
    return video_neg + cfg * (video_pos - video_neg), audio_neg + cfg * (audio_pos - audio_neg)
