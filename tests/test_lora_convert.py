"""convert-lora and the command line: one clean file that does the same."""

import sys

import loras
import pytest
import torch
from conftest import distance, golden_path
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mova
from mova import LoraError
from mova.__main__ import main
from mova.inspection import released_shapes
from mova.lora import load_lora, parse_lora
from mova.lora.convert import convert_lora
from mova.lora.deltas import merge
from mova.media_reading import read_metadata

LAYER = "blocks.0.ffn.0"


@pytest.fixture(scope="module")
def shapes(tiny_mova):
    return mova.load_denoiser(tiny_mova).parts.shapes()


@pytest.fixture(scope="module")
def released():
    return released_shapes()


@pytest.fixture
def run(monkeypatch, capsys):
    """run("convert-lora", ...) -> (exit code, stdout, stderr)."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["mova", *map(str, words)])
        code = main()
        return code, *capsys.readouterr()

    return call


def totals(found):
    """What is added to every tensor, by part and name."""
    sums = {}
    for part, tensors in found.changes.items():
        for name, changes in tensors.items():
            sums[part, name] = torch.zeros(changes[0].delta.shape)
            merge(sums[part, name], [(change, change.delta.tensors) for change in changes])
    return sums


def assert_same(first, second):
    assert first.keys() == second.keys() and first
    for key, total in first.items():
        assert distance(second[key], total) < 1e-6, key


@pytest.mark.parametrize(
    "name", ["low_resource_f32", "low_resource_bf16", "accelerate_r16_fsdp_diffsynth", "accelerate_r16_nonfsdp_no_filter", "accelerate_small_fsdp_peft"]
)
def test_the_references_files(tmp_path, shapes, released, name):
    out = tmp_path / "clean.safetensors"
    convert_lora(golden_path(f"lora/{name}"), out, released)
    before, after = (load_lora(mova.Lora(path), shapes) for path in (golden_path(f"lora/{name}"), out))
    assert_same(totals(before), totals(after))
    assert before.report.towers == after.report.towers and "alpha" in after.report.scales[0] and "in the file" in after.report.scales[0]
    keys = load_file(out).keys()
    assert all(key.startswith("diffusion_model.") for key in keys) and "diffusion_model.video_dit_2.blocks.0.self_attn.q.lora_A.weight" in keys


def test_every_kind_and_the_metadata(tmp_path, shapes, released):
    def draw(*shape):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))

    tensors = {
        "lora_unet_blocks_0_ffn_0.lora_down.weight": draw(4, 80),
        "lora_unet_blocks_0_ffn_0.lora_up.weight": draw(176, 4),
        "lora_unet_blocks_0_ffn_0.alpha": torch.tensor(3.0),
        "lora_unet_blocks_1_attn1_to_q.lokr_w1": draw(8, 8),
        "lora_unet_blocks_1_attn1_to_q.lokr_w2_a": draw(10, 2),
        "lora_unet_blocks_1_attn1_to_q.lokr_w2_b": draw(2, 10),
        "lora_unet_blocks_1_attn1_to_q.alpha": torch.tensor(1.0),
        "blocks.2.norm3.diff": draw(80),
        "blocks.2.diff_m": draw(1, 6, 80),
        "head.head.lora_A.weight": draw(2, 80),
        "head.head.lora_B.weight": draw(64, 2),
        "head.head.lora_B.bias": draw(64),
    }
    source = tmp_path / "robot_high_noise.safetensors"
    save_file(tensors, source, metadata={"ss_tag_frequency": '{"a": {"r0bot": 3}}', "author": "me", "lora_adapter_metadata": '{"r": 2, "lora_alpha": 1}'})
    convert_lora(source, tmp_path / "robot.safetensors", released)
    before, after = (load_lora(mova.Lora(path), shapes) for path in (source, tmp_path / "robot.safetensors"))
    assert_same(totals(before), totals(after))
    assert list(after.report.towers) == ["high"] and "as its metadata says" in after.report.why and after.report.words == "r0bot"
    with safe_open(tmp_path / "robot.safetensors", "pt") as handle:
        metadata = handle.metadata()
        assert "diffusion_model.blocks.1.self_attn.q.lokr_w1" in handle.keys() and "diffusion_model.blocks.2.modulation.diff" in handle.keys()
    assert metadata["author"] == "me" and metadata["mova.source"] == source.name and metadata["format"] == "pt" and "lora_adapter_metadata" not in metadata


def test_a_lora_for_sound_stays_one(tmp_path, tiny_mova, shapes, released):
    source = loras.write_lora(tmp_path / "my_audio.safetensors", loras.random_factors(loras.linears_of(tiny_mova, "audio_dit")))
    convert_lora(source, tmp_path / "voice.safetensors", released)
    after = load_lora(mova.Lora(tmp_path / "voice.safetensors"), shapes)
    assert_same(totals(load_lora(mova.Lora(source), shapes)), totals(after))
    assert list(after.report.towers) == ["audio"]


def test_alpha_of_the_users(tmp_path, shapes, released):
    source = loras.write_lora(tmp_path / "a.safetensors", {LAYER: (torch.randn(4, 80), torch.randn(176, 4))})
    convert_lora(source, tmp_path / "b.safetensors", released, alpha=2.0)
    assert_same(totals(load_lora(mova.Lora(source, alpha=2.0), shapes)), totals(load_lora(mova.Lora(tmp_path / "b.safetensors"), shapes)))


def test_an_alpha_that_is_no_number(tmp_path, released):
    source = loras.write_lora(tmp_path / "a.safetensors", {LAYER: (torch.randn(4, 80), torch.randn(176, 4))})
    with pytest.raises(LoraError, match="alpha is nan"):
        convert_lora(source, tmp_path / "b.safetensors", released, alpha=float("nan"))


def test_a_dora_of_peft_has_the_scale_that_comfyui_reads(tmp_path, shapes, released):
    tensors = {f"{LAYER}.{ending}": tensor for ending, tensor in (("lora_A.weight", torch.randn(4, 80)), ("lora_B.weight", torch.randn(176, 4)))}
    save_file(tensors | {f"{LAYER}.lora_magnitude_vector": torch.rand(176)}, tmp_path / "a.safetensors")
    convert_lora(tmp_path / "a.safetensors", tmp_path / "b.safetensors", released)
    assert load_file(tmp_path / "b.safetensors")[f"diffusion_model.{LAYER}.dora_scale"].shape == (176, 1)
    assert_same(*(totals(load_lora(mova.Lora(tmp_path / name), shapes)) for name in ("a.safetensors", "b.safetensors")))


def test_both_experts_of_diffusers(tmp_path, shapes, released):
    pair = (torch.randn(4, 80), torch.randn(80, 4))
    source = loras.write_lora(tmp_path / "a.safetensors", {f"{name}.blocks.0.attn1.to_q": pair for name in ("transformer", "transformer_2")}, name="{}")
    convert_lora(source, tmp_path / "b.safetensors", released)
    assert {key.split(".")[1] for key in load_file(tmp_path / "b.safetensors")} == {"video_dit", "video_dit_2"}


def test_nothing_is_overwritten_or_left_half_written(tmp_path, released, monkeypatch):
    source = loras.write_lora(tmp_path / "a.safetensors", {LAYER: (torch.randn(4, 80), torch.randn(176, 4))})
    for out, said in ((source, "exists already"), (tmp_path / "b.pt", "must end in .safetensors"), (tmp_path / "no" / "b.safetensors", "cannot be written")):
        with pytest.raises(LoraError, match=said):
            convert_lora(source, out, released)

    def cut(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mova.lora.convert.save_file", cut)
    with pytest.raises(LoraError, match="No space left"):
        convert_lora(source, tmp_path / "b.safetensors", released)
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_others_are_refused(tmp_path, released):
    source = loras.write_lora(tmp_path / "sdxl.safetensors", {"down_blocks.1.attentions.0.to_q": (torch.randn(4, 80), torch.randn(80, 4))}, name="unet.{}")
    with pytest.raises(LoraError, match="Stable Diffusion"):
        convert_lora(source, tmp_path / "b.safetensors", released)


# ---------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("text", "path", "strength"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.5", "a.safetensors", 0.5),
        (r"C:\loras\a.pt", r"C:\loras\a.pt", 1.0),
        (r"C:\a.pt:-1", r"C:\a.pt", -1.0),
    ],
)
def test_a_lora_on_the_command_line(text, path, strength):
    assert parse_lora(text) == mova.Lora(path, video_high=strength, video_low=strength, audio=strength, bridge=strength)


def test_generate_with_loras(run, tiny_mova, tmp_path):
    files = [loras.write_full_lora(tmp_path / f"{i}.safetensors", loras.full_factors(tiny_mova, seed=i)) for i in range(2)]
    small = ("--height", 48, "--width", 64, "--num-frames", 5, "--steps", 2, "--device", "cpu", "--text-cache", tmp_path / "text")
    common = ("generate", "--model", tiny_mova, "--prompt", "rain", *small)
    code, _, stderr = run(*common, "--out", tmp_path / "clip.mp4", "--lora", files[0], "--lora", f"{files[1]}:0.5")
    assert code == 0, stderr
    assert [(lora["file"], lora["strength"]["high"]) for lora in read_metadata(tmp_path / "clip.mp4")["loras"]] == [
        ("0.safetensors", 1.0),
        ("1.safetensors", 0.5),
    ]
    code, _, stderr = run(*common, "--out", tmp_path / "no.mp4", "--lora", tmp_path / "nowhere.safetensors")
    assert code == 1 and "nowhere.safetensors is not there" in stderr and "Traceback" not in stderr


def test_convert_and_inspect(run, tmp_path):
    source = loras.write_lora(tmp_path / "a.safetensors", {LAYER: (torch.randn(4, 80), torch.randn(176, 4))})
    code, stdout, _ = run("convert-lora", source, tmp_path / "b.safetensors", "--alpha", 2)
    assert code == 0 and "3 tensors" in stdout and "from a.safetensors" in stdout
    assert run("convert-lora", source, tmp_path / "b.safetensors")[0] == 1
    code, stdout, _ = run("inspect", tmp_path / "b.safetensors")
    assert code == 0 and "a LoRA with 3 adapter tensors (LoRA), rank 4" in stdout and "13824 x 5120" in stdout
