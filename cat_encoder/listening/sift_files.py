"""The two files that sifting writes: features that need not be computed again, and the manifest that training reads."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import CatError
from ..files import whole_file
from ..training.state import load_state, save_state

if TYPE_CHECKING:
    from .sift import Rules, Sifted

log = logging.getLogger(__name__)

SAME = 1e-3  # relative difference up to which two encoders are one
Stamp = list[float]

NUMBERS = ("seconds", "level_db", "clipped")


@dataclass(frozen=True)
class Ear:
    """What was learned of one file by listening: vector [D], scores [classes] (none without a head), seconds, level and share of clipped samples."""

    vector: Tensor
    scores: Tensor
    seconds: float
    level_db: float
    clipped: float


@dataclass(frozen=True)
class Yardsticks:
    """What sounds made by rule are to an encoder: vectors [4,D], scores [4,classes]."""

    vectors: Tensor
    scores: Tensor

    def same(self, other: Yardsticks) -> bool:
        """Whether both come from one encoder."""
        pairs = ((self.vectors, other.vectors), (self.scores, other.scores))
        return all(mine.shape == theirs.shape and (mine - theirs).norm() <= SAME * mine.norm() for mine, theirs in pairs)


class Cache:
    """What was heard of each file, in one safetensors file: vectors [F,D], scores [F,classes], those of the yardsticks, and by file name its stamp.

    Features of another encoder (told by `usual`) or a damaged file count as none.
    """

    def __init__(self, file: Path, usual: Yardsticks) -> None:
        self.file, self.usual, self.changed = file, usual, False
        self.known: dict[str, tuple[Stamp, Ear]] = {}
        if file.is_file():
            self.load()

    def load(self) -> None:
        try:
            tensors, story = load_state(self.file)
            usual = Yardsticks(tensors["usual_vectors"], tensors["usual_scores"])
            rows = list(zip(story["files"], tensors["vectors"], tensors["scores"], strict=True))
            known = {row["file"]: (row["stamp"], Ear(vector, score, *(float(row[name]) for name in NUMBERS))) for row, vector, score in rows}
        except (CatError, LookupError, TypeError, ValueError) as error:
            log.warning("%s is not used, all files are listened to again: %s", self.file, error)
            return
        if self.usual.same(usual):
            self.known = known

    def find(self, file: str, stamp: Stamp) -> Ear | None:
        """What is known of the file, unless it changed or is to be heard otherwise."""
        known, ear = self.known.get(file, (None, None))
        return ear if known == stamp else None

    def add(self, file: str, stamp: Stamp, ear: Ear) -> None:
        self.known[file] = (stamp, ear)
        self.changed = True

    def save(self) -> None:
        """Writes what was added, if anything was; the file is replaced whole."""
        if not self.changed:
            return
        ears = [ear for _, ear in self.known.values()]
        rows = [{"file": file, "stamp": stamp} | {name: getattr(ear, name) for name in NUMBERS} for file, (stamp, ear) in self.known.items()]
        heard = {"vectors": torch.stack([ear.vector for ear in ears]), "scores": torch.stack([ear.scores for ear in ears])}
        save_state(self.file, heard | {"usual_vectors": self.usual.vectors, "usual_scores": self.usual.scores}, {"files": rows})
        self.changed = False


def stamp_of(path: Path, seconds: float) -> Stamp:
    """Size in bytes, time of the last change in ns, and how much of the file is listened to, s."""
    about = path.stat()
    return [about.st_size, about.st_mtime_ns, seconds]


def write_manifest(file: Path, folder: Path, items: list[Sifted], rules: Rules) -> Path:
    """manifest.json: {"folder", "rules", "kept", "dropped", "clips": [{"path", "keep", ...}]}, paths relative to it. The file is replaced whole."""
    kept = sum(item.kept for item in items)
    story = {
        "folder": str(folder),
        "rules": asdict(rules),
        "kept": kept,
        "dropped": len(items) - kept,
        "clips": [describe(item, file.parent) for item in items],
    }
    with whole_file(file) as draft:
        draft.write_text(json.dumps(story, ensure_ascii=False, indent=1) + "\n", encoding="utf-8", newline="\n")
    return file


def describe(item: Sifted, beside: Path) -> dict[str, Any]:
    return {
        "path": path_from(item.clip.path, beside),
        "keep": item.kept,
        "reasons": item.reasons,
        "labels": list(item.clip.labels),
        "seconds": round(item.seconds, 3),
        "level_db": round(max(item.level_db, -200.0), 1),
        "heard": [{"label": label, "score": round(score, 4)} for label, score in item.heard],
        "duplicate_of": item.duplicate_of,
        "nearest": {"file": item.nearest[0], "likeness": round(item.nearest[1], 3)} if item.nearest else None,
        "distance": item.distance if item.distance is None else round(item.distance, 2),
    }


def path_from(path: Path, beside: Path) -> str:
    """The way from the folder `beside`, with forward slashes; the full path where there is none (another drive on Windows)."""
    try:
        return Path(os.path.relpath(path, beside)).as_posix()
    except ValueError:
        return path.resolve().as_posix()
