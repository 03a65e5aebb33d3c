"""From log-mel picture to tokens: CAT's multi-resolution block and EAT's single convolution (spec/cat.md 2.1, 2.5).

Maps are channel-last, [B, h, w, C], all the way: then norms and 1x1 convolutions are plain row-wise operations and nothing is permuted between them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Architecture
from .errors import CatError

ROOM = 4 * 2**20  # values: what one hidden layer of a CPU may take. Larger blocks are mapped anew from the system each time, which costs a third more
EPS = 1e-5  # of every norm in the stem, whatever the trunk's is (2.1)
BLOCKS = 2  # conv blocks of a stage
MLP_RATIO = 4


class PatchStem(nn.Module):
    """One convolution, kernel = stride, no norm."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.projection = nn.Conv2d(1, architecture.width, architecture.patch, architecture.patch)

    @property
    def projections(self) -> list[nn.Conv2d]:
        return [self.projection]

    def forward(self, mel: Tensor, visible: Tensor | None = None) -> Tensor:
        """mel [B,1,T,F] -> tokens [B*n, floor(T/16)*8, D]. visible: n masks per clip; nothing here mixes cells, so it only repeats the clips."""
        x = shrink(mel.movedim(1, -1), self.projection).flatten(1, 2)
        return x if visible is None else x.repeat_interleave(copies(mel, visible), 0)


class MultiResolutionStem(nn.Module):
    """Stages of ever coarser maps; every stage but the last adds to the tokens through its branch."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        channels = (1, *architecture.channels, architecture.width)
        self.stages = nn.ModuleList(Stage(*each) for each in zip(channels, channels[1:], architecture.kernels, strict=False))
        self.blocks = nn.ModuleList(nn.ModuleList(ConvBlock(width) for _ in range(BLOCKS)) for width in architecture.channels)
        self.branches = nn.ModuleList(nn.Conv2d(width, architecture.width, k, k) for width, k in zip(architecture.channels, architecture.branches, strict=True))
        self.last = nn.Linear(architecture.width, architecture.width)
        self.patch = architecture.patch

    @property
    def projections(self) -> list[nn.Conv2d]:
        return [stage.projection for stage in self.stages]

    def forward(self, mel: Tensor, visible: Tensor | None = None) -> Tensor:
        """mel [B,1,T,F] -> tokens [B*n, floor(T/patch)*bands, D], time before frequency.

        visible: [B*n,1,h,w] on the final grid, 1 = visible, n masks per clip with the mask's index fastest; n = 1 without it.
        """
        x = self.stages[0](mel.movedim(1, -1))  # [B, T/k, F/k, C]: no cell sees another yet, so this is done once for all masks of a clip
        if visible is not None:
            self.check_mask(mel, visible)
            x = x.repeat_interleave(copies(mel, visible), 0)
        tokens = 0
        for stage, blocks, branch in zip(self.stages[1:], self.blocks, self.branches, strict=True):
            seen = None if visible is None else spread(visible, x)
            for block in blocks:
                x = block(x, seen)
            tokens = tokens + shrink(x, branch)
            x = stage(x)
        return (self.last(x) + tokens).flatten(1, 2)

    def check_mask(self, mel: Tensor, visible: Tensor) -> None:
        grid = [side // self.patch for side in mel.shape[2:]]
        if list(visible.shape[1:]) != [1, *grid] or mel.shape[2] % self.patch:
            raise CatError(
                f"A mask of {list(visible.shape)} does not fit a log-mel of {list(mel.shape)}: [B*n, 1, T/{self.patch}, F/{self.patch}], T without rest."
            )


class Stage(nn.Module):
    """One step to a coarser map: a convolution without overlap, then a norm over channels."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.projection, self.norm = nn.Conv2d(inputs, outputs, kernel, kernel), nn.LayerNorm(outputs, EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(shrink(x, self.projection))


class ConvBlock(nn.Module):
    """Mixes neighbouring cells (1x1, depth-wise 5x5, 1x1), then the channels of each cell."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, EPS), nn.LayerNorm(width, EPS)
        self.pointwise1, self.pointwise2 = nn.Linear(width, width), nn.Linear(width, width)
        self.depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.fc1, self.fc2 = nn.Linear(width, MLP_RATIO * width), nn.Linear(MLP_RATIO * width, width)

    def forward(self, x: Tensor, visible: Tensor | None) -> Tensor:
        u = self.pointwise1(self.norm1(x))  # [B, h, w, C]
        if visible is not None:
            u = u * visible  # hidden cells are nought before anything looks at its neighbours
        x = x + self.pointwise2(self.depthwise(u.movedim(-1, 1)).movedim(1, -1))
        return x + by_rows(lambda rows: self.fc2(F.gelu(self.fc1(self.norm2(rows)))), x, self.fc1.out_features)


def shrink(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A convolution with kernel = stride over [B,H,W,C] as one matrix product over cells -> [B,H/k,W/k,out]; the rest of a division is left out."""
    k = conv.kernel_size[0]
    h, w = x.shape[1] // k, x.shape[2] // k
    cells = x[:, : h * k, : w * k].unflatten(1, (h, k)).unflatten(3, (w, k)).transpose(2, 3)  # [B, h, w, k, k, C]
    return F.linear(cells.flatten(3), conv.weight.movedim(1, -1).flatten(1), conv.bias)


def by_rows(function: Callable[[Tensor], Tensor], x: Tensor, widest: int) -> Tensor:
    """function, which sees each row of [..., C] alone and has up to `widest` channels inside, over slices that stay small on a CPU."""
    rows = x.flatten(0, -2)
    at_once = ROOM // widest
    if x.device.type != "cpu" or len(rows) <= at_once:
        return function(x)
    return torch.cat([function(part) for part in rows.split(at_once)]).view(*x.shape[:-1], -1)


def copies(mel: Tensor, visible: Tensor) -> int:
    n, rest = divmod(len(visible), len(mel))
    if rest or n == 0:
        raise CatError(f"{len(visible)} masks cannot be shared out to {len(mel)} clips: give the same number to each.")
    return n


def spread(visible: Tensor, x: Tensor) -> Tensor:
    """A mask of the final grid [B,1,h,w] on the finer grid of x, [B,H,W,1], each cell repeated."""
    repeat = x.shape[1] // visible.shape[2]
    return visible.to(x.dtype).repeat_interleave(repeat, 2).repeat_interleave(repeat, 3).movedim(1, -1)
