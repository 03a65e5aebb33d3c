"""8-bit weights: what is stored, the same numbers in every residency, and a folder that is whole or not there."""

import errno
import json
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from slab_stand_ins import with_rings
from torch import nn

import mova
from mova import CheckpointError, InputError, fp8
from mova import quantize as module
from mova.__main__ import main
from mova.bridge import Bridge, BridgeConfig
from mova.checkpoint import open_component
from mova.demo_model import CONFIGS, MODEL_INDEX, SCHEDULER, random_tensor, write_json
from mova.denoiser import FOLDERS
from mova.fp8 import FP8, LARGEST, QUANTIZATION, QuantizedLinear, fixed_dtypes, follow_config, linears_to_quantize, quantize_rows
from mova.inspection import expected_shapes, inspect_path
from mova.quantize import measure_error, quantize
from mova.residency import SLABS, Job, Placement, Room, choose_placement, spread
from mova.towers import AudioTower, AudioTowerConfig, TowerConfig, VideoTower

WEIGHTS = "diffusion_pytorch_model.safetensors"
PARTS = tuple(FOLDERS.values())


@pytest.fixture(scope="module")
def small(tiny_mova, tmp_path_factory):
    """The small checkpoint, quantized."""
    folder = tmp_path_factory.mktemp("quantized") / "model"
    quantize(tiny_mova, folder)
    return folder


