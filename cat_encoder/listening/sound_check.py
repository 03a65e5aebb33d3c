"""Whether a clip has the sounds that are wanted and none that are not, judged by rank and margin over its other labels (spec/cat.md 11, N2).

Labels differ in how high they score on anything: so each must also rise over what it scores on sounds made by rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ear import OnStep
from ..errors import CatError
from .aliases import NamedSound, Vocabulary, families
from .steps import piece
from .yardsticks import RATE, make_yardsticks, match_level

WINDOW, HOP = 2.0, 1.0  # seconds
RANKS = (30.0, 3.0)  # how far down a label still counts as heard, at strictness 0 and 1
MARGINS = (2.0, 4.0)  # spreads above the middle label; the highest of 527 values of a bell curve lies 3 above
RISES = (0.5, 1.5)  # log-odds over what the label scores on sounds made by rule
FAINT = 1e-3  # loudness of near silence, one of these sounds
SHARE = 0.1  # of all labels: heads with few labels have no 30 that stand out
SPREAD = 0.5  # log-odds: the least, where a head gives almost the same to all
STEEPNESS = 1.5  # of the way from absent (0) over the border (0.5) to certain (1)
HEARD = 0.5
TINY = 1e-9  # scores are probabilities; 0 and 1 have no log-odds


@dataclass(frozen=True)
class Presence:
    """How much one named sound stands out of a clip, window by window."""

    sound: NamedSound
    wanted: bool
    strength: float  # 0..1 in its best window; 0.5 = the border of being heard
    rank: int  # among all labels there, 1 = the strongest
    label: str  # of the sound's labels the strongest there
    at: float  # seconds, the middle of that window
    spans: tuple[tuple[float, float], ...]  # seconds where it is heard

    @property
    def heard(self) -> bool:
        return self.strength >= HEARD


@dataclass(frozen=True)
class SoundCheck:
    """The verdict on one clip. `score` 0..1 is for comparing takes; it is no probability."""

    score: float
    passed: bool
    found: tuple[Presence, ...]
    remarks: tuple[str, ...]  # what could not be checked, and why

    def __str__(self) -> str:
        lines = [f"{'passed' if self.passed else 'not passed'}, score {self.score:.2f}", *map(describe, self.found), *self.remarks]
        return "\n".join(lines)


@dataclass(frozen=True)
class Wish:
    """What is wanted and unwanted, in the words of one classifier."""

    wanted: tuple[NamedSound, ...]
    unwanted: tuple[NamedSound, ...]
    remarks: tuple[str, ...]
    unread: bool  # something is wanted, but none of its words is known


def check_sound(
    encoder: Any, waveform: Tensor, sample_rate: int, wanted: str, unwanted: str = "", strictness: float = 0.5, on_step: OnStep | None = None
) -> list[SoundCheck]:
    """One verdict per clip of `waveform` [B,C,S].

    wanted, unwanted: sounds in words, separated by commas; 'no music' among the wanted is unwanted music. strictness 0..1.
    CatError when the encoder has no head, or nothing is named.
    """
    wish = read_wish(Vocabulary(encoder.labels), wanted, unwanted)
    usual, checks = usual_odds(encoder), []
    for index, clip in enumerate(waveform):
        scores, times = encoder.scores_over_time(clip[None], sample_rate, window=WINDOW, hop=HOP, on_step=piece(on_step, index, len(waveform)))
        checks.append(judge(scores[0], times, encoder.labels, wish, strictness, clip.shape[-1] / sample_rate, usual))
    return checks


def usual_odds(encoder: Any) -> Tensor:
    """[classes]: what each label scores on sounds made by rule, the middle of noise, tones, knocks and near silence."""
    sounds = make_yardsticks(WINDOW)
    scores, _ = encoder.scores_over_time(torch.cat([sounds, match_level(sounds[:1], FAINT)]), RATE, window=WINDOW, hop=WINDOW)
    return middle_odds(scores[:, 0])


def middle_odds(scores: Tensor) -> Tensor:
    """scores [n, classes] -> [classes] log-odds."""
    return to_odds(scores).median(0).values


def to_odds(scores: Tensor) -> Tensor:
    return torch.logit(scores.double().cpu(), TINY)


def read_wish(vocabulary: Vocabulary, wanted: str, unwanted: str) -> Wish:
    """The sounds of both texts. CatError when both are blank."""
    if not wanted.strip() and not unwanted.strip():
        raise CatError("There is nothing to listen for: name sounds that are wanted or unwanted, such as 'dog barking, rain'.")
    asked, refused = vocabulary.read(wanted), vocabulary.read(unwanted)
    good = tuple(sound for sound in asked.sounds if not sound.negated)
    bad = refused.sounds + tuple(sound for sound in asked.sounds if sound.negated)
    kept = tuple(sound for sound in bad if not (also := part_of(sound, good)))
    remarks = [f"not counted: {sound.words}, because {also.words} is wanted, which is {sound.words} too" for sound in bad if (also := part_of(sound, good))]
    remarks += [f"not known as a sound: {words}{vocabulary.suggest(words)}" for words in dict.fromkeys(asked.unknown + refused.unknown)]
    return Wish(good, kept, tuple(remarks), bool(wanted.strip()) and not asked.sounds)


def part_of(unwanted: NamedSound, wanted: Sequence[NamedSound]) -> NamedSound | None:
    """The wanted sound that is always heard as the unwanted one too: a piano is music."""
    covered = set(unwanted.labels).union(*(families().get(label, ()) for label in unwanted.labels))
    return next((sound for sound in wanted if covered.issuperset(sound.labels)), None)


def judge(scores: Tensor, times: Tensor, labels: Sequence[str], wish: Wish, strictness: float, seconds: float, usual: Tensor) -> SoundCheck:
    """The verdict on one clip: scores [W, classes] in 0..1, times [W] where windows begin, in seconds; `seconds` the clip's length; usual as of `usual_odds`."""
    table = [(sound, True) for sound in wish.wanted] + [(sound, False) for sound in wish.unwanted]
    ends = [(float(start), min(float(start) + WINDOW, seconds)) for start in times]
    found = tuple(find_presence(scores, ends, labels, sound, wanted, strictness, usual) for sound, wanted in table)
    good = [item.strength for item in found if item.wanted]
    worst = max((item.strength for item in found if not item.wanted), default=0.0)
    score = (sum(good) / len(good) if good else 1.0) * (1 - worst) if found else 0.0
    passed = bool(found) and not wish.unread and all(item.heard == item.wanted for item in found)
    return SoundCheck(score, passed, found, wish.remarks)


