"""What a prompt is made of: the elements seen in a picture, and the fields a creator fills in (spec/mova.md 8)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from ..errors import PromptError
from .quotes import find_quotes

TRIED = 50  # braces of an answer at which an object may begin
FIELD_LENGTH = 2000  # characters of one element: a model that repeats itself is cut
# The elements in the order they are asked for, and what each of them is.
ELEMENTS = {
    "style": "kind of picture (photo, film still, drawing, ...), palette, mood",
    "camera": "shot size, angle, position, composition, depth of field",
    "subjects": "every person, animal and main object: looks, clothes, pose, gaze, place in the frame",
    "setting": "place, background, props, and how they stand to the subjects",
    "light": "sources, direction, softness, colour, time of day",
    "visible_text": "every piece of writing in the picture, letter by letter in its own script and language",
}
LISTS = ("visible_text",)
TEXT, TEXTS = {"type": "string"}, {"type": "array", "items": {"type": "string"}}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {name: (TEXTS if name in LISTS else TEXT) | {"description": words} for name, words in ELEMENTS.items()},
    "required": list(ELEMENTS),
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Elements:
    """What is to be seen in a picture, in words."""

    style: str
    camera: str
    subjects: str
    setting: str
    light: str
    visible_text: tuple[str, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False, indent=2)


@dataclass(frozen=True)
class Line:
    """Something said: the words, and where they are known who says them, in which language and when ("at the end")."""

    text: str
    speaker: str = ""
    language: str = ""
    when: str = ""


@dataclass(frozen=True)
class Fields:
    """A clip as a creator describes it. Texts may be in any language and are used as they are; empty ones are left out."""

    idea: str
    lines: tuple[Line, ...] = ()
    sounds: str = ""
    music: str = ""
    camera: str = ""
    style: str = ""


def parse_elements(answer: str) -> Elements:
    """The elements in a model's answer, which may stand between other words. PromptError lists what does not follow SCHEMA."""
    found = next((item for item in find_objects(answer) if item.keys() & ELEMENTS.keys()), None)
    if found is None:
        raise PromptError("the answer holds no JSON object with these members")
    values = {name: read_element(found.get(name), name in LISTS) for name in ELEMENTS}
    wrong = [f"'{name}' must be {'a list of texts' if name in LISTS else 'a text'}" for name, value in values.items() if value is None]
    if not wrong and not any(values.values()):
        wrong = ["every element is empty"]
    if wrong:
        raise PromptError("; ".join(wrong))
    return Elements(**values)


def find_objects(answer: str) -> Iterator[dict[str, Any]]:
    """JSON objects that begin anywhere in the text."""
    decoder = json.JSONDecoder()
    for start in (match.start() for match in islice(re.finditer(r"\{", answer), TRIED)):
        try:
            found, _ = decoder.raw_decode(answer, start)
        except (ValueError, RecursionError):
            continue
        yield found


def read_element(value: Any, is_list: bool) -> str | tuple[str, ...] | None:
    """The value as the schema wants it, where that is no guess; None otherwise. A list for a text is joined, one text for a list is a list of one."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return None
    kept = [" ".join(text.split())[:FIELD_LENGTH] for text in texts if text.strip()]
    return tuple(kept) if is_list else "; ".join(kept)[:FIELD_LENGTH]


SCRIPT_LINE = re.compile(
    r"(?P<speaker>[^:：()（）\[\]【】.!?。！？\"“”「」«»]{1,80}?)\s*"
    r"(?:[(（](?P<language>[^)）]{1,40})[)）]\s*)?"
    r"(?:[\[【](?P<when>[^\]】]{1,80})[\]】]\s*)?"
    r"(?:(?<!\d)[:：]|[:：](?!\d))\s*(?P<text>.+)"  # no colon of a time: "Meet me at 10:30."
)  # fmt: skip


def parse_lines(script: str) -> tuple[Line, ...]:
    """Dialogue, one line of text each: `speaker (language) [when]: words`, of which only the words are needed."""
    lines = []
    for row in filter(None, map(str.strip, script.splitlines())):
        match = SCRIPT_LINE.fullmatch(row)
        parts = {name: (value or "").strip() for name, value in match.groupdict().items()} if match else {"text": row}
        quotes = find_quotes(parts["text"])
        whole = len(quotes) == 1 and (quotes[0].start, quotes[0].end) == (0, len(parts["text"]))
        lines.append(Line(**parts | {"text": quotes[0].inside if whole else parts["text"]}))
    return tuple(lines)
