"""SyncNet: do the lips fit the sound, and if not, by how much (spec/lipsync.md A.1 to A.3). The weights are the user's syncnet_v2.model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from ..errors import InputError
from .face_crop import SIDE, Picture
from .mfcc import SAMPLE_RATE, cepstra
from .sync_decision import SyncScore, decide, window_distances
from .syncnet_weights import read_weights

WINDOW = 5  # frames of one lip embedding
COLUMNS, COLUMNS_PER_FRAME = 20, 4  # of cepstra: one sound embedding, 0.2 s, and 40 ms
SAMPLES_PER_FRAME = 640  # at 16 kHz and 25 frames per second
MIN_FRAMES = WINDOW + 1  # the last window that would fit is not looked at
CHUNK = 16  # windows embedded at once: 140 MB, whatever the length of the film

OnWindow = Callable[[int, int], None]  # (windows done, windows in all)


class SyncNetwork(nn.Module):
    """Both halves, with the checkpoint's names. Every layer of the lip half but the first looks at single frames."""

    def __init__(self) -> None:
        super().__init__()
        self.netcnnaud = nn.Sequential(
            *convolve2d(1, 64, 3, padding=1),
            nn.Identity(),  # keeps its place in the names
            *convolve2d(64, 192, 3, padding=1),
            nn.MaxPool2d(3, stride=(1, 2)),
            *convolve2d(192, 384, 3, padding=1),
            *convolve2d(384, 256, 3, padding=1),
            *convolve2d(256, 256, 3, padding=1),
            nn.MaxPool2d(3, stride=2),
            *convolve2d(256, 512, (5, 4)),
        )
        self.netfcaud = head()
        self.netcnnlip = nn.Sequential(
            *convolve3d(3, 96, (WINDOW, 7, 7), stride=2),
            nn.MaxPool3d((1, 3, 3), stride=(1, 2, 2)),
            *convolve3d(96, 256, (1, 5, 5), stride=2, padding=1),
            nn.MaxPool3d((1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)),
            *convolve3d(256, 256, (1, 3, 3), padding=1),
            *convolve3d(256, 256, (1, 3, 3), padding=1),
            *convolve3d(256, 256, (1, 3, 3), padding=1),
            nn.MaxPool3d((1, 3, 3), stride=(1, 2, 2)),
            *convolve3d(256, 512, (1, 6, 6)),
        )
        self.netfclip = head()

    def embed_sounds(self, windows: Tensor) -> Tensor:
        """[B,1,13,20] -> [B,1024]. Each window by itself: padding in time makes a column's values depend on where its window ends."""
        return self.netfcaud(self.netcnnaud(windows).flatten(1))

    def embed_lips(self, film: Tensor) -> Tensor:
        """[1,3,T+4,224,224], BGR in 0..255 -> [T,1024], every window of 5 frames in one pass."""
        return self.netfclip(self.lip_features(film))

    def lip_features(self, film: Tensor) -> Tensor:
        """As `embed_lips`, before the head: [T,512]."""
        return self.netcnnlip(film)[0, :, :, 0, 0].T

    def fold_norms(self) -> SyncNetwork:
        """Puts the normalisations into the weights before them: for inference, once the weights are in place."""
        for half in (self.netcnnaud, self.netfcaud, self.netcnnlip, self.netfclip):
            for i, norm in enumerate(half):
                if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
                    fuse = fuse_linear_bn_eval if isinstance(half[i - 1], nn.Linear) else fuse_conv_bn_eval
                    half[i - 1], half[i] = fuse(half[i - 1], norm), nn.Identity()
        return self


def convolve2d(inputs: int, outputs: int, kernel: int | tuple[int, int], padding: int = 0) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, kernel, padding=padding), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)


def convolve3d(inputs: int, outputs: int, kernel: tuple[int, int, int], stride: int = 1, padding: int = 0) -> tuple[nn.Module, ...]:
    """Stride and padding in space alone."""
    layer = nn.Conv3d(inputs, outputs, kernel, stride=(1, stride, stride), padding=(0, padding, padding))
    return layer, nn.BatchNorm3d(outputs), nn.ReLU(inplace=True)


def head() -> nn.Sequential:
    return nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(inplace=True), nn.Linear(512, 1024))


def load_syncnet(path: str | Path, device: str | torch.device = "cpu") -> SyncNet:
    """SyncNet with weights from safetensors or from the released pickle, which is read without running code. CheckpointError says what the file is instead."""
    with torch.device("meta"):
        network = SyncNetwork().eval()
    network.load_state_dict(read_weights(Path(path), network.state_dict()), assign=True)
    return SyncNet(network, device)


