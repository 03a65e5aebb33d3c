"""A photo that speaks: its lower lip follows a known opening curve, and a voice of formants has the same curve as loudness."""

from functools import lru_cache

import numpy as np
import torch
from PIL import Image

FPS = 24.0
SECONDS = 8.0
GAP = 40, 15, 15  # colour of the open mouth


def opening_curve(times, seed):
    """0..1, about four syllables a second, closed about a third of the time."""
    random = np.random.default_rng(seed)
    waves = sum(random.normal() * np.sin(2 * np.pi * rate * times + random.uniform(0, 2 * np.pi)) for rate in np.arange(1.0, 6.0, 0.25))
    return np.clip(0.3 + 0.25 * waves, 0, 1)


@lru_cache(maxsize=4)
def buzz(seconds, rate):
    """A tone of 120 Hz and its overtones, through formants."""
    times = np.arange(int(seconds * rate)) / rate
    tones = (n * 120 for n in range(1, 34))
    return 0.1 * sum(sum(np.exp(-(((tone - formant) / 250) ** 2)) for formant in (700, 1220, 2600)) * np.sin(2 * np.pi * tone * times + tone) for tone in tones)


@lru_cache(maxsize=64)
def voice(seed, late=0.0, seconds=SECONDS, rate=48000):
    """[1,S] float32: a buzz whose loudness follows the curve, `late` seconds after it."""
    coarse = np.arange(int(seconds * 500) + 2) / 500
    loudness = np.interp(np.arange(int(seconds * rate)) / rate, coarse, opening_curve(coarse - late, seed))
    return torch.from_numpy(buzz(seconds, rate) * loudness).float()[None]


def read_photo(path, size=None):
    """A picture file as uint8 [H,W,3], resized to (width, height)."""
    picture = Image.open(path).convert("RGB")
    return np.array(picture.resize(size) if size else picture)


def speaking_photo(photo, points, opening):
    """The photo (uint8 [H,W,3]) with its lower lip `opening` pixels lower; points [478,2] are the photo's own."""
    left, right = points[61], points[291]
    middle, chin = points[[13, 14]].mean(axis=0), points[152]
    rows, columns = np.mgrid[: photo.shape[0], : photo.shape[1]].astype(np.float32)
    across = np.clip(1 - ((columns - middle[0]) / (0.55 * (right[0] - left[0]))) ** 2, 0, 1)
    drop = opening * across
    line = middle[1] + (columns - middle[0]) * (right[1] - left[1]) / (right[0] - left[0])  # the lips' line, as the head is tilted
    fading = np.clip(1 - (rows - line - drop) / (1.3 * (chin[1] - middle[1])), 0, 1)
    source = np.clip(rows - np.where(rows > line, drop * fading, 0), 0, photo.shape[0] - 1).round().astype(int)
    moved = photo[source, columns.astype(int)]
    moved[(rows > line) & (rows < line + drop)] = GAP
    return moved


def puppet(photo, points, seed, fps=FPS, reach=0.12):
    """(seconds, frame) after one another; the mouth opens up to `reach` of the face's height."""
    height = points[152, 1] - points[10, 1]
    for number in range(int(SECONDS * fps) + 1):
        yield number / fps, speaking_photo(photo, points, reach * height * opening_curve(np.array(number / fps), seed))


# ---------------------------------------------------------------- faces without a photo

MOUTH = {"corners": (78, 308), "upper": (82, 13, 312), "lower": (87, 14, 317)}


def drawn_face(opening, x=300.0, y=180.0, width=150.0):
    """[478,2]: a face around (x, y) whose inner lips are `opening` apart, in widths of the mouth; the mouth is a third of the face wide."""
    points = np.tile([[0.0, 0.05]], (478, 1))
    places = {234: (-0.5, -0.1), 454: (0.5, -0.1), 10: (0, -0.65), 152: (0, 0.7), 33: (-0.3, -0.2), 263: (0.3, -0.2), 1: (0, 0.05)}
    places |= {61: (-0.2, 0.35), 291: (0.2, 0.35), 78: (-1 / 6, 0.35), 308: (1 / 6, 0.35), 0: (0, 0.28 - opening / 8), 17: (0, 0.42 + opening / 8)}
    for upper, lower, across in zip(MOUTH["upper"], MOUTH["lower"], (-0.08, 0, 0.08), strict=True):
        places |= {upper: (across, 0.35 - opening / 6), lower: (across, 0.35 + opening / 6)}
    for number, place in places.items():
        points[number] = place
    return points * width + (x, y)


def drawn_film(seed, fps=FPS, seconds=SECONDS, **placing):
    """(frames of a grey film of 640x360, landmarks [F,478,2]) of a drawn face that follows the curve of `voice(seed)`."""
    times = np.arange(int(seconds * fps) + 1) / fps
    grey = np.full((360, 640, 3), 90, np.uint8)
    return [(float(time), grey) for time in times], np.stack([drawn_face(0.5 * opening, **placing) for opening in opening_curve(times, seed)])
