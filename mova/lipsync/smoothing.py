"""The running median that steadies face boxes and per-frame scores."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def median_filter(values: Tensor, width: int) -> Tensor:
    """Median of `width` (odd) neighbours for each of [n] values; beyond the ends lie zeros, as SyncNet's scripts have it (spec/lipsync.md A.3, A.4)."""
    return F.pad(values, (width // 2, width // 2)).unfold(0, width, 1).median(dim=-1).values
