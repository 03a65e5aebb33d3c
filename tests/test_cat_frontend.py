"""The encoder's front end: log-mels of the reference, sound of every rate, length and kind, and windows of long sound."""

import subprocess
import sys

import pytest
import torch

from cat_encoder.errors import CatError
from cat_encoder.frontend import AUDIOSET, ESC50, FRAMES, SPEECH_COMMANDS, Normalisation, log_mel, raw_mel, resample, to_mono
from cat_encoder.windows import BLOCK, count_windows, cut_windows, resample_stream

TOLERANCE = 1e-4  # MANIFEST, absolute on normalised values
WAVES = (
    "as_10s_16k", "as_3s_16k", "as_10p4s_16k", "as_2s_48k", "as_1p5s_44k", "as_2s_22k", "as_2s_16k_stereo", "esc_5s_16k", "spc_1s_16k", "short_10000_16k",
)  # fmt: skip


def noise(seconds: float, rate: int = 16_000, channels: int = 1, batch: int = 1) -> torch.Tensor:
    return 0.1 * torch.randn(batch, channels, round(seconds * rate), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", WAVES)
def test_reference_log_mels(golden_cat, name):
    waves, mels = golden_cat("frontend/waves.safetensors"), golden_cat("frontend/fbank.safetensors")
    case, wave = golden_cat("frontend/frontend.json")[name], waves[name].float() / 32768
    before = wave.clone()
    mel = log_mel(wave[None, None] if wave.ndim == 1 else wave.T[None], case["sample_rate"], case["target_length"], Normalisation(case["mean"], case["std"]))
    first, last, step = map(int, case["stored_rows"].strip("[]").split(":"))
    assert mel.shape == (1, 1, case["target_length"], 128)
    assert (mel[0, 0, first:last:step] - mels[name]).abs().max() < TOLERANCE
    assert last == case["target_length"] or (mel[0, 0, case["valid_frames"] :] - case["pad_value"]).abs().max() < 1e-6
    assert float(mel.double().sum()) == pytest.approx(case["sum"], abs=0.5)
    assert torch.equal(wave, before)


@pytest.mark.parametrize(("pair", "value"), [(AUDIOSET, 0.467061), (ESC50, 0.618306), (SPEECH_COMMANDS, 0.615094)])
def test_padding_is_raw_zero_and_one_filter_is_empty(pair, value):
    mel = log_mel(noise(0.5), 16_000, 128, pair)[0, 0]
    assert mel[48:].unique().tolist() == pytest.approx([value], abs=1e-6)
    assert mel[:48, 3].unique().tolist() == pytest.approx([(-15.942 - pair.mean) / (2 * pair.std)], abs=1e-4)


def test_channels_are_averaged_before_resampling():
    sound = noise(1, 44_100, channels=7)
    assert torch.equal(log_mel(sound, 44_100), log_mel(sound.mean(1, keepdim=True), 44_100))


def test_direct_current_changes_nothing():
    sound = noise(1)
    torch.testing.assert_close(log_mel(sound + 0.3, 16_000), log_mel(sound, 16_000), rtol=0, atol=2e-3)


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_101, 192_000])
def test_a_tone_keeps_its_pitch_at_any_rate(rate):
    tone = torch.sin(2 * torch.pi * 1000 * torch.arange(rate) / rate)[None, None]
    reference = torch.sin(2 * torch.pi * 1000 * torch.arange(16_000) / 16_000)[None]
    ours = raw_mel(resample(to_mono(tone), rate))[0, 10:90]
    assert (ours.mean(0).argmax() - raw_mel(reference)[0].mean(0).argmax()).abs() == 0


