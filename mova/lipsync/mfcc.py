"""SyncNet's view of sound: 13 cepstra every 10 ms (spec/lipsync.md A.2). Float64 throughout; a filter bank of its own, so no audio package is needed."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SAMPLE_RATE = 16000
FRAME, HOP, FFT = 400, 160, 512  # samples: 25 ms windows every 10 ms
FILTERS, CEPSTRA, LIFTER = 26, 13, 22
PRE_EMPHASIS = 0.97
TINY = torch.finfo(torch.float64).eps  # stands for zero under a logarithm
BLOCK = 4096  # columns whose spectra are held at once


def mfcc(samples: Tensor) -> Tensor:
    """Cepstra of a sound, [13, columns] float64.

    samples: [S] at 16 kHz in 16-bit units (-32768..32767), any dtype, on the CPU. columns: 1 up to 400 samples, then one more for every begun 160.
    Row 0 is the log energy of the window.
    """
    columns = 1 + max(math.ceil((len(samples) - FRAME) / HOP), 0)
    return torch.cat([cepstra(samples, first, min(BLOCK, columns - first)) for first in range(0, columns, BLOCK)], dim=1)


def cepstra(samples: Tensor, first: int, count: int) -> Tensor:
    """Columns first..first+count-1 of `mfcc`, [13, count] float64. Zeros follow the sound."""
    power = torch.fft.rfft(emphasised_frames(samples, first, count), FFT).abs().square() / FFT  # [count, 257]
    columns = log_of(power @ filter_bank().T) @ cosine_basis().T  # [count, 13]
    columns[:, 0] = log_of(power.sum(dim=1))
    return columns.T


def emphasised_frames(samples: Tensor, first: int, count: int) -> Tensor:
    """[count,400] float64: what each sample adds to 0.97 of the one before; before the first lies 0, after the last nothing is added."""
    start, end = first * HOP, (first + count - 1) * HOP + FRAME
    before = samples[start - 1 : start] if start else torch.zeros(1)
    signal = torch.cat([before, samples[start:end]]).to(torch.float64)
    emphasised = signal[1:] - PRE_EMPHASIS * signal[:-1]
    return F.pad(emphasised, (0, end - start - len(emphasised))).unfold(0, FRAME, HOP)


def log_of(power: Tensor) -> Tensor:
    return torch.where(power == 0, TINY, power).log()


def filter_bank() -> Tensor:
    """Triangles over the bins of the spectrum, evenly spaced in mel from 0 to 8 kHz: [26, 257] float64."""
    mels = torch.linspace(0, 2595 * math.log10(1 + SAMPLE_RATE / 2 / 700), FILTERS + 2, dtype=torch.float64)
    edges = ((FFT + 1) * 700 * (10 ** (mels / 2595) - 1) / SAMPLE_RATE).floor()  # bins
    low, peak, high = (edges[start : start + FILTERS, None] for start in range(3))
    bins = torch.arange(FFT // 2 + 1)
    rising, falling = (bins - low) / (peak - low), (high - bins) / (high - peak)
    return torch.where(bins < peak, rising, falling).clamp_min(0)


def cosine_basis() -> Tensor:
    """The orthonormal DCT-II of 26 values, its first 13 rows, with the lifter in it: [13, 26] float64."""
    row = torch.arange(CEPSTRA, dtype=torch.float64)[:, None]
    basis = math.sqrt(2 / FILTERS) * torch.cos(math.pi * row * (torch.arange(FILTERS) + 0.5) / FILTERS)
    basis[0] /= math.sqrt(2)
    return basis * (1 + LIFTER / 2 * torch.sin(math.pi * row / LIFTER))
