"""What both towers are made of: attention, rotary positions, and the DiT block (spec/mova.md 3.1, 3.5, 3.6).

Layouts: tokens [B, L, D]; queries, keys and values [B, L, heads * head_dim]; a rotary table is e^(i angle), complex64
[L, 1, head_dim / 2]. The block is cut into pre / post / rest so that joint attention can sit between its parts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROPE_BASE = 10000.0
IMAGE_TOKENS = 257  # CLIP tokens at the head of the context, where a block has image attention


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(head_dim) + bias) v over [B, L, heads * head_dim]; bias broadcasts to [B, heads, Lq, Lk]."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # [B, H, L, d]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)  # [B, Lq, H * d]


def frequencies(dim: int) -> Tensor:
    """Rotary frequencies 10000^(-2k/dim) for k < dim/2, float64 [dim / 2]."""
    return ROPE_BASE ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def rope_table(angles: Tensor) -> Tensor:
    """e^(i angle), complex64 [L, 1, head_dim / 2], of float64 angles [L, head_dim / 2]."""
    return torch.complex(angles.cos().float(), angles.sin().float()).unsqueeze(1)


def rotate_pairs(x: Tensor, rope: Tensor, heads: int) -> Tensor:
    """Rotates the interleaved pairs (2k, 2k+1) of every head of [B, L, heads * head_dim]: in float32, rounded once."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (heads, -1, 2)))  # [B, L, H, d / 2]
    return torch.view_as_real(pairs * rope).flatten(2).to(x.dtype)  # [B, L, H * d]


def sinusoid(timestep: Tensor, dim: int) -> Tensor:
    """Time embedding [..., dim] float32 of timesteps 0..1000 [...]: cosines first, computed in float64 (spec 3.2)."""
    angles = timestep.double().unsqueeze(-1) * frequencies(dim).to(timestep.device)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float()


class TextKeys(NamedTuple):
    """A prompt as the cross-attention of one layer reads it: computed once per prompt, expert and layer."""

    k: Tensor  # [B, n, D]
    v: Tensor  # [B, n, D]
    bias: Tensor | None  # [1, 1, 1, n] added to the logits
    image: tuple[Tensor, Tensor] | None = None  # keys and values of image tokens


def collapse_padding(context: Tensor) -> tuple[Tensor, Tensor | None]:
    """Keeps two of the equal rows that pad a context [B, L, C], weighed by their logit as all of them: the softmax is the same.

    Exact up to rounding for any context whose last rows are equal (spec/performance.md 4.1). Returns (context [B, n, C], bias or None).
    """
    differs = (context != context[:, -1:]).any(dim=-1).any(dim=0).nonzero()  # rows that some sample needs
    real = int(differs[-1]) + 1 if len(differs) else 0
    padding = context.shape[1] - real
    if padding < 3:
        return context, None
    bias = context.new_zeros(1, 1, 1, real + 2)
    bias[..., real] = math.log(padding) * (1 - 2**-8)
    # A bfloat16 logit cannot say log(490); the second row carries what the first one lacks.
    bias[..., real + 1] = math.log(padding - math.exp(bias[..., real].item()))
    return context[:, : real + 2], bias


class SelfAttention(nn.Module):
    """Weights of self-attention; q and k are RMS-normalised over the full width before the split into heads."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps=eps), nn.RMSNorm(dim, eps=eps)


class CrossAttention(SelfAttention):
    """Attention to the prompt, no rotary positions; optionally to image tokens with keys of their own."""

    def __init__(self, dim: int, heads: int, eps: float, image: bool = False) -> None:
        super().__init__(dim, eps)
        self.heads, self.image = heads, image
        if image:
            self.k_img, self.v_img, self.norm_k_img = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.RMSNorm(dim, eps=eps)

    def keys(self, context: Tensor, bias: Tensor | None = None) -> TextKeys:
        """Keys and values of a projected context [B, n, D]."""
        image = None
        if self.image:
            tokens, context = context[:, :IMAGE_TOKENS], context[:, IMAGE_TOKENS:]
            image = self.norm_k_img(self.k_img(tokens)), self.v_img(tokens)
        return TextKeys(self.norm_k(self.k(context)), self.v(context), bias, image)

    def forward(self, x: Tensor, text: TextKeys) -> Tensor:
        q = self.norm_q(self.q(x))
        attended = attention(q, text.k, text.v, self.heads, text.bias)
        if text.image is not None:
            attended = attended + attention(q, *text.image, self.heads)
        return self.o(attended)  # [B, L, D]


class Block(nn.Module):
    """One DiT block: modulated self-attention, attention to the prompt, modulated feed-forward."""

    def __init__(self, dim: int, ffn_dim: int, heads: int, eps: float = 1e-6, image: bool = False) -> None:
        super().__init__()
        self.heads, self.eps = heads, eps
        self.modulation = nn.Parameter(torch.empty(1, 6, dim))
        self.self_attn = SelfAttention(dim, eps)
        self.cross_attn = CrossAttention(dim, heads, eps, image)
        self.norm3 = nn.LayerNorm(dim, eps=eps)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim))

    def forward(self, x: Tensor, text: TextKeys, t_mod: Tensor, rope: Tensor) -> Tensor:
        """x [B, L, D]; t_mod [B, 1 or L, 6, D] (1 = the same for all tokens)."""
        mod = self.modulate(t_mod)
        q, k, v = self.pre(x, mod, rope)
        return self.rest(self.post(x, attention(q, k, v, self.heads), mod), text, mod)

    def modulate(self, t_mod: Tensor) -> tuple[Tensor, ...]:
        """shift, scale, gate of attention, then of the feed-forward; each [B, 1 or L, D]."""
        return (self.modulation + t_mod).unbind(-2)

    def pre(self, x: Tensor, mod: tuple[Tensor, ...], rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of self-attention, normalised and rotated; each [B, L, D]."""
        attn, y = self.self_attn, shifted_norm(x, mod[0], mod[1], self.eps)
        q = rotate_pairs(attn.norm_q(attn.q(y)), rope, self.heads)
        k = rotate_pairs(attn.norm_k(attn.k(y)), rope, self.heads)
        return q, k, attn.v(y)

    def post(self, x: Tensor, attended: Tensor, mod: tuple[Tensor, ...]) -> Tensor:
        """Adds what self-attention found."""
        return self.self_attn.o(attended).mul_(mod[2]).add_(x)

    def rest(self, x: Tensor, text: TextKeys, mod: tuple[Tensor, ...]) -> Tensor:
        """Attention to the prompt and the feed-forward."""
        x = self.cross_attn(self.norm3(x), text).add_(x)
        return self.ffn(shifted_norm(x, mod[3], mod[4], self.eps)).mul_(mod[5]).add_(x)


def shifted_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm without weights, then * (1 + scale) + shift; each step rounds, as the reference run eagerly does."""
    return F.layer_norm(x, x.shape[-1:], eps=eps).mul_(1 + scale).add_(shift)
