"""Sounds made by rule that stand for 'something else': what likeness is measured against."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

RATE = 16_000  # Hz, which encoders listen at
NOISE = 10 ** (-40 / 20)  # of the noise that the same sound may have, against its own loudness: 40 dB below
SILENCE = 1e-6  # loudness (root mean square) below which there is nothing to match
USUAL = 0.1  # loudness of yardsticks for a silent sound
SEED = 20260129


def draw(samples: int) -> Tensor:
    """White noise [samples], the same at every call."""
    return torch.randn(samples, generator=torch.Generator("cpu").manual_seed(SEED))


def rushing(samples: int) -> Tensor:
    """Noise that falls towards high tones, like wind or water: as much in every octave."""
    spectrum = torch.fft.rfft(draw(samples))
    return torch.fft.irfft(spectrum / torch.arange(1, len(spectrum) + 1).sqrt(), n=samples)


def chord(samples: int) -> Tensor:
    """Three held notes with overtones."""
    seconds = torch.arange(samples) / RATE
    notes = [(pitch * part, 1 / part) for pitch in (220.0, 277.2, 329.6) for part in range(1, 6)]
    return sum(loud * torch.sin(2 * torch.pi * tone * seconds) for tone, loud in notes)


def knocks(samples: int) -> Tensor:
    """Three short knocks a second."""
    seconds = torch.arange(samples) / RATE
    return draw(samples) * torch.exp(-60 * (seconds % (1 / 3)))


def siren(samples: int) -> Tensor:
    """A tone that rises and falls, from 300 Hz to 1.5 kHz, once in two seconds."""
    seconds = torch.arange(samples) / RATE
    pitch = 900 + 600 * torch.sin(torch.pi * seconds)
    return torch.sin(2 * torch.pi * torch.cumsum(pitch.double(), 0) / RATE).float()


YARDSTICKS: tuple[Callable[[int], Tensor], ...] = (rushing, chord, knocks, siren)


def make_yardsticks(seconds: float, level: float = USUAL) -> Tensor:
    """[yardsticks, 1, S] at RATE, each as loud as `level` (root mean square)."""
    samples = round(seconds * RATE)
    return torch.cat([match_level(make(samples)[None, None], level if level > SILENCE else USUAL) for make in YARDSTICKS])


def loudness(sound: Tensor) -> float:
    """The root mean square of a sound [..., C, S], its channels averaged as the encoder does."""
    return float(sound.float().mean(-2).square().mean().sqrt())


def match_level(sound: Tensor, level: float) -> Tensor:
    """The sound [1,C,S] made as loud as `level`; silence stays what it is, and so does everything when `level` is none."""
    own = loudness(sound)
    return sound * (level / own) if min(own, level) > SILENCE else sound


def add_noise(sound: Tensor) -> Tensor:
    """The sound [1,C,S] with noise 40 dB below it: still the same to any ear."""
    return sound + NOISE * loudness(sound) * draw(sound.shape[-1])
