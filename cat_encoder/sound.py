"""Sound files read piece by piece by PyAV, which is imported when the first one comes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CatError

PIECE = 5  # s that are handed over at once


@contextmanager
def open_sound(path: str | Path) -> Iterator[tuple[int, Iterator[Tensor]]]:
    """The first sound of a file or film: (sample rate, pieces [1,C,S] float32 in -1..1, one after another). CatError for anything else, also while it is read."""
    try:
        import av
    except ImportError as error:
        raise CatError(f"PyAV cannot be loaded ({error}): install the package av, which reads sound files.") from None
    file = Path(path)
    if not file.is_file():
        raise CatError(f"{file} is {'a folder' if file.is_dir() else 'not there'}: give a sound file.")
    try:
        container = av.open(str(file.absolute()))
    except (OSError, av.FFmpegError, UnicodeDecodeError) as error:
        raise CatError(f"{file} is no sound file, or is cut off or damaged ({error}): export or download it again.") from None
    with container:
        if not container.streams.audio:
            raise CatError(f"{file} has no sound in it: a sound file is needed.")
        stream = container.streams.audio[0]
        yield stream.rate, decode(file, container, stream, av)


def decode(file: Path, container: Any, stream: Any, av: Any) -> Iterator[Tensor]:
    converter, waiting, length = av.AudioResampler(format="fltp", layout=stream.layout, rate=stream.rate), [], 0
    try:
        for frame in container.decode(stream):
            for part in converter.resample(frame):
                waiting.append(torch.from_numpy(part.to_ndarray()))  # [C, S]
                length += part.samples
            if length >= PIECE * stream.rate:
                yield join(waiting)
                waiting, length = [], 0
    except (OSError, av.FFmpegError) as error:
        raise CatError(f"{file} is cut off or damaged ({error}): export or download it again.") from None
    if waiting:
        yield join(waiting)


def join(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat(list(parts), 1)[None]
