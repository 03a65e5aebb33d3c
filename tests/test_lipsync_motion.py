"""Mouth motion against loudness: known lags, wrong pairs, damaged signals. Nothing but numpy is needed."""

import numpy as np
import pytest
import torch
from puppet import FPS, SECONDS, drawn_face, opening_curve, voice

from mova.errors import InputError
from mova.lipsync.face import POINTS, face_box, has_lips_inside, is_facing, lip_height, mouth_opening
from mova.lipsync.fix_lag import fix_lag
from mova.lipsync.motion import RATE, compare_motion, find_peak, is_silent, smooth, voice_envelope
from mova.lipsync.verdict import PLAUSIBLE, UNRELATED, Agreement, allows_shift, is_in_time, judge, kind_of

RATE_OF_SOUND = 48000
LAGS = np.arange(-60, 61) * 10.0  # ms


def mouth(seed, fps=FPS):
    times = np.arange(int(SECONDS * fps) + 1) / fps
    faces = [drawn_face(0.5 * opening) for opening in opening_curve(times, seed)]
    return times, np.array([mouth_opening(face) for face in faces]), np.array([lip_height(face) for face in faces])


def compare(seed, sound, fps=FPS, hole=None):
    times, opening, height = mouth(seed, fps)
    if hole is not None:
        opening[hole], height[hole] = np.nan, np.nan
    return compare_motion(times, opening, height, voice_envelope(sound, RATE_OF_SOUND))


# ---------------------------------------------------------------- faces


def test_signals_of_a_face_are_free_of_its_size_and_place():
    for opening in (0.0, 0.22, 0.6):
        small, large = drawn_face(opening, 100, 80, width=70), drawn_face(opening, 900, 500, width=400)
        assert mouth_opening(small) == pytest.approx(opening) == mouth_opening(large)
        assert lip_height(small) == pytest.approx(lip_height(large))
    assert face_box(drawn_face(0.2, 300, 180, 100)) == pytest.approx([250, 115, 350, 250])


def test_a_profile_is_no_facing_face():
    front = drawn_face(0.3)
    assert front.shape == (POINTS, 2) and is_facing(front) and has_lips_inside(front)
    profile = front.copy()
    profile[1, 0] = front[454, 0] + 10  # the nose stands out beyond the cheek
    assert not is_facing(profile)
    assert not has_lips_inside(front * np.where(np.arange(POINTS) == 17, 9, 1)[:, None])


# ---------------------------------------------------------------- sound


def test_envelope_follows_the_voice_band_alone():
    """The filter has the published response, no delay, and does not hear what is outside of the band."""
    times = torch.arange(RATE_OF_SOUND * 2) / RATE_OF_SOUND
    tone = {hertz: voice_envelope(torch.sin(2 * torch.pi * hertz * times)[None], RATE_OF_SOUND)[20:-20].mean() for hertz in (100, 800, 1600, 3500, 7000)}
    assert tone[1600] == pytest.approx(-3.01, abs=0.1)  # dB of a sine of full scale
    assert tone[800] == pytest.approx(tone[1600] - 6.02, abs=0.1) and tone[3500] == pytest.approx(tone[1600] - 6.02, abs=0.1)  # half at the edges, passed twice
    assert tone[100] < -60 and tone[7000] < -60


def test_envelope_has_a_floor_and_a_clock():
    sound = torch.zeros(1, RATE_OF_SOUND)
    sound[:, 24000:28800] = torch.sin(torch.arange(4800) * 0.2)  # 0.5 to 0.6 s, 1528 Hz
    envelope = voice_envelope(sound, RATE_OF_SOUND)
    assert len(envelope) == 98 and envelope.min() == pytest.approx(np.percentile(envelope, 95) - 45)
    loud = np.flatnonzero(envelope > envelope.max() - 6) / RATE + 0.0125
    assert loud.min() == pytest.approx(0.5, abs=0.011) and loud.max() == pytest.approx(0.6, abs=0.011)


@pytest.mark.parametrize("rate", [16000, 22050, 44100, 192000])
@pytest.mark.parametrize("channels", [1, 2, 7])
def test_any_rate_and_number_of_channels(rate, channels):
    sound = voice(1, seconds=1.0, rate=rate)
    expected = voice_envelope(voice(1, seconds=1.0, rate=16000), 16000)
    assert np.abs(voice_envelope(sound.expand(channels, -1), rate)[2:-2] - expected[2:-2]).mean() < 0.5


def test_silence_and_very_short_sounds():
    assert is_silent(voice_envelope(torch.zeros(1, 48000), 48000)) and is_silent(voice_envelope(torch.zeros(2, 1), 48000))
    assert not is_silent(voice_envelope(voice(1), RATE_OF_SOUND))


def test_smoothing_keeps_slow_and_drops_fast_without_delay():
    times = np.arange(400) / RATE
    slow, fast = np.sin(2 * np.pi * 2 * times), np.sin(2 * np.pi * 20 * times)
    assert np.abs(smooth(slow + fast + 3) - slow - 3)[20:-20].max() < 0.02
    assert smooth(2 * times + 1) == pytest.approx(2 * times + 1, abs=1e-9)  # no bend at the ends
    assert smooth(np.array([1.0, 2.0])) == pytest.approx([1.0, 2.0])


# ---------------------------------------------------------------- lag and score


@pytest.mark.parametrize("fps", [24.0, 25.0, 30.0, 60.0])
@pytest.mark.parametrize("late", [0.0, 0.2, -0.2, 0.44])
def test_a_known_lag_is_measured(fps, late):
    for seed in (1, 2, 3):
        found = compare(seed, voice(seed, late), fps)
        assert found.lag == pytest.approx(1000 * late, abs=15) and found.peak > 0.4


