"""Quotes of all kinds are found, and nothing else is; sentences are cut where they end."""

import time

import pytest

from mova.prompt.quotes import Lines, find_quotes, loose_pattern, quoted, split_sentences

FOUND = {
    'She says "Hello there."': ["Hello there."],
    "“Hi,” he said, “it’s me.”": ["Hi,", "it’s me."],
    "„Guten Tag“, sagt er.": ["Guten Tag"],
    "„Dzień dobry” mówi": ["Dzień dobry"],
    "»Hallo!« ruft sie, »Hej!» svarar han": ["Hallo!", "Hej!"],
    "”Hej” säger hon": ["Hej"],
    "« Bonjour\u202f! » dit-elle, ‹ oui ›": ["Bonjour\u202f!", "oui"],
    "‚Ja‘ sagt er": ["Ja"],
    "她说：「你好」，他答『好』": ["你好", "好"],
    "他喊“走吧”然后走": ["走吧"],
    '他喊"走吧"然后走': ["走吧"],
    "‘你好’他说": ["你好"],
    "〝縦書き〟と「彼は『はい』と言った」": ["縦書き", "彼は『はい』と言った"],
    "＂全角＂": ["全角"],
    "قالت: «مرحبا بك» ثم \"وداعا\"": ["مرحبا بك", "وداعا"],
    "אמרה ״שלום לך״ וגם \"להתראות\"": ["שלום לך", "להתראות"],
    "'Don't go,' he said. 'It's late.'": ["Don't go,", "It's late."],
    "'The dogs' bowls are empty,' he said": ["The dogs' bowls are empty,"],
    "'Yes' he said, 'but no.'": ["Yes", "but no."],
    "‘We’re late,’ she says": ["We’re late,"],
    "He says “Hello“ and then": ["Hello"],
    '“He told me ‘go away’ yesterday”': ["He told me ‘go away’ yesterday"],
    'He said: ""Hello""': ["Hello"],
    'A 24" monitor shows "HELLO" and he is 5\'10" tall': ["HELLO"],
    'An open "quote ends with its line\nand this is none': ["quote ends with its line"],
}  # fmt: skip
NONE = [
    "The dogs' bowls and rock 'n' roll, 'tis the '90s", "l'acqua è un po' fredda, aujourd'hui", "The boys' team and the girls' team", "It's Peter's",
    'צה"ל וארה"ב', 'a 12" record', '""', '" "', '"..."', "ʻokina and Кам’янець", "O'Neill’s pub", "`code`", "",
]  # fmt: skip


@pytest.mark.parametrize("text", FOUND)
def test_what_is_said_is_found(text):
    assert [quote.inside for quote in find_quotes(text)] == FOUND[text]
    assert all(quote.inside in text[quote.start : quote.end] for quote in find_quotes(text))


@pytest.mark.parametrize("text", NONE)
def test_apostrophes_and_inches_are_no_quotes(text):
    assert find_quotes(text) == []


@pytest.mark.parametrize(
    "text", ["'a " * 6000, "'a's " * 5000, "a\u2019 \u2018b " * 3000, '"' * 20001, "“" * 20000, "’" * 20000, "‘a s’" * 4000, "«" * 20000, "「" * 20000]
)
def test_nothing_makes_it_slow(text):
    start = time.perf_counter()
    find_quotes(text)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("text", ["!" * 20000 + "x", "?!" * 10000 + "x", "a. " * 6000, "\n" * 20000])
def test_sentences_are_found_as_fast(text):
    start = time.perf_counter()
    split_sentences(text)
    assert time.perf_counter() - start < 2


def test_an_apostrophe_looked_at_once_hides_no_later_quote():
    """What closes nothing is remembered up to where it was looked at, and not beyond."""
    for filling in ("a " * 1100, "a\n" * 40, "a " * 60 + "\n\n"):
        assert [quote.inside for quote in find_quotes(f"rock 'x {filling}he says 'yes' and \u2018no\u2019.")][-2:] == ["yes", "no"]


def test_sentences_hold_their_quotes():
    assert split_sentences('Mr. Smith walks. "Come in." The door opens... He says "a. b." and goes.') == [
        "Mr. Smith walks.", '"Come in."', "The door opens...", 'He says "a. b." and goes.',
    ]  # fmt: skip
    assert split_sentences("她走进来。她说：“你好。”然后离开。\nPi is 3.14 now") == ["她走进来。", "她说：“你好。”", "然后离开。", "Pi is 3.14 now"]
    assert split_sentences("أين أنت؟ هنا۔ نعم") == ["أين أنت؟", "هنا۔", "نعم"]


@pytest.mark.parametrize(
    "line, retyped",
    [("It’s late…", "it's  late..."), ("Well-known", "Well–known"), ("Go\u00a0now", "go now"), ("你好", "他说你好吗"), ("f*** off", "f off"), ("No.", "(no.)")],
)
def test_a_retyped_line_is_recognised(line, retyped):
    assert loose_pattern(line).search(retyped)


@pytest.mark.parametrize("line, text", [("Hi", "this"), ("No.", "piano."), ("Listen", "Écoute"), ("a.b", "aXb")])
def test_another_text_is_not(line, text):
    assert not loose_pattern(line).search(text)


@pytest.mark.parametrize("text", [text for text in FOUND if FOUND[text]])
def test_held_lines_come_back_in_double_marks(text):
    lines = Lines()
    held = lines.hold_quotes(text)
    assert not any(line in held for line in FOUND[text]) and [quote.inside for quote in find_quotes(held)] == [lines.marks[line] for line in FOUND[text]]
    filled = lines.fill(held)
    assert all(quoted(line) in filled for line in FOUND[text])


def test_marks_that_the_line_does_not_hold_itself():
    assert quoted("Oui") == '"Oui"' and quoted('a "b" c') == '“a "b" c”'
