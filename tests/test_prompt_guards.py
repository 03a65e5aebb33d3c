"""Between a model's answer and the prompt: prose alone, every line letter by letter, sound at the end and never cut, the right length."""

import contextlib
import random
import time

import pytest

from mova import InputError, PromptError, enhance_prompt
from mova.prompt.fields import parse_elements
from mova.prompt.guards import clean_answer, part_sound, restore_lines
from mova.prompt.length import Draft, estimate_tokens, fit_length
from mova.prompt.quotes import Lines, find_quotes

SCENE = "A woman stands on a pier at dusk in a medium shot at eye level."
SOUND = "The audio shows wind and waves."


@pytest.mark.parametrize(
    "answer",
    [
        f"{SCENE}\n\n{SOUND}",
        f"Sure! Here is the prompt:\n\n{SCENE}\n\n{SOUND}\n\nLet me know if you want changes!",
        f"<think>A woman? \"Hm\".</think>\n{SCENE}\n\n{SOUND}",
        f"I should open on her.</think>{SCENE}\n\n{SOUND}",
        f"```text\n{SCENE}\n\n{SOUND}\n```",
        f"## Video prompt\n\n**{SCENE}**\n\n---\n\n{SOUND}\n\n(Word count: 20)",
        f"- {SCENE}\n- {SOUND}",
        f"1. {SCENE}\n2. _{SOUND}_",
        f"> {SCENE}\n>\n> {SOUND}",
        f"\"{SCENE}\n{SOUND}\"",
        f"好的，以下是提示词：\n{SCENE}\n\n{SOUND}",
        f"Final prompt: {SCENE.replace('pier', '[pier](http://x.y)')}\n\n{SOUND}",
        f"{SCENE.replace('woman', '*woman*').replace('pier', '`pier`')} {SOUND}",
        f"{SOUND}\n\n{SCENE}",
    ],
)  # fmt: skip
def test_only_the_prose_is_left(answer):
    assert str(part_sound(clean_answer(answer))) == f"{SCENE}\n\n{SOUND}"


@pytest.mark.parametrize("label", ["**Audio:** wind.", "Sound: wind.", "Soundscape – wind."])
def test_a_label_becomes_a_sentence(label):
    assert part_sound(clean_answer(f"{SCENE}\n\n{label}")).sound == "The audio shows: wind."


@pytest.mark.parametrize(
    "text",
    [
        "Great white clouds roll over the sea: a gull screams above the waves.",
        "As a large wave breaks over an artificial reef, a gull lifts off.",
        "Sound waves ripple over the water in a close-up.",
        "\"I'm sorry, I can't,\" whispers the old man in a close-up.",
        "Snake_case and 5 * 3 = 15 are written on the blackboard.",
    ],
)
def test_prose_that_only_looks_like_it_is_kept(text):
    assert clean_answer(text).replace(" ", "") == text.replace(" * ", "").replace(" ", "")
    assert part_sound(text).sound == ""


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't help with that request because it may be harmful.",
        "I’m unable to create this content, as it goes against the guidelines.",
        "Sure! I'm sorry, I can’t do that because it is harmful to people.",
        "**Sorry**, I cannot write this description of the scene for you.",
        "As an AI language model, I do not write descriptions of this kind.",
        "抱歉，我无法帮助您完成这个请求，因为它违反了规定，请您换一个请求再试一次，谢谢您的理解与支持。",
        "Je suis désolé, je ne peux pas faire cela pour vous maintenant.",
        "Es tut mir leid, aber dabei kann ich leider nicht behilflich sein.",
        "", "ok", "<think>I think and think", "123 456 " * 10, "```\n```",
    ],
)  # fmt: skip
def test_a_refusal_or_nothing_is_no_prompt(answer):
    with pytest.raises(PromptError, match="refused|is no prompt"):
        clean_answer(answer)


