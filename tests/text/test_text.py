"""The text encoder against the reference, its cache on disk, and wrong folders."""

import json
import logging
import os
import sys

import pytest
import torch
from conftest import distance
from safetensors.torch import load_file, save_file

from mova import text as text_module
from mova.errors import CheckpointError, InputError
from mova.text import clean_prompt, load_text_encoder
from mova.umt5 import EMBEDDING


def forbid_weights(monkeypatch):
    def fail(*_):
        raise AssertionError("the weights were opened")

    monkeypatch.setattr(text_module, "UMT5", fail)


def test_cleans_as_the_reference(golden_config):
    config = golden_config("text")
    assert [clean_prompt(prompt) for prompt in config["prompts"]] == config["cleaned"]


@pytest.mark.parametrize("max_length", [24, 512])
def test_tokens_match_reference(max_length, golden, golden_config, encoder):
    tensors, prompts = golden("text"), golden_config("text")["cleaned"]
    for prompt, ids, mask in zip(prompts, tensors[f"len{max_length}.input_ids"], tensors[f"len{max_length}.attention_mask"], strict=True):
        tokens = encoder.tokenize(prompt, max_length)
        assert tokens == ids[: int(mask.sum())].tolist()
    assert encoder.count_tokens(prompts[1]) == 15 and encoder.count_tokens(prompts[-1]) == 2400


def test_embeddings_match_reference(golden, golden_config, encoder):
    tensors, prompts = golden("text"), golden_config("text")["prompts"]
    assert distance(encoder.encode(prompts, max_length=24), tensors["len24.embeds"]) <= 1e-5
    assert distance(encoder.encode(prompts[:3]), tensors["len512.embeds"]) <= 1e-5
    assert distance(encoder.encode(prompts[-1]), tensors["long_512.embeds"]) <= 1e-5


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 2e-2), (torch.float16, 5e-3)])
def test_lower_precision(dtype, limit, golden, golden_config, tiny_mova):
    encoded = load_text_encoder(tiny_mova, dtype=dtype).encode(golden_config("text")["prompts"], max_length=24)
    assert encoded.dtype == dtype and distance(encoded, golden("text")["len24.embeds"]) <= limit


def test_bf16_checkpoint_stays_bf16(folder, tiny_mova):
    file = folder / "text_encoder" / "model.safetensors"
    save_file({key: tensor.bfloat16() for key, tensor in load_file(file).items()}, file)
    stored = load_text_encoder(folder).encode("rain")
    assert torch.equal(stored, load_text_encoder(tiny_mova, dtype=torch.bfloat16).encode("rain"))


def test_padding_is_zero_and_prompts_do_not_see_each_other(encoder):
    prompts = ["", "rain", "a much longer prompt about rain on a roof"]
    together = encoder.encode(prompts, max_length=40)
    for prompt, rows in zip(prompts, together, strict=True):
        count = encoder.count_tokens(prompt)
        assert rows[:count].abs().sum(dim=1).min() > 0 and torch.count_nonzero(rows[count:]) == 0
        assert torch.equal(encoder.encode(prompt, max_length=40)[0], rows)
    assert encoder.count_tokens("") == 1


@pytest.mark.parametrize("prompt", ["👩‍👩‍👧 🎬 clap", "\ud83d half a pair", "\x00\x07", "</s><pad>", "word " * 10_000])
def test_odd_prompts(prompt, encoder):
    encoded = encoder.encode([prompt], max_length=64)
    assert encoded.shape == (1, 64, encoder.text_dim) and torch.isfinite(encoded).all()


def test_a_cut_prompt_is_said_once(encoder, caplog):
    with caplog.at_level(logging.WARNING, "mova"):
        encoder.encode("word " * 10_000, max_length=32)
    assert len(caplog.records) == 1 and "30001 tokens" in caplog.text and "reads 32" in caplog.text


