"""Checkpoints of the encoder: every released layout, our own, and everything that is none."""

import json
import os
import pickle
import zipfile
from collections import OrderedDict, defaultdict

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cat_encoder.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from cat_encoder.config import Architecture, cat_architecture, patch_architecture
from cat_encoder.convert import convert
from cat_encoder.demo import write_demo_encoder
from cat_encoder.errors import CatError
from cat_encoder.frontend import ESC50
from cat_encoder.head import Head
from cat_encoder.labels import audioset
from cat_encoder.names import POSITIONS, PREFIX, to_released
from cat_encoder.trunk import AudioTransformer, position_table

SMALL = dict(width=16, heads=4, depth=2, position_rows=64)
ARCHITECTURES = {
    "cat": cat_architecture(channels=(8, 12), **SMALL),
    "cat of one stage": cat_architecture(1, **SMALL),
    "cat of four stages": cat_architecture(5, channels=(4, 8, 12), **SMALL),
    "cat of 8x8 patches": cat_architecture(2, channels=(8,), **SMALL),
    "cat with a bottleneck": cat_architecture(channels=(8, 12), bottleneck=4, **SMALL),
    "eat": patch_architecture(**SMALL | {"mlp_ratio": 2.0}),
}


@pytest.fixture(params=ARCHITECTURES)
def architecture(request) -> Architecture:
    return ARCHITECTURES[request.param]


def random_encoder(architecture: Architecture, seed: int = 0) -> AudioTransformer:
    torch.manual_seed(seed)
    return AudioTransformer(architecture).initialise().eval().requires_grad_(False)


def fairseq_tensors(encoder: AudioTransformer) -> OrderedDict:
    """The tensors as a trainer saves them: released names, the position table, and the decoder that listening leaves behind."""
    tensors = OrderedDict(to_released(encoder.state_dict(), encoder.architecture))
    tensors[POSITIONS] = position_table(encoder.architecture)[None]
    tensors[f"{PREFIX}decoder.blocks.0.0.weight"] = torch.zeros(3)
    return tensors


def fairseq_file(path, encoder: AudioTransformer, teacher: AudioTransformer | None = None, **more):
    model = fairseq_tensors(encoder)
    if teacher:
        model["_ema"] = OrderedDict((name, tensor) for name, tensor in fairseq_tensors(teacher).items() if "decoder" not in name)
    cfg = {"model": {"num_heads": encoder.architecture.heads, "norm_eps": 1e-6}, "task": {"target_length": 256}}
    torch.save({"args": None, "cfg": cfg, "model": model, "task_state": {}, "last_optimizer_state": {"state": {0: torch.zeros(5)}}} | more, path)
    return path


