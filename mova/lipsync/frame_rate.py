"""Films of any frame rate at SyncNet's 25 frames per second, frame by frame (spec/lipsync.md A.2)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import count
from typing import TypeVar

from ..errors import InputError

FPS = 25

T = TypeVar("T")


def frame_times(fps: float) -> Iterator[float]:
    """The seconds at which frames of a film of constant rate are shown: 0, 1/fps, 2/fps, ... without end. InputError unless fps is a positive number."""
    if not (math.isfinite(fps) and fps > 0):
        raise InputError(
            f"The frame rate is {fps:g} per second: a number above 0 is needed. Wire it from the node that made the clip, or read it from the file."
        )
    return (number / fps for number in count())


def to_25_fps(frames: Iterable[T], times: Iterable[float]) -> Iterator[T]:
    """The frame that is nearest to 0, 0.04, 0.08, ... seconds, as long as the film lasts. Two frames are held, whatever the length.

    times: seconds on the clock of the sound, one for each frame and rising (more may follow, see `frame_times`). The last frame lasts as long as the one
    before it. The frames may be anything that belongs to a frame, such as its face box.
    """
    shown, lasting, clock = 0, 1 / FPS, iter(times)
    before: tuple[float, T] | None = None
    for number, frame in enumerate(frames):
        time = next(clock, math.nan)
        if not math.isfinite(time) or (before is not None and time <= before[0]):
            earlier = "" if before is None else f", the one before at {before[0]:g} s"
            raise InputError(
                f"Frame {number} is at {time:g} s{earlier}: every frame needs a time, and times must rise. If the film is damaged, export it again."
            )
        if before is not None:
            lasting = time - before[0]
            while shown / FPS < (before[0] + time) / 2:
                yield before[1]
                shown += 1
        before = time, frame
    while before is not None and (shown + 0.5) / FPS < before[0] + lasting:
        yield before[1]
        shown += 1
