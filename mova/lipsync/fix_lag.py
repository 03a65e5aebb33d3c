"""Moves a sound by a measured lag, so that a constant offset is repaired."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ..errors import InputError


def fix_lag(waveform: torch.Tensor, sample_rate: int, lag_ms: float) -> torch.Tensor:
    """The sound [...,S] earlier by `lag_ms` (positive: it was after the lips; negative: it becomes later), as long as before; silence fills the end it left.

    InputError when it would be moved out of itself.
    """
    length = waveform.shape[-1]
    samples = round(lag_ms * sample_rate / 1000) if math.isfinite(lag_ms) else length
    if abs(samples) >= length:
        raise InputError(
            f"The sound lasts {1000 * length / sample_rate:.0f} ms: it cannot be moved by {lag_ms:g} ms. Give the lag that MOVA Lip-Sync Check measured."
        )
    return F.pad(waveform, (-samples, samples))
