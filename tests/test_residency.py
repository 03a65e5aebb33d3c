"""Streaming and residency: the same numbers wherever the weights live, and nothing left behind whatever goes wrong."""

import dataclasses
import gc
import shutil
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import mova
from mova import CheckpointError, SamplingError
from mova import layers as layers_module
from mova.bridge import Bridge, BridgeConfig
from mova.checkpoint import TensorEntry
from mova.layers import Block, row_slices
from mova.reading import Reader
from mova.residency import MARGIN, SLABS, Placement, Residency, choose_placement, is_text_key, spread
from mova.slabs import Link, Slab
from mova.towers import AudioTower, AudioTowerConfig, TowerConfig, VideoTower

GIB = 2**30


@pytest.fixture
def expected(tiny_mova, loop):
    return mova.sample(mova.load_denoiser(tiny_mova), **loop)


def assert_equal(pair, other):
    assert torch.equal(pair[0], other[0]) and torch.equal(pair[1], other[1])


@pytest.fixture
def streaming():
    """streaming(folder, own=2) -> a denoiser that streams, with two of its four layers kept."""
    made = []

    def build(folder, own=0):
        denoiser = mova.load_denoiser(folder, residency="stream")
        placement = Placement("stream", "for the test", spread(own, 4), SLABS if own < 4 else 0)
        denoiser.residency.settle = lambda activations: setattr(denoiser.residency, "placement", denoiser.residency.placement or placement)
        made.append(denoiser)
        return denoiser

    yield build
    for denoiser in made:
        denoiser.release()


def threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("mova")]


@pytest.mark.parametrize("own", range(5))
def test_any_number_of_resident_layers_gives_the_same_clip(streaming, tiny_mova, loop, expected, own):
    denoiser = streaming(tiny_mova, own)
    for _ in range(2):  # the second run meets slabs that hold something
        assert_equal(mova.sample(denoiser, **loop), expected)
    assert not denoiser.residency.empty
    denoiser.release()
    assert denoiser.residency.empty and not threads()
    assert all(
        parameter.is_meta for module in (*denoiser.parts.experts.values(), denoiser.parts.audio, denoiser.parts.bridge) for parameter in module.parameters()
    )
    assert_equal(mova.sample(denoiser, **loop), expected)


def test_through_a_ring_of_host_buffers(streaming, tiny_mova, loop, expected, monkeypatch):
    """What a GPU does, with the copies made on the CPU."""
    build = Link.__init__

    def with_ring(link, *args):
        build(link, *args)
        link.ring = link.make_ring()

    monkeypatch.setattr(Link, "__init__", with_ring)
    assert_equal(mova.sample(streaming(tiny_mova), **loop), expected)


@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_little_pinned_memory_is_enough(streaming, tiny_mova, loop, expected, monkeypatch, caplog, allowed):
    build, make = Link.__init__, Link.make_buffer

    def limited(link, pinned, made=[]):  # noqa: B006  the list counts over all calls
        made.append(pinned)
        if len(made) == allowed + 1:
            raise RuntimeError("cudaHostAlloc failed (as it were)")
        return make(link, pinned)

    def with_ring(link, *args):
        build(link, *args)
        link.ring = link.make_ring()

    monkeypatch.setattr(Link, "make_buffer", limited)
    monkeypatch.setattr(Link, "__init__", with_ring)
    denoiser = streaming(tiny_mova)
    with caplog.at_level("WARNING", logger="mova"):
        assert_equal(mova.sample(denoiser, **loop), expected)
    assert len(denoiser.residency.link.ring) == max(allowed, 1)
    assert f"Only {allowed} of 3" in caplog.text


def test_a_slab_is_not_touched_before_its_layer_has_run(streaming, tiny_mova, loop, expected, monkeypatch):
    """Slabs are poisoned the moment they are given back: a layer that were still computing, or a fill that were skipped, would show."""
    give_back = Slab.give_back

    def poison(slab):
        slab.buffer.fill_(0xFF)  # NaN in every float format
        slab.holds = None
        give_back(slab)

    monkeypatch.setattr(Slab, "give_back", poison)
    assert_equal(mova.sample(streaming(tiny_mova, own=1), **loop), expected)


def test_poison_would_be_noticed(streaming, tiny_mova, loop, monkeypatch):
    """The test above can fail: without the refill the run ends in NaN."""
    fill = Link.fill
    filled = []

    def once_poisoned(link, slab, turn):
        fill(link, slab, turn)
        filled.append(turn.key)
        if len(filled) == 3:
            slab.buffer.fill_(0xFF)

    monkeypatch.setattr(Link, "fill", once_poisoned)
    with pytest.raises(SamplingError, match="step 1 of 4"):
        mova.sample(streaming(tiny_mova), **loop)


