"""The text encoder against the reference, its cache on disk, and wrong folders."""

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import ROOT, distance
from safetensors.torch import load_file, save_file

from mova import text as text_module
from mova import umt5 as umt5_module
from mova.errors import CheckpointError, InputError
from mova.reading import Reader
from mova.slabs import Link, Slab
from mova.text import clean_prompt, load_text_encoder
from mova.umt5 import EMBEDDING, choose_slabs, needed_bytes

GIB = 2**30
STATUS = Path("/proc/self/status")


@pytest.fixture
def encoder(tiny_mova):
    return load_text_encoder(tiny_mova)


@pytest.fixture
def folder(tiny_mova, tmp_path):
    """A copy of the checkpoint's text parts that a test may spoil."""
    root = tmp_path / "model"
    for part in ("tokenizer", "text_encoder"):
        (root / part).mkdir(parents=True)
        for file in (tiny_mova / part).iterdir():
            shutil.copyfile(file, root / part / file.name)
    (root / "model_index.json").write_text("{}")
    return root


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


# -- where the weights are ------------------------------------------------------------------------------------------


def plain_rows(folder, prompt, dtype):
    """The whole network of transformers with all its weights, as a program without this library would run it."""
    import transformers

    config = json.loads((folder / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    network = transformers.UMT5EncoderModel(transformers.UMT5Config(**config | {"attn_implementation": "eager"})).eval()
    weights = load_file(folder / "text_encoder" / "model.safetensors")
    network.load_state_dict(weights | dict.fromkeys(EMBEDDING, weights[EMBEDDING[0]]))
    network = network.to(dtype)
    if dtype == torch.float16:
        for i, block in enumerate(network.encoder.block):  # as transformers keeps it
            block.layer[-1].DenseReluDense.wo.weight.data = weights[f"encoder.block.{i}.layer.1.DenseReluDense.wo.weight"]
    with torch.no_grad():
        return network(input_ids=torch.tensor([load_text_encoder(folder).tokenize(prompt, 512)])).last_hidden_state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("residency", ["auto", "resident", "stream"])
def test_the_same_bits_wherever_the_weights_are(residency, dtype, tiny_mova):
    before, encoder = own_threads(), load_text_encoder(tiny_mova, dtype=dtype, residency=residency)
    for prompt in ("rain on a roof", "snow", "rain on a roof"):  # slabs are empty, then hold what the prompt before left there
        rows = plain_rows(tiny_mova, prompt, dtype)
        assert torch.equal(encoder.encode(prompt)[:, : rows.shape[1]], rows)
    layers, stored = len(encoder.model.layers), dtype == torch.float32
    assert len(encoder.model.slabs) == {"auto": 0 if stored else 2, "resident": 0 if stored else layers, "stream": 2}[residency]
    encoder.release()
    assert encoder.model is None and own_threads() <= before


def test_the_empty_prompt_is_the_same_in_rounding(tiny_mova, encoder):
    """One token: a matrix times a vector, which the CPU sums in an order that depends on where the matrix lies."""
    assert distance(load_text_encoder(tiny_mova, residency="stream").encode(""), encoder.encode("")) < 1e-6


def own_threads():
    return {thread for thread in threading.enumerate() if thread.name.startswith("mova")}


def test_through_a_ring_of_host_buffers(tiny_mova, encoder, monkeypatch):
    """What a GPU does, with the copies made on the CPU."""
    build = Link.__init__

    def with_ring(link, *args):
        build(link, *args)
        link.ring = link.make_ring()

    monkeypatch.setattr(Link, "__init__", with_ring)
    assert torch.equal(load_text_encoder(tiny_mova, residency="stream").encode(["rain", "snow"]), encoder.encode(["rain", "snow"]))


def test_a_slab_is_not_touched_before_its_layer_has_run(tiny_mova, encoder, monkeypatch):
    """Slabs are poisoned the moment they are given back; the norm behind the last block is computed before that, too."""
    give_back = Slab.give_back

    def poison(slab):
        slab.buffer.fill_(0xFF)  # NaN in every float format
        slab.holds = None
        give_back(slab)

    monkeypatch.setattr(Slab, "give_back", poison)
    assert torch.equal(load_text_encoder(tiny_mova, residency="stream").encode(["rain", "snow"]), encoder.encode(["rain", "snow"]))


def test_poison_would_be_noticed(tiny_mova, monkeypatch):
    fill = Link.fill

    def poisoned(link, slab, turn):
        fill(link, slab, turn)
        slab.buffer.fill_(0xFF)

    monkeypatch.setattr(Link, "fill", poisoned)
    with pytest.raises(CheckpointError, match="not numbers"):
        load_text_encoder(tiny_mova, residency="stream").encode("rain")


def test_a_cancel_while_a_layer_is_read_loses_no_slab(tiny_mova, encoder, monkeypatch):
    fill, reading, go_on = Link.fill, threading.Event(), threading.Event()

    def slow(link, slab, turn):
        if turn.key[1] == 1:
            reading.set()
            go_on.wait(5)
        fill(link, slab, turn)

    def cancel(done, total):
        assert reading.wait(5)
        threading.Timer(0.1, go_on.set).start()  # when the run is being left
        raise KeyboardInterrupt

    monkeypatch.setattr(Link, "fill", slow)
    streamed = load_text_encoder(tiny_mova, residency="stream")
    with pytest.raises(KeyboardInterrupt):
        streamed.encode("rain", on_layer=cancel)
    assert all(slab.returned.is_set() for slab in streamed.model.slabs)  # or the next prompt would wait for ever
    assert torch.equal(streamed.encode("rain"), encoder.encode("rain"))


@pytest.mark.parametrize("residency", ["auto", "stream"])
def test_cancel_between_layers_leaves_a_clean_encoder(residency, tiny_mova, encoder, tmp_path):
    streamed, seen = load_text_encoder(tiny_mova, residency=residency, cache_dir=tmp_path), []
    layers = streamed.config.num_layers
    for last in (*range(1, layers + 1), 1, layers):
        with pytest.raises(KeyboardInterrupt):
            streamed.encode("rain", on_layer=lambda done, total, last=last: interrupt(done == last and total == layers))
        assert "mova-feed" not in {thread.name for thread in own_threads()} and not list(tmp_path.iterdir())
        assert all(slab.returned.is_set() for slab in streamed.model.slabs)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in streamed.model.network.modules())
    rows = streamed.encode("rain", on_layer=lambda done, total: seen.append((done, total)))
    assert torch.equal(rows, encoder.encode("rain")) and seen == [(done, layers) for done in range(1, layers + 1)]
    streamed.encode("rain", on_layer=lambda done, total: interrupt(True))  # known: nothing is computed


def interrupt(now):
    if now:
        raise KeyboardInterrupt


def test_a_file_that_fails_under_way_is_one_error_and_the_next_prompt_is_right(folder, encoder, monkeypatch):
    streamed = load_text_encoder(folder, residency="stream")
    read, calls = Reader.read_bytes, []

    def faulty(reader, file, offset, view):
        calls.append(file)
        return read(reader, file.with_name("gone") if len(calls) == 12 else file, offset, view)

    monkeypatch.setattr(Reader, "read_bytes", faulty)
    with pytest.raises(CheckpointError, match="gone cannot be read"):
        streamed.encode("rain")
    assert torch.equal(streamed.encode("rain"), encoder.encode("rain"))


@pytest.mark.skipif(not STATUS.exists(), reason="the memory of a process is read from /proc")
def test_streaming_takes_the_memory_of_two_layers(folder):
    """float32 from bfloat16: 12 layers of 17 MB, a table of 123 MB."""
    sizes = dict(d_model=512, d_kv=64, d_ff=2048, num_layers=12, num_heads=8, vocab_size=60_000)
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | sizes))
    widen(folder / "text_encoder" / "model.safetensors", **sizes)
    peaks = {residency: peak_bytes(folder, residency) for residency in ("stream", "resident")}
    slab = 4 * (4 * 512 * 512 + 3 * 512 * 2048)
    # two slabs, and what the reading threads convert from: 2.1 to 3.8 slabs by Python and allocator, far from the twelve
    assert peaks["stream"] < 5 * slab and peaks["resident"] > 10 * slab


