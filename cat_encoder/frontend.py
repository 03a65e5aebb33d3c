"""Sound to log-mel pictures (spec/cat.md 1)."""

from __future__ import annotations

from fractions import Fraction
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import MEL_BINS
from .errors import CatError

RATE = 16_000  # Hz
HOP, FRAME = 160, 400  # samples: 10 ms, 25 ms
FRAMES = 1024  # 10.24 s, the length the encoders are trained on
RATES = (1_000, 1_000_000)  # Hz; beyond these it is no sample rate
LOUDEST = 100.0  # a sample above this is no float in -1..1, however clipped: it is PCM that was never divided


class Normalisation(NamedTuple):
    mean: float
    std: float


AUDIOSET = Normalisation(-4.268, 4.569)
ESC50 = Normalisation(-6.627, 5.359)
SPEECH_COMMANDS = Normalisation(-6.846, 5.565)


def log_mel(waveform: Tensor, sample_rate: int, frames: int = FRAMES, normalisation: Normalisation = AUDIOSET) -> Tensor:
    """waveform [B,C,S], floats in -1..1 -> normalised log-mel [B,1,frames,128], float32 on the CPU; cut at the end or padded to `frames`.

    CatError for what is no sound (see check_waveform) or is shorter than one frame of 25 ms.
    """
    mono = resample(to_mono(waveform), sample_rate)  # [B, S at 16 kHz]
    return picture(raw_mel(mono), frames, normalisation)


def to_mono(waveform: Tensor) -> Tensor:
    """[B,C,S] -> [B,S] float32 on the CPU, the mean of the channels; before resampling, so that channels cost nothing."""
    check_waveform(waveform)
    mono = waveform.detach().to("cpu", torch.float32).mean(1)
    peak = float(mono.abs().max()) if mono.numel() else 0.0  # NaN and Inf come through
    if not peak <= LOUDEST:
        found = f"reaches {peak:,.0f}" if peak < float("inf") else "holds NaN or Inf"
        advice = "divide 16-bit samples by 32768" if peak < float("inf") else "decode or make it again"
        raise CatError(f"The sound {found}: floats in -1..1 are needed; {advice}.")
    return mono


def check_waveform(waveform: Tensor) -> None:
    if not isinstance(waveform, Tensor):
        raise CatError(f"The sound is a {type(waveform).__name__}: a tensor [batch, channels, samples] is needed.")
    if waveform.ndim != 3 or 0 in waveform.shape[:2]:
        raise CatError(f"The sound is {list(waveform.shape)}: [batch, channels, samples] is needed; add the missing ones with unsqueeze(0).")
    if not waveform.is_floating_point():
        raise CatError(f"The sound holds {str(waveform.dtype).removeprefix('torch.')} values: floats in -1..1 are needed; divide 16-bit samples by 32768.")


def rate_ratio(sample_rate: int) -> Fraction:
    """16 kHz over the given rate, as a fraction small enough for a short filter: exact for every usual rate, else within 1e-4."""
    if not RATES[0] <= sample_rate <= RATES[1]:
        raise CatError(f"A sample rate of {sample_rate} Hz cannot be: {RATES[0]:,} to {RATES[1]:,} Hz are possible.")
    return Fraction(RATE, int(sample_rate)).limit_denominator(1000)


def resample(mono: Tensor, sample_rate: int) -> Tensor:
    """[B,S] at any rate -> [B,S'] at 16 kHz, with torchaudio's default filter."""
    ratio = rate_ratio(sample_rate)
    if ratio == 1 or mono.shape[1] == 0:
        return mono
    return load_torchaudio("functional").resample(mono, ratio.denominator, ratio.numerator)


def count_frames(samples: int) -> int:
    """Frames of 25 ms every 10 ms that fit wholly into so many samples at 16 kHz."""
    return max(0, 1 + (samples - FRAME) // HOP)


def raw_mel(mono: Tensor) -> Tensor:
    """[B,S] at 16 kHz -> [B,frames,128], natural log, not normalised."""
    if mono.shape[1] < FRAME:
        raise CatError(f"The sound lasts {mono.shape[1] / RATE * 1000:.0f} ms: at least {FRAME / RATE * 1000:.0f} ms are needed. Give a longer clip.")
    kaldi = load_torchaudio("compliance.kaldi")
    mono = mono - mono.mean(1, keepdim=True)
    return torch.stack([
        kaldi.fbank(clip[None], htk_compat=True, sample_frequency=RATE, use_energy=False, window_type="hanning", num_mel_bins=MEL_BINS, dither=0.0, frame_shift=10)
        for clip in mono
    ])  # fmt: skip


def picture(mel: Tensor, frames: int, normalisation: Normalisation) -> Tensor:
    """[B,F,128] -> [B,1,frames,128]: rows of raw 0 behind the sound (a loud value, as trained), then normalised."""
    fitted = F.pad(mel[:, :frames], (0, 0, 0, max(0, frames - mel.shape[1])))
    return ((fitted - normalisation.mean) / (2 * normalisation.std))[:, None]


def load_torchaudio(part: str) -> ModuleType:
    """torchaudio is imported when the first sound comes, so that the pack loads without it."""
    import importlib

    try:
        return importlib.import_module(f"torchaudio.{part}")
    except (ImportError, OSError) as error:
        raise CatError(
            f"torchaudio cannot be loaded ({error}). The ear needs it: install the torchaudio that belongs to your torch ({torch.__version__}), "
            "with the same command torch came from."
        ) from None
