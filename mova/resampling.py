"""Sound from one sample rate to another, as torchaudio does it: what the reference used."""

from __future__ import annotations

import math
import numbers

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InputError, MediaError
from .ffmpeg import load_av

TAPS = 64_000_000  # of torchaudio's filter: 256 MB; two rates without a common divisor would need gigabytes


def resample(waveform: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """[..., S] at `from_rate` -> [..., ceil(S * to_rate / from_rate)]. InputError for what is no rate; MediaError where a library is missing."""
    if isinstance(from_rate, bool) or not isinstance(from_rate, numbers.Real) or from_rate < 1 or from_rate % 1:
        raise InputError(f"The sample rate is {from_rate!r}: a positive whole number of samples per second is needed, such as 44100.")
    if from_rate == to_rate:
        return waveform
    common = math.gcd(int(from_rate), to_rate)
    if int(from_rate) // common * (to_rate // common) > TAPS:
        return resample_by_ffmpeg(waveform, int(from_rate), to_rate)
    try:
        import torchaudio.functional as audio_functional
    except (ImportError, OSError) as error:  # OSError: built for another torch
        raise MediaError(
            f"Sound at {from_rate} Hz must be resampled to {to_rate} Hz, which needs torchaudio ({error}): pip install the torchaudio of your torch version."
        ) from None
    return audio_functional.resample(waveform, int(from_rate), to_rate)


def resample_by_ffmpeg(waveform: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """The same for rates like 44101 Hz, whose ratio FFmpeg's filter interpolates."""
    av = load_av()
    length = -(-waveform.shape[-1] * to_rate // from_rate)
    rows = []
    for row in waveform.detach().float().cpu().reshape(-1, waveform.shape[-1]):
        frame = av.AudioFrame.from_ndarray(row[None].numpy(), format="fltp", layout="mono")
        frame.sample_rate = from_rate
        converter = av.AudioResampler(format="fltp", layout="mono", rate=to_rate)
        pieces = [torch.from_numpy(piece.to_ndarray())[0] for part in (frame, None) for piece in converter.resample(part)]
        sound = torch.cat([row[:0], *pieces])[:length]
        rows.append(F.pad(sound, (0, length - len(sound))))
    return torch.stack(rows).reshape(*waveform.shape[:-1], length).to(waveform)
