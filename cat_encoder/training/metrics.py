"""How well clips are sorted into classes: average precision and accuracy."""

from __future__ import annotations

import torch


def average_precision(scores: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Average precision per class, [classes] float64; NaN for a class without a positive clip.

    scores: [clips, classes], any scale; truth: [clips, classes], 1 = present. The sum over ranks of precision times the step in recall;
    clips of equal score count as one rank.
    """
    return torch.stack([class_precision(scores[:, c].double(), truth[:, c] > 0.5) for c in range(scores.shape[1])])


def class_precision(scores: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    scores, order = scores.sort(descending=True)
    hits = truth[order].double().cumsum(0)
    last = torch.cat([scores[1:] != scores[:-1], scores.new_ones(1, dtype=torch.bool)])  # the last clip of each group of equals
    hits, ranks = hits[last], torch.arange(1, len(scores) + 1, device=scores.device)[last]
    steps = hits.diff(prepend=hits.new_zeros(1))
    return (hits / ranks * steps).sum() / hits[-1]


def mean_average_precision(scores: torch.Tensor, truth: torch.Tensor) -> float:
    """Macro mAP: the mean over the classes that have a positive clip; NaN when none has."""
    return float(average_precision(scores, truth).nanmean())


def accuracy(scores: torch.Tensor, truth: torch.Tensor) -> float:
    """Share of clips whose highest score is at their class. scores, truth: [clips, classes]."""
    return float((scores.argmax(1) == truth.argmax(1)).double().mean())
