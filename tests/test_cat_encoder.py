"""The whole encoder and its heads against the reference: lengths, layers, EAT's stem, four kinds of classifier, and the real size."""

import zlib

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_cat_stem import off, recorded_mel

from cat_encoder.checkpoint import read_checkpoint
from cat_encoder.config import PRESETS, cat_architecture
from cat_encoder.errors import CatError
from cat_encoder.head import Head
from cat_encoder.names import POSITIONS, released_names, with_sides
from cat_encoder.trunk import AudioTransformer, position_table

TOLERANCE, FULL_SIZE_TOLERANCE = 2e-5, 1e-4  # MANIFEST: largest difference over max(1, largest value)


@pytest.fixture(scope="module")
def mel(golden_cat) -> torch.Tensor:
    return recorded_mel(golden_cat)


@pytest.fixture(scope="module")
def student(golden_cat) -> AudioTransformer:
    return read_checkpoint(golden_cat("checkpoint/cat_tiny_pretrain.pt")).build()[0].requires_grad_(False)


@pytest.fixture(scope="module")
def small() -> AudioTransformer:
    torch.manual_seed(0)
    return AudioTransformer(cat_architecture(channels=(8, 12), width=16, heads=2, depth=2, position_rows=8)).initialise().requires_grad_(False)


# Reference


def test_tokens_and_layers(golden_cat, mel, student):
    expected, encoded = golden_cat("encoder/tiny_expected.safetensors"), student(mel, layers=True)
    assert off(encoded.tokens, expected["as.x"]) < TOLERANCE
    assert off(encoded.tokens[:, 0], expected["as.cls"]) < TOLERANCE
    assert off(student.embed(mel)[0], expected["as.block0_input.s0"]) < TOLERANCE
    assert len(encoded.layer_results) == 3
    for i, t in enumerate(encoded.layer_results):
        assert off(t[0], expected[f"as.layer_results.{i}.s0"]) < TOLERANCE


@pytest.mark.parametrize("frames", [16, 128, 400, 512, 1000])
def test_lengths(golden_cat, mel, student, frames):
    expected = golden_cat("encoder/tiny_expected.safetensors")[f"len{frames}.x"]
    assert golden_cat("encoder/encoder.json")["lengths"][str(frames)] == len(expected)
    assert off(student(mel[:1, :, :frames]).tokens[0], expected) < TOLERANCE


def procedural(name: str, shape: list[int], seed: int) -> torch.Tensor:
    """The MANIFEST's recipe for weights that need no file."""
    z = np.random.RandomState((zlib.crc32(name.encode()) ^ seed) & 0xFFFFFFFF).standard_normal(shape)
    if not name.endswith("extra_tokens"):
        scale = 0.9 / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 0.1 if "norm" in name and name.endswith("weight") else 0.05
        z = z * scale + (1 if scale == 0.1 else 0)
    return torch.from_numpy(z.astype(np.float32))


@pytest.mark.parametrize("frames", [16, 128])
def test_lengths_with_weights_made_by_the_recipe(golden_cat, frames):
    """The recorded small student again, without its file: in every clone."""
    recorded = golden_cat("encoder/procedural.safetensors")
    architecture = cat_architecture(channels=(16, 24), width=48, heads=4, depth=3, position_rows=96)
    shapes = {name: with_sides(name, torch.empty(shape)).shape for name, (_, shape) in released_names(architecture).items()}
    tensors = {name: procedural(name, list(shape), seed=11) for name, shape in shapes.items()}
    encoder = AudioTransformer(architecture).requires_grad_(False)
    encoder.load_state_dict({ours: tensors[name].reshape(shape) for name, (ours, shape) in released_names(architecture).items()})
    assert off(encoder(recorded["mel"][None, None, :frames]).tokens[0], recorded[f"len{frames}.x"]) < TOLERANCE


def test_the_longest_input_and_one_more(golden_cat, mel, student):
    longest, both = golden_cat("encoder/encoder.json")["longest"], mel.view(1, 1, -1, 128)
    assert longest == student.architecture.max_frames
    assert off(student(both[:, :, :longest]).tokens[0], golden_cat("encoder/tiny_expected.safetensors")["longest1536.x"]) < TOLERANCE
    for frames in (longest + 1, longest + 16, 15):
        with pytest.raises(CatError, match=f"{frames} frames"):
            student(both[:, :, :frames])


