"""Our VAEs as core nodes use a VAE: what goes over the native VAE socket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from ..mova.audio_vae import AudioVAE, AudioVAEConfig
from ..mova.checkpoint import open_component, read_config
from ..mova.video_vae import VideoVAE
from .host import ChunkProgress, check_cancel, intermediate_device, placed, vae_device


class VideoVAESocket:
    """The library's video VAE as core nodes use a VAE. Latents are in VAE space; results are new tensors, channel last."""

    def __init__(self, vae: VideoVAE, folder: Path) -> None:
        self.vae, self.folder = vae, folder
        self.latent_channels = vae.latent_channels
        self.temporal_compression, self.spatial_compression = vae.temporal_compression, vae.spatial_compression

    def decode(self, samples: Tensor, tiling: str | tuple[int, int] = "auto") -> Tensor:
        """[B, 16, T, h, w] -> [B, F, H, W, 3] in 0..1."""
        height, width = (side * self.spatial_compression for side in samples.shape[-2:])
        with placed(self.vae, self.vae.decode_bytes(height, width), vae_device()) as vae:
            film = vae.decode(samples, tiling=tiling, on_chunk=ChunkProgress())
        return film.unflatten(0, (samples.shape[0], -1)).to(intermediate_device())

    def decode_tiled(self, samples: Tensor, tile_x: int | None = None, tile_y: int | None = None, overlap: int | None = None, **_: Any) -> Tensor:
        """As `decode`, in square tiles of tile_x latents; time needs no tiles, one latent frame is decoded after another."""
        cell = self.spatial_compression
        return self.decode(samples, "on" if tile_x is None else fit_tiles(tile_x * cell, (overlap or 0) * cell, cell))

    def encode(self, pixels: Tensor, tiling: str | tuple[int, int] = "auto") -> Tensor:
        """[F, H, W, 3 or more] in 0..1 -> [1, 16, T, h, w]; what is beyond multiples of 8 px and 4n+1 frames is cut, as core does."""
        frames, height, width, _ = pixels.shape
        cell, group = self.spatial_compression, self.temporal_compression
        top, left = height % cell // 2, width % cell // 2
        film = pixels[: (frames - 1) // group * group + 1, top : top + height // cell * cell, left : left + width // cell * cell, :3]
        with placed(self.vae, self.vae.encode_bytes(height, width), vae_device()) as vae:
            return vae.encode(film, tiling=tiling, on_chunk=ChunkProgress()).to(intermediate_device())

    def encode_tiled(self, pixels: Tensor, tile_x: int | None = None, tile_y: int | None = None, overlap: int | None = None, **_: Any) -> Tensor:
        """As `encode`, in square tiles of tile_x pixels."""
        return self.encode(pixels, "on" if tile_x is None else fit_tiles(tile_x, overlap or 0, self.spatial_compression))

    def encode_chunks(self, chunks: Iterator[Tensor], *, height: int, width: int, **settings: Any) -> Tensor:
        """As `VideoVAE.encode_chunks`, on the VAE device."""
        with placed(self.vae, self.vae.encode_bytes(height, width), vae_device()) as vae:
            return vae.encode_chunks(chunks, height=height, width=width, **settings | {"on_chunk": ChunkProgress()})

    def audio_clock(self) -> AudioVAEConfig:
        """The rates of the sound that belongs to this checkpoint."""
        return read_audio_clock(self.folder)

    def spacial_compression_decode(self) -> int:  # core's spelling
        return self.spatial_compression

    def spacial_compression_encode(self) -> int:
        return self.spatial_compression

    def temporal_compression_decode(self) -> int:
        return self.temporal_compression

    def throw_exception_if_invalid(self) -> None:
        """A VAE that could be loaded is valid."""


class AudioVAESocket:
    """The library's audio VAE as core nodes use a VAE: sound [B, S, C] and latents [B, Ca, Ta]; results are new tensors."""

    def __init__(self, vae: AudioVAE) -> None:
        self.vae = vae
        self.latent_channels, self.audio_sample_rate = vae.latent_channels, vae.sample_rate

    def decode(self, samples: Tensor) -> Tensor:
        """[B, Ca, Ta] -> [B, S, 1]."""
        check_cancel()
        with placed(self.vae, self.vae.peak_bytes(samples.shape[0] * samples.shape[-1] * self.vae.hop), vae_device()) as vae:
            return vae.decode(samples).movedim(1, -1).to(intermediate_device())

    def encode(self, sound: Tensor, sample_rate: int | None = None) -> Tensor:
        """[B, S, C] -> [B, Ca, Ta]; sample_rate None = `audio_sample_rate`, which core resamples to before it calls."""
        check_cancel()
        with placed(self.vae, self.vae.peak_bytes(sound.shape[0] * sound.shape[1]), vae_device()) as vae:
            return vae.encode(sound.movedim(-1, 1), sample_rate or self.audio_sample_rate).to(intermediate_device())

    def decode_tiled(self, samples: Tensor, **_: Any) -> Tensor:
        """As `decode`: a clip's sound fits in memory whole."""
        return self.decode(samples)

    def encode_tiled(self, sound: Tensor, **_: Any) -> Tensor:
        return self.encode(sound)

    def audio_clock(self) -> AudioVAEConfig:
        return self.vae.config

    def spacial_compression_decode(self) -> int:
        return self.vae.hop

    def spacial_compression_encode(self) -> int:
        return self.vae.hop

    def temporal_compression_decode(self) -> None:
        """Core asks this of video VAEs."""

    def throw_exception_if_invalid(self) -> None:
        """A VAE that could be loaded is valid."""


def read_audio_clock(folder: Path) -> AudioVAEConfig:
    return read_config(AudioVAEConfig, open_component(folder, "audio_vae").config, "audio_vae/config.json")


def fit_tiles(tile: int, overlap: int, cell: int) -> tuple[int, int]:
    """(tile, stride) in pixels, multiples of `cell`, from a tile size and an overlap in pixels."""
    tile = max(tile // cell, 1) * cell
    return tile, max((tile - overlap) // cell, 1) * cell
