"""A run that was interrupted, or killed, goes on to the same clip bit for bit; a kept run of another kind is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mova
from mova import InputError, Lora, Resume
from mova.resume import KEPT_RUNS, KEY, identify_checkpoint


class Stopped(Exception):
    """What a user's cancel raises."""


@pytest.fixture(scope="module")
def denoiser(tiny_mova):
    return mova.load_denoiser(tiny_mova)


def stop_behind(step):
    def on_step(done):
        if done.index == step:
            raise Stopped

    return on_step


def steps_of(run):
    seen = []
    return run(on_step=lambda step: seen.append(step.index)), seen


@pytest.mark.parametrize("every", [1, 3, 100])
@pytest.mark.parametrize("stopped", [0, 1, 2])  # the experts change behind step 1 or so of 4
@pytest.mark.parametrize("options", [{}, {"cfg": 1.0}, {"audio_shift": 3.0, "bridge_guidance": 2.0}], ids=["guided", "plain", "three passes"])
def test_goes_on_bit_for_bit(denoiser, loop, tmp_path, every, stopped, options):
    expected, file = mova.sample(denoiser, **loop, **options), tmp_path / "run.safetensors"
    with pytest.raises(Stopped):
        mova.sample(denoiser, **loop, **options, resume=Resume(file, every), on_step=stop_behind(stopped))
    assert file.is_file()
    found, seen = steps_of(lambda on_step: mova.sample(denoiser, **loop, **options, resume=Resume(file, every), on_step=on_step))
    assert seen == list(range(stopped + 1, 4))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert not list(tmp_path.iterdir())  # complete: nothing to go on with


def test_kept_cells_and_partial_noise(denoiser, loop, tmp_path):
    torch.manual_seed(1)
    masks = {"video_start": torch.randn_like(loop["video_noise"]), "audio_start": torch.randn_like(loop["audio_noise"]), "denoise": 0.7}
    masks["audio_mask"] = (torch.rand_like(loop["audio_noise"][:, :1]) > 0.5).float()
    expected, resume = mova.sample(denoiser, **loop | masks), Resume(tmp_path, 1)
    with pytest.raises(Stopped):
        mova.sample(denoiser, **loop | masks, resume=resume, on_step=stop_behind(1))
    found = mova.sample(denoiser, **loop | masks, resume=resume)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_cancel_within_a_step_and_lost_numbers_keep_the_last_finished_one(denoiser, loop, tmp_path):
    file, layers = tmp_path / "run.safetensors", []

    def on_layer(done, total):
        layers.append(done)
        if len(layers) == 2 * total + 2:
            raise Stopped

    with pytest.raises(Stopped):
        mova.sample(denoiser, **loop, resume=Resume(file, 100), on_layer=on_layer)
    _, seen = steps_of(lambda on_step: mova.sample(denoiser, **loop, resume=Resume(file, 100), on_step=on_step))
    assert seen == [2, 3]
    with pytest.raises(Stopped):  # nothing is finished, so nothing is kept
        mova.sample(denoiser, **loop, resume=Resume(file), on_layer=lambda done, total: (_ for _ in ()).throw(Stopped))
    assert not file.exists()


