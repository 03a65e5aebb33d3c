"""The nodes of lip-sync and takes: what they declare (for ever), what they refuse before anything runs, and what is held while takes are judged."""

import json
import shutil
import sys
import weakref
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from node_stand_ins import Cancelled
from puppet import FPS, drawn_film, voice

from cat_encoder import write_demo_encoder
from headless.host import installed
from headless.runner import PACK, loaded_pack

RATE = 48000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def pack(folder):
    """The pack's modules; `nodes` by id."""
    with installed(folder, folder, folder), loaded_pack(ROOT) as nodes:
        yield SimpleNamespace(nodes=nodes, check=sys.modules[f"{PACK}.nodes.check_lip_sync"], takes=sys.modules[f"{PACK}.nodes.best_take"])


@pytest.fixture(autouse=True)
def files(folder):
    """files("name", ...) puts such files into models/mova_eval."""
    place = folder / "mova_eval"

    def files(*names):
        place.mkdir(exist_ok=True)
        for name in names:
            (place / name).write_bytes(b"some bytes")

    yield files
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture
def drawn(pack, files, monkeypatch):
    """Faces are drawn ones: drawn(points) is what every film shows from then on."""
    files("face_landmarker.task")

    def drawn(points):
        @contextmanager
        def given(task):
            yield sys.modules[f"{PACK}.mova.lipsync.landmarks"].GivenLandmarks(points)

        monkeypatch.setattr(pack.check, "open_landmarks", given)

    return drawn


@pytest.fixture
def run(pack):
    """run("MOVACheckLipSync", ...) -> its outputs, widgets at their defaults."""

    def run(node_id, **given):
        node = pack.nodes[node_id]
        values = {item.id: item.default if item.default is not None else (item.options or [None])[0] for item in node.SCHEMA.inputs if item.is_widget} | given
        if node.SCHEMA.is_input_list:
            values = {name: value if isinstance(value, list) else [value] for name, value in values.items()}
        hidden = SimpleNamespace(unique_id="1")
        return type(node.__name__, (node,), {"hidden": hidden}).execute(**values).result

    return run


def images(frames=193):
    return torch.zeros(frames, 36, 64, 3)


def audio(waveform):
    return {"waveform": waveform[None], "sample_rate": RATE}


# ---------------------------------------------------------------- what is declared, for ever

