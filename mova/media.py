"""Films and sound files: written whole or not at all, with sound and picture ending together (PyAV). Reading is in media_reading."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F

from .errors import InputError, MediaError
from .ffmpeg import load_av
from .resampling import resample

T = TypeVar("T")
BT709, LIMITED_RANGE = 1, 1  # the numbers that H.264, VP9 and FFmpeg give them
NTSC_TOLERANCE = 1e-3  # frames per second: 23.976 and 29.97 mean 24000/1001 and 30000/1001
LAYOUTS = {1: "mono", 2: "stereo"}
AAC_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000)
OPUS_RATES = (48000, 24000, 16000, 12000, 8000)
FALLBACK_RATE = 48000  # Hz, for a sound whose own rate the codec does not have


@dataclass(frozen=True)
class FilmFormat:
    """How a film is encoded. `rates` are the sample rates its sound may have."""

    video_codec: str
    video_options: dict[str, str]
    audio_codec: str
    rates: tuple[int, ...]


H264 = FilmFormat("libx264", {"crf": "17", "preset": "medium"}, "aac", AAC_RATES)
VP9 = FilmFormat("libvpx-vp9", {"crf": "24", "b": "0", "cpu-used": "4", "row-mt": "1"}, "libopus", OPUS_RATES)
FILMS = {".mp4": H264, ".m4v": H264, ".mov": H264, ".webm": VP9}
SOUNDS = {".wav": "pcm_s16le", ".flac": "flac"}
BIT_RATE = 192_000  # of the sound of a film


@dataclass
class Clip:
    """A film in memory: frames [F,H,W,3] in 0..1, audio [C,S] in -1..1 as long as the model made it (None = silent, sample_rate 0)."""

    frames: torch.Tensor
    audio: torch.Tensor | None
    fps: float
    sample_rate: int
    metadata: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Writes the film; the sound is cut or padded to the picture's length. Errors as `write_clip`."""
        write_clip(path, self.frames, fps=self.fps, audio=self.audio, sample_rate=self.sample_rate, metadata=self.metadata)


def write_clip(
    path: str | Path,
    frames: torch.Tensor | Iterable[torch.Tensor],
    *,
    fps: float,
    audio: torch.Tensor | None = None,
    sample_rate: int | None = None,
    metadata: dict[str, Any] | None = None,
    on_frame: Callable[[int], None] | None = None,
) -> None:
    """Writes a film: .mp4, .m4v, .mov (H.264 + AAC) or .webm (VP9 + Opus).

    frames [F,H,W,3] in 0..1, or chunks of it one after another, so that a decoder can stream into the file.
    audio [C,S], one or two channels, is cut or padded with silence to F/fps seconds. An odd height or width repeats its last
    row or column, since 4:2:0 colour needs even sizes. metadata comes back from `read_metadata`. on_frame gets the count so far.
    The file appears under its name when it is complete; after any error nothing is left. MediaError, InputError.
    """
    coding = choose_format(path, FILMS, "film")
    rate = exact_rate(fps)
    if audio is not None:
        check_waveform(audio, sample_rate)
    sound_rate = sample_rate if sample_rate in coding.rates else FALLBACK_RATE
    with new_file(Path(path)) as temporary, open_new(temporary, metadata, timescale=sound_rate) as container:
        pictures = single_frames([frames] if isinstance(frames, torch.Tensor) else frames)
        first = next(pictures)
        stream = add_picture(container, coding, rate, first)
        sound = None if audio is None else Soundtrack(container, coding, audio, sample_rate, sound_rate)
        for count, picture in enumerate(chain([first], pictures), 1):
            container.mux(stream.encode(video_frame(picture, count - 1, rate)))
            if sound:
                sound.encode_until(count / rate)
            if on_frame:
                on_frame(count)
        container.mux(stream.encode(None))
        if sound:
            sound.finish()