class SyncNet:
    """Scores films. network: with weights, in eval mode; it is changed here."""

    def __init__(self, network: SyncNetwork, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        network = network.requires_grad_(False).fold_norms().to(self.device)
        network.netcnnaud.to(memory_format=torch.channels_last)  # poolings are ten times as fast on the CPU
        network.netcnnlip.to(memory_format=torch.channels_last_3d)
        self.network = network

    def score(self, crops: Iterable[Picture], waveform: Tensor, *, on_window: OnWindow | None = None) -> SyncScore:
        """How well a mouth fits a sound.

        crops: uint8 [224,224,3] RGB at 25 frames per second (`to_25_fps`, `crop_faces`), taken one at a time; waveform: [S] in -1..1 at 16 kHz, beginning
        with the first crop. The longer of the two is cut. on_window(done, total) may raise to cancel; total is what the sound has room for where the
        number of crops is not known. InputError for fewer than 6 frames or 0.24 s, for silence, and for other values or shapes.
        """
        samples = to_16_bit(waveform)
        room = len(samples) // SAMPLES_PER_FRAME
        if room < MIN_FRAMES:
            raise InputError(f"The sound is {len(samples) / SAMPLE_RATE:.2f} s long: SyncNet needs at least 0.24 s, and judges well from some seconds on.")
        total = min(room, len(crops)) if isinstance(crops, Sized) else room

        def report(done: int) -> None:
            if on_window is not None:
                on_window(done, total - WINDOW)

        lips, sounds = self.embed(islice(crops, room), samples, report)
        return decide(window_distances(lips, sounds).cpu())

    def embed(self, crops: Iterable[Picture], samples: Tensor, on_window: Callable[[int], object]) -> tuple[Tensor, Tensor]:
        """(lips, sounds), [n,1024] each, of windows 0..n-1 where n is 5 less than the crops; 8 KB a window are all that grows with the film."""
        lips, sounds, done = [], [], 0
        for film in film_chunks(crops):
            lips.append(self.embed_lips(film))
            sounds.append(self.embed_sounds(samples, done, len(lips[-1])))
            done += len(lips[-1])
            on_window(done)
        return torch.cat(lips), torch.cat(sounds)

    @torch.no_grad()
    def embed_lips(self, film: Tensor) -> Tensor:
        """[T+4,224,224,3] uint8 RGB -> [T,1024], one for each window of 5 frames."""
        return self.network.embed_lips(film.to(self.device).flip(-1).float().permute(3, 0, 1, 2)[None])

    @torch.no_grad()
    def embed_sounds(self, samples: Tensor, first: int, count: int) -> Tensor:
        """Windows first..first+count-1 of a sound [S] in 16-bit units -> [count,1024]; window i begins with frame i."""
        columns = cepstra(samples, first * COLUMNS_PER_FRAME, (count - 1) * COLUMNS_PER_FRAME + COLUMNS).float()
        windows = columns.unfold(1, COLUMNS, COLUMNS_PER_FRAME)  # [13, count, 20]
        return self.network.embed_sounds(windows.movedim(1, 0)[:, None].to(self.device))


def film_chunks(crops: Iterable[Picture]) -> Iterator[Tensor]:
    """The film cut so that every window but the last is in one piece: [T+4,224,224,3] uint8, T up to 16. InputError for fewer than 6 crops."""
    held: deque[Tensor] = deque()
    taken = 0
    for crop in crops:
        taken += 1
        held.append(check_crop(crop))
        if len(held) == CHUNK + WINDOW:  # one more than the chunk needs: were it the last, its window would not count
            yield torch.stack(list(held)[:-1])
            for _ in range(CHUNK):
                held.popleft()
    if taken < MIN_FRAMES:
        raise InputError(f"The film has {taken} frames at 25 per second: SyncNet needs at least {MIN_FRAMES}, and judges well from some seconds on.")
    if len(held) > WINDOW:
        yield torch.stack(list(held)[:-1])


def check_crop(crop: Picture) -> Tensor:
    pixels = torch.as_tensor(crop)
    if pixels.dtype != torch.uint8 or pixels.shape != (SIDE, SIDE, 3):
        kind = str(pixels.dtype).removeprefix("torch.")
        raise InputError(f"A face crop is {kind} {list(pixels.shape)}: uint8 [{SIDE}, {SIDE}, 3] is needed, RGB. Make it with crop_faces.")
    return pixels


def to_16_bit(waveform: Tensor) -> Tensor:
    """A sound [S] in -1..1 as the whole numbers of 16-bit files, which SyncNet was trained on. InputError for silence and for what is no sound."""
    if waveform.ndim != 1 or not waveform.is_floating_point():
        kind = str(waveform.dtype).removeprefix("torch.")
        raise InputError(f"The sound is {kind} {list(waveform.shape)}: floats [samples] in -1..1 are needed, mono, 16 kHz.")
    if not waveform.isfinite().all():
        raise InputError("The sound holds values that are no numbers (NaN or infinite): check the step that made it.")
    samples = (waveform.detach().cpu().float() * 32768).round().clamp(-32768, 32767)
    if len(samples) and samples.min() == samples.max():
        raise InputError("The sound is silent: there is nothing that lips could follow. Connect the sound with the voice.")
    return samples
