"""Films and sound files read back: every frame and sample as float, or one sentence that says what the file is instead."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .errors import MediaError
from .ffmpeg import load_av
from .media import BT709, Clip

LOST = 0.5  # seconds that may be missing from what the header claims before a file counts as truncated
BT601 = 5  # FFmpeg's number
UNKNOWN_SIZE = 2**31 - 2**16  # bytes from which on a RIFF header's claim means that its writer could not know (a pipe)
CODEC_FRAME = 2048  # samples: a decoder's last frame may reach past the end by less than this


def read_video(path: str | Path) -> Clip:
    """A film: all frames as they are stored, upright, and its sound (None = silent) lined up with the first frame. MediaError."""
    av = load_av()
    with open_media(path) as container:
        if not container.streams.video:
            raise MediaError(f"{path} has no picture in it: a film is needed.")
        stream, sounds = container.streams.video[0], container.streams.audio[:1]
        stream.thread_type = "AUTO"
        converter = sound_converter(sounds[0]) if sounds else None
        pictures, pieces, starts = [], [], {}  # starts: seconds, by the type of frame
        for frame in container.decode(stream, *sounds):
            starts.setdefault(type(frame), frame.time or 0.0)
            if isinstance(frame, av.VideoFrame):
                pictures.append(to_picture(frame))
            else:
                pieces += to_tensors(converter.resample(frame))
        if not pictures:
            raise MediaError(f"{path} has a picture stream without a single frame: it is damaged; export it again.")
        rate = stream.average_rate or stream.guessed_rate or Fraction(24)
        check_complete(path, len(pictures) / rate, stream)
        frames = torch.stack(pictures).float().div_(255)
        metadata = parse_metadata(container.metadata)
        if not pieces:
            return Clip(frames, None, float(rate), 0, metadata)
        late = round((starts[av.AudioFrame] - starts[av.VideoFrame]) * sounds[0].rate)  # negative: sound from before the first frame, cut
        return Clip(frames, F.pad(join_sound(pieces, sounds[0]), (late, 0)), float(rate), sounds[0].rate, metadata)


def read_audio(path: str | Path, seconds: float | None = None) -> tuple[torch.Tensor, int]:
    """The sound of any file that has one, or its first `seconds`: (waveform [C,S] float32, sample rate). MediaError."""
    with open_media(path) as container:
        if not container.streams.audio:
            raise MediaError(f"{path} has no sound in it: a sound file, or a film with sound, is needed.")
        stream = container.streams.audio[0]
        resampler = sound_converter(stream)
        pieces, read, wanted = [], 0, None if seconds is None else round(seconds * stream.rate)
        for frame in container.decode(stream):
            pieces += to_tensors(resampler.resample(frame))
            read += frame.samples
            if wanted is not None and read >= wanted:
                return torch.cat(pieces, dim=1)[:, :wanted], stream.rate
        if not pieces:
            raise MediaError(f"{path} has a sound stream without a single sample: it is empty or damaged; export it again.")
        waveform = join_sound(pieces, stream)
        check_complete(path, waveform.shape[1] / Fraction(stream.rate), stream)
        return waveform, stream.rate


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What `write_clip` or `write_audio` was given as metadata; {} for files of others. MediaError."""
    with open_media(path) as container:
        return parse_metadata(container.metadata)


@contextlib.contextmanager
def open_media(path: str | Path) -> Iterator[Any]:
    """An open container; whatever FFmpeg refuses while it is read becomes a MediaError."""
    av = load_av()
    file = Path(path)
    if not file.is_file():
        raise MediaError(f"{file} {'is a folder' if file.is_dir() else 'does not exist'}: give the path of a film or sound file.")
    try:
        with open_container(av, str(file.absolute())) as container:
            check_riff(file)
            yield container
    except (OSError, av.FFmpegError) as error:
        raise MediaError(f"{file} {diagnose_media(file, error)}") from error


def open_container(av: Any, file: str) -> Any:
    try:
        return av.open(file)
    except UnicodeDecodeError:  # PyAV before 19 is strict about tags that are not UTF-8; 19 no longer has the option
        return av.open(file, metadata_errors="replace")


def diagnose_media(file: Path, error: Any) -> str:
    """What a file that FFmpeg refused really is."""
    if isinstance(error, PermissionError):
        return "may not be read: check its permissions."
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(64).lstrip().lower()
    if not size:
        return "is empty (0 bytes): export or download it again."
    if head.startswith((b"<!doctype", b"<html")):
        return "is a web page, not a film or sound (the download was refused): download it again."
    return f"is not a film or sound file, or is truncated or damaged ({size:,} bytes; {error.strerror or error}): export or download it again."


def check_complete(path: str | Path, seconds: Fraction, stream: Any) -> None:
    """MediaError when much less was decoded than the header claims."""
    claimed = stream.duration * stream.time_base if stream.duration else Fraction(0)
    if claimed - seconds > LOST:
        raise MediaError(f"{path} is truncated or damaged: {float(seconds):.2f} of {float(claimed):.2f} seconds could be read; export or download it again.")


def check_riff(file: Path) -> None:
    """MediaError for a .wav or .avi that ends before its header says; FFmpeg reads one as if it were that short."""
    with file.open("rb") as stream:
        kind, size = struct.unpack("<4sI", stream.read(8).ljust(8))
    claimed, there = size + 8, file.stat().st_size
    if kind == b"RIFF" and claimed < UNKNOWN_SIZE and claimed - there > claimed / 100:  # some writers are a few bytes off
        raise MediaError(f"{file} is truncated: {there:,} of {claimed:,} bytes are there; export or download it again.")


def sound_converter(stream: Any) -> Any:
    """Any sample format -> planar float32, same rate and channels."""
    return load_av().AudioResampler(format="fltp", layout=stream.layout, rate=stream.rate)


def to_tensors(frames: list[Any]) -> list[torch.Tensor]:
    return [torch.from_numpy(frame.to_ndarray()) for frame in frames]  # each [C, n]


def to_picture(frame: Any) -> torch.Tensor:
    """A decoded frame as uint8 [H,W,3], turned upright (phones store how they were held)."""
    told = {}
    if frame.colorspace == BT709:  # PyAV before 17 heeds it only where another matrix is asked for, which means nothing to RGB
        told = {"src_colorspace": frame.colorspace, "dst_colorspace": BT601, "src_color_range": frame.color_range}
    pixels = torch.from_numpy(frame.reformat(format="rgb24", **told).to_ndarray())
    return torch.rot90(pixels, frame.rotation // 90)


def join_sound(pieces: list[torch.Tensor], stream: Any) -> torch.Tensor:
    """[C,S], without the silence that fills a codec's last frame."""
    waveform = torch.cat(pieces, dim=1)
    claimed = round(stream.duration * stream.time_base * stream.rate) if stream.duration else 0
    return waveform[:, :claimed] if 0 < waveform.shape[1] - claimed < CODEC_FRAME else waveform


def parse_metadata(tags: dict[str, str]) -> dict[str, Any]:
    comment = next((value for key, value in tags.items() if key.lower() == "comment"), "")
    try:
        found = json.loads(comment).get("mova")
    except (ValueError, AttributeError):  # a comment of somebody else
        return {}
    return found if isinstance(found, dict) else {}