def write_audio(path: str | Path, waveform: torch.Tensor, sample_rate: int, metadata: dict[str, Any] | None = None) -> None:
    """Writes waveform [C,S], one or two channels, as 16-bit .wav or .flac: clipped to -1..1, truncated toward zero (spec/mova.md 5.4)."""
    codec = choose_format(path, SOUNDS, "sound")
    check_waveform(waveform, sample_rate)
    samples = (waveform.detach().float().cpu().clamp(-1, 1) * 32767).to(torch.int16)  # [C, S]
    with new_file(Path(path)) as temporary, open_new(temporary, metadata) as container:
        stream = container.add_stream(codec, rate=sample_rate, layout=LAYOUTS[len(samples)], format="s16")
        for start in range(0, samples.shape[1], sample_rate):  # a second at a time
            container.mux(stream.encode(audio_frame(samples[:, start : start + sample_rate], start, sample_rate)))
        container.mux(stream.encode(None))


class Soundtrack:
    """The sound of a film being written, encoded as far as the picture has come so that both lie side by side in the file."""

    def __init__(self, container: Any, coding: FilmFormat, waveform: torch.Tensor, sample_rate: int, rate: int) -> None:
        self.waveform = resample(waveform.detach().float().cpu(), sample_rate, rate).clamp(-1, 1)  # [C, S]
        self.rate = rate
        self.done = 0
        self.container = container
        self.stream = container.add_stream(coding.audio_codec, rate=rate, layout=LAYOUTS[len(waveform)])
        self.stream.bit_rate = BIT_RATE

    def encode_until(self, seconds: Fraction) -> None:
        end = round(self.rate * seconds)
        if end > self.done:
            piece = self.waveform[:, self.done : end]
            piece = F.pad(piece, (0, end - self.done - piece.shape[1]))
            self.container.mux(self.stream.encode(audio_frame(piece, self.done, self.rate)))
            self.done = end

    def finish(self) -> None:
        self.container.mux(self.stream.encode(None))


def add_picture(container: Any, coding: FilmFormat, rate: Fraction, first: torch.Tensor) -> Any:
    """A video stream of the first frame's size (made even), one tick of its clock per frame."""
    height, width = (length + length % 2 for length in first.shape[:2])
    stream = container.add_stream(coding.video_codec, rate=rate, width=width, height=height, pix_fmt="yuv420p", options=coding.video_options)
    context = stream.codec_context
    context.time_base = 1 / rate
    context.color_primaries = context.color_trc = context.colorspace = BT709
    context.color_range = LIMITED_RANGE
    return stream


