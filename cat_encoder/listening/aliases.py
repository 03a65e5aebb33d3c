"""Everyday words for sounds, in English and Chinese, and the labels of the classifier that mean them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path

TABLE = Path(__file__).with_name("aliases.json")
PIECES = re.compile(r"[,;.!?|\n，；。、！？]+")  # between two sounds of a list
TOKENS = re.compile(r"[0-9a-zà-öø-ÿ]+(?:'[a-z]+)?|[\u3400-\u9fff]")  # a Latin word, or one Chinese character
NEGATIONS = {("no",), ("not",), ("without",), ("never",), ("没", "有"), ("不", "要"), ("无",)}
TURNS = {("but",), ("only",), ("except",), ("但",), ("只",)}  # where a negation ends
FILLERS = set(
    "a an the of in on at and or with to from by is are be as some any very there it its sound sounds 的 声 音 和 与 在 里 有 一 个 着 了 上 下 中 正".split()
)
ENDINGS = (("ies", "y"), ("ing", ""), ("ed", ""), ("es", "e"), ("s", ""))
UNENDING = ("ss", "us", "is")  # an s that is no plural
SHORTEST = 3  # letters that stay of a word when its ending is cut

Words = tuple[str, ...]


@dataclass(frozen=True)
class NamedSound:
    """A sound somebody named: their words, the labels any of which means it, and whether they wrote 'no' before it."""

    words: str
    labels: tuple[str, ...]
    negated: bool = False


@dataclass(frozen=True)
class Reading:
    """What was understood of a text, in its order, and the words that name no known sound."""

    sounds: tuple[NamedSound, ...]
    unknown: tuple[str, ...]


class Vocabulary:
    """The words that mean labels of one classifier: the labels themselves, their parts, and the alias table."""

    def __init__(self, labels: Sequence[str]) -> None:
        """labels: those of the classifier, in any order and of any set; aliases of others are left out."""
        there = set(labels)
        self.exact: dict[Words, dict[str, None]] = {}  # labels as ordered sets
        self.stems: dict[Words, dict[str, None]] = {}
        for label in labels:
            self.add(self.exact, label, [label])
        for words, meant in read_groups():
            self.add(self.exact, words, [label for label in meant if label in there])
        for words, meant in self.exact.items():
            self.stems.setdefault(tuple(map(stem, words)), {}).update(meant)
        parts = [(part, label) for label in labels for part in name_parts(label) if not self.find(tokens(part))]
        for part, owner in parts:
            self.add(self.exact, part, [owner])  # a part of a name means every label it is part of, unless it is a name or alias itself
            self.add(self.stems, " ".join(map(stem, tokens(part))), [owner])
        self.longest = max(map(len, self.exact), default=0)

    @staticmethod
    def add(names: dict[Words, dict[str, None]], words: str, meant: Iterable[str]) -> None:
        if found := dict.fromkeys(meant):
            names.setdefault(tokens(words), {}).update(found)

    def find(self, words: Words) -> tuple[str, ...]:
        """The labels that these words as a whole mean, as written or in another form of the same words; () for none."""
        return tuple(self.exact.get(words) or self.stems.get(tuple(map(stem, words))) or ())

    def suggest(self, words: str) -> str:
        """' (did you mean ...?)' with names that are written alike; '' when there is none."""
        alike = get_close_matches(words, map(join, self.exact), n=2, cutoff=0.75)
        return f" (did you mean {' or '.join(alike)}?)" if alike else ""

    def read(self, text: str) -> Reading:
        """The sounds named in a text: a list with commas or lines, or plain sentences, whose other words are told as unknown."""
        sounds: dict[tuple[Words, bool], NamedSound] = {}
        unknown: dict[str, None] = {}
        for piece in self.pieces(text):
            negated, strange = False, [[]]  # runs of words that mean nothing here
            for words in self.cut(piece):
                if labels := self.find(words):
                    sounds.setdefault((words, negated), NamedSound(join(words), labels, negated))
                elif words in NEGATIONS | TURNS:
                    negated = words in NEGATIONS
                elif words[0] not in FILLERS:
                    strange[-1] += words
                    continue
                strange.append([])
            unknown |= dict.fromkeys(join(run) for run in strange if run)
        return Reading(tuple(sounds.values()), tuple(unknown))

    def pieces(self, text: str) -> list[Words]:
        """The text cut at commas and line ends, except where a comma belongs to a label ("Male speech, man speaking")."""
        found = []
        for line in text.splitlines():
            parts = [words for part in PIECES.split(line) if (words := tokens(part))]
            while parts:
                count = next((n for n in range(len(parts), 1, -1) if sum(parts[:n], ()) in self.exact), 1)
                found.append(sum(parts[:count], ()))
                parts = parts[count:]
        return found

    def cut(self, piece: Words) -> list[Words]:
        """The known names in a piece, longest first from left to right; what is between them word by word."""
        found = []
        while piece:
            sizes = range(min(self.longest, len(piece)), 1, -1)
            size = next((size for size in sizes if piece[:size] in NEGATIONS or self.find(piece[:size])), 1)
            found.append(piece[:size])
            piece = piece[size:]
        return found


def tokens(text: str) -> Words:
    """Words in small letters; each Chinese character is one."""
    return tuple(TOKENS.findall(text.lower().replace("’", "'")))


def join(words: Sequence[str]) -> str:
    """Words as they are read; Chinese without spaces."""
    return re.sub(r"(?<=[\u3400-\u9fff]) (?=[\u3400-\u9fff])", "", " ".join(words))


def stem(word: str) -> str:
    """What forms of an English word share: barks, barked, barking -> bark; geese and the like are in the table."""
    word = word.removesuffix("'s")
    for ending, rest in ENDINGS:
        start = word[: -len(ending)]
        if word.endswith(ending) and not word.endswith(UNENDING) and len(start) >= SHORTEST and re.search("[aeiouy]", start):
            word = start + rest
            break
    word = word.removesuffix("e") if len(word) > SHORTEST + 1 else word  # not of care, which is no car
    return word[:-1] if len(word) > SHORTEST and word[-1] == word[-2] else word


def name_parts(label: str) -> list[str]:
    """The names a label is made of: "Vehicle horn, car horn" are two; "Chopping (food)" is also Chopping."""
    parts = [part.removeprefix(" and ").strip() for part in label.split(",")]
    bare = [re.sub(r"\s*\(.*?\)", "", part) for part in [label, *parts]]
    return [part for part in dict.fromkeys([*parts, *bare]) if part not in (label, "etc.", "")]


@cache
def read_table() -> dict:
    """The alias table: "groups" of labels with the words for them, and "families" (a label, and those whose sound is also its own)."""
    return json.loads(TABLE.read_text(encoding="utf-8"))


def read_groups() -> Iterable[tuple[str, list[str]]]:
    """(words, the labels they mean), one by one."""
    return ((words, group["labels"]) for group in read_table()["groups"] for words in group["words"])


def families() -> dict[str, list[str]]:
    """By label those that are always heard as it too: a piano is Music."""
    return read_table()["families"]
