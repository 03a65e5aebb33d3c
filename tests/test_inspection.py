"""What a folder or file is: told from headers, complete or not, damaged or not."""

import json
import pickle
import shutil

import pytest
import torch
from conftest import golden_path
from safetensors.torch import load_file, save_file

from mova.checkpoint import open_component
from mova.demo_model import write_demo_model
from mova.errors import CheckpointError
from mova.inspection import PARTS, describe, expected_shapes, inspect_path

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def checkpoint(tiny_mova, tmp_path):
    """A copy to damage."""
    return shutil.copytree(tiny_mova, tmp_path / "model")


def part(report, name):
    return next(one for one in report.parts if one.name == name)


def test_complete_checkpoint(tiny_mova):
    report = inspect_path(tiny_mova)
    assert report.complete and [one.name for one in report.parts] == [*PARTS, "scheduler", "tokenizer"]
    for name in PARTS:
        tensors = open_component(tiny_mova, name).tensors()
        found = part(report, name)
        assert found.problems == () and found.weights.tensors == found.expected == len(tensors)
        assert found.weights.parameters == sum(tensor.numel() for tensor in tensors.values())
        assert found.weights.size == sum(tensor.nbytes for tensor in tensors.values())
        assert found.weights.dtypes == ("F32",) and not found.released
    assert report.weights.size == sum(found.weights.size for found in report.parts)
    text = describe(tiny_mova)
    assert (
        "not (all) of the released size" in text
        and "123 of 123 tensors, 400,208 parameters" in text
        and "sample_rate 1500" in text
        and "NOT USABLE" not in text
    )


@pytest.mark.parametrize("fused", [True, False])
def test_released_counts(fused):
    """spec/mova.md 1.1 and 2.4, from the defaults of the configs."""
    counts = {
        name: expected_shapes(name, {}, () if fused else ("encoder.block.0.weight_g",))
        for name in ("video_dit", "audio_dit", "dual_tower_bridge", "audio_vae", "video_vae", "text_encoder")
    }
    assert {name: len(shapes) for name, shapes in counts.items()} == {
        "video_dit": 1095, "audio_dit": 825, "dual_tower_bridge": 720, "audio_vae": 224 if fused else 298, "video_vae": 194, "text_encoder": 242,
    }  # fmt: skip
    parameters = {name: sum(torch.Size(shape).numel() for shape in shapes.values()) for name, shapes in counts.items()}
    assert parameters["video_dit"] == 14_288_901_184 and parameters["audio_dit"] == 1_419_193_472 and parameters["dual_tower_bridge"] == 2_659_737_600
    assert parameters["text_encoder"] == 5_680_910_336 and parameters["video_vae"] == 126_892_531 and (not fused or parameters["audio_vae"] == 371_539_137)


def test_released_part_is_recognised(tmp_path):
    """Headers of the released size, without the gigabytes: a sparse file of the right length."""
    header, end = {}, 0
    for key, shape in expected_shapes("video_vae", {}).items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    (tmp_path / "video_vae").mkdir()
    (tmp_path / "video_vae" / "config.json").write_text('{"_class_name": "AutoencoderKLWan"}')
    with (tmp_path / "video_vae" / WEIGHTS).open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)
    report = inspect_path(tmp_path / "video_vae")
    assert report.complete and report.parts[0].released and report.weights.parameters == 126_892_531 and report.weights.dtypes == ("BF16",)