def same_tokens(one: AudioTransformer, other: AudioTransformer) -> bool:
    mel = torch.randn(1, 1, 64, 128, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return torch.equal(one(mel).tokens, other(mel).tokens)


# What can be loaded


def test_the_trainers_pretraining_file(golden_cat):
    path, recorded = golden_cat("checkpoint/cat_tiny_pretrain.pt"), golden_cat("checkpoint/cat_tiny_pretrain.model.safetensors")
    student, teacher = read_checkpoint(path), read_checkpoint(path, "teacher")
    assert (student.architecture.depth, student.architecture.heads, student.architecture.position_rows) == (3, 4, 96)
    assert teacher.architecture == student.architecture and not student.head and student.frames == 1024
    for checkpoint, prefix in ((student, ""), (teacher, "_ema/")):
        for name, tensor in to_released(checkpoint.encoder, checkpoint.architecture).items():
            assert torch.equal(tensor, recorded[prefix + name])
    assert not torch.equal(student.encoder["class_token"], teacher.encoder["class_token"])


def test_the_trainers_finetuned_file(golden_cat):
    checkpoint = read_checkpoint(golden_cat("checkpoint/cat_tiny_finetune_as527.pt"))
    assert checkpoint.labels == [row["name"] for row in golden_cat("labels/audioset_527.json")]
    assert checkpoint.architecture.heads == 4 and checkpoint.head["linear.weight"].shape == (527, 48) and checkpoint.head_eps == 1e-6
    with pytest.raises(CatError, match="holds no teacher"):
        read_checkpoint(golden_cat("checkpoint/cat_tiny_finetune_as527.pt"), "teacher")


def test_labels_are_the_reference(golden_cat):
    assert audioset() == [(row["mid"], row["name"]) for row in golden_cat("labels/audioset_527.json")]


def test_every_stem_from_a_trainers_file(architecture, tmp_path):
    encoder, teacher = random_encoder(architecture), random_encoder(architecture, 1)
    path = fairseq_file(tmp_path / "any.name", encoder, teacher)
    checkpoint = read_checkpoint(path)
    assert checkpoint.architecture == architecture and checkpoint.frames == 256
    assert same_tokens(checkpoint.build()[0], encoder) and same_tokens(read_checkpoint(path, "teacher").build()[0], teacher)


def test_every_stem_in_our_layout(architecture, tmp_path):
    encoder, head = random_encoder(architecture), Head(16, 3)
    written = Checkpoint(architecture, encoder.state_dict(), head.state_dict(), ["one", "two", "três"], single_label=True, frames=128, normalisation=ESC50)
    write_checkpoint(tmp_path / "new" / "a.safetensors", written)
    again = read_checkpoint(tmp_path / "new" / "a.safetensors")
    for name in ("architecture", "labels", "mode", "head_eps", "single_label", "frames", "normalisation", "origin"):
        assert getattr(again, name) == getattr(written, name), name
    assert same_tokens(again.build()[0], encoder)
    assert all(torch.equal(again.head[name], tensor) for name, tensor in head.state_dict().items())
    assert os.listdir(tmp_path / "new") == ["a.safetensors"]


@pytest.mark.parametrize(("weights", "seed"), [("student", 0), ("teacher", 1)])
def test_convert(tmp_path, weights, seed):
    architecture = ARCHITECTURES["cat"]
    source = fairseq_file(tmp_path / "in.pt", random_encoder(architecture), random_encoder(architecture, 1))
    out = convert(source, tmp_path / "out.safetensors", weights=weights)
    assert same_tokens(read_checkpoint(out).build()[0], random_encoder(architecture, seed))
    again = convert(out, tmp_path / "again.safetensors")
    assert same_tokens(read_checkpoint(again).build()[0], random_encoder(architecture, seed))
    with safe_open(out, "pt") as opened:
        assert POSITIONS not in opened.keys() and not any("decoder" in name for name in opened.keys())


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_hub_files(tmp_path, prefix):
    """EAT and SSLAM from a hub: other names, no settings but a config.json beside the file."""
    encoder, head = random_encoder(ARCHITECTURES["eat"]), Head(16, 527)
    tensors = {
        name.removeprefix(PREFIX).replace("context_encoder.norm", "pre_norm"): tensor
        for name, tensor in fairseq_tensors(encoder).items()
        if "decoder" not in name
    }
    tensors |= {"fc_norm.weight": head.norm.weight, "fc_norm.bias": head.norm.bias, "head.weight": head.linear.weight, "head.bias": head.linear.bias}
    save_file({prefix + name: tensor.detach().clone() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 4, "norm_eps": 1e-6}), encoding="utf-8")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        checkpoint = read_checkpoint(path)
        assert checkpoint.architecture == ARCHITECTURES["eat"] and checkpoint.head_eps == 1e-5 and checkpoint.labels[0] == "Speech"
        assert same_tokens(checkpoint.build()[0], encoder)


def test_heads_are_guessed_without_settings(tmp_path):
    encoder = random_encoder(cat_architecture(channels=(8, 12), width=128, heads=2, depth=1, position_rows=16))
    save_file(dict(fairseq_tensors(encoder)), tmp_path / "a.safetensors")
    assert read_checkpoint(tmp_path / "a.safetensors").architecture.heads == 2


