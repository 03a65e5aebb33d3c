"""What one forward computes, counted from the checkpoint's own sizes (spec/performance.md 1.2)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from .parts import Parts
from .towers import TowerConfig

TEXT_TOKENS = 512  # as in the published timings; that padding is collapsed here saves less than 1 % of the work


class Work(NamedTuple):
    """FLOPs of attention cores (QK^T and PV), and of linear layers."""

    attention: float
    linear: float

    @property
    def total(self) -> float:
        return self.attention + self.linear


def forward_work(parts: Parts, video: int, audio: int, text: int = TEXT_TOKENS) -> dict[str, Work]:
    """The work of one forward over so many tokens, by component: the rows of the table in 1.2."""
    tower, sound, talking = parts.experts["high"].config, parts.audio.config, len(parts.bridge.config.layers)
    rows = tower_work(tower, video, text)
    rows["bridge audio to video"] = scale(cross_work(video, audio, tower.dim, sound.dim), talking)
    rows["bridge video to audio"] = scale(cross_work(audio, video, sound.dim, tower.dim), talking)
    rows["audio tower"] = add(tower_work(sound, audio, text).values())
    return rows


def tower_work(config: TowerConfig, tokens: int, text: int) -> dict[str, Work]:
    dim, patch = config.dim, math.prod(config.patch_size)
    embedding = 2 * tokens * dim * patch * (config.in_dim + config.out_dim) + 2 * text * dim * (config.text_dim + dim)
    layer = {
        "self-attention": Work(4 * tokens * tokens * dim, 0),
        "self-attention projections": Work(0, 8 * tokens * dim * dim),
        "cross-attention": cross_work(tokens, text, dim, dim),
        "feed-forward": Work(0, 4 * tokens * dim * config.ffn_dim),
    }
    return {name: scale(work, config.num_layers) for name, work in layer.items()} | {"patch, head, text": Work(0, embedding)}


def cross_work(queries: int, keys: int, dim: int, other: int) -> Work:
    """Attention of `queries` tokens of width dim to `keys` tokens of width other, with its four projections."""
    return Work(4 * queries * keys * dim, 4 * queries * dim * dim + 4 * keys * other * dim)


def scale(work: Work, times: int) -> Work:
    return Work(work.attention * times, work.linear * times)


def add(works: Iterable[Work]) -> Work:
    return Work(*(sum(column) for column in zip(*works, strict=True)))
