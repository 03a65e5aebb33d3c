"""A tiny encoder, sounds made here, and short runs: what the tests of training share."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from cat_encoder.config import cat_architecture
from cat_encoder.training.clips import Clip
from cat_encoder.training.decoder import DecoderShape
from cat_encoder.training.masks import MaskPlan
from cat_encoder.training.pretrain import PretrainSettings, pretrain
from cat_encoder.training.run import RunSettings
from cat_encoder.training.teacher import DecaySchedule

RATE = 16_000
TINY = cat_architecture(4, channels=(8,), width=16, depth=2, heads=2, position_rows=96)
SETTINGS = PretrainSettings(frames=32, clones=2, mask=MaskPlan(0.75, 0.1, 2), decoder=DecoderShape(16, 2, 3, 4), ema=DecaySchedule(0.9, 0.99, 10))
RUN = RunSettings(updates=6, warmup=2, rate=1e-3, batch=4, seed=3, save_every=100, log_every=1)


def tone(number: int, seconds: float = 0.4) -> torch.Tensor:
    """Sound `number`: [1, samples], a tone and noise of its own."""
    generator = torch.Generator().manual_seed(number)
    time = torch.arange(int(seconds * RATE)) / RATE
    return (0.3 * torch.sin(2 * math.pi * (200 + 90 * number) * time) + 0.01 * torch.randn(len(time), generator=generator))[None]


def read_tone(path: Path) -> tuple[torch.Tensor, int]:
    """Stands in for reading a file: "7.wav" is sound 7."""
    return tone(int(path.stem)), RATE


def tones(count: int) -> list[Clip]:
    return [Clip(Path(f"{number}.wav")) for number in range(count)]


def describe(waveforms: torch.Tensor, rate: int) -> torch.Tensor:
    """An outside encoder of 5 values: the loudness of five bands."""
    spectrum = torch.fft.rfft(waveforms).abs().square()[:, : 5 * 600].unflatten(1, (5, 600))
    return spectrum.mean(2).log1p()


def short_run(out: Path, **changes):
    """Pre-trains on tones; changes: arguments of `pretrain`."""
    arguments = {"architecture": TINY, "settings": SETTINGS, "run": RUN, "external": describe, "read": read_tone, "shortest": 1000} | changes
    return pretrain(tones(10), out, **arguments)


def write_wav(file: Path, waveform: torch.Tensor, rate: int = RATE) -> Path:
    """A 16-bit file from [C,S] in -1..1."""
    import wave

    file.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(file), "wb") as out:
        out.setnchannels(len(waveform))
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes((waveform.clamp(-1, 1).T * 32767).to(torch.int16).contiguous().numpy().tobytes())
    return file
