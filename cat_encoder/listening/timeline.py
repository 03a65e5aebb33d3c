"""Pictures of what is heard when, and of how two sounds resemble each other moment by moment. Drawn by Pillow."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .compare import Match

NIGHT, DIM, INK, ACCENT, GLOW = (24, 22, 40), (120, 118, 140), (236, 236, 244), (255, 196, 107), (255, 250, 235)
COLD = (58, 110, 190)  # for negative cosines
WIDTH, ROW, MARGIN = 960, 30, 16  # px
NAMES, NUMBERS = 250, 70  # px on the left for names, on the right for numbers
HEAD, AXIS = 48, 44  # px above and below
MAP = 560  # px, the longer side of a similarity map
STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600)  # seconds between marks of an axis
MARKS = 10  # at most on an axis


def draw_timeline(names: Sequence[str], scores: Tensor, times: Tensor, window: float, seconds: float, title: str) -> Tensor:
    """scores [rows, W] in 0..1 of windows that begin at times [W] (seconds) and last `window` -> picture [H, 960, 3] in 0..1.

    Each row is bright where its sound scores high, in proportion to the highest score of the picture; the number on the right is the row's highest.
    """
    height = HEAD + ROW * len(names) + AXIS
    canvas = Image.new("RGB", (WIDTH, height), NIGHT)
    pen = ImageDraw.Draw(canvas)
    left, width = NAMES, WIDTH - NAMES - NUMBERS
    top = float(scores.max()) if scores.numel() else 0.0
    write(pen, (MARGIN, HEAD // 2), title, INK, 18, WIDTH - 2 * MARGIN)
    cells = spread_out(scores.float().cpu().numpy() / max(top, 1e-9), times.cpu().numpy() + window / 2, seconds, width)
    for row, name in enumerate(names):
        y = HEAD + ROW * row
        canvas.paste(colour(np.repeat(cells[row][None], ROW - 4, 0)), (left, y + 2))
        write(pen, (MARGIN, y + ROW // 2), name, INK, 15, NAMES - 2 * MARGIN)
        write(pen, (left + width + 10, y + ROW // 2), f"{float(scores[row].max()):.2f}", DIM, 15, NUMBERS)
    draw_seconds(pen, left, height - AXIS + 4, width, seconds)
    return to_tensor(canvas)


def spread_out(values: np.ndarray, centres: np.ndarray, seconds: float, width: int) -> np.ndarray:
    """values [rows, W] at `centres` [W] -> [rows, width] over 0..seconds: the nearest window of each pixel, the highest where several share one."""
    borders = (centres[1:] + centres[:-1]) / 2
    starts = np.searchsorted(borders, np.arange(width) / width * seconds, side="right")
    return np.maximum.reduceat(values, starts, axis=1)


def draw_similarity(match: Match, title: str) -> Tensor:
    """The clip from left to right against the reference from top to bottom -> picture [H, W, 3] in 0..1, always of one size.

    Bright: alike; dark: not alike; blue: opposite to what usual sounds share. The line is the order of events that fits best.
    """
    canvas = Image.new("RGB", (MAP + NAMES // 2 + NUMBERS, HEAD + MAP + AXIS + ROW), NIGHT)
    pen = ImageDraw.Draw(canvas)
    mine, theirs = match.seconds
    width, height = (max(8, round(MAP * length / max(mine, theirs))) for length in (mine, theirs))
    left, top = NAMES // 2, HEAD
    picture = colour(match.similarity.T.numpy()).resize((width, height), Image.Resampling.NEAREST)  # rows are the reference's time
    canvas.paste(picture, (left, top))
    columns, rows = match.similarity.shape
    if len(match.path) > 1:
        way = [(left + (column + 0.5) / columns * width, top + (row + 0.5) / rows * height) for column, row in match.path]
        pen.line(way, NIGHT, 5)  # so that it is seen on bright cells
        pen.line(way, INK, 2)
    write(pen, (MARGIN, HEAD // 2), title, INK, 18, canvas.width - 2 * MARGIN)
    draw_seconds(pen, left, top + height + 4, width, mine)
    for second in marks(theirs):
        y = top + second / theirs * height
        pen.line([(left - 8, y), (left - 2, y)], DIM)
        pen.text((left - 12, y), f"{second:g} s", DIM, ImageFont.load_default(13), anchor="rm")
    write(pen, (left, top + height + AXIS), "across: the clip; down: the reference", DIM, 14, MAP)
    return to_tensor(canvas)


def draw_seconds(pen: ImageDraw.ImageDraw, left: int, y: int, width: int, seconds: float) -> None:
    """The axis of time below a picture."""
    for second in marks(seconds):
        x = left + second / seconds * width
        pen.line([(x, y - 2), (x, y + 5)], DIM)
        pen.text((x, y + 8), f"{second:g} s", DIM, ImageFont.load_default(13), anchor="ma")


def marks(seconds: float) -> list[float]:
    """Round seconds to be marked on an axis."""
    step = next((step for step in STEPS if seconds / step <= MARKS), STEPS[-1] * math.ceil(seconds / STEPS[-1] / MARKS))
    return [round(index * step, 1) for index in range(int(seconds / step + 1e-6) + 1)]


def colour(values: np.ndarray) -> Image.Image:
    """[h, w] in -1..1 as a picture: 0 is night, 1 glows, -1 is blue."""
    stops = np.array([COLD, NIGHT, ACCENT, GLOW], dtype=np.float32)
    places = np.interp(values, (-1, 0, 0.75, 1), (0, 1, 2, 3))
    lower = np.minimum(places.astype(int), 2)
    part = (places - lower)[..., None]
    return Image.fromarray((stops[lower] * (1 - part) + stops[lower + 1] * part).round().astype(np.uint8))


def write(pen: ImageDraw.ImageDraw, place: tuple[int, int], text: str, ink: tuple[int, int, int], size: int, room: int) -> None:
    """One line, its middle left at `place`, cut with dots where it does not fit into `room` px."""
    font = ImageFont.load_default(size)
    if font.getlength(text) > room:
        while text and font.getlength(text + "...") > room:
            text = text[:-1]
        text += "..."
    pen.text(place, text, ink, font, anchor="lm")


def to_tensor(canvas: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(canvas)).float() / 255
