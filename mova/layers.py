"""What both towers are made of: rotary positions, and the DiT block (spec/mova.md 3.1, 3.5, 3.6).

Layouts: tokens [B, L, D]; queries, keys and values [B, L, heads * head_dim]; a rotary table is e^(i angle), complex64
[L, 1, head_dim / 2]. The block is cut into queries / keys / post / rest so that joint attention can sit between its parts.

What works token by token works through a long sequence in row slices: live memory beside the tokens stays below 2.5 times
theirs (the reference needs 12), and the arithmetic is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attention

Modulation = tuple[Tensor, ...]

ROPE_BASE = 10000.0
IMAGE_TOKENS = 257  # CLIP tokens at the head of the context, where a block has image attention
MIN_ROWS = 4096  # a slice of a sequence is this long at least (full use of a GPU), and a thirty-second of it at most beyond that
ROW_ALIGNMENT = 128


def row_slices(length: int) -> list[slice]:
    size = max(MIN_ROWS, -(-length // (32 * ROW_ALIGNMENT)) * ROW_ALIGNMENT)
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def update_rows(x: Tensor, change: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """x [B, L, D] with `change` made to each slice of rows; long sequences are overwritten where no gradients are recorded."""
    slices = row_slices(x.shape[1])
    if len(slices) == 1 or torch.is_grad_enabled():
        return torch.cat([change(x[:, rows], rows) for rows in slices], dim=1) if len(slices) > 1 else change(x, slices[0])
    for rows in slices:
        x[:, rows] = change(x[:, rows], rows)
    return x


def map_rows(x: Tensor, compute: Callable[[Tensor, slice], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Tensors [B, L, ...] computed from x [B, L, D] slice by slice."""
    slices = row_slices(x.shape[1])
    if len(slices) == 1:
        return compute(x, slices[0])
    if torch.is_grad_enabled():
        return tuple(torch.cat(pieces, dim=1) for pieces in zip(*(compute(x[:, rows], rows) for rows in slices), strict=True))
    whole: tuple[Tensor, ...] = ()
    for rows in slices:
        pieces = compute(x[:, rows], rows)
        whole = whole or tuple(piece.new_empty(piece.shape[0], x.shape[1], *piece.shape[2:]) for piece in pieces)
        for target, piece in zip(whole, pieces, strict=True):
            target[:, rows] = piece
        del pieces, piece  # or they would still be there while the next slice is computed
    return whole


def frequencies(dim: int) -> Tensor:
    """Rotary frequencies 10000^(-2k/dim) for k < dim/2, float64 [dim / 2]."""
    return ROPE_BASE ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def rope_table(angles: Tensor) -> Tensor:
    """e^(i angle), complex64 [L, 1, head_dim / 2], of float64 angles [L, head_dim / 2]."""
    return torch.complex(angles.cos().float(), angles.sin().float()).unsqueeze(1)


def rotate_pairs(x: Tensor, rope: Tensor, heads: int) -> Tensor:
    """Rotates the interleaved pairs (2k, 2k+1) of every head of [B, L, heads * head_dim], which is given up: in float32, rounded once."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (heads, -1, 2)))  # [B, L, H, d / 2]
    return torch.view_as_real(pairs.mul_(rope)).flatten(2).to(x.dtype)  # [B, L, H * d]


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
        """x [B, L, D], which is given up (long ones are overwritten); t_mod [B, 1 or L, 6, D] (1 = the same for all tokens)."""
        mod = self.modulate(t_mod)
        x = self.attend(x, mod, rope)
        return update_rows(x, lambda part, rows: self.rest(part, text, pick(mod, rows)))

    def attend(self, x: Tensor, mod: Modulation, rope: Tensor) -> Tensor:
        """Self-attention: keys and values of all tokens, then the queries slice by slice."""
        k, v = map_rows(x, lambda part, rows: self.keys(part, pick(mod, rows), rope[rows]))  # [B, L, D]

        def hear(part: Tensor, rows: slice) -> Tensor:
            q = self.queries(part, pick(mod, rows), rope[rows])  # [B, rows, D]
            return self.post(part, attention(q, k, v, self.heads), pick(mod, rows))

        return update_rows(x, hear)

    def modulate(self, t_mod: Tensor) -> Modulation:
        """shift, scale, gate of attention, then of the feed-forward; each [B, 1 or L, D]."""
        return (self.modulation + t_mod).unbind(-2)

    def queries(self, x: Tensor, mod: Modulation, rope: Tensor) -> Tensor:
        """Queries of self-attention, normalised and rotated."""
        attn = self.self_attn
        return rotate_pairs(attn.norm_q(attn.q(shifted_norm(x, mod[0], mod[1], self.eps))), rope, self.heads)

    def keys(self, x: Tensor, mod: Modulation, rope: Tensor) -> tuple[Tensor, Tensor]:
        """Keys, normalised and rotated, and values of self-attention."""
        attn, y = self.self_attn, shifted_norm(x, mod[0], mod[1], self.eps)
        return rotate_pairs(attn.norm_k(attn.k(y)), rope, self.heads), attn.v(y)

    def post(self, x: Tensor, attended: Tensor, mod: Modulation) -> Tensor:
        """Adds what self-attention found."""
        return self.self_attn.o(attended).mul_(mod[2]).add_(x)

    def rest(self, x: Tensor, text: TextKeys, mod: Modulation) -> Tensor:
        """Attention to the prompt and the feed-forward."""
        x = self.cross_attn(self.norm3(x), text).add_(x)
        return self.ffn(shifted_norm(x, mod[3], mod[4], self.eps)).mul_(mod[5]).add_(x)


def pick(mod: Modulation, rows: slice) -> Modulation:
    """The modulation of some rows; one that all tokens share is theirs as it is."""
    return mod if mod[0].shape[1] == 1 else tuple(part[:, rows] for part in mod)


def shifted_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm without weights, then * (1 + scale) + shift; each step rounds, as the reference run eagerly does."""
    return F.layer_norm(x, x.shape[-1:], eps=eps).mul_(1 + scale).add_(shift)
