"""What pre-training minimises: frame, utterance and alignment errors, each a sum over a batch (spec/cat.md 6.4)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

Measure = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]

# How a student's vector [R,d] is compared with an outside one: (student, external, beta) -> the sum over rows.
MEASURES: dict[str, Measure] = {
    "mse": lambda a, b, beta: scaled_error(a, b, beta),
    "l1": lambda a, b, beta: (a - b).abs().sum() / math.sqrt(a.shape[-1]),
    "cosine": lambda a, b, beta: (1 - F.cosine_similarity(a, b, dim=-1)).sum() / math.sqrt(a.shape[-1]),
    "ce": lambda a, b, beta: F.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="sum"),  # KL(student || external), not scaled
}

SIDES = ("student", "external")

# The released files' proj_type: (width of the outside vector, the side the head acts on).
PROJ_TYPES = {
    1: (512, "external"),
    2: (512, "student"),
    3: (768, "external"),
    4: (768, "student"),
    5: (527, "external"),
    6: (527, "student"),
}


@dataclass(frozen=True)
class Weights:
    """How much each error counts. beta: 0 = squared errors, above = smooth L1 that turns linear at beta."""

    frame: float = 1.0
    utterance: float = 1.0
    alignment: float = 1.0
    dispersive: float = 0.0
    beta: float = 0.0


@dataclass(frozen=True)
class Losses:
    """Errors of one batch, weights included; scalars. frame: summed over masked cells; utterance, alignment: summed over rows.

    The objective is their sum with `frame` divided by the number of masked cells: the global errors are not averaged over the batch.
    The sums of the released criterion are this objective times the masked cells.
    """

    frame: torch.Tensor
    utterance: torch.Tensor
    alignment: torch.Tensor
    dispersive: torch.Tensor
    masked: int

    def objective(self, masked_in_all: int | None = None) -> torch.Tensor:
        """What is minimised. masked_in_all: cells of the whole batch when this is a part of it; the parts' objectives add up to the whole's."""
        whole = masked_in_all or self.masked
        return self.frame / whole + self.utterance + self.alignment + self.dispersive * (self.masked / whole)


class Alignment(nn.Module):
    """Representation regularization: one Linear between the student's class vector [R,D] and an outside vector [R,E]; dropped after training.

    side: which of the two the Linear acts on. layer: 0 = the class token after the last block, L = the layer result of block L (from 1).
    """

    def __init__(self, width: int, external_width: int, *, side: str = "student", measure: str = "mse", layer: int = 0) -> None:
        super().__init__()
        self.proj = nn.Linear(width, external_width) if side == "student" else nn.Linear(external_width, width)
        self.external_width, self.side, self.measure, self.layer = external_width, side, measure, layer

    def forward(self, student: torch.Tensor, external: torch.Tensor, beta: float = 0.0) -> torch.Tensor:
        if self.side == "student":
            student = self.proj(student)
        else:
            external = self.proj(external)
        return MEASURES[self.measure](student.float(), external.float(), beta)


def scaled_error(guess: torch.Tensor, target: torch.Tensor, beta: float = 0.0) -> torch.Tensor:
    """Summed squared (or smooth L1) error over the square root of the width."""
    guess, target = guess.float(), target.float()
    error = F.smooth_l1_loss(guess, target, reduction="sum", beta=beta) if beta > 0 else F.mse_loss(guess, target, reduction="sum")
    return error / math.sqrt(guess.shape[-1])


def dispersion(vectors: torch.Tensor, clones: int) -> torch.Tensor:
    """log of the mean of exp(-|a-b|^2 / D) over all pairs of rows [R,D]; pairs of one clip's clones count as equal. Low = well spread."""
    distance = (vectors[:, None] - vectors[None]).float().square().sum(-1) / vectors.shape[-1]  # [R, R]
    clip = torch.arange(len(vectors), device=vectors.device) // clones
    return distance.masked_fill(clip[:, None] == clip[None], 0.0).neg().exp().mean().log()


def spread(vectors: torch.Tensor) -> float:
    """Mean standard deviation per channel over rows [R,D]: near 0 = everything has become the same (collapse)."""
    return float((vectors.detach().float().var(0) + 1e-6).sqrt().mean())
