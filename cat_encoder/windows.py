"""Sound of any length as log-mel windows, in memory that does not grow with it (spec/cat.md 1)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import CatError
from .frontend import FRAME, HOP, RATE, Normalisation, count_frames, picture, rate_ratio, raw_mel, resample, to_mono

BLOCK = 20 * RATE  # samples at 16 kHz that are resampled at once: more than a window, so that a clip of one window is resampled in one go
CROSSINGS = 7  # half the length of torchaudio's resampling filter (6 zero crossings at 0.99 of the band), rounded up


@dataclass
class Window:
    """mel [B,1,T,128] normalised. start: its first frame. sound: frames of it that are sound, not padding. fresh: of those, the last ones that no window before it had."""

    mel: Tensor
    start: int
    sound: int
    fresh: int


def cut_windows(
    chunks: Iterable[Tensor], sample_rate: int, frames: int, step: int, normalisation: Normalisation, patch: int, pad: bool = True
) -> Iterator[Window]:
    """chunks [B,C,S'] one after another, of any lengths -> windows of `frames` every `step` (at most `frames`) frames.

    The last one ends with the sound, so it overlaps the one before; it begins on a multiple of `patch` frames, so up to patch - 1 of its rows are padding.
    Sound shorter than one window is padded to `frames` (pad), or only to a multiple of `patch`. At most two windows and 20 s of sound are held.
    """
    span = FRAME + HOP * (frames - 1)  # samples a window reads
    held, offset, begin, covered = None, 0, 0, 0  # 16 kHz samples from frame `offset` on; first frame of the next window; frames that are in some window
    for piece in resample_stream(mono_stream(chunks), sample_rate):
        held = piece if held is None else torch.cat([held, piece], 1)
        while held.shape[1] >= (begin - offset) * HOP + span:
            held, offset = held[:, (begin - offset) * HOP :], begin
            yield Window(picture(raw_mel(held[:, :span]), frames, normalisation), begin, frames, begin + frames - covered)
            begin, covered = begin + step, begin + frames
    if held is None:
        raise CatError("The sound is empty: there is nothing to listen to.")
    total = offset + count_frames(held.shape[1])
    if total > covered or total == 0:
        start = math.ceil(max(0, total - frames) / patch) * patch
        rows = frames if pad or start else math.ceil(total / patch) * patch
        mel = picture(raw_mel(held[:, (start - offset) * HOP :]), rows, normalisation)  # says so if the whole sound is shorter than a frame
        yield Window(mel, start, total - start, total - covered)


def count_windows(samples: int, sample_rate: int, frames: int, step: int) -> int:
    """How many windows `cut_windows` makes of so many samples."""
    left = count_frames(math.ceil(samples * rate_ratio(sample_rate))) - frames
    return 1 + max(0, math.ceil(left / step))


def mono_stream(chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    batch = None
    for chunk in chunks:
        mono = to_mono(chunk)
        batch = batch or len(mono)
        if len(mono) != batch:
            raise CatError(f"A chunk holds {len(mono)} clips, the first one {batch}: give the same clips from beginning to end.")
        yield mono


def resample_stream(pieces: Iterable[Tensor], sample_rate: int) -> Iterator[Tensor]:
    """[B,s] at any rate -> [B,s'] at 16 kHz, block by block with what the filter sees on either side: the same as resampling all at once.

    Counts in groups: `old` samples become `new`, so that blocks begin where the filter does.
    """
    ratio = rate_ratio(sample_rate)
    old, new = ratio.denominator, ratio.numerator
    margin, block = math.ceil(CROSSINGS / min(old, new)), math.ceil(BLOCK / new)
    waiting: list[Tensor] = []
    left = 0  # groups at the front that are only there for the filter
    for piece in pieces:
        waiting.append(piece)
        while sum(each.shape[1] for each in waiting) > (left + block + margin) * old:
            pending = torch.cat(waiting, 1)
            yield resample(pending[:, : (left + block + margin) * old], sample_rate)[:, left * new : (left + block) * new]
            waiting, left = [pending[:, (left + block - margin) * old :]], margin
    if waiting:
        yield resample(torch.cat(waiting, 1), sample_rate)[:, left * new :]
