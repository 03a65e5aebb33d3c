"""Looks through a folder of recordings before training: what each holds, which are near-duplicates, outliers, silent or broken (spec/cat.md 11, N5a)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ear import FRAME_RATE, OnStep
from ..errors import CatError
from ..training.clips import Clip, find_clips
from .aliases import NamedSound, Vocabulary
from .sift_files import Cache, Ear, Yardsticks, stamp_of, write_manifest
from .sound_check import HEARD, middle_odds, read_wish, stand_out
from .yardsticks import RATE, USUAL, loudness, make_yardsticks, match_level

SILENT_DB = -60.0  # dB of full scale; quieter clips teach silence
FULL, CLIPPED = 0.999, 0.01  # |sample| that counts as full level, and the share of such samples that is too much
NEIGHBOURS, ENOUGH = 5, 8  # what is usual is learned from the 5 nearest of each file, in folders of 8 or more
FLOOR = 0.1  # of the distance between noises and tones, below which files are not told apart
TAGS = 5  # listed for each file

Reader = Callable[[Path, float], tuple[Tensor, int]]


@dataclass(frozen=True)
class Rules:
    """What is kept. duplicate: likeness from which two files count as one: 1 = the same sound, 0 = as far apart as files of this folder usually are.

    outlier: spreads beyond the usual distance to the nearest five; 0 = none is dropped. shortest: seconds. listen: seconds of each file, from its start.
    unwanted: sounds in words, strictness 0..1.
    """

    duplicate: float = 0.8
    outlier: float = 4.0
    shortest: float = 1.0
    listen: float = 30.0
    unwanted: str = ""
    strictness: float = 0.5


@dataclass
class Sifted:
    """One file, and why it is dropped (no reasons = kept). heard: its strongest labels."""

    clip: Clip
    file: str  # below the folder, with forward slashes
    seconds: float = 0.0
    level_db: float = -math.inf  # of full scale, root mean square
    heard: list[tuple[str, float]] = field(default_factory=list)
    duplicate_of: str | None = None
    nearest: tuple[str, float] | None = None  # the file most like it, and how much
    distance: float | None = None  # to its neighbours, in spreads from the usual
    reasons: list[str] = field(default_factory=list)

    @property
    def kept(self) -> bool:
        return not self.reasons


@dataclass(frozen=True)
class Sifting:
    """The whole folder. manifest and features are the files written; training reads the manifest."""

    files: list[Sifted]
    manifest: Path
    features: Path
    remarks: tuple[str, ...]

    def __str__(self) -> str:
        kept = sum(item.kept for item in self.files)
        lines = [f"{len(self.files)} files: {kept} kept, {len(self.files) - kept} dropped", *self.remarks]
        lines += [f"drop {item.file}: {'; '.join(item.reasons)}" for item in self.files if not item.kept]
        return "\n".join(lines)


def sift_folder(encoder: Any, folder: Path, out: Path, read: Reader, rules: Rules = Rules(), on_file: OnStep = lambda done, total: None) -> Sifting:
    """Listens to every sound file below `folder` and writes manifest.json and features.safetensors into the folder `out`, each whole or not at all.

    read: (path, seconds) -> (waveform [C,S] of the first seconds, rate), CatError for what cannot be read: such files are listed and dropped. Files that did not
    change since features.safetensors was written are not listened to again; it also keeps what was done when on_file (called before each file and window) or
    anything else stops the work.
    CatError when the folder holds no sound files.
    """
    clips = find_clips(folder)
    items = [Sifted(clip, clip.path.relative_to(folder).as_posix()) for clip in clips]
    wish = read_wish(Vocabulary(encoder.labels), "", rules.unwanted) if rules.unwanted.strip() else None
    if wish and not encoder.has_head:
        raise CatError("Unwanted sounds cannot be told by an encoder without a head for tags: load a fine-tuned one, or leave them empty.")
    cache = Cache(out / "features.safetensors", hear_yardsticks(encoder, lambda *_: on_file(0, len(items))))
    ears: list[Ear | None] = []
    try:
        for item in items:
            on_file(len(ears), len(items))
            ears.append(examine(encoder, item, cache, read, rules.listen, lambda *_: on_file(len(ears), len(items))))
    finally:
        cache.save()
    on_file(len(items), len(items))
    heard = [(item, ear) for item, ear in zip(items, ears, strict=True) if ear]
    for item, ear in heard:
        judge_alone(item, ear, encoder.labels, wish.unwanted if wish else (), rules, middle_odds(cache.usual.scores))
    compare_all(heard, cache.usual.vectors, rules)
    manifest = write_manifest(out / "manifest.json", folder, items, rules)
    return Sifting(items, manifest, cache.file, wish.remarks if wish else ())


def hear_yardsticks(encoder: Any, on_step: OnStep) -> Yardsticks:
    """Sounds made by rule: they set the scale in small folders, and tell one encoder from another."""
    ears = [listen(encoder, sound[None], RATE, on_step) for sound in make_yardsticks(encoder.frames / FRAME_RATE)]
    return Yardsticks(torch.stack([ear.vector for ear in ears]), torch.stack([ear.scores for ear in ears]))


def examine(encoder: Any, item: Sifted, cache: Cache, read: Reader, seconds: float, on_step: OnStep) -> Ear | None:
    """What is to be known of one file, from the cache or by listening; None, and the reason in the item, when it cannot be read."""
    try:
        stamp = stamp_of(item.clip.path, seconds)
        known = cache.find(item.file, stamp)
        if known is None:
            waveform, rate = read(item.clip.path, seconds)
            known = listen(encoder, waveform[None], rate, on_step)
            cache.add(item.file, stamp, known)
        return known
    except (CatError, OSError, ValueError) as error:
        item.reasons.append(f"cannot be used: {error}")
        return None


def listen(encoder: Any, waveform: Tensor, rate: int, on_step: OnStep) -> Ear:
    """One pass over a sound [1,C,S]: features and scores together, window by window. At one loudness, so that a louder copy is a copy."""
    columns, scores, total = [], [], 0
    for window in encoder.whole_windows(match_level(waveform, USUAL), rate, on_step):
        encoded = encoder.encode(window.mel)
        part = encoder.new_features(window, encoded)
        columns.append(part.columns[0, : part.sounding].float().cpu())
        total += window.fresh
        if encoder.has_head:
            with torch.no_grad():
                scores.append(window.fresh * encoder.head(encoded.tokens)[0].float().cpu())
    heard = encoder.probabilities(sum(scores) / total) if scores else torch.zeros(0)
    level = 20 * math.log10(max(loudness(waveform), 1e-10))
    clipped = float((waveform.abs() >= FULL).float().mean())
    return Ear(torch.cat(columns).mean(0), heard, waveform.shape[-1] / rate, level, clipped)


def judge_alone(item: Sifted, ear: Ear, labels: list[str], unwanted: tuple[NamedSound, ...], rules: Rules, usual: Tensor) -> None:
    """Reasons that lie in the file itself. usual [classes]: what labels score on anything."""
    item.seconds, item.level_db = ear.seconds, ear.level_db
    order = ear.scores.argsort(descending=True, stable=True)[:TAGS].tolist()
    item.heard = [(labels[index], float(ear.scores[index])) for index in order]
    if ear.seconds < rules.shortest:
        item.reasons.append(f"{ear.seconds:.2f} s long, {rules.shortest:g} s are asked for")
    if ear.level_db < SILENT_DB:
        item.reasons.append("silent")
    if ear.clipped > CLIPPED:
        item.reasons.append(f"clipped: {ear.clipped:.0%} of its samples are at full level")
    for sound in unwanted:
        mine = [place for place, label in enumerate(labels) if label in sound.labels]
        strength, rank, _ = stand_out(ear.scores[None], mine, rules.strictness, usual)
        if strength >= HEARD:
            item.reasons.append(f"unwanted: {sound.words}, rank {int(rank)}")


def compare_all(heard: list[tuple[Sifted, Ear]], usual: Tensor, rules: Rules) -> None:
    """Reasons that lie in the other files: near-duplicates (the longest of them stays) and outliers."""
    candidates = sorted((pair for pair in heard if pair[0].kept), key=lambda pair: -pair[1].seconds)
    if not candidates:
        return
    items, vectors = [item for item, _ in candidates], torch.stack([ear.vector for _, ear in candidates])  # [n, D]
    scale = usual_distance(vectors, usual)
    kept: list[int] = []
    for index, item in enumerate(items):
        if kept:
            likeness = 1 - (vectors[kept] - vectors[index]).norm(dim=1) / scale
            best = int(likeness.argmax())
            item.nearest = (items[kept[best]].file, float(likeness[best]))
            if item.nearest[1] >= rules.duplicate:
                item.duplicate_of = item.nearest[0]
                item.reasons.append(f"near-duplicate of {item.nearest[0]} ({item.nearest[1]:.2f})")
                continue
        kept.append(index)
    mark_outliers([items[index] for index in kept], vectors[kept], rules.outlier)


def usual_distance(vectors: Tensor, usual: Tensor) -> float:
    """How far files lie from those around them: the middle distance to the fifth neighbour, so beyond a handful of copies of each.

    Not less than a tenth of the distance between noises and tones, which is all there is to go by in a folder of a few files, or of nothing but copies.
    """
    between = torch.pdist(usual).median()
    distances = (
        [(vectors - vector).norm(dim=1).kthvalue(NEIGHBOURS + 1).values for vector in vectors] if len(vectors) >= ENOUGH else []
    )  # itself is the nearest
    around = torch.stack(distances).median() if distances else torch.zeros(())
    return float(torch.maximum(around, FLOOR * between).clamp_min(1e-9))


def mark_outliers(items: list[Sifted], vectors: Tensor, limit: float) -> None:
    """How far each lies from its neighbours, counted from what is usual here; too far is a reason."""
    if len(items) < ENOUGH:
        return
    distances = torch.stack(
        [(vectors - vector).norm(dim=1).topk(NEIGHBOURS + 1, largest=False).values[1:].mean() for vector in vectors]
    )  # [n], itself left out
    middle = distances.median()
    spread = torch.maximum(1.4826 * (distances - middle).abs().median(), 0.05 * middle).clamp_min(1e-12)
    for item, distance in zip(items, ((distances - middle) / spread).tolist(), strict=True):
        item.distance = distance
        if 0 < limit <= distance:
            item.reasons.append(f"outlier: {distance:.1f} spreads farther from its nearest than usual")
