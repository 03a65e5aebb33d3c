"""What a run learns from: folders of sound files, or manifests that list them (JSON, JSONL, TSV, CSV)."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import CatError

SOUNDS = frozenset(".wav .flac .mp3 .ogg .oga .opus .m4a .aac .aif .aiff .wma .webm .mka .mp4 .mov .mkv .m4v".split())
PATH_COLUMNS = ("path", "file", "filename", "audio", "wav", "audio_path", "fname")
LABEL_COLUMNS = ("labels", "label", "tags", "class", "category")
VECTOR_COLUMNS = ("vector", "embedding", "external")
LISTS = ("clips", "files", "items", "data")


@dataclass(frozen=True)
class Clip:
    """One sound file. labels: its classes' names; vector: a file with what an outside encoder says of it."""

    path: Path
    labels: tuple[str, ...] = ()
    vector: Path | None = None


def find_clips(source: str | Path) -> list[Clip]:
    """The clips of a folder (all sound files below it; a sub-folder's name is the label) or a manifest. CatError when there is none.

    Manifest: .json (a list, or an object with a list under "clips", "files", "items" or "data"; entries are paths or objects), .jsonl, or .tsv / .csv with
    a headline. Columns: path (or file, ...), labels (or label, ...; a list, or names split by ";" or "|"), vector, keep (false = left out).
    The older .tsv whose first line is the folder and whose others are path and length is read, too. Paths are relative to the manifest.
    """
    place = Path(source)
    if place.is_dir():
        clips = list(folder_clips(place))
        if not clips:
            raise CatError(f"{place} holds no sound files: put files such as {', '.join(sorted(SOUNDS)[:5])} into it (sub-folders count), or give a manifest.")
        return clips
    if not place.is_file():
        raise CatError(f"{place} does not exist: give a folder of sound files or a manifest (.json, .jsonl, .tsv, .csv).")
    clips = list(manifest_clips(place))
    if not clips:
        raise CatError(f"{place} lists no clips to keep: one entry per sound file is needed.")
    missing = [clip.path for clip in clips if not clip.path.is_file()]
    if missing:
        raise CatError(f"{place}: {len(missing)} of {len(clips)} listed files do not exist (first: {missing[0]}). Paths are relative to the manifest's folder.")
    return clips


def folder_clips(folder: Path) -> Iterator[Clip]:
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in SOUNDS and file.is_file():
            inside = file.relative_to(folder).parts
            yield Clip(file, inside[:1] if len(inside) > 1 else ())


def manifest_clips(file: Path) -> Iterator[Clip]:
    try:
        text = file.read_text(encoding="utf-8-sig")
        root, entries = READERS[file.suffix.lower()](text)
    except KeyError:
        raise CatError(f"{file} is no manifest: .json, .jsonl, .tsv or .csv is needed.") from None
    except (OSError, ValueError) as error:  # json and Unicode errors are ValueErrors
        raise CatError(f"{file} cannot be read as a manifest ({error}).") from None
    base = file.parent / root
    for number, entry in enumerate(entries, start=1):
        entry = {"path": entry} if isinstance(entry, str) else entry
        path = pick(entry, PATH_COLUMNS) if isinstance(entry, dict) else None
        if not isinstance(path, str) or not path:
            raise CatError(f"{file}: entry {number} names no file: a column or key called {' or '.join(PATH_COLUMNS[:2])} is needed.")
        if str(entry.get("keep", True)).lower() in ("false", "0", "no", "drop"):
            continue
        vector = pick(entry, VECTOR_COLUMNS)
        yield Clip(base / path, split_labels(pick(entry, LABEL_COLUMNS)), base / vector if vector else None)


def pick(entry: dict[str, Any], names: Iterable[str]) -> Any:
    return next((entry[name] for name in names if entry.get(name)), None)


def split_labels(labels: Any) -> tuple[str, ...]:
    if isinstance(labels, str):
        labels = labels.replace("|", ";").split(";")
    return tuple(dict.fromkeys(str(label).strip() for label in labels or () if str(label).strip()))


