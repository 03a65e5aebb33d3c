"""Steps of the optimiser: parameter groups, the learning rate over time, clipping (spec/cat.md 6.5, 7)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch

# The paper's Adam decays every parameter; AdamW as it is usually set up leaves biases, norms and the class token out.
OPTIMISERS = ("adamw", "paper")


@dataclass(frozen=True)
class RateSchedule:
    """Learning rate: up evenly from `floor` to `peak` in `warmup` updates, then half a cosine back to `floor` at `updates`."""

    peak: float
    warmup: int
    updates: int
    floor: float = 0.0

    def at(self, update: int) -> float:
        """The rate of the step that follows `update` finished ones."""
        if update < self.warmup:
            return self.floor + (self.peak - self.floor) * update / self.warmup
        done = min((update - self.warmup) / max(self.updates - self.warmup, 1), 1.0)
        return self.floor + (self.peak - self.floor) * 0.5 * (1 + math.cos(math.pi * done))


def make_optimiser(
    parameters: Iterable[tuple[str, torch.nn.Parameter]],
    *,
    kind: str = "paper",
    weight_decay: float = 0.05,
    betas: tuple[float, float] = (0.9, 0.95),
    depth: int = 0,
    layer_decay: float = 1.0,
) -> torch.optim.AdamW:
    """Adam with decoupled weight decay over named parameters. Each group's "scale" is its share of the rate (see `layer_scale`)."""
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in parameters:
        exempt = kind == "adamw" and (parameter.squeeze().ndim < 2)
        groups.setdefault((layer_scale(name, depth, layer_decay), 0.0 if exempt else weight_decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": members, "scale": scale, "weight_decay": decay} for (scale, decay), members in groups.items()], lr=0.0, betas=betas, eps=1e-8
    )


def layer_scale(name: str, depth: int, decay: float) -> float:
    """Block i (from 0) of `depth` learns at decay**(depth - i) of the rate; everything else, the stem included, at the full one."""
    block = re.match(r"(?:encoder\.)?blocks\.(\d+)\.", name)  # the stem's blocks begin with stem.
    return decay ** (depth - int(block.group(1))) if block and decay != 1.0 else 1.0


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate * group["scale"]
