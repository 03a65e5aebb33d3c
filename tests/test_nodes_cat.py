"""The CAT nodes: what they declare (for ever), what they make of AUDIO as other nodes give it, and that nothing stays behind. Host-free: headless's stand-ins."""

import json
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from node_stand_ins import Cancelled

from cat_encoder import write_demo_encoder
from headless.host import installed
from headless.runner import PACK, loaded_pack
from mova.media import write_audio

EAR = "demo/model.safetensors"
RATE = 16000

# ---------------------------------------------------------------- the pack, with a demo encoder and a folder of recordings


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """models, input and output folders."""
    root = tmp_path_factory.mktemp("host")
    write_demo_encoder(root / "models" / "audio_encoders" / EAR)
    (root / "models" / "audio_encoders" / "notes.txt").write_text("no encoder", encoding="utf-8")
    for index in range(3):
        path = root / "input" / "my sounds" / f"{index}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_audio(path, 0.1 * torch.randn(2, 2 * RATE, generator=torch.manual_seed(index)), RATE)
    (root / "output").mkdir()
    return SimpleNamespace(models=root / "models", input=root / "input", output=root / "output")


@pytest.fixture(scope="module")
def nodes(places):
    with installed(places.models, places.input, places.output), loaded_pack(ROOT) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def run(nodes):
    """run("CATTagAudio", audio=..., ...) -> its outputs by name; widgets that are not given have their default."""

    def run(node_id, **given):
        node = nodes[node_id]
        schema = node.GET_SCHEMA()
        values = {item.id: first_value(item) for item in schema.inputs if item.is_widget} | given
        result = type(node_id, (node,), {"hidden": SimpleNamespace(unique_id="1")}).execute(**values).result
        return SimpleNamespace(**{item.display_name: value for item, value in zip(schema.outputs, result, strict=True)})

    return run


def first_value(item):
    return item.default if item.default is not None else (item.options or [""])[0]


@pytest.fixture(scope="module")
def ear(run):
    return run("CATLoadEncoder").encoder


def errors():
    return sys.modules[f"{PACK}.mova.errors"], sys.modules[f"{PACK}.cat_encoder.errors"]


def audio(seconds=2.0, clips=1, channels=1, rate=RATE, seed=0):
    return {"waveform": 0.1 * torch.randn(clips, channels, round(seconds * rate), generator=torch.manual_seed(seed)), "sample_rate": rate}


# ---------------------------------------------------------------- what is declared, for ever

