"""Films as what the checks look at: one frame after another with its time, so that memory does not grow with length or size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..errors import InputError, MediaError
from ..ffmpeg import load_av
from ..media import exact_rate
from ..media_reading import open_media, read_audio, to_picture
from .face import Array

TimedFrame = tuple[float, Array]  # seconds after the sound's first sample, picture uint8 [H,W,3]


class ImageFrames:
    """Pictures [F,H,W,3] in 0..1 at `fps`, to be iterated any number of times. InputError for other shapes and frame rates."""

    def __init__(self, images: torch.Tensor, fps: float) -> None:
        if images.ndim != 4 or images.shape[-1] < 3 or not len(images) or not images.is_floating_point():
            raise InputError(f"The images are {images.dtype} of shape {list(images.shape)}: floats [frames, height, width, 3] in 0..1 are needed.")
        self.images, self.rate = images, exact_rate(fps)

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[TimedFrame]:
        for index, picture in enumerate(self.images):
            yield float(index / self.rate), (picture[..., :3].float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


@dataclass(frozen=True)
class FileFrames:
    """The frames of a film file, read anew at each iteration, with the times they are shown at. MediaError while reading."""

    path: Path
    count: int  # as the header has it; 0 = it does not tell
    sound_start: float  # seconds on the file's clock

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[TimedFrame]:
        with open_media(self.path) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for frame in container.decode(stream):
                yield (frame.time or 0.0) - self.sound_start, np.ascontiguousarray(to_picture(frame).numpy())


def open_film(path: str | Path) -> tuple[FileFrames, torch.Tensor, int]:
    """(frames, waveform [C,S], sample rate) of a film with sound. MediaError when it has no picture, or no sound."""
    file = Path(path)
    with open_media(file) as container:
        if not container.streams.video:
            raise MediaError(f"{file} has no picture in it: a film is needed.")
        if not container.streams.audio:
            raise MediaError(f"{file} has no sound in it: whether lips follow a voice can only be checked where there is one.")
        count = container.streams.video[0].frames
        first = next((frame for frame in container.decode(container.streams.audio[0]) if isinstance(frame, load_av().AudioFrame)), None)
        start = first.time or 0.0 if first else 0.0
    waveform, rate = read_audio(file)
    return FileFrames(file, count, start), waveform, rate
