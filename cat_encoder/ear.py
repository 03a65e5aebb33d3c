"""Listening: sound in, features, tags and scores over time out (spec/cat.md 4, 5)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import Checkpoint, read_checkpoint
from .config import Architecture
from .errors import CatError
from .frontend import FRAMES, HOP, RATE
from .trunk import Encoded, move
from .windows import Window, count_windows, cut_windows

BATCH = 8  # windows that go through the encoder at once; on a CPU only as many as make 10 s together, whose maps stay in its caches
CHUNK = 20  # s of a long waveform that are prepared at once
FRAME_RATE = RATE // HOP  # log-mel frames a second

OnStep = Callable[[int, int], None]  # windows done, windows in all; what it raises stops the work and goes through


@dataclass
class Features:
    """What the encoder makes of a sound, or of one window of it.

    tokens [B,1+N,D]: index 0 is the class token, then columns of `bands` tokens from low to high, one column for each `column_seconds` (0.16 s).
    sounding: columns that hold sound; the others, of a clip shorter than the trained window (10.24 s), are padding the encoder expects.
    start: where the first column begins, s. layers: per block its MLP output, shaped like tokens; empty unless asked for.
    """

    tokens: Tensor
    bands: int
    sounding: int
    column_seconds: float = 0.16
    start: float = 0.0
    layers: tuple[Tensor, ...] = ()

    @property
    def utterance(self) -> Tensor:
        """[B,D]: the class token; of a sound of several windows their mean, weighted by the time each adds."""
        return self.tokens[:, 0]

    @property
    def columns(self) -> Tensor:
        """[B,N/bands,D]: the mean of each column's bands, 6.25 a second. Those from `sounding` on are padding."""
        return self.tokens[:, 1:].unflatten(1, (-1, self.bands)).mean(2)


@dataclass
class Heard:
    """The logits [B,classes] of one window of a sound: from `start` on for `seconds`, of which `fresh` are in no window before it."""

    start: float
    seconds: float
    fresh: float
    logits: Tensor


