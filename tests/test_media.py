"""Films and sound files: what is written comes back, sound and picture end together, and a failure leaves nothing behind."""

import math
import struct
import sys
from fractions import Fraction

import av
import pytest
import torch

from mova.errors import InputError, MediaError
from mova.media import Clip, check_output, exact_rate, write_audio, write_clip
from mova.media_reading import read_audio, read_metadata, read_video

FAILURES = (MediaError, InputError)


def film(frames=9, height=48, width=64):
    """A smooth picture that changes with time, [F,H,W,3]."""
    y, x, t = (torch.linspace(0, 1, n) for n in (height, width, frames))
    t, y, x = torch.meshgrid(t, y, x, indexing="ij")
    return torch.stack([y, x, (t + 0.2) * 0.8], dim=-1)


def chirp(samples, sample_rate, channels=1):
    time = torch.arange(samples) / sample_rate
    return torch.stack([0.5 * torch.sin(2 * math.pi * (200 + 300 * c + 400 * time) * time) for c in range(channels)])  # [C, S]


@pytest.mark.parametrize("suffix", [".mp4", ".m4v", ".mov", ".webm"])
def test_film_comes_back(tmp_path, suffix):
    frames, sound = film(), chirp(18000, 48000, channels=2)
    metadata = {"prompt": '猫 says "hi"\n', "seed": 3}
    Clip(frames, sound, 24.0, 48000, metadata).save(tmp_path / f"clip{suffix}")
    clip = read_video(tmp_path / f"clip{suffix}")
    assert clip.frames.shape == frames.shape and clip.fps == 24.0 and clip.sample_rate == 48000
    assert clip.metadata == metadata == read_metadata(tmp_path / f"clip{suffix}")
    assert (clip.frames - frames).abs().mean() < 0.01
    assert clip.audio.shape == (2, 18000)  # 9 frames at 24 fps
    assert (clip.audio - sound).abs().mean() < 0.02
    assert [file.name for file in tmp_path.iterdir()] == [f"clip{suffix}"]


@pytest.mark.parametrize("given", [386880, 386000, 300000], ids=["longer", "equal", "shorter"])
def test_sound_and_picture_end_together(tmp_path, given):
    """193 frames at 24 fps are 386000 samples at 48 kHz, whatever the model made."""
    write_clip(tmp_path / "clip.mp4", film(193, 32, 32), fps=24, audio=chirp(given, 48000), sample_rate=48000)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert container.duration == 8041667  # microseconds
        for stream in container.streams:
            assert stream.duration * stream.time_base == Fraction(193, 24)
        assert [frame.pts * frame.time_base for frame in container.decode(video=0)] == [Fraction(i, 24) for i in range(193)]
    waveform, rate = read_audio(tmp_path / "clip.mp4")
    assert waveform.shape == (1, 386000) and rate == 48000
    assert waveform[:, given + 2048 :].abs().max().item() < 1e-3 if given < 380000 else True


@pytest.mark.parametrize(
    ("fps", "rate"),
    [
        (24, Fraction(24)),
        (23.976, Fraction(24000, 1001)),
        (29.97, Fraction(30000, 1001)),
        (12.5, Fraction(25, 2)),
        (30, Fraction(30)),
        (59.94, Fraction(60000, 1001)),
    ],
)
def test_frame_rate_is_exact(tmp_path, fps, rate):
    assert exact_rate(fps) == rate == exact_rate(float(rate))
    write_clip(tmp_path / "clip.mp4", film(7, 32, 32), fps=fps, audio=chirp(48000, 44100), sample_rate=44100)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert container.streams.video[0].average_rate == rate
        assert [frame.pts * frame.time_base for frame in container.decode(video=0)] == [i / rate for i in range(7)]
    assert read_audio(tmp_path / "clip.mp4")[0].shape[1] == round(44100 * 7 / rate)


def test_sound_is_where_it_was(tmp_path):
    """A click stays at its frame: the encoder's delay is taken out."""
    sound = torch.zeros(1, 48000)
    sound[0, 24000:24100] = 0.9
    write_clip(tmp_path / "clip.mp4", film(24, 32, 32), fps=24, audio=sound, sample_rate=48000)
    loud = (read_video(tmp_path / "clip.mp4").audio[0].abs() > 0.3).nonzero()
    assert abs(int(loud[0]) - 24000) <= 16