CHECKS = [("fps", "FLOAT", 24.0), ("method", "COMBO", "auto"), ("face_landmarks", "COMBO", "auto"), ("syncnet_weights", "COMBO", "auto")]
DECLARED = {
    "MOVACheckLipSync": (
        "MOVA Lip-Sync Check", "MOVA/check", [("images", "IMAGE"), ("audio", "AUDIO"), *CHECKS],
        [("score", "FLOAT"), ("lag_ms", "FLOAT"), ("verdict", "STRING"), ("plot", "IMAGE"), ("report", "STRING")],
    ),
    "MOVAFixLag": ("MOVA Fix Lag", "MOVA/check", [("audio", "AUDIO"), ("lag_ms", "FLOAT", 0.0), ("verdict", "STRING")], [("audio", "AUDIO")]),
    "MOVASeeds": ("MOVA Seeds for Takes", "MOVA/sampling", [("seed", "INT", 42), ("takes", "INT", 4)], [("seeds", "INT")]),
    "MOVAPickBestTake": (
        "MOVA Pick Best Take", "MOVA/check",
        [
            ("video", "LATENT"), ("audio", "LATENT"), ("video_vae", "VAE"), ("audio_vae", "VAE"), *CHECKS, ("seeds", "INT"), ("cat_encoder", "CAT_ENCODER"),
            ("wanted_sounds", "STRING", ""), ("sound_share", "FLOAT", 0.5),
        ],
        [("images", "IMAGE"), ("audio", "AUDIO"), ("index", "INT"), ("scores", "STRING"), ("contact_sheet", "IMAGE")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("node_id", DECLARED)
def test_ids_inputs_and_outputs_stay_as_they_are(pack, node_id):
    schema = pack.nodes[node_id].SCHEMA
    inputs = [
        (item.id, item.io_type, item.default or (item.options or [item.default])[0]) if item.is_widget else (item.id, item.io_type) for item in schema.inputs
    ]
    assert (schema.display_name, schema.category, inputs, [(item.display_name, item.io_type) for item in schema.outputs]) == DECLARED[node_id]
    assert all(item.tooltip for item in schema.inputs)
    assert [item.display_name for item in schema.outputs if item.is_output_list] == (["seeds"] if node_id == "MOVASeeds" else [])
    assert schema.is_input_list == (node_id == "MOVAPickBestTake")


def test_files_for_checks_are_offered(pack, files):
    files("face_landmarker.task", "syncnet_v2.model", "other.safetensors", "readme.txt")
    choices = {item.id: item.options for item in pack.nodes["MOVACheckLipSync"].define_schema().inputs}
    assert choices["face_landmarks"] == ["auto", "face_landmarker.task"]
    assert choices["syncnet_weights"] == ["auto", "other.safetensors", "syncnet_v2.model"]
    assert {item.id: item.options for item in pack.nodes["MOVAPickBestTake"].define_schema().inputs}["face_landmarks"][:2] == ["auto", "none"]


# ---------------------------------------------------------------- refused before anything runs


def test_a_missing_bundle_is_told_with_where_to_get_it(pack, folder):
    told = pack.nodes["MOVACheckLipSync"].validate_inputs("auto", "auto", "auto")
    assert str(folder / "mova_eval") in told and "face_landmarker.task" in told and "https://ai.google.dev/" in told
    assert pack.nodes["MOVAPickBestTake"].validate_inputs(["auto"], ["auto"], ["auto"]) == told
    assert pack.nodes["MOVAPickBestTake"].validate_inputs(["auto"], ["none"], ["auto"]) is True
    assert pack.nodes["MOVACheckLipSync"].validate_inputs() is True  # all over links


@pytest.mark.parametrize("name", ["../secret.task", "gone.task", "C:\\secret.task", ""])
def test_only_listed_files_are_opened(pack, files, name):
    files("face_landmarker.task")
    assert f"holds no '{name}'" in pack.nodes["MOVACheckLipSync"].validate_inputs("auto", name, "auto")
    assert f"holds no '{name}'" in pack.nodes["MOVACheckLipSync"].validate_inputs("auto", None, name)


def test_syncnet_without_weights_and_no_mediapipe(pack, files, monkeypatch):
    files("face_landmarker.task")
    assert "no SyncNet weights" in pack.nodes["MOVACheckLipSync"].validate_inputs("syncnet", None, "auto")
    monkeypatch.setattr(sys.modules[f"{PACK}.mova.lipsync.landmarks"], "find_spec", lambda name: None)
    assert "pip install 'mediapipe>=1.0'" in pack.nodes["MOVACheckLipSync"].validate_inputs("auto", "auto", "auto")


def test_auto_is_asked_again_when_files_come(pack, files):
    before = pack.nodes["MOVACheckLipSync"].fingerprint_inputs(method="auto")
    files("syncnet_v2.model")
    assert pack.nodes["MOVACheckLipSync"].fingerprint_inputs(method="auto") != before


# ---------------------------------------------------------------- check and repair


def test_check_then_fix(drawn, run):
    drawn(drawn_film(1)[1])
    late = audio(voice(1, 0.3))
    score, lag, verdict, plot, report = run("MOVACheckLipSync", images=images(), audio=late)
    assert lag == pytest.approx(300, abs=15) and verdict.startswith("out of sync by") and 0 < score < 1
    assert plot.shape[0] == 1 and plot.shape[-1] == 3 and 0 <= plot.min() < plot.max() <= 1 and json.loads(report)["verdict"] == verdict
    (fixed,) = run("MOVAFixLag", audio=late, lag_ms=lag, verdict=verdict)
    assert fixed["waveform"].shape == late["waveform"].shape
    again = run("MOVACheckLipSync", images=images(), audio=fixed)
    assert again[2] == "plausible" and abs(again[1]) < 5
    assert run("MOVAFixLag", audio=fixed, lag_ms=again[1], verdict=again[2])[0] is fixed
    (by_hand,) = run("MOVAFixLag", audio=late, lag_ms=300.0)
    assert torch.equal(by_hand["waveform"][..., :-14400], late["waveform"][..., 14400:]) and not by_hand["waveform"][..., -14400:].any()


@pytest.mark.parametrize("verdict", ["plausible", "not in sync", "no talking face", "too short", "no voice"])
def test_nothing_is_moved_unless_the_verdict_allows_it(run, verdict):
    sound = audio(voice(1))
    assert run("MOVAFixLag", audio=sound, lag_ms=200.0, verdict=verdict)[0] is sound


def test_a_clip_without_sound_and_a_wrong_rate(pack, drawn, run):
    drawn(drawn_film(1)[1])
    error = sys.modules[f"{PACK}.mova.errors"].InputError
    with pytest.raises(error, match="no sound"):
        run("MOVACheckLipSync", images=images(), audio=None)
    with pytest.raises(error, match="frame rate is 0"):
        run("MOVACheckLipSync", images=images(), audio=audio(voice(1)), fps=0.0)
    assert run("MOVACheckLipSync", images=images(1), audio=audio(voice(1)))[2] == "too short"


def test_cancel_stops_a_check(drawn, run, cancel_after):
    drawn(drawn_film(1)[1])
    cancel_after(1)
    with pytest.raises(Cancelled):
        run("MOVACheckLipSync", images=images(), audio=audio(voice(1)))


# ---------------------------------------------------------------- the best take


class Decoder:
    """Both VAEs: the latents hold a seed, and the decoded take is the voice of that seed. Counts decoded films that are alive."""

    def __init__(self, video):
        self.video, self.alive, self.most = video, 0, 0
        self.latent_channels, self.audio_sample_rate = 16, RATE

    def temporal_compression_decode(self):
        return 4 if self.video else None

    def decode(self, latents):
        if not self.video:
            return voice(int(latents[0, 0, 0]))[..., None].clone()
        film = images()[None] + latents.flatten()[0] / 1000
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(film.untyped_storage(), self.gone)
        return film

    def gone(self):
        self.alive -= 1


def latents(*seeds):
    """Video and audio LATENT lists of one take each."""
    return [{"samples": torch.full((1, 16, 1, 2, 2), float(seed))} for seed in seeds], [{"samples": torch.full((1, 8, 4), float(seed))} for seed in seeds]


@pytest.fixture
def pick(run):
    def pick(video, audio, **given):
        vaes = {"video_vae": Decoder(True), "audio_vae": Decoder(False)}
        return run("MOVAPickBestTake", video=video, audio=audio, fps=FPS, **vaes | given)

    return pick


def test_seeds_follow_each_other(run):
    assert run("MOVASeeds", seed=42, takes=3)[0] == [42, 43, 44]
    assert run("MOVASeeds", seed=2**64 - 65, takes=64)[0][-1] == 2**64 - 2


@pytest.mark.parametrize("batched", [False, True])
def test_the_take_whose_voice_fits_the_mouth_is_picked(drawn, pick, batched):
    drawn(drawn_film(5)[1])
    video, sound = latents(1, 9, 5, 7)
    if batched:  # two batches of two
        video, sound = ([{"samples": torch.cat([a["samples"], b["samples"]])} for a, b in (part[:2], part[2:])] for part in (video, sound))
    film, heard, index, scores, sheet = pick(video, sound)
    told = json.loads(scores)
    assert index == 2 and told["best"] == 3 and told["takes"][2]["verdict"] == "plausible"
    assert film.shape == (193, 36, 64, 3) and film[0, 0, 0, 0] == pytest.approx(0.005) and torch.equal(heard["waveform"][0], voice(5))
    assert sheet.shape[0] == 1 and sheet.shape[-1] == 3


def test_two_decoded_takes_are_held_at_most(drawn, pick):
    drawn(drawn_film(5)[1])
    vae = Decoder(True)
    for order in ((5, 1, 2, 3), (1, 2, 3, 5), (1, 5, 2, 3)):
        vae.most = 0
        pick(*latents(*order), video_vae=vae)
        assert vae.most == 2 and vae.alive <= 1


def test_seeds_are_written_beside_the_takes(drawn, pick):
    drawn(drawn_film(5)[1])
    *_, scores, with_seeds = pick(*latents(1, 5), seeds=[41, 42])
    assert [take["seed"] for take in json.loads(scores)["takes"]] == [41, 42]
    assert not torch.equal(with_seeds, pick(*latents(1, 5))[-1])


def test_the_sound_counts_by_its_share(pack, drawn, pick, monkeypatch):
    """The first take has the wanted sound, the second one the lips."""
    drawn(drawn_film(5)[1])
    asked = []

    def check_sound(encoder, waveform, rate, wanted, on_step):
        asked.append((encoder, waveform.shape[:2], rate, wanted))
        return [SimpleNamespace(score=float(torch.equal(waveform[0], voice(1))), found=("rain",), remarks=())]

    monkeypatch.setattr(pack.takes, "check_sound", check_sound)
    ear = {"cat_encoder": SimpleNamespace(listening=lambda: nullcontext("an ear")), "wanted_sounds": "rain"}
    picked = [pick(*latents(1, 5), **ear, sound_share=share)[2] for share in (0.0, 1.0)]
    assert picked == [1, 0] and set(asked) == {("an ear", (1, 1), RATE, "rain")}
    assert pick(*latents(2, 1), **ear, face_landmarks="none")[2] == 1


def test_a_real_ear_listens_to_every_take(pick, run, folder):
    """With random weights: that it is asked, not that it is right."""
    file = folder / "audio_encoders" / "ear.safetensors"
    write_demo_encoder(file)
    ear, *_ = run("CATLoadEncoder", encoder="ear.safetensors")
    *_, scores, _ = pick(*latents(1, 5), cat_encoder=ear, wanted_sounds="speech", face_landmarks="none")
    heard = [take["sound"] for take in json.loads(scores)["takes"]]
    assert all(0 <= score <= 1 for score in heard) and len(heard) == 2


@pytest.mark.parametrize("wanted, said", [("", "wanted_sounds is empty"), (" \n", "wanted_sounds is empty"), ("zxqy", "not known as a sound: zxqy")])
def test_an_ear_that_is_told_no_sound_does_not_count(drawn, pick, run, folder, wanted, said):
    drawn(drawn_film(5)[1])
    write_demo_encoder(folder / "audio_encoders" / "ear.safetensors")
    ear, *_ = run("CATLoadEncoder", encoder="ear.safetensors")
    *_, index, scores, _ = pick(*latents(1, 5), cat_encoder=ear, wanted_sounds=wanted, sound_share=1.0)
    told = json.loads(scores)
    assert index == 1 and [take["sound"] for take in told["takes"]] == [None, None]
    assert len(told["notes"]) == 1 and said in told["notes"][0]


def test_without_any_judge_the_first_take_is_given_out(pick):
    *_, index, scores, sheet = pick(*latents(3, 4), face_landmarks="none")
    assert index == 0 and json.loads(scores)["takes"][0]["verdict"] is None and sheet.isfinite().all()


def test_takes_that_do_not_fit_together(pack, pick):
    error = sys.modules[f"{PACK}.mova.errors"].InputError
    video, sound = latents(1, 2)
    with pytest.raises(error, match="2 video latents, 1 audio latents"):
        pick(video, sound[:1], face_landmarks="none")
    with pytest.raises(error, match="and 3 seeds"):
        pick(video, sound, seeds=[1, 2, 3], face_landmarks="none")
    with pytest.raises(error, match="2 videos and 1 sounds"):
        pick([{"samples": torch.zeros(2, 16, 1, 2, 2)}], sound[:1], face_landmarks="none")
