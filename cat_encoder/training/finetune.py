"""Fine-tuning: a head over classes on a pre-trained encoder, all of it trained (spec/cat.md 7)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from ..errors import CatError
from ..frontend import AUDIOSET, ESC50, FRAMES, SPEECH_COMMANDS, Normalisation
from ..head import Head
from ..labels import audioset
from ..trunk import AudioTransformer, move
from . import draws
from .clips import Clip, balancing_weights, check_classes, class_names, find_clips, label_matrix
from .data import SHORTEST, Batch, Reader, Sounds, mask_bands, mix_with_reverse, read_sound
from .metrics import accuracy, mean_average_precision
from .run import OnStep, Run, RunSettings, check_rules, open_folder, tell_settings, train

EVALUATION_BATCH = 16


@dataclass(frozen=True)
class FinetuneSettings:
    """single: classes exclude each other. mixup: parameter of its Beta, 0 = off; mixup_chance: share of updates that mix.

    bands: share of time and frequency that SpecAug may hide, 0 = off. drop_path: of the last block, rising evenly from 0. smoothing: of labels, without mixup.
    roll, noise: see `Sounds`. balanced: clips per epoch, drawn so that rare classes come as often as frequent ones; 0 = every clip once.
    """

    frames: int = FRAMES
    normalisation: Normalisation = AUDIOSET
    single: bool = False
    mixup: float = 0.8
    mixup_chance: float = 0.9
    bands: float = 0.2
    drop_path: float = 0.1
    smoothing: float = 0.0
    roll: bool = True
    noise: bool = False
    balanced: int = 0
    evaluate_every: int = 1000

    def __post_init__(self) -> None:
        rules = {
            "mixup and balanced must not be negative": min(self.mixup, self.balanced) >= 0,
            "mixup_chance and bands must be 0 to 1": 0 <= self.mixup_chance <= 1 and 0 <= self.bands <= 1,
            "drop_path and smoothing must be 0 to less than 1": 0 <= self.drop_path < 1 and 0 <= self.smoothing < 1,
            "evaluate_every must be 1 or more": self.evaluate_every > 0,
        }
        check_rules(rules)


def recipe(updates: int, warmup: int, rate: float, batch: int, seed: int = 0) -> RunSettings:
    return RunSettings(updates, warmup, rate, 1e-6, batch, layer_decay=0.65, seed=seed)


RECIPES = {
    "as20k": (FinetuneSettings(), recipe(40_000, 4_000, 5e-5, 48)),
    "as2m": (FinetuneSettings(balanced=200_000), recipe(300_000, 30_000, 5e-5, 96)),
    "esc50": (
        FinetuneSettings(frames=512, normalisation=ESC50, single=True, mixup=0.0, bands=0.4, smoothing=0.1, evaluate_every=400),
        recipe(4_000, 400, 5e-5, 48),
    ),
    "spc2": (
        FinetuneSettings(frames=128, normalisation=SPEECH_COMMANDS, single=True, noise=True),
        recipe(40_000, 4_000, 2e-4, 256, seed=42),
    ),
}


class Classifier(nn.Module):
    def __init__(self, encoder: AudioTransformer, head: Head) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(mel).tokens)  # [B, classes]


@dataclass(frozen=True)
class Mixed:
    """A batch after mixup and SpecAug. whole: what the summed loss is divided by."""

    place: int
    mel: torch.Tensor
    labels: torch.Tensor
    whole: float


@dataclass
class Finetuning:
    """The task of a `Run`: classifier, classes and how well it does on `validation`."""

    model: Classifier
    classes: list[str]
    settings: FinetuneSettings
    run: RunSettings
    folder: Path
    validation: Sounds | None = None
    best: float = field(default=-1.0)

    def __post_init__(self) -> None:
        self.depth = self.model.encoder.architecture.depth
        for block, rate in zip(self.model.encoder.blocks, torch.linspace(0, self.settings.drop_path, self.depth).tolist(), strict=True):
            block.drop_path = rate
        self.device = self.model.encoder.class_token.device

    def prepare(self, batch: Batch) -> Mixed:
        mel, labels = batch.mel, label_matrix(batch.clips, self.classes)
        chance = draws.numbers(self.run.seed, "mixup", batch.place)
        if self.settings.mixup and chance.random() < self.settings.mixup_chance:
            mel, labels = mix_with_reverse(mel, labels, chance.betavariate(self.settings.mixup, self.settings.mixup))
        if self.settings.bands:
            mel = mask_bands(mel, self.settings.bands, draws.generator(self.run.seed, "bands", batch.place))
        return Mixed(batch.place, mel.to(self.device), labels.to(self.device), len(labels) if self.one_of_many else float(labels.sum()))

    @property
    def one_of_many(self) -> bool:
        """Cross-entropy instead of a yes or no per class: for classes that exclude each other, unless clips are mixed."""
        return self.settings.single and not self.settings.mixup

    def errors(self, part: Batch, prepared: Mixed) -> tuple[torch.Tensor, dict[str, float]]:
        rows = slice(part.place - prepared.place, part.place - prepared.place + len(part.clips))
        self.model.train()
        with draws.seeded(self.run.seed, "drop", part.place, self.device):
            logits = self.model(prepared.mel[rows]).float()
        smoothing = self.settings.smoothing if self.one_of_many else 0.0
        return class_errors(logits, prepared.labels[rows], self.one_of_many, smoothing) / prepared.whole, {}

    def follow(self, update: int) -> None:
        """No teacher follows this student."""

    def measure(self, update: int) -> dict[str, float]:
        due = update % self.settings.evaluate_every == 0 or update == self.run.updates
        if not (due and self.validation):
            return {}
        scores, truth = self.evaluate(self.validation)
        numbers = {"mAP": mean_average_precision(scores, truth)} | ({"accuracy": accuracy(scores, truth)} if self.settings.single else {})
        chief = numbers["accuracy" if self.settings.single else "mAP"]
        if chief > self.best:
            self.best = chief
            self.write(self.folder / "best.safetensors")
        return numbers

    @torch.no_grad()
    def evaluate(self, sounds: Sounds) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and truth, both [clips, classes] on the CPU."""
        self.model.eval()
        found = [(self.model(batch.mel.to(self.device)).float().cpu(), label_matrix(batch.clips, self.classes)) for batch in sounds.in_order(EVALUATION_BATCH)]
        if not found:
            raise CatError(f"None of the {len(sounds.clips)} validation clips can be used. The first: {next(iter(sounds.refused.values()))}")
        scores, truth = zip(*found, strict=True)
        return torch.cat(scores), torch.cat(truth)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"best": torch.tensor(self.best, dtype=torch.float64)}

    def load_tensors(self, tensors: dict[str, torch.Tensor], update: int) -> None:
        self.best = float(tensors["best"])

    def export(self, folder: Path) -> Path:
        return self.write(folder / "classifier.safetensors")

    def write(self, file: Path) -> Path:
        known = dict(audioset())
        labels = [known.get(name, name) for name in self.classes]
        settings = self.settings
        facts = {"single_label": settings.single, "frames": settings.frames, "normalisation": settings.normalisation, "origin": "fine-tuned"}
        encoder = self.model.encoder
        return write_checkpoint(file, Checkpoint(encoder.architecture, encoder.state_dict(), self.model.head.state_dict(), labels, **facts))


