"""The outside encoder that pre-training is pulled towards: stored vectors, any callable, or a transformers audio model (spec/cat.md 6.4)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F

from ..errors import CatError
from ..frontend import RATE, load_torchaudio
from .clips import Clip

Describe = Callable[[torch.Tensor, int], torch.Tensor]  # (waveforms [B,S], sample rate) -> vectors [B,E]


class External(Protocol):
    """Clips and their waves (each [S] at 16 kHz) -> vectors [B,E] float32 on the CPU."""

    def __call__(self, clips: list[Clip], waves: list[torch.Tensor]) -> torch.Tensor: ...


class StoredVectors:
    """One vector per clip from a folder (<name>.npy or .safetensors) or one .safetensors file (one tensor per name).

    A name is the sound file's without suffix, or its folder's name, a slash and that. A clip's own `vector` comes first. place None: those alone.
    """

    def __init__(self, place: str | Path | None = None) -> None:
        self.place = Path(place) if place else None
        if self.place and not self.place.exists():
            raise CatError(f"{self.place} does not exist: give a folder of .npy or .safetensors vectors, or one .safetensors file.")
        self.table = read_safetensors(self.place) if self.place and self.place.is_file() else None
        self.width = 0

    def __call__(self, clips: list[Clip], waves: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([self.checked(clip, self.find(clip)) for clip in clips])

    def find(self, clip: Clip) -> torch.Tensor:
        if clip.vector:
            return read_vector(clip.vector)
        names = (f"{clip.path.parent.name}/{clip.path.stem}", clip.path.stem)
        if self.table is not None:
            found = next((self.table[name] for name in names if name in self.table), None)
        else:
            files = [self.place / f"{name}{suffix}" for name in names for suffix in (".npy", ".safetensors")] if self.place else []
            found = next((read_vector(file) for file in files if file.is_file()), None)
        if found is None:
            raise CatError(f"{self.place or 'The manifest'} has no vector for {clip.path}: {names[1]}.npy, or a tensor called {names[1]!r}, is needed.")
        return found

    def checked(self, clip: Clip, vector: torch.Tensor) -> torch.Tensor:
        vector = vector.float().squeeze()
        self.width = self.width or vector.numel()
        if list(vector.shape) != [self.width]:
            raise CatError(f"The vector of {clip.path} has the shape {list(vector.shape)}, others have {self.width} values: all must come from one encoder.")
        if not bool(vector.isfinite().all()):
            raise CatError(f"The vector of {clip.path} holds NaN or Inf: compute it again.")
        return vector


class ComputedVectors:
    """What a frozen encoder says of each clip, computed once per clip and kept. describe: (waveforms [B,S] at 16 kHz, 16000) -> [B,E]."""

    def __init__(self, describe: Describe) -> None:
        self.describe = describe
        self.known: dict[Path, torch.Tensor] = {}

    @torch.no_grad()
    def __call__(self, clips: list[Clip], waves: list[torch.Tensor]) -> torch.Tensor:
        for clip, wave in zip(clips, waves, strict=True):
            if clip.path not in self.known:  # one by one: clips differ in length, and padding would change the vector
                self.known[clip.path] = self.checked(clip, self.describe(wave[None], RATE))
        return torch.stack([self.known[clip.path] for clip in clips])

    def checked(self, clip: Clip, vectors: torch.Tensor) -> torch.Tensor:
        width = next(iter(self.known.values())).numel() if self.known else vectors.shape[-1]
        if list(vectors.shape) != [1, width] or not bool(vectors.isfinite().all()):
            raise CatError(f"The outside encoder made {list(vectors.shape)} of {clip.path}: one finite vector of {width} values, [1, {width}], is needed.")
        return vectors[0].float().cpu()


def transformers_encoder(folder: str | Path, device: str | torch.device = "cpu") -> Describe:
    """A saved transformers audio model (CLAP, AST, Wav2Vec2, Whisper, ...) as a callable: its own clip vector, else the mean of its last states.

    Read from disk alone; nothing is downloaded and no code of the folder runs.
    """
    from transformers import AutoFeatureExtractor, AutoModel

    if not (Path(folder) / "config.json").is_file():
        raise CatError(f"{folder} has no config.json: give the folder of a saved transformers audio model.")
    try:
        extractor = AutoFeatureExtractor.from_pretrained(folder, local_files_only=True)
        model = AutoModel.from_pretrained(folder, local_files_only=True).to(device).eval().requires_grad_(False)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:  # what transformers raises for unknown or damaged folders
        raise CatError(f"{folder} cannot be loaded as a transformers audio model ({str(error).splitlines()[0]}).") from None
    model = model.get_encoder() if model.config.is_encoder_decoder else model

    def describe(waveforms: torch.Tensor, rate: int) -> torch.Tensor:
        sound = waveforms if rate == extractor.sampling_rate else load_torchaudio("functional").resample(waveforms, rate, extractor.sampling_rate)
        inputs = extractor(list(sound.numpy()), sampling_rate=extractor.sampling_rate, return_tensors="pt").to(device)
        if hasattr(model, "get_audio_features"):
            found = model.get_audio_features(**inputs)
            return F.normalize(getattr(found, "pooler_output", found), dim=-1)
        found = model(**inputs)
        pooled = getattr(found, "pooler_output", None)
        return found.last_hidden_state.mean(1) if pooled is None else pooled

    return describe


def open_external(source: str | Path | Describe, device: str | torch.device = "cpu") -> External:
    """A path (vectors, or a transformers model folder, which computes on `device`) or a callable as the outside encoder."""
    if callable(source):
        return ComputedVectors(source)
    if (Path(source) / "config.json").is_file():
        return ComputedVectors(transformers_encoder(source, device))
    return StoredVectors(source)


def read_vector(file: Path) -> torch.Tensor:
    if file.suffix == ".safetensors":
        tensors = read_safetensors(file)
        if len(tensors) != 1:
            raise CatError(f"{file} holds {len(tensors)} tensors: one vector per file is needed here.")
        return next(iter(tensors.values()))
    import numpy

    try:
        return torch.from_numpy(numpy.load(file, allow_pickle=False)).float()
    except (OSError, ValueError, EOFError, TypeError) as error:
        raise CatError(f"{file} cannot be read as a .npy vector ({error}): compute it again.") from None


def read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise CatError(f"{file} cannot be read as safetensors ({error}): compute it again.") from None