DECLARED = {
    "CATLoadEncoder": (
        "Load CAT Encoder", "MOVA/loaders", [("encoder", "COMBO", EAR), ("device", "COMBO", "cpu"), ("precision", "COMBO", "fp32")],
        [("encoder", "CAT_ENCODER"), ("report", "STRING"), ("labels", "STRING")],
    ),
    "CATTagAudio": (
        "CAT Sound Tags", "MOVA/check",
        [("audio", "AUDIO"), ("encoder", "CAT_ENCODER"), ("top_k", "INT", 10), ("window", "COMBO", "2 s"), ("only", "STRING", "")],
        [("tags", "STRING"), ("data", "STRING"), ("timeline", "IMAGE")],
    ),
    "CATCheckSound": (
        "CAT Prompt vs Sound Check", "MOVA/check",
        [("audio", "AUDIO"), ("encoder", "CAT_ENCODER"), ("wanted", "STRING", ""), ("unwanted", "STRING", "Music, Speech"), ("strictness", "FLOAT", 0.5)],
        [("score", "FLOAT"), ("pass", "BOOLEAN"), ("report", "STRING")],
    ),
    "CATCompareAudio": (
        "CAT Match to Reference", "MOVA/check",
        [("audio", "AUDIO"), ("reference", "AUDIO"), ("encoder", "CAT_ENCODER"), ("mode", "COMBO", "overall character"), ("match_loudness", "BOOLEAN", True)],
        [("score", "FLOAT"), ("similarity", "IMAGE"), ("report", "STRING")],
    ),
    "CATSiftDataset": (
        "CAT Dataset Sifter", "MOVA/training",
        [
            ("encoder", "CAT_ENCODER"), ("folder", "STRING", ""), ("duplicates", "FLOAT", 0.8), ("outliers", "FLOAT", 4.0), ("shortest", "FLOAT", 1.0),
            ("listen_seconds", "FLOAT", 30.0), ("unwanted", "STRING", ""), ("strictness", "FLOAT", 0.5),
        ],
        [("report", "STRING"), ("manifest", "STRING"), ("manifest_file", "STRING"), ("features_file", "STRING")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("node_id", DECLARED)
def test_ids_inputs_and_outputs_stay_as_they_are(nodes, node_id):
    schema = nodes[node_id].GET_SCHEMA()
    inputs = [(item.id, item.io_type, first_value(item)) if item.is_widget else (item.id, item.io_type) for item in schema.inputs]
    assert (schema.display_name, schema.category, inputs, [(item.display_name, item.io_type) for item in schema.outputs]) == DECLARED[node_id]
    assert schema.description and schema.search_aliases and all(item.tooltip for item in schema.inputs)


def test_tooltips_say_what_it_cannot_do(nodes):
    told = {node_id: nodes[node_id].GET_SCHEMA().description for node_id in DECLARED}
    assert all("160 ms" in told[node_id] for node_id in ("CATTagAudio", "CATCheckSound", "CATCompareAudio"))
    assert all("not calibrated" in told[node_id] for node_id in ("CATTagAudio", "CATCheckSound")) and "free wording" in told["CATCheckSound"]


# ---------------------------------------------------------------- loading


def test_loading_tells_what_the_file_is(run):
    loaded = run("CATLoadEncoder")
    assert "several resolutions (CAT)" in loaded.report and "527 labels" in loaded.report
    assert len(loaded.labels.splitlines()) == 527 and loaded.encoder.device == torch.device("cpu") and loaded.encoder.encoder.dtype == torch.float32
    assert run("CATLoadEncoder", precision="bf16").encoder.encoder.dtype == torch.bfloat16


def test_only_listed_files_are_opened(nodes, places):
    check = nodes["CATLoadEncoder"].validate_inputs
    assert check(encoder=EAR) is True and check(encoder=None) is True
    for name in ("notes.txt", "../mova/x.safetensors", "/etc/passwd", "other.pt"):
        assert f"'{name}' is not in" in check(encoder=name) and EAR in check(encoder=name)
    with pytest.raises(errors()[0].InputError, match="is not in"):
        nodes["CATLoadEncoder"].execute(encoder="notes.txt", device="cpu", precision="fp32")


def test_without_a_file_the_list_tells_what_to_do(nodes, places, monkeypatch):
    monkeypatch.setattr(sys.modules["folder_paths"], "get_filename_list", lambda folder: [])
    loader = nodes["CATLoadEncoder"]
    assert loader.define_schema().inputs[0].options == ["put a CAT, EAT or SSLAM file into models/audio_encoders"]
    assert loader.validate_inputs(encoder=loader.define_schema().inputs[0].options[0]).startswith("No audio encoder is chosen. Found there: none.")


def test_a_file_that_is_none_is_a_sentence(nodes, places):
    wrong = places.models / "audio_encoders" / "page.pt"
    wrong.write_bytes(b"<!doctype html><html>not found</html>")
    try:
        with pytest.raises(errors()[1].CatError, match="web page"):
            nodes["CATLoadEncoder"].execute(encoder="page.pt", device="cpu", precision="fp32")
    finally:
        wrong.unlink()


# ---------------------------------------------------------------- listening


def test_tags_of_a_sound(run, ear):
    found = run("CATTagAudio", audio=audio(), encoder=ear, top_k=4)
    assert len(found.tags.splitlines()) == 4 and len(json.loads(found.data)["clips"][0]["tags"]) == 4
    assert found.timeline.shape == (1, 48 + 4 * 30 + 44, 960, 3) and found.timeline.dtype == torch.float32


def test_tags_of_a_batch(run, ear):
    found = run("CATTagAudio", audio=audio(clips=3), encoder=ear, top_k=2, window="1 s", only="dog, rain")
    assert [line for line in found.tags.splitlines() if line.startswith("Clip")] == ["Clip 1:", "Clip 2:", "Clip 3:"]
    assert len(json.loads(found.data)["clips"]) == 3 and found.timeline.shape[0] == 3


def test_check_of_wanted_and_unwanted_sounds(run, ear):
    found = run("CATCheckSound", audio=audio(), encoder=ear, wanted="dog barking, flibber")
    assert 0 <= found.score <= 1 and isinstance(found.score, float) and getattr(found, "pass") is False
    assert "dog barking" in found.report and "music" in found.report and "not known as a sound: flibber" in found.report


def test_the_worst_clip_of_a_batch_counts(run, ear):
    both = {"waveform": torch.cat([audio(seed=seed)["waveform"] for seed in (1, 2)]), "sample_rate": RATE}
    alone = [run("CATCheckSound", audio=audio(seed=seed), encoder=ear, wanted="rain").score for seed in (1, 2)]
    assert run("CATCheckSound", audio=both, encoder=ear, wanted="rain").score == min(alone)
    matches = [run("CATCompareAudio", audio=audio(seed=seed), reference=audio(), encoder=ear).score for seed in (1, 2)]
    assert run("CATCompareAudio", audio=both, reference=audio(), encoder=ear).score == pytest.approx(min(matches))


def test_match_to_a_reference(run, ear):
    same = run("CATCompareAudio", audio=audio(), reference=audio(), encoder=ear, mode="order of events")
    assert same.score == 100 and same.similarity.shape[0] == 1 and "100 of 100" in same.report
    silent = {"waveform": torch.zeros(1, 1, RATE), "sample_rate": RATE}
    assert run("CATCompareAudio", audio=silent, reference=audio(), encoder=ear).score < 100


@pytest.mark.parametrize(
    "sound",
    [audio(0.5, channels=7, rate=48000), audio(0.5, rate=192000), audio(0.03), {"waveform": torch.zeros(1, 2, RATE), "sample_rate": RATE}],
    ids=["seven channels", "192 kHz", "30 ms", "silence"],
)
def test_any_sound(run, ear, sound):
    before = sound["waveform"].clone()
    assert run("CATTagAudio", audio=sound, encoder=ear).tags and 0 <= run("CATCheckSound", audio=sound, encoder=ear).score <= 1
    assert 0 <= run("CATCompareAudio", audio=sound, reference=audio(), encoder=ear).score <= 100
    assert torch.equal(sound["waveform"], before)


LISTENERS = {"CATTagAudio": {}, "CATCheckSound": {}, "CATCompareAudio": {"reference": audio()}}


@pytest.mark.parametrize("node_id", LISTENERS)
def test_no_sound_and_too_little_are_sentences(run, ear, node_id):
    mova, cat = errors()
    for nothing in (None, audio(0), audio(1, clips=0)):
        with pytest.raises(mova.InputError, match="There is no sound on audio"):
            run(node_id, audio=nothing, encoder=ear, **LISTENERS[node_id])
    with pytest.raises(cat.CatError, match="10 ms: at least 25 ms"):
        run(node_id, audio=audio(0.01), encoder=ear, **LISTENERS[node_id])


@pytest.mark.parametrize("node_id", LISTENERS)
def test_cancel_is_honoured_and_the_encoder_goes_home(run, ear, cancel_after, monkeypatch, node_id):
    moves = []
    monkeypatch.setattr(ear.encoder, "to", lambda place: (moves.append(str(place)), ear.encoder)[1])
    cancel_after(2)
    with pytest.raises(Cancelled):
        run(node_id, audio=audio(clips=4), encoder=ear, **LISTENERS[node_id])
    assert moves == ["cpu", "cpu"]


def test_an_encoder_on_another_device_is_only_there_while_it_listens(run, ear, monkeypatch):
    moves, freed = [], []
    ear = replace(ear, device=torch.device("cuda"))
    monkeypatch.setattr(ear.encoder, "to", lambda place: (moves.append(str(place)), ear.encoder)[1])
    monkeypatch.setattr(sys.modules["comfy.model_management"], "free_memory", lambda need, device: freed.append((need, str(device))))
    run("CATCheckSound", audio=audio(), encoder=ear)
    weights = sum(weight.numel() * 4 for weight in ear.encoder.trunk.parameters())
    assert moves == ["cuda", "cpu"] and freed == [(weights + 2_000_000_000, "cuda")]
    run("CATCheckSound", audio=audio(), encoder=replace(ear, device=torch.device("cpu")))
    assert len(freed) == 1, "on the CPU, where it lies, it takes nobody's room"


# ---------------------------------------------------------------- a folder of recordings


def test_sifting_a_folder(run, ear, places, nodes):
    out = places.output / "cat_sift" / "my sounds"
    shutil.rmtree(out, ignore_errors=True)
    found = run("CATSiftDataset", encoder=ear, folder="my sounds", shortest=0.5)
    assert found.report.startswith("3 files: ") and json.loads(found.manifest)["clips"][0]["path"].endswith("/input/my sounds/0.wav")
    assert found.manifest_file == str(out / "manifest.json") and found.features_file == str(out / "features.safetensors")
    assert sorted(path.name for path in out.iterdir()) == ["features.safetensors", "manifest.json"]
    assert sorted(path.name for path in (places.input / "my sounds").iterdir()) == ["0.wav", "1.wav", "2.wav"]  # nothing is put there


@pytest.mark.parametrize("folder", ["", "  ", "..", "../output", "my sounds/../..", "/", "nowhere", "my sounds/0.wav", "a\0b"])
def test_only_folders_inside_of_the_input_directory(nodes, ear, folder):
    answer = nodes["CATSiftDataset"].validate_inputs(folder=folder)
    assert isinstance(answer, str) and ("inside of" in answer or "There is no folder" in answer)
    with pytest.raises(errors()[0].InputError):
        nodes["CATSiftDataset"].execute(ear, folder, 0.8, 4.0, 1.0, 30.0, "", 0.5)


def test_folders_inside_are_taken(nodes, places):
    check = nodes["CATSiftDataset"].validate_inputs
    assert check(folder="my sounds") is True and check(folder=" my sounds/ ") is True and check(folder=None) is True


def test_sifting_again_when_a_file_changed(nodes, places):
    fingerprint = nodes["CATSiftDataset"].fingerprint_inputs
    before = fingerprint(folder="my sounds", duplicates=0.8)
    assert before == fingerprint(folder="my sounds", duplicates=0.8) and len(before) == 3 and fingerprint() == []
    extra = places.input / "my sounds" / "extra.wav"
    extra.write_bytes(b"x")
    try:
        assert fingerprint(folder="my sounds") != before
    finally:
        extra.unlink()


def test_a_cancelled_sifting_decides_nothing(run, ear, places, cancel_after):
    out = places.output / "cat_sift" / "my sounds"
    shutil.rmtree(out, ignore_errors=True)
    cancel_after(7)  # after the four yardsticks, within the files
    with pytest.raises(Cancelled):
        run("CATSiftDataset", encoder=ear, folder="my sounds")
    assert not (out / "manifest.json").exists() and not [path for path in out.rglob("*.part")]
