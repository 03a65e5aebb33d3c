"""How near a clip comes to a reference: in overall character, or in the order of its events (spec/cat.md 11, N3)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..ear import FRAME_RATE, OnStep
from ..errors import CatError
from .steps import piece
from .yardsticks import RATE, add_noise, loudness, make_yardsticks, match_level

OVERALL, EVENTS = "overall character", "order of events"
MODES = (OVERALL, EVENTS)
LONGEST = 1500  # columns compared with each other; of longer clips neighbours are averaged


@dataclass(frozen=True)
class Match:
    """How near one clip comes to its reference."""

    score: float  # 0..100, between the anchors
    likeness: float  # cosine, as measured: -1..1
    unrelated: float  # the likeness of the reference to unrelated sounds: score 0
    same: float  # the likeness of the reference to itself with a little noise: score 100
    rough: bool  # a little noise moved the reference so far that `same` is set by rule, halfway from unrelated to equal
    similarity: Tensor  # [n, m] cosines, columns of the clip by columns of the reference
    path: tuple[tuple[int, int], ...]  # cells of `similarity` that belong together in time; empty for overall character
    seconds: tuple[float, float]  # of the clip and of the reference

    def __str__(self) -> str:
        anchors = f"likeness {self.likeness:.3f} (0 points at {self.unrelated:.3f}, 100 at {self.same:.3f})"
        doubt = "\nTo this encoder a little noise makes the reference another sound: the score is rough." if self.rough else ""
        return f"{self.score:.0f} of 100: {anchors}{doubt}"


@dataclass(frozen=True)
class Heard:
    """The columns [n, D] of a clip that hold sound, and the place [n] of each in the encoder's window."""

    columns: Tensor
    places: Tensor

    def less(self, background: Tensor) -> Tensor:
        """The columns less the background [places, D] of their place."""
        return self.columns - background[self.places]


@dataclass(frozen=True)
class Reference:
    """What clips are compared with: columns [m, D] less the background, and the anchors of one mode."""

    columns: Tensor
    background: Tensor  # [places, D]
    unrelated: float
    same: float
    rough: bool
    seconds: float
    mode: str

    def measure(self, heard: Heard, seconds: float) -> Match:
        mine = heard.less(self.background)
        likeness = LIKENESS[self.mode](mine, self.columns)
        similarity = cosines(thin(mine), thin(self.columns))
        path = find_path(1 - similarity)[1] if self.mode == EVENTS else ()
        score = 100 * (likeness - self.unrelated) / (self.same - self.unrelated)
        return Match(min(max(score, 0.0), 100.0), likeness, self.unrelated, self.same, self.rough, similarity, path, (seconds, self.seconds))


def match_to_reference(
    encoder: Any,
    waveform: Tensor,
    sample_rate: int,
    reference: Tensor,
    reference_rate: int,
    mode: str = OVERALL,
    match_loudness: bool = True,
    on_step: OnStep | None = None,
) -> list[Match]:
    """One Match per clip of `waveform` [B,C,S]; reference [1 or B,C,S'].

    mode: one of MODES. match_loudness: clips are brought to the loudness of their reference first, since the level moves every feature.
    CatError when the numbers of clips do not fit, and for sound the encoder cannot hear.
    """
    if mode not in MODES:
        raise CatError(f"The mode {mode!r} is unknown: {' or '.join(MODES)}.")
    clips, references = len(waveform), len(reference)
    if references not in (1, clips):
        raise CatError(f"{clips} clips cannot be compared with {references} references: give one reference, or one for each clip.")
    pieces = clips + references
    measures = [prepare(encoder, sound[None], reference_rate, mode, piece(on_step, index, pieces)) for index, sound in enumerate(reference)]
    matches = []
    for index, sound in enumerate(waveform):
        place = index % references
        fitted = match_level(sound[None], loudness(reference[place])) if match_loudness else sound[None]
        heard = listen(encoder, fitted, sample_rate, piece(on_step, references + index, pieces))
        matches.append(measures[place].measure(heard, waveform.shape[-1] / sample_rate))
    return matches


