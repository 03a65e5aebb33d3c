"""Where the text encoder's weights are: the same bits from everywhere, and nothing left behind."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import ROOT, distance
from safetensors.torch import load_file, save_file
from slab_stand_ins import poison_slabs, with_rings

from mova import text as text_module
from mova import umt5 as umt5_module
from mova.errors import CheckpointError, InputError
from mova.reading import Reader
from mova.slabs import Link
from mova.text import load_text_encoder
from mova.umt5 import EMBEDDING, choose_slabs, needed_bytes

GIB = 2**30
STATUS = Path("/proc/self/status")


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
    with_rings(monkeypatch)
    assert torch.equal(load_text_encoder(tiny_mova, residency="stream").encode(["rain", "snow"]), encoder.encode(["rain", "snow"]))


def test_a_slab_is_not_touched_before_its_layer_has_run(tiny_mova, encoder, monkeypatch):
    """Slabs are poisoned the moment they are given back; the norm behind the last block is computed before that, too."""
    poison_slabs(monkeypatch)
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
