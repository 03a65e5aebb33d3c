"""From two rows of embeddings to an offset and how sure it is (spec/lipsync.md A.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .smoothing import median_filter

REACH = 15  # windows of 40 ms that the sound is moved either way
SMOOTHING = 9  # windows over which a frame's confidence is a median
LABEL = "SyncNet confidence (uncompressed path)"  # the published LSE numbers were taken after JPEG and XVID losses and with other face boxes


@dataclass(frozen=True)
class SyncScore:
    """What SyncNet says about n windows (window i = frames i..i+4 at 25 fps). Show `confidence` under the name `LABEL`.

    offset: frames of 40 ms that fit best, positive = the sound is early, negative = late.
    confidence (LSE-C): how far the best offset is below the median one. distance (LSE-D): of the best offset, lower is better.
    frame_confidence [n]; distances [n,31], of every window at the offsets 15, 14, ..., -15.
    """

    offset: int
    confidence: float
    distance: float
    frame_confidence: Tensor
    distances: Tensor


def window_distances(lips: Tensor, sounds: Tensor, reach: int = REACH) -> Tensor:
    """Distance of every lip window to the sound windows around it: [n,D] and [n,D] -> [n,2*reach+1]. Beyond the ends, the sound's embedding is zero."""
    padded = F.pad(sounds, (0, 0, reach, reach))
    return torch.stack([F.pairwise_distance(lips, padded[shift : shift + len(lips)]) for shift in range(2 * reach + 1)], dim=1)


def decide(distances: Tensor) -> SyncScore:
    """The offset with the smallest mean distance, and how far it is from the others. distances: [n,2*reach+1] of `window_distances`."""
    means = distances.mean(dim=0)  # [2*reach+1]
    best, median = int(means.argmin()), means.median()
    frame_confidence = median_filter(median - distances[:, best], SMOOTHING)
    return SyncScore(distances.shape[1] // 2 - best, float(median - means[best]), float(means[best]), frame_confidence, distances)
