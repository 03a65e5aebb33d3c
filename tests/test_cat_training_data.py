"""What a run reads: folders, manifests, labels, damaged files, vectors of outside encoders; chance and augmentation."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from cat_training_cases import RATE, RUN, SETTINGS, TINY, read_tone, short_run, tone, tones, write_wav
from safetensors.torch import save_file

from cat_encoder.errors import CatError
from cat_encoder.frontend import log_mel
from cat_encoder.training import data, draws
from cat_encoder.training.clips import Clip, balancing_weights, class_names, find_clips, label_matrix, read_classes, with_labels
from cat_encoder.training.data import Sounds, read_sound
from cat_encoder.training.decoder import DecoderShape
from cat_encoder.training.external import ComputedVectors, StoredVectors, open_external, transformers_encoder
from cat_encoder.training.masks import MaskPlan, draw_masks, split_cells
from cat_encoder.training.pretrain import pretrain


@pytest.fixture
def folder(tmp_path):
    """Four sounds in two sub-folders, and a text that is none."""
    for name in ("bell/1.wav", "bell/2.wav", "rain/deep/3.WAV", "rain/4.wav"):
        write_wav(tmp_path / "sounds" / name, tone(int(name.split("/")[-1][0])))
    (tmp_path / "sounds" / "notes.txt").write_text("none")
    return tmp_path / "sounds"


# Clips


def test_a_folder_is_searched_and_sub_folders_are_labels(folder):
    clips = find_clips(folder)
    assert [(clip.path.name, clip.labels) for clip in clips] == [("1.wav", ("bell",)), ("2.wav", ("bell",)), ("4.wav", ("rain",)), ("3.WAV", ("rain",))]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", json.dumps([{"path": "bell/1.wav", "labels": ["bell", "metal"]}, {"file": "rain/4.wav", "label": "rain"}])),
        ("a.json", json.dumps({"clips": [{"audio": "bell/1.wav", "tags": "bell; metal"}, {"path": "rain/4.wav", "labels": ["rain"]}, {"path": "bell/2.wav", "keep": False}]})),
        ("a.jsonl", '{"path": "bell/1.wav", "labels": "bell|metal"}\n\n{"path": "rain/4.wav", "label": "rain"}\n'),
        ("a.tsv", "path\tlabels\nbell/1.wav\tbell;metal\nrain/4.wav\train\n"),
        ("a.csv", 'file,labels,keep\nbell/1.wav,"bell;metal",true\nrain/4.wav,rain,1\nbell/2.wav,bell,false\n'),
    ],
)  # fmt: skip
def test_manifests(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8-sig")
    assert find_clips(folder / name) == [Clip(folder / "bell/1.wav", ("bell", "metal")), Clip(folder / "rain/4.wav", ("rain",))]


def test_the_older_list_begins_with_its_folder(folder):
    (folder / "train.tsv").write_text("bell\n1.wav\t6400\n2.wav\t6400\n")
    assert [clip.path for clip in find_clips(folder / "train.tsv")] == [folder / "bell/1.wav", folder / "bell/2.wav"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.json", "{", "cannot be read as a manifest"),
        ("a.json", '{"name": 3}', "a list of clips"),
        ("a.json", "[]", "lists no clips"),
        ("a.json", "[3]", "entry 1 names no file"),
        ("a.json", '[{"path": 5}]', "entry 1 names no file"),
        ("a.csv", "a,b\n1,2\n", "column names with path"),
        ("a.tsv", "path\tlabels\nno.wav\tx\n", "1 of 1 listed files do not exist"),
        ("a.xml", "<a/>", "is no manifest"),
        ("a.jsonl", "{'path': 1}", "cannot be read as a manifest"),
    ],
)
def test_a_bad_manifest_is_a_sentence(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(CatError, match=words):
        find_clips(tmp_path / name)


def test_nothing_to_learn_from_is_a_sentence(tmp_path):
    with pytest.raises(CatError, match="holds no sound files: put files such as"):
        pretrain(tmp_path, tmp_path / "out", architecture=TINY, settings=SETTINGS, run=RUN)
    with pytest.raises(CatError, match="does not exist: give a folder"):
        find_clips(tmp_path / "nowhere")


def test_labels(folder, tmp_path):
    clips = find_clips(folder)
    assert class_names(clips) == ["bell", "rain"]
    assert label_matrix(clips, ["rain", "bell"]).tolist() == [[0, 1], [0, 1], [1, 0], [1, 0]]
    with pytest.raises(CatError, match="labelled 'bell', which is none of the 1 classes"):
        label_matrix(clips, ["rain"])
    (tmp_path / "a.lbl").write_text("1\tx,y\n2.wav\ty\n3\tx\n4\tx\n")
    assert [clip.labels for clip in with_labels(clips, tmp_path / "a.lbl")] == [("x", "y"), ("y",), ("x",), ("x",)]
    (tmp_path / "a.lbl").write_text("1\tx\n")
    with pytest.raises(CatError, match="no line for 3 of 4 clips"):
        with_labels(clips, tmp_path / "a.lbl")
    (tmp_path / "classes.csv").write_text('index,mid,display_name\n0,/m/1,Speech\n1,/m/2,"Rain, heavy"\n')
    assert read_classes(tmp_path / "classes.csv") == ["/m/1", "/m/2"]
    (tmp_path / "classes.txt").write_text("Rain, heavy\nSpeech\n")
    assert read_classes(tmp_path / "classes.txt") == ["Rain, heavy", "Speech"]
    with pytest.raises(CatError, match="2 of 2 clips have no label"):
        class_names(tones(2))


def test_rare_classes_are_drawn_as_often_as_frequent_ones():
    clips = [Clip(tones(1)[0].path, ("common",))] * 90 + [Clip(tones(1)[0].path, ("rare",))] * 10
    order = draws.ClipOrder(100, 0, weights=balancing_weights(clips), size=10)
    drawn = [[order[epoch * 10 + i] for i in range(10)] for epoch in range(200)]
    assert all(len(set(epoch)) == 10 for epoch in drawn)  # without repetition
    rare = sum(number >= 90 for epoch in drawn for number in epoch) / 2000
    assert 0.3 < rare < 0.55  # 0.1 without weights; below 0.5, for they run out


# Sounds


def test_files_are_read_as_they_are(tmp_path):
    stereo = torch.stack([tone(1)[0], tone(2)[0]])
    waveform, rate = read_sound(write_wav(tmp_path / "a.wav", stereo, 44_100))
    assert rate == 44_100 and (waveform - stereo).abs().max() < 1e-4


def test_batches_hold_what_the_front_end_makes(folder):
    clips = find_clips(folder)
    sounds = Sounds(clips, read_sound, 48, shortest=1000)
    batch = next(sounds.batches(0, 1, 4))
    for clip, mel in zip(batch.clips, batch.mel, strict=True):
        waveform, rate = read_sound(clip.path)
        assert torch.equal(mel, log_mel(waveform[None], rate, 48)[0])
    assert {clip.path for clip in batch.clips} == {clip.path for clip in clips}


def test_every_epoch_brings_every_clip_once_in_a_new_order():
    sounds = Sounds(tones(5), read_tone, 32, shortest=1000, seed=4)
    names = [int(clip.path.stem) for batch in sounds.batches(0, 5, 3) for clip in batch.clips]
    epochs = [names[i : i + 5] for i in (0, 5, 10)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs) and epochs[0] != epochs[1]


def test_the_next_run_continues_the_order_and_the_augmentation():
    sounds = Sounds(tones(5), read_tone, 32, shortest=1000, roll=True, noise=True, seed=4, workers=3)
    whole = list(sounds.batches(0, 4, 3))
    again = list(Sounds(tones(5), read_tone, 32, shortest=1000, roll=True, noise=True, seed=4, workers=1).batches(2, 4, 3))
    assert all(torch.equal(a.mel, b.mel) and a.clips == b.clips for a, b in zip(whole[2:], again, strict=True))


def test_bad_files_are_named_and_replaced(folder, caplog):
    (folder / "bell" / "1.wav").write_bytes(b"RIFF....WAVE, cut off")
    (folder / "bell" / "2.wav").write_bytes(b"")
    write_wav(folder / "rain" / "4.wav", tone(1, seconds=0.05))
    sounds = Sounds(find_clips(folder), read_sound, 32, shortest=1000)
    with caplog.at_level(logging.WARNING):
        batches = list(sounds.batches(0, 3, 4))
    assert {clip.path.name for batch in batches for clip in batch.clips} == {"3.WAV"}
    assert len(sounds.refused) == 3
    for words in ("1.wav is no sound", "2.wav is no sound", "4.wav has 800 samples at 16 kHz; 1,000 are needed"):
        assert sum(words in message for message in caplog.messages) == 1


def test_kept_clips_are_read_once():
    read = []

    def counting(path):
        read.append(path.stem)
        return read_tone(path)

    plain, kept = (Sounds(tones(4), reader, 32, shortest=1000, roll=True, keep=keep, workers=1) for reader, keep in ((read_tone, 0), (counting, 3)))
    for one, other in zip(plain.batches(0, 3, 4), kept.batches(0, 3, 4), strict=True):
        assert torch.equal(one.mel, other.mel) and all(map(torch.equal, one.waves, other.waves))
    assert sorted(read.count(str(number)) for number in range(4)) == [1, 1, 1, 3]


def test_no_usable_clip_is_a_sentence(folder, tmp_path):
    with pytest.raises(CatError, match="None of the 4 clips can be used. The first: .*10,000 are needed"):
        pretrain(folder, tmp_path / "out", architecture=TINY, settings=SETTINGS, run=RUN)


def test_sounds_that_are_no_numbers_are_left_out():
    bad = {0: torch.full((1, 6400), float("nan")), 1: torch.zeros(1, 6400, dtype=torch.int16)}
    sounds = Sounds(tones(3), lambda path: (bad.get(int(path.stem), tone(2)), RATE), 32, shortest=1000)
    assert {clip.path.name for clip in next(sounds.batches(0, 1, 3)).clips} == {"2.wav"}


def test_pretraining_from_files(folder, tmp_path):
    run = replace(RUN, updates=2, batch=2)
    (folder / "rain" / "9.wav").write_bytes(b"broken")
    file = pretrain(folder, tmp_path / "out", architecture=TINY, settings=SETTINGS, run=run, shortest=1000)
    assert file.is_file()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"frames": 20}, "multiple of the patch, 16"),
        ({"clones": 0}, "clones"),
        ({"layers": 3}, "layers and layer must be 0 to 2"),
        ({"measure": "hinge"}, "measure must be one of mse, l1, cosine, ce"),
        ({"side": "left"}, "side must be one of"),
        ({"mask": MaskPlan(1.0)}, "A mask share of 1 leaves 0 of 16 cells visible"),
        ({"mask": MaskPlan(square=0)}, "square must be 1"),
        ({"mask": MaskPlan(extra=-0.5)}, "share \\+ extra"),
        ({"decoder": DecoderShape(groups=0)}, "groups must be 1 or more"),
        ({"decoder": DecoderShape(kernel=0)}, "kernel and groups must be 1 or more"),
    ],
)
def test_settings_that_cannot_be_are_a_sentence(tmp_path, changes, words):
    with pytest.raises(CatError, match=words):
        short_run(tmp_path, settings=replace(SETTINGS, **changes))


@pytest.mark.parametrize(("changes", "words"), [({"workers": 0}, "0 threads cannot read"), ({"device": "warp:9"}, "device 'warp:9'")])
def test_places_that_are_not_there_are_a_sentence(tmp_path, changes, words):
    with pytest.raises(CatError, match=words):
        short_run(tmp_path, **changes)


def test_an_output_that_is_a_file_is_a_sentence(tmp_path):
    (tmp_path / "out").write_text("taken")
    with pytest.raises(CatError, match="cannot be made a folder"):
        short_run(tmp_path / "out")


# Outside encoders


@pytest.fixture
def vectors(tmp_path):
    """Three ways to store the same vectors of five tones."""
    table = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    (tmp_path / "npy").mkdir()
    for number, vector in enumerate(table):
        np.save(tmp_path / "npy" / f"{number}.npy", vector[None].numpy())  # [1,7], as embedding scripts write it
    save_file({str(number): vector.contiguous() for number, vector in enumerate(table)}, tmp_path / "all.safetensors")
    return table, tmp_path


def test_stored_vectors(vectors):
    table, place = vectors
    own = [replace(clip, vector=place / "npy" / clip.path.with_suffix(".npy").name) for clip in tones(5)]
    for source, clips in ((StoredVectors(place / "npy"), tones(5)), (open_external(place / "all.safetensors"), tones(5)), (StoredVectors(), own)):
        assert torch.equal(source(clips, []), table)


def test_the_same_name_in_two_folders(tmp_path):
    for number, name in enumerate(("bell", "rain")):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "1.npy", np.full(3, number, np.float32))
    clips = [Clip(tmp_path / "sounds" / name / "1.wav") for name in ("rain", "bell")]
    assert StoredVectors(tmp_path)(clips, []).tolist() == [[1, 1, 1], [0, 0, 0]]


def test_vectors_that_do_not_fit_are_a_sentence(vectors, tmp_path):
    _, place = vectors
    source = StoredVectors(place / "npy")
    np.save(place / "npy" / "3.npy", np.zeros(6, np.float32))
    with pytest.raises(CatError, match=r"The vector of 3\.wav has the shape \[6\], others have 7 values"):
        source(tones(5), [])
    with pytest.raises(CatError, match=r"has no vector for 5\.wav: 5\.npy"):
        source(tones(6)[5:], [])
    np.save(place / "npy" / "0.npy", np.array([{"code": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(CatError, match="cannot be read as a .npy vector"):
        source(tones(1), [])
    np.save(place / "npy" / "0.npy", np.full(7, np.nan, np.float32))
    with pytest.raises(CatError, match="NaN"):
        source(tones(1), [])
    with pytest.raises(CatError, match="does not exist"):
        open_external(tmp_path / "nowhere")
    (tmp_path / "cut.safetensors").write_bytes(b"12345678{")
    with pytest.raises(CatError, match="cannot be read as safetensors"):
        open_external(tmp_path / "cut.safetensors")


def test_a_wrong_width_stops_a_run_with_a_sentence(vectors, tmp_path):
    _, place = vectors
    np.save(place / "npy" / "3.npy", np.zeros(6, np.float32))
    with pytest.raises(CatError, match=r"3\.wav has the shape \[6\]"):
        pretrain(tones(5), tmp_path / "out", architecture=TINY, settings=SETTINGS, run=RUN, external=place / "npy", read=read_tone, shortest=1000)


def test_a_callable_is_asked_once_per_clip():
    asked = []

    def describe(waveforms, rate):
        asked.append((list(waveforms.shape), rate))
        return waveforms[:, :4]

    source = ComputedVectors(describe)
    waves = [tone(number)[0] for number in range(3)]
    assert torch.equal(source(tones(3), waves), source(tones(3), waves))
    assert asked == [([1, 6400], 16_000)] * 3
    with pytest.raises(CatError, match=r"made \[2\] of"):
        ComputedVectors(lambda waveforms, rate: waveforms[0, :2])(tones(1), waves[:1])
    with pytest.raises(CatError, match=r"one finite vector"):
        ComputedVectors(lambda waveforms, rate: waveforms[:, :2] * float("nan"))(tones(1), waves[:1])


def test_transformers_models(tmp_path):
    from transformers import ASTConfig, ASTFeatureExtractor, ASTModel

    torch.manual_seed(0)
    config = ASTConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, max_length=64, num_mel_bins=32)
    model = ASTModel(config).eval()
    model.save_pretrained(tmp_path / "ast")
    ASTFeatureExtractor(num_mel_bins=32, max_length=64).save_pretrained(tmp_path / "ast")
    found = open_external(tmp_path / "ast")(tones(2), [tone(number)[0] for number in range(2)])
    inputs = ASTFeatureExtractor(num_mel_bins=32, max_length=64)([tone(0)[0].numpy()], sampling_rate=16_000, return_tensors="pt")
    hidden = model(**inputs).last_hidden_state
    assert found.shape == (2, 24)
    torch.testing.assert_close(found[:1], hidden[:, :2].mean(1), rtol=1e-4, atol=1e-5)  # both class tokens, after the norm


def test_a_folder_that_is_no_model_is_a_sentence(tmp_path):
    with pytest.raises(CatError, match="has no config.json"):
        transformers_encoder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(CatError, match="cannot be loaded as a transformers audio model"):
        transformers_encoder(tmp_path)


# Chance


def test_masks_hide_the_same_number_in_squares():
    masks = draw_masks(200, 64, 8, MaskPlan(), torch.Generator().manual_seed(0))
    assert set(masks.sum(1).tolist()) == {410}
    visible = ~masks.view(200, 64, 8)
    pairs = (visible[:, 1:] & visible[:, :-1]).sum() / visible[:, 1:].sum()
    assert pairs > 0.5  # alone, a visible cell would have a visible one before it in a fifth of the cases
    split = split_cells(masks, 64, 8)
    assert torch.equal(torch.cat([split.keep, split.hide], 1).sort(1).values, torch.arange(512).expand(200, -1))


def test_augmentations_stay_in_their_range():
    wave = tone(3)[0]
    gains = torch.stack([data.roll_and_scale(wave, draws.generator(0, "roll", i)).abs().max() for i in range(300)]) / wave.abs().max()
    assert 0.6 < gains.min() and gains.max() < 1.4 and abs(gains.mean() - 1) < 0.02 and abs(gains.std() - 0.109) < 0.02  # Beta(10, 10)
    mel = torch.ones(40, 1, 50, 128)
    hidden = data.mask_bands(mel, 0.2, draws.generator(0, "bands", 0)) == 0
    assert torch.equal(mel, torch.ones_like(mel))
    times, bands = hidden.all(3).sum(2), hidden.all(2).sum(2)
    assert times.max() <= 10 and bands.max() <= 25 and len(set(bands.flatten().tolist())) > 10
    mixed, labels = data.mix_with_reverse(torch.tensor([[1.0], [3.0]]), torch.eye(2), 0.75)
    assert mixed.tolist() == [[1.5], [2.5]] and labels.tolist() == [[0.75, 0.25], [0.25, 0.75]]


def test_draws_repeat_and_differ():
    assert draws.numbers(1, "a", 2).random() == draws.numbers(1, "a", 2).random()
    seeds = {draws.seed_of(seed, purpose, place) for seed in (1, 2, 12) for purpose in ("a", "b") for place in (2, 22)}
    assert len(seeds) == 12
