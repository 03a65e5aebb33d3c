"""The length of a prompt in tokens of the text encoder, and what goes first when it is too long."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import InputError
from .quotes import ENDERS, HELD, NO_BLANKS, find_quotes, split_sentences
from .template import sentence

Count = Callable[[str], int]  # tokens of a text

LONGEST = 512  # tokens that MOVA reads
ENDLESS = 300  # characters: a sentence that may be cut within
LEAD = 60  # characters kept before a quote when nothing else fits
LETTERS_PER_TOKEN = (4, 2)  # of words in plain Latin letters, and in others
PLAIN_MARKS = "“”‘’„«»…—–、。，！？：；「」『』"  # have pieces of their own in the vocabulary

Paragraphs = list[list[str]]  # of sentences


@dataclass(frozen=True)
class Draft:
    """A prompt in the making: what is seen and said, and the last paragraph, about sound."""

    scene: tuple[str, ...]
    sound: str

    def __str__(self) -> str:
        return "\n\n".join([*self.scene, self.sound])


def fit_length(draft: Draft, limit: int, count: Count) -> tuple[Draft, str]:
    """The draft in at most `limit` tokens, and what was left out, in a sentence ("" = nothing).

    Sentences without a quote go first, from the end of the scene; then what leads to a quote is shortened. Quotes and the
    paragraph about sound are never cut: InputError when they alone are too long.
    """

    def fits(candidate: Draft) -> bool:
        return count(str(candidate)) <= limit

    if fits(draft):
        return draft, ""
    whole = [split_sentences(paragraph) for paragraph in draft.scene]
    short, bare = ([[lead_only(text, lead) for text in sentences] for sentences in whole] for lead in (LEAD, 0))
    for paragraphs in (whole, short, bare):
        loose = [(row, column) for row, sentences in enumerate(paragraphs) for column, text in enumerate(sentences) if not spoken(text)]
        kept = largest(len(loose), lambda number, paragraphs=paragraphs: fits(keep(paragraphs, number, draft.sound)))
        if kept is not None:
            made = keep(paragraphs, kept, draft.sound)
            if kept < len(loose):
                made = keep_words(paragraphs, loose[kept], kept, draft.sound, fits) or made
            sizes = (sum(map(len, each.scene)) for each in (draft, made))
            return made, "Too long for {} tokens: the scene was cut from {:,} to {:,} characters; what is said and heard is whole.".format(limit, *sizes)
    raise InputError(
        f"What is said and the paragraph about sound alone take {count(str(keep(bare, 0, draft.sound)))} tokens, and {limit} fit: neither is ever cut. "
        "Shorten the dialogue or the sounds; a clip of 8 seconds holds about 25 spoken words."
    )


def keep(paragraphs: Paragraphs, number: int, sound: str) -> Draft:
    """Every sentence with a quote, and the first `number` of the others."""
    scene = []
    for sentences in paragraphs:
        kept = []
        for text in sentences:
            number -= not spoken(text)
            kept += [text] if spoken(text) or number >= 0 else []
        scene.append(" ".join(kept))
    return Draft(tuple(filter(None, scene)), sound)


def keep_words(paragraphs: Paragraphs, place: tuple[int, int], kept: int, sound: str, fits: Callable[[Draft], bool]) -> Draft | None:
    """Beside the first `kept` sentences as many words of the next one as fit; None for a sentence that is better whole or not at all."""
    row, column = place
    text = paragraphs[row][column]
    if kept and len(text) < ENDLESS:
        return None

    def draft(size: int) -> Draft:
        cut = [list(sentences) for sentences in paragraphs]
        cut[row][column] = first_words(text, size)
        return keep(cut, kept + 1, sound)

    size = largest(len(text), lambda size: fits(draft(size)))
    return None if size is None else draft(size)


def largest(end: int, fits: Callable[[int], bool]) -> int | None:
    """The largest number in 0..end that fits, where everything below one that fits does too; None when 0 does not."""
    if not fits(0):
        return None
    low = 0
    while low < end:
        middle = (low + end + 1) // 2
        low, end = (middle, end) if fits(middle) else (low, middle - 1)
    return low


def first_words(text: str, length: int) -> str:
    """At most `length` characters, ending with a whole word and a full stop."""
    head = text[:length]
    if length < len(text) and not NO_BLANKS.search(head):
        head = head.rpartition(" ")[0]
    return sentence(head)


def last_words(text: str, length: int) -> str:
    """At most `length` characters from the end, beginning with a whole word."""
    if len(text) <= length:
        return text
    tail = text[len(text) - length :]
    return tail if NO_BLANKS.search(tail) else tail.partition(" ")[2]


def lead_only(text: str, lead: int) -> str:
    """A sentence with quotes, each with at most `lead` characters before it; other sentences as they are."""
    quotes = find_quotes(text)
    starts = [0, *(quote.end for quote in quotes)]
    leads = [last_words(text[start : quote.start].lstrip(" ,;" + ENDERS), lead) for start, quote in zip(starts, quotes, strict=False)]
    short = " ".join(sentence(before + text[quote.start : quote.end]) for before, quote in zip(leads, quotes, strict=True))
    return short if quotes and HELD.findall(short) == HELD.findall(text) else text


def spoken(text: str) -> bool:
    """Whether a sentence holds something that must stay."""
    return bool(HELD.search(text) or find_quotes(text))


def estimate_tokens(text: str) -> int:
    """UMT5 tokens of a text by a careful rule, rather too many than too few, for when there is no tokenizer to ask."""
    total = 1  # the end token
    for word in re.findall(r"[^\W\d_]+|\d|[^\w\s]|_", text):
        if NO_BLANKS.search(word):
            total += len(word)
        elif word.isalpha():
            total += math.ceil(len(word) / LETTERS_PER_TOKEN[not word.isascii()])
        else:
            total += 1 if word.isascii() or word in PLAIN_MARKS else len(word.encode())
    return total