def test_the_other_stem(golden_cat, mel, tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(dict(golden_cat("encoder/eat_student.safetensors")), file)
    (tmp_path / "config.json").write_text('{"num_heads": 4}', encoding="utf-8")  # no shape tells the heads
    encoder, _ = read_checkpoint(file).build()
    encoder.requires_grad_(False)
    assert encoder.architecture.stem == "patch"
    assert off(encoder(mel[:1]).tokens, golden_cat("encoder/eat_expected.safetensors")["as.x"]) < TOLERANCE


@pytest.mark.parametrize(("mode", "prefix"), [("CLS_TOKEN", "head527"), ("MEAN_POOLING", "head527"), ("LIN_SOFTMAX", "head527"), ("CLAP_TYPE2", "clap_head50")])
def test_classifiers(golden_cat, mel, mode, prefix):
    recorded, report = golden_cat("classifier/classifier.safetensors"), golden_cat("classifier/classifier.json")[mode]
    pretrained = golden_cat("checkpoint/cat_tiny_pretrain.model.safetensors")
    encoder, _ = read_checkpoint(golden_cat("checkpoint/cat_tiny_pretrain.pt")).build()
    weights = {"norm": f"{prefix}.fc_norm", "linear": f"{prefix}.head"} | ({"alignment": "clap_proj"} if mode.startswith("CLAP") else {})
    tensors = recorded | {name: tensor for name, tensor in pretrained.items() if name.startswith("clap_proj")}
    head = Head(48, len(tensors[f"{prefix}.head.bias"]), mode=mode, aligned=512 if mode.startswith("CLAP") else 0)
    head.load_state_dict({f"{ours}.{kind}": tensors[f"{theirs}.{kind}"] for ours, theirs in weights.items() for kind in ("weight", "bias")})
    with torch.no_grad():
        logits = head(encoder(mel).tokens)
    assert off(logits, recorded[f"{mode}.logits"]) < TOLERANCE
    best = logits.sigmoid().topk(5)
    assert best.indices.tolist() == report["top5_index"]
    torch.testing.assert_close(best.values, torch.tensor(report["top5_prob"]), rtol=0, atol=1e-5)


def test_the_real_size(golden_cat, tmp_path, mel):
    """Base: 768 channels, 12 heads, 11 blocks, 527 classes, as a fine-tuned file."""
    case, expected = golden_cat("fullsize/base.json"), golden_cat("fullsize/base_expected.safetensors")
    tensors = {name: procedural(name, shape, case["seed"]) for name, shape in case["keys"].items() if not name.endswith(POSITIONS)}
    for name, values in case["weight_probe"].items():
        assert tensors[name].flatten()[:3].tolist() == pytest.approx(values)
    tensors[f"model.{POSITIONS}"] = position_table(PRESETS["cat-base"])[None]
    torch.save({"cfg": None, "model": tensors}, tmp_path / "base.pt")
    checkpoint = read_checkpoint(tmp_path / "base.pt")
    assert checkpoint.architecture == PRESETS["cat-base"] and checkpoint.labels[0] == "Speech"
    encoder, head = checkpoint.build()
    del tensors, checkpoint
    with torch.no_grad():
        encoded, stem = encoder(mel[:1, :, : case["frames"]], layers=True), encoder.stem(mel[:1])
        logits = head(encoded.tokens)
    assert off(encoder.positions[expected["positions_index"]], expected["positions_rows"]) < 1e-5
    assert off(stem[0, expected["multires_index"]], expected["multires_tokens"]) < FULL_SIZE_TOLERANCE
    assert off(encoded.layer_results[0][0, 0], expected["layer0_ffn_cls"]) < FULL_SIZE_TOLERANCE
    assert off(encoded.tokens[0, expected["token_index"]], expected["tokens"]) < FULL_SIZE_TOLERANCE
    assert off(encoded.tokens[0, 1:].mean(0), expected["token_mean"]) < FULL_SIZE_TOLERANCE
    assert off(logits[0], expected["logits"]) < FULL_SIZE_TOLERANCE


# Invariants


def test_a_batch_is_its_clips(small):
    mel = torch.randn(3, 1, 64, 128)
    torch.testing.assert_close(small(mel).tokens, torch.cat([small(clip[None]).tokens for clip in mel]), rtol=0, atol=1e-5)


def test_a_layer_result_is_the_mlp_before_its_residual(small):
    x, block = torch.randn(2, 5, 16), small.blocks[0]
    out, t = block(x)
    torch.testing.assert_close(block.norm2(block.norm1(x + block.attend(x)) + t), out, rtol=0, atol=1e-6)


def test_keep_chooses_tokens_before_the_trunk(small):
    mel, keep = torch.randn(2, 1, 64, 128), torch.tensor([[5, 0, 31], [1, 2, 3]])
    whole, kept = small.embed(mel), small.embed(mel, keep=keep)
    assert torch.equal(kept, torch.stack([row[torch.cat([torch.tensor([0]), numbers + 1])] for row, numbers in zip(whole, keep, strict=True)]))
    assert small(mel, keep=torch.arange(32).expand(2, -1)).tokens.allclose(small(mel).tokens, atol=1e-6)


def test_masked_clones(small):
    """Two masks for each of two clips are four rows, the mask's number fastest."""
    mel, visible = torch.randn(2, 1, 64, 128), (torch.rand(4, 1, 4, 8) < 0.4).float()
    keep = torch.stack([mask.flatten().argsort(descending=True, stable=True)[:6] for mask in visible])
    rows = small(mel, visible, keep).tokens
    assert rows.shape == (4, 7, 16)
    for i in range(4):
        torch.testing.assert_close(rows[i : i + 1], small(mel[i // 2 : i // 2 + 1], visible[i : i + 1], keep[i : i + 1]).tokens, rtol=0, atol=1e-5)


def test_positions_are_the_files(golden_cat, student):
    table = golden_cat("checkpoint/cat_tiny_pretrain.model.safetensors")[POSITIONS]
    assert (table[0] - student.positions).abs().max() < 1e-6
    assert "positions" not in student.state_dict()


def test_bfloat16_is_close(small):
    mel = torch.randn(1, 1, 64, 128)
    exact, half = small(mel).tokens, AudioTransformer(small.architecture)
    half.load_state_dict(small.state_dict())
    result = half.bfloat16()(mel.bfloat16()).tokens
    assert result.dtype == torch.bfloat16
    assert (result.float() - exact).norm() / exact.norm() < 0.03


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    encoder = AudioTransformer(cat_architecture(channels=(8, 12), width=16, heads=2, depth=2, bottleneck=4)).initialise()
    encoder(torch.randn(1, 1, 32, 128)).tokens.square().sum().backward()
    assert [name for name, parameter in encoder.named_parameters() if parameter.grad is None or not parameter.grad.any()] == []


def test_drop_path_only_while_training(small):
    encoder, x = AudioTransformer(small.architecture), torch.randn(64, 5, 16)
    block = encoder.blocks[0]
    block.drop_path = 0.5
    block.eval()
    assert torch.equal(block(x)[0], block(x)[0])
    block.train()
    skipped = (block.skip(x) == 0).all((1, 2)).float().mean()
    assert 0.2 < skipped < 0.8 and set((block.skip(x) / x).unique().round(decimals=4).tolist()) == {0.0, 2.0}


def test_initial_values():
    torch.manual_seed(0)
    encoder = AudioTransformer(cat_architecture(channels=(64, 96), width=192, heads=4, depth=1)).initialise().requires_grad_(False)
    assert encoder.blocks[0].qkv.weight.std() == pytest.approx(0.02, rel=0.05) and not encoder.blocks[0].qkv.bias.any()
    assert encoder.stem.last.weight.std() == pytest.approx(0.02, rel=0.05)
    assert encoder.class_token.std() == pytest.approx(1, rel=0.2)
    assert encoder.stem.blocks[0][0].fc1.weight.abs().max() == pytest.approx(64**-0.5, rel=0.01)  # a convolution's own default
    patch = encoder.stem.stages[1].projection.weight
    assert patch.abs().max() == pytest.approx((6 / (96 + 64 * 4)) ** 0.5, rel=0.01)
