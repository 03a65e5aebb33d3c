"""Finds what an idea says in quotes: speech and visible text, in every script and style of quote."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

# Opening mark -> marks that may close it. Some close a quote in one language and open it in another.
DOUBLE = {
    '"': '"', "＂": "＂", "״": "״", "“": "”", "”": "”", "„": "“”\"", "‟": "”", "«": "»", "»": "«»", "❝": "❞", "‹": "›", "›": "‹›",
    "「": "」", "『": "』", "｢": "｣", "﹁": "﹂", "﹃": "﹄", "〝": "〞〟",
}  # fmt: skip
STRAIGHT = '"״＂'
SINGLE = {"'": "'", "‘": "’'", "‚": "‘’", "＇": "＇", "❛": "❜"}  # some of these are apostrophes as well
MISTYPED = {"“": '“"', "”": '"', "‟": '"', "«": '"'}  # what closes when the right mark is nowhere
REACH = 2000  # characters that a quote may hold, four times what a prompt can: an apostrophe has no partner, and looking for one must end
ELISIONS = set("tis twas twere twill til till cause cuz coz em n bout round neath gainst ere s d nuff".split())  # 'tis, rock 'n' roll
SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\ua4cf\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"  # scripts without blanks between words
NO_BLANKS = re.compile(f"[{SPACELESS}]")
FIRST_HELD = 0xE000  # private characters stand for what must not be touched; nothing that is read may hold them
HELD = re.compile("[\ue000-\uf8ff]")
ENDERS = ".!?…。！？؟۔।｡"
STOP = re.compile(rf"(?<![{ENDERS}])[{ENDERS}]+[\"'”’»)\]]*(?=\s|$|[{SPACELESS}])|\n+")
ABBREVIATIONS = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|St|Prof|vs|etc|e\.g|i\.e|approx|No)|\b[A-Za-z])\.$")
LOOSE = {"'": "['‘’‚ʼ＇`´]", '"': '["“”„«»＂״]', "-": "[-‐‑–—]", "…": r"(?:…|\.{3})"} | {mark: f"[{mark}]*" for mark in "*_`"}  # how models retype a character
LOOSE |= dict.fromkeys("‘’ʼ", LOOSE["'"]) | dict.fromkeys("“”„", LOOSE['"']) | dict.fromkeys("‐‑–—", LOOSE["-"])


class Lines:
    """What must come through letter by letter. In a text a line stands as one private character and the marks that end its sentence."""

    def __init__(self) -> None:
        self.stems: list[str] = []
        self.marks: dict[str, str] = {}  # line -> what stands for it

    def hold(self, line: str) -> str:
        """What stands for a line, between the double marks it will have."""
        if line not in self.marks:
            stem = line.rstrip(ENDERS) or line
            self.marks[line] = chr(FIRST_HELD + len(self.stems)) + line[len(stem) :]
            self.stems.append(stem)
        return quoted(line).replace(line, self.marks[line])

    def hold_quotes(self, text: str) -> str:
        """The text with every quote held."""
        pieces, at = [], 0
        for quote in find_quotes(text):
            pieces += [text[at : quote.start], self.hold(quote.inside)]
            at = quote.end
        return "".join([*pieces, text[at:]])

    def fill(self, text: str) -> str:
        return HELD.sub(lambda match: self.stems[ord(match[0]) - FIRST_HELD], text)


@dataclass(frozen=True)
class Quote:
    """text[start:end] with its marks; `inside` is what stands between them, without blanks at its ends."""

    start: int
    end: int
    inside: str


def find_quotes(text: str) -> list[Quote]:
    """The outermost quotes from left to right. Apostrophes, inch marks and Hebrew abbreviations are none; an open quote ends with its line."""
    found, at = [], 0
    barren: dict[str, int] = {}  # opening mark -> up to where nothing closes it: looked at once, however many apostrophes there are
    while at < len(text):
        closed = close_quote(text, at, barren)
        if closed is None:
            at += 1
            continue
        inside = text[at + 1 : closed[0]].strip()
        if any(map(speaks, inside)):
            found.append(Quote(at, closed[1], inside))
        at = closed[1] if inside else at + 1  # ""Hello"" has its marks twice
    return found


def close_quote(text: str, at: int, barren: dict[str, int]) -> tuple[int, int] | None:
    """Where the inside of a quote that opens at `at` ends, and where the quote itself; None when none opens."""
    mark = text[at]
    if mark in SINGLE:
        end = close_single(text, at, barren) if opens_single(text, at) else None
        return None if end is None else (end, end + 1)
    if mark not in DOUBLE or not opens_double(text, at):
        return None
    for marks in (DOUBLE[mark], MISTYPED.get(mark, "")):
        if (end := close_double(text, at, marks)) is not None:
            return end, end + 1
    line = text.find("\n", at)
    return (len(text), len(text)) if line < 0 else (line, line)


def opens_double(text: str, at: int) -> bool:
    """Not so: 24" and 5'10", a mark that closes what never opened, and the abbreviation mark between Hebrew letters."""
    before, after = text[at - 1 : at], text[at + 1 : at + 2]
    stray = (joins(before) or (before and before in ENDERS + "," + STRAIGHT)) and not (speaks(after) or after in "¿¡…'‘(" and after)
    return text[at] not in STRAIGHT or not (stray or hebrew_mark(text, at))


def hebrew_mark(text: str, at: int) -> bool:
    return text[at] in STRAIGHT and all("א" <= char <= "ת" for char in (text[at - 1 : at], text[at + 1 : at + 2]))


def close_double(text: str, at: int, marks: str) -> int | None:
    depth, opener, end = 1, text[at], reach_of(text, at)
    if not any(mark in text[at + 1 : end] for mark in marks):
        return None
    for place in range(at + 1, end):
        char = text[place]
        if char in marks and not hebrew_mark(text, place):
            depth -= 1
            if depth == 0:
                return place
        elif char == opener:
            depth += 1
    return None


def reach_of(text: str, at: int) -> int:
    """How far the partner of a mark is looked for: no further than its paragraph."""
    paragraph = text.find("\n\n", at, at + REACH)
    return min(len(text), at + REACH) if paragraph < 0 else paragraph


def opens_single(text: str, at: int) -> bool:
    """An apostrophe follows a letter, or stands for letters that are left out ('tis, '90s)."""
    if joins(text[at - 1 : at]) or not text[at + 1 : at + 2].strip():
        return False
    word = re.match(r"\w+", text[at + 1 : at + 20])
    return not word or not (word[0].lower() in ELISIONS or re.fullmatch(r"\d\ds", word[0]))


def close_single(text: str, at: int, barren: dict[str, int]) -> int | None:
    """The first mark that ends a word; behind an s it may be a possessive (the dogs' bowls), so a later one behind a full stop or comma wins."""
    first, mark, end = None, text[at], reach_of(text, at)
    for place in range(max(at + 1, barren.get(mark, 0)), end):
        char, before = text[place], text[place - 1]
        if char == "\n":
            end = place
            break
        if char in SINGLE[mark] and not before.isspace() and not (joins(before) and joins(text[place + 1 : place + 2])):
            if before not in "sS" if first is None else not before.isalnum():
                return place
            first = first or place
        elif first is not None and (char in DOUBLE or (char in SINGLE and opens_single(text, place))):
            break
    if first is None:
        barren[mark] = end
    return first


def speaks(char: str) -> bool:
    """Whether a character is more than a mark: a letter, a digit, or what stands for a line."""
    return char.isalnum() or HELD.match(char) is not None


def joins(char: str) -> bool:
    """Whether a letter or digit belongs to a word with its neighbours, as in scripts with blanks between words."""
    return char.isalnum() and not NO_BLANKS.match(char)


def split_sentences(text: str) -> list[str]:
    """Sentences and lines, each with the quotes it holds whole, in order, without blanks at their ends."""
    quotes, cuts = find_quotes(text), []
    for stop in STOP.finditer(text):
        holder = next((quote for quote in quotes if quote.start <= stop.start() < quote.end), None)
        if holder is None and not (text[stop.start()] == "." and ABBREVIATIONS.search(text[: stop.start() + 1][-12:])):
            cuts.append(stop.end())
    for quote in quotes:  # "Come in." The door opens.
        following = text[quote.end :].lstrip()[:1]
        if (
            quote.inside[-1] in ENDERS
            and (following.isupper() or NO_BLANKS.match(following))
            and (text[quote.end : quote.end + 1].isspace() or not joins(following))
        ):
            cuts.append(quote.end)
    edges = [0, *sorted(set(cuts)), len(text)]
    pieces = (text[start:end].strip() for start, end in zip(edges, edges[1:], strict=False))
    return [piece for piece in pieces if piece]


def loose_pattern(line: str) -> re.Pattern[str]:
    """Finds a line whose case, blanks, quotes, dashes or dots were retyped; inside of words it finds nothing."""
    words = ("".join(LOOSE.get(char, re.escape(char)) for char in word) for word in line.split())
    before, after = r"(?<!\w)" if joins(line[0]) else "", r"(?!\w)" if joins(line[-1]) else ""
    return re.compile(before + r"\s+".join(words) + after, re.IGNORECASE)


def quoted(line: str) -> str:
    """A line in double quotes; in curly ones where it holds straight ones itself."""
    return f"“{line}”" if '"' in line else f'"{line}"'


def lines_of(texts: Iterable[str]) -> list[str]:
    """What the texts say in quotes, each line once."""
    return list(dict.fromkeys(quote.inside for text in texts for quote in find_quotes(text)))
