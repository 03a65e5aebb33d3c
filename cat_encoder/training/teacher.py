"""The teacher: a slow average of the student, and the targets it makes from whole clips (spec/cat.md 6.3)."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..trunk import AudioTransformer


@dataclass(frozen=True)
class DecaySchedule:
    """How slow: `start` at update 0, rising evenly to `end` at update `anneal`, then constant."""

    start: float = 0.9998
    end: float = 0.99999
    anneal: int = 100_000

    def at(self, update: int) -> float:
        return self.end if update >= self.anneal else self.end - (self.end - self.start) * (1 - update / self.anneal)


class Teacher:
    """An exponential moving average of the student's encoder, kept in float32, and never trained itself."""

    def __init__(self, student: AudioTransformer, schedule: DecaySchedule | None = None, *, layers: int = 0) -> None:
        """layers: how many of the last blocks make the targets; 0 = all."""
        self.encoder = copy.deepcopy(student).requires_grad_(False).eval()
        self.encoder.bottleneck = self.encoder.unbottleneck = torch.nn.Identity()  # the student's alone (2.3)
        self.schedule = schedule or DecaySchedule()
        self.layers = layers or len(student.blocks)
        self.update = 0  # optimiser steps it has followed

    @torch.no_grad()
    def follow(self, student: AudioTransformer, update: int) -> None:
        """After optimiser step `update` (from 1). The same step again, or a jump from 0 to a later one (a resumed run), changes no weight."""
        resumed = self.update == 0 and update > 1
        if update > self.update and not resumed:
            theirs = dict(student.named_parameters())
            for name, mine in self.encoder.named_parameters():
                mine.lerp_(theirs[name], 1 - self.schedule.at(update))
        self.update = max(self.update, update)

    @torch.no_grad()
    def targets(self, mel: torch.Tensor) -> torch.Tensor:
        """Whole clips [B,1,T,F] -> what the student shall guess of every token, [B,N,D] float32."""
        results = self.encoder(mel, layers=True).layer_results[-self.layers :]
        return make_targets(results)


def make_targets(layer_results: list[torch.Tensor]) -> torch.Tensor:
    """Layer results [B,1+N,D] -> [B,N,D]: each normalised per channel over the tokens, averaged over the layers, normalised per token."""
    patches = [F.instance_norm(result[:, 1:].float().transpose(1, 2)) for result in layer_results]  # [B, D, N], eps 1e-5
    mean = torch.stack(patches).mean(0).transpose(1, 2)  # [B, N, D]
    return F.layer_norm(mean, mean.shape[-1:])
