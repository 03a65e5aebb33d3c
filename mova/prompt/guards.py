"""What stands between a model's answer and a prompt: clean prose, every line word for word, sound at the end."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..errors import PromptError
from .length import LEAD, Draft, last_words
from .quotes import HELD, Lines, find_quotes, loose_pattern, quoted, split_sentences
from .template import SOUND_OPENING, sentence

SHORTEST, LONGEST_PROSE = 40, 20_000  # characters: less or more is no prompt
LONGEST_CLAUSE = 300  # characters of a sentence that is put back whole
SHOWN = 80  # characters of a text named in a message

THOUGHTS = re.compile(r"^.*</(?:think|thinking|reasoning)>|<(?:think|thinking|reasoning)>.*", re.DOTALL | re.IGNORECASE)  # the first tag may be in the question
PREAMBLE = re.compile(
    r"(?:(?:sure(?: thing)?|certainly|of course|okay|ok|absolutely|great|understood|got it)\s*[.!:,]+\s*)?"
    r"(?:(?:here(?:'s|’s| is| are)|below is|this is|i(?:'ve|’ve| have) (?:written|prepared))\b[^\n:]{0,120}[:：]\s*)?"
    r"(?:(?:final |rewritten |enhanced |video |mova )*(?:prompt|description)\s*[:：]\s*)?"
    r"(?:(?:好的|当然|以下是|这是)[^\n：:]{0,60}[：:]\s*)?",
    re.IGNORECASE,
)  # fmt: skip
AFTERWORD = re.compile(
    r"\n\s*\(?(?:let me know|feel free|i hope|hope this|would you like|if you(?:'d|’d| would) like|note:|notes:|word count|\d+ words|please let me)[^\n]*\)?\s*$",
    re.IGNORECASE,
)
REFUSAL = re.compile(
    r"(?:(?:i'?m|i am) (?:very |so |really )?(?:sorry|afraid|unable|not able|not comfortable)|sorry,|(?:unfortunately,? )?i (?:can ?not|can'?t|won'?t|must decline|will not)\b"
    r"|i apologi[sz]e|as an? (?:ai|artificial intelligence|(?:large )?language model)\b|this (?:request|content|prompt) (?:violates|goes against|is not)|"
    r"抱歉|对不起|很遗憾|我(?:无法|不能|没办法)|作为(?:一个|一名)?(?:ai|人工智能|语言模型)|申し訳|すみません|죄송|je (?:suis désolé|ne peux pas|regrette)|désolé|lo siento|no puedo|es tut mir leid|"
    r"ich kann (?:das |diese[rmsn]? |dir |ihnen )?nicht|entschuldigung|mi dispiace|non posso|desculpe|sinto muito|извините|к сожалению|я не могу|آسف|אני מצטער)",
    re.IGNORECASE,
)
EMPHASIS = re.compile(r"\*+|`+|~~|(?<!\w)_+|_+(?!\w)")
# Marks of Markdown, taken off outside of quotes: lines first, then what stands inside of them.
MARKDOWN = (
    (re.compile(r"^\s*(?:```|~~~)[^\n]*$", re.MULTILINE), ""),
    (re.compile(r"^\s*(?:[-*_]\s*){3,}$", re.MULTILINE), ""),
    (re.compile(r"^\s{0,3}#{1,6}\s+[^\n]*$", re.MULTILINE), "\n"),  # a heading is no part of the prose
    (re.compile(r"^\s*(?:>\s?)+", re.MULTILINE), ""),
    (re.compile(r"^\s*(?:[-*+•]|\d{1,2}[.)])\s+", re.MULTILINE), ""),
    (re.compile(r"!?\[([^\]\n]{0,300})\]\([^)\n]{0,300}\)"), r"\1"),
    (EMPHASIS, ""),
)  # fmt: skip
LABEL = re.compile(r"^(?:paragraph \d+|scene|visuals?|dialogue|description|video|opening|action)\s*[:：]\s*", re.IGNORECASE | re.MULTILINE)
HOLDER = re.compile("\ue000(\\d+)\ue001")


def clean_answer(answer: str) -> str:
    """The prose of an answer: no thoughts, no Markdown, no words before or after it. PromptError for a refusal, or when no prose is left."""
    text = HELD.sub("", strip_thoughts(answer))
    if len(text) > LONGEST_PROSE:
        raise PromptError(f"the language model wrote {len(text):,} characters, which is no prompt: '{shorten(text)}'")
    text, held = hold_quotes(tidy_blanks(text))
    for pattern, replacement in MARKDOWN:
        text = pattern.sub(replacement, text)
    text = AFTERWORD.sub("", LABEL.sub("", text.strip())).strip()
    text = text[PREAMBLE.match(text).end() :]
    if REFUSAL.match(HOLDER.sub("", text).lstrip(" -–—\"'").replace("’", "'")):
        raise PromptError(f"the language model refused: '{shorten(answer.strip())}'. Change the idea, or use another model")
    text = HOLDER.sub(lambda match: held[int(match[1])], text).strip()
    quotes = find_quotes(text)
    if len(quotes) == 1 and (quotes[0].start, quotes[0].end) == (0, len(text)):
        text = quotes[0].inside  # the whole answer in quotes
    if len(text) < SHORTEST or not any(char.isalpha() for char in text):
        raise PromptError(f"the language model's answer is no prompt: '{shorten(answer.strip())}'")
    return re.sub(r" *\n\s*", "\n\n", tidy_blanks(text))


def tidy_blanks(text: str) -> str:
    """One blank, and one empty line, for each run of them: models that lost their way write thousands, which the patterns would look at for hours."""
    lines = (re.sub(r"[ \t\r\f\v]+", " ", line).strip(" ") for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def strip_thoughts(answer: str) -> str:
    return THOUGHTS.sub("", answer).strip()


def hold_quotes(text: str) -> tuple[str, list[str]]:
    """The text with a placeholder for each quote, and the quotes, in which only emphasis is taken off. A quote over several paragraphs is none."""
    held: list[str] = []
    for quote in reversed(find_quotes(text)):
        if "\n\n" not in quote.inside and (quote.start, quote.end) != (0, len(text)):
            held.append(EMPHASIS.sub("", text[quote.start : quote.end]))
            text = f"{text[: quote.start]}\ue000{len(held) - 1}\ue001{text[quote.end :]}"
    return text, held


def part_sound(text: str) -> Draft:
    """Paragraphs, the one about sound taken out; its sentences may stand at the end of another one. Sound "" where there is none."""
    scene, sound = [], []
    for paragraph in filter(None, map(str.strip, re.split(r"\n\s*\n", text))):
        sentences = split_sentences(paragraph)
        first = next((at for at, each in enumerate(sentences) if SOUND_OPENING.match(each)), len(sentences))
        scene += [" ".join(sentences[:first])] if first else []
        sound += sentences[first:]
    if sound and not sound[0].lower().startswith("the "):  # "Audio: rain"
        sound[0] = f"The audio shows: {SOUND_OPENING.sub('', sound[0], count=1)}"
    return Draft(tuple(scene), " ".join(sound))


def restore_lines(draft: Draft, idea: str, lines: Lines, visible: Iterable[str] = ()) -> tuple[Draft, list[str]]:
    """The draft with every line of the idea in it, held, and what had to be done for that, in sentences. `idea` is held, the draft is not.

    Retyped lines are set right in place; as many foreign quotes as lines that lack are taken for their translations; the rest
    is put back before the sound, in the words of the idea. `visible`: writing seen in the picture, which is no foreign quote.
    """
    wanted = sorted(lines.marks, key=len, reverse=True)  # the longest first: another line may be a part of it
    patterns = {line: loose_pattern(line) for line in wanted}
    seen = [loose_pattern(text) for text in visible]
    found: dict[str, str] = {}  # inside of a quote of the draft -> with its lines held
    for quote in find_quotes(str(draft)):
        inside = quote.inside
        for line, pattern in patterns.items():
            inside = pattern.sub(lines.marks[line], inside)
        found[quote.inside] = inside
    lacking = [line for line, mark in lines.marks.items() if not any(mark in inside for inside in found.values())]
    parts = [line for line in wanted if line in lacking]
    foreign = [
        was for was, inside in found.items()
        if was == inside and not any(pattern.search(was) for pattern in seen) and not any(loose_pattern(was).search(line) for line in parts)
    ]  # fmt: skip
    notes = []
    if lacking and len(foreign) == len(lacking):
        found |= {was: lines.marks[line] for was, line in zip(foreign, lacking, strict=True)}
        notes += [f"Set right, because the model had changed it: {quoted(line)}" for line in lacking]
        lacking, foreign = [], []
    scene = [swap_quotes(part, found) for part in draft.scene]
    scene += [" ".join(dict.fromkeys(clause_of(idea, lines.marks[line]) for line in lacking))] if lacking else []
    notes += [f"Put back, because the model had left it out: {quoted(line)}" for line in lacking]
    notes += [f"Not in the idea, but added by the model: {quoted(shorten(inside))}" for inside in foreign]
    return Draft(tuple(scene), swap_quotes(draft.sound, found)), notes


def swap_quotes(text: str, found: dict[str, str]) -> str:
    for quote in reversed(find_quotes(text)):
        if found.get(quote.inside, quote.inside) != quote.inside:
            text = text[: quote.start] + quoted(found[quote.inside]) + text[quote.end :]
    return text


def clause_of(idea: str, mark: str) -> str:
    """The words of the idea around a held line: its sentence when it holds no other line, else what leads to it."""
    home = next(text for text in split_sentences(idea) if mark in text)
    quotes = find_quotes(home)
    at = next((index for index, quote in enumerate(quotes) if mark in quote.inside), None)
    if at is None or (len(quotes) == 1 and len(home) <= LONGEST_CLAUSE):  # None: marks that mean something else in another place
        return sentence(home)
    before = home[quotes[at - 1].end if at else 0 : quotes[at].start].lstrip(" ,;:.，；、")
    return sentence(last_words(before, LEAD) + home[quotes[at].start : quotes[at].end])


def shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