def test_missing_and_damaged_parts_are_told_at_once(checkpoint):
    shutil.rmtree(checkpoint / "audio_vae")
    (checkpoint / "video_vae" / WEIGHTS).unlink()
    (checkpoint / "text_encoder" / "config.json").write_text("{")
    (checkpoint / "tokenizer" / "tokenizer.json").write_text("<html>")
    (checkpoint / "scheduler" / "scheduler_config.json").write_text('{"shift": "five"}')
    content = (checkpoint / "video_dit_2" / WEIGHTS).read_bytes()
    (checkpoint / "video_dit_2" / WEIGHTS).write_bytes(content[: len(content) // 2])
    (checkpoint / "video_dit" / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1")
    tensors = load_file(checkpoint / "audio_dit" / WEIGHTS)
    tensors["extra"] = tensors.pop("patch_embedding.bias")
    tensors["head.head.bias"] = torch.zeros(7)
    save_file(tensors, checkpoint / "audio_dit" / WEIGHTS)
    report = inspect_path(checkpoint)
    sentences = {
        "audio_vae": "is missing",
        "video_vae": "no .safetensors file",
        "text_encoder": "not readable JSON",
        "tokenizer": "no readable tokenizer",
        "scheduler": "'five'",
        "video_dit_2": "truncated or damaged",
        "video_dit": "Git LFS pointer",
        "audio_dit": "1 missing: patch_embedding.bias",
    }
    assert not report.complete
    for name, sentence in sentences.items():
        assert sentence in " ".join(part(report, name).problems), name
    told = " ".join(part(report, "audio_dit").problems)
    assert "1 unexpected: extra" in told and "head.head.bias is [7], needed [16]" in told
    assert not part(report, "dual_tower_bridge").problems
    assert "Missing sub-folders: audio_vae." in str(report) and "not readable JSON" in str(report)


@pytest.mark.parametrize(
    ("name", "config", "sentence"),
    [
        ("video_dit", {"dim": "wide"}, "dim is 'wide'"),
        ("video_vae", {"base_dim": 8, "dim_mult": [1, 2]}, "describes no VAE"),
        ("audio_vae", {"continuous": False}, "codebooks"),
    ],
)
def test_configs_that_fit_nothing(checkpoint, name, config, sentence):
    file = checkpoint / name / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    assert sentence in " ".join(part(inspect_path(checkpoint), name).problems)


def test_sharded_checkpoint(checkpoint):
    folder = checkpoint / "video_dit"
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = {key: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(tensors)}
    for shard in set(names.values()):
        save_file({key: tensors[key] for key in tensors if names[key] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert inspect_path(checkpoint).complete
    assert "One shard of several" in describe(folder / "model-00001-of-00002.safetensors")
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors" in " ".join(part(inspect_path(checkpoint), "video_dit").problems)


@pytest.mark.parametrize("name", list(PARTS))
def test_single_part(tiny_mova, name):
    report = inspect_path(tiny_mova / name)
    assert report.complete and report.parts[0].name == name and report.weights.tensors == report.parts[0].expected


def test_demo_model_is_complete(tmp_path):
    report = inspect_path(write_demo_model(tmp_path / "demo"))
    assert report.complete and "mova-studio-demo" in str(report)


# ---------------------------------------------------------------- single files


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("video_dit/" + WEIGHTS, "image-to-video expert"),
        ("audio_dit/" + WEIGHTS, "MOVA audio_dit"),
        ("dual_tower_bridge/" + WEIGHTS, "MOVA dual_tower_bridge"),
        ("audio_vae/" + WEIGHTS, "MOVA audio_vae"),
        ("video_vae/" + WEIGHTS, "video VAE"),
        ("text_encoder/model.safetensors", "UMT5 text encoder"),
    ],
)
def test_weight_files(tiny_mova, name, what):
    report = inspect_path(tiny_mova / name)
    assert what in report.what and report.complete
    assert f"{report.weights.tensors:,} tensors, {report.weights.parameters:,} parameters" in str(report) and "metadata format: pt" in str(report)


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        (
            {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": (8, 64), "diffusion_model.blocks.0.self_attn.q.lora_B.weight": (64, 8)},
            "LoRA with 2 adapter tensors (LoRA), rank 8",
        ),
        ({"lora_unet_video_dit_blocks_0_q.lora_down.weight": (4, 64), "lora_unet_video_dit_blocks_0_q.lora_up.weight": (64, 4)}, "for video_dit"),
        ({"blocks.0.ffn.2.lora_A.weight": (8, 13824), "blocks.0.ffn.2.lora_B.weight": (5120, 8)}, "It fits the released MOVA."),
        ({"blocks.0.self_attn.q.lora_A.weight": (8, 3072), "blocks.0.self_attn.q.lora_B.weight": (3072, 8)}, "a LoRA for Wan 2.2 TI2V 5B"),
        ({"patch_embedding.weight": (32, 16, 1, 2, 2)}, "text-to-video"),
        ({"decoder.upsamples.0.residual.0.gamma": (8,)}, "original naming"),
        ({"condition_embedder.time_embedder.linear_1.weight": (8, 8)}, "diffusers naming"),
        ({"layer.weight": (8, 8)}, "does not use"),
    ],
)
def test_weight_files_of_others(tmp_path, keys, what):
    save_file({key: torch.zeros(shape, dtype=torch.bfloat16) for key, shape in keys.items()}, tmp_path / "file.safetensors")
    assert what in describe(tmp_path / "file.safetensors") and "BF16" in describe(tmp_path / "file.safetensors")


def test_reference_lora():
    report = inspect_path(golden_path("lora/low_resource_f32/lora_weights.mirror.safetensors"))
    assert "224 adapter tensors (LoRA), rank 4, for " in report.what
    assert all(name in report.what for name in ("video_dit", "video_dit_2", "audio_dit", "dual_tower_bridge"))


def test_reference_lora_as_its_trainer_wrote_it():
    for place in ("lora/low_resource_bf16", "lora/low_resource_bf16/lora_weights.pt"):
        report = inspect_path(golden_path(place))
        assert report.complete and "224 adapter tensors (LoRA), rank 4" in report.what and "80 x 80" in str(report)
    empty = inspect_path(golden_path("lora/accelerate_r16_nonfsdp_as_trainer_calls_it"))
    assert not empty.complete and "writes such empty files" in str(empty)


def test_a_pickle_never_runs(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was opened",))

    (tmp_path / "old.pt").write_bytes(pickle.dumps(Trap()))
    torch.save({"a": torch.zeros(1)}, tmp_path / "new.pt")
    torch.save({"a.lora_A": Trap()}, tmp_path / "trap.pt")
    for name in ("old.pt", "new.pt", "trap.pt"):
        report = inspect_path(tmp_path / name)
        assert "pickle" in report.what and not report.complete


def test_damaged_file_and_missing_path(tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    assert "truncated or damaged" in describe(tmp_path / "cut.safetensors")
    with pytest.raises(CheckpointError, match="does not exist"):
        describe(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="neither model_index.json nor config.json"):
        describe(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "StableDiffusion"}')
    with pytest.raises(CheckpointError, match="no part of MOVA"):
        describe(tmp_path)
