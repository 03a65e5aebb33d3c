"""Clips as batches of log-mel pictures, read ahead by threads, with the augmentations of training (spec/cat.md 1, 7)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..errors import CatError
from ..frontend import AUDIOSET, FRAMES, Normalisation, picture, raw_mel, resample, to_mono
from ..sound import open_sound
from . import draws
from .clips import Clip

log = logging.getLogger(__name__)

SHORTEST = 10_000  # samples at 16 kHz: training leaves shorter clips out
GAIN_DRAWS = 19  # the middle one of 19 uniform numbers is distributed as Beta(10, 10)
NOISE_ROLL = 10  # frames

Reader = Callable[[Path], tuple[torch.Tensor, int]]


def read_sound(path: Path) -> tuple[torch.Tensor, int]:
    """The first sound of a file or film, whole: (waveform [C,S] float32, sample rate). CatError for anything else."""
    with open_sound(path) as (rate, pieces):
        parts = list(pieces)
    if not parts:
        raise CatError(f"{path} has a sound stream without a single sample: it is empty or damaged.")
    return torch.cat(parts, 2)[0], rate


@dataclass(frozen=True)
class Batch:
    """mel [B,1,T,128]; waves: each clip as [S] at 16 kHz, before augmentation; place: of the first clip in the run."""

    place: int
    clips: list[Clip]
    mel: torch.Tensor
    waves: list[torch.Tensor]

    def parts(self, count: int) -> list[Batch]:
        """Cut into `count` parts of about the same size, in order."""
        size = -(-len(self.clips) // count)
        cuts = range(0, len(self.clips), size)
        return [Batch(self.place + i, self.clips[i : i + size], self.mel[i : i + size], self.waves[i : i + size]) for i in cuts]


@dataclass
class Sounds:
    """Clips ready to be read as training asks for them.

    read: path -> (waveform [C,S], sample rate); raises CatError, OSError or ValueError for a file it cannot read. Such clips, and ones shorter than
    `shortest` samples at 16 kHz, are named once in the log, and the next clip takes their place.
    roll: shift each clip in a circle by chance and change its gain ("roll_aug"). noise: add noise to the picture and roll it by up to 10 frames (SPC-2).
    keep: clips that stay in memory once read, 1.2 MB for 10 s.
    """

    clips: list[Clip]
    read: Reader
    frames: int = FRAMES
    normalisation: Normalisation = AUDIOSET
    shortest: int = SHORTEST
    roll: bool = False
    noise: bool = False
    seed: int = 0
    workers: int = 2
    keep: int = 0
    order: draws.ClipOrder | None = None
    kept: dict[Path, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    refused: dict[Path, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise CatError(f"{self.workers} threads cannot read sounds: 1 or more are needed.")
        self.order = self.order or draws.ClipOrder(len(self.clips), self.seed)

    def batches(self, first: int, last: int, size: int) -> Iterator[Batch]:
        """Batches `first` to `last` (excluded) of `size` clips each; the next one is read while the caller works."""
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                waiting = self.ask(pool, first, size)
                for number in range(first, last):
                    ready, waiting = waiting, self.ask(pool, number + 1, size) if number + 1 < last else []
                    loaded = [future.result() for future in ready]
                    yield Batch(number * size, *collate(loaded))
            finally:
                pool.shutdown(cancel_futures=True)

    def ask(self, pool: ThreadPoolExecutor, number: int, size: int) -> list[Future]:
        return [pool.submit(self.load, self.order[place], place) for place in range(number * size, (number + 1) * size)]

    def in_order(self, size: int) -> Iterator[Batch]:
        """Every clip that can be read once, in the order of the list, without augmentation."""
        for start in range(0, len(self.clips), size):
            found = [(clip, self.look_up(clip)) for clip in self.clips[start : start + size]]
            loaded = [(clip, *both) for clip, both in found if both]
            if loaded:
                yield Batch(start, *collate(loaded))

    def load(self, number: int, place: int) -> tuple[Clip, torch.Tensor, torch.Tensor]:
        """Clip `number`, or the next one that can be read: (clip, wave [S], mel [T,128]). CatError when none can."""
        for step in range(len(self.clips)):
            clip = self.clips[(number + step) % len(self.clips)]
            found = self.look_up(clip)
            if found:
                return clip, found[0], self.augmented(*found, place)
        raise CatError(f"None of the {len(self.clips)} clips can be used. The first: {next(iter(self.refused.values()))}")

    def look_up(self, clip: Clip) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(wave [S] at 16 kHz, picture [T,128]); None when the clip cannot be used, which the log tells once."""
        if clip.path in self.kept:
            return self.kept[clip.path]
        if clip.path in self.refused:
            return None
        try:
            waveform, rate = self.read(clip.path)
            wave = resample(to_mono(waveform[None]), rate)[0]
            if len(wave) < self.shortest:
                raise CatError(f"{clip.path} has {len(wave):,} samples at 16 kHz; {self.shortest:,} are needed.")
            both = wave, self.mel(wave)
        except (CatError, OSError, ValueError) as error:
            if clip.path not in self.refused:
                self.refused[clip.path] = str(error) if str(clip.path) in str(error) else f"{clip.path}: {error}"
                log.warning("Left out: %s", self.refused[clip.path])
            return None
        if len(self.kept) < self.keep:
            self.kept[clip.path] = both
        return both

    def augmented(self, wave: torch.Tensor, mel: torch.Tensor, place: int) -> torch.Tensor:
        if self.roll:
            mel = self.mel(roll_and_scale(wave, draws.generator(self.seed, "roll", place)))
        return add_noise(mel, draws.generator(self.seed, "noise", place)) if self.noise else mel

    def mel(self, wave: torch.Tensor) -> torch.Tensor:
        """[S] at 16 kHz -> [T,128], normalised."""
        return picture(raw_mel(wave[None]), self.frames, self.normalisation)[0, 0]