OTHERS = {
    "steps": ({"steps": 5}, "steps is 4 there and 5 here"),
    "cfg": ({"cfg": 4.0}, "cfg is 5.0 there and 4.0 here"),
    "schedule": ({"schedule": "simple"}, "schedule is reference there and simple here"),
    "prompt": ({"context": lambda x: x + 1}, "the prompt is another"),
    "picture": ({"condition": lambda x: x + 1}, "the picture, or the size, is another"),
    "seed": ({"video_noise": lambda x: x.flip(0) * -1}, "the seed, or the size, is another"),
    "number": ({"fps": 25.0}, "fps is 24.0 there and 25.0 here"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_run_is_refused_and_its_file_left_alone(denoiser, loop, tmp_path, name):
    changes, message = OTHERS[name]
    file = tmp_path / "run.safetensors"
    with pytest.raises(Stopped):
        mova.sample(denoiser, **loop, resume=Resume(file, 1), on_step=stop_behind(0))
    before = file.read_bytes()
    changed = {key: value(loop[key]) if callable(value) else value for key, value in changes.items()}
    with pytest.raises(InputError, match=message):
        mova.sample(denoiser, **loop | changed, resume=Resume(file))
    assert file.read_bytes() == before
    with pytest.raises(Stopped):  # in a folder each run has a file of its own
        mova.sample(denoiser, **loop | changed, resume=Resume(tmp_path, 1), on_step=stop_behind(0))
    assert len(list(tmp_path.iterdir())) == 2


def test_other_weights_dtype_and_loras_are_other_runs(denoiser, tiny_mova, loop, tmp_path):
    file, copied = tmp_path / "run.safetensors", tmp_path / "copied"
    with pytest.raises(Stopped):
        mova.sample(denoiser, **loop, resume=Resume(file, 1), on_step=stop_behind(1))
    with pytest.raises(InputError, match=r"dtype is torch.float32 there and torch.bfloat16 here"):
        mova.sample(mova.load_denoiser(tiny_mova, dtype=torch.bfloat16), **loop, resume=Resume(file))
    exact = mova.load_denoiser(tiny_mova)
    exact.attention = "math"
    with pytest.raises(InputError, match="attention is auto there and math here"):
        mova.sample(exact, **loop, resume=Resume(file))
    lora = {"video_dit.blocks.0.self_attn.q.lora_A.weight": torch.randn(2, denoiser.parts.experts["high"].config.dim)}
    lora["video_dit.blocks.0.self_attn.q.lora_B.weight"] = torch.randn(denoiser.parts.experts["high"].config.dim, 2)
    save_file(lora, tmp_path / "lora.safetensors")
    with pytest.raises(InputError, match="the choice of LoRAs is another"):
        mova.sample(denoiser.with_loras([Lora(tmp_path / "lora.safetensors")]), **loop, resume=Resume(file))
    shutil.copytree(tiny_mova, copied, copy_function=shutil.copyfile)  # later times, same weights
    weights = next((copied / "video_dit_2").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(InputError, match="the checkpoint is another"):
        mova.sample(mova.load_denoiser(copied), **loop, resume=Resume(file))
    shutil.copyfile(next((tiny_mova / "video_dit_2").glob("*.safetensors")), weights)
    found, expected = mova.sample(mova.load_denoiser(copied, residency="stream"), **loop, resume=Resume(file)), mova.sample(denoiser, **loop)
    assert torch.equal(found[0], expected[0])


def test_a_change_in_the_middle_of_a_large_file_is_another_checkpoint(tiny_mova, tmp_path, monkeypatch):
    monkeypatch.setattr("mova.resume.PROBE", 64)  # the files are as large for it as the released ones are
    shutil.copytree(tiny_mova, tmp_path / "copied", copy_function=shutil.copyfile)
    weights = next((tmp_path / "copied" / "video_dit_2").glob("*.safetensors"))
    tensors = load_file(weights)
    assert identify_checkpoint(tmp_path / "copied") == identify_checkpoint(tiny_mova)
    tensors["blocks.2.self_attn.q.weight"] += 1
    save_file(tensors, weights, {"format": "pt"})
    before = next((tiny_mova / "video_dit_2").glob("*.safetensors"))
    assert weights.stat().st_size == before.stat().st_size and weights.read_bytes()[:64] == before.read_bytes()[:64]
    assert identify_checkpoint(tmp_path / "copied") != identify_checkpoint(tiny_mova)


def rewrite(file, **changes):
    """The same latents, with other values in the JSON."""
    with safe_open(file, "pt") as stored:
        told = json.loads(stored.metadata()[KEY])
    save_file(load_file(file), file, {KEY: json.dumps(told | changes)})


@pytest.mark.parametrize("changes", [{"done": -1}, {"done": 3}, {"done": "1"}, {"done": None}, {"digest": "0"}, {"identity": []}], ids=str)
def test_a_file_that_was_changed_is_refused(denoiser, loop, tmp_path, changes):
    file = tmp_path / "run.safetensors"
    with pytest.raises(Stopped):
        mova.sample(denoiser, **loop, resume=Resume(file, 1), on_step=stop_behind(0))
    rewrite(file)
    with pytest.raises(Stopped):  # written again as it was, it is gone on with
        mova.sample(denoiser, **loop, resume=Resume(file, 1), on_step=stop_behind(1))
    rewrite(file, **changes)
    with pytest.raises(InputError, match="no run that can be resumed"):
        mova.sample(denoiser, **loop, resume=Resume(file))


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "foreign", "pickle", "one bit", "nested"])
def test_a_damaged_file_is_refused(denoiser, loop, tmp_path, damage):
    file = tmp_path / "run.safetensors"
    with pytest.raises(Stopped):
        mova.sample(denoiser, **loop, resume=Resume(file, 1), on_step=stop_behind(0))
    whole = file.read_bytes()
    if damage == "foreign":
        save_file({"weight": torch.zeros(3)}, file)
    elif damage == "nested":
        save_file(load_file(file), file, {KEY: "[" * 10**5})
    else:
        flipped = whole[:-500] + bytes([whole[-500] ^ 1]) + whole[-499:]
        parts = {"cut": whole[: len(whole) // 2], "text": b"<html>", "empty": b"", "pickle": b"\x80\x04cos\nsystem\n.", "one bit": flipped}
        file.write_bytes(parts[damage])
    with pytest.raises(InputError, match="no run that can be resumed"):
        mova.sample(denoiser, **loop, resume=Resume(file))


def test_where_it_cannot_be_kept(denoiser, loop, tmp_path, caplog, monkeypatch):
    with pytest.raises(InputError, match="does not exist"):
        mova.sample(denoiser, **loop, resume=Resume(tmp_path / "no" / "run.safetensors"))
    with pytest.raises(InputError, match="1 or more"):
        mova.sample(denoiser, **loop, resume=Resume(tmp_path, 0))
    expected = mova.sample(denoiser, **loop)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mova.resume.save_file", full)
    found = mova.sample(denoiser, **loop, resume=Resume(tmp_path / "run.safetensors", 1))
    assert torch.equal(found[0], expected[0]) and "the run goes on without" in caplog.text and not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_deleted_costs_no_clip(denoiser, loop, tmp_path, caplog, monkeypatch):
    def locked(*_, **__):
        raise PermissionError(13, "in use by another program")

    monkeypatch.setattr("pathlib.Path.unlink", locked)
    found, expected = mova.sample(denoiser, **loop, resume=Resume(tmp_path / "run.safetensors", 1)), mova.sample(denoiser, **loop)
    assert torch.equal(found[0], expected[0]) and "cannot be deleted" in caplog.text


def test_numbers_of_numpy_and_a_path_in_words(denoiser, loop, tmp_path):
    given = loop | {"steps": np.int64(4), "fps": np.float32(24)}
    with pytest.raises(Stopped):
        mova.sample(denoiser, **given, resume=Resume(str(tmp_path / "run.safetensors"), 1), on_step=stop_behind(1))
    _, seen = steps_of(lambda on_step: mova.sample(denoiser, **loop, resume=Resume(tmp_path / "run.safetensors"), on_step=on_step))
    assert seen == [2, 3]


def test_a_folder_keeps_the_newest(denoiser, loop, tmp_path):
    for number in range(KEPT_RUNS + 3):
        save_file({}, tmp_path / f"{number}.safetensors")
        os.utime(tmp_path / f"{number}.safetensors", (number, number))
    with pytest.raises(Stopped):
        mova.sample(denoiser, **loop, resume=Resume(tmp_path, 1), on_step=stop_behind(0))
    (own,) = {file for file in tmp_path.iterdir() if not file.stem.isdigit()}
    os.utime(own, (0, 0))
    _, seen = steps_of(lambda on_step: mova.sample(denoiser, **loop, resume=Resume(tmp_path, 1), on_step=on_step))
    assert seen == [1, 2, 3], "the oldest of all, but the one that is wanted"
    own.touch()
    names = {file.name for file in tmp_path.iterdir()}
    assert len(names) == KEPT_RUNS and "3.safetensors" not in names and f"{KEPT_RUNS + 2}.safetensors" in names


@pytest.mark.parametrize("make", ["render", "generate"])
def test_a_finished_run_stays_until_the_clip_is_safe(tiny_mova, tmp_path, monkeypatch, make):
    """Decoding, or the disk, may fail behind the last step: nothing is sampled again."""
    pipe, file, seen = mova.load_pipeline(tiny_mova), tmp_path / "run.safetensors", []
    small = dict(height=48, width=64, num_frames=9, steps=2, resume=Resume(file), on_step=lambda step: seen.append(step.index))
    where = [tmp_path / "clip.mp4"] if make == "render" else []
    with monkeypatch.context() as broken:
        broken.setattr(type(pipe), "decode_audio", lambda *_: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError("no room")))
        with pytest.raises(torch.cuda.OutOfMemoryError):
            getattr(pipe, make)(*where, "rain", **small)
    assert seen == [0, 1] and file.is_file()
    getattr(pipe, make)(*where, "rain", **small)
    assert seen == [0, 1] and not file.exists()


def test_killed_on_the_command_line_and_taken_up_again(tiny_mova, tmp_path):
    """SIGKILL, so that nothing can tidy up; the film is as one made without a stop."""
    kept, fast = tmp_path / "run.safetensors", ["--height", "48", "--width", "64", "--num-frames", "9", "--steps", "12", "--prompt", "rain"]

    def command(out, *more):
        return [sys.executable, "-m", "mova", "generate", "--model", str(tiny_mova), "--out", str(out), *fast, "--text-cache", str(tmp_path / "text"), *more]

    subprocess.run(command(tmp_path / "whole.mp4"), cwd=ROOT, check=True, capture_output=True)
    running = subprocess.Popen(command(tmp_path / "again.mp4", "--resume", str(kept), "--keep-every", "1"), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    for line in running.stderr:
        if line.startswith("step 3/"):
            running.send_signal(signal.SIGKILL if os.name == "posix" else signal.SIGTERM)
            break
    running.wait()
    time.sleep(0.1)
    assert kept.is_file() and not (tmp_path / "again.mp4").exists()
    told = subprocess.run(command(tmp_path / "again.mp4", "--resume", str(kept)), cwd=ROOT, check=True, capture_output=True, text=True).stderr
    assert "Resumed behind step" in told and "step 3/12" not in told and not kept.exists()
    whole, again = (mova.read_video(tmp_path / name) for name in ("whole.mp4", "again.mp4"))
    assert torch.equal(whole.audio, again.audio)
    assert (whole.frames - again.frames).abs().mean() < 0.01  # on a busy machine x264 itself encodes the same frames differently now and then