def test_a_hubs_own_labels(tmp_path):
    encoder, head = random_encoder(ARCHITECTURES["eat"]), Head(16, 3)
    tensors = {name.removeprefix(PREFIX).replace("context_encoder.norm", "pre_norm"): tensor for name, tensor in fairseq_tensors(encoder).items()}
    tensors |= {"fc_norm.weight": head.norm.weight, "fc_norm.bias": head.norm.bias, "head.weight": head.linear.weight, "head.bias": head.linear.bias}
    save_file({name: tensor.detach().clone() for name, tensor in tensors.items() if "decoder" not in name}, tmp_path / "model.safetensors")
    for names, labels in (({"0": "dog", "2": "/m/09x0r"}, ["dog", "class 1", "Speech"]), ({"0": "LABEL_0", "1": "LABEL_1"}, ["class 0", "class 1", "class 2"])):
        (tmp_path / "config.json").write_text(json.dumps({"num_heads": 4, "id2label": names}), encoding="utf-8-sig")  # some editors put a mark first
        assert read_checkpoint(tmp_path).labels == labels


@pytest.mark.parametrize("odd", [float("inf"), float("nan"), 10**400, -1, "many", None])
def test_odd_numbers_in_settings_count_as_none(tmp_path, odd):
    encoder = random_encoder(ARCHITECTURES["cat"])
    cfg = {"model": {"num_heads": odd, "norm_eps": odd, "prediction_mode": None}, "task": {"target_length": odd}}
    checkpoint = read_checkpoint(fairseq_file(tmp_path / "a.pt", encoder, cfg=cfg))
    assert (checkpoint.architecture.heads, checkpoint.architecture.eps, checkpoint.frames, checkpoint.mode) == (1, 1e-6, 1024, "CLS_TOKEN")


@pytest.mark.parametrize("name", ["a.pt", "renamed.safetensors"])  # PyTorch from 2.13 on reads paths by their name
def test_half_precision_is_widened(tmp_path, name):
    encoder = random_encoder(ARCHITECTURES["cat"])
    torch.save({"model": {key: tensor.half() for key, tensor in fairseq_tensors(encoder).items()}, "cfg": {"model": {"num_heads": 4}}}, tmp_path / name)
    loaded = read_checkpoint(tmp_path / name).build()[0]
    assert loaded.blocks[0].qkv.weight.dtype == torch.float32
    torch.testing.assert_close(loaded.blocks[0].qkv.weight, encoder.blocks[0].qkv.weight, rtol=1e-3, atol=1e-4, check_dtype=True)
    assert read_checkpoint(tmp_path / name).build(torch.bfloat16)[0].positions.dtype == torch.bfloat16


def test_old_style_and_objects_of_training_runs(tmp_path):
    """Real runs leave NumPy scalars and argument namespaces in their files, which torch's safe loader refuses."""
    import argparse

    import numpy as np

    encoder = random_encoder(ARCHITECTURES["cat"])
    state = {
        "args": argparse.Namespace(lr=1.0),
        "extra_state": {"loss": np.float64(0.5), "array": np.arange(3)},
        "last": np.dtype("float32"),
        "counts": defaultdict(list),
    }
    for name, zipped in (("new.pt", True), ("old.pt", False)):
        fairseq_file(tmp_path / "plain.pt", encoder)
        content = torch.load(tmp_path / "plain.pt", weights_only=True)
        torch.save(content | state, tmp_path / name, _use_new_zipfile_serialization=zipped)
        with pytest.raises(pickle.UnpicklingError):
            torch.load(tmp_path / name, weights_only=True)
        checkpoint = read_checkpoint(tmp_path / name)
        assert checkpoint.architecture == ARCHITECTURES["cat"] and same_tokens(checkpoint.build()[0], encoder)


def test_the_demo_is_small_and_the_same_each_time(tmp_path):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, two, other = (write_demo_encoder(tmp_path / f"{i}.safetensors", seed) for i, seed in enumerate((0, 0, 1)))
    assert torch.equal(torch.get_rng_state(), before)
    assert one.read_bytes() == two.read_bytes() != other.read_bytes() and one.stat().st_size < 700_000
    assert len(read_checkpoint(one).labels) == 527


# What cannot