@pytest.mark.parametrize("prompts", [None, b"rain", 3, [], ["rain", None], {"a": 1}])
def test_what_is_no_prompt(prompts, encoder):
    with pytest.raises(InputError, match="prompt must be text"):
        encoder.encode(prompts)


@pytest.mark.parametrize("max_length", [0, -1, 1.5, True])
def test_what_is_no_length(max_length, encoder):
    with pytest.raises(InputError, match="max_length"):
        encoder.encode("rain", max_length=max_length)


@pytest.mark.parametrize("names", [EMBEDDING[:1], EMBEDDING[1:], EMBEDDING])
def test_the_embedding_may_have_either_name_or_both(names, folder, encoder):
    file = folder / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    embedding = weights.pop(EMBEDDING[0])
    save_file(weights | {name: embedding.clone() for name in names}, file)
    assert torch.equal(load_text_encoder(folder).encode("rain"), encoder.encode("rain"))


def test_only_the_embedding_is_not_placed(encoder):
    """Its rows come from the mapped file; the table itself is nowhere."""
    encoder.encode("rain")
    tensors = (*encoder.model.network.named_parameters(), *encoder.model.network.named_buffers())
    assert {name for name, tensor in tensors if tensor.is_meta} <= set(EMBEDDING)


def test_release_and_move_drop_the_weights(encoder):
    before = encoder.encode("rain")
    encoder.release()
    assert encoder.model is None and torch.equal(encoder.encode("rain"), before)
    assert encoder.to("cpu").model is not None  # already there
    assert encoder.to("meta").model is None and encoder.device.type == "meta"


def test_second_run_reads_the_cache_not_the_weights(tiny_mova, tmp_path, monkeypatch):
    first = load_text_encoder(tiny_mova, cache_dir=tmp_path / "cache").encode(["rain", "  rain ", "snow"], max_length=40)
    assert len(list((tmp_path / "cache").iterdir())) == 2  # the same prompt after cleaning, one file
    forbid_weights(monkeypatch)
    again = load_text_encoder(tiny_mova, cache_dir=tmp_path / "cache")
    assert torch.equal(again.encode(["rain", "rain", "snow"], max_length=40), first)
    for changed in (
        lambda: again.encode("rain", max_length=41),
        lambda: load_text_encoder(tiny_mova, dtype=torch.bfloat16, cache_dir=tmp_path / "cache").encode("rain", max_length=40),
    ):
        with pytest.raises(AssertionError, match="weights were opened"):
            changed()


@pytest.mark.parametrize("changed", ["text_encoder/model.safetensors", "tokenizer/tokenizer.json", "text_encoder/config.json"])
def test_another_checkpoint_does_not_hit_the_cache(changed, folder, tmp_path, monkeypatch):
    load_text_encoder(folder, cache_dir=tmp_path / "cache").encode("rain")
    if changed.endswith("model.safetensors"):
        os.utime(folder / changed, ns=(1, 1))
    else:
        values = json.loads((folder / changed).read_text(encoding="utf-8"))
        (folder / changed).write_text(json.dumps(values | {"version": "1.0"}, indent=1), encoding="utf-8")
    forbid_weights(monkeypatch)
    with pytest.raises(AssertionError, match="weights were opened"):
        load_text_encoder(folder, cache_dir=tmp_path / "cache").encode("rain")


@pytest.mark.parametrize(
    "damage",
    [lambda file: file.write_bytes(file.read_bytes()[:-7]), lambda file: file.write_bytes(b""), lambda file: save_file({"rows": torch.zeros(2, 3)}, file)],
)
def test_damaged_cache_file_is_replaced(damage, tiny_mova, tmp_path, monkeypatch, caplog):
    encoded = load_text_encoder(tiny_mova, cache_dir=tmp_path).encode("rain")
    (file,) = tmp_path.iterdir()
    damage(file)
    with caplog.at_level(logging.WARNING, "mova"):
        assert torch.equal(load_text_encoder(tiny_mova, cache_dir=tmp_path).encode("rain"), encoded)
    assert "encoded again" in caplog.text and list(tmp_path.iterdir()) == [file]
    forbid_weights(monkeypatch)
    assert torch.equal(load_text_encoder(tiny_mova, cache_dir=tmp_path).encode("rain"), encoded)