@pytest.mark.parametrize("noise", ["\n", "\n ", " \n", "\n\f", "\t", "!", "[", "[a](", "- ", "-\n", "(\n", "#", "`", '"', "'a "])
def test_an_answer_that_goes_astray_is_read_at_once(noise):
    """Models that lose their way repeat a sign until they are stopped."""
    start = time.perf_counter()
    with contextlib.suppress(PromptError):
        part_sound(clean_answer(f"{SCENE}{noise * (19_000 // len(noise))}{SOUND}"))
    assert time.perf_counter() - start < 3


# ---------------------------------------------------------------- lines


def restore(draft, idea, visible=()):
    """As `restore_lines`, with the idea as it is and the lines filled in."""
    lines = Lines()
    made, notes = restore_lines(draft, lines.hold_quotes(idea), lines, visible)
    return Draft(tuple(map(lines.fill, made.scene)), lines.fill(made.sound)), notes


LINES = ["Écoute, la mer.", "你回来了！", "שלום לך", "مرحبا بك", "It’s “late”…", "おかえり", "Ça va?", "OPEN 24h"]


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("marks", ["“{}”", "« {} »", "「{}」"])
@pytest.mark.parametrize(
    "made", ["A woman nods.", 'A woman says: "Listen, the sea."', "A woman says {} and nods.", 'She says "{}" now.', 'He says "Hi" and "Ho".']
)
def test_every_line_comes_through_letter_by_letter(line, marks, made):
    idea = f"A woman turns and says {marks.format(line)} to him."
    draft, notes = restore(Draft((made.format(line.upper()),), SOUND), idea)
    assert line in str(draft) and draft.sound == SOUND
    assert any(line in quote.inside for quote in find_quotes(str(draft)))
    assert all("Not in the idea" in note or line in note for note in notes)


def test_lines_that_are_there_change_nothing():
    idea, made = "She says “Hi.” A sign reads 'OPEN'.", Draft(('A woman says "Hi." under a sign that reads "OPEN".',), SOUND)
    assert restore(made, idea) == (made, [])


def test_a_short_line_is_not_found_inside_of_words():
    draft, notes = restore(Draft(("This is his piano.",), SOUND), 'He says "Hi" and "No."')
    assert 'says "Hi"' in str(draft) and '"No."' in str(draft) and len(notes) == 2


def test_a_translation_is_replaced_by_the_line():
    draft, notes = restore(Draft(('She says "Good evening" and he answers, "Yes."',), SOUND), "Sie sagt „Guten Abend“, er sagt „Ja.“")
    assert draft.scene == ('She says "Guten Abend" and he answers, "Ja."',) and len(notes) == 2


def test_lines_are_put_back_before_the_sound_with_who_says_them():
    idea = 'A man answers « Oui ! » and she says "Bye". Then it rains.'
    draft, notes = restore(Draft((SCENE,), SOUND), idea)
    assert str(draft) == f'{SCENE}\n\nA man answers "Oui !" And she says "Bye".\n\n{SOUND}'
    assert notes == ['Put back, because the model had left it out: "Oui !"', 'Put back, because the model had left it out: "Bye"']


def test_added_speech_is_told_but_writing_in_the_picture_is_no_speech():
    made = Draft(('He says "Hey" beside a sign that reads "EXIT".',), SOUND)
    assert restore(made, "A man waves.", ["EXIT"]) == (made, ['Not in the idea, but added by the model: "Hey"'])


PIECES = [*"\"'\u201c\u201d\u201e\u2018\u2019\u00ab\u00bb\u300c\u300d\u201a\u2039\u203a .,!?:;\n()*_-…—", "a", "is", "says ", "Hello", "s'", "it's ", "你好", "。", "שלום", "\u202f", '12"', "\n\n", "The audio shows ", "# ", "</think>", "Mr. "]  # fmt: skip


