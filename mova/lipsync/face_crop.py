"""The picture SyncNet looks at: a face and what is below it, steadied over time (spec/lipsync.md A.4)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import zip_longest

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from ..errors import InputError
from ..image import check_pixels
from .smoothing import median_filter
from .tracks import interpolate_boxes

SIDE = 224  # px
GREY = 110  # beyond the picture's edge
SMOOTHING = 13  # frames
ABOVE, BELOW, BESIDE = 1.0, 1.8, 1.4  # of half the face's longer side, from its centre

Picture = Tensor | np.ndarray


def crop_faces(frames: Iterable[Picture], boxes: ArrayLike) -> Iterator[Tensor]:
    """One face, frame by frame: [224,224,3] uint8 crops. Frames are taken one at a time, so any length and size fits.

    frames: [H,W,3], uint8 or float in 0..1. boxes: [F,4] (x0, y0, x1, y1 px), one for each frame; rows with NaN are interpolated.
    InputError for boxes of another shape, below 1 px or without any detection, for frames of another kind, and for more or fewer frames than boxes.
    """
    centres = smooth_boxes(read_track(boxes))
    return (crop_face(picture, *centre) for picture, centre in pair_frames(frames, centres.tolist()))


def read_track(boxes: ArrayLike) -> np.ndarray:
    rows = np.asarray(boxes, dtype=np.float64)
    if rows.ndim != 2 or rows.shape[1] != 4:
        raise InputError(f"The boxes of a face are {list(rows.shape)}: [frames, 4] is needed, x0 y0 x1 y1 in pixels.")
    if not np.isfinite(rows).all(axis=1).any():
        raise InputError(f"There is no face in any of {len(rows)} boxes: nothing can be cropped.")
    rows = interpolate_boxes(rows)
    if (rows[:, 2:] - rows[:, :2] < 1).any():
        raise InputError("A box of the face has a side below 1 px: x1 must be more than x0, and y1 more than y0, in pixels.")
    return rows


def smooth_boxes(boxes: np.ndarray) -> Tensor:
    """[n,4] boxes -> [n,3]: half the longer side, centre x, centre y, each a running median. Zeros lie beyond the ends, so shorter tracks take fewer frames."""
    corner, opposite = torch.from_numpy(boxes).split(2, dim=1)
    columns = torch.column_stack([(opposite - corner).amax(dim=1) / 2, (corner + opposite) / 2])
    width = min(SMOOTHING, 2 * len(boxes) - 1)
    return torch.stack([median_filter(column, width) for column in columns.T], dim=1)


def pair_frames(frames: Iterable[Picture], centres: list[list[float]]) -> Iterator[tuple[Picture, list[float]]]:
    for number, (picture, centre) in enumerate(zip_longest(frames, centres)):
        if picture is None or centre is None:
            there = "more" if centre is None else f"only {number}"
            raise InputError(f"There are boxes for {len(centres)} frames, but {there} frames: both must be of the same film.")
        yield picture, centre


def crop_face(picture: Picture, half: float, x: float, y: float) -> Tensor:
    """The region around a centre as [224,224,3] uint8, grey where it leaves the picture. picture: [H,W,3], uint8 or float in 0..1; the rest in pixels."""
    pixels = torch.as_tensor(picture)
    if pixels.ndim != 3 or pixels.shape[-1] != 3:
        raise InputError(f"A frame is {list(pixels.shape)}: [H,W,3] is needed.")
    margin = int(half * BELOW)  # the reference adds it on all sides and rounds coordinates there
    top, bottom = (math.floor(y + margin + side) - margin for side in (-half * ABOVE, half * BELOW))
    left, right = (math.floor(x + margin + side) - margin for side in (-half * BESIDE, half * BESIDE))
    return shrink(cut(pixels, top, bottom, left, right))


def cut(pixels: Tensor, top: int, bottom: int, left: int, right: int) -> Tensor:
    """A rectangle of whole pixels, [h,w,3] float32 in 0..255, that may reach beyond the picture."""
    height, width, _ = pixels.shape
    region = pixels[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
    levels = region.float() if pixels.dtype == torch.uint8 else as_levels(region)
    beyond = (0, 0, *inside_gap(left, right, width), *inside_gap(top, bottom, height))
    return F.pad(levels, beyond, value=GREY)


def as_levels(region: Tensor) -> Tensor:
    """Floats of 0..1 -> whole numbers of 0..255."""
    if region.numel():  # else the face is out of the picture
        check_pixels(region, "film")
    return (region.float() * 255).round().clamp(0, 255)


def inside_gap(start: int, end: int, length: int) -> tuple[int, int]:
    """How much of start..end lies before 0 and beyond `length`."""
    return min(max(-start, 0), end - start), min(max(end - length, 0), end - start)


def shrink(region: Tensor) -> Tensor:
    """[h,w,3] in 0..255 -> [224,224,3] uint8, bilinear without a filter, as the reference does."""
    resized = F.interpolate(region.movedim(-1, 0)[None], size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    return resized[0].movedim(0, -1).round().to(torch.uint8).contiguous()
