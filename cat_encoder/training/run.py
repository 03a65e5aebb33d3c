"""The loop that pre-training and fine-tuning share: updates in parts, mixed precision, saving, resuming, stopping."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from ..errors import CatError
from .clips import Clip
from .data import Batch, Sounds
from .log import RunLog
from .optimise import OPTIMISERS, RateSchedule, make_optimiser, set_rate
from .state import load_optimiser, load_state, optimiser_tensors, save_state

logger = logging.getLogger(__name__)

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
STATE, LOG = "resume.safetensors", "log.csv"
FREE = ("accumulate", "save_every", "log_every", "tensorboard")  # may change when a run is resumed: they do not change what it learns


def check_rules(rules: dict[str, bool]) -> None:
    """rules: what must hold, in words. CatError that names those that do not."""
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise CatError(f"These settings cannot be used: {'; '.join(broken)}.")


@dataclass(frozen=True)
class RunSettings:
    """updates: optimiser steps. warmup: of them, None = 2 of 15. batch: clips per update, computed in `accumulate` parts. clip: gradient norm, 0 = no limit."""

    updates: int = 400_000
    warmup: int | None = None
    rate: float = 5e-4
    floor: float = 0.0
    batch: int = 96
    accumulate: int = 1
    optimiser: str = "paper"
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    clip: float = 4.0
    precision: str = "fp32"
    seed: int = 0
    save_every: int = 1000
    log_every: int = 10
    tensorboard: bool = False

    def __post_init__(self) -> None:
        rules = {
            "updates, batch and accumulate must be 1 or more": min(self.updates, self.batch, self.accumulate) > 0,
            "save_every and log_every must be 1 or more": min(self.save_every, self.log_every) > 0,
            "warmup, rate, floor, weight_decay and clip must not be negative": min(self.warmup or 0, self.rate, self.floor, self.weight_decay, self.clip) >= 0,
            f"optimiser must be one of {', '.join(OPTIMISERS)}": self.optimiser in OPTIMISERS,
            f"precision must be one of {', '.join(PRECISIONS)}": self.precision in PRECISIONS,
        }
        check_rules(rules)

    @property
    def schedule(self) -> RateSchedule:
        warmup = self.updates * 2 // 15 if self.warmup is None else self.warmup
        return RateSchedule(self.rate, warmup, self.updates, self.floor)


@dataclass(frozen=True)
class Step:
    """One finished update (from 1) of `updates`. numbers: loss and its parts, gradient norm, rate."""

    update: int
    updates: int
    numbers: dict[str, float] = field(default_factory=dict)


OnStep = Callable[[Step], None]


class Task(Protocol):
    """What is learnt. `model` holds everything that is trained."""

    model: torch.nn.Module
    depth: int

    def prepare(self, batch: Batch) -> Any:
        """The batch of one update, whole, as `errors` wants it."""

    def errors(self, part: Batch, prepared: Any) -> tuple[torch.Tensor, dict[str, float]]:
        """The objective of a part; the parts' objectives and numbers add up to the batch's."""

    def follow(self, update: int) -> None:
        """What else changes with an optimiser step."""

    def measure(self, update: int) -> dict[str, float]:
        """More numbers for the log."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """State beside the model's, and its counterpart."""

    def load_tensors(self, tensors: dict[str, torch.Tensor], update: int) -> None: ...

    def export(self, folder: Path) -> Path:
        """The encoder as a file for use."""