def test_chunks_are_written_as_one_film(tmp_path):
    frames, counts = film(13), []
    original = frames.clone()
    write_clip(tmp_path / "whole.mp4", frames, fps=24)
    write_clip(tmp_path / "chunks.mp4", (frames[start : start + 4] for start in range(0, 13, 4)), fps=24, on_frame=counts.append)
    assert counts == list(range(1, 14))
    assert (tmp_path / "whole.mp4").read_bytes() == (tmp_path / "chunks.mp4").read_bytes()
    assert torch.equal(frames, original)
    silent = read_video(tmp_path / "whole.mp4")
    assert silent.audio is None and silent.sample_rate == 0 and silent.metadata == {}


def test_index_is_at_the_front(tmp_path):
    """A browser can start before the download ends."""
    write_clip(tmp_path / "clip.mp4", film(), fps=24)
    content = (tmp_path / "clip.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_odd_sizes_repeat_the_last_row_and_column(tmp_path, suffix):
    frames = film(3, 33, 47)
    write_clip(tmp_path / f"clip{suffix}", frames, fps=24)
    back = read_video(tmp_path / f"clip{suffix}").frames
    assert back.shape == (3, 34, 48, 3)
    assert (back[:, :33, :47] - frames).abs().mean() < 0.02


@pytest.mark.parametrize("colour", [(200, 30, 60), (0, 0, 0), (255, 255, 255), (128, 128, 128), (20, 140, 220)])
def test_colours_survive(tmp_path, colour):
    frames = (torch.tensor(colour) / 255).expand(2, 32, 32, 3)
    write_clip(tmp_path / "clip.mp4", frames, fps=24)
    assert ((read_video(tmp_path / "clip.mp4").frames - frames) * 255).abs().max() <= 3.01


@pytest.mark.parametrize(("suffix", "rate"), [(".mp4", 1500), (".webm", 44100)])
def test_rates_the_codec_lacks_are_resampled(tmp_path, suffix, rate):
    write_clip(tmp_path / f"clip{suffix}", film(24, 32, 32), fps=24, audio=chirp(rate, rate), sample_rate=rate)
    waveform, written = read_audio(tmp_path / f"clip{suffix}")
    assert written == 48000 and waveform.shape == (1, 48000)
    assert 0.2 < waveform.std() < 0.5


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
@pytest.mark.parametrize("channels", [1, 2])
def test_sound_file_is_exact(tmp_path, suffix, channels):
    """16 bit, clipped, truncated toward zero (spec/mova.md 5.4)."""
    waveform = torch.linspace(-1.2, 1.2, 4801).repeat(channels, 1)
    write_audio(tmp_path / f"sound{suffix}", waveform, 48000, {"seed": 1})
    back, rate = read_audio(tmp_path / f"sound{suffix}")
    assert rate == 48000 and back.dtype == torch.float32 and back.shape == waveform.shape
    assert torch.equal(back * 32768, (waveform.clamp(-1, 1) * 32767).trunc())
    assert read_metadata(tmp_path / f"sound{suffix}") == {"seed": 1}


def test_real_clip(media):
    clip = read_video(media / "mova_cat.mp4")
    assert clip.frames.shape == (193, 352, 624, 3) and clip.fps == 24.0
    assert clip.audio.shape == (1, 386880) and clip.sample_rate == 48000
    assert 0 <= clip.frames.min() and clip.frames.max() <= 1 and clip.frames.std() > 0.1
    assert clip.metadata == {}


# ---------------------------------------------------------------- failures


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"frames": film()[:0]}, "no frames"),
        ({"frames": []}, "no frames"),
        ({"frames": film().permute(0, 3, 1, 2)}, "frames, height, width, 3"),
        ({"frames": (film() * 255).to(torch.uint8)}, "floating point"),
        ({"frames": [film(), film(2, 32, 32)]}, "one size"),
        ({"frames": torch.full((2, 32, 32, 3), math.nan)}, "Frame 0 holds NaN"),
        ({"fps": 0}, "frame rate is 0"),
        ({"fps": 1e-9}, "frame rate is 1e-09: 0.001 to 1000"),
        ({"fps": -24.0}, "frame rate is -24"),
        ({"fps": math.nan}, "frame rate is nan"),
        ({"audio": torch.zeros(1, 100)}, "sample rate is None"),
        ({"audio": torch.zeros(1, 100), "sample_rate": 0}, "sample rate is 0"),
        ({"audio": torch.zeros(6, 100), "sample_rate": 48000}, "1 or 2 channels"),
        ({"audio": torch.full((1, 100), math.inf), "sample_rate": 48000}, "sound holds NaN or infinite"),
    ],
)
def test_bad_input_leaves_nothing(tmp_path, change, sentence):
    with pytest.raises(FAILURES, match=sentence):
        write_clip(tmp_path / "clip.mp4", **({"frames": film(), "fps": 24.0} | change))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "sentence"), [("clip.avi", "not as '.avi'"), ("clip", "not as ''"), ("no/such/folder/clip.mp4", "folder exists")])
