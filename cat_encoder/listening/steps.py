"""Progress of work that is made of several pieces, each of which reports its own."""

from __future__ import annotations

from ..ear import OnStep

FINE = 1000  # steps of one piece


def piece(on_step: OnStep | None, index: int, pieces: int) -> OnStep | None:
    """What piece `index` of `pieces` equal ones reports to: (done, total) of the piece become those of the whole. None for nobody who listens."""
    if on_step is None:
        return None
    return lambda done, total: on_step(index * FINE + FINE * done // max(total, 1), pieces * FINE)
