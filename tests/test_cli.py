"""python -m mova: what a person types, what they read, and what is left on disk."""

import subprocess
import sys

import pytest

from mova import CheckpointError
from mova.__main__ import main
from mova.check import check
from mova.media_reading import read_metadata, read_video
from mova.sampler import Stream


@pytest.fixture
def run(monkeypatch, capsys):
    """run("inspect", path) -> (exit code, stdout, stderr)."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["mova", *map(str, words)])
        code = main()
        return code, *capsys.readouterr()

    return call


def generate(run, tiny_mova, out, *more):
    small = ("--height", 48, "--width", 64, "--num-frames", 5, "--steps", 2, "--device", "cpu", "--text-cache", out.parent / "text")
    return run("generate", "--model", tiny_mova, "--prompt", "rain", "--out", out, *small, *more)


def test_generate_writes_a_playable_clip(run, tiny_mova, tmp_path):
    out = tmp_path / "clip.mp4"
    code, stdout, stderr = generate(run, tiny_mova, out, "--seed", 3)
    assert (code, stdout.strip()) == (0, str(out)) and "step 2/2" in stderr and "low expert" in stderr
    clip = read_video(out)
    assert clip.frames.shape == (5, 48, 64, 3) and clip.audio is not None
    assert read_metadata(out)["seed"] == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--num-frames", 6), "num_frames is 6"),
        (("--fps", 0), "fps"),
        (("--steps", 0), "steps is 0"),
        (("--out", "clip.txt"), ".mp4"),
        (("--out", "nowhere/clip.mp4"), "nowhere"),
        (("--image", "nowhere.png"), "nowhere.png"),
        (("--image", __file__), "test_cli.py"),
        (("--model", "nowhere"), "nowhere"),
    ],
)
def test_a_mistake_is_one_sentence(run, tiny_mova, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    code, stdout, stderr = generate(run, tiny_mova, tmp_path / "clip.mp4", *words)
    assert code == 1 and stdout == ""
    assert said in stderr and stderr.count("mova: ") == 1 and "Traceback" not in stderr
    assert not list(tmp_path.glob("*.mp4"))


def test_ctrl_c_leaves_nothing(run, tiny_mova, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Stream, "advance", interrupt)
    code, _, stderr = generate(run, tiny_mova, tmp_path / "clip.mp4")
    assert code == 130 and "stopped" in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_inspect(run, tiny_mova, tmp_path):
    code, stdout, _ = run("inspect", tiny_mova)
    assert code == 0 and "video_dit_2" in stdout and "123 of 123 tensors" in stdout
    assert run("inspect", tmp_path / "nothing")[0] == 1


def test_demo_model_then_check(run, tmp_path):
    assert run("demo-model", tmp_path / "demo")[0] == 0
    code, stdout, _ = run("check", tmp_path / "demo", "--height", 48, "--width", 64, "--device", "cpu")
    assert code == 1 and "near 0: wrong weights" in stdout  # random weights are not MOVA, and check says so
    assert stdout.count("finite") >= 6 and "bug report" in stdout.splitlines()[-1]


@pytest.mark.parametrize("device", ["toaster", "cuda:99", ""])
def test_a_device_that_is_not_there(run, tiny_mova, tmp_path, device):
    code, stdout, stderr = run("generate", "--model", tiny_mova, "--prompt", "rain", "--out", tmp_path / "clip.mp4", "--device", device)
    assert code == 1 and "cpu always works" in stderr and len(stderr.splitlines()) == 1 and not stdout


def test_check_finds_what_it_should(tiny_mova, tmp_path):
    findings = {finding.name: finding for finding in check(tiny_mova, height=48, width=64)}
    assert findings["high expert: another prompt changes picture, sound"].good
    assert not findings["high expert: video velocity follows the noise"].good
    with pytest.raises(CheckpointError):
        list(check(tmp_path))


def test_the_library_opens_no_heavy_package():
    """Checked in a fresh interpreter, where no other test has imported them."""
    code = "import sys, mova; print([m for m in ('transformers', 'diffusers', 'mediapipe', 'torchaudio', 'av') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=str(__file__).rsplit("tests", 1)[0])
    assert done.stdout.strip() == "[]", done.stderr