def collate(loaded: list[tuple[Clip, torch.Tensor, torch.Tensor]]) -> tuple[list[Clip], torch.Tensor, list[torch.Tensor]]:
    clips, waves, mels = zip(*loaded, strict=True)
    return list(clips), torch.stack(mels)[:, None], list(waves)


def roll_and_scale(wave: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A circular shift of [S] by a random offset, times 0.5 + Beta(10, 10)."""
    shift = int(torch.randint(len(wave), (1,), generator=generator))
    gain = 0.5 + torch.rand(GAIN_DRAWS, generator=generator).median()
    return wave.roll(shift) * gain


def add_noise(mel: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Uniform noise of random strength up to 0.1 on [T,128], then a roll in time by up to 10 frames."""
    strength = torch.rand(1, generator=generator) / 10
    shift = int(torch.randint(-NOISE_ROLL, NOISE_ROLL, (1,), generator=generator))
    return (mel + torch.rand(mel.shape, generator=generator) * strength).roll(shift, 0)


def mask_bands(mel: torch.Tensor, ratio: float, generator: torch.Generator) -> torch.Tensor:
    """SpecAug: in each picture of [B,1,T,F] one stretch of time and one of frequency, each up to `ratio` of the side, becomes 0."""
    masked = mel.clone()
    for dim in (2, 3):
        size = mel.shape[dim]
        width, start = torch.rand(2, len(mel), 1, generator=generator)
        width = width * ratio * size  # [B, 1]
        start = start * (size - width)
        cell = torch.arange(size)[None]
        hidden = (cell >= start.floor()) & (cell < (start.floor() + width.floor()))  # [B, size]
        masked.masked_fill_(hidden[:, None, :, None] if dim == 2 else hidden[:, None, None, :], 0.0)
    return masked


def mix_with_reverse(mel: torch.Tensor, labels: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixup: the batch times `share` plus its reverse times the rest; labels [B,classes] alike."""
    return mel * share + mel.flip(0) * (1 - share), labels * share + labels.flip(0) * (1 - share)
