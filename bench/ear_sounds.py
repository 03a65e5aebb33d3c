"""Sounds of six kinds that differ in how they move, not in what they are made of, and an outside encoder that hears movement.

Pitch, level, noise and phase are drawn for every sound, so a kind cannot be told from the mean spectrum.
"""

from __future__ import annotations

import math
import random
from pathlib import Path

import torch

from cat_encoder.frontend import AUDIOSET, picture, raw_mel
from cat_encoder.training.clips import Clip

RATE = 16_000
SECONDS = 0.64
FRAMES = 64  # what the encoder sees: 62 of sound, 2 of padding
PATH_WAVES, BEAT_WAVES = 6, 12  # how finely the outside encoder describes pitch over time and loudness over time
REFERENCE = range(50_000, 50_300)  # sounds that fix the outside encoder's mean and deviation; no other part uses them


def glide(time: torch.Tensor, chance: random.Random, up: bool) -> torch.Tensor:
    """One and a half octaves."""
    place = time / time[-1]
    pitch = 200 * 2 ** (3 * chance.random() + 1.5 * (place if up else 1 - place))
    return torch.sin(2 * math.pi * torch.cumsum(pitch, 0) / RATE)


def tremolo(time: torch.Tensor, chance: random.Random, beats: float) -> torch.Tensor:
    """A tone switched on and off about so many times a second."""
    pitch, beats, start = 300 * 2 ** (3 * chance.random()), beats * (0.85 + 0.3 * chance.random()), 2 * math.pi * chance.random()
    return torch.sin(2 * math.pi * pitch * time) * (torch.sin(2 * math.pi * beats * time + start) > 0)


def pair(time: torch.Tensor, chance: random.Random, up: bool) -> torch.Tensor:
    """Two tones, one after the other."""
    low, cut = 300 * 2 ** (2 * chance.random()), int(len(time) * (0.35 + 0.3 * chance.random()))
    tones = [torch.sin(2 * math.pi * pitch * time) for pitch in (low, 1.8 * low)]
    first, second = tones if up else tones[::-1]
    return torch.cat([first[:cut], second[cut:]])


KINDS = (
    ("glide up", lambda time, chance: glide(time, chance, True)),
    ("glide down", lambda time, chance: glide(time, chance, False)),
    ("slow tremolo", lambda time, chance: tremolo(time, chance, 6)),
    ("fast tremolo", lambda time, chance: tremolo(time, chance, 14)),
    ("low then high", lambda time, chance: pair(time, chance, True)),
    ("high then low", lambda time, chance: pair(time, chance, False)),
)


def make_sound(number: int) -> torch.Tensor:
    """Sound `number`, of kind `number % 6`: [samples]. The same number is always the same sound."""
    chance, time = random.Random(number), torch.arange(int(SECONDS * RATE)) / RATE
    wave = KINDS[number % len(KINDS)][1](time, chance) * (0.05 + 0.3 * chance.random())
    noise = torch.randn(len(time), generator=torch.Generator().manual_seed(number))
    return wave + noise * 0.02 * 10 ** -chance.random()


def labelled(numbers: range) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-mel pictures [n,1,T,128], kinds [n]) of these sounds."""
    waves = torch.stack([make_sound(number) for number in numbers])
    return picture(raw_mel(waves), FRAMES, AUDIOSET), torch.tensor([number % len(KINDS) for number in numbers])


def clips_of(numbers: range) -> list[Clip]:
    return [Clip(Path(f"{number}.wav")) for number in numbers]


def read_made(path: Path) -> tuple[torch.Tensor, int]:
    """Stands in for reading a file: "7.wav" is sound 7."""
    return make_sound(int(path.stem))[None], RATE


class MovementEncoder:
    """A frozen outside encoder without weights: how the pitch of a sound moves and how its loudness beats, as 18 standardised numbers.

    It never sees a label. As CLAP or AST do for real sounds, it already tells apart what the student has yet to learn.
    """

    def __init__(self) -> None:
        found = self.measure(torch.stack([make_sound(number) for number in REFERENCE]))
        self.mean, self.scale = found.mean(0), found.std(0)

    def __call__(self, waveforms: torch.Tensor, rate: int) -> torch.Tensor:
        """[B,S] at 16 kHz -> [B,18]."""
        return (self.measure(waveforms) - self.mean) / self.scale

    def measure(self, waveforms: torch.Tensor) -> torch.Tensor:
        power = raw_mel(waveforms).exp()  # [B, T, 128]
        steps = power.shape[1]
        height = (power.square() * torch.arange(128.0)).sum(2) / power.square().sum(2)  # the mel band where the energy is
        waves = torch.cos(math.pi * torch.outer(torch.arange(float(PATH_WAVES)), torch.arange(steps) + 0.5) / steps)
        loudness = power.sum(2).log()
        beats = torch.fft.rfft(loudness - loudness.mean(1, keepdim=True)).abs()[:, 1 : 1 + BEAT_WAVES]
        return torch.cat([height @ waves.T, beats], 1) / steps