class Run:
    """A task on its way through its sounds: owns the optimiser, the gradient scaler and the count of updates."""

    def __init__(self, task: Task, sounds: Sounds, settings: RunSettings, folder: Path, told: dict[str, Any]) -> None:
        """told: settings as JSON values (see `tell_settings`), which a resumed run must share."""
        self.task, self.sounds, self.settings, self.folder = task, sounds, settings, folder
        self.story = {"settings": told, "clips": tell_clips(sounds.clips)}
        self.device = next(task.model.parameters()).device
        self.optimiser = make_optimiser(
            task.model.named_parameters(), kind=settings.optimiser, weight_decay=settings.weight_decay, depth=task.depth, layer_decay=settings.layer_decay
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "fp16")
        self.update = self.saved = 0
        self.mid_step = False

    def step(self, batch: Batch) -> Step:
        """One update from `batch`. CatError when the loss or the gradient is no number; the model is then as before."""
        self.optimiser.zero_grad(set_to_none=True)
        prepared = self.task.prepare(batch)
        numbers: dict[str, float] = {"loss": 0.0}
        for part in batch.parts(self.settings.accumulate):
            with self.autocast():
                objective, parts = self.task.errors(part, prepared)
            for name, value in ({"loss": float(objective.detach())} | parts).items():
                numbers[name] = numbers.get(name, 0.0) + value
            self.check_finite(numbers["loss"], "loss", batch)
            self.scaler.scale(objective).backward()
        self.scaler.unscale_(self.optimiser)
        norm = float(torch.nn.utils.clip_grad_norm_(self.task.model.parameters(), self.settings.clip or math.inf))
        if not self.scaler.is_enabled():  # the scaler skips such a step itself and lowers its scale
            self.check_finite(norm, "gradient", batch)
        rate = self.settings.schedule.at(self.update)
        set_rate(self.optimiser, rate)
        self.mid_step = True
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.task.follow(self.update + 1)
        self.update += 1
        self.mid_step = False
        return Step(self.update, self.settings.updates, numbers | {"gradient": norm, "rate": rate} | self.task.measure(self.update))

    def autocast(self) -> contextlib.AbstractContextManager:
        dtype = PRECISIONS[self.settings.precision]
        return torch.autocast(self.device.type, dtype) if dtype else contextlib.nullcontext()

    def check_finite(self, value: float, what: str, batch: Batch) -> None:
        if not math.isfinite(value):
            raise CatError(
                f"The {what} of update {self.update + 1} is {value}: training stopped, and what was learnt until update {self.update} is kept. "
                f"Lower the learning rate (now at most {self.settings.rate:g}), use fp32 or bf16, or look at these clips: "
                f"{', '.join(clip.path.name for clip in batch.clips[:4])}."
            )

    def save(self) -> Path:
        """The encoder for use, and the state a later call goes on from."""
        story = self.story | {"update": self.update, "scaler": self.scaler.state_dict()}
        model = {f"model.{name}": tensor for name, tensor in self.task.model.state_dict().items()}
        save_state(self.folder / STATE, model | self.task.tensors() | optimiser_tensors(self.task.model, self.optimiser), story)
        self.saved = self.update
        return self.task.export(self.folder)

    def resume(self) -> None:
        """Goes on from the folder's state. CatError when that belongs to a run with other settings."""
        tensors, story = load_state(self.folder / STATE)
        check_same(self.folder, story.get("settings", {}), self.story["settings"])
        if story.get("clips") != self.story["clips"]:
            logger.warning("The clips are not those this run began with: it goes on, but not as if it had never stopped.")
        self.task.model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")})
        self.update = self.saved = story["update"]
        self.task.load_tensors(tensors, self.update)
        load_optimiser(self.task.model, self.optimiser, tensors)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(story["scaler"])


def train(run: Run, *, resume: bool = True, on_step: OnStep | None = None) -> Path:
    """Runs to the end; returns the exported file.

    Whatever ends it early (Ctrl-C, an error, an exception out of on_step), the last whole update is saved first, and the same call goes on from there.
    """
    if resume and (run.folder / STATE).is_file():
        run.resume()
    first, last = run.update, run.settings.updates
    log = RunLog(run.folder, update=first, tensorboard=run.settings.tensorboard)
    feed = run.sounds.batches(first, last, run.settings.batch)
    try:
        for batch in feed:
            step = run.step(batch)
            if step.update % run.settings.log_every == 0 or step.update in (first + 1, last):
                log.write({"update": step.update} | step.numbers)
            if step.update % run.settings.save_every == 0:
                run.save()
            if on_step:
                on_step(step)
    finally:
        feed.close()
        log.close()
        if not run.mid_step and run.update > run.saved:
            run.save()
    return run.task.export(run.folder)


def open_folder(folder: str | Path) -> Path:
    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CatError(f"{place} cannot be made a folder for the run's files ({error.strerror}): choose another one.") from None
    return place


def tell_clips(clips: list[Clip]) -> str:
    """A short sum over the clips' names and labels, to notice that a resumed run has others."""
    return hashlib.blake2b("\n".join(f"{clip.path.name} {clip.labels}" for clip in clips).encode(), digest_size=8).hexdigest()


def tell_settings(**parts: Any) -> dict[str, Any]:
    """Settings (dataclasses or plain values) as JSON values, without those that may change."""
    told = {name: asdict(part) if hasattr(part, "__dataclass_fields__") else part for name, part in parts.items()}
    return {name: {key: value for key, value in part.items() if key not in FREE} if isinstance(part, dict) else part for name, part in told.items()}


def check_same(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    now = json.loads(json.dumps(now))
    flat = [{f"{part}.{key}": value for part, values in told.items() for key, value in values.items()} for told in (before, now)]
    changed = [f"{key} was {flat[0].get(key)}, is {flat[1].get(key)}" for key in flat[0].keys() | flat[1].keys() if flat[0].get(key) != flat[1].get(key)]
    if changed:
        raise CatError(f"{folder} holds a run with other settings ({'; '.join(sorted(changed)[:4])}): give the same ones, or another folder.")
