"""A folder of recordings looked through: tags, near-duplicates, outliers, what is broken, the manifest and the cache (spec/cat.md 11, N5a)."""

import json
import math
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from cat_encoder import CatError, load, write_demo_encoder
from cat_encoder.labels import audioset
from cat_encoder.listening.aliases import Vocabulary
from cat_encoder.listening.sift import Rules, Sifted, judge_alone, sift_folder
from cat_encoder.listening.sift_files import Ear
from cat_encoder.training.clips import Clip, find_clips
from cat_encoder.training.state import load_state, save_state
from mova.errors import MediaError
from mova.media import write_audio
from mova.media_reading import read_audio

RATE = 16000
BROKEN = "broken.wav"


def read(path, seconds):
    try:
        return read_audio(path, seconds)
    except MediaError as error:
        raise CatError(str(error)) from error


def noting(listened):
    """A reader that notes the names of the files it reads."""
    return lambda path, seconds: (listened.append(path.name), read(path, seconds))[1]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return load(write_demo_encoder(tmp_path_factory.mktemp("ear") / "demo.safetensors"))


def warble(index, seconds=2.0):
    """Tones that differ in pitch and in the speed of their trembling."""
    time = torch.arange(round(seconds * RATE)) / RATE
    hiss = 0.02 * torch.randn(len(time), generator=torch.manual_seed(index))
    return 0.2 * torch.sin(2 * torch.pi * 150 * 1.35**index * time) * (1 + torch.sin(2 * torch.pi * (index + 1) * time)) + hiss


@pytest.fixture(scope="module")
def sifted_before(encoder, tmp_path_factory):
    """A folder "sounds": nine recordings that are kept, and one of each kind that is not; and beside it "out", from sifting it."""
    place = tmp_path_factory.mktemp("set")
    sounds = {f"tones/tone{index}.wav": warble(index) for index in range(9)}
    sounds["z louder copy.wav"] = 0.5 * warble(3) + 0.001 * torch.randn(2 * RATE, generator=torch.manual_seed(1))
    sounds["rushing.wav"] = 0.3 * torch.randn(2 * RATE, generator=torch.manual_seed(2))
    sounds["short.wav"], sounds["tiny.wav"], sounds["silent.wav"] = warble(4, 0.5), warble(4, 0.01), torch.zeros(2 * RATE)
    sounds["clipped.wav"] = (10 * warble(5)).clamp(-1, 1)
    for name, sound in sounds.items():
        path = place / "sounds" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_audio(path, sound[None], RATE)
    (place / "sounds" / BROKEN).write_bytes(b"RIFF and nothing else")
    (place / "sounds" / "notes.txt").write_text("not a sound", encoding="utf-8")
    sift_folder(encoder, place / "sounds", place / "out", read)
    return place


@pytest.fixture
def place(sifted_before, tmp_path):
    """A copy of both folders."""
    return shutil.copytree(sifted_before, tmp_path / "set")


@pytest.fixture
def sift(encoder, place):
    def sift(rules=None, encoder=encoder, read=read, **given):
        return sift_folder(encoder, place / "sounds", place / "out", read, rules or Rules(), **given)

    return sift


def reasons(sifting):
    return {item.file: item.reasons for item in sifting.files}


def test_each_kind_is_found_and_the_rest_kept(sift):
    sifting = sift()
    found = reasons(sifting)
    expected = {
        "z louder copy.wav": "near-duplicate of tones/tone3.wav", "rushing.wav": "outlier", "short.wav": "0.50 s long", "tiny.wav": "cannot be used",
        "silent.wav": "silent", "clipped.wav": "clipped", BROKEN: "cannot be used",
    }  # fmt: skip
    assert {name for name, why in found.items() if why} == expected.keys()
    assert all(why in found[name][0] and len(found[name]) == 1 for name, why in expected.items())
    assert len(sifting.files) == 16 and str(sifting).startswith("16 files: 9 kept, 7 dropped")
    (copy,) = (item for item in sifting.files if item.file == "z louder copy.wav")
    assert copy.duplicate_of == "tones/tone3.wav" and copy.nearest[1] > 0.9
    others = [item.nearest[1] for item in sifting.files if item.kept and item.nearest]
    assert max(others) < 0.7


def test_rules_decide(sift):
    assert reasons(sift(Rules(outlier=0)))["rushing.wav"] == []
    assert reasons(sift(Rules(duplicate=1.0)))["z louder copy.wav"] == []
    assert reasons(sift(Rules(shortest=0.2)))["short.wav"] != ["0.50 s long, 0.2 s are asked for"]
    assert sum(item.kept for item in sift(Rules(shortest=3.0)).files) == 0


def test_only_copies(encoder, tmp_path):
    """A folder of one recording five times keeps one."""
    (tmp_path / "in").mkdir()
    for index in range(5):
        write_audio(tmp_path / "in" / f"{index}.wav", warble(2)[None] * (1 - index / 10), RATE)
    sifting = sift_folder(encoder, tmp_path / "in", tmp_path / "out", read)
    assert [item.duplicate_of for item in sifting.files] == [None, *["0.wav"] * 4]


def test_two_different_files_are_no_copies(encoder, tmp_path):
    (tmp_path / "in").mkdir()
    write_audio(tmp_path / "in" / "a.wav", warble(0)[None], RATE)
    write_audio(tmp_path / "in" / "b.wav", warble(8)[None], RATE)
    assert all(item.kept for item in sift_folder(encoder, tmp_path / "in", tmp_path / "out", read).files)


