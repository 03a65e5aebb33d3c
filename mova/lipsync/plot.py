"""The picture of a lip-sync report: mouth and voice over time, agreement over lag, and the face that was judged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..media import choose_format, new_file
from .face import Array
from .report import Face, Report
from .verdict import CENTRE, REACH, SHIFT_THRESHOLDS, THRESHOLDS

PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
SIZE = 960, 540
PAPER, INK, PALE, BAND = "#1b1d22", "#e8e8e8", "#8a8f98", "#2b3a34"
MOUTH, VOICE, LINE = "#ff9f6b", "#6bb8ff", "#7fd99a"
TEXT, TITLE = 15, 24  # px
TIME_PANEL = 60, 110, 930, 300  # left, top, right, bottom in px
LAG_PANEL = 60, 360, 690, 500
FACE_PANEL = 730, 340, 930, 500

Panel = tuple[int, int, int, int]


def draw_report(report: Report) -> Image.Image:
    """A picture of 960x540, whatever was found."""
    picture = Image.new("RGB", SIZE, PAPER)
    draw = ImageDraw.Draw(picture)
    write(draw, (30, 20), headline(report), TITLE)
    write(draw, (30, 56), subtitle(report), TEXT, PALE)
    shown = shown_face(report)
    draw_time(draw, report, shown)
    draw_lag(draw, report)
    if shown and shown.portrait:
        paste_face(picture, shown.portrait)
    return picture


def shown_face(report: Report) -> Face | None:
    """The speaking face; where none could be judged, the one that is seen most."""
    return report.face or max(report.faces, key=lambda face: face.coverage, default=None)


def check_plot(path: Path) -> None:
    """MediaError when a picture is not written under such a name: asked before the work, not after it."""
    choose_format(path, PICTURES, "picture")


def save_plot(report: Report, path: Path) -> None:
    """Writes the picture whole or not at all. MediaError."""
    with new_file(path) as temporary:
        draw_report(report).save(temporary, choose_format(path, PICTURES, "picture"))


def headline(report: Report) -> str:
    return f"{report.verdict[:1].upper()}{report.verdict[1:]}"


def subtitle(report: Report) -> str:
    if not report.face:
        return report.notes[0] if report.notes else ""
    among = f", face {report.speaker + 1} of {len(report.faces)}" if len(report.faces) > 1 else ""
    name = {"motion": "motion score", "syncnet": "SyncNet confidence"}[report.method]
    return f"{name} {report.score:.2f}, lag {report.lag_ms:+.0f} ms, face in {report.face.coverage:.0%} of {report.frames} frames{among}"


def draw_time(draw: ImageDraw.ImageDraw, report: Report, shown: Face | None) -> None:
    """Opening of the mouth and loudness of the voice, each in its own unit, over the time of the picture."""
    frame(draw, TIME_PANEL)
    times = np.array(report.times)
    span = (times[0], max(times[-1], times[0] + 0.04))
    middles = np.arange(len(report.envelope)) / 100 + 0.0125
    heard = (middles >= span[0]) & (middles <= span[1])
    if heard.any():
        draw_curve(draw, TIME_PANEL, span, middles[heard], unit_scale(report.envelope[heard]), VOICE)
    if shown:
        draw_curve(draw, TIME_PANEL, span, times, unit_scale(shown.opening), MOUTH)
    left, top, right, bottom = TIME_PANEL
    write(draw, (left, top - 22), "mouth opening", TEXT, MOUTH)
    write(draw, (left + 130, top - 22), "voice, dB", TEXT, VOICE)
    for second in range(int(np.ceil(span[0])), int(span[1]) + 1, max(int(span[1] - span[0]) // 10, 1)):
        x = left + (second - span[0]) / (span[1] - span[0]) * (right - left)
        draw.line([(x, bottom), (x, bottom + 5)], fill=PALE)
        write(draw, (x - 4, bottom + 6), f"{second} s", TEXT, PALE)


def draw_lag(draw: ImageDraw.ImageDraw, report: Report) -> None:
    """Agreement by lag; the band is where sound that is in sync lies, the line across is what a verdict needs, more out of the band than in it."""
    agreement = report.face.agreement if report.face else None
    frame(draw, LAG_PANEL)
    left, top, right, bottom = LAG_PANEL
    if agreement is None:
        write(draw, (left + 12, top + 12), "no lag can be measured", TEXT, PALE)
        return
    span, inside, outside = (agreement.lags[0], agreement.lags[-1]), THRESHOLDS[report.method], SHIFT_THRESHOLDS[report.method]
    low, high = min(agreement.curve.min(), 0.0), max(agreement.curve.max(), outside) * 1.1
    x0, x1 = (left + (edge - span[0]) / (span[1] - span[0]) * (right - left) for edge in (CENTRE - REACH, CENTRE + REACH))
    draw.rectangle([x0, top + 1, x1, bottom - 1], fill=BAND)
    low_line, high_line = (bottom - (threshold - low) / (high - low) * (bottom - top) for threshold in (inside, outside))
    draw.line([(left, high_line), (x0, high_line), (x0, low_line), (x1, low_line), (x1, high_line), (right, high_line)], fill=PALE)
    draw_curve(draw, LAG_PANEL, span, agreement.lags, (agreement.curve - low) / (high - low), LINE)
    write(draw, (left, top - 22), "agreement by lag (left: sound early, right: sound late)", TEXT, LINE)
    for lag in (span[0], 0, span[1]):
        x = left + (lag - span[0]) / (span[1] - span[0]) * (right - left)
        write(draw, (x - 20, bottom + 6), f"{lag:+.0f} ms" if lag else "0 ms", TEXT, PALE)


def draw_curve(draw: ImageDraw.ImageDraw, panel: Panel, span: tuple[float, float], x: Array, y: Array, colour: str) -> None:
    """Values 0..1 over x; breaks where they are NaN."""
    left, top, right, bottom = panel
    across = left + (x - span[0]) / (span[1] - span[0]) * (right - left)
    up = bottom - np.clip(y, 0, 1) * (bottom - top)
    known = np.isfinite(up)
    for stretch in np.split(np.arange(len(x)), np.flatnonzero(np.diff(known)) + 1):
        if known[stretch[0]]:
            draw.line([(float(across[i]), float(up[i])) for i in stretch], fill=colour, width=2)


def unit_scale(values: Array) -> Array:
    """From 0.05 at the smallest to 0.95 at the largest; the middle when all are the same, NaN where they are NaN."""
    known = values[np.isfinite(values)]
    if not len(known) or np.ptp(known) < 1e-9:
        return np.where(np.isfinite(values), 0.5, np.nan)
    return 0.05 + 0.9 * (values - known.min()) / np.ptp(known)


def paste_face(picture: Image.Image, portrait: Image.Image) -> None:
    left, top, right, bottom = FACE_PANEL
    fitted = portrait.copy()
    fitted.thumbnail((right - left, bottom - top))
    picture.paste(fitted, (right - fitted.width, bottom - fitted.height))


def frame(draw: ImageDraw.ImageDraw, panel: Panel) -> None:
    draw.rectangle(panel, outline=PALE)


def write(draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, size: int, colour: str = INK) -> None:
    draw.text(place, text, fill=colour, font=ImageFont.load_default(size))
