"""A long run kept on disk: one that was interrupted, or killed, goes on behind its last kept step as if nothing had happened.

A kept run is one safetensors file with the latents of both streams as they were after a step, and in its metadata, as
JSON, how many steps are done and what the run is: every setting, and digests of every tensor and of the checkpoint; and a
digest of all that, without which a damaged file would go on to another clip.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .checkpoint import open_component, weight_files
from .denoiser import Denoiser
from .errors import InputError, MediaError
from .media import new_file
from .parts import FOLDERS

log = logging.getLogger("mova")

KEPT_RUNS = 10  # files in a folder; the oldest go first
PROBES, PROBE = 256, 2**14  # stretches of a weight file, of so many bytes, that tell it from others: in the released files every linear of a video tower is met
KEY = "mova_run"  # of the JSON in the metadata
# What a person changed when the digest of a tensor differs.
NAMES = {
    "context": "the prompt", "negative_context": "the negative prompt", "condition": "the picture, or the size,", "video_noise": "the seed, or the size,",
    "audio_noise": "the seed, or the length,", "video_start": "the video to start from", "audio_start": "the sound to start from",
    "video_mask": "the part of the picture to keep", "audio_mask": "the part of the sound to keep", "checkpoint": "the checkpoint", "loras": "the choice of LoRAs",
}  # fmt: skip

Identity = dict[str, Any]


@dataclass(frozen=True)
class Resume:
    """Where a run is kept: a file, or a folder in which every run has one of its own.

    every: steps between two writes. finished: whether the last step is kept, too, and left to the caller; else a run that came to its end leaves nothing.
    """

    path: str | Path
    every: int = 5
    finished: bool = False


class Kept(NamedTuple):
    """A run as it was kept: steps done, and the latents behind them [B, 16, T, h, w] and [B, Ca, Ta]."""

    done: int
    video: Tensor
    audio: Tensor


class KeptRun:
    """The file of one run (None: it is not kept), as a context: left early it holds the last finished step, left at the end it is gone (unless `finished`)."""

    def __init__(self, file: Path | None, every: int = 1, finished: bool = False, identity: Identity | None = None) -> None:
        self.file, self.every, self.finished, self.identity = file, every, finished, identity or {}
        self.latest: Kept | None = None
        self.written = 0  # steps done when the file was last written

    def __enter__(self) -> KeptRun:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.file is not None and kind is None and not self.finished:
            remove(self.file)
        elif self.latest is not None:
            self.write(self.latest)

    def read(self) -> Kept | None:
        """What is kept; None when nothing is. InputError for a damaged file, or one of another run."""
        if self.file is None or not self.file.is_file():
            return None
        try:
            with safe_open(self.file, framework="pt") as stored:
                told = json.loads((stored.metadata() or {})[KEY])
                kept, identity, digest = Kept(told["done"], stored.get_tensor("video"), stored.get_tensor("audio")), dict(told["identity"]), told["digest"]
            if digest != digest_run(kept, identity):
                raise ValueError("its numbers are not those that were written")
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
            raise InputError(f"{self.file} is no run that can be resumed ({error}): delete it, or give another file, to start from the beginning.") from None
        if differing := differences(identity, self.identity):
            raise InputError(f"{self.file} keeps another run: {'; '.join(differing)}. Change that back, give another file, or delete this one to start anew.")
        log.info("Resumed behind step %d, kept in %s.", kept.done, self.file)
        self.written = kept.done
        return kept

    def note(self, kept: Kept) -> None:
        """To be called behind every step; writes when enough have passed."""
        self.latest = kept
        if kept.done - self.written >= self.every:
            self.write(kept)

    def write(self, kept: Kept) -> None:
        """Keeps the run, whole or not at all; a disk that refuses costs a log line, never the run."""
        if self.file is None or kept.done == self.written:
            return
        told = json.dumps({"done": kept.done, "identity": self.identity, "digest": digest_run(kept, self.identity)})
        try:
            with new_file(self.file) as draft:
                save_file({"video": kept.video.cpu().contiguous(), "audio": kept.audio.cpu().contiguous()}, draft, {KEY: told})
            self.written = kept.done
        except (MediaError, SafetensorError) as error:
            log.warning("Step %d is not kept, and the run goes on without: %s", kept.done, error)


def remove(file: Path) -> None:
    """The run is complete; a file that cannot go must not cost the clip."""
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s keeps a run that is complete, and cannot be deleted: %s", file, error)


@contextmanager
def kept_until_saved(resume: Resume | None) -> Iterator[Resume | None]:
    """What to sample with, so that the file of a finished run goes only when this context ends well: decoding and writing may fail, too.

    In a folder it goes when it is finished.
    """
    if resume is None or Path(resume.path).is_dir():
        yield resume
    else:
        yield replace(resume, finished=True)
        remove(Path(resume.path))


def open_run(resume: Resume | None, denoiser: Denoiser, settings: Mapping[str, Any], tensors: Mapping[str, Tensor | None]) -> KeptRun:
    """The file of the run that these settings (JSON values) and tensors describe. InputError when it cannot be kept there."""
    if resume is None:
        return KeptRun(None)
    if resume.every < 1:
        raise InputError(f"A run is to be kept every {resume.every} steps: 1 or more is needed.")
    digests = {name: digest_tensor(tensor) for name, tensor in tensors.items() if tensor is not None}
    identity = json.loads(json.dumps({**settings, **digests, **identify_model(denoiser)}, default=float))  # NumPy's numbers are no JSON
    path = Path(resume.path)
    if not path.is_dir():
        if not path.absolute().parent.is_dir():
            raise InputError(f"The run cannot be kept in {path}: the folder {path.absolute().parent} does not exist.")
        return KeptRun(path, resume.every, resume.finished, identity)
    file = path / f"{digest_json(identity)[:32]}.safetensors"
    remove_oldest(path, file)
    return KeptRun(file, resume.every, resume.finished, identity)


def remove_oldest(folder: Path, wanted: Path) -> None:
    """Leaves room for the wanted file among the newest."""
    files = sorted(set(folder.glob("*.safetensors")) - {wanted}, key=lambda file: file.stat().st_mtime_ns)
    for file in files[: 1 - KEPT_RUNS]:
        file.unlink(missing_ok=True)


def differences(kept: Identity, wanted: Identity) -> list[str]:
    """What differs between two runs, in words."""
    names = [name for name in {**kept, **wanted} if kept.get(name) != wanted.get(name)]
    return [f"{NAMES[name]} is another" if name in NAMES else f"{name} is {kept.get(name)} there and {wanted.get(name)} here" for name in names]


def digest_tensor(tensor: Tensor) -> str:
    """Of its shape, dtype and numbers."""
    numbers = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tuple(numbers.shape)} {numbers.dtype}".encode())
    digest.update(memoryview(numbers.flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()


def digest_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def digest_run(kept: Kept, identity: Identity) -> str:
    """Of all that a file keeps."""
    return digest_json([kept.done, digest_tensor(kept.video), digest_tensor(kept.audio), identity])


def identify_model(denoiser: Denoiser) -> Identity:
    """What computes, as far as it decides the bits of the result; where the weights live does not."""
    return {
        "checkpoint": identify_checkpoint(denoiser.folder),
        "dtype": str(denoiser.dtype),
        "device": denoiser.device.type,
        "attention": denoiser.attention,
        "loras": [lora.identity for lora in denoiser.loras],
    }


def identify_checkpoint(folder: Path) -> str:
    """Tells the weights of the denoiser from others, wherever they lie: by size and PROBES stretches of every file."""
    digest = hashlib.sha256()
    for file in (file for part in FOLDERS.values() for file in weight_files(open_component(folder, part).folder)):
        size = file.stat().st_size
        with file.open("rb") as stream:
            digest.update(f"{file.name} {size}".encode())
            for start in range(0, size, max(PROBE, size // PROBES)):
                stream.seek(start)
                digest.update(stream.read(PROBE))
    return digest.hexdigest()