def test_bad_names(tmp_path, name, sentence):
    with pytest.raises(MediaError, match=sentence):
        write_clip(tmp_path / name, film(), fps=24)
    with pytest.raises(MediaError):
        write_audio(tmp_path / name, chirp(100, 48000), 48000)
    with pytest.raises(MediaError, match=sentence):
        check_output(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_output_is_checked_beforehand(tmp_path):
    check_output(tmp_path / "clip.mp4")
    assert not list(tmp_path.iterdir())
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(MediaError, match="it is a folder"):
        check_output(tmp_path / "folder.mp4")


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_interruption_keeps_the_old_file(tmp_path, failure):
    target = tmp_path / "clip.mp4"
    write_clip(target, film(), fps=24)
    before = target.read_bytes()

    def stop(count):
        if count == 60:
            raise failure("stop")

    with pytest.raises(failure):
        write_clip(target, film(90, 32, 32), fps=24, audio=chirp(48000, 48000), sample_rate=48000, on_frame=stop)
    assert target.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes, which Windows does not have")
@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_clip(path.with_suffix(".mp4"), torch.rand(60, 128, 128, 3), fps=24),
        lambda path: write_audio(path.with_suffix(".wav"), torch.zeros(1, 200000), 48000),
    ],
)
def test_full_disk(tmp_path, write):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, limits[1]))
    try:
        with pytest.raises(MediaError, match="cannot be written"):
            write(tmp_path / "clip")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_name_taken_by_a_folder(tmp_path):
    (tmp_path / "clip.mp4").mkdir()
    with pytest.raises(MediaError, match="cannot be written"):
        write_clip(tmp_path / "clip.mp4", film(), fps=24)
    assert [file.name for file in tmp_path.iterdir()] == ["clip.mp4"]


def test_what_cannot_be_read(tmp_path):
    write_clip(tmp_path / "clip.mp4", film(193, 32, 32), fps=24, audio=chirp(400000, 48000), sample_rate=48000)
    write_audio(tmp_path / "sound.flac", torch.rand(1, 200000) - 0.5, 48000)
    write_clip(tmp_path / "silent.mp4", film(), fps=24)
    write_audio(tmp_path / "sound.wav", torch.rand(1, 4000) - 0.5, 16000)
    for name in ("clip.mp4", "sound.flac", "sound.wav"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / f"cut-{name}").write_bytes(content[: len(content) // 2])
    (tmp_path / "page.mp4").write_text("<!DOCTYPE html><html>log in</html>")
    (tmp_path / "empty.wav").touch()
    (tmp_path / "bytes.mp4").write_bytes(bytes(range(256)) * 40)
    for read, name, sentence in (
        (read_video, "cut-clip.mp4", "truncated or damaged"),
        (read_audio, "cut-clip.mp4", "truncated or damaged"),
        (read_audio, "cut-sound.flac", "truncated or damaged"),
        (read_audio, "cut-sound.wav", "is truncated: 4,0.. of 8,0.. bytes"),
        (read_video, "page.mp4", "web page"),
        (read_audio, "empty.wav", "empty"),
        (read_video, "bytes.mp4", "not a film"),
        (read_video, "sound.flac", "no picture"),
        (read_audio, "silent.mp4", "no sound"),
        (read_metadata, "missing.mp4", "does not exist"),
        (read_video, "", "is a folder"),
    ):
        with pytest.raises(MediaError, match=sentence):
            read(tmp_path / name)


@pytest.mark.parametrize("claimed", [0, 2**32 - 1, 0x7FFFF024])
def test_a_sound_that_came_through_a_pipe(tmp_path, claimed):
    """Its writer could not go back and put the size into the header."""
    write_audio(tmp_path / "sound.wav", torch.full((1, 4000), 0.25), 16000)
    content = bytearray((tmp_path / "sound.wav").read_bytes())
    at = content.index(b"data") + 4
    content[4:8] = struct.pack("<I", claimed)
    content[at : at + 4] = struct.pack("<I", max(claimed - at - 4 + 8, 0) if claimed else 2**32 - 1)
    (tmp_path / "piped.wav").write_bytes(content)
    waveform, rate = read_audio(tmp_path / "piped.wav")
    assert rate == 16000 and waveform.shape == (1, 4000) and (waveform - 0.25).abs().max() < 1e-4


def test_without_pyav(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    for use in (lambda: write_clip(tmp_path / "clip.mp4", film(), fps=24), lambda: read_audio(tmp_path / "clip.mp4")):
        with pytest.raises(MediaError, match="pip install av"):
            use()
