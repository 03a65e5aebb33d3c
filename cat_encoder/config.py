"""The shapes of an encoder: one dataclass, the table of stems, and the released sizes (spec/cat.md 2)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from .errors import CatError

MEL_BINS = 128
POSITION_ROWS = 768  # time rows of the released position tables: 122.88 s of 16-frame patches
WIDEST, DEEPEST, LARGEST_TABLE = 2**20, 1000, 2**28  # channels, blocks, values of a position table (1 GB): what claims more is no encoder

# conv_option -> kernel = stride of each stage, channels of every stage but the last (which has the encoder's width), kernels of the branches (2.1)
CONV_OPTIONS = {
    0: ((4, 2, 2), (256, 384), (4, 2)),
    1: ((16,), (), ()),
    2: ((4, 2), (384,), (2,)),
    3: ((4, 4), (384,), (4,)),
    4: ((8, 2), (384,), (2,)),
    5: ((2, 2, 2, 2), (256, 384, 768), (8, 4, 2)),
    6: ((4, 2, 2, 2), (256, 384, 768), (8, 4, 2)),
}


@dataclass(frozen=True)
class Architecture:
    """Everything that fixes the tensors of an encoder. CatError when the values do not fit each other.

    stem: "multi" (CAT's multi-resolution block) or "patch" (one convolution, as EAT and SSLAM have it; one kernel, no channels, no branches).
    bottleneck: width of the optional narrow pair of Linears before the blocks (2.3); 0 = none.
    """

    stem: str = "multi"
    kernels: tuple[int, ...] = (4, 2, 2)
    channels: tuple[int, ...] = (256, 384)
    branches: tuple[int, ...] = (4, 2)
    width: int = 768
    depth: int = 11
    heads: int = 12
    mlp_ratio: float = 4.0
    eps: float = 1e-6
    position_rows: int = POSITION_ROWS
    bottleneck: int = 0

    def __post_init__(self) -> None:
        stages = len(self.kernels)
        sizes = (self.width, self.depth, self.heads, self.position_rows, *self.kernels, *self.channels, *self.branches, self.bottleneck + 1)
        if not all(isinstance(size, int) and 0 < size <= WIDEST + 1 for size in sizes) or not stages:
            raise CatError(f"No encoder has these shapes: all sizes must be whole, positive and at most {WIDEST:,}. Given: {self}.")
        behind = tuple(math.prod(self.kernels[i + 1 :]) for i in range(stages - 1))  # what a branch has to shrink by to meet the final grid
        rules = {
            "stem must be multi or patch": self.stem in ("multi", "patch"),
            "a patch stem has exactly one kernel": self.stem == "multi" or stages == 1,
            "channels and branches are one less than kernels": len(self.channels) == len(self.branches) == stages - 1,
            f"the branches have to reach the final grid, {behind}": self.branches == behind,
            f"the patch (product of kernels) has to divide {MEL_BINS} mel bins": MEL_BINS % self.patch == 0,
            "heads have to divide width": self.width % self.heads == 0,
            "width has to be a multiple of 4": self.width % 4 == 0,
            f"mlp_ratio has to make 1 to {WIDEST:,} channels": 1 <= self.mlp_ratio * self.width <= WIDEST,
            "eps has to lie between 0 and 1": 0 < self.eps < 1,
            f"depth can be up to {DEEPEST}": self.depth <= DEEPEST,
            f"the position table can hold up to {LARGEST_TABLE:,} values": self.position_rows * self.width * MEL_BINS <= LARGEST_TABLE * self.patch,
        }
        broken = [rule for rule, holds in rules.items() if not holds]
        if broken:
            raise CatError(f"No encoder has these shapes: {'; '.join(broken)}. Given: {self}.")

    @property
    def patch(self) -> int:
        """Frames and bins of a token's cell."""
        return math.prod(self.kernels)

    @property
    def bands(self) -> int:
        """Tokens of one column (8 at a patch of 16)."""
        return MEL_BINS // self.patch

    @property
    def max_frames(self) -> int:
        """The longest input the position table holds."""
        return self.position_rows * self.patch

    def as_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict) -> Architecture:
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def cat_architecture(conv_option: int = 0, **sizes: object) -> Architecture:
    """CAT with one of the seven stems, base size unless `sizes` (any field of Architecture) say otherwise."""
    kernels, channels, branches = CONV_OPTIONS[conv_option]
    return Architecture(**({"kernels": kernels, "channels": channels, "branches": branches} | sizes))


def patch_architecture(**sizes: object) -> Architecture:
    """EAT and SSLAM: one 16x16 convolution, 12 blocks."""
    return Architecture(**({"stem": "patch", "kernels": (16,), "channels": (), "branches": (), "depth": 12} | sizes))


PRESETS = {
    "cat-base": cat_architecture(),
    "cat-large": cat_architecture(width=1024, depth=24, heads=16),
    "eat-base": patch_architecture(),
    "eat-large": patch_architecture(width=1024, depth=24, heads=16),
}
