"""Streaming and residency: the same numbers wherever the weights live, and nothing left behind whatever goes wrong."""

import dataclasses
import gc
import math
import shutil
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from slab_stand_ins import poison_slabs, with_rings

import mova
from mova import CheckpointError, SamplingError, slabs
from mova import layers as layers_module
from mova.bridge import Bridge, BridgeConfig
from mova.checkpoint import TensorEntry
from mova.denoiser import Branch
from mova.layers import Block, row_slices
from mova.parts import is_text_key
from mova.reading import Reader
from mova.residency import MARGIN, SLABS, Job, Placement, Residency, Room, choose_placement, spread
from mova.slabs import Layout, Link
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
        denoiser.residency.settle = lambda *job: setattr(denoiser.residency, "placement", denoiser.residency.placement or placement)
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


@pytest.fixture
def ring(monkeypatch):
    """ring(piece=bytes) -> what a GPU does, with the copies made on the CPU."""

    return lambda piece: with_rings(monkeypatch, piece)


@pytest.mark.parametrize("piece", [slabs.PIECE_BYTES, 50_000, 4096])
def test_through_a_ring_of_host_buffers(streaming, tiny_mova, loop, expected, ring, piece):
    """Layers in one piece, in a few, and in pieces smaller than a tensor."""
    ring(piece)
    denoiser = streaming(tiny_mova, own=1)
    assert_equal(mova.sample(denoiser, **loop), expected)
    largest = max(denoiser.residency.sizes)
    visits = denoiser.report().copies / (4 * 4)
    assert visits <= 1 if piece > largest else largest / piece / 2 < visits < 3 * largest / piece + 1


def test_layers_converted_on_their_way_pass_in_pieces(tiny_mova, loop, ring, streaming):
    expected = mova.sample(mova.load_denoiser(tiny_mova, dtype=torch.bfloat16, residency="stream"), **loop)
    ring(4096)
    denoiser = mova.load_denoiser(tiny_mova, dtype=torch.bfloat16, residency="stream")
    assert_equal(mova.sample(denoiser, **loop), expected)
    denoiser.release()


@pytest.mark.parametrize("seed", range(5))
def test_pieces_cover_what_is_wanted_once(seed):
    generator = torch.Generator().manual_seed(seed)
    kinds = (torch.bfloat16, torch.float32, torch.float8_e4m3fn)
    shapes = [tuple(torch.randint(1, 40, (int(torch.randint(0, 4, (1,), generator=generator)),), generator=generator).tolist()) for _ in range(12)]
    layout = Layout((str(i), shape, kinds[i % 3]) for i, shape in enumerate(shapes))
    stored = {str(i): TensorEntry(Path("file"), shape, "F32", 1000 * i, 4 * torch.Size(shape).numel()) for i, shape in enumerate(shapes)}
    wanted = [(name, stored[name]) for name in layout.slots if torch.rand(1, generator=generator) < 0.7]
    most, found = 40 * 40 * 4 + 256, {name: [] for name, _ in wanted}
    for piece in layout.pieces(wanted, most):
        assert piece[-1].end - piece[0].start <= most
        for rows in piece:
            name = next(name for name, slot in layout.slots.items() if slot.start <= rows.start < slot.end)
            assert rows.end - rows.start == rows.entry.nbytes // 4 * layout.slots[name].dtype.itemsize
            found[name].append((rows.entry.offset, rows.entry.nbytes))
    for name, entry in wanted:
        ends = [entry.offset, *(offset + size for offset, size in found[name])]
        assert [offset for offset, _ in found[name]] == ends[:-1] and ends[-1] == entry.offset + entry.nbytes


@pytest.mark.parametrize(("allowed", "buffer"), [(2**31, 2**28), (2**29, 2**27), (2**22, 2**20), (0, 2**28)])
def test_what_can_be_pinned_decides_how_large_the_pieces_are(monkeypatch, caplog, allowed, buffer):
    empty = torch.empty

    def pinning(*size, pin_memory=False, **given):
        if pin_memory and size[0] > allowed:
            raise RuntimeError("cudaHostAlloc failed (as it were)")
        return empty(*size, **given)

    monkeypatch.setattr(slabs.torch, "empty", pinning)
    monkeypatch.setattr(torch.cuda, "Event", object)
    link = SimpleNamespace(stream="of a GPU", traffic=slabs.Traffic())
    link.layouts, link.cut_ring = {("high", 0): SimpleNamespace(nbytes=10**9)}, lambda block: Link.cut_ring(link, block)
    assert [host.memory.nbytes for host in Link.make_ring(link)] == [buffer] * slabs.HOST_BUFFERS
    assert ("could not be pinned" in caplog.text) == (allowed < 2**30)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["stored", "converted"])
@pytest.mark.parametrize("ring", [False, True])
def test_under_inference_mode_as_in_comfyui(tiny_mova, loop, monkeypatch, ring, dtype):
    """The host's threads are in inference mode, ours are not by themselves: they must be able to fill what was made there."""
    expected = mova.sample(mova.load_denoiser(tiny_mova, dtype=dtype, residency="stream"), **loop)
    if ring:
        with_rings(monkeypatch)
    with torch.inference_mode():
        assert_equal(mova.sample(mova.load_denoiser(tiny_mova, dtype=dtype, residency="stream"), **loop), expected)