def single_frames(chunks: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Pictures [H,W,3] one by one; InputError for what is none, differs in size, is not a number, and when there are none."""
    shape, count = None, 0
    for chunk in chunks:
        if chunk.ndim != 4 or chunk.shape[-1] != 3 or not chunk.is_floating_point():
            raise InputError(f"Frames are {chunk.dtype} of shape {list(chunk.shape)}; floating point [frames, height, width, 3] in 0..1 is needed.")
        shape = shape or chunk.shape[1:]
        if chunk.shape[1:] != shape:
            raise InputError(f"Frame {count} is {chunk.shape[2]}x{chunk.shape[1]}, those before are {shape[1]}x{shape[0]}: all frames of a film have one size.")
        for picture in chunk:
            if not torch.isfinite(picture).all():
                raise InputError(f"Frame {count} holds NaN or infinite values: the model or the decoder left the range of numbers (try float32).")
            count += 1
            yield picture
    if not count:
        raise InputError("There are no frames: a film needs at least one.")


def video_frame(picture: torch.Tensor, index: int, rate: Fraction) -> Any:
    """Frame number `index` from a picture [H,W,3] in 0..1."""
    pixels = (picture.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    height, width = pixels.shape[:2]
    if height % 2:
        pixels = torch.cat([pixels, pixels[-1:]])
    if width % 2:
        pixels = torch.cat([pixels, pixels[:, -1:]], dim=1)
    frame = load_av().VideoFrame.from_ndarray(pixels.contiguous().numpy(), format="rgb24")
    frame = frame.reformat(format="yuv420p", dst_colorspace=BT709, dst_color_range=LIMITED_RANGE)
    frame.pts, frame.time_base = index, 1 / rate
    return frame


def audio_frame(samples: torch.Tensor, start: int, sample_rate: int) -> Any:
    """Samples [C,n], float or int16, as the frame that begins at sample `start`."""
    packed = samples.T.reshape(1, -1).contiguous().numpy()  # channel fastest
    frame = load_av().AudioFrame.from_ndarray(packed, format="s16" if samples.dtype == torch.int16 else "flt", layout=LAYOUTS[len(samples)])
    frame.sample_rate, frame.pts, frame.time_base = sample_rate, start, Fraction(1, sample_rate)
    return frame


def check_waveform(waveform: torch.Tensor, sample_rate: int | None) -> None:
    """InputError unless waveform is [C,S] with one or two channels of finite samples at a whole, positive rate."""
    if waveform.ndim != 2 or len(waveform) not in LAYOUTS or not waveform.shape[1] or not waveform.is_floating_point():
        raise InputError(f"The sound is {waveform.dtype} of shape {list(waveform.shape)}; floating point [channels, samples] with 1 or 2 channels is needed.")
    if type(sample_rate) is not int or sample_rate <= 0:
        raise InputError(f"The sample rate is {sample_rate!r}; a whole number of samples per second is needed, such as 48000.")
    if not torch.isfinite(waveform).all():
        raise InputError("The sound holds NaN or infinite values: the model or the decoder left the range of numbers (try float32).")


def exact_rate(fps: float) -> Fraction:
    """Frames per second as the fraction meant: 23.976 is 24000/1001. InputError unless 0.001 to 1000."""
    if not 0.001 <= fps <= 1000:  # nor NaN
        raise InputError(f"The frame rate is {fps}: 0.001 to 1000 frames per second are needed.")
    ntsc = Fraction(round(fps * 1001 / 1000) * 1000, 1001)
    exact = Fraction(fps).limit_denominator(1001)
    return ntsc if exact.denominator > 1 and abs(ntsc - fps) < NTSC_TOLERANCE else exact


def choose_format(path: str | Path, formats: dict[str, T], kind: str) -> T:
    suffix = Path(path).suffix.lower()
    if suffix not in formats:
        raise MediaError(f"{path}: a {kind} is written as {', '.join(formats)}, not as '{suffix}'. Give the name one of these endings.")
    return formats[suffix]


def check_output(path: str | Path) -> None:
    """MediaError when a film could not be written under this name: asked before a long work, not after it."""
    choose_format(path, FILMS, "film")
    target = Path(path)
    draft = name_draft(target)
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        draft.touch()
        draft.unlink()
    except OSError as error:
        raise refuse(target, error) from error


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary name in the folder of `path` that becomes `path` when the block ends well, and vanishes when it does not."""
    draft = name_draft(path)
    try:
        yield draft
        os.replace(draft, path)
    except (OSError, load_av().FFmpegError) as error:
        raise refuse(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # gone under its new name, or never begun
            draft.unlink()


def name_draft(path: Path) -> Path:
    return path.absolute().with_name(f".mova-{secrets.token_hex(6)}{path.suffix.lower()}")


def refuse(path: Path, error: Any) -> MediaError:
    reason = error.strerror or error
    return MediaError(f"{path} cannot be written ({reason}): see that the folder exists, that you may write there and that the disk has room.")


def open_new(path: Path, metadata: dict[str, Any] | None, timescale: int = FALLBACK_RATE) -> Any:
    """A container to write into. `timescale`: the sample rate of the sound, so that MP4's edit list ends it at the exact sample."""
    options = {"movflags": "+faststart", "movie_timescale": str(timescale)} if FILMS.get(path.suffix) is H264 else {}
    # One key of our own inside: players and hosts that look for "prompt" or "workflow" in a comment leave it alone.
    comment = json.dumps({"mova": metadata}, default=str) if metadata else ""
    container = load_av().open(str(path), "w", options=options)
    if comment:
        container.metadata["comment"] = comment
    return container
