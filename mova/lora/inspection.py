"""What a LoRA file is and whether it fits the released model, for people who have no model at hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import LoraError
from .adapters import list_kinds, list_ranks, read_adapters
from .files import read_lora_file
from .keys import split_path
from .matching import Lora, match_lora
from .places import Shapes, name_family
from .report import show_range

COMPONENTS = {"high": "video_dit", "low": "video_dit_2", "audio": "audio_dit", "bridge": "dual_tower_bridge", "expert": "a video expert"}


@dataclass(frozen=True)
class Explanation:
    """`what` in a line, more in `notes`; usable: the file is whole, whether or not it fits."""

    what: str
    notes: tuple[str, ...]
    usable: bool = True


def explain_lora(path: Path, released: Shapes) -> Explanation:
    """Reads a LoRA and compares it with the shapes of the released model. A file that cannot be used is explained, not raised."""
    try:
        file = read_lora_file(path)
        adapters, _ = read_adapters(file, None)
    except LoraError as error:
        return Explanation("no LoRA that can be used", (str(error),), usable=False)
    told = dict.fromkeys(part for part, _ in (split_path(adapter.path) for adapter in adapters))
    parts = [COMPONENTS[part] for part in told if part is not None]
    ranks = f", rank {show_range(tuple(ranks))}" if (ranks := list_ranks(adapters)) else ""
    made_for = f"for {', '.join(parts)}" if parts else "which names no part of MOVA (made for one Wan model?)"
    what = f"a LoRA with {len(file.tensors):,} adapter tensors ({' + '.join(list_kinds(adapters))}){ranks}, {made_for}"
    try:
        found = str(match_lora(file, Lora(path), released).report)
    except LoraError as error:
        family = name_family(file).rstrip("; ")
        return Explanation(what, tuple(filter(None, ("It does not fit the released MOVA.", family, str(error)))))
    return Explanation(what, ("It fits the released MOVA.", *found.splitlines()))
