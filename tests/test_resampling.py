"""Sound at any rate, heard at the same pitch and length."""

import pytest
import torch

from mova.errors import InputError
from mova.resampling import resample


def tone(rate, samples):
    return torch.sin(2 * torch.pi * 440 * torch.arange(samples) / rate)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 96000, 192000, 44101, 7919, 96001, 999_983])
def test_a_tone_keeps_its_pitch_level_and_place(rate):
    sound = torch.stack([tone(rate, rate), -0.5 * tone(rate, rate)])[None]  # [1, 2, S]
    found = resample(sound, rate, 48000)
    assert found.shape == (1, 2, 48000) and found.dtype == torch.float32
    expected = tone(48000, 48000)
    inside = slice(2000, -2000)
    assert (found[0, 0] - expected)[inside].abs().max() < 5e-3 and (found[0, 1] + 0.5 * expected)[inside].abs().max() < 5e-3


@pytest.mark.parametrize(("rate", "samples"), [(44101, 1), (7919, 13), (999_983, 9)])
def test_the_length_is_exact_however_short(rate, samples):
    assert resample(torch.zeros(3, samples), rate, 48000).shape == (3, -(-samples * 48000 // rate))


@pytest.mark.parametrize("rate", [0, -1, 44100.5, float("nan"), float("inf"), None, True, "48000"])
def test_what_is_no_rate(rate):
    with pytest.raises(InputError, match="positive whole number"):
        resample(torch.zeros(1, 9), rate, 48000)