PEAK = """
import sys, torch
from pathlib import Path
from mova.text import load_text_encoder

def anonymous_bytes():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])

load_text_encoder(sys.argv[1], dtype=torch.float32, residency="stream").encode("rain")  # libraries are loaded, buffers of the readers made
encoder, before, during = load_text_encoder(sys.argv[1], dtype=torch.float32, residency=sys.argv[2]), anonymous_bytes(), []
encoder.encode("rain on a roof", on_layer=lambda *_: during.append(anonymous_bytes()))
print(max(during) - before)
"""


def peak_bytes(folder, residency):
    """Anonymous memory at the end of the layers, beyond what there was before; in a process whose heap no other test has grown."""
    done = subprocess.run([sys.executable, "-c", PEAK, str(folder), residency], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def widen(file, d_model, d_kv, d_ff, num_layers, num_heads, vocab_size):
    """Writes weights of other sizes."""
    inner = d_kv * num_heads
    shapes = {f"layer.0.SelfAttention.{name}.weight": (inner, d_model) for name in "qkv"} | {
        "layer.0.SelfAttention.o.weight": (d_model, inner),
        "layer.0.SelfAttention.relative_attention_bias.weight": (32, num_heads),
        "layer.0.layer_norm.weight": (d_model,),
        "layer.1.layer_norm.weight": (d_model,),
        "layer.1.DenseReluDense.wi_0.weight": (d_ff, d_model),
        "layer.1.DenseReluDense.wi_1.weight": (d_ff, d_model),
        "layer.1.DenseReluDense.wo.weight": (d_model, d_ff),
    }
    weights = {f"encoder.block.{i}.{name}": torch.full(shape, 0.01, dtype=torch.bfloat16) for i in range(num_layers) for name, shape in shapes.items()}
    weights |= {
        "encoder.final_layer_norm.weight": torch.ones(d_model, dtype=torch.bfloat16),
        "shared.weight": torch.ones(vocab_size, d_model, dtype=torch.bfloat16),
    }
    save_file(weights, file)


WHOLE = 24 * 385_900_000  # bytes of the released model's layers in bfloat16


@pytest.mark.parametrize(("free", "slabs"), [(6, 2), (8, 2), (10, 2), (12, 24), (24, 24)])
def test_auto_goes_by_what_is_free(free, slabs, monkeypatch):
    monkeypatch.setattr(umt5_module, "free_bytes", lambda device: free * GIB)
    count, why = choose_slabs("auto", torch.device("cuda"), True, WHOLE, 24)
    assert count == slabs and needed_bytes(WHOLE, count, 24) <= free * GIB and f"{free}.0 GiB free" in why


def test_decisions_elsewhere():
    cpu = torch.device("cpu")
    assert choose_slabs("auto", cpu, True, WHOLE, 24)[0] == choose_slabs("resident", cpu, True, WHOLE, 24)[0] == 0
    assert choose_slabs("auto", cpu, False, WHOLE, 24)[0] == choose_slabs("stream", torch.device("cuda"), True, WHOLE, 24)[0] == 2
    assert choose_slabs("auto", torch.device("mps"), True, WHOLE, 24)[0] == choose_slabs("resident", torch.device("cuda"), True, WHOLE, 24)[0] == 24


@pytest.mark.parametrize(("memory", "residency", "slabs"), [(8, "auto", 2), (24, "auto", 24), (24, "stream", 2), (8, "resident", 24)])
def test_room_asked_for(memory, residency, slabs, tiny_mova, monkeypatch):
    monkeypatch.setattr(text_module, "layer_bytes", lambda component, dtype: WHOLE)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, memory * GIB))
    encoder = load_text_encoder(tiny_mova, device="cuda", residency=residency)
    layers = encoder.config.num_layers
    assert encoder.bytes_needed(["rain"]) == needed_bytes(WHOLE, {2: 2, 24: layers}[slabs], layers)


def test_cached_prompts_need_no_room(tiny_mova, tmp_path):
    encoder = load_text_encoder(tiny_mova, cache_dir=tmp_path)
    encoder.encode(["rain", "snow"])
    assert encoder.bytes_needed(["snow", "rain"]) == 0 < encoder.bytes_needed(["rain", "hail"])
    assert encoder.bytes_needed(["rain"], max_length=9) > 0


def test_residency_names_its_modes(tiny_mova):
    with pytest.raises(InputError, match="elsewhere"):
        load_text_encoder(tiny_mova, residency="elsewhere")