def break_tensors(tensors: dict, how: str) -> None:
    edits = {
        "missing": lambda: tensors.pop("blocks.1.attn.qkv.weight"),
        "missing stem": lambda: tensors.pop(f"{PREFIX}conv_blocks.0.1.attn.bias"),
        "missing token": lambda: tensors.pop(f"{PREFIX}extra_tokens"),
        "missing positions": lambda: tensors.pop(POSITIONS),
        "unknown": lambda: tensors.update({"blocks.1.gate": torch.zeros(4)}),
        "misshapen": lambda: tensors.update({"blocks.1.mlp.fc1.weight": torch.zeros(64, 17)}),
        "flat": lambda: tensors.update({f"{PREFIX}extra_tokens": torch.zeros(16)}),
        "NaN": lambda: tensors["blocks.0.norm1.weight"].fill_(float("nan")),
        "positions": lambda: tensors[POSITIONS].mul_(1.1),
        "far block": lambda: tensors.update({"blocks.99999999.norm1.weight": torch.zeros(16)}),
        "whole numbers": lambda: tensors.update({"blocks.0.norm1.weight": torch.ones(16, dtype=torch.int64)}),
        "8 bits": lambda: tensors.update({"blocks.0.norm1.weight": torch.ones(16).to(torch.float8_e4m3fn)}),
        "sparse": lambda: tensors.update({"blocks.0.mlp.fc1.weight": torch.eye(64, 16).to_sparse()}),
        "nowhere": lambda: tensors.update({POSITIONS: tensors[POSITIONS].to("meta")}),
        "branches": lambda: tensors.update({f"{PREFIX}stage_output_decode.0.weight": torch.zeros(16, 8, 3, 3)}),
    }
    edits[how]()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing", "1 missing .*blocks.1.attn.qkv.weight"),
        ("missing stem", "1 missing .*conv_blocks.0.1.attn.bias"),
        ("missing token", "extra_tokens is missing"),
        ("missing positions", "positions is missing"),
        ("unknown", "1 unknown .*blocks.1.gate"),
        ("misshapen", r"of another shape .*blocks.1.mlp.fc1.weight is \[64, 17\] instead of \[64, 16\]"),
        ("flat", "another number of dimensions"),
        ("NaN", "NaN or Inf .*blocks.0.norm1.weight"),
        ("positions", "position table"),
        ("far block", "only"),
        ("whole numbers", r"blocks.0.norm1.weight is int64 strided cpu \[16\] instead of \[16\]"),
        ("8 bits", "blocks.0.norm1.weight is float8_e4m3fn"),
        ("sparse", "blocks.0.mlp.fc1.weight is float32 sparse_coo"),
        ("nowhere", "positions is float32 strided meta"),
        ("branches", "a.pt: No encoder has these shapes: the branches have to reach"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_tensors_that_do_not_fit(tmp_path, how, words):
    tensors = fairseq_tensors(random_encoder(ARCHITECTURES["cat"]))
    break_tensors(tensors, how)
    torch.save({"model": tensors, "cfg": {"model": {"num_heads": 4}}}, tmp_path / "a.pt")
    with pytest.raises(CatError, match=words):
        read_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["encoder.layers.0.self_attn.relative_attention_bias.weight", "patch_embedding.weight"], "a BEATs checkpoint"),
        (["audio_branch.layers.0.blocks.0.norm1.weight"], "a CLAP checkpoint"),
        (["module.v.cls_token"], "an AST checkpoint"),
        (["decoder_pos_embed", "patch_embed.proj.weight"], "Audio-MAE"),
        (["w.lora_A.weight"], "a LoRA"),
        (["what.ever"], r"1 other tensors \(first: what.ever\)"),
        ([], "without tensors"),
    ],
)
def test_other_models_are_named(tmp_path, names, words):
    tensors = {name: torch.zeros(2) for name in names}
    torch.save({"cfg": {}, "model": tensors}, tmp_path / "a.pt")
    save_file(tensors, tmp_path / "a.safetensors")
    for file in ("a.pt", "a.safetensors"):
        with pytest.raises(CatError, match=words):
            read_checkpoint(tmp_path / file)


def test_a_model_for_pictures_is_named(tmp_path):
    tensors = fairseq_tensors(random_encoder(ARCHITECTURES["eat"]))
    tensors[f"{PREFIX}local_encoder.proj.weight"] = torch.zeros(16, 3, 16, 16)
    torch.save({"model": tensors}, tmp_path / "a.pt")
    with pytest.raises(CatError, match="pictures of 3 channels"):
        read_checkpoint(tmp_path / "a.pt")


