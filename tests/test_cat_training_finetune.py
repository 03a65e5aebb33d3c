"""Fine-tuning and measuring: learning labelled sounds, mAP, the reference's loss, the linear probe, the command line."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cat_training_cases import RATE, RUN, TINY, short_run, write_wav
from safetensors.torch import load_file

import cat_encoder
from cat_encoder.errors import CatError
from cat_encoder.training.clips import Clip
from cat_encoder.training.finetune import RECIPES, FinetuneSettings, Finetuning, build_classifier, class_errors, finetune, split_clips
from cat_encoder.training.metrics import accuracy, average_precision, mean_average_precision
from cat_encoder.training.pretrain import start_encoder
from cat_encoder.training.probe import fit_probe
from cat_encoder.training.run import RunSettings

SETTINGS = FinetuneSettings(frames=32, single=True, mixup=0.0, bands=0.0, drop_path=0.0, roll=False, evaluate_every=20)
RUN_20 = RunSettings(updates=20, warmup=2, rate=1e-2, floor=1e-6, batch=12, layer_decay=0.65, seed=1, save_every=100, log_every=1)
WIDER = replace(TINY, width=32, heads=4)
KINDS = ("clicks", "hiss", "hum")


def sound(kind: str, number: int) -> torch.Tensor:
    """Sound `number` of a kind, [1,6400]: noise, a low tone, or a click every 60 ms, over faint noise."""
    generator = torch.Generator().manual_seed(number)
    wave = torch.randn(6400, generator=generator) * (0.1 if kind == "hiss" else 0.002)
    start = int(torch.randint(960, (1,), generator=generator))
    if kind == "clicks":
        wave[start::960] += 0.8
    if kind == "hum":
        wave += 0.3 * torch.sin(2 * math.pi * (100 + start / 20) * torch.arange(6400) / RATE)
    return wave[None]


def read_kind(path):
    kind, number = path.stem.split("-")
    return sound(kind, int(number)), RATE


def kinds(first, last):
    return [Clip(Path(f"{kind}-{number}.wav"), (kind,)) for number in range(first, last) for kind in KINDS]


def tune(out, **changes):
    arguments = {"settings": SETTINGS, "run": RUN_20, "read": read_kind, "shortest": 1000, "validation": kinds(50, 56)} | changes
    return finetune(kinds(0, 12), out, start_encoder(WIDER, None, 0), **arguments)


def test_sounds_of_one_class_each_are_learnt_and_the_file_tags_them(tmp_path):
    steps = []
    settings = replace(SETTINGS, bands=0.1, drop_path=0.1)
    file = tune(tmp_path, settings=settings, run=replace(RUN_20, updates=60), on_step=steps.append)
    assert steps[-1].numbers["accuracy"] > 0.9 and steps[-1].numbers["mAP"] > 0.95 and steps[-1].numbers["loss"] < 0.6 * steps[0].numbers["loss"]
    assert steps[19].numbers.keys() == steps[-1].numbers.keys() > steps[0].numbers.keys()
    ear = cat_encoder.load(file)
    assert ear.labels == sorted(KINDS) and ear.single_label and ear.frames == 32
    tags = ear.tags(torch.stack([sound(kind, 90) for kind in KINDS]), RATE, top_k=1)
    assert [clip[0][0] for clip in tags] == list(KINDS)
    assert load_file(tmp_path / "best.safetensors").keys() == load_file(file).keys()


def test_sounds_of_several_classes_are_learnt(tmp_path):
    def both(first, last):
        return [Clip(Path(f"{name}-{i}.wav"), tuple(name.split("+"))) for i in range(first, last) for name in ("hiss", "hum", "hiss+hum")]

    def read(path):
        names, number = path.stem.split("-")
        return sum(sound(kind, int(number)) for kind in names.split("+")), RATE

    steps = []
    settings = replace(SETTINGS, single=False, mixup=0.2, bands=0.1)
    arguments = {"validation": both(50, 56), "settings": settings, "run": replace(RUN_20, updates=60), "read": read, "shortest": 1000}
    file = finetune(both(0, 12), tmp_path, start_encoder(WIDER, None, 0), on_step=steps.append, **arguments)
    assert steps[-1].numbers["mAP"] > 0.95 and "accuracy" not in steps[-1].numbers
    assert not cat_encoder.load(file).single_label


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    settings = replace(SETTINGS, single=False, mixup=0.5, bands=0.2, drop_path=0.2, roll=True, noise=True, evaluate_every=2)
    run = replace(RUN_20, updates=5)
    tune(tmp_path / "whole", settings=settings, run=run)

    def stop(step):
        if step.update == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(tmp_path / "cut", settings=settings, run=run, on_step=stop)
    tune(tmp_path / "cut", settings=settings, run=run)
    for name in ("classifier.safetensors", "best.safetensors", "resume.safetensors"):
        left, right = load_file(tmp_path / "whole" / name), load_file(tmp_path / "cut" / name)
        assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left), name
    assert (tmp_path / "whole/log.csv").read_bytes() == (tmp_path / "cut/log.csv").read_bytes()


def test_it_starts_from_what_pretraining_wrote(tmp_path):
    start = short_run(tmp_path / "pretrained", run=replace(RUN, updates=2))
    file = finetune(kinds(0, 4), tmp_path / "out", start, settings=SETTINGS, run=replace(RUN_20, updates=1, rate=0.0, floor=0.0), read=read_kind, shortest=1000)
    before, after = load_file(start), load_file(file)
    assert all(torch.equal(before[name], after[name]) for name in before) and set(after) - set(before) >= {"head.weight", "fc_norm.weight"}


def test_loss_equals_the_reference(golden_cat):
    story, tensors = golden_cat("classifier/classifier.json"), golden_cat("classifier/classifier.safetensors")
    logits, labels = tensors["CLS_TOKEN.logits"], tensors["labels"]
    assert float(class_errors(logits, labels, one_of_many=False)) == pytest.approx(story["bce_sum"], rel=1e-4)
    assert float(labels.sum()) == story["bce_sample_size"]


def test_drop_path_rises_over_the_blocks(tmp_path):
    classifier = build_classifier(start_encoder(replace(TINY, depth=3), None, 0), 3, SETTINGS, 0)
    Finetuning(classifier, list(KINDS), replace(SETTINGS, drop_path=0.1), RUN_20, tmp_path)
    assert [block.drop_path for block in classifier.encoder.blocks] == pytest.approx([0.0, 0.05, 0.1])
    head = classifier.head.linear
    assert head.bias.abs().max() == 0 and 0.01 < head.weight.std() < 0.03


def test_recipes():
    assert {name: (run.updates, run.schedule.warmup, run.rate, run.batch, settings.frames) for name, (settings, run) in RECIPES.items()} == {
        "as20k": (40_000, 4_000, 5e-5, 48, 1024), "as2m": (300_000, 30_000, 5e-5, 96, 1024), "esc50": (4_000, 400, 5e-5, 48, 512), "spc2": (40_000, 4_000, 2e-4, 256, 128),
    }  # fmt: skip
    assert all(run.layer_decay == 0.65 and run.floor == 1e-6 for _, run in RECIPES.values())


def test_clips_are_held_out_by_chance():
    clips = kinds(0, 10)
    train, held = split_clips(clips, 0.2, seed=0)
    assert len(held) == 6 and sorted(train + held, key=str) == sorted(clips, key=str)
    assert held != split_clips(clips, 0.2, seed=1)[1] and (train, held) == split_clips(clips, 0.2, seed=0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"validation": [Clip(kinds(0, 1)[0].path, ("thunder",))]}, "labelled 'thunder', which is none of the 3 classes"),
        ({"classes": ["clicks", "hiss"]}, "labelled 'hum'"),
        ({"classes": ["clicks", "hiss", "hiss", "hum"]}, "1 classes are named twice .*'hiss'"),
        ({"hold_out": 7}, "A share of 7 cannot be held out"),
        ({"settings": replace(SETTINGS, frames=40)}, "40 frames do not fit this encoder: a multiple of 16"),
    ],
)
def test_what_does_not_fit_is_a_sentence(tmp_path, changes, words):
    with pytest.raises(CatError, match=words):
        tune(tmp_path, **changes)


@pytest.mark.parametrize("changes", [{"mixup": -1.0}, {"bands": 3.0}, {"drop_path": 1.0}, {"smoothing": 4.0}, {"evaluate_every": 0}, {"balanced": -3}])
def test_settings_that_cannot_be_are_a_sentence(changes):
    with pytest.raises(CatError, match=f"cannot be used: .*{next(iter(changes))}"):
        replace(SETTINGS, **changes)


# Measures


def test_average_precision():
    assert average_precision(torch.tensor([[0.1], [0.4], [0.35], [0.8]]), torch.tensor([[0], [0], [1], [1]])).tolist() == pytest.approx([0.8333333])
    scores, truth = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.1, 0.5], [0.8, 0.1, 0.5]]), torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 0]])
    found = average_precision(scores, truth)
    assert found[:2].tolist() == pytest.approx([1.0, 2 / 3]) and found[2].isnan()  # equals are one rank; a class nobody has counts nowhere
    assert mean_average_precision(scores, truth) == pytest.approx(5 / 6)
    assert accuracy(torch.tensor([[0.9, 0.1], [0.8, 0.2]]), torch.eye(2)) == 0.5


def test_average_precision_of_chance_is_the_share_of_positives():
    generator = torch.Generator().manual_seed(0)
    truth = (torch.rand(20_000, 1, generator=generator) < 0.3).float()
    assert mean_average_precision(torch.rand(20_000, 1, generator=generator), truth) == pytest.approx(0.3, abs=0.02)


def test_probe_finds_a_linear_rule():
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(400, 6, generator=generator) * torch.tensor([1, 100, 0.01, 1, 1, 1]) + 5
    classes = ((vectors[:, 2] - 5) * 100 + (vectors[:, 1] - 5) / 100 > 0).long()
    probe = fit_probe(vectors[:300], classes[:300], 2)
    assert float((probe(vectors[300:]).argmax(1) == classes[300:]).float().mean()) > 0.95


# Command line


@pytest.fixture
def cat_cli():
    """cat_cli("pretrain", ...) -> exit status, as python -m cat_encoder would."""
    import argparse

    from cat_encoder.training.commands import add_parsers

    def call(*words):
        parser = argparse.ArgumentParser()
        add_parsers(parser.add_subparsers(required=True))
        args = parser.parse_args([str(word) for word in words])
        return args.run(args)

    return call


def test_command_line(cat_cli, tmp_path, capsys):
    for kind in KINDS:
        for number in range(3):
            write_wav(tmp_path / "sounds" / kind / f"{number}.wav", sound(kind, number))
    common = ("--frames", 32, "--shortest", 1000, "--device", "cpu", "--batch", 2, "--updates", 2)
    start = cat_encoder.write_checkpoint(tmp_path / "start.safetensors", cat_encoder.Checkpoint(TINY, start_encoder(TINY, None, 0).state_dict()))
    decoder = ("--decoder", 16, 1, 3, 4, "--mask", 0.75, 0.1, 2, "--ema", 0.9, 0.99, 2, "--utterance-weight", 0.5)
    assert cat_cli("pretrain", tmp_path / "sounds", "--out", tmp_path / "a", "--start", start, *decoder, *common) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "a" / "encoder.safetensors")
    told = json.loads(read_header(tmp_path / "a" / "resume.safetensors"))["settings"]
    assert told["pretrain"]["weights"]["utterance"] == 0.5 and told["pretrain"]["decoder"]["layers"] == 1 and told["run"]["updates"] == 2
    start = tmp_path / "a" / "encoder.safetensors"
    assert cat_cli("finetune", tmp_path / "sounds", "--out", tmp_path / "b", "--start", start, "--recipe", "esc50", "--hold-out", 0.3, *common) == 0
    assert cat_encoder.load(capsys.readouterr().out.strip()).labels == sorted(KINDS)


def read_header(file):
    from safetensors import safe_open

    with safe_open(file, "pt") as stored:
        return stored.metadata()["state"]
