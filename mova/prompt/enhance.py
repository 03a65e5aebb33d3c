"""From an idea to the prompt: a picture is read into elements, idea and elements are written out, and the guards pass the text (spec/mova.md 8)."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from ..errors import InputError, PromptError
from ..image import open_reduced, three_channels
from .fields import SCHEMA, Elements, Fields, Line, parse_elements
from .guards import clean_answer, part_sound, restore_lines, shorten, strip_thoughts
from .instructions import LOOK, leaks, look_question, repair_question, write_question, write_rules
from .length import LONGEST, Count, Draft, estimate_tokens, fit_length
from .quotes import HELD, Lines, lines_of, quoted
from .template import NO_SUBTITLES, compose, describe_sound, part_sentences, sentence

log = logging.getLogger("mova")

LONGEST_IDEA = 30_000  # characters
SMALLEST = 64  # tokens: less holds no scene and no sound
PICTURE_SIDE = 1024  # px of the longer side that models are shown
ON_FAILURE = ("error", "use template")
CONTROL = re.compile(f"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|{HELD.pattern}")

OnText = Callable[[str], None]


@dataclass(frozen=True)
class Question:
    """What a model is asked: rules, the text to be answered, a picture and the form of the answer where there is one."""

    rules: str
    text: str
    picture: Image.Image | None = None
    schema: dict[str, Any] | None = None


class LanguageModel(Protocol):
    """Answers questions. `on_text` is called in the calling thread with the answer so far, several times a second; it may raise to cancel."""

    def ask(self, question: Question, seed: int, on_text: OnText) -> str: ...

    def release(self) -> None:
        """Gives memory and connections back; the next question may take them again."""


@dataclass(frozen=True)
class Enhanced:
    """The prompt, what was seen in the picture (None: no picture was read), its length in tokens, and what there is to say about it."""

    prompt: str
    elements: Elements | None
    tokens: int
    notes: tuple[str, ...]


def enhance_prompt(
    idea: str,
    image: torch.Tensor | str | Path | None = None,
    *,
    model: LanguageModel | None = None,
    seed: int = 0,
    max_tokens: int = LONGEST,
    count: Count | None = None,
    on_failure: str = "error",
    no_subtitles: bool = False,
    on_text: OnText | None = None,
) -> Enhanced:
    """An idea in any language -> the prompt MOVA was trained with. Quotes in the idea appear letter by letter.

    image: the start picture, a file or [H,W,3] or [F,H,W,3] in 0..1 (its first frame). model None: the template, which needs none and does
    not look at the picture. seed: another take. max_tokens: 64..512, counted by `count` (`TextEncoder.count_tokens`), else estimated.
    on_text(text so far) is called all the time, in this thread, and may raise to cancel. PromptError when the model fails, unless
    on_failure is "use template"; InputError for an idea that cannot be used. Notes are logged as well.
    """
    lines, fields = Lines(), clean_fields(Fields(idea))
    check_fields(fields, max_tokens, count or estimate_tokens)
    if on_failure not in ON_FAILURE:
        raise InputError(f"on_failure is {on_failure!r}; choose {' or '.join(ON_FAILURE)}.")
    picture = None if image is None else reduce_picture(image)
    held = hold_fields(fields, lines)
    elements, notes, sees = None, [], picture is not None
    try:
        if model is None:
            draft = compose_draft(held, seed, sees)
            notes += ["The template does not look at the picture; it writes nothing that could contradict it."] if sees else []
        else:
            elements, answer = ask_model(model, fields.idea, picture, seed, max_tokens, on_text or (lambda text: None))
            draft, notes = read_answer(answer, elements, held, lines)
    except PromptError as error:
        if on_failure == "error":
            raise
        draft, notes = compose_draft(held, seed, sees), [sentence(f"The template was used, because {error}")]
    return finish(draft, lines, elements, notes, max_tokens, count, no_subtitles)


def compose_prompt(fields: Fields, *, max_tokens: int = LONGEST, count: Count | None = None, no_subtitles: bool = False) -> Enhanced:
    """The template's prompt from separate fields, with nothing added to them; errors and notes as in `enhance_prompt`."""
    fields = clean_fields(fields)
    check_fields(fields, max_tokens, count or estimate_tokens)
    lines = Lines()
    return finish(compose_draft(hold_fields(fields, lines), None, False), lines, None, [], max_tokens, count, no_subtitles)


def clean_fields(fields: Fields) -> Fields:
    """Without control characters and blanks around the texts."""
    texts = {name: clean_text(text) for name, text in vars(fields).items() if name != "lines"}
    return Fields(**texts, lines=tuple(Line(**{name: clean_text(text) for name, text in vars(line).items()}) for line in fields.lines))


def clean_text(text: str) -> str:
    return CONTROL.sub("", text.encode("utf-8", "replace").decode()).strip()


