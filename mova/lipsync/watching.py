"""One pass over a film: what every person's mouth did, and where the face was."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from ..errors import InputError
from .face import Array, face_box, is_facing, lip_height, mouth_opening
from .film import TimedFrame
from .landmarks import Landmarks

PORTRAIT = 192  # px, side of the picture kept of a person
MARGIN = 0.25  # of the face's longer side, around it

OnFrame = Callable[[int, int], None]


@dataclass
class Watched:
    """A person through a film of F frames; NaN in frames where the face is not seen, or is seen from the side."""

    opening: list[float]
    height: list[float]
    boxes: list[Array]  # each [4], x0 y0 x1 y1 in pixels
    portrait: Image.Image | None = None  # where the mouth is widest open
    turned: int = 0  # frames in which the face is seen from the side

    @property
    def coverage(self) -> float:
        """Share of the frames with the face."""
        return float(np.isfinite(self.opening).mean())

    @property
    def width(self) -> float:
        """Of the face in pixels, the median; 0 for a face never seen."""
        boxes = np.array(self.boxes)
        seen = np.isfinite(boxes[:, 0])
        return float(np.median(boxes[seen, 2] - boxes[seen, 0])) if seen.any() else 0.0

    def note(self, points: Array, frame: Array) -> None:
        """The next frame (uint8 [H,W,3]) and the landmarks [478,2] in it."""
        seen = bool(np.isfinite(points).all())
        facing = seen and is_facing(points)
        self.turned += seen and not facing
        opening = mouth_opening(points) if facing else np.nan
        if facing and not opening <= np.nanmax([*self.opening, -1.0]):
            self.portrait = cut_portrait(points, frame)
        self.opening.append(opening)
        self.height.append(lip_height(points) if facing else np.nan)
        self.boxes.append(face_box(points) if facing else np.full(4, np.nan))


@dataclass
class Watching:
    """What was seen in a film: the time of every frame in seconds, its size, and the persons in the order of their appearance."""

    times: list[float] = field(default_factory=list)
    persons: list[Watched] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """How long the film lasts; its last frame as long as the one before."""
        return self.times[-1] - self.times[0] + (self.times[-1] - self.times[-2] if len(self.times) > 1 else 0.0)


def watch_faces(film: Iterable[TimedFrame], landmarks: Landmarks, on_frame: OnFrame | None = None) -> Watching:
    """Looks at each frame once and keeps none. on_frame(done, total) is called for each, total 0 = not known. InputError for a film without frames, or with times that do not rise."""
    watching, total = Watching(), len(film) if hasattr(film, "__len__") else 0
    landmarks.begin()
    for seconds, frame in film:
        if watching.times and not seconds > watching.times[-1]:
            raise InputError(
                f"A frame at {seconds:g} s comes after one at {watching.times[-1]:g} s: the times must rise. The film is damaged; export it again."
            )
        before = len(watching.times)
        for number, points in enumerate(landmarks.landmarks(frame)):
            if number == len(watching.persons):
                watching.persons.append(Watched([np.nan] * before, [np.nan] * before, [np.full(4, np.nan)] * before))
            watching.persons[number].note(points, frame)
        watching.times.append(seconds)
        if on_frame:
            on_frame(len(watching.times), total)
    if not watching.times:
        raise InputError("There are no frames: a film is needed.")
    return watching


def cut_portrait(points: Array, frame: Array) -> Image.Image:
    """The face with a margin, at most 192x192."""
    x0, y0, x1, y1 = face_box(points)
    half = (0.5 + MARGIN) * max(x1 - x0, y1 - y0)
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    height, width, _ = frame.shape
    left, right = (int(np.clip(side, 0, width - 1)) for side in (x - half, x + half))
    top, bottom = (int(np.clip(side, 0, height - 1)) for side in (y - half, y + half))
    portrait = Image.fromarray(frame[top : bottom + 1, left : right + 1])
    portrait.thumbnail((PORTRAIT, PORTRAIT))
    return portrait
