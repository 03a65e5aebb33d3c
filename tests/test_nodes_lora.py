"""MOVALoadLora: what it declares (for ever), which files it lists and opens, what it tells, and that it leaves the model it was given as it is. Host-free."""

import json
import logging
import os
import shutil
import sys
from types import SimpleNamespace

import loras
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from headless.host import installed
from headless.runner import PACK, loaded_pack

DECLARED = {
    "inputs": {
        "model": "MOVA_MODEL",
        "lora_name": "COMBO",
        "video_high": ("FLOAT", 1.0),
        "video_low": ("FLOAT", 1.0),
        "audio": ("FLOAT", 1.0),
        "bridge": ("FLOAT", 1.0),
        "expert": "COMBO",
        "alpha": ("FLOAT", 0.0),
    },
    "outputs": [("MOVA_MODEL", "model"), ("STRING", "trigger_words")],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_mova):
    """A model, two LoRAs, and what may lie beside them."""
    folder = tmp_path_factory.mktemp("host") / "models"
    shutil.copytree(tiny_mova, folder / "mova" / "tiny")
    (folder / "loras" / "styles").mkdir(parents=True)
    for seed, name in enumerate(("robot.safetensors", "styles/night_low_noise.safetensors")):
        factors = loras.full_factors(tiny_mova, seed=seed, components=("video_dit",))["video_dit"]
        loras.write_lora(folder / "loras" / name, factors, metadata={"modelspec.trigger_phrase": "r0bot"} if seed == 0 else None)
    (folder / "loras" / "trained").mkdir()
    torch.save(load_file(folder / "loras" / "robot.safetensors"), folder / "loras" / "trained" / "lora_weights.pt")
    torch.save({"rank": 4, "alpha": 2.0}, folder / "loras" / "trained" / "lora_config.pt")
    (folder / "loras" / "robot.txt").write_text("notes", encoding="utf-8")
    (folder / "secret.safetensors").write_bytes((folder / "loras" / "robot.safetensors").read_bytes())
    return folder


@pytest.fixture(scope="module")
def nodes(models):
    with installed(models, models, models), loaded_pack(ROOT) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def lora_error(nodes):
    return sys.modules[f"{PACK}.mova.errors"].LoraError


@pytest.fixture
def shown(nodes, monkeypatch):
    """What nodes wrote on themselves."""
    texts = []
    monkeypatch.setattr(sys.modules[f"{PACK}.nodes.host"], "show_text", lambda node_id, text: texts.append((node_id, text)))
    return texts


@pytest.fixture(scope="module")
def model(nodes):
    return nodes["MOVALoadModel"].execute(model="tiny", precision="as stored", residency="auto", attention="auto").result[0]


@pytest.fixture
def load(nodes, model):
    """load("robot.safetensors", audio=0, ...) -> (model, trigger words)."""

    def load(name, **given):
        node = nodes["MOVALoadLora"]
        values = {item.id: item.default for item in node.GET_SCHEMA().inputs if item.default is not None}
        return type("Run", (node,), {"hidden": SimpleNamespace(unique_id="7")}).execute(**{"model": model, "lora_name": name, **values, **given}).result

    return load


def test_inputs_and_outputs_stay_as_they_are(nodes):
    schema = nodes["MOVALoadLora"].GET_SCHEMA()
    found = {item.id: item.io_type if item.default is None else (item.io_type, item.default) for item in schema.inputs}
    assert found == DECLARED["inputs"] and list(found) == list(DECLARED["inputs"])
    assert [(item.io_type, item.display_name) for item in schema.outputs] == DECLARED["outputs"]
    assert [item.id for item in schema.inputs if item.optional] == ["expert", "alpha"]
    assert all(item.tooltip for item in schema.inputs) and schema.category == "MOVA/loaders"
    assert next(item.options for item in schema.inputs if item.id == "expert") == ["auto", "high", "low", "both", "audio"]


def test_files_of_all_sub_folders_are_listed(nodes):
    options = next(item.options for item in nodes["MOVALoadLora"].GET_SCHEMA().inputs if item.id == "lora_name")
    assert options == ["robot.safetensors", "styles/night_low_noise.safetensors", "trained/lora_weights.pt"]


