"""Opening a released folder: what is complete loads as views, what is not is named in one error."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import mova
from mova import CheckpointError
from mova.checkpoint import load_weights, open_component, read_config
from mova.towers import TowerConfig, VideoTower

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tiny_mova, tmp_path):
    """A copy of the small checkpoint to damage."""
    shutil.copytree(tiny_mova, tmp_path / "model", copy_function=shutil.copyfile)
    return tmp_path / "model"


def edit(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, file)


def shard(part, count):
    """Splits the weights of a component over `count` files with an index, as the release does."""
    tensors = load_file(part / WEIGHTS)
    names = [f"diffusion_pytorch_model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    where = {key: names[i % count] for i, key in enumerate(sorted(tensors))}
    for name in names:
        save_file({key: tensors[key].clone() for key in where if where[key] == name}, part / name)
    (part / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (part / WEIGHTS).unlink()
    return names


def test_weights_are_views_of_the_file(tiny_mova):
    component = open_component(tiny_mova, "video_dit")
    with torch.device("meta"):
        tower = VideoTower(read_config(TowerConfig, component.config, "video_dit"))
    load_weights(tower, component)
    assert torch.equal(tower.blocks[0].ffn[0].weight, load_file(component.folder / WEIGHTS)["blocks.0.ffn.0.weight"])
    assert not any(parameter.requires_grad for parameter in tower.parameters())


def test_sharded_equals_single_file(folder, tiny_mova):
    shard(folder / "video_dit", 3)
    whole, sharded = open_component(tiny_mova, "video_dit").tensors(), open_component(folder, "video_dit").tensors()
    assert whole.keys() == sharded.keys() and all(torch.equal(whole[key], sharded[key]) for key in whole)
    mova.load_denoiser(folder)


def test_missing_shard_is_named(folder):
    names = shard(folder / "video_dit", 3)
    (folder / "video_dit" / names[1]).unlink()
    with pytest.raises(CheckpointError, match=names[1]):
        mova.load_denoiser(folder)


def test_index_may_not_leave_its_folder(folder):
    shard(folder / "video_dit", 2)
    index = folder / "video_dit" / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": {"patch_embedding.weight": "../audio_dit/diffusion_pytorch_model.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside"):
        mova.load_denoiser(folder)


def test_everything_that_does_not_fit_is_in_one_error(folder):
    def change(tensors):
        del tensors["blocks.1.ffn.2.bias"]
        tensors["blocks.0.img_emb.weight"] = torch.zeros(3)
        tensors["blocks.2.self_attn.q.weight"] = torch.zeros(80, 81)

    edit(folder / "video_dit_2" / WEIGHTS, change)
    with pytest.raises(CheckpointError) as caught:
        mova.load_denoiser(folder)
    for part in (
        "video_dit_2",
        "1 missing: blocks.1.ffn.2.bias",
        "1 unexpected: blocks.0.img_emb.weight",
        "blocks.2.self_attn.q.weight is [80, 81], needed [80, 80]",
    ):
        assert part in str(caught.value)


IMPOSTORS = {
    "web page": b"<!DOCTYPE html><html><body>Access to model is restricted</body></html>",
    "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "pickle": pickle.dumps({"a": 1}, protocol=4),
    "truncated": b"\x10\x00\x00\x00\x00\x00\x00\x00{}",
    "0 bytes": b"",
}


@pytest.mark.parametrize("what", IMPOSTORS)
@pytest.mark.parametrize("part", ["video_dit", "audio_dit", "dual_tower_bridge"])
def test_files_that_are_no_weights(folder, part, what):
    (folder / part / WEIGHTS).write_bytes(IMPOSTORS[what])
    with pytest.raises(CheckpointError, match=what):
        mova.load_denoiser(folder)


@pytest.mark.parametrize("keep", [7, 5_000, 100_000])
def test_truncated_weights(folder, keep):
    file = folder / "video_dit" / WEIGHTS
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        mova.load_denoiser(folder)


@pytest.mark.parametrize(("part", "text", "match"), [
    ("video_dit", "{not json", "JSON"),
    ("video_dit", "[1, 2]", "list"),
    ("video_dit", json.dumps({"dim": "80"}), "dim is '80'"),
    ("audio_dit", json.dumps({"patch_size": 2}), "patch_size"),
    ("dual_tower_bridge", json.dumps({"interaction_strategy": "none"}), "interaction_strategy"),
])  # fmt: skip
def test_damaged_configs(folder, part, text, match):
    (folder / part / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=match):
        mova.load_denoiser(folder)


def test_wrong_folders(tmp_path, folder):
    for path, match in ((tmp_path / "nowhere", "not there"), (folder / "model_index.json", "a file"), (folder / "video_dit", "model_index.json")):
        with pytest.raises(CheckpointError, match=match):
            mova.load_denoiser(path)
    shutil.rmtree(folder / "audio_dit")
    with pytest.raises(CheckpointError, match="audio_dit"):
        mova.load_denoiser(folder)


def test_parts_of_different_checkpoints(folder):
    config = json.loads((folder / "dual_tower_bridge" / "config.json").read_text())
    (folder / "dual_tower_bridge" / "config.json").write_text(json.dumps(config | {"visual_layers": 5}))
    with pytest.raises(CheckpointError, match="not of one checkpoint"):
        mova.load_denoiser(folder)


def test_defaults_are_the_released_values():
    config = read_config(TowerConfig, {"_class_name": "WanModel"}, "video_dit")
    assert (config.dim, config.num_layers, config.ffn_dim, config.patch_size) == (5120, 40, 13824, (1, 2, 2))