def test_settings_that_cannot_be(tmp_path):
    encoder = random_encoder(ARCHITECTURES["cat"])
    with pytest.raises(CatError, match="norms before its blocks"):
        read_checkpoint(fairseq_file(tmp_path / "a.pt", encoder, cfg={"model": {"layer_norm_first": True}}))
    with pytest.raises(CatError, match="heads have to divide width"):
        read_checkpoint(fairseq_file(tmp_path / "b.pt", encoder, cfg={"model": {"num_heads": 5}}))
    with pytest.raises(CatError, match="HEAD_9"):
        read_checkpoint(fairseq_file(tmp_path / "c.pt", encoder, cfg={"model": {"num_heads": 4, "prediction_mode": "HEAD_9"}}))
    with pytest.raises(CatError, match="student or teacher"):
        read_checkpoint(fairseq_file(tmp_path / "d.pt", encoder), "uncle")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>not found</html>", "web page"),
        (b"\n<html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (b"RIFF\x00\x00\x00\x00WAVEfmt ", "a sound"),
        (b'{"a": 1}', "a JSON file"),
        (bytes(range(1, 60)), "no file of weights"),
        (b"\x80\x02}q\x00.", "cut off, damaged or no PyTorch file"),
        (b"PK\x03\x04" + bytes(60), "cut off, damaged"),
    ],
)
def test_files_that_are_no_checkpoint(tmp_path, content, words):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CatError, match=words):
        read_checkpoint(tmp_path / "a.pt")


def test_paths_that_lead_nowhere(tmp_path):
    for path in (tmp_path / "nothing.pt", tmp_path):
        with pytest.raises(CatError, match="is not there"):
            read_checkpoint(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_truncated_files(tmp_path, share):
    encoder = random_encoder(ARCHITECTURES["cat"])
    fairseq_file(tmp_path / "a.pt", encoder)
    write_checkpoint(tmp_path / "a.safetensors", Checkpoint(encoder.architecture, encoder.state_dict()))
    for file in (tmp_path / "a.pt", tmp_path / "a.safetensors"):
        whole = file.read_bytes()
        file.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(CatError, match="cut off|damaged"):
            read_checkpoint(file)


def test_a_zip_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CatError, match="damaged or no PyTorch file"):
        read_checkpoint(tmp_path / "a.pt")


class Bomb:
    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_with_code_never_runs(tmp_path, zipped):
    encoder = random_encoder(ARCHITECTURES["cat"])
    content = {"model": fairseq_tensors(encoder), "args": Bomb(tmp_path / "gone-off")}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "gone-off")))
    for file in ("a.pt", "b.pt"):
        with pytest.raises(CatError, match=r"would run code .*mkdir"):
            read_checkpoint(tmp_path / file)
    assert not (tmp_path / "gone-off").exists()


def test_contents_that_are_no_named_tensors(tmp_path):
    for i, content in enumerate((torch.zeros(3), [1, 2], {"model": 3}, {3: torch.zeros(2)}, {"model": {"a": "b"}})):
        torch.save(content, tmp_path / f"{i}.pt")
        with pytest.raises(CatError, match="is needed"):
            read_checkpoint(tmp_path / f"{i}.pt")


def test_a_changed_description_of_ours(tmp_path):
    encoder = random_encoder(ARCHITECTURES["cat"])
    tensors = to_released(encoder.state_dict(), encoder.architecture)
    right = {"architecture": encoder.architecture.as_json(), "normalisation": [1, 2]}
    wrong = ({"architecture": {"wings": 2}}, {"frames": 10**6}, {"frames": 100}, {"frames": "many"}, {"mode": "LOUD"}, {"labels": 3}, {"normalisation": [1]})
    wrong += ({"frames": 16.0}, {"normalisation": [0, 0]}, {"normalisation": [float("nan"), 1]}, {"head_eps": "x"}, {"single_label": "yes"}, {"origin": 5})
    shapes = ({"depth": 10**8}, {"depth": 2.0}, {"position_rows": 10**7}, {"position_rows": 2**19, "width": 2**16}, {"width": 10**9}, {"kernels": [4.0, 2, 2]})
    shapes += ({"bottleneck": -4}, {"eps": "x"}, {"eps": -1}, {"mlp_ratio": float("nan")}, {"mlp_ratio": 1e15}, {"heads": 1.6})
    wrong += tuple({"architecture": encoder.architecture.as_json() | shape} for shape in shapes)
    for text in ("no json", "{}", "[]", *(json.dumps(right | values) for values in wrong)):
        save_file(tensors, tmp_path / "a.safetensors", {"cat_encoder": text})
        with pytest.raises(CatError, match="convert it again"):
            read_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize("edit", ["classes", "width", "one norm", "no bias", "a number"])