def test_each_layer_travels_once_per_step_and_prompts_keys_once_per_expert(streaming, tiny_mova, loop):
    denoiser = streaming(tiny_mova)
    seen = []
    mova.sample(denoiser, **loop, on_layer=lambda done, total: None, on_step=lambda step: seen.append(denoiser.report().bytes_moved))
    slots = [item for i in range(4) for item in denoiser.residency.layouts["high", i].slots.items()]
    full, lean = (sum(torch.Size(slot.shape).numel() * 4 for name, slot in slots if keys or not is_text_key(name)) for keys in (True, False))
    shells = denoiser.report().bytes_moved - (2 * full + 2 * lean)
    assert lean < full and 0 < shells < full  # two experts: each step moves its layers once, the first of each also the prompt's keys


def test_full_size_bytes_per_step():
    """spec/performance.md 5.1: at most 36.3 GB a step in bf16, counted from the plan at the released sizes."""
    with torch.device("meta"):
        modules = {"high": VideoTower(TowerConfig()), "audio": AudioTower(AudioTowerConfig()), "bridge": Bridge(BridgeConfig())}
    nbytes = {
        (part, key): tensor.numel() * 2
        for part, module in modules.items()
        for key, tensor in module.state_dict().items()
        if key.startswith(("blocks.", "audio_to", "video_to"))
    }
    first, later = sum(nbytes.values()), sum(size for (_, key), size in nbytes.items() if not is_text_key("." + key))
    assert first < 36.3e9 and later < 32.0e9  # the prompt's keys are a tenth
    assert later / first < 0.9


@pytest.mark.parametrize("fault", ["error", "short", "replaced"])
def test_a_fault_while_reading_is_one_error_and_the_next_run_is_clean(streaming, tiny_mova, tmp_path, loop, expected, monkeypatch, fault):
    folder = tmp_path / "model"
    shutil.copytree(tiny_mova, folder, copy_function=shutil.copyfile)
    denoiser = streaming(folder)
    calls, read_bytes = [], Reader.read_bytes

    def faulty(reader, file, offset, view):
        calls.append(file)
        if len(calls) == 150:  # in the middle of a step
            if fault == "error":
                file = file.with_name("gone")
            elif fault == "short":
                offset = file.stat().st_size - len(view) + 1
            else:
                file.write_bytes(file.read_bytes() + b" ")
        return read_bytes(reader, file, offset, view)

    monkeypatch.setattr(Reader, "read_bytes", faulty)
    with pytest.raises(CheckpointError, match={"error": "cannot be read|gone", "short": "ended after", "replaced": "changed while"}[fault]):
        mova.sample(denoiser, **loop)
    assert not [name for name in threads() if name == "mova-feed"]
    monkeypatch.undo()
    shutil.copytree(tiny_mova, folder, copy_function=shutil.copyfile, dirs_exist_ok=True)
    denoiser.release()
    assert_equal(mova.sample(streaming(folder), **loop), expected)


def test_cancel_and_error_end_the_feeding_thread(streaming, tiny_mova, loop, expected):
    denoiser = streaming(tiny_mova)
    for number in range(10):
        with pytest.raises(KeyboardInterrupt):
            mova.sample(denoiser, **loop, on_layer=lambda done, total, number=number: interrupt(done == 1 + number % 4))
        assert "mova-feed" not in threads()
    assert_equal(mova.sample(denoiser, **loop), expected)


def live_bytes():
    """Of all tensors that anything still holds."""
    gc.collect()
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in gc.get_objects()
        if type(tensor) in (torch.Tensor, torch.nn.Parameter) and not tensor.is_meta
    }
    return sum(storages.values())


@pytest.mark.parametrize("ending", ["finished", "cancelled", "failed"])
def test_memory_returns_to_where_it_was(streaming, tiny_mova, loop, ending):
    denoiser = streaming(tiny_mova, own=1)

    broken = {"video_noise": loop["video_noise"] * torch.nan} if ending == "failed" else {}
    expectation = {"finished": nullcontext(), "cancelled": pytest.raises(KeyboardInterrupt), "failed": pytest.raises(SamplingError)}

    def run():
        with expectation[ending]:
            mova.sample(denoiser, **loop | broken, on_layer=lambda done, total: interrupt(ending == "cancelled" and done == 3))

    run()
    before = live_bytes()
    for _ in range(10):
        run()
    assert live_bytes() <= before + 4096
    denoiser.release()
    assert live_bytes() < before - denoiser.residency.traffic.slab_bytes / 2


def interrupt(now):
    if now:
        raise KeyboardInterrupt


def test_out_of_memory_keeps_fewer_layers_and_goes_on(streaming, tiny_mova, loop, expected, monkeypatch, caplog):
    denoiser = streaming(tiny_mova, own=4)
    forward, failures = type(denoiser.prepare(loop["video_noise"], loop["audio_noise"], loop["condition"], [], [], 24.0)).forward, []

    def fails_twice(run, *args):
        if len(failures) < 2:
            failures.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory (as it were)")
        return forward(run, *args)

    monkeypatch.setattr("mova.denoiser.JointRun.forward", fails_twice)
    with caplog.at_level("WARNING", logger="mova"):
        assert_equal(mova.sample(denoiser, **loop), expected)
    assert [record.message.count("ran out of memory") for record in caplog.records] == [1, 1]
    assert len(denoiser.residency.placement.own) == 1
    failures.clear()
    monkeypatch.setattr("mova.denoiser.JointRun.forward", lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError("always")))
    with pytest.raises(SamplingError, match="too little memory"):
        mova.sample(denoiser, **loop)