def test_cache_folder_that_cannot_be_written_costs_a_log_line(tiny_mova, tmp_path, caplog, encoder):
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING, "mova"):
        encoded = load_text_encoder(tiny_mova, cache_dir=tmp_path / "file").encode("rain")
    assert torch.equal(encoded, encoder.encode("rain")) and "not kept" in caplog.text


def test_interrupted_write_leaves_nothing(tiny_mova, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(text_module.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        load_text_encoder(tiny_mova, cache_dir=tmp_path).encode("rain")
    assert not list(tmp_path.iterdir())


def test_cache_keeps_the_prompts_used_last(tiny_mova, tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "CACHED_PROMPTS", 3)
    (tmp_path / "mine.safetensors").write_text("not the cache's own")
    encoder = load_text_encoder(tiny_mova, cache_dir=tmp_path)
    for number in range(4):
        encoder.encode(f"prompt {number}")
        for file in tmp_path.iterdir():
            os.utime(file, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns - 10**10))  # ten seconds pass
        encoder.encode("prompt 0")
    assert len(list(tmp_path.iterdir())) == 4
    forbid_weights(monkeypatch)
    encoder = load_text_encoder(tiny_mova, cache_dir=tmp_path)
    encoder.encode(["prompt 0", "prompt 2", "prompt 3"])
    with pytest.raises(AssertionError):
        encoder.encode("prompt 1")


def test_loading_opens_no_weights(folder):
    (folder / "text_encoder" / "model.safetensors").write_bytes(b"<html>log in</html>")
    encoder = load_text_encoder(folder)
    assert encoder.count_tokens("rain") > 1
    with pytest.raises(CheckpointError, match="web page"):
        encoder.encode("rain")


@pytest.mark.parametrize("missing", ["tokenizer/tokenizer.json", "text_encoder/config.json", "text_encoder/model.safetensors"])
def test_missing_files_are_said_at_once(missing, folder):
    (folder / missing).unlink()
    with pytest.raises(CheckpointError, match="download"):
        load_text_encoder(folder)


def test_weights_that_do_not_fit(folder):
    file = folder / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    del weights["encoder.final_layer_norm.weight"], weights["shared.weight"]
    save_file(weights, file)
    with pytest.raises(CheckpointError, match="2 missing: encoder.final_layer_norm.weight, shared.weight"):
        load_text_encoder(folder).encode("rain")


def test_values_that_are_not_numbers(folder):
    file = folder / "text_encoder" / "model.safetensors"
    save_file(load_file(file) | {"encoder.final_layer_norm.weight": torch.full((32,), float("nan"))}, file)
    with pytest.raises(CheckpointError, match="not numbers"):
        load_text_encoder(folder).encode("rain")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"gated-gelu"', '"relu"', "no UMT5"),
        ('"d_model": 32', '"d_model": 0', "no UMT5"),
        ('"vocab_size": 275', '"vocab_size": 99', "different models"),
        ('"d_ff": 64', '"d_ff": 65', "misshapen"),
    ],
)
def test_config_that_does_not_fit(old, new, message, folder):
    file = folder / "text_encoder" / "config.json"
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(CheckpointError, match=message):
        load_text_encoder(folder).encode("rain")


def test_damaged_tokenizer(folder):
    (folder / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="no readable tokenizer"):
        load_text_encoder(folder).encode("rain")


def test_unsupported_dtype(tiny_mova):
    with pytest.raises(InputError, match="bfloat16"):
        load_text_encoder(tiny_mova, dtype=torch.int8)


def test_without_ftfy(monkeypatch, encoder):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(InputError, match="pip install ftfy"):
        encoder.encode("rain")
