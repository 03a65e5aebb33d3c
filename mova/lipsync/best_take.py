"""Several takes of one shot: what each is worth, which is the best, and all of them on one sheet."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from .face import Array
from .plot import INK, LINE, PALE, PAPER, TEXT, write
from .report import Report
from .verdict import KINDS, PLAUSIBLE, kind_of

FULL_SCORE = {"motion": 0.6, "syncnet": 10.0}  # what very good takes reach: 1 on the scale on which takes are compared
CELL = 320  # px, the width of a take on the sheet
GAP = 12  # px
LINES, LEADING = 3, TEXT + 4  # below each take, and px from one to the next


@dataclass(frozen=True)
class Take:
    """One take. sync and sound are 0..1, None = not asked; picture is its first frame, uint8 [H,W,3]."""

    seed: int | None
    picture: Array
    verdict: str | None = None
    lag_ms: float = 0.0
    sync: float | None = None
    sound: float | None = None
    remarks: tuple[str, ...] = ()  # what was not judged, and why

    def total(self, sound_share: float) -> float:
        """0..1: the share of the sound, and the rest of the lips; all of one where only that was asked. A tie at 0 where nothing was."""
        if self.sync is None or self.sound is None:
            return self.sync or self.sound or 0.0
        return (1 - sound_share) * self.sync + sound_share * self.sound


def rate_sync(report: Report) -> float:
    """A report's score on a scale of 0..1 for comparing takes. Below a plausible take is every take out of sync, below that every one that could not be judged."""
    share = min(max(report.score / FULL_SCORE[report.method], 0.0), 1.0)
    kind = kind_of(report.verdict)
    if kind == PLAUSIBLE:
        return 0.5 + 0.5 * share
    return 0.5 * share if KINDS.index(kind) <= 2 else 0.0


def describe_takes(takes: list[Take], best: int, sound_share: float) -> str:
    """All scores as JSON, takes numbered from 1, and in `notes` what was not judged."""
    rows = [
        {"take": number, "seed": take.seed, "total": tidy(take.total(sound_share)), "lip_sync": tidy(take.sync), "verdict": take.verdict}
        | {"lag_ms": tidy(take.lag_ms, 1), "sound": tidy(take.sound)}
        for number, take in enumerate(takes, 1)
    ]
    return json.dumps({"best": best + 1, "takes": rows, "notes": gather_remarks(takes)}, indent=2)


def gather_remarks(takes: list[Take]) -> list[str]:
    """The remarks on all takes, each once."""
    return list(dict.fromkeys(remark for take in takes for remark in take.remarks))


def tidy(value: float | None, digits: int = 4) -> float | None:
    return None if value is None else round(value, digits)


def draw_sheet(takes: list[Take], best: int, sound_share: float) -> Image.Image:
    """The contact sheet: first frame, score and seed of each take, the best one framed."""
    columns = math.ceil(math.sqrt(len(takes)))
    rows = math.ceil(len(takes) / columns)
    height = max(round(CELL * take.picture.shape[0] / take.picture.shape[1]) for take in takes)
    cell_height = height + LINES * LEADING + GAP
    sheet = Image.new("RGB", (columns * (CELL + GAP) + GAP, rows * (cell_height + GAP) + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, take in enumerate(takes):
        left, top = GAP + number % columns * (CELL + GAP), GAP + number // columns * (cell_height + GAP)
        shown = Image.fromarray(np.ascontiguousarray(take.picture))
        shown = shown.resize((CELL, max(round(CELL * shown.height / shown.width), 1)))
        sheet.paste(shown, (left, top))
        chosen = number == best
        if chosen:
            draw.rectangle([left - 4, top - 4, left + CELL + 3, top + cell_height], outline=LINE, width=4)
        for row, text in enumerate(captions(number, take, sound_share)):
            write(draw, (left + 4, top + height + 6 + row * LEADING), text, TEXT, PALE if row else LINE if chosen else INK)
    return sheet


def captions(number: int, take: Take, sound_share: float) -> tuple[str, str, str]:
    """Number and scores, verdict, seed: lines of their own, as a random seed has 20 digits."""
    parts = {"lips": take.sync, "sound": take.sound}
    told = ", ".join(f"{name} {score:.2f}" for name, score in parts.items() if score is not None)
    seed = "" if take.seed is None else f"seed {take.seed}"
    return f"{number + 1}:  {take.total(sound_share):.2f}{f'   ({told})' if told else ''}", take.verdict or "lips not checked", seed