def prepare(encoder: Any, sound: Tensor, rate: int, mode: str, on_step: OnStep | None) -> Reference:
    """A reference sound [1,C,S] and its anchors: itself with a little noise is 100, unrelated noises and tones of its loudness are 0."""
    yardsticks = make_yardsticks(encoder.frames / FRAME_RATE, loudness(sound))
    pieces = len(yardsticks) + 2
    others = torch.stack(
        [listen(encoder, other[None], RATE, piece(on_step, index, pieces)).columns for index, other in enumerate(yardsticks)]
    )  # [4, places, D]
    background = others.mean(0)  # by place, since encoders tell the places of one window apart
    mine = listen(encoder, sound, rate, piece(on_step, pieces - 2, pieces)).less(background)
    noisy = listen(encoder, add_noise(sound), rate, piece(on_step, pieces - 1, pieces)).less(background)
    like = LIKENESS[mode]
    unrelated = float(np.median([like(other, mine) for other in others - background]))  # one that happens to be near does not count
    same, halfway = like(noisy, mine), (1 + unrelated) / 2
    return Reference(mine, background, unrelated, max(same, halfway), same < halfway, sound.shape[-1] / rate, mode)


def listen(encoder: Any, sound: Tensor, rate: int, on_step: OnStep | None) -> Heard:
    """One clip [1,C,S] as the encoder hears it, window by window."""
    columns, places, whole = [], [], encoder.frames // encoder.architecture.patch
    for window in encoder.whole_windows(sound, rate, on_step):
        part = encoder.new_features(window, encoder.encode(window.mel))
        columns.append(part.columns[0, : part.sounding].float().cpu())
        first = whole - part.sounding if window.start else 0  # later windows give the columns at their end
        places.append(torch.arange(first, first + part.sounding))
    return Heard(torch.cat(columns), torch.cat(places))


def thin(columns: Tensor) -> Tensor:
    """At most LONGEST columns, neighbours averaged."""
    size = math.ceil(len(columns) / LONGEST)
    return F.avg_pool1d(columns.T[None], size, ceil_mode=True)[0].T if size > 1 else columns


def cosines(columns: Tensor, others: Tensor) -> Tensor:
    """[n, D], [m, D] -> [n, m] in -1..1; 0 where one is nothing but background."""
    return F.normalize(columns, dim=1) @ F.normalize(others, dim=1).T


def overall_likeness(columns: Tensor, others: Tensor) -> float:
    return float(F.cosine_similarity(columns.mean(0), others.mean(0), dim=0))


def events_likeness(columns: Tensor, others: Tensor) -> float:
    """The mean cosine along the best way through both clips: what comes in another order cannot all be met."""
    return 1 - find_path(1 - cosines(thin(columns), thin(others)))[0]


LIKENESS: dict[str, Callable[[Tensor, Tensor], float]] = {OVERALL: overall_likeness, EVENTS: events_likeness}


def find_path(cost: Tensor) -> tuple[float, tuple[tuple[int, int], ...]]:
    """(mean cost, cells) of the cheapest way from the first to the last corner of cost [n, m], only forward in both.

    Steps along one side weigh 1 and diagonal ones 2, so that all ways weigh the same, n + m. One anti-diagonal after another, all its cells at once.
    """
    prices = cost.double().numpy()
    rows, columns = prices.shape
    total = np.full((rows + 1, columns + 1), np.inf)
    total[0, 0] = 0
    for sum_of_places in range(2, rows + columns + 1):
        row = np.arange(max(1, sum_of_places - columns), min(rows, sum_of_places - 1) + 1)
        column = sum_of_places - row
        price = prices[row - 1, column - 1]
        straight = np.minimum(total[row - 1, column], total[row, column - 1]) + price
        total[row, column] = np.minimum(straight, total[row - 1, column - 1] + 2 * price)
    return float(total[rows, columns] / (rows + columns)), walk_back(total, prices)


def walk_back(total: np.ndarray, prices: np.ndarray) -> tuple[tuple[int, int], ...]:
    """The cells that the cheapest way passes, in order."""
    row, column = prices.shape
    cells = [(row - 1, column - 1)]
    while row > 1 or column > 1:
        price = prices[row - 1, column - 1]
        ways = {(row - 1, column - 1): 2 * price, (row - 1, column): price, (row, column - 1): price}
        row, column = min(ways, key=lambda place: total[place] + ways[place])
        cells.append((row - 1, column - 1))
    return tuple(reversed(cells))
