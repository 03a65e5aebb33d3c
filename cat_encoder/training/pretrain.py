"""Pre-training: a masked student learns what a slow teacher makes of whole clips, pulled towards an outside encoder (spec/cat.md 6)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from ..config import PRESETS, Architecture
from ..frontend import AUDIOSET, FRAMES, Normalisation
from ..trunk import AudioTransformer, move
from . import draws
from .clips import Clip, find_clips
from .data import SHORTEST, Batch, Reader, Sounds, read_sound
from .decoder import Decoder, DecoderShape
from .external import Describe, External, StoredVectors, open_external
from .masks import MaskPlan, Masks, draw_masks, split_cells
from .objective import MEASURES, SIDES, Alignment, Weights
from .run import OnStep, Run, RunSettings, check_rules, open_folder, tell_settings, train
from .student import Student
from .teacher import DecaySchedule, Teacher


@dataclass(frozen=True)
class PretrainSettings:
    """The full recipe of the base size. clones: masks per clip. layers: the teacher's last blocks that make targets, 0 = all. noise: at masked cells.

    ema: the teacher's slowness; None = rising over the first quarter of the run. side, measure, layer: of the alignment head (see `Alignment`).
    frames: of 10 ms per clip; shorter clips are padded, longer ones cut at the end. roll: shift and scale each clip by chance.
    """

    frames: int = FRAMES
    normalisation: Normalisation = AUDIOSET
    clones: int = 4
    mask: MaskPlan = field(default_factory=MaskPlan)
    noise: float = 0.01
    decoder: DecoderShape = field(default_factory=DecoderShape)
    weights: Weights = field(default_factory=Weights)
    ema: DecaySchedule | None = None
    layers: int = 0
    side: str = "student"
    measure: str = "mse"
    layer: int = 0
    roll: bool = False

    def check(self, architecture: Architecture) -> None:
        """CatError for values that do not fit the encoder."""
        patch, depth, decoder, mask = architecture.patch, architecture.depth, self.decoder, self.mask
        groups = max(decoder.groups, 1)
        rules = {
            f"frames must be a multiple of the patch, {patch}, up to {architecture.max_frames}": self.frames % patch == 0
            and 0 < self.frames <= architecture.max_frames,
            "clones must be 1 or more": self.clones > 0,
            "the decoder's width, kernel and groups must be 1 or more, its layers 0 or more": min(decoder.width, decoder.kernel, decoder.groups) > 0
            and decoder.layers >= 0,
            f"the decoder's groups must divide its width and {architecture.width}": decoder.width % groups == architecture.width % groups == 0,
            "the mask's square must be 1 cell or more": mask.square > 0,
            "1 - share + extra of the mask must not be negative": 1 - mask.share + mask.extra >= 0,
            f"layers and layer must be 0 to {depth}": 0 <= self.layers <= depth and 0 <= self.layer <= depth,
            f"side must be one of {', '.join(SIDES)}": self.side in SIDES,
            f"measure must be one of {', '.join(MEASURES)}": self.measure in MEASURES,
        }
        check_rules(rules)
        self.mask.visible_cells(self.frames // patch * architecture.bands)


class Pretraining:
    """The task of a `Run`: student, teacher, and where outside vectors come from."""

    def __init__(self, encoder: AudioTransformer, settings: PretrainSettings, run: RunSettings, external: External | None, external_width: int) -> None:
        self.settings, self.seed, self.external = settings, run.seed, external
        self.architecture, self.depth = encoder.architecture, encoder.architecture.depth
        width = self.architecture.width
        alignment = Alignment(width, external_width, side=settings.side, measure=settings.measure, layer=settings.layer) if external else None
        device = encoder.class_token.device
        self.model = Student(encoder.train(), Decoder(width, settings.decoder), alignment, settings.weights).to(device)
        ema = settings.ema or DecaySchedule(anneal=max(run.updates // 4, 1))
        self.teacher = Teacher(encoder, ema, layers=settings.layers)
        self.height, self.width = settings.frames // self.architecture.patch, self.architecture.bands

    def prepare(self, batch: Batch) -> int:
        """The masked cells of the whole batch."""
        cells = self.height * self.width
        return len(batch.clips) * self.settings.clones * (cells - self.settings.mask.visible_cells(cells))

    def errors(self, part: Batch, prepared: int) -> tuple[torch.Tensor, dict[str, float]]:
        mel = part.mel.to(self.teacher.encoder.class_token.device)
        masks = self.draw(part).to(mel.device)
        guess = self.model(mel, masks, self.draw_noise(part, masks))
        external = self.external(part.clips, part.waves) if self.external else None
        losses, spreads = self.model.losses(guess, masks, self.teacher.targets(mel), external)
        share = losses.masked / prepared
        terms = {"frame": losses.frame / prepared, "utterance": losses.utterance, "alignment": losses.alignment}
        numbers = {name: float(value.detach()) for name, value in terms.items()}
        return losses.objective(prepared), numbers | {name: value * share for name, value in spreads.items()}

    def draw(self, part: Batch) -> Masks:
        rows = [
            draw_masks(self.settings.clones, self.height, self.width, self.settings.mask, draws.generator(self.seed, "mask", part.place + i))
            for i in range(len(part.clips))
        ]
        return split_cells(torch.cat(rows), self.height, self.width)

    def draw_noise(self, part: Batch, masks: Masks) -> torch.Tensor:
        """[R,M,D], normal."""
        shape = (self.settings.clones, masks.hide.shape[1], self.architecture.width)
        device = masks.hide.device
        rows = [torch.randn(shape, device=device, generator=draws.generator(self.seed, "noise", part.place + i, device)) for i in range(len(part.clips))]
        return torch.cat(rows) * self.settings.noise

    def follow(self, update: int) -> None:
        self.teacher.follow(self.model.encoder, update)

    def measure(self, update: int) -> dict[str, float]:
        return {"decay": self.teacher.schedule.at(update)}

    def tensors(self) -> dict[str, torch.Tensor]:
        return {f"teacher.{name}": tensor for name, tensor in self.teacher.encoder.state_dict().items()}

    def load_tensors(self, tensors: dict[str, torch.Tensor], update: int) -> None:
        self.teacher.encoder.load_state_dict({name.removeprefix("teacher."): tensor for name, tensor in tensors.items() if name.startswith("teacher.")})
        self.teacher.update = update

    def export(self, folder: Path) -> Path:
        """Student as encoder.safetensors, teacher (which has no bottleneck) as teacher.safetensors."""
        for encoder, name in ((self.teacher.encoder, "teacher"), (self.model.encoder, "encoder")):
            architecture = replace(self.architecture, bottleneck=0) if name == "teacher" else self.architecture
            sizes = {"frames": self.settings.frames, "normalisation": self.settings.normalisation}
            file = write_checkpoint(folder / f"{name}.safetensors", Checkpoint(architecture, encoder.state_dict(), origin=f"pre-trained, {name}", **sizes))
        return file


def pretrain(source: str | Path | list[Clip], out: str | Path, *, resume: bool = True, on_step: OnStep | None = None, **arguments: Any) -> Path:
    """Trains an encoder on unlabelled sounds; returns `out`/encoder.safetensors, which `cat_encoder.load` reads.

    source, out and `arguments`: as for `open_pretraining`. `out` gets encoder.safetensors, teacher.safetensors, resume.safetensors and log.csv;
    the same call again goes on where it stopped, to the same bit (resume False: begins anew).
    on_step: called after every update; what it raises ends the run, which is saved first. CatError in sentences.
    """
    return train(open_pretraining(source, out, **arguments), resume=resume, on_step=on_step)


def open_pretraining(
    source: str | Path | list[Clip],
    out: str | Path,
    *,
    architecture: Architecture = PRESETS["cat-base"],
    settings: PretrainSettings | None = None,
    run: RunSettings | None = None,
    external: str | Path | Describe | None = None,
    start: str | Path | None = None,
    read: Reader = read_sound,
    shortest: int = SHORTEST,
    workers: int = 2,
    keep: int = 0,
    device: str | torch.device = "cpu",
) -> Run:
    """A pre-training run before its first update.

    source: folder, manifest or clips (see `find_clips`). external: what regularizes the representation (stored vectors, a transformers audio model folder, or
    a callable ([B,S], 16000) -> [B,E]); None = nothing, unless the clips name vectors of their own. start: a checkpoint to go on from (its shapes count).
    read: replaces reading by PyAV; shortest, workers, keep: see `Sounds`.
    """
    settings, run = settings or PretrainSettings(), run or RunSettings()
    clips = source if isinstance(source, list) else find_clips(source)
    encoder = move(start_encoder(architecture, start, run.seed), device)
    settings.check(encoder.architecture)
    sounds = Sounds(clips, read, settings.frames, settings.normalisation, shortest, roll=settings.roll, seed=run.seed, workers=workers, keep=keep)
    vectors = open_external(external, device) if external else StoredVectors() if clips[0].vector else None
    width = external_width(vectors, sounds) if vectors else 0
    with draws.seeded(run.seed, "decoder", 0):
        task = Pretraining(encoder, settings, run, vectors, width)
    told = tell_settings(encoder=encoder.architecture.as_json(), pretrain=settings, run=run, external={"width": width})
    return Run(task, sounds, run, open_folder(out), told)


def start_encoder(architecture: Architecture, start: str | Path | None, seed: int) -> AudioTransformer:
    """A checkpoint's encoder, or a fresh one with the values of 6.5 drawn from `seed`."""
    if start:
        return read_checkpoint(start).build()[0]
    with draws.seeded(seed, "encoder", 0):
        return AudioTransformer(architecture).initialise()


def external_width(vectors: External, sounds: Sounds) -> int:
    """How many values the outside encoder gives, from the first clip that can be read."""
    clip, wave, _ = sounds.load(0, 0)
    return vectors([clip], [wave]).shape[1]
