"""What a face tells: how far the mouth is open, where the face is, and whether it looks at the camera (spec/lipsync.md B.1)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

POINTS = 478  # of a face, in the order of MediaPipe's Face Landmarker; the subject's right side has the low numbers
NOSE = 1
CHEEKS = 234, 454
FOREHEAD, CHIN = 10, 152
INNER_CORNERS = 78, 308
INNER_LIPS = [82, 13, 312], [87, 14, 317]  # upper, lower
OUTER_LIPS = 0, 17
EYE_CORNERS = 33, 263
FACING = 0.15  # share of the face's width that the nose keeps from either cheek while the mouth can be seen

Array = NDArray[np.floating]


def mouth_opening(points: Array) -> float:
    """How far the inner lips are apart, in widths of the mouth. points [478,2] in pixels."""
    upper, lower = INNER_LIPS
    return float(np.linalg.norm(points[upper] - points[lower], axis=1).mean() / max(distance(points, INNER_CORNERS), 1e-6))


def lip_height(points: Array) -> float:
    """How far the outer edges of the lips are apart, in distances of the outer eye corners."""
    return distance(points, OUTER_LIPS) / max(distance(points, EYE_CORNERS), 1e-6)


def distance(points: Array, pair: tuple[int, int]) -> float:
    return float(np.linalg.norm(points[pair[0]] - points[pair[1]]))


def face_box(points: Array) -> Array:
    """[x0,y0,x1,y1] in pixels around all points."""
    return np.concatenate([points.min(axis=0), points.max(axis=0)])


def face_width(points: Array) -> float:
    return float(np.ptp(points[:, 0]))


def is_facing(points: Array) -> bool:
    """Whether the nose lies between the cheeks as the camera sees it; in profile, where it does not, half of the mouth is guessed."""
    right, left = points[CHEEKS[0]], points[CHEEKS[1]]
    across = left - right
    share = float((points[NOSE] - right) @ across / max(float(across @ across), 1e-6))
    return FACING <= share <= 1 - FACING


def has_lips_inside(points: Array) -> bool:
    """Whether the lips lie within the outline of the face, as they do in every face and in no garbage."""
    outline, lips = points[[*CHEEKS, FOREHEAD, CHIN]], points[[*INNER_CORNERS, *OUTER_LIPS]]
    return bool((lips > outline.min(axis=0)).all() and (lips < outline.max(axis=0)).all())
