"""The small convolutional decoder that guesses the teacher's targets from the visible tokens (spec/cat.md 6.2); not kept after training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .masks import Masks


@dataclass(frozen=True)
class DecoderShape:
    """Base size; the large one is width 1024, 3 layers, kernel 5."""

    width: int = 768
    layers: int = 6
    kernel: int = 3
    groups: int = 16


class DecoderLayer(nn.Sequential):
    """Grouped convolution, channel norm without weights, GELU; plus the input when the widths agree."""

    def __init__(self, channels: int, shape: DecoderShape) -> None:
        super().__init__(nn.Conv2d(channels, shape.width, shape.kernel, padding=shape.kernel // 2, groups=shape.groups))
        self.trim = 1 - shape.kernel % 2  # an even kernel makes the map one cell too large

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        out = self[0](grid)  # [R, width, h, w]
        out = out[..., : grid.shape[-2], : grid.shape[-1]] if self.trim else out
        out = F.layer_norm(out.movedim(1, -1), out.shape[1:2]).movedim(-1, 1)  # eps 1e-5
        out = F.gelu(out)
        return out + grid if out.shape == grid.shape else out


class Decoder(nn.Module):
    """Visible tokens [R,V,D] -> a guess of every token [R,N,D]."""

    def __init__(self, width: int, shape: DecoderShape | None = None) -> None:
        super().__init__()
        shape = shape or DecoderShape()
        self.blocks = nn.Sequential(*(DecoderLayer(width if i == 0 else shape.width, shape) for i in range(shape.layers)))
        self.proj = nn.Linear(shape.width if shape.layers else width, width)

    def forward(self, tokens: torch.Tensor, masks: Masks, noise: torch.Tensor) -> torch.Tensor:
        grid = fill_grid(tokens, masks, noise)  # [R, N, D]
        grid = grid.transpose(1, 2).unflatten(2, (masks.height, masks.width))  # [R, D, h, w]
        return self.proj(self.blocks(grid).flatten(2).transpose(1, 2))  # [R, N, D]


def fill_grid(tokens: torch.Tensor, masks: Masks, noise: torch.Tensor) -> torch.Tensor:
    """The visible tokens [R,V,D] at their places, noise [R,M,D] at the masked ones: [R,N,D]."""
    rows, _, width = tokens.shape
    grid = tokens.new_empty(rows, masks.height * masks.width, width)
    for places, values in ((masks.keep, tokens), (masks.hide, noise.to(tokens.dtype))):
        grid = grid.scatter(1, places[..., None].expand(-1, -1, width), values)
    return grid
