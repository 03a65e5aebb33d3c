"""What the measurements mean, in words that are the same everywhere: nodes, command line, report."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .face import Array

PLAUSIBLE = "plausible"
SHIFTED = "out of sync by"  # "... 200 ms (sound late)"
UNRELATED = "not in sync"
NO_FACE = "no talking face"
TOO_SHORT = "too short"
NO_VOICE = "no voice"
KINDS = (PLAUSIBLE, SHIFTED, UNRELATED, NO_VOICE, TOO_SHORT, NO_FACE)  # from good to useless
EXIT_CODES = {PLAUSIBLE: 0, SHIFTED: 3, UNRELATED: 4, NO_FACE: 5, TOO_SHORT: 6, NO_VOICE: 7}  # 1 is an error, 2 a wrong command line

MIN_SECONDS = 3.0  # below this, chance decides
GOOD_SECONDS = 5.0  # spec/lipsync.md B.4
MIN_COVERAGE = 0.6  # share of the frames with the face
MIN_WIDTH = 64.0  # pixels of the face
CENTRE, REACH = 45.0, 150.0  # ms: where the peak of sound that is in sync lies (spec/lipsync.md B.3, B.4)
THRESHOLDS = {"motion": 0.22, "syncnet": 3.0}  # motion: spec/lipsync.md B.4; SyncNet: what data sets of talking faces are usually sifted with
# A lag out of the window is claimed with more: chance has more places there. Of foreign sounds 33 % pass 0.22, 4 % pass 0.3 (drawn faces).
SHIFT_THRESHOLDS = {"motion": 0.3, "syncnet": 3.0}


@dataclass(frozen=True)
class Agreement:
    """How well mouth and voice agree when the voice is `lags` ms later than the mouth: `curve`, one value for each lag, the more the better.

    score: what takes of one shot are compared by. peak: the highest point of the curve; lag: its place in ms, positive = sound after mouth.
    """

    score: float
    lag: float
    peak: float
    lags: Array
    curve: Array


def judge(agreement: Agreement, method: str) -> str:
    """The verdict on a face that can be judged at all. method: motion or syncnet."""
    in_time = bool(is_in_time(np.array(agreement.lag)))
    at_the_end = agreement.lag in (agreement.lags[0], agreement.lags[-1])  # no peak, but a slope; SyncNet's border is where unrelated sounds end up
    if at_the_end or agreement.peak < (THRESHOLDS if in_time else SHIFT_THRESHOLDS)[method]:
        return UNRELATED
    if in_time:
        return PLAUSIBLE
    return f"{SHIFTED} {abs(agreement.lag):.0f} ms (sound {'late' if agreement.lag > 0 else 'early'})"


def is_in_time(lags: Array) -> NDArray[np.bool_]:
    """Which lags in ms people take for in sync; sound may be later than lips rather than earlier."""
    return np.abs(lags - CENTRE) <= REACH


def kind_of(verdict: str) -> str:
    """One of KINDS."""
    return SHIFTED if allows_shift(verdict) else verdict


def allows_shift(verdict: str) -> bool:
    """Whether the verdict says that shifting the sound repairs the clip."""
    return verdict.startswith(SHIFTED)