def find_presence(
    scores: Tensor, windows: Sequence[tuple[float, float]], labels: Sequence[str], sound: NamedSound, wanted: bool, strictness: float, usual: Tensor
) -> Presence:
    mine = [place for place, label in enumerate(labels) if label in sound.labels]
    strength, ranks, which = stand_out(scores, mine, strictness, usual)
    best = int(strength.argmax())
    spans = join_spans(windows, (strength >= HEARD).tolist())
    return Presence(sound, wanted, float(strength[best]), int(ranks[best]), labels[mine[which[best]]], sum(windows[best]) / 2, spans)


def stand_out(scores: Tensor, mine: Sequence[int], strictness: float, usual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How much one of the labels at the places `mine` stands out of scores [W, classes]: ([W] strength in 0..1, [W] rank, [W] which of `mine` it is).

    Scores of AudioSet classifiers are not calibrated and differ between labels and clips, so none is compared with a fixed number: a sound is heard
    (0.5 and more) when few other labels are above it, when it lies clear of the middle one, counted in the spread of the labels of its window,
    and when it scores more than it does on anything: usual [classes], as of `usual_odds`.
    """
    odds, members = to_odds(scores), torch.tensor(mine)
    classes = odds.shape[1]
    if len(mine) == classes:
        raise CatError(f"All {classes} labels of this encoder are named as one sound: there is nothing to compare it with. Name fewer.")
    own = odds[:, members]  # [W, members]
    others = odds[:, ~torch.isin(torch.arange(classes), members)]
    ranks = 1 + (others[:, None] > own[..., None]).sum(-1)
    middle = others.median(1, keepdim=True).values
    spread = 1.4826 * (others - middle).abs().median(1, keepdim=True).values  # as the standard deviation of a bell curve, but deaf to the few that stand out
    margin = (own - middle) / spread.clamp_min(SPREAD)
    deepest = min(RANKS[0] * (RANKS[1] / RANKS[0]) ** strictness, max(SHARE * classes, 2.0))
    least, rise = (low + strictness * (high - low) for low, high in (MARGINS, RISES))
    evidence = torch.stack([torch.log(deepest / ranks), margin - least, own - usual[members] - rise]).amin(0)  # all three have to hold
    strength, which = torch.sigmoid(STEEPNESS * evidence).max(1)
    return strength, ranks.gather(1, which[:, None])[:, 0], which


def join_spans(windows: Sequence[tuple[float, float]], heard: Sequence[bool]) -> tuple[tuple[float, float], ...]:
    """The windows that are heard, overlapping ones joined."""
    spans: list[tuple[float, float]] = []
    for (start, end), true in zip(windows, heard, strict=True):
        if true and spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], end)
        elif true:
            spans.append((start, end))
    return tuple(spans)


def describe(item: Presence) -> str:
    """One line of the report."""
    words = item.sound.words if item.label.lower() == item.sound.words else f"{item.sound.words} ({item.label})"
    if item.heard:
        when = ", ".join(f"{start:.1f}-{end:.1f} s" for start, end in item.spans)
        return f"{'heard' if item.wanted else 'unwanted'}: {words} at {when}, rank {item.rank}"
    return f"{'missing' if item.wanted else 'not heard, as wished'}: {words}, nearest at {item.at:.1f} s, rank {item.rank}"