@pytest.fixture
def copied(tiny_mova, tmp_path):
    """A copy to damage."""
    return shutil.copytree(tiny_mova, tmp_path / "original")


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# -- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_there_and_back(dtype):
    torch.manual_seed(0)
    weight = (torch.randn(40, 64) * torch.logspace(-6, 2, 40)[:, None]).to(dtype)
    weight[3], weight[4] = 0, 0
    weight[4, 7] = 1e-30  # (0 in float16)
    numbers, scale = quantize_rows(weight)
    assert (numbers.dtype, scale.dtype, scale.shape) == (FP8, torch.float32, (40,)) and torch.isfinite(scale).all()
    back, peak = numbers.float() * scale[:, None], weight.float().abs().amax(dim=1)
    assert torch.isfinite(back).all() and not back[3].any()
    error = (back - weight.float()).abs()
    assert (error.amax(dim=1) <= peak * 16.01 / LARGEST).all()  # half a step between the two largest numbers
    assert (error <= weight.float().abs() * 2**-4 + scale[:, None] * 2**-10 * 1.01).all()  # half a step anywhere
    assert torch.allclose(back.abs().amax(dim=1), peak, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_is_that_of_the_dequantized_weight(dtype):
    torch.manual_seed(0)
    linear = random_linear(32, 48, dtype)
    weight = (linear.weight.float() * linear.weight_scale[:, None]).to(dtype)
    x = torch.randn(2, 5, 32, dtype=dtype)
    assert torch.equal(linear(x), F.linear(x, weight, linear.bias))


def random_linear(inside, outside, dtype):
    plain = nn.Linear(inside, outside, dtype=dtype).requires_grad_(False)
    linear = QuantizedLinear(plain)
    linear.weight.data, linear.weight_scale.data = quantize_rows(plain.weight)
    return linear


def multiply_rows(a, b, scale_a, scale_b, bias=None, out_dtype=None):
    """What the kernel is documented to do, and what it insists on."""
    assert a.dtype == b.dtype == FP8 and a.is_contiguous() and b.t().is_contiguous()
    assert scale_a.shape == (len(a), 1) and scale_b.shape == (1, b.shape[1]) and scale_a.dtype == scale_b.dtype == torch.float32
    assert scale_a.is_contiguous() and scale_b.is_contiguous() and out_dtype == bias.dtype == torch.bfloat16
    return ((a.float() * scale_a) @ (b.float() * scale_b) + bias.float()).to(out_dtype)


def test_product_in_8_bits(monkeypatch):
    """With the kernel as documented: rows of any size fit, and the error is that of two roundings."""
    monkeypatch.setattr(fp8, "multiplies_rows", lambda device: True)
    monkeypatch.setattr(torch, "_scaled_mm", multiply_rows)
    torch.manual_seed(0)
    linear = random_linear(256, 48, torch.bfloat16)
    x = torch.randn(2, 9, 256, dtype=torch.bfloat16) * torch.logspace(-5, 4, 9)[:, None].bfloat16()
    x[1, 3] = 0
    expected, found = F.linear(x, linear.dequantized(x.dtype)).float(), linear(x).float() - linear.bias.float()
    rows = [(e, f) for e, f in zip(expected.flatten(0, 1), found.flatten(0, 1), strict=True) if e.norm() > 10]
    assert len(rows) > 6 and all(0 < (f - e).norm() / e.norm() < 0.05 for e, f in rows)
    assert torch.isfinite(found).all() and torch.equal(linear(x)[1, 3], linear.bias)
    for inside, outside, dtype in ((256, 48, torch.float32), (250, 48, torch.bfloat16), (256, 50, torch.bfloat16)):  # float32 was asked for; no such kernel
        linear, x = random_linear(inside, outside, dtype), torch.randn(3, inside, dtype=dtype)
        assert torch.equal(linear(x), F.linear(x, linear.dequantized(dtype), linear.bias))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rows", [1, 15, 257, 4096])
def test_product_on_the_gpu(rows):
    torch.manual_seed(0)
    linear = random_linear(256, 512, torch.bfloat16).cuda()
    x = torch.randn(2, rows, 256, dtype=torch.bfloat16, device="cuda")
    expected = F.linear(x, linear.dequantized(x.dtype), linear.bias).float()
    assert (linear(x).float() - expected).norm() / expected.norm() < 0.05


# -- what is stored -------------------------------------------------------------------------------------------------


def test_released_size():
    with torch.device("meta"):
        parts = {"video": VideoTower(TowerConfig()), "audio": AudioTower(AudioTowerConfig()), "bridge": Bridge(BridgeConfig())}
    counts = {name: len(linears_to_quantize(part)) for name, part in parts.items()}
    assert counts == {"video": 38 * 10, "audio": 28 * 10, "bridge": 30 * 2 * 3}
    plain = sum(tensor.numel() * 2 for part in parts.values() for tensor in part.parameters())
    for part in parts.values():
        follow_config(part, {"quantization": QUANTIZATION}, "")
    quantized = sum(
        tensor.numel() * fixed_dtypes(part).get(key, torch.bfloat16).itemsize for part in parts.values() for key, tensor in part.state_dict().items()
    )
    assert 36e9 < plain < 37e9 and quantized / plain < 0.57


def test_every_tensor(tiny_mova, small):
    for name in PARTS:
        original, stored = (load_file(folder / name / WEIGHTS) for folder in (tiny_mova, small))
        scales = {key for key in stored if key.endswith("_scale")}
        assert set(stored) - scales == set(original) and scales
        for key, tensor in original.items():
            if key + "_scale" in scales:
                error = (stored[key].float() * stored[key + "_scale"][:, None] - tensor).abs().amax(dim=1)
                assert stored[key].dtype == FP8 and (error <= tensor.abs().amax(dim=1) * 2**-4).all()
            else:
                assert torch.equal(stored[key], tensor) and stored[key].dtype == tensor.dtype
        last = max((int(key.split(".")[1]) for key in original if key.startswith("blocks.")), default=None)
        assert not any(key.startswith(("blocks.0.", f"blocks.{last}.")) or "norm" in key or ".inner.o." in key for key in scales)
        config = json.loads((small / name / "config.json").read_text())
        assert config.pop("quantization") == {"format": "fp8_e4m3", "scales": "row"} and config == open_component(tiny_mova, name).config
    others = {name for name in files(tiny_mova) if not name.startswith(PARTS)}
    assert others and all((small / name).read_bytes() == (tiny_mova / name).read_bytes() for name in others - {"model_index.json"})
    assert json.loads((small / "model_index.json").read_text()) == json.loads((tiny_mova / "model_index.json").read_text())


def test_inspect_finds_it_complete(small):
    report = inspect_path(small)
    assert report.complete and "F8_E4M3" in str(report) and inspect_path(small / "video_dit").complete


def test_half_the_size(tmp_path):
    """With as many layers as to matter, in the dtype of the release."""
    folder, generator = tmp_path / "wide", torch.Generator().manual_seed(0)
    wide = dict(video_dit=dict(dim=192, ffn_dim=512, num_layers=20), audio_dit=dict(dim=96, ffn_dim=512, num_layers=16))
    wide |= dict(
        video_dit_2=wide["video_dit"], dual_tower_bridge=dict(visual_layers=20, audio_layers=16, visual_hidden_dim=192, audio_hidden_dim=96, head_dim=24)
    )
    for name in PARTS:
        config = CONFIGS[name] | wide[name]
        (folder / name).mkdir(parents=True)
        write_json(folder / name / "config.json", config)
        save_file({key: random_tensor(key, shape, generator).bfloat16() for key, shape in expected_shapes(name, config).items()}, folder / name / WEIGHTS)
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(folder / "model_index.json", MODEL_INDEX)
    results = quantize(folder, tmp_path / "half")
    ratios = {file.name.split("/")[0]: file.after / file.before for file in results if file.name.endswith(WEIGHTS)}
    assert max(ratios["video_dit"], ratios["audio_dit"]) < 0.62 and sum(file.after for file in results) / sum(file.before for file in results) < 0.62
    denoiser = mova.load_denoiser(tmp_path / "half")
    assert denoiser.dtype == torch.bfloat16 and denoiser.residency.stored
    assert min(denoiser.residency.sizes) < 0.55 * max(denoiser.residency.sizes)


def test_shards_stay_shards(copied, tmp_path, small):
    folder = copied / "video_dit"
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = {key: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(tensors)}
    for shard in sorted(set(names.values())):
        save_file({key: tensors[key] for key in tensors if names[key] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    out = tmp_path / "out"
    quantize(copied, out)
    assert files(out / "video_dit") == files(folder)
    weight_map = json.loads((out / "video_dit" / "model.safetensors.index.json").read_text())["weight_map"]
    assert all(weight_map[key.removesuffix("_scale")] == shard and key.removesuffix("_scale") in names for key, shard in weight_map.items())
    assert {key: names[key] for key in names} == {key: shard for key, shard in weight_map.items() if not key.endswith("_scale")}
    whole = load_file(small / "video_dit" / WEIGHTS)
    stored = open_component(out, "video_dit").tensors()
    assert set(stored) == set(whole) and all(torch.equal(stored[key].float(), whole[key].float()) for key in whole)


# -- computing with it ----------------------------------------------------------------------------------------------


def test_the_same_clip_in_every_residency(small, loop, monkeypatch):
    views = mova.load_denoiser(small)
    expected = mova.sample(views, **loop)
    assert views.report().mode == "views" and views.dtype == torch.float32
    for mode, own, ring in [("stream", 0, False), ("stream", 2, False), ("stream", 3, True), ("resident", 4, False)]:
        denoiser = mova.load_denoiser(small, residency=mode)
        placement = Placement(mode, "for the test", spread(own, 4), SLABS if own < 4 else 0)
        monkeypatch.setattr(denoiser.residency, "settle", lambda *job, denoiser=denoiser, it=placement: setattr(denoiser.residency, "placement", it))
        with monkeypatch.context() as patch:
            if ring:
                with_rings(patch)
            for _ in range(2):
                found = mova.sample(denoiser, **loop)
                assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
        assert len({id(layout) for layout in denoiser.residency.layouts.values()}) == 4  # plain, quantized, without sound, last
        denoiser.release()
        assert denoiser.residency.empty


def test_other_dtypes_leave_quantized_weights_as_stored(small, loop):
    denoiser = mova.load_denoiser(small, dtype=torch.bfloat16)
    plain = mova.sample(mova.load_denoiser(small), **loop)
    converted = mova.sample(denoiser, **loop)
    assert denoiser.report().mode == "stream"
    slots = denoiser.residency.layouts["high", 1].slots
    assert slots["video.ffn.0.weight"].dtype == FP8 and slots["video.ffn.0.weight_scale"].dtype == torch.float32
    assert slots["video.ffn.0.bias"].dtype == slots["video.norm3.weight"].dtype == slots["to_video.inner.o.weight"].dtype == torch.bfloat16
    assert denoiser.residency.layouts["high", 0].slots["video.ffn.0.weight"].dtype == torch.bfloat16
    assert all((a - b).norm() / b.norm() < 0.1 for a, b in zip(converted, plain, strict=True))
    denoiser.release()


def test_error_on_the_reference_loop(tiny_mova, small, loop):
    errors = measure_error(mova.load_denoiser(tiny_mova), mova.load_denoiser(small), **loop)
    assert [error.step for error in errors] == [1, 2, 3, 4] and {error.expert for error in errors} == {"high", "low"}
    assert all(0 < value < 0.2 for error in errors for value in (error.video, error.audio))
    same = measure_error(mova.load_denoiser(small), mova.load_denoiser(small, residency="stream"), **loop)
    assert all(error.video == error.audio == 0 for error in same)


def test_placement_goes_by_the_size_of_each_layer():
    """At the released sizes: 8-bit weights are resident in 24 GB, and layers of two sizes never fill more than there is."""
    sizes = [int(0.95e9)] + 28 * [int(0.51e9)] + [int(0.56e9)] + 9 * [int(0.36e9)] + [int(0.71e9)]
    residency = SimpleNamespace(device=torch.device("cuda"), mode="auto", stored=True, dtype=torch.bfloat16, parts=SimpleNamespace(count=40), sizes=sizes)
    assert choose_placement(residency, Job(2**30), Room(24 * 2**30)).mode == "resident"
    for free in range(2, 24):
        placement = choose_placement(residency, Job(2**30), Room(free * 2**30))
        held = sum(sizes[i] for i in placement.own) + placement.shared * max(sizes)
        assert not placement.own or held + 2**31 <= free * 2**30


# -- a folder that is not what it says ------------------------------------------------------------------------------


def test_original_weights_under_a_quantized_config(tiny_mova, small, tmp_path):
    mixed = shutil.copytree(small, tmp_path / "mixed")
    shutil.copyfile(tiny_mova / "audio_dit" / WEIGHTS, mixed / "audio_dit" / WEIGHTS)
    with pytest.raises(CheckpointError, match="audio_dit.*10 missing: blocks.1.*weight_scale"):
        mova.load_denoiser(mixed)
    tensors = load_file(small / "audio_dit" / WEIGHTS)
    save_file({key: value.float() for key, value in tensors.items()}, mixed / "audio_dit" / WEIGHTS)
    with pytest.raises(CheckpointError, match="files of two checkpoints are mixed"):
        mova.load_denoiser(mixed)


def test_quantized_weights_under_the_original_config(tiny_mova, small, tmp_path):
    mixed = shutil.copytree(tiny_mova, tmp_path / "mixed")
    shutil.copyfile(small / "audio_dit" / WEIGHTS, mixed / "audio_dit" / WEIGHTS)
    with pytest.raises(CheckpointError, match="audio_dit.*unexpected.*weight_scale"):
        mova.load_denoiser(mixed)


def test_unknown_format(small, tmp_path):
    folder = shutil.copytree(small, tmp_path / "other")
    config = folder / "video_dit" / "config.json"
    config.write_text(config.read_text().replace("fp8_e4m3", "int4"))
    with pytest.raises(CheckpointError, match="int4"):
        mova.load_denoiser(folder)
    assert not inspect_path(folder).complete


# -- whole or not there ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1, 3, 6, 10])
def test_goes_on_where_it_was_interrupted(tiny_mova, small, tmp_path, monkeypatch, number):
    """As Ctrl+C in the middle of file `number`."""
    out, write, started = tmp_path / "out", os.replace, []

    def replace(source, target):
        started.append(target)
        if len(started) == number + 1:
            raise KeyboardInterrupt
        write(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_mova, out)
    monkeypatch.undo()
    there = {out / name for name in files(out)}
    assert there == set(started[:-1])
    with pytest.raises(CheckpointError, match="model_index.json"):
        mova.load_denoiser(out)
    stamps = {path: path.stat().st_mtime_ns for path in there}
    results = quantize(tiny_mova, out)
    assert {out / file.name for file in results if file.kept} == there - {out / "quantization.json"}
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert files(out) == files(small) and all((out / name).read_bytes() == (small / name).read_bytes() for name in files(out))
    assert all(file.kept for file in quantize(tiny_mova, out))


@pytest.mark.parametrize("damage", ["cut", "number", "empty"])
def test_a_damaged_file_is_written_again(tiny_mova, small, tmp_path, damage):
    out = shutil.copytree(small, tmp_path / "out")
    file = out / "video_dit" / WEIGHTS
    content = bytearray(file.read_bytes())
    if damage == "number":
        content[-1] ^= 0x40  # the last row of the last weight
    file.write_bytes(content if damage == "number" else content[: len(content) // 2 if damage == "cut" else 0])
    (out / "video_dit" / (WEIGHTS + ".part")).write_bytes(b"of a call that was killed")
    results = quantize(tiny_mova, out)
    assert [result.name for result in results if not result.kept] == [f"video_dit/{WEIGHTS}"]
    assert files(out) == files(small) and file.read_bytes() == (small / "video_dit" / WEIGHTS).read_bytes()


def test_what_was_written_is_read_back(tiny_mova, tmp_path, monkeypatch):
    write = module.write_tensors

    def on_a_broken_disk(file, draft, plan):
        write(file, draft, plan)
        draft.write_bytes(draft.read_bytes()[:-1] + b"\x33")

    monkeypatch.setattr(module, "write_tensors", on_a_broken_disk)
    with pytest.raises(CheckpointError, match="read back"):
        quantize(tiny_mova, tmp_path / "out")
    assert files(tmp_path / "out") == {"quantization.json"}


def test_disk_full(tiny_mova, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "as_bytes", lambda tensor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(CheckpointError, match="No space left on device.*goes on where it stopped"):
        quantize(tiny_mova, tmp_path / "out")
    assert files(tmp_path / "out") == {"quantization.json"}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match="needs 0.00 GB, but the disk has 0.00 GB free"):
        quantize(tiny_mova, tmp_path / "other")
    assert files(tmp_path / "other") == set()


def test_no_hard_links(tiny_mova, small, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("another disk")))
    quantize(tiny_mova, tmp_path / "out")
    assert files(tmp_path / "out") == files(small)
    assert (tmp_path / "out/video_vae" / WEIGHTS).stat().st_ino != (tiny_mova / "video_vae" / WEIGHTS).stat().st_ino


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["blocks.1.ffn.0.weight", "blocks.0.norm3.weight"])
def test_numbers_that_are_none(copied, tmp_path, key, value):
    file = copied / "video_dit_2" / WEIGHTS
    tensors = load_file(file)
    tensors[key].view(-1)[5] = value
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=f"video_dit_2.*{key} holds NaN"):
        quantize(copied, tmp_path / "out")
    assert not any("video_dit_2" in name or name.endswith(".part") for name in files(tmp_path / "out"))


def test_where_it_must_not_write(tiny_mova, small, copied, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    cases = {
        foreign: (InputError, "not empty"),
        foreign / "thesis.txt": (InputError, "is a file"),
        foreign / "thesis.txt" / "out": (CheckpointError, "cannot be written"),
        copied: (InputError, "is inside"),
        copied / "video_dit" / "out": (InputError, "is inside"),
        copied / ".." / copied.name / "out": (InputError, "is inside"),
        tmp_path: (InputError, "not empty"),
    }
    before = files(tmp_path)
    for out, (kind, sentence) in cases.items():
        with pytest.raises(kind, match=sentence):
            quantize(copied, out)
    assert files(tmp_path) == before
    other = shutil.copytree(small, tmp_path / "other")
    tensors = load_file(copied / "audio_dit" / WEIGHTS)
    save_file(tensors, copied / "audio_dit" / WEIGHTS, metadata={"another": "version" * 20})
    with pytest.raises(InputError, match="another checkpoint"):
        quantize(copied, other)


def test_what_it_cannot_read(tiny_mova, small, copied, tmp_path):
    out = tmp_path / "out"
    for folder, kind, sentence in [
        (tmp_path / "nothing", CheckpointError, "not there"),
        (tmp_path, CheckpointError, "model_index.json"),
        (small, InputError, "quantized already"),
    ]:
        with pytest.raises(kind, match=sentence):
            quantize(folder, out)
    file = copied / "dual_tower_bridge" / WEIGHTS
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}  # the file itself is replaced below
    save_file(tensors | {"audio_to_video_conditioners.0.inner.q.weight": torch.zeros(80, 80, dtype=torch.int8)}, file)
    with pytest.raises(CheckpointError, match="cannot be quantized .*audio_to_video_conditioners.0.inner.q.weight .I8"):
        quantize(copied, out)
    save_file({key: value for key, value in tensors.items() if "inner.q" not in key}, file)
    with pytest.raises(CheckpointError, match="missing"):
        quantize(copied, out)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="truncated"):
        quantize(copied, out)
    assert not out.exists()


def test_command(tiny_mova, tmp_path, monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["mova", "quantize", *map(str, words)])
        return main(), *capsys.readouterr()

    assert run(tiny_mova, tmp_path / "out", "--device", "abacus")[0] == 1 and not (tmp_path / "out").exists()
    code, stdout, _ = run(tiny_mova, tmp_path / "out", "--device", "cpu")
    assert code == 0 and "video_dit/" + WEIGHTS in stdout
    assert "step 1 (high expert): video 0.0" in stdout and "step 2 (low expert): video 0.0" in stdout
    monkeypatch.setattr(module, "SMALL", 0)
    code, stdout, _ = run(tiny_mova, tmp_path / "out")
    assert code == 0 and "kept" in stdout and "written" not in stdout and "--measure" in stdout and "step 1" not in stdout
    code, stdout, stderr = run(tmp_path / "out", tmp_path / "again")
    assert code == 1 and stderr.startswith("mova: ") and stderr.count("\n") == 1 and stdout == ""


def test_insisting_on_8_bits(tiny_mova, small):
    assert mova.load_denoiser(small, dtype=torch.float8_e4m3fn).dtype == torch.float32  # what is computed in stays as stored
    with pytest.raises(CheckpointError, match="mova quantize"):
        mova.load_denoiser(tiny_mova, dtype=torch.float8_e4m3fn)
