"""Chance, repeatable: every draw depends on the run's seed and the clip's place in the run alone.

So a resumed run, other batch parts or more reading threads draw the same, and PyTorch's global state is left alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator

import torch


def seed_of(seed: int, purpose: str, place: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{purpose}/{place}".encode(), digest_size=7).digest(), "little")


def numbers(seed: int, purpose: str, place: int) -> random.Random:
    """For single numbers."""
    return random.Random(seed_of(seed, purpose, place))


def generator(seed: int, purpose: str, place: int, device: torch.device | str = "cpu") -> torch.Generator:
    """For tensors."""
    return torch.Generator(device).manual_seed(seed_of(seed, purpose, place))


@contextlib.contextmanager
def seeded(seed: int, purpose: str, place: int, device: torch.device | None = None) -> Iterator[None]:
    """For code that draws from PyTorch's global generators: they are seeded inside and as before afterwards."""
    with torch.random.fork_rng([device] if device and device.type == "cuda" else []):
        torch.manual_seed(seed_of(seed, purpose, place))
        yield


class ClipOrder:
    """Which clip comes at which place of a run: every epoch a new order of all clips, or of `size` clips drawn by `weights` without repetition."""

    def __init__(self, clips: int, seed: int, *, weights: torch.Tensor | None = None, size: int | None = None) -> None:
        self.weights = torch.ones(clips) if weights is None else weights
        self.size = min(size or clips, int((self.weights > 0).sum()))
        self.seed, self.epoch, self.order = seed, -1, torch.empty(0)

    def __getitem__(self, place: int) -> int:
        epoch, rest = divmod(place, self.size)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, self.draw_epoch(epoch)
        return int(self.order[rest])

    def draw_epoch(self, epoch: int) -> torch.Tensor:
        """Weighted draw without repetition by exponential keys: the `size` smallest of -log(u)/weight."""
        chance = torch.rand(len(self.weights), dtype=torch.float64, generator=generator(self.seed, "order", epoch))
        return (-chance.log() / self.weights.double()).argsort()[: self.size]
