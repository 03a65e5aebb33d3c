"""The 527 AudioSet classes (CC BY 4.0), and the names behind the ids a checkpoint lists (spec/cat.md 3.3, 5)."""

from __future__ import annotations

import json
from pathlib import Path

FILE = Path(__file__).with_name("audioset_527.json")


def audioset() -> list[tuple[str, str]]:
    """(mid, name) of each class in the order of released heads."""
    return [(mid, name) for mid, name in json.loads(FILE.read_text(encoding="utf-8"))["labels"]]


def name_labels(indices: dict[str, str] | None, classes: int) -> list[str]:
    """Names for a head of so many classes. indices: label id -> its index as a string, as a fine-tuned file lists them; ids AudioSet does not know stay ids."""
    known = dict(audioset())
    if not indices and classes == len(known):
        return list(known.values())
    listed = {int(index): known.get(mid, str(mid)) for mid, index in (indices or {}).items() if str(index).isdecimal()}
    return [listed.get(index, f"class {index}") for index in range(classes)]