def test_a_batch_is_its_clips():
    sound = noise(1, batch=3) * torch.tensor([1.0, 0.1, 0.0])[:, None, None]
    assert torch.equal(log_mel(sound, 16_000), torch.cat([log_mel(clip[None], 16_000) for clip in sound]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_floats_are_taken(dtype):
    mel = log_mel(noise(0.2).to(dtype), 16_000, 16)
    assert mel.dtype == torch.float32 and mel.isfinite().all()


def test_silence_and_clipping_are_finite():
    for sound in (torch.zeros(1, 2, 16_000), noise(1).mul(50).clamp(-1, 1), torch.full((1, 1, 16_000), 1.0)):
        assert log_mel(sound, 16_000).isfinite().all()


@pytest.mark.parametrize(
    ("sound", "rate", "words"),
    [
        (torch.zeros(1, 1, 160), 16_000, "10 ms"),
        (torch.zeros(1, 1, 441), 44_100, "10 ms"),
        (torch.zeros(1, 1, 0), 16_000, "0 ms"),
        (torch.zeros(0, 1, 16_000), 16_000, "batch, channels, samples"),
        (torch.zeros(1, 0, 16_000), 16_000, "batch, channels, samples"),
        (torch.zeros(16_000), 16_000, "batch, channels, samples"),
        (torch.zeros(1, 1, 16_000, dtype=torch.int16), 16_000, "divide 16-bit samples"),
        (torch.full((1, 1, 16_000), 20_000.0), 16_000, "reaches 20,000"),
        (torch.full((1, 1, 16_000), float("nan")), 16_000, "NaN or Inf"),
        (torch.full((1, 1, 16_000), float("-inf")), 16_000, "NaN or Inf"),
        (torch.zeros(1, 1, 16_000), 0, "0 Hz"),
        (torch.zeros(1, 1, 16_000), -44_100, "-44100 Hz"),
        ([0.0] * 16_000, 16_000, "list"),
    ],
)
def test_what_is_no_sound_is_said(sound, rate, words):
    with pytest.raises(CatError, match=words):
        log_mel(sound, rate)


def test_one_bad_sample_is_found():
    sound = noise(1, channels=2)
    sound[0, 1, 777] = float("nan")
    with pytest.raises(CatError, match="NaN"):
        log_mel(sound, 16_000)


# torchaudio


def test_importing_does_not_load_torchaudio():
    code = "import sys, cat_encoder; print([name for name in ('torchaudio', 'transformers', 'diffusers', 'av', 'mediapipe') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("error", [ImportError("no module"), OSError("undefined symbol")])
def test_a_broken_torchaudio_is_a_sentence(monkeypatch, error):
    def broken(name):
        raise error

    monkeypatch.setattr("importlib.import_module", broken)
    with pytest.raises(CatError, match="install the torchaudio that belongs to your torch"):
        log_mel(noise(1), 16_000)


# Windows


def pieces(sound: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    """The sound in pieces of these sizes, over and over."""
    cuts, at = [], 0
    while at < sound.shape[-1]:
        size = sizes[len(cuts) % len(sizes)]
        cuts.append(sound[..., at : at + size])
        at += size
    return cuts


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 44_101])
def test_resampling_in_pieces_is_resampling_at_once(rate):
    sound = noise(2.2 * BLOCK / 16_000, rate, batch=2)[:, 0]
    whole = resample(sound, rate)
    parts = torch.cat(list(resample_stream(iter(pieces(sound, [rate * 7, 1, 3 * rate + 17])), rate)), 1)
    assert parts.shape == whole.shape
    assert (parts - whole).abs().max() < 1e-6


@pytest.mark.parametrize("seconds", [0.03, 10.0, 10.24 + 0.015, 10.255, 10.3, 20.48 + 0.014, 31.0])
@pytest.mark.parametrize("sizes", [[10**9], [4_000, 33, 160_001]])
def test_windows_hold_every_frame_once(seconds, sizes):
    sound = noise(seconds)
    whole = (raw_mel(sound[:, 0]) - AUDIOSET.mean) / (2 * AUDIOSET.std)
    windows = list(cut_windows(pieces(sound, sizes), 16_000, FRAMES, FRAMES, AUDIOSET, 16))
    assert sum(window.fresh for window in windows) == whole.shape[1]
    assert len(windows) == count_windows(sound.shape[-1], 16_000, FRAMES, FRAMES)
    for window in windows:
        assert window.mel.shape == (1, 1, FRAMES, 128) and window.start % 16 == 0
        torch.testing.assert_close(window.mel[:, 0, : window.sound], whole[:, window.start : window.start + window.sound], rtol=0, atol=2e-3)


@pytest.mark.parametrize(("seconds", "step"), [(0.3, 100), (2.0, 100), (7.9, 100), (8.04, 50), (5.0, 200)])
def test_overlapping_windows(seconds, step):
    sound = noise(seconds)
    windows = list(cut_windows([sound], 16_000, 208, step, AUDIOSET, 16, pad=False))
    assert len(windows) == count_windows(sound.shape[-1], 16_000, 208, step)
    assert [window.start for window in windows[:-1]] == [i * step for i in range(len(windows) - 1)]
    frames = raw_mel(sound[:, 0]).shape[1]
    assert windows[-1].start + windows[-1].sound == frames and windows[-1].mel.shape[2] - windows[-1].sound < 16


def test_chunks_of_other_clips_are_refused():
    with pytest.raises(CatError, match="same clips"):
        list(cut_windows([noise(1), noise(1, batch=2)], 16_000, FRAMES, FRAMES, AUDIOSET, 16))


def test_no_chunk_at_all_is_refused():
    with pytest.raises(CatError, match="empty"):
        list(cut_windows([], 16_000, FRAMES, FRAMES, AUDIOSET, 16))