def test_a_foreign_sound_scores_lower():
    """Six mouths and six voices: every own pair is plausible and scores highest, and of 30 foreign pairs few get any other verdict than 'not in sync'."""
    seeds = range(1, 7)
    found = {(mouth, sound): compare(mouth, voice(sound)) for mouth in seeds for sound in seeds}
    foreign = [judge(found[pair], "motion") for pair in found if pair[0] != pair[1]]
    for seed in seeds:
        assert judge(found[seed, seed], "motion") == PLAUSIBLE
        assert found[seed, seed].score > 1.5 * max(found[seed, other].score for other in seeds if other != seed)
    assert foreign.count(UNRELATED) >= 26


def test_frames_at_uneven_times():
    times, opening, height = mouth(2, fps=60.0)
    kept = np.sort(np.random.default_rng(0).choice(len(times), 240, replace=False))
    found = compare_motion(times[kept], opening[kept], height[kept], voice_envelope(voice(2, 0.2), RATE_OF_SOUND))
    assert found.lag == pytest.approx(200, abs=15)


def test_frames_without_a_face_are_left_out():
    """Their interpolation would be a mouth at rest; what was said there must not count."""
    whole, holed = compare(1, voice(1)), compare(1, voice(1), hole=slice(60, 120))
    assert holed.lag == pytest.approx(0, abs=15) and holed.score > 0.8 * whole.score
    assert compare(1, voice(1), hole=slice(0, None)).score == 0


def test_a_mouth_or_a_voice_that_does_not_change_has_no_score():
    times, opening, height = mouth(1)
    still = compare_motion(times, np.full_like(opening, 0.2), np.full_like(height, 0.3), voice_envelope(voice(1), RATE_OF_SOUND))
    assert np.abs(still.curve).max() < 1e-6 and judge(still, "motion") == UNRELATED
    hum = 0.3 * torch.sin(2 * torch.pi * 1000 * torch.arange(8 * RATE_OF_SOUND) / RATE_OF_SOUND)[None]
    assert judge(compare(1, hum), "motion") == UNRELATED


def test_sound_longer_or_shorter_than_the_picture():
    long, short = compare(1, voice(1, seconds=20.0)), compare(1, voice(1, seconds=5.0))
    assert long.lag == pytest.approx(0, abs=15) and short.lag == pytest.approx(0, abs=15)
    assert compare(1, voice(1, seconds=1.0)).peak == 0  # less than the lags that are tried


def test_inputs_are_left_as_they_are():
    times, opening, height = mouth(1)
    sound = voice(1)
    kept = [values.copy() for values in (times, opening, height)], sound.clone()
    compare_motion(times, opening, height, voice_envelope(sound, RATE_OF_SOUND))
    assert all((a == b).all() for a, b in zip((times, opening, height), kept[0], strict=True)) and torch.equal(sound, kept[1])


def test_the_peak_between_samples():
    assert find_peak(LAGS, 1 - ((LAGS - 123.4) / 500) ** 2) == pytest.approx((123.4, 1.0))
    assert find_peak(LAGS, LAGS / 600) == (600.0, 1.0)  # at the end there is nothing to lean on


# ---------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("lag", "peak", "verdict"),
    [
        (0.0, 0.5, "plausible"),
        (-100.0, 0.3, "plausible"),
        (190.0, 0.3, "plausible"),
        (240.0, 0.3, "out of sync by 240 ms (sound late)"),
        (240.0, 0.29, "not in sync"),  # what a shift is claimed by has to be surer
        (-240.4, 0.3, "out of sync by 240 ms (sound early)"),
        (0.0, 0.2, "not in sync"),
        (300.0, 0.0, "not in sync"),
        (600.0, 0.5, "not in sync"),  # at the end of the lags there is no peak
        (-600.0, 0.5, "not in sync"),
    ],
)
def test_verdicts(lag, peak, verdict):
    found = Agreement(peak, lag, peak, LAGS, np.zeros_like(LAGS))
    assert judge(found, "motion") == verdict
    assert allows_shift(verdict) == verdict.startswith("out of sync") and kind_of(verdict) in verdict
    assert verdict != "plausible" or is_in_time(np.array([lag]))[0]


def test_syncnet_has_a_scale_of_its_own():
    found = Agreement(2.0, 0.0, 2.0, LAGS, np.zeros_like(LAGS))
    assert judge(found, "motion") == PLAUSIBLE and judge(found, "syncnet") == UNRELATED


# ---------------------------------------------------------------- repair


@pytest.mark.parametrize("late", [0.25, -0.25])
def test_the_measured_lag_repairs_the_sound(late):
    sound = voice(2, late)
    found = compare(2, sound)
    repaired = fix_lag(sound, RATE_OF_SOUND, found.lag)
    assert repaired.shape == sound.shape and compare(2, repaired).lag == pytest.approx(0, abs=5)


def test_a_shift_moves_samples_and_fills_with_silence():
    sound = torch.arange(1.0, 9.0).expand(2, 1, 8)
    assert fix_lag(sound, 1000, 3.0)[0, 0].tolist() == [4, 5, 6, 7, 8, 0, 0, 0]
    assert fix_lag(sound, 1000, -3.0)[1, 0].tolist() == [0, 0, 0, 1, 2, 3, 4, 5]
    assert torch.equal(fix_lag(sound, 1000, 0.0), sound)
    with pytest.raises(Exception, match="lasts 8 ms: it cannot be moved by 9 ms"):
        fix_lag(sound, 1000, 9.0)
    for lag in (float("nan"), float("inf")):
        with pytest.raises(InputError, match=f"cannot be moved by {lag:g} ms"):
            fix_lag(sound, 1000, lag)