def test_a_slab_is_not_touched_before_its_layer_has_run(streaming, tiny_mova, loop, expected, monkeypatch):
    """Slabs are poisoned the moment they are given back: a layer that were still computing, or a fill that were skipped, would show."""
    poison_slabs(monkeypatch)
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


def test_out_of_memory_keeps_fewer_layers_and_goes_on(tiny_mova, loop, monkeypatch, caplog):
    denoiser = mova.load_denoiser(tiny_mova, dtype=torch.bfloat16, residency="resident")
    expected = mova.sample(denoiser, **loop)
    forward, failures = type(denoiser.prepare(loop["video_noise"], loop["audio_noise"], loop["condition"], [], [], 24.0)).forward, []

    def fails_twice(run, *args):
        if len(failures) < 2:
            failures.append(1)
            raise torch.cuda.OutOfMemoryError("CUDA out of memory (as it were)")
        return forward(run, *args)

    monkeypatch.setattr("mova.denoiser.JointRun.forward", fails_twice)
    with caplog.at_level("WARNING", logger="mova"):
        assert_equal(mova.sample(denoiser, **loop), expected)
    assert [record.message.count("ran out of memory") for record in caplog.records if record.levelname == "WARNING"] == [1, 1]
    assert len(denoiser.residency.placement.own) == len(denoiser.residency.own) == 1 and "1 of 4 layers stay" in denoiser.report().why
    assert_equal(mova.sample(denoiser, **loop), expected)
    assert len(denoiser.residency.placement.own) == 1, "the next run does not try in vain again"
    monkeypatch.setattr("mova.denoiser.JointRun.forward", lambda *args: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError("always")))
    with pytest.raises(SamplingError, match="too little memory"):
        mova.sample(denoiser, **loop)


def stand_in(device, mode="auto", stored=True):
    """A residency of the released size as far as the decision looks at it."""
    return SimpleNamespace(
        device=torch.device(device),
        mode=mode,
        stored=stored,
        dtype=torch.bfloat16,
        changes={},
        parts=SimpleNamespace(count=40),
        sizes=[int(0.973e9)] * 40,
    )


@pytest.mark.parametrize(
    ("free", "mode", "own"), [(140, "resident", 40), (48, "resident", 40), (24, "stream", 17), (12, "stream", 4), (8, "stream", 0), (4, "stream", 0)]
)
def test_auto_goes_by_what_is_free(free, mode, own):
    placement = choose_placement(stand_in("cuda"), Job(int(3.6 * GIB)), Room(free * GIB))
    assert placement.mode == mode and len(placement.own) == pytest.approx(own, abs=2)
    needed = (len(placement.own) + placement.shared) * 0.973e9 + 3.6 * GIB + MARGIN
    assert needed <= free * GIB or not placement.own
    assert "GiB free" in placement.why


def test_decisions_elsewhere():
    idle = Job(0), Room(200 * GIB)
    assert choose_placement(stand_in("cpu"), *idle).mode == "views"
    assert choose_placement(stand_in("cpu", stored=False), *idle) == Placement("stream", "converted to torch.bfloat16 layer by layer", shared=SLABS)
    assert len(choose_placement(stand_in("cuda", "resident"), *idle).own) == 40
    assert choose_placement(stand_in("cuda", "stream"), *idle).own == frozenset()


# Seconds of compute per layer of the released size at 360p: spec/performance.md 1.6
@pytest.mark.parametrize(
    ("seconds", "ram", "shared"),
    [(5.5, 16, 2), (0.96, None, 2), (0.96, 64, 2), (0.96, 16, 2), (0.40, 64, 2), (0.40, 16, 3), (0.23, 64, 3), (0.06, 64, 3)],
    ids=["4060", "4090", "4090, all in RAM", "4090 from disk", "4090 in 8 bit", "the same from disk", "H200", "H200, short clip"],
)
@pytest.mark.parametrize("mode", ["stream", "auto"])
def test_depth_goes_by_how_long_a_layer_computes_and_travels(seconds, ram, shared, mode):
    room = Room(16 * GIB, None if ram is None else ram * GIB)
    placement = choose_placement(stand_in("cuda", mode), Job(4 * GIB, seconds), room)
    assert placement.shared == shared
    assert ("from disk" in placement.why) == (ram == 16)
    assert choose_placement(stand_in("cuda", mode), Job(4 * GIB, seconds), dataclasses.replace(room, free=6 * GIB)).shared == SLABS  # no room for more


def test_an_unknown_gpu_counts_as_the_fastest(tiny_mova, loop, monkeypatch):
    denoiser = mova.load_denoiser(tiny_mova)
    branches = [Branch(loop["context"]), Branch(loop["negative_context"])]
    run = denoiser.prepare(loop["video_noise"], loop["audio_noise"], loop["condition"], branches, [], 24.0)
    assert run.layer_seconds() == math.inf
    run.denoiser = SimpleNamespace(device=torch.device("cuda"), parts=denoiser.parts)
    found = {}
    for name in ("NVIDIA GeForce RTX 4090", "NVIDIA H200", "NVIDIA B300"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        run.device = torch.device("cuda")
        found[name[-5:]] = run.layer_seconds()
    assert found[" B300"] == found[" H200"] < found[" 4090"]


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