def stand_in(device, mode="auto", stored=True):
    """A residency of the released size as far as the decision looks at it."""
    return SimpleNamespace(
        device=torch.device(device),
        mode=mode,
        stored=stored,
        dtype=torch.bfloat16,
        parts=SimpleNamespace(count=40),
        sizes=[int(0.973e9)] * 40,
    )


@pytest.mark.parametrize(
    ("free", "mode", "own"), [(140, "resident", 40), (48, "resident", 40), (24, "stream", 17), (12, "stream", 4), (8, "stream", 0), (4, "stream", 0)]
)
def test_auto_goes_by_what_is_free(free, mode, own):
    placement = choose_placement(stand_in("cuda"), int(3.6 * GIB), free * GIB)
    assert placement.mode == mode and len(placement.own) == pytest.approx(own, abs=2)
    needed = (len(placement.own) + placement.shared) * 0.973e9 + 3.6 * GIB + MARGIN
    assert needed <= free * GIB or not placement.own
    assert "GiB free" in placement.why


def test_decisions_elsewhere():
    assert choose_placement(stand_in("cpu"), 0, 0).mode == "views"
    assert choose_placement(stand_in("cpu", stored=False), 0, 0) == Placement("stream", "converted to torch.bfloat16 layer by layer", shared=SLABS)
    assert len(choose_placement(stand_in("cuda", "resident"), 0, 0).own) == 40
    assert choose_placement(stand_in("cuda", "stream"), 0, 200 * GIB).own == frozenset()


@pytest.mark.parametrize(("count", "total"), [(0, 40), (1, 40), (13, 40), (39, 40), (40, 40)])
def test_kept_layers_are_spread(count, total):
    kept = sorted(spread(count, total))
    assert len(kept) == count
    gaps = [b - a for a, b in zip(kept, kept[1:], strict=False)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_reader_converts_and_reads_large_tensors_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("mova.reading.PIECE", 1000)
    values = torch.randn(50, 60)
    file = tmp_path / "weights"
    file.write_bytes(b"head" + values.numpy().tobytes())
    entry = TensorEntry(file, (50, 60), "F32", 4, values.nbytes)
    same, rounded = torch.empty(50, 60), torch.empty(50, 60, dtype=torch.bfloat16)
    reader = Reader()
    reader.read([(entry, same), (entry, rounded)])
    assert torch.equal(same, values) and torch.equal(rounded, values.bfloat16())
    with pytest.raises(CheckpointError, match="ended after"):
        reader.read([(dataclasses.replace(entry, offset=5), same)])
    reader.close()


# -- row slices -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 128, 4096, 4097, 43120, 176400])
def test_row_slices_cover_the_sequence(length):
    slices = row_slices(length)
    assert [row for part in slices for row in (part.start, part.stop)] == sorted(row for part in slices for row in (part.start, part.stop))
    assert slices[0].start == 0 and slices[-1].stop == length and all(a.stop == b.start for a, b in zip(slices, slices[1:], strict=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_change_nothing(tiny_mova, loop, dtype, monkeypatch):
    """Class A on the CPU: a sequence in slices gives the same bits; the linears of other shapes may round differently in float32."""
    denoiser = mova.load_denoiser(tiny_mova, dtype=dtype)
    whole = mova.sample(denoiser, **loop)
    monkeypatch.setattr(layers_module, "MIN_ROWS", 7)
    monkeypatch.setattr(layers_module, "ROW_ALIGNMENT", 1)
    sliced = mova.sample(denoiser, **loop)
    for a, b in zip(whole, sliced, strict=True):
        assert float((a - b).norm() / a.norm()) < (1e-5 if dtype == torch.float32 else 3e-2)


def test_gradients_flow_through_slices(monkeypatch):
    """Training needs the block as it is: nothing is overwritten where gradients are recorded."""
    monkeypatch.setattr(layers_module, "MIN_ROWS", 5)
    monkeypatch.setattr(layers_module, "ROW_ALIGNMENT", 1)
    torch.manual_seed(0)
    block = Block(24, 32, 2)
    torch.nn.init.normal_(block.modulation)
    x, text = torch.randn(1, 17, 24, requires_grad=True), block.cross_attn.keys(torch.randn(1, 3, 24))
    rope = torch.polar(torch.ones(17, 1, 6), torch.rand(17, 1, 6))
    block(x, text, torch.randn(1, 1, 6, 24), rope).square().sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all() and all(p.grad is not None for p in block.parameters())


def test_residency_names_its_modes(tiny_mova):
    with pytest.raises(mova.InputError, match="elsewhere"):
        mova.load_denoiser(tiny_mova, residency="elsewhere")
    denoiser = mova.load_denoiser(tiny_mova)
    assert isinstance(denoiser.residency, Residency) and denoiser.report().mode == "not decided"