def class_errors(logits: torch.Tensor, labels: torch.Tensor, one_of_many: bool, smoothing: float = 0.0) -> torch.Tensor:
    """Summed over the batch: cross-entropy, or a binary one per class. logits, labels: [B,classes]."""
    if one_of_many:
        return F.cross_entropy(logits, labels / labels.sum(1, keepdim=True), label_smoothing=smoothing, reduction="sum")
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")


def finetune(
    source: str | Path | list[Clip],
    out: str | Path,
    start: str | Path | AudioTransformer,
    *,
    validation: str | Path | list[Clip] | None = None,
    hold_out: float = 0.0,
    classes: list[str] | None = None,
    settings: FinetuneSettings | None = None,
    run: RunSettings | None = None,
    read: Reader = read_sound,
    shortest: int = SHORTEST,
    workers: int = 2,
    keep: int = 0,
    device: str | torch.device = "cpu",
    resume: bool = True,
    on_step: OnStep | None = None,
) -> Path:
    """Trains a classifier on labelled clips; returns `out`/classifier.safetensors, which `cat_encoder.load` reads (best.safetensors: the best on `validation`).

    start: the encoder, a checkpoint of any kind that can be loaded. validation: clips to measure mAP or accuracy on; hold_out: or that share of the clips.
    classes: their names in order; None = all labels of the clips, sorted. The rest as for `pretrain`. CatError in sentences.
    """
    settings, run = settings or RECIPES["as20k"][0], run or RECIPES["as20k"][1]
    clips = source if isinstance(source, list) else find_clips(source)
    classes = check_classes(classes or class_names(clips))
    if not 0 <= hold_out < 1:
        raise CatError(f"A share of {hold_out:g} cannot be held out: 0 to less than 1 is possible, such as 0.1.")
    held = validation if isinstance(validation, list) else find_clips(validation) if validation else []
    if hold_out and not held:
        clips, held = split_clips(clips, hold_out, run.seed)
    label_matrix(clips + held, classes)  # labels that are no class are told now, not at some update
    classifier = move(build_classifier(start, len(classes), settings, run.seed), device)
    order = draws.ClipOrder(len(clips), run.seed, weights=balancing_weights(clips), size=settings.balanced) if settings.balanced else None
    common = {"read": read, "frames": settings.frames, "normalisation": settings.normalisation, "shortest": shortest}
    sounds = Sounds(clips, **common, roll=settings.roll, noise=settings.noise, seed=run.seed, workers=workers, keep=keep, order=order)
    folder = open_folder(out)
    task = Finetuning(classifier, classes, settings, run, folder, Sounds(held, **common) if held else None)
    told = tell_settings(encoder=classifier.encoder.architecture.as_json(), finetune=settings, run=run, classes={"names": classes})
    return train(Run(task, sounds, run, folder, told), resume=resume, on_step=on_step)


def build_classifier(start: str | Path | AudioTransformer, classes: int, settings: FinetuneSettings, seed: int) -> Classifier:
    encoder = start if isinstance(start, AudioTransformer) else read_checkpoint(start).build()[0]
    patch, most = encoder.architecture.patch, encoder.architecture.max_frames
    if settings.frames % patch or not 0 < settings.frames <= most:
        raise CatError(f"{settings.frames} frames do not fit this encoder: a multiple of {patch} up to {most} is needed.")
    with draws.seeded(seed, "head", 0):
        head = Head(encoder.architecture.width, classes)
        nn.init.trunc_normal_(head.linear.weight, std=0.02)
        nn.init.zeros_(head.linear.bias)
    return Classifier(encoder, head)


def split_clips(clips: list[Clip], share: float, seed: int) -> tuple[list[Clip], list[Clip]]:
    """(training, held out): a random `share`, at least one clip on either side."""
    held = min(max(round(len(clips) * share), 1), len(clips) - 1)
    order = torch.randperm(len(clips), generator=draws.generator(seed, "hold out", 0)).tolist()
    chosen = set(order[:held])
    return [clip for i, clip in enumerate(clips) if i not in chosen], [clips[i] for i in sorted(chosen)]