def test_a_head_that_does_not_fit(tmp_path, edit):
    head = Head(16, 4).state_dict()
    tensors = {"head.weight": head["linear.weight"], "head.bias": head["linear.bias"], "fc_norm.weight": head["norm.weight"], "fc_norm.bias": head["norm.bias"]}
    edits = {
        "classes": lambda: tensors.update({"head.bias": torch.zeros(5)}),
        "width": lambda: tensors.update({"head.weight": torch.zeros(4, 17)}),
        "one norm": lambda: tensors.pop("fc_norm.bias"),
        "no bias": lambda: tensors.pop("head.bias"),
        "a number": lambda: tensors.update({"head.weight": torch.tensor(1.0)}),
    }
    edits[edit]()
    encoder = random_encoder(ARCHITECTURES["cat"])
    model = {f"model.{name}": tensor for name, tensor in fairseq_tensors(encoder).items()} | tensors
    torch.save({"model": model, "cfg": {"model": {"pretrained_model_args": {"model": {"num_heads": 4}}}}}, tmp_path / "a.pt")
    with pytest.raises(CatError, match="the head for [14] classes does not fit"):
        read_checkpoint(tmp_path / "a.pt")


def test_a_tagger_of_the_clap_kind(tmp_path):
    """Its alignment Linear is a part of the head, which reads the first patch token."""
    encoder, head = random_encoder(ARCHITECTURES["cat"]), Head(16, 5, mode="CLAP_TYPE2", aligned=8).requires_grad_(False)
    names = {"alignment": "model.clap_proj", "norm": "fc_norm", "linear": "head"}
    model = {f"model.{name}": tensor for name, tensor in fairseq_tensors(encoder).items()}
    model |= {name.replace(part, names[part]): tensor for name, tensor in head.state_dict().items() for part in names if name.startswith(part)}
    cfg = {"model": {"prediction_mode": "CLAP_TYPE2", "norm_eps": None, "pretrained_model_args": {"model": {"num_heads": 4}}}, "task": {"esc50_eval": True}}
    torch.save({"model": model, "cfg": cfg, "task_state": {"labels": {"dog": "0", "/m/09x0r": "2", 7: "4"}}}, tmp_path / "a.pt")
    tokens = torch.randn(2, 9, 16)
    for path in (tmp_path / "a.pt", convert(tmp_path / "a.pt", tmp_path / "b.safetensors")):
        checkpoint = read_checkpoint(path)
        assert checkpoint.labels == ["dog", "class 1", "Speech", "class 3", "7"] and checkpoint.single_label and checkpoint.normalisation == ESC50
        assert torch.equal(checkpoint.build()[1](tokens), head(tokens))


def test_nothing_half_written_stays(tmp_path, monkeypatch):
    encoder = random_encoder(ARCHITECTURES["cat"])
    checkpoint = Checkpoint(encoder.architecture, encoder.state_dict())

    def stop(tensors, file, metadata):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("cat_encoder.checkpoint.save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "a.safetensors", checkpoint)
    assert os.listdir(tmp_path) == []


def test_places_that_cannot_be_written(tmp_path):
    encoder = random_encoder(ARCHITECTURES["cat"])
    checkpoint = Checkpoint(encoder.architecture, encoder.state_dict())
    (tmp_path / "file").write_text("x", encoding="utf-8")
    for path, words in ((tmp_path / "file" / "a.safetensors", "cannot be written"), (tmp_path / "a.pt", "end in .safetensors")):
        with pytest.raises(CatError, match=words):
            write_checkpoint(path, checkpoint)
