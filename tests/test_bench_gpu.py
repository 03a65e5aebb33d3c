"""What of the GPU benchmarks works without a GPU: they say that one is needed, and keep rows that were measured in calls of their own."""

import json
import sys
from dataclasses import replace

import pytest
import torch

import mova
from bench import gpu, mid_model, released_model


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench.gpu"])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 2 and "python -m bench" in capsys.readouterr().err


def test_rows_of_one_day_share_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "describe", lambda: {"gpu": "NVIDIA H200 (test)", "date": "2026-01-31"})
    for row in ("ceilings", "block", "ceilings"):
        file = gpu.keep(tmp_path, row, {"measured": row})
    assert [path.name for path in tmp_path.iterdir()] == [file.name] == ["nvidia-h200-test-2026-01-31.json"]
    assert json.loads(file.read_text(encoding="utf-8"))["rows"].keys() == {"ceilings", "block"}


def test_random_model_by_shards_is_a_checkpoint(tmp_path, monkeypatch):
    size = replace(mid_model.SIZES["small"], video_heads=2)
    monkeypatch.setitem(released_model.BYTES, size, 1e6)
    folder = released_model.write_released_model(tmp_path / "model", size, torch.device("cpu"))
    inputs = mid_model.mid_inputs(size=size)
    video, _ = mova.load_denoiser(folder).velocity(inputs.video, inputs.audio, inputs.condition, inputs.positive, inputs.timestep)
    assert video.isfinite().all() and video.std() > 0.1
    files = (folder / "video_dit" / "diffusion_pytorch_model-0.safetensors", folder / "video_dit_2" / "diffusion_pytorch_model-0.safetensors")
    assert files[0].samefile(files[1])
    written = files[0].stat().st_mtime_ns
    assert released_model.write_released_model(folder, size, torch.device("cpu")) == folder and files[0].stat().st_mtime_ns == written


def test_a_small_disk_is_a_sentence(tmp_path):
    size = replace(mid_model.SIZES["small"], video_heads=2)
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(released_model.BYTES, size, 1e18)
        with pytest.raises(OSError, match="choose another --folder"):
            released_model.write_released_model(tmp_path / "model", size, torch.device("cpu"))