@pytest.mark.parametrize("limit", [64, 512])
def test_lines_survive_whatever_surrounds_them(limit):
    """Idea and answer are random marks and words: every line that is found comes through, within the length, or an error says why not."""

    class Babbler:
        def __init__(self, choose):
            self.choose = choose

        def ask(self, *_):
            return "".join(self.choose.choices(PIECES, k=self.choose.randint(0, 25))) + "\n\nThe audio shows rain on a roof and a long, long road."

        def release(self):
            """Nothing is held."""

    passed = 0
    for seed in range(300):
        choose = random.Random(seed)
        idea = "".join(choose.choices(PIECES, k=choose.randint(1, 25)))
        for model in (None, Babbler(choose)):
            try:
                made = enhance_prompt(idea, model=model, max_tokens=limit)
            except (InputError, PromptError):
                continue
            passed += 1
            assert made.tokens == estimate_tokens(made.prompt) <= limit
            assert all(quote.inside in made.prompt for quote in find_quotes(idea.strip())), (seed, idea, made)
    assert passed > 400


# ---------------------------------------------------------------- length


def words(text):
    return len(text.split())


@pytest.mark.parametrize("limit", [64, 80, 150, 400])
def test_speech_and_sound_are_never_cut(limit):
    scene = " ".join(f"Sentence {number} tells of something else." for number in range(60))
    draft, note = fit_length(Draft((f'{scene} He says: "Wait for me." {scene}', scene), SOUND), limit, words)
    assert limit - 6 <= words(str(draft)) <= limit
    assert 'He says: "Wait for me."' in str(draft) and draft.sound == SOUND and str(draft).startswith("Sentence 0")
    assert "what is said and heard is whole" in note


def test_what_fits_is_not_touched():
    draft = Draft((SCENE,), SOUND)
    assert fit_length(draft, words(str(draft)), words) == (draft, "")


@pytest.mark.parametrize("scene", ["walks on " * 2000, "走" * 4000, "walks on " * 2000 + 'and says "Wait" and goes'])
def test_one_endless_sentence_is_cut_within(scene):
    draft, _ = fit_length(Draft((scene.strip(),), SOUND), 100, estimate_tokens)
    assert 20 < estimate_tokens(str(draft)) <= 100 and draft.sound == SOUND
    assert ("Wait" in scene) == ('"Wait"' in str(draft))


def test_too_much_speech_is_an_error():
    with pytest.raises(InputError, match="alone take .* tokens, and 64 fit"):
        fit_length(Draft(('He says "' + "very " * 70 + '"',), SOUND), 64, words)


def test_the_estimate_counts_every_script():
    for text in ("A woman turns to the camera.", "她走进来。", "Привет, мир!", "안녕하세요", "سلام", "😀"):
        assert len(text.split()) < estimate_tokens(text) <= len(text.encode()) + 1
    assert estimate_tokens("") == 1


# ---------------------------------------------------------------- elements

GOOD = '{"style": "photo", "camera": "close-up", "subjects": ["a cat", "a dog"], "setting": "", "light": "dusk", "visible_text": "EXIT", "mood": 3}'


@pytest.mark.parametrize("answer", [GOOD, f"```json\n{GOOD}\n```", f"Here {{}} it is: {GOOD} I hope this helps {{"])
def test_elements_are_read_from_among_other_words(answer):
    elements = parse_elements(answer)
    assert (elements.subjects, elements.visible_text, elements.setting) == ("a cat; a dog", ("EXIT",), "")


@pytest.mark.parametrize(
    "answer, complaint",
    [
        ("no", "no JSON object"), ('{"style": ', "no JSON object"), ("[" * 100_000, "no JSON object"), ('{"a":' * 50_000, "no JSON object"), ("{}", "no JSON object"),
        (GOOD.replace('"photo"', "3"), "'style' must be a text"), (GOOD.replace('"EXIT"', "[1]"), "'visible_text' must be a list of texts"),
        ('{"style": "", "camera": " ", "subjects": "", "setting": "", "light": "", "visible_text": []}', "every element is empty"),
    ],
)  # fmt: skip
def test_what_follows_no_schema_is_told(answer, complaint):
    with pytest.raises(PromptError, match=complaint):
        parse_elements(answer)


def test_an_element_without_end_is_cut():
    assert len(parse_elements(GOOD.replace("close-up", "very " * 10_000)).camera) <= 2000