def test_unwanted_sounds_are_dropped():
    """By scores as a fine-tuned head gives them."""
    labels = [name for _, name in audioset()]
    odds = -8 + torch.randn(len(labels), generator=torch.manual_seed(0))
    odds[labels.index("Piano")], odds[labels.index("Music")] = -1.0, 0.0
    unwanted = Vocabulary(labels).read("music, rain").sounds
    item = Sifted(Clip("a.wav"), "a.wav")
    judge_alone(item, Ear(torch.zeros(4), torch.sigmoid(odds), 2.0, -20.0, 0.0), labels, unwanted, Rules(), torch.full((527,), -8.0))
    assert item.reasons == ["unwanted: music, rank 1"] and [label for label, _ in item.heard[:2]] == ["Music", "Piano"]


def test_unwanted_words_that_are_not_known_are_told(sift):
    sifting = sift(Rules(unwanted="flibber"))
    assert sifting.remarks == ("not known as a sound: flibber",) and "flibber" in str(sifting)


def test_manifest_is_what_training_reads(sift):
    sifting = sift()
    story = json.loads(sifting.manifest.read_text(encoding="utf-8"))
    assert (story["kept"], story["dropped"], len(story["clips"])) == (9, 7, 16)
    clip = next(clip for clip in story["clips"] if clip["path"].endswith("tone3.wav"))
    assert clip["keep"] and clip["labels"] == ["tones"] and clip["seconds"] == 2.0 and not os.path.isabs(clip["path"]) and "\\" not in clip["path"]
    assert len(clip["heard"]) == 5 and {heard["label"] for heard in clip["heard"]} <= {name for _, name in audioset()}
    read_back = find_clips(sifting.manifest)
    assert [found.path.resolve() for found in read_back] == [item.clip.path.resolve() for item in sifting.files if item.kept]
    assert {found.labels for found in read_back} == {("tones",)}


def test_only_what_changed_is_listened_to(sift, place):
    listened = []
    before = reasons(sift(read=noting(listened)))
    assert sorted(listened) == sorted([BROKEN, "tiny.wav"])  # of these nothing is known
    tensors = load_file(place / "out" / "features.safetensors")
    assert tensors["vectors"].shape == (14, 48) and tensors["scores"].shape == (14, 527)
    listened.clear()
    write_audio(place / "sounds" / "tones" / "tone1.wav", warble(12)[None], RATE)
    os.utime(place / "sounds" / "tones" / "tone1.wav", ns=(1, 1))
    assert reasons(sift(read=noting(listened))).keys() == before.keys() and sorted(listened) == sorted([BROKEN, "tiny.wav", "tone1.wav"])


def test_how_much_is_listened_to(sift):
    listened = []
    seconds = {item.file: item.seconds for item in sift(Rules(listen=1.5), read=noting(listened)).files}
    assert len(listened) == 16 and seconds["rushing.wav"] == 1.5 and seconds["short.wav"] == 0.5


def test_features_of_another_encoder_are_not_used(sift, tmp_path):
    listened = []
    sift(encoder=load(write_demo_encoder(tmp_path / "other.safetensors", seed=1)), read=noting(listened))
    assert len(listened) == 16


def cut_off(features):
    features.write_bytes(features.read_bytes()[:100])


def lose_a_row(features):
    tensors, story = load_state(features)
    save_state(features, tensors | {"vectors": tensors["vectors"][1:]}, story)


def lose_a_number(features):
    tensors, story = load_state(features)
    save_state(features, tensors, {"files": [{"file": row["file"], "stamp": row["stamp"]} for row in story["files"]]})


@pytest.mark.parametrize("damage", [cut_off, lose_a_row, lose_a_number])
def test_damaged_features_are_made_anew(sift, place, caplog, damage):
    features = place / "out" / "features.safetensors"
    damage(features)
    listened = []
    sift(read=noting(listened))
    assert len(listened) == 16 and "all files are listened to again" in caplog.text
    assert load_file(features)["vectors"].shape[0] == 14


class Stop(BaseException):
    pass


def test_a_stop_leaves_whole_files_and_the_work_done(sift, place):
    shutil.rmtree(place / "out")

    def stop(done, total):
        if done == 6:
            raise Stop

    with pytest.raises(Stop):
        sift(on_file=stop)
    assert [file.name for file in (place / "out").iterdir()] == ["features.safetensors"]  # no manifest: nothing was decided
    done = len(load_file(place / "out" / "features.safetensors")["vectors"])
    listened = []
    sift(read=noting(listened))
    assert done == 4 and len(listened) == 16 - done  # of six files two are broken
    assert sorted(file.name for file in (place / "out").iterdir()) == ["features.safetensors", "manifest.json"]


def test_progress_counts_files(sift):
    told = []
    sift(on_file=lambda done, total: told.append((done, total)))
    assert told[0] == (0, 16) and told[-1] == (16, 16) and [done for done, _ in told] == sorted(done for done, _ in told)


def test_an_empty_folder(encoder, tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(CatError, match="holds no sound files"):
        sift_folder(encoder, tmp_path / "in", tmp_path / "out", read)
    assert not (tmp_path / "out").exists()


def test_an_encoder_without_tags_sifts_too(sift, tmp_path):
    from cat_encoder import read_checkpoint, write_checkpoint

    checkpoint = read_checkpoint(write_demo_encoder(tmp_path / "demo.safetensors"))
    checkpoint.head, checkpoint.labels = {}, []
    bare = load(write_checkpoint(tmp_path / "bare.safetensors", checkpoint))
    sifting = sift(encoder=bare)
    assert sum(item.kept for item in sifting.files) == 9 and all(item.heard == [] for item in sifting.files)
    with pytest.raises(CatError, match="without a head"):
        sift(Rules(unwanted="music"), encoder=bare)


def test_levels_are_measured(sift):
    levels = {item.file: item.level_db for item in sift().files}
    assert levels["rushing.wav"] == pytest.approx(20 * math.log10(0.3), abs=0.5) and levels["silent.wav"] < -100
