"""Local language models: transformers' own classes at a tiny size, from folders as users have them."""

import gc
import json
import shutil
import sys
import weakref

import pytest
import torch

from mova import PromptError, enhance_prompt
from mova.__main__ import main
from mova.prompt import LocalModel, Question
from mova.prompt.local import choose_precision, fitting_precision, open_model

pytest.importorskip("transformers")

from prompt_models import write_seer, write_writer  # noqa: E402

IDEA = 'A woman on a pier turns and says: "Listen."'
PROMPT = (
    'A woman in a teal sweater stands on a pier at dusk, seen in a medium shot from eye level. She turns her head and says: "Listen." Her hair moves in a light breeze.\n\n'
    "The audio shows her calm voice close by, soft waves under the planks and far gulls."
)
ELEMENTS = {"style": "photo, muted", "camera": "medium shot", "subjects": "a woman", "setting": "a pier", "light": "dusk glow", "visible_text": ["OPEN"]}
QUESTION = Question("rules", "text")


class Cancelled(BaseException):
    """The host's interrupt."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """ "writer" and "seer": what they say is what is wanted; "rambler" never ends."""
    place = tmp_path_factory.mktemp("LLM")
    found = {"writer": write_writer(place / "writer", PROMPT, torch.bfloat16), "seer": write_seer(place / "seer", json.dumps(ELEMENTS))}
    found["rambler"] = shutil.copytree(found["writer"], place / "rambler")
    settings = json.loads((place / "rambler" / "generation_config.json").read_text())
    (place / "rambler" / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": 0}))
    return found


def change(folders, tmp_path, name, file, edit):
    copy = shutil.copytree(folders[name], tmp_path / name)
    path = copy / file
    path.write_text(edit(path.read_text(encoding="utf-8")), encoding="utf-8")
    return copy


def tell(text):
    """Nobody listens."""


# ---------------------------------------------------------------- the whole way


def test_picture_then_text_with_two_models(folders):
    told, model = [], LocalModel(folders["seer"], folders["writer"])
    made = enhance_prompt(IDEA, torch.rand(1, 60, 80, 3), model=model, seed=3, on_text=told.append)
    assert made.prompt == PROMPT and made.elements.visible_text == ("OPEN",) and len(made.notes) == 1
    assert model.opened is None and "Opening seer" in told and "Opening writer" in told
    assert told.index("Opening seer") < told.index("Opening writer") and any("teal" in text for text in told)


def test_text_alone_needs_no_eyes(folders):
    assert enhance_prompt(IDEA, model=LocalModel(folders["writer"])).prompt == PROMPT
    with pytest.raises(PromptError, match="writer cannot look at pictures: choose a vision-language model"):
        enhance_prompt(IDEA, torch.rand(1, 8, 8, 3), model=LocalModel(folders["writer"]))


def test_a_model_that_sees_writes_as_well(folders):
    assert json.loads(LocalModel(folders["seer"]).ask(QUESTION, 0, tell)) == ELEMENTS


def test_a_failed_model_may_give_way_to_the_template(folders, tmp_path):
    made = enhance_prompt(IDEA, model=LocalModel(tmp_path), on_failure="use template")
    assert made.prompt == enhance_prompt(IDEA).prompt and "no config.json" in made.notes[0]


def test_the_command_line_prints_the_prompt_alone(folders, monkeypatch, capfd):
    words = ["--idea", IDEA, "--provider", "local", "--model", str(folders["writer"]), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["mova", "enhance", *words])
    assert main() == 0
    assert capfd.readouterr().out == f"{PROMPT}\n"


# ---------------------------------------------------------------- seeds, streaming, cancel, memory


def test_the_seed_decides_and_the_host_keeps_its_own_chance(folders, tmp_path):
    """A flat head makes chance visible."""
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(folders["writer"], tmp_path / "flat")
    weights = load_file(copy / "model.safetensors")
    save_file(weights | {"lm_head.weight": weights["lm_head.weight"] * 0.02}, copy / "model.safetensors", {"format": "pt"})
    model, before = LocalModel(copy, answer_tokens=60), torch.random.get_rng_state()
    takes = []
    for seed in (1, 1, 2, 2**64 - 1):
        told = []
        try:
            model.ask(QUESTION, seed, told.append)
        except PromptError:
            pass  # chance does not always find the end
        takes.append(told[-1])
    assert takes[0] == takes[1] and len(set(takes)) == 3 and torch.equal(torch.random.get_rng_state(), before)


def test_the_text_grows(folders, monkeypatch):
    monkeypatch.setattr("mova.prompt.local.TICK", 0.0)
    told = []
    LocalModel(folders["writer"]).ask(QUESTION, 0, told.append)
    texts = [text for text in told if text and PROMPT.startswith(text)]
    assert texts[-1] == PROMPT and len(set(texts)) > 10 and texts == sorted(texts, key=len)


@pytest.mark.parametrize("when", ["opening", "reading the picture", "writing"])
def test_cancel_leaves_nothing_behind(folders, monkeypatch, when):
    monkeypatch.setattr("mova.prompt.local.TICK", 0.0)
    model, alive = LocalModel(folders["seer"], folders["writer"]), []

    def on_text(text):
        if model.opened is not None:
            alive.append(weakref.ref(model.opened.model))
        if {"opening": text == "Opening seer", "reading the picture": len(alive) > 3, "writing": text.startswith("A woman")}[when]:
            raise Cancelled

    with pytest.raises(Cancelled):
        enhance_prompt(IDEA, torch.rand(1, 60, 80, 3), model=model, on_text=on_text)
    gc.collect()
    assert model.opened is None and not any(reference() for reference in alive)


def test_a_layer_is_the_longest_that_cancel_waits_for(folders, monkeypatch):
    """on_text is called between layers, before there is a token."""
    monkeypatch.setattr("mova.prompt.local.TICK", 0.0)
    calls = []
    model = LocalModel(folders["seer"])
    from mova.prompt.enhance import reduce_picture

    model.ask(Question("rules", "text", reduce_picture(torch.rand(60, 80, 3))), 0, calls.append)
    silent = calls[: next(index for index, text in enumerate(calls) if text.startswith("{"))]
    assert len(silent) >= 2 + 4  # two lines, then two layers of the eye and two of the text


def test_the_model_is_opened_once_for_several_questions(folders):
    model = LocalModel(folders["writer"])
    model.ask(QUESTION, 0, tell)
    opened = model.opened
    model.ask(QUESTION, 1, tell)
    assert model.opened is opened and opened.model.dtype == torch.bfloat16
    model.release()
    assert model.opened is None and model.bytes_needed() > (folders["writer"] / "model.safetensors").stat().st_size


# ---------------------------------------------------------------- what cannot be used


def test_an_answer_without_end_is_no_prompt(folders):
    with pytest.raises(PromptError, match="did not come to an end within 15 tokens"):
        LocalModel(folders["rambler"], answer_tokens=15).ask(QUESTION, 0, tell)


@pytest.mark.parametrize(
    "file, edit, said",
    [
        ("config.json", lambda text: "{", "cannot be read"),
        ("config.json", lambda text: "[]", "is no configuration"),
        ("config.json", lambda text: text.replace('"qwen2"', '"nosuch"'), "cannot be opened by transformers"),
        ("config.json", lambda text: text.replace('"hidden_size": 64', '"hidden_size": 128'), "cannot be opened by transformers"),
        ("config.json", lambda text: text.replace("32768", "50"), "reads 50 tokens, question and answer take"),
        ("tokenizer.json", lambda text: text[:99], "cannot be opened by transformers"),
        ("chat_template.jinja", lambda text: "{{ raise_exception('no system') }}", "chat template of writer cannot be used .no system"),
    ],
)  # fmt: skip
def test_damaged_folders(folders, tmp_path, file, edit, said):
    with pytest.raises(PromptError, match=said):
        LocalModel(change(folders, tmp_path, "writer", file, edit)).ask(QUESTION, 0, tell)


def test_weights_that_are_no_numbers_and_pictures_that_no_model_takes(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(folders["writer"], tmp_path / "broken")
    save_file({name: weight * torch.nan for name, weight in load_file(copy / "model.safetensors").items()}, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(PromptError, match="broken failed while it wrote .*nan"):
        LocalModel(copy).ask(QUESTION, 0, tell)
    assert enhance_prompt(IDEA, model=LocalModel(copy), on_failure="use template").prompt == enhance_prompt(IDEA).prompt
    with pytest.raises(PromptError, match="seer cannot take the question .*aspect ratio"):
        enhance_prompt(IDEA, torch.rand(1, 1, 4000, 3), model=LocalModel(folders["seer"]))


def test_what_the_listener_raises_is_no_failure_of_the_model(folders):
    def stop(text):
        if text.startswith("A woman"):
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        enhance_prompt(IDEA, model=LocalModel(folders["writer"]), on_failure="use template", on_text=stop)


def test_any_seed_will_do(folders):
    for seed in (-1, 2**64, 2**70):
        assert LocalModel(folders["writer"]).ask(QUESTION, seed, tell) == PROMPT


def test_a_folder_without_or_with_half_its_weights(folders, tmp_path):
    copy = shutil.copytree(folders["writer"], tmp_path / "writer")
    whole = (copy / "model.safetensors").read_bytes()
    for content in (None, whole[: len(whole) // 2], b""):
        (copy / "model.safetensors").unlink(missing_ok=True) if content is None else (copy / "model.safetensors").write_bytes(content)
        with pytest.raises(PromptError, match="is it complete"):
            LocalModel(copy).ask(QUESTION, 0, tell)


def test_code_in_a_folder_is_not_run(folders, tmp_path):
    evidence = tmp_path / "ran"
    copy = change(
        folders,
        tmp_path,
        "writer",
        "config.json",
        lambda text: text.replace('"qwen2"', '"evil"').replace("{", '{"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},', 1),
    )
    (copy / "evil.py").write_text(f"open({str(evidence)!r}, 'w')")
    with pytest.raises(PromptError):
        open_model(copy, torch.device("cpu"))
    pickled = shutil.copytree(folders["writer"], tmp_path / "pickled")
    torch.save({}, pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(PromptError):
        open_model(pickled, torch.device("cpu"))
    assert not evidence.exists()


def test_precision_follows_the_free_memory(folders):
    gigabyte = 10**9
    assert fitting_precision(8 * gigabyte, 24 * gigabyte) is None
    assert fitting_precision(16 * gigabyte, 14 * gigabyte) == "8-bit"
    assert fitting_precision(16 * gigabyte, 8 * gigabyte) == "4-bit" == fitting_precision(16 * gigabyte, gigabyte)
    assert choose_precision(folders["writer"], torch.device("cpu")) is None


@pytest.mark.parametrize(("precision", "layer"), [("8-bit", "Linear8bitLt"), ("4-bit", "Linear4bit")])
def test_a_model_in_few_bits_says_the_same(folders, monkeypatch, precision, layer):
    """bitsandbytes computes on the CPU, too; only the choice is made for GPUs alone."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    monkeypatch.setattr("mova.prompt.local.choose_precision", lambda *_: precision)
    model = LocalModel(folders["writer"])
    assert model.ask(QUESTION, 0, tell) == PROMPT
    assert layer in {type(module).__name__ for module in model.opened.model.modules()}