def read_json(text: str) -> tuple[str, list[Any]]:
    found = json.loads(text)
    if isinstance(found, dict):
        found = pick(found, LISTS)
    if not isinstance(found, list):
        raise ValueError(f'a list of clips, or an object with one under "{LISTS[0]}", is needed')
    return "", found


def read_jsonl(text: str) -> tuple[str, list[Any]]:
    return "", [json.loads(line) for line in text.splitlines() if line.strip()]


def read_table(text: str, delimiter: str) -> tuple[str, list[Any]]:
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return "", []
    head = [name.strip().lower() for name in lines[0].split(delimiter)]
    if not set(head) & set(PATH_COLUMNS):
        if len(head) > 1:
            raise ValueError(f"the first line is {lines[0]!r}: column names with path among them are needed")
        return lines[0].strip(), [line.split(delimiter)[0] for line in lines[1:]]
    return "", list(csv.DictReader(lines[1:], fieldnames=head, delimiter=delimiter))


READERS = {
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".tsv": lambda text: read_table(text, "\t"),
    ".csv": lambda text: read_table(text, ","),
}


# Labels


def with_labels(clips: list[Clip], file: str | Path) -> list[Clip]:
    """The clips with the labels of a label file: a line per clip, its name, a tab, its labels split by commas. CatError unless every clip has some."""
    table = {}
    for number, line in enumerate(read_lines(file), start=1):
        name, _, labels = line.partition("\t")
        if not labels.strip():
            raise CatError(f"{file}: line {number} is {line!r}: the clip's name, a tab and its labels split by commas are needed.")
        table[Path(name).stem] = tuple(label.strip() for label in labels.split(",") if label.strip())
    missing = [clip.path.name for clip in clips if clip.path.stem not in table]
    if missing:
        raise CatError(f"{file} has no line for {len(missing)} of {len(clips)} clips (first: {missing[0]}).")
    return [replace(clip, labels=table[clip.path.stem]) for clip in clips]


def read_classes(file: str | Path) -> list[str]:
    """Class names in order: one per line, or the released table "index,id,name" (the id is what clips are labelled with)."""
    rows = list(csv.reader(read_lines(file)))
    rows = rows[1:] if rows and rows[0][0].strip().lower() == "index" else rows
    names = [row[1] if len(row) > 2 and row[0].strip().isdigit() else ",".join(row) for row in rows]
    return [name.strip() for name in names]


def read_lines(file: str | Path) -> list[str]:
    try:
        return [line for line in Path(file).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise CatError(f"{file} cannot be read as text ({error}).") from None


def class_names(clips: list[Clip]) -> list[str]:
    """Every label of the clips, sorted. CatError unless there are two or more and every clip has one."""
    bare = [clip.path for clip in clips if not clip.labels]
    if bare:
        raise CatError(
            f"{len(bare)} of {len(clips)} clips have no label (first: {bare[0]}): sort files into sub-folders, list labels in a manifest, or give a label file."
        )
    names = sorted({label for clip in clips for label in clip.labels})
    if len(names) < 2:
        raise CatError(f"All clips are labelled {names[0]!r}: two classes or more are needed.")
    return names


def check_classes(names: list[str]) -> list[str]:
    """The names. CatError when one comes twice: of two outputs of one name the first would never be trained."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise CatError(f"{len(twice)} classes are named twice (first: {twice[0]!r}): every name once is needed.")
    return names


def label_matrix(clips: list[Clip], classes: list[str]) -> torch.Tensor:
    """[clips, classes] float32, 1 = present. CatError for a label that is no class."""
    places = {name: i for i, name in enumerate(classes)}
    matrix = torch.zeros(len(clips), len(classes))
    for row, clip in zip(matrix, clips, strict=True):
        for label in clip.labels:
            if label not in places:
                raise CatError(f"{clip.path} is labelled {label!r}, which is none of the {len(classes)} classes ({', '.join(classes[:5])}, ...).")
            row[places[label]] = 1
    return matrix


def balancing_weights(clips: list[Clip]) -> torch.Tensor:
    """[clips]: how likely each is drawn so that rare classes are heard as often as frequent ones: the sum of 1 / clips over its labels."""
    counts = Counter(label for clip in clips for label in clip.labels)
    return torch.tensor([sum(1 / counts[label] for label in clip.labels) for clip in clips])
