"""Mouth motion against sound: a score and a lag without weights (spec/lipsync.md B.2, B.3)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from ..resampling import resample
from .face import Array
from .verdict import Agreement, is_in_time

SOUND_RATE = 16_000  # Hz, of the sound that is looked at
RATE = 100  # per second: the grid on which mouth and voice meet
BAND = 800.0, 3500.0  # Hz, where vowels and consonants differ and music is weak
FRAME, STEP = 400, 160  # samples of one loudness: 25 ms every 10 ms
FLOOR = 45.0  # dB below the loud passages (95th percentile) where silence begins
SILENT = -60.0  # dB of full scale; loud passages below this are no voice
SMOOTHING = 8.0  # Hz; lips do not move faster
ORDER = 4  # of the Butterworth filters
MAX_LAG = 60  # grid steps, 600 ms
HOLE = 0.25  # seconds; a longer stretch without the face is left out
EDGE = 50  # grid steps repeated in mirror image before smoothing


def voice_envelope(waveform: torch.Tensor, sample_rate: int) -> Array:
    """Loudness of the voice band in dB, one value every 10 ms (the middle of value i is at 10 i + 12.5 ms), from waveform [C,S]. Never lower than the floor."""
    mono = waveform.detach().float().cpu().mean(dim=0, keepdim=True)[None]
    sound = resample(mono, sample_rate, SOUND_RATE)[0, 0].double().numpy()
    sound = filter_band(np.pad(sound, (0, max(FRAME - len(sound), 0))))
    power = np.concatenate([[0.0], np.cumsum(sound**2)])
    starts = np.arange(0, len(sound) - FRAME + 1, STEP)
    loudness = 10 * np.log10(np.maximum((power[starts + FRAME] - power[starts]) / FRAME, 1e-20))
    return np.maximum(loudness, np.percentile(loudness, 95) - FLOOR)


def filter_band(sound: Array) -> Array:
    """The sound between 0.8 and 3.5 kHz, without delay: the squared response of a Butterworth band-pass, as when it runs forward and backward."""
    low, high = (np.tan(np.pi * edge / SOUND_RATE) for edge in BAND)
    size = len(sound) + SOUND_RATE // 10  # 100 ms of silence, so that the end does not ring into the beginning
    warped = np.tan(np.pi * np.fft.rfftfreq(size)[1:-1])  # without 0 and the highest frequency, where the band-pass is zero
    gain = 1 / (1 + ((warped**2 - low * high) / (warped * (high - low))) ** (2 * ORDER))
    return np.fft.irfft(np.fft.rfft(sound, size) * np.concatenate([[0.0], gain, [0.0]]), size)[: len(sound)]


def smooth(signal: Array) -> Array:
    """What is slower than 8 Hz, without delay; both ends are continued in mirror image through the end point, so that they do not bend."""
    edge = min(EDGE, len(signal) - 1)
    before, after = 2 * signal[0] - signal[edge:0:-1], 2 * signal[-1] - signal[-2 : -edge - 2 : -1]
    long = np.concatenate([before, signal, after])
    slope = np.linspace(long[0], long[-1], len(long))  # what is left begins and ends at zero, as the transform takes it to repeat
    warped = np.tan(np.pi * np.minimum(np.fft.rfftfreq(len(long)), 0.4999)) / np.tan(np.pi * SMOOTHING / RATE)
    smoothed = slope + np.fft.irfft(np.fft.rfft(long - slope) / (1 + warped ** (2 * ORDER)), len(long))
    return smoothed[edge : edge + len(signal)]


def compare_motion(times: Array, opening: Array, height: Array, envelope: Array) -> Agreement:
    """Mouth signals [F] at the times [F] (seconds; NaN where the face is not seen) against the voice from `voice_envelope`, which begins at 0 s.

    The mean of two correlations: speed of the opening with loudness, and change of the lips' height with change of loudness.
    People open the mouth silently and close it in loud passages (m, b, p), so that plain opening against loudness misleads.
    """
    lags = np.arange(-MAX_LAG, MAX_LAG + 1)
    seen = np.flatnonzero(np.isfinite(opening))
    middles = np.arange(len(envelope)) / RATE + FRAME / SOUND_RATE / 2
    begin, end = max(times[0], middles[0]), min(times[-1], middles[-1])
    grid = np.arange(begin, end, 1 / RATE)
    if len(seen) < 2 or len(grid) <= 3 * MAX_LAG:
        return Agreement(0.0, 0.0, 0.0, lags * 1000.0 / RATE, np.zeros(len(lags)))
    known = is_near(grid, times[seen])
    speed, growth = (np.gradient(smooth(np.interp(grid, times[seen], signal[seen]))) for signal in (opening, height))
    loudness = smooth(np.interp(grid, middles, envelope))
    swelling = np.gradient(loudness)
    curve = np.array([(correlate(np.abs(speed), loudness, known, lag) + correlate(growth, swelling, known, lag)) / 2 for lag in lags])
    milliseconds = lags * 1000.0 / RATE
    lag, peak = find_peak(milliseconds, curve)
    return Agreement(float(curve[is_in_time(milliseconds)].max()), lag, peak, milliseconds, curve)


def is_near(grid: Array, times: Array) -> NDArray[np.bool_]:
    """Which moments of the grid lie between two sightings that are at most 250 ms apart."""
    after = np.clip(np.searchsorted(times, grid), 1, len(times) - 1)
    return (times[after] - times[after - 1] <= HOLE) & (grid >= times[0]) & (grid <= times[-1])


def correlate(mouth: Array, voice: Array, known: NDArray[np.bool_], lag: int) -> float:
    """Pearson's r of mouth[t] with voice[t + lag] where both are there; 0 when one of them does not change."""
    size = len(mouth) - abs(lag)
    first, second = max(-lag, 0), max(lag, 0)
    kept = known[first : first + size]
    a, b = mouth[first : first + size][kept], voice[second : second + size][kept]
    if len(a) < MAX_LAG:
        return 0.0
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale > 1e-9 else 0.0


def find_peak(lags: Array, curve: Array) -> tuple[float, float]:
    """(lag, value) of the highest point, between the samples by a parabola through three of them."""
    at = int(curve.argmax())
    if at in (0, len(curve) - 1):
        return float(lags[at]), float(curve[at])
    left, middle, right = curve[at - 1 : at + 2]
    bend = left - 2 * middle + right
    shift = 0.5 * (left - right) / bend if bend < 0 else 0.0
    return float(lags[at] + shift * (lags[1] - lags[0])), float(middle - (left - right) * shift / 4)


def is_silent(envelope: Array) -> bool:
    """Whether even the loud passages are below -60 dB of full scale."""
    return bool(np.percentile(envelope, 95) < SILENT)
