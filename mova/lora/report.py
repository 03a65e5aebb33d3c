"""What a LoRA is and what became of it, for people; and what its name and metadata tell."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from .files import LoraFile

TOWERS = {"high": "video high", "low": "video low", "audio": "audio", "bridge": "bridge"}
SHOWN = 3  # unmatched keys that are named
EXPERT_METADATA = "mova.expert"  # of files that `convert-lora` wrote: what the original's name told (high, low, both or audio)
NOT_NOISE = r"(?![ ._-]?(?:res|quality|detail|def|contrast|fidelity|light|speed|fps|poly|key|angle|heel|rank|vram|step))"  # "high" of something else
NOISE_LEVELS = {
    "high": re.compile(rf"(?i:high[ ._-]?noise|(?<![a-z])high(?![a-z]){NOT_NOISE})|(?<=[ ._-])HN?(?=$|[ ._-])"),
    "low": re.compile(rf"(?i:low[ ._-]?noise|(?<![a-z])low(?![a-z]){NOT_NOISE})|(?<=[ ._-])LN?(?=$|[ ._-])"),
}
NAMING = ("ss_output_name", "modelspec.title", "name")  # metadata that may tell what the file's name no longer does
TRIGGERS = ("modelspec.trigger_phrase", "ss_trigger_words", "trigger_words", "trigger_word", "trigger_phrase", "activation text", "instance_prompt")
TAGS = "ss_tag_frequency"  # {folder: {tag: count}} of the captions, by kohya's trainer
MOST_WORDS, LONGEST = 8, 200  # tags given as trigger words, characters of a phrase


@dataclass(frozen=True)
class LoraReport:
    """str() is what a person reads. matched, unmatched: layers of the file; towers: layers changed, by part of the denoiser."""

    label: str
    stamp: tuple[str, int, int]  # file name, bytes, time
    kinds: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()
    scales: tuple[str, ...] = ()
    towers: Mapping[str, int] = field(default_factory=dict)
    strengths: Mapping[str, float] = field(default_factory=dict)
    why: str = ""  # a file that names no expert went where it did
    matched: int = 0
    unmatched: tuple[str, ...] = ()
    nbytes: int = 0
    words: str = ""

    @property
    def partial(self) -> str:
        """What was not used, in a sentence; empty when all was."""
        if not self.unmatched:
            return ""
        more = ", ..." if len(self.unmatched) > SHOWN else ""
        return f"{len(self.unmatched)} of {self.matched + len(self.unmatched)} layers fit nothing in this model and are left out (first: {', '.join(self.unmatched[:SHOWN])}{more})."

    def __str__(self) -> str:
        towers = ", ".join(f"{TOWERS[part]} {count} layers {self.loudness(part)}" for part, count in self.towers.items())
        rank = f", rank {show_range(self.ranks)}" if self.ranks else ""
        lines = [
            f"{self.label}: {' + '.join(self.kinds)}{rank}, {self.matched} of {self.matched + len(self.unmatched)} layers matched, {self.nbytes / 1e6:.1f} MB of RAM"
        ]
        lines += [f"Changes {towers}" + (f" ({self.why})" if self.why else "")]
        lines += [f"Scale: {scale}" for scale in self.scales[:SHOWN]] + [self.partial, f"Trigger words: {self.words}" if self.words else ""]
        return "\n".join(line for line in lines if line)

    def loudness(self, part: str) -> str:
        strength = self.strengths.get(part, 1.0)
        return f"x {strength:g}" if strength else "skipped"


def show_range(numbers: tuple[int, ...]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


# ---------------------------------------------------------------- what names and metadata tell


def guess_expert(file: LoraFile) -> tuple[str, str]:
    """(high, low or both; why) for a file whose keys name no tower."""
    if file.metadata.get(EXPERT_METADATA) in ("high", "low", "both"):
        return file.metadata[EXPERT_METADATA], "as its metadata says"
    for source, text in (("name", file.path.stem), ("folder", file.path.parent.name), *(("metadata", file.metadata.get(key, "")) for key in NAMING)):
        found = [level for level, pattern in NOISE_LEVELS.items() if pattern.search(text)]
        if len(found) == 1:
            return found[0], f"its {source} '{text}' tells the {found[0]}-noise expert"
    return "both", "both experts, as neither its name nor its keys tell one"


def made_for_sound(file: LoraFile) -> bool:
    """Whether a file's metadata or name speaks of the audio tower."""
    return file.metadata.get(EXPERT_METADATA) == "audio" or re.search(r"(?i)(?<![a-z])audio(?![a-z])", file.label) is not None


def trigger_words(metadata: Mapping[str, str]) -> str:
    """The phrase that a LoRA was trained on, as its metadata tells; empty where it does not."""
    for key in TRIGGERS:
        if words := tidy(metadata.get(key, "")):
            return words
    return ", ".join(frequent_tags(metadata.get(TAGS, "")))


def frequent_tags(text: str) -> list[str]:
    """Tags that (nearly) every caption has, most frequent first."""
    try:
        folders = json.loads(text)
        counts: Counter[str] = Counter()
        for tags in folders.values():
            counts.update({tidy(tag): float(count) for tag, count in tags.items()})
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return []
    most = max(counts.values(), default=0)
    return [tag for tag, count in counts.most_common(MOST_WORDS) if tag and count > 0.9 * most]


def tidy(text: str) -> str:
    """One line of printable text."""
    return "".join(char if char.isprintable() else " " for char in text)[:LONGEST].strip().strip(",")
