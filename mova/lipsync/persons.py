"""Persons in a film: each is looked for where it was, and new ones are looked for in the whole frame and in tiles (spec/lipsync.md C.5, C.6)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from .face import NOSE, POINTS, Array, face_box, face_width

SEARCH_EVERY = 6  # frames, a quarter of a second: how often the whole frame is searched
FORGET = 12  # frames; where a person was not seen for longer, only the search looks
CROP = 2.0  # side of the square around a face, in its longer side
LOOSE = 0.15  # sides of its square that a face may move before the square follows
SAME = 0.3  # face widths between the noses of one and the same face
MOVED = 1.0  # face widths that a person may move between two sightings
TILES = 1.0, 0.5  # sides of the square tiles, in the shorter side of the frame; smaller ones find faces that are none
PERSONS = 12  # followed at most

Detect = Callable[[Array], Array]
Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in whole pixels


@dataclass
class Person:
    """Where somebody was seen last: landmarks [478,2], the square that is looked at for them, frames since then."""

    face: Array
    square: Box
    unseen: int = 0


class PersonTracker:
    """Binds faces to persons by position. Both calls find the faces of one picture: uint8 [h,w,3] -> [faces,478,2] in its pixels.

    `follow` looks where a face is known to be; `discover` looks everywhere and has to be sure, since it sees far more that is no face.
    """

    def __init__(self, follow: Detect, discover: Detect) -> None:
        self.follow, self.discover = follow, discover
        self.begin()

    def begin(self) -> None:
        """Nobody is known: the next frame is the first of a film."""
        self.persons: list[Person] = []
        self.frames = 0

    def landmarks(self, frame: Array) -> Array:
        """The faces of the next frame: [persons,478,2] in pixels, NaN for a person not seen; a person keeps its row."""
        found: dict[int, Array] = {}
        for number, person in enumerate(self.persons):
            if person.unseen <= FORGET:
                face = nearest(look(self.follow, frame, person.square), person.face)
                if face is not None and not is_among(face, found.values()):
                    found[number] = face
        if self.frames % SEARCH_EVERY == 0:
            for person in self.search(frame):
                self.recognise(found, person)
        self.frames += 1
        rows = np.full((len(self.persons), POINTS, 2), np.nan)
        for number, person in enumerate(self.persons):
            person.unseen += 1
            if number in found:
                rows[number] = person.face = found[number]
                person.square, person.unseen = keep_square(person.square, square_around(person.face, frame)), 0
        return rows

    def recognise(self, found: dict[int, Array], seen: Person) -> None:
        """Somebody the search has seen is the nearest person who is missing, or somebody new."""
        if is_among(seen.face, found.values()):
            return
        missing = [number for number, person in enumerate(self.persons) if number not in found and gap(seen.face, person.face) <= MOVED]
        if missing:
            found[min(missing, key=lambda number: gap(seen.face, self.persons[number].face))] = seen.face
        elif len(self.persons) < PERSONS:
            found[len(self.persons)] = seen.face
            self.persons.append(seen)

    def search(self, frame: Array) -> list[Person]:
        """Everybody in the frame once: the whole frame and tiles of its shorter side; smaller tiles when those show nobody."""
        height, width, _ = frame.shape
        seen = self.add_seen([], frame, (0, 0, width, height))
        for share in TILES:
            if share == TILES[0] or not seen:
                for box in tile_boxes(height, width, max(int(min(height, width) * share), 1)):
                    seen = self.add_seen(seen, frame, box)
        return seen

    def add_seen(self, seen: list[Person], frame: Array, box: Box) -> list[Person]:
        """`seen` and who else is in the box. A tile's edge may cut a face, so each counts as it is seen in the square around it."""
        for face in look(self.discover, frame, box):
            if not is_among(face, (person.face for person in seen)):
                square = square_around(face, frame)
                again = nearest(look(self.discover, frame, square), face)
                if again is not None and not is_among(again, (person.face for person in seen)):
                    seen = [*seen, Person(again, square)]
        return seen


def look(detect: Detect, frame: Array, box: Box) -> Array:
    """The faces in a part of the frame, in pixels of the frame."""
    x0, y0, x1, y1 = box
    return detect(frame[y0:y1, x0:x1]) + np.array([x0, y0])


def tile_boxes(height: int, width: int, side: int) -> Iterator[Box]:
    """Square tiles over a frame, overlapping by half at least."""
    rows, columns = (np.linspace(0, length - side, -(-(length - side) * 2 // side) + 1).astype(int) for length in (height, width))
    for y in rows:
        for x in columns:
            if (height, width) != (side, side):  # one tile as large as the frame has been looked at
                yield int(x), int(y), int(x) + side, int(y) + side


def square_around(face: Array, frame: Array) -> Box:
    """A square twice as large as the face with the face in its middle, moved and cut to lie in the frame."""
    x0, y0, x1, y1 = face_box(face)
    height, width, _ = frame.shape
    side = max(int(CROP * max(x1 - x0, y1 - y0)), 8)
    left, top = (int(np.clip((low + high - side) / 2, 0, max(length - side, 0))) for low, high, length in ((x0, x1, width), (y0, y1, height)))
    return left, top, min(left + side, width), min(top + side, height)


def keep_square(old: Box, new: Box) -> Box:
    """The old square until the face has left its middle: landmarks tremble when the square does."""
    return new if max(abs(a - b) for a, b in zip(old, new, strict=True)) > LOOSE * (new[2] - new[0]) else old


def gap(face: Array, other: Array) -> float:
    """Between the noses, in widths of the wider face."""
    return float(np.linalg.norm(face[NOSE] - other[NOSE]) / max(face_width(face), face_width(other), 1e-6))


def is_among(face: Array, others: Iterable[Array]) -> bool:
    """Whether it is one of these faces, seen once more."""
    return any(gap(face, other) < SAME for other in others)


def nearest(faces: Array, face: Array) -> Array | None:
    """The face that `face` can have become, the nearest one; None when there is none."""
    near = [other for other in faces if gap(other, face) <= MOVED]
    return min(near, key=lambda other: gap(other, face), default=None)
