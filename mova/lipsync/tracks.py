"""Faces of single frames joined to tracks, each of one person (spec/lipsync.md A.4)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import InputError

MAX_GAP = 25  # frames, within which a face must be found again
MIN_OVERLAP = 0.5  # intersection over union of a face and the one before it
MIN_DETECTIONS = 20  # a track has more
MIN_SIDE = 100.0  # px; faces of a track are larger on average

Boxes = NDArray[np.float64]
Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels


@dataclass(frozen=True)
class Track:
    """One face from frame `first` on: boxes [n,4] (x0, y0, x1, y1 px), one for every frame; where `detected` [n] is False they are interpolated."""

    first: int
    boxes: Boxes
    detected: NDArray[np.bool_]


def follow_faces(faces: Iterable[ArrayLike], *, min_detections: int = MIN_DETECTIONS, min_side: float = MIN_SIDE, max_gap: int = MAX_GAP) -> list[Track]:
    """Joins the faces of each frame ([K,4] px, any K; rows with NaN are not detected) to tracks, in the order of their beginning.

    A track goes on with a face that overlaps its last one by more than half and comes within `max_gap` frames. It is kept with more than
    `min_detections` faces whose longer side is more than `min_side` px on average. InputError for boxes of another shape.
    """
    left = [read_boxes(boxes, frame) for frame, boxes in enumerate(faces)]
    tracks = []
    for start in range(len(left)):
        while left[start]:
            chain = take_chain(left, start, max_gap)
            track = fill_gaps(chain)
            if len(chain) > min_detections and mean_side(track.boxes) > min_side:
                tracks.append(track)
    return tracks


def read_boxes(boxes: ArrayLike, frame: int) -> list[Box]:
    rows = np.asarray(boxes, dtype=np.float64)
    if rows.size == 0:
        return []
    if rows.ndim != 2 or rows.shape[1] != 4:
        raise InputError(f"The faces of frame {frame} are {list(rows.shape)}: [faces, 4] is needed, x0 y0 x1 y1 in pixels.")
    return [tuple(row) for row in rows.tolist() if np.isfinite(row).all()]


def take_chain(left: list[list[Box]], start: int, max_gap: int) -> list[tuple[int, Box]]:
    """Takes the first face of frame `start`, and from later frames the face that overlaps the last taken one most, out of `left`."""
    chain = [(start, left[start].pop(0))]
    for frame in range(start + 1, len(left)):
        last_frame, last = chain[-1]
        if frame - last_frame > max_gap:
            break
        nearest = max(left[frame], key=lambda box: overlap(last, box), default=None)
        if nearest is not None and overlap(last, nearest) > MIN_OVERLAP:
            left[frame].remove(nearest)
            chain.append((frame, nearest))
    return chain


def overlap(one: Box, other: Box) -> float:
    """Intersection over union; 0 for boxes without an area."""
    width, height = min(one[2], other[2]) - max(one[0], other[0]), min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return width * height / (sum(areas) - width * height)


def fill_gaps(chain: list[tuple[int, Box]]) -> Track:
    frames = [frame for frame, _ in chain]
    boxes = np.full((frames[-1] - frames[0] + 1, 4), np.nan)
    boxes[np.array(frames) - frames[0]] = [box for _, box in chain]
    return Track(frames[0], interpolate_boxes(boxes), np.isfinite(boxes[:, 0]))


def interpolate_boxes(boxes: Boxes) -> Boxes:
    """[F,4] with rows of NaN -> without: linear between detections; before the first and after the last, their boxes."""
    rows, seen = np.arange(len(boxes)), np.flatnonzero(np.isfinite(boxes).all(axis=1))
    return np.stack([np.interp(rows, seen, boxes[seen, side]) for side in range(4)], axis=1)


def mean_side(boxes: Boxes) -> float:
    return float((boxes[:, 2:] - boxes[:, :2]).mean(axis=0).max())
