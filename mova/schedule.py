"""Sigmas and timesteps of both streams, and the expert of every step (spec/mova.md section 4).

A timestep is num_train_timesteps * sigma; sigma 1 is noise, 0 is clean. Everything is float32, as in the reference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import CheckpointError, InputError

SCHEDULES = ("reference", "simple")
MAX_STEPS = 1000
DYNAMIC_MU = (0.5, 0.9, 256, 8192)  # mu grows from the first to the second value between these lengths


@dataclass(frozen=True)
class ScheduleConfig:
    """scheduler_config.json; the defaults are those of the scheduler class (the release sets shift 5 and extra_one_step)."""

    num_train_timesteps: int = 1000
    shift: float = 3.0
    sigma_max: float = 1.0
    sigma_min: float = 0.003 / 1.002
    extra_one_step: bool = False
    inverse_timesteps: bool = False
    reverse_sigmas: bool = False
    exponential_shift: bool = False
    exponential_shift_mu: float | None = None
    shift_terminal: float | None = None

    def __post_init__(self) -> None:
        if self.num_train_timesteps < 1 or self.shift <= 0 or not 0 <= self.sigma_min < self.sigma_max <= 1:
            raise CheckpointError(
                f"scheduler_config.json describes no schedule: num_train_timesteps {self.num_train_timesteps}, shift {self.shift}, sigma {self.sigma_min}..{self.sigma_max}."
            )

    def sigmas(self, steps: int, *, shift: float | None = None, denoise: float = 1.0, dynamic_length: int | None = None) -> Tensor:
        """The reference grid: `steps` sigmas, noisiest first unless the config inverts it; denoise < 1 starts lower."""
        start = self.sigma_min + (self.sigma_max - self.sigma_min) * denoise
        base = torch.linspace(start, self.sigma_min, steps + 1)[:-1] if self.extra_one_step else torch.linspace(start, self.sigma_min, steps)
        if self.inverse_timesteps:
            base = base.flip(0)
        if self.exponential_shift:
            growth = math.exp(self.mu(dynamic_length))
            sigmas = growth / (growth + (1 / base - 1))
        else:
            sigmas = shift_sigmas(base, self.shift if shift is None else shift)
        if self.shift_terminal is not None:
            remaining = 1 - sigmas
            sigmas = 1 - remaining * (1 - self.shift_terminal) / remaining[-1]
        return 1 - sigmas if self.reverse_sigmas else sigmas

    def mu(self, dynamic_length: int | None) -> float:
        if dynamic_length is None:
            if self.exponential_shift_mu is None:
                raise CheckpointError("scheduler_config.json asks for an exponential shift but has no exponential_shift_mu.")
            return self.exponential_shift_mu
        low, high, short, long = DYNAMIC_MU
        return low + (high - low) * (dynamic_length - short) / (long - short)

    @property
    def final_sigma(self) -> float:
        """Where the last step ends."""
        return 1.0 if self.inverse_timesteps or self.reverse_sigmas else 0.0

    def lookup(self, timesteps: Tensor) -> Tensor:
        """Sigmas of the nearest entries of the training table at the config's own shift: what the released sampler steps by (spec 4.3)."""
        table = self.sigmas(self.num_train_timesteps)
        nearest = (self.num_train_timesteps * table - timesteps[:, None]).abs().argmin(dim=1)
        return table[nearest]


@dataclass(frozen=True)
class Grid:
    """One stream's way from noise to clean.

    timesteps [N]: what the model is told. sigmas [N]: the same as noise levels. path [N + 1]: the sigmas the steps run along.
    """

    timesteps: Tensor
    sigmas: Tensor
    path: Tensor


def make_grid(config: ScheduleConfig, steps: int, *, shift: float | None = None, schedule: str = "reference", denoise: float = 1.0) -> Grid:
    """The steps of one stream. `reference`: the released grid, stepping by the training table; `simple`: even sigmas, used exactly."""
    if schedule not in SCHEDULES:
        raise InputError(f"schedule is {schedule!r}; choose {' or '.join(SCHEDULES)}.")
    if not 1 <= steps <= MAX_STEPS:
        raise InputError(f"steps is {steps}; 1 to {MAX_STEPS} are possible (50 is the released default).")
    if not 0 < denoise <= 1:
        raise InputError(f"denoise is {denoise}; it must be above 0 and at most 1 (1 = start from noise).")
    if shift is not None and not 0 < shift < math.inf:
        raise InputError(f"shift is {shift}; it must be a positive number (5 is the released value).")
    if schedule == "simple":
        sigmas = shift_sigmas(torch.linspace(denoise, 0, steps + 1), config.shift if shift is None else shift)
        return Grid(config.num_train_timesteps * sigmas[:-1], sigmas[:-1], sigmas)
    sigmas = config.sigmas(steps, shift=shift, denoise=denoise)
    timesteps = config.num_train_timesteps * sigmas
    return Grid(timesteps, sigmas, torch.cat((config.lookup(timesteps), torch.tensor([config.final_sigma]))))


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Moves sigmas towards noise: s * x / (1 + (s - 1) * x)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def choose_experts(timesteps: Tensor, boundary: float) -> list[str]:
    """The expert of every step by the video timestep: `high` down to the boundary timestep, `low` from the first step below it on."""
    experts, switched = [], False
    for timestep in timesteps.tolist():
        switched = switched or timestep < boundary
        experts.append("low" if switched else "high")
    return experts