def check_fields(fields: Fields, max_tokens: int, count: Count) -> None:
    """InputError for fields that are empty, too long, or say more than a prompt can hold."""
    if not isinstance(max_tokens, int) or not SMALLEST <= max_tokens <= LONGEST:
        raise InputError(f"max_tokens is {max_tokens}: {SMALLEST} to {LONGEST} is needed; MOVA reads {LONGEST} tokens.")
    texts = [text for name, text in vars(fields).items() if name != "lines"]
    spoken = [line.text for line in fields.lines]
    if not any(char.isalnum() for text in (*texts, *spoken) for char in text):
        raise InputError("The idea is empty: write in a line what is to be seen, said and heard.")
    if (size := sum(map(len, (*texts, *spoken)))) > LONGEST_IDEA:
        raise InputError(f"The idea has {size:,} characters, {LONGEST_IDEA:,} are read: give the scene alone, it becomes about 200 words anyway.")
    said = "\n".join(map(quoted, [*lines_of([fields.idea]), *spoken]))
    if (tokens := count(said)) > max_tokens:
        raise InputError(f"What is said in the idea takes {tokens} tokens, and a prompt holds {max_tokens}: shorten it; 8 seconds hold about 25 spoken words.")


def hold_fields(fields: Fields, lines: Lines) -> Fields:
    """The fields with everything that is said held, so that no later step can change or cut it."""
    return replace(fields, idea=lines.hold_quotes(fields.idea), lines=tuple(replace(line, text=lines.hold(line.text)) for line in fields.lines))


def compose_draft(fields: Fields, seed: int | None, sees_picture: bool) -> Draft:
    *scene, sound = compose(fields, seed=seed, sees_picture=sees_picture)
    return Draft(tuple(scene), sound)


def ask_model(model: LanguageModel, idea: str, picture: Image.Image | None, seed: int, max_tokens: int, on_text: OnText) -> tuple[Elements | None, str]:
    """Both stages: (elements, the model's answer as it is)."""
    try:
        elements = None if picture is None else read_picture(model, picture, seed, on_text)
        return elements, model.ask(Question(write_rules(max_tokens), write_question(idea, elements)), seed, on_text)
    finally:
        model.release()


def read_answer(answer: str, elements: Elements | None, held: Fields, lines: Lines) -> tuple[Draft, list[str]]:
    """A model's answer through the guards that models need: (draft with held lines, notes)."""
    text = clean_answer(answer)
    if leaks(text):
        raise PromptError(f"the language model repeated its instructions instead of following them: '{shorten(text)}'")
    draft, notes = restore_lines(part_sound(text), held.idea, lines, elements.visible_text if elements else ())
    if not draft.sound:
        notes.append("The paragraph about sound was added, because the model had written none.")
        draft = replace(draft, sound=describe_sound(held, part_sentences(held.idea)[1]))
    return draft, notes


def read_picture(model: LanguageModel, picture: Image.Image, seed: int, on_text: OnText) -> Elements:
    """The elements of the picture. An answer that does not follow the schema is sent back once, with what is wrong."""
    question = Question(LOOK, look_question(), picture, SCHEMA)
    answer = strip_thoughts(model.ask(question, seed, on_text))
    try:
        return parse_elements(answer)
    except PromptError as error:
        question = replace(question, text=repair_question(str(error)))
    answer = strip_thoughts(model.ask(question, seed, on_text))
    try:
        return parse_elements(answer)
    except PromptError as error:
        raise PromptError(f"the model did not describe the picture in the form asked for, twice ({error}): '{shorten(answer)}'. Use another model") from None


def reduce_picture(image: torch.Tensor | str | Path) -> Image.Image:
    """The first picture, at most 1024 px wide and high. Large ones are thinned out before anything is computed with their pixels."""
    if isinstance(image, (str, Path)):
        image = open_reduced(image, 2 * PICTURE_SIDE)
    frame = image[0] if isinstance(image, torch.Tensor) and image.ndim == 4 and len(image) else image
    if isinstance(frame, torch.Tensor) and frame.ndim >= 2:
        step = max(1, max(frame.shape[:2]) // (2 * PICTURE_SIDE))
        frame = frame[::step, ::step]
    pixels = (three_channels(frame).cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
    return picture


def finish(draft: Draft, lines: Lines, elements: Elements | None, notes: list[str], max_tokens: int, count: Count | None, no_subtitles: bool) -> Enhanced:
    """The draft within its length and with its lines, and everything that was said about it."""
    ending = f"\n\n{NO_SUBTITLES}" if no_subtitles else ""
    measure = count or estimate_tokens
    draft, cut = fit_length(draft, max_tokens, lambda text: measure(lines.fill(text) + ending))
    prompt = lines.fill(str(draft)) + ending
    tokens = measure(prompt)
    counted = f"{tokens} of {max_tokens} tokens" + ("." if count else ", estimated on the safe side: the text encoder was not there to count.")
    notes = [*notes, *([cut] if cut else []), counted]
    for note in notes:
        log.info("Prompt: %s", note)
    return Enhanced(prompt, elements, tokens, tuple(notes))