class Encoder:
    """A loaded CAT, EAT or SSLAM. Made by `load`; in eval mode, without gradients."""

    def __init__(self, checkpoint: Checkpoint, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.trunk, self.head = checkpoint.build(dtype)
        self.labels, self.frames, self.normalisation = checkpoint.labels, checkpoint.frames, checkpoint.normalisation
        self.single_label, self.origin = checkpoint.single_label, checkpoint.origin
        self.to(device=device)

    @property
    def architecture(self) -> Architecture:
        return self.trunk.architecture

    @property
    def has_head(self) -> bool:
        return self.head is not None

    @property
    def device(self) -> torch.device:
        return self.trunk.class_token.device

    @property
    def dtype(self) -> torch.dtype:
        return self.trunk.class_token.dtype

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Encoder:
        """Moves this encoder; the front end stays in float32 on the CPU. CatError when the device is not there or is full."""
        for module in (self.trunk, self.head) if self.head else (self.trunk,):
            move(module, device, dtype)
        return self

    def features(self, waveform: Tensor, sample_rate: int, *, layers: bool = False, on_step: OnStep | None = None) -> Features:
        """waveform [B,C,S], floats in -1..1 at any rate from 1 kHz, at least 25 ms -> Features in the encoder's dtype and on its device.

        Up to 10.24 s (what the encoder was trained on) one window, padded; longer sound by windows, without overlap but for the last, which ends with the sound.
        CatError for NaN, integers, too short or misshapen sound.
        """
        windows = self.whole_windows(waveform, sample_rate, on_step)
        return join_features([self.new_features(window, self.encode(window.mel, layers=layers)) for window in windows])

    def stream(self, chunks: Iterable[Tensor], sample_rate: int, *, layers: bool = False) -> Iterator[Features]:
        """Chunks [B,C,S'] of a sound of any length, one after another -> Features of each window with the columns that are new in it, in constant memory."""
        for window in cut_windows(chunks, sample_rate, self.frames, self.frames, self.normalisation, self.architecture.patch):
            yield self.new_features(window, self.encode(window.mel, layers=layers))

    def logits(self, waveform: Tensor, sample_rate: int, *, on_step: OnStep | None = None) -> Tensor:
        """waveform [B,C,S] -> [B,classes] float32 over the whole sound: the mean over its windows, weighted by the time each adds. CatError without a head."""
        self.require_head()
        return mean_logits([self.hear(window) for window in self.whole_windows(waveform, sample_rate, on_step)])

    def stream_logits(self, chunks: Iterable[Tensor], sample_rate: int) -> Iterator[Heard]:
        """Chunks [B,C,S'] of a sound of any length, one after another -> the logits of each window, in constant memory. CatError without a head."""
        self.require_head()
        for window in cut_windows(chunks, sample_rate, self.frames, self.frames, self.normalisation, self.architecture.patch):
            yield self.hear(window)

    def hear(self, window: Window) -> Heard:
        return Heard(window.start / FRAME_RATE, window.sound / FRAME_RATE, window.fresh / FRAME_RATE, self.classify(window.mel))

    def tags(self, waveform: Tensor, sample_rate: int, top_k: int = 10) -> list[list[tuple[str, float]]]:
        """Per clip the `top_k` likeliest classes of the whole sound as (label, score 0..1), likeliest first. Scores are not calibrated: compare ranks."""
        return self.top_tags(self.logits(waveform, sample_rate), top_k)

    def top_tags(self, logits: Tensor, top_k: int = 10) -> list[list[tuple[str, float]]]:
        """logits [B,classes] -> as `tags`."""
        if top_k < 1:
            raise CatError(f"top_k is {top_k}: at least 1 tag has to be asked for.")
        found = self.probabilities(logits).topk(min(top_k, len(self.labels)))
        return [[(self.labels[i], score) for i, score in zip(*row, strict=True)] for row in zip(found.indices.tolist(), found.values.tolist(), strict=True)]

    def scores_over_time(
        self, waveform: Tensor, sample_rate: int, window: float = 2.0, hop: float = 1.0, *, on_step: OnStep | None = None
    ) -> tuple[Tensor, Tensor]:
        """waveform [B,C,S] -> (scores [B,W,classes] 0..1, starts [W] in s) of windows of `window` s (rounded up to whole columns) every `hop` s.

        The last window ends with the sound. Windows are read at their own length, not padded to the trained one. CatError without a head.
        """
        self.require_head()
        patch, longest = self.architecture.patch, self.architecture.max_frames / FRAME_RATE
        if not 0.01 <= hop <= window <= longest:
            raise CatError(f"Windows of {window} s every {hop} s cannot be made: 0.01 <= hop <= window <= {longest:.2f} is needed.")
        frames = min(math.ceil(round(window * FRAME_RATE, 3) / patch) * patch, self.architecture.max_frames)
        windows = self.cut(waveform, sample_rate, frames, round(hop * FRAME_RATE), on_step, pad=False)
        starts, scores, batch = [], [], []
        for each in windows:
            starts.append(each.start / FRAME_RATE)
            batch.append(each.mel)
            if len(batch) * len(each.mel) >= BATCH:
                scores.append(self.score(batch))
                batch = []
        scores += [self.score(batch)] if batch else []
        return torch.cat(scores, 1), torch.tensor(starts)

    def score(self, mels: list[Tensor]) -> Tensor:
        """Windows [B,1,T,128] of one length -> [B,W,classes] 0..1."""
        return self.probabilities(self.classify(torch.cat(mels))).unflatten(0, (len(mels), -1)).transpose(0, 1)

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1) if self.single_label else logits.sigmoid()

    def whole_windows(self, waveform: Tensor, sample_rate: int, on_step: OnStep | None) -> Iterator[Window]:
        return self.cut(waveform, sample_rate, self.frames, self.frames, on_step)

    def cut(self, waveform: Tensor, sample_rate: int, frames: int, step: int, on_step: OnStep | None, pad: bool = True) -> Iterator[Window]:
        """Windows of a waveform; on_step hears of each when it has been dealt with."""
        windows = cut_windows(split_waveform(waveform, sample_rate), sample_rate, frames, step, self.normalisation, self.architecture.patch, pad)
        for done, window in enumerate(windows, 1):
            yield window
            if on_step:
                on_step(done, count_windows(waveform.shape[-1], sample_rate, frames, step))

    @torch.no_grad()
    def encode(self, mel: Tensor, *, layers: bool = False) -> Encoded:
        """Normalised log-mel [B,1,T,128] -> Encoded."""
        at_once = max(1, FRAMES // mel.shape[2]) if self.device.type == "cpu" else BATCH
        parts = [self.trunk(part.to(self.device, self.dtype), layers=layers) for part in mel.split(at_once)]
        if len(parts) == 1:
            return parts[0]
        return Encoded(
            torch.cat([part.tokens for part in parts]), [torch.cat(results) for results in zip(*(part.layer_results for part in parts), strict=True)]
        )

    @torch.no_grad()
    def classify(self, mel: Tensor) -> Tensor:
        """Normalised log-mel [B,1,T,128] -> logits [B,classes] float32."""
        return self.head(self.encode(mel).tokens).float()

    def new_features(self, window: Window, encoded: Encoded) -> Features:
        patch, bands = self.architecture.patch, self.architecture.bands
        columns = window.mel.shape[2] // patch
        seen = (
            columns - math.ceil(window.fresh / patch) if window.start else 0
        )  # columns at the front that a window before had; padding stays only with the first
        rows = [tensor if not seen else torch.cat([tensor[:, :1], tensor[:, 1 + seen * bands :]], 1) for tensor in (encoded.tokens, *encoded.layer_results)]
        start = (window.start + seen * patch) / FRAME_RATE
        return Features(rows[0], bands, math.ceil(window.sound / patch) - seen, patch / FRAME_RATE, start, tuple(rows[1:]))

    def require_head(self) -> None:
        if not self.has_head:
            raise CatError(f"This encoder ({self.origin}) has no head for tags: load a fine-tuned one, such as EAT or SSLAM fine-tuned on AudioSet.")


def mean_logits(heard: list[Heard]) -> Tensor:
    """[B,classes] of a whole sound: the mean over its windows, weighted by the time each adds."""
    return sum(each.fresh * each.logits for each in heard) / sum(each.fresh for each in heard)


def join_features(parts: list[Features]) -> Features:
    if len(parts) == 1:
        return parts[0]
    weights = [part.sounding / sum(each.sounding for each in parts) for part in parts]

    def join(tensors: list[Tensor]) -> Tensor:
        whole = sum(weight * tensor[:, :1] for weight, tensor in zip(weights, tensors, strict=True))
        return torch.cat([whole, *(tensor[:, 1:] for tensor in tensors)], 1)

    layers = tuple(join(list(tensors)) for tensors in zip(*(part.layers for part in parts), strict=True))
    return Features(join([part.tokens for part in parts]), parts[0].bands, sum(part.sounding for part in parts), parts[0].column_seconds, 0.0, layers)


def split_waveform(waveform: Tensor, sample_rate: int) -> Iterable[Tensor]:
    """A waveform in pieces, so that a long one is never resampled as a whole."""
    whole = not isinstance(waveform, Tensor) or waveform.ndim != 3 or not sample_rate >= 1  # the front end says what is wrong with it
    return [waveform] if whole else waveform.split(int(CHUNK * sample_rate), -1)


def load(path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, weights: str = "student") -> Encoder:
    """A CAT, EAT or SSLAM checkpoint as an Encoder.

    path: .pt as the trainers write it, released .safetensors, a hub folder, or a file from `convert`. weights: student, or teacher where the file has one.
    CatError, in a sentence, for any other file, and for tensors that are missing, unknown, misshapen or not finite.
    """
    return Encoder(read_checkpoint(path, weights), device, dtype)