def test_an_empty_folder_shows_what_to_do(nodes, models, monkeypatch):
    monkeypatch.setattr(sys.modules["folder_paths"], "get_filename_list", lambda place: [])
    options = next(item.options for item in nodes["MOVALoadLora"].GET_SCHEMA().inputs if item.id == "lora_name")
    assert options == ["put a LoRA into models/loras"]
    told = nodes["MOVALoadLora"].validate_inputs(lora_name=options[0])
    assert "No LoRA is chosen. Found there: none" in told and str(models / "loras") in told


@pytest.mark.parametrize("name", ["../secret.safetensors", "robot.txt", "trained/lora_config.pt", "nowhere.safetensors", "/etc/passwd"])
def test_only_listed_files_are_opened(nodes, load, name):
    assert f"'{name}' is no LoRA in" in nodes["MOVALoadLora"].validate_inputs(lora_name=name)
    with pytest.raises(sys.modules[f"{PACK}.mova.errors"].InputError, match="is no LoRA in"):
        load(name)


def test_listed_and_linked_names_are_fine(nodes):
    assert nodes["MOVALoadLora"].validate_inputs(lora_name="styles/night_low_noise.safetensors") is True
    assert nodes["MOVALoadLora"].validate_inputs() is True  # a name that comes over a link


def test_the_report_is_shown_on_the_node_and_logged(load, shown, caplog):
    with caplog.at_level(logging.INFO, logger="mova"):
        adapted, words = load("robot.safetensors", video_low=0.5)
    ((node_id, text),) = shown
    assert node_id == "7" and "robot.safetensors: LoRA, rank 4, 40 of 40 layers matched" in text and "video low 40 layers x 0.5" in text
    assert text in caplog.text and words == "r0bot" and adapted.loras[0].report.words == "r0bot"


def test_several_in_a_row_add_up_and_the_model_stays_as_it_was(load, model):
    first, _ = load("robot.safetensors")
    second, words = load("styles/night_low_noise.safetensors", model=first)
    assert [lora.report.label for lora in second.loras] == ["robot.safetensors", "night_low_noise.safetensors"]
    assert (len(first.loras), model.loras, words) == (1, (), "")
    assert list(second.loras[1].report.towers) == ["low"]  # by its name


def test_expert_and_alpha(load):
    trained, _ = load("trained/lora_weights.pt", expert="high")
    assert list(trained.loras[0].report.towers) == ["high"] and "alpha 2, in the trainer's config" in str(trained.loras[0].report)
    given, _ = load("trained/lora_weights.pt", alpha=8.0)
    assert "alpha 8, as given" in str(given.loras[0].report)


def test_old_workflows_without_the_optional_inputs(nodes, model):
    node = type("Run", (nodes["MOVALoadLora"],), {"hidden": SimpleNamespace(unique_id="1")})
    adapted = node.execute(model=model, lora_name="robot.safetensors", video_high=1.0, video_low=1.0, audio=1.0, bridge=1.0).result[0]
    assert list(adapted.loras[0].report.towers) == ["high", "low"]


def test_a_damaged_file_is_one_sentence(load, models, lora_error):
    (models / "loras" / "cut.safetensors").write_bytes((models / "loras" / "robot.safetensors").read_bytes()[:1000])
    try:
        with pytest.raises(lora_error, match=r"cut.safetensors is truncated or damaged"):
            load("cut.safetensors")
    finally:
        (models / "loras" / "cut.safetensors").unlink()


def test_a_file_that_is_replaced_is_read_again(nodes, models):
    fingerprint, file = nodes["MOVALoadLora"].fingerprint_inputs, models / "loras" / "trained" / "lora_weights.pt"
    before = fingerprint(lora_name="trained/lora_weights.pt", expert="auto")
    assert before == fingerprint(lora_name="trained/lora_weights.pt", audio=0.0)
    os.utime(file, (1, 1))
    assert fingerprint(lora_name="trained/lora_weights.pt") != before
    assert fingerprint(lora_name="nowhere.safetensors") is None and fingerprint() is None  # a name that comes over a link


def test_estimate_and_sampling_take_the_adapted_model(nodes, load):
    adapted, _ = load("robot.safetensors")
    sizes = dict(width=64, height=48, length=9, steps=4, cfg=5.0, residency="auto", device="RTX 4090", bridge_guidance=1.0)
    node = type("Run", (nodes["MOVAEstimate"],), {"hidden": SimpleNamespace(unique_id="1")})
    assert json.dumps(node.execute(model=adapted, **sizes).result[0])
