"""The video VAE (Wan 2.1, diffusers' AutoencoderKLWan; spec/mova.md 3.10): film <-> latents, chunk by chunk.

The network is driven one latent frame at a time with feature caches of our own, so memory does not grow with the film,
a film that stands still is encoded no further than it has to be, and every tile of a large picture keeps its own caches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .checkpoint import Component, load_weights, open_component, read_config
from .errors import CheckpointError, InputError
from .image import check_pixels
from .latents import LatentSpace
from .tiles import Tiles, choose_tiles

OnChunk = Callable[[int, int], None]
Tiling = str | tuple[int, int]

# Peak bytes per picture pixel in bf16 at base_dim 96 (spec/performance.md 1.7: 10.4 and 6.9 GB at 720x1280).
DECODE_BYTES, ENCODE_BYTES, MEASURED_DIM = 11300, 7500, 96


@dataclass(frozen=True)
class VideoVAEConfig:
    """The part of video_vae/config.json that is used here; the defaults are the Wan 2.1 VAE's."""

    latents_mean: tuple[float, ...] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508, 0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )  # fmt: skip
    latents_std: tuple[float, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    )  # fmt: skip
    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)  # spelled as in the file
    scale_factor_temporal: int = 4
    scale_factor_spatial: int = 8
    patch_size: int | None = None

    @property
    def space(self) -> LatentSpace:
        return LatentSpace(self.latents_mean, self.latents_std, self.scale_factor_temporal)

    def decode_bytes(self, height: int, width: int, itemsize: int) -> int:
        """Peak memory of decoding a film of height x width pixels without tiles, of any length; itemsize: bytes per weight."""
        return self._peak_bytes(DECODE_BYTES, height, width, itemsize)

    def encode_bytes(self, height: int, width: int, itemsize: int) -> int:
        """As `decode_bytes`, of encoding."""
        return self._peak_bytes(ENCODE_BYTES, height, width, itemsize)

    def _peak_bytes(self, bytes_per_pixel: int, height: int, width: int, itemsize: int) -> int:
        return bytes_per_pixel * height * width * itemsize * self.base_dim // (2 * MEASURED_DIM)


class FeatureCache(dict[int, Any]):
    """What the causal convolutions of one tile remember between chunks; a convolution without a past reads None.

    `still` starts as the caller sets it and turns False at the first entry that a chunk leaves different (bit for bit):
    if it survives a chunk, the same chunk again would give the same result again.
    """

    still = False

    def __missing__(self, key: int) -> None:
        return None

    def __setitem__(self, key: int, value: Any) -> None:
        if self.still:  # compared one by one here, so that old and new caches never exist both in full
            self.still = torch.equal(self[key], value)
        super().__setitem__(key, value)

    def move(self, device: torch.device | str) -> None:
        self.update({key: value.to(device) for key, value in self.items() if isinstance(value, torch.Tensor)})


class VideoVAE:
    """AutoencoderKLWan behind pictures in 0..1, channel last, and latents [B,16,T,h,w]. Results are float32 on the CPU."""

    def __init__(self, network: torch.nn.Module, config: VideoVAEConfig):
        self.network = network
        self.config = config
        self.space = config.space
        self.latent_channels = config.z_dim
        self.temporal_compression = config.scale_factor_temporal
        self.spatial_compression = config.scale_factor_spatial

    @property
    def device(self) -> torch.device:
        return self.network.post_quant_conv.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.network.post_quant_conv.weight.dtype

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> VideoVAE:
        """Moves the weights; returns itself."""
        # not the network's own `to`: diffusers logs a warning about an empty list of float32 modules there
        torch.nn.Module.to(self.network, device=device or self.device, dtype=dtype or self.dtype)
        return self

    def normalize(self, latents: torch.Tensor) -> torch.Tensor:
        """VAE space -> the space the denoiser works in, float32 [B,16,T,h,w]."""
        return self.space.normalize(latents)

    def denormalize(self, latents: torch.Tensor) -> torch.Tensor:
        """The denoiser's space -> VAE space, float32 [B,16,T,h,w]."""
        return self.space.denormalize(latents)

    def encode_bytes(self, height: int, width: int) -> int:
        """Memory to have free on the device before a film of height x width pixels is encoded without tiles."""
        return self.config.encode_bytes(height, width, self.dtype.itemsize)

    def decode_bytes(self, height: int, width: int) -> int:
        """As `encode_bytes`, before decoding."""
        return self.config.decode_bytes(height, width, self.dtype.itemsize)

    def encode(self, images: torch.Tensor, *, tiling: Tiling = "auto", on_chunk: OnChunk | None = None) -> torch.Tensor:
        """A film [F,H,W,3] in 0..1 -> latents [1,16,T,h,w] in VAE space (the posterior's mode).

        F is 4n+1, H and W are multiples of 8, else InputError. tiling: "auto" | "on" | "off" | (tile, stride) in pixels.
        on_chunk(done, total) runs after every latent frame; it stops the work by raising.
        """
        check_images(images, self.temporal_compression, self.spatial_compression)
        frames, height, width, _ = images.shape
        starts = [0, *range(1, frames, self.temporal_compression)]
        chunks = (images[start:end].movedim(-1, 0)[None].float() * 2 - 1 for start, end in zip(starts, [*starts[1:], frames], strict=True))
        return self.encode_chunks(chunks, num_frames=frames, height=height, width=width, tiling=tiling, on_chunk=on_chunk)

    def encode_chunks(
        self, chunks: Iterable[torch.Tensor], *, num_frames: int, height: int, width: int, tiling: Tiling = "auto", on_chunk: OnChunk | None = None
    ) -> torch.Tensor:
        """As `encode`, from pixels in -1..1 that may be made on the way: [1,3,1,H,W], then [1,3,4,H,W] again and again.

        When a chunk repeats the one before and leaves the caches as it found them, its repetitions give the same latent and are not computed.
        """
        tiles = self._tiles(self.encode_bytes(height, width), height, width, tiling)
        caches = [FeatureCache() for _ in range(len(tiles))]
        total = 1 + (num_frames - 1) // self.temporal_compression
        latents: list[torch.Tensor] = []
        previous, still = None, False
        try:
            for chunk in chunks:
                repeated = previous is not None and torch.equal(chunk, previous)
                if not (repeated and still):
                    for cache in caches:
                        cache.still = repeated
                    moments = self._run(self._encode_tile, tiles, caches, chunk, cut=self.spatial_compression, join=1)
                    latent, still, previous = moments[:, : self.latent_channels].float().cpu(), all(cache.still for cache in caches), chunk
                latents.append(latent)
                if on_chunk:
                    on_chunk(len(latents), total)
        finally:
            drop(caches)
        return torch.cat(latents, dim=2)  # [1, 16, T, h, w]

    def decode(self, latents: torch.Tensor, *, tiling: Tiling = "auto", on_chunk: OnChunk | None = None) -> torch.Tensor:
        """Latents [B,16,T,h,w] in VAE space -> frames [B*F,H,W,3] in 0..1, clip after clip; F = 4(T-1)+1. See `decode_stream`."""
        stream = self.decode_stream(latents, tiling=tiling, on_chunk=on_chunk)
        batch, _, length, height, width = latents.shape
        frames = batch * (self.temporal_compression * (length - 1) + 1)
        film = torch.empty(frames, height * self.spatial_compression, width * self.spatial_compression, 3)
        done = 0
        for chunk in stream:
            film[done : done + len(chunk)] = chunk
            done += len(chunk)
        return film

    def decode_stream(self, latents: torch.Tensor, *, tiling: Tiling = "auto", on_chunk: OnChunk | None = None) -> Iterator[torch.Tensor]:
        """As `decode`, one latent frame at a time: yields [1,H,W,3], then [4,H,W,3] again and again, for every clip.

        tiling: "auto" | "on" | "off" | (tile, stride) in pixels. on_chunk(done, total) runs after every latent frame; it stops the work by raising.
        InputError for latents of another shape or with values that are no numbers.
        """
        check_latents(latents, self.latent_channels)
        height, width = (side * self.spatial_compression for side in latents.shape[-2:])
        return self._decode_frames(latents, self._tiles(self.decode_bytes(height, width), height, width, tiling), on_chunk)

    def _decode_frames(self, latents: torch.Tensor, tiles: Tiles, on_chunk: OnChunk | None) -> Iterator[torch.Tensor]:
        batch, _, length, _, _ = latents.shape
        for clip in range(batch):
            caches = [FeatureCache() for _ in range(len(tiles))]
            try:
                for t in range(length):
                    frame = latents[clip : clip + 1, :, t : t + 1]
                    pixels = self._run(self._decode_tile, tiles, caches, frame, cut=1, join=self.spatial_compression)
                    pixels = pixels.clamp(-1, 1).mul(0.5).add(0.5).clamp(0, 1)  # in the decode dtype, as the reference does
                    chunk = pixels[0].movedim(0, -1).cpu().float()
                    if on_chunk:
                        on_chunk(clip * length + t + 1, batch * length)
                    yield chunk
            finally:
                drop(caches)

    @torch.no_grad()
    def _run(
        self,
        network: Callable[[torch.Tensor, FeatureCache], torch.Tensor],
        tiles: Tiles,
        caches: list[FeatureCache],
        chunk: torch.Tensor,
        *,
        cut: int,
        join: int,
    ) -> torch.Tensor:
        """One chunk through the network, tile by tile; the caches of the tiles that are not at work wait on the CPU."""
        parked = len(caches) > 1 and self.device.type != "cpu"
        chunk = chunk.to(self.device, self.dtype)

        def pieces() -> Iterator[torch.Tensor]:
            for tile, cache in zip(tiles.cut(chunk, cut), caches, strict=True):
                if parked:
                    cache.move(self.device)
                yield network(tile, cache)
                if parked:
                    cache.move("cpu")

        return tiles.join(pieces(), join)

    def _encode_tile(self, pixels: torch.Tensor, cache: FeatureCache) -> torch.Tensor:
        return self.network.quant_conv(self.network.encoder(pixels, feat_cache=cache, feat_idx=[0]))

    def _decode_tile(self, latent: torch.Tensor, cache: FeatureCache) -> torch.Tensor:
        first = not cache
        return self.network.decoder(self.network.post_quant_conv(latent), feat_cache=cache, feat_idx=[0], first_chunk=first)

    def _tiles(self, peak: int, height: int, width: int, tiling: Tiling) -> Tiles:
        return choose_tiles(tiling, height, width, cell=self.spatial_compression, peak=peak, device=self.device)


def load_video_vae(folder: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> VideoVAE:
    """Opens `folder/video_vae` of a MOVA checkpoint. dtype None = as stored. CheckpointError when it is not a Wan 2.1 VAE or incomplete."""
    network_class = import_network()
    component = open_component(folder, "video_vae")
    config = read_vae_config(component)
    with torch.device("meta"):
        network = network_class.from_config(component.config)
    load_weights(network, component)
    return VideoVAE(network.eval(), config).to(device, dtype)


def import_network() -> Any:
    """diffusers' AutoencoderKLWan. InputError when diffusers cannot be loaded, for whatever reason below it (which it tells as a RuntimeError)."""
    try:
        with torch.device("cpu"):  # also where networks are built on the meta device: torchaudio, imported on the way, needs its constants
            from diffusers import AutoencoderKLWan
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise InputError(
            f"The video VAE needs diffusers, which cannot be loaded ({reason}): pip install diffusers; if it is there, repair what it stumbles over, "
            "such as a torchaudio made for another version of torch."
        ) from None
    return AutoencoderKLWan


def open_latent_space(folder: str | Path) -> LatentSpace:
    """Reads `folder/video_vae/config.json` of a checkpoint; the weights stay closed. CheckpointError when it is not a Wan 2.1 VAE's."""
    return read_vae_config(open_component(folder, "video_vae")).space


def read_vae_config(component: Component) -> VideoVAEConfig:
    where = str(component.folder / "config.json")
    config = read_config(VideoVAEConfig, component.config, where)
    sizes = (config.base_dim, config.z_dim, config.num_res_blocks, config.scale_factor_temporal, config.scale_factor_spatial, *config.dim_mult)
    if min(sizes) < 1 or len(config.temperal_downsample) != len(config.dim_mult) - 1:
        raise CheckpointError(f"{where} describes no VAE (sizes {list(sizes)}, temperal_downsample {list(config.temperal_downsample)}): download it again.")
    if config.patch_size is not None:
        raise CheckpointError(f"{where} has patch_size {config.patch_size}: that is the Wan 2.2 5B VAE. MOVA works with the Wan 2.1 VAE (no patch_size).")
    if not len(config.latents_mean) == len(config.latents_std) == config.z_dim:
        raise CheckpointError(
            f"{where}: latents_mean and latents_std need {config.z_dim} values each (z_dim), they have {len(config.latents_mean)} and {len(config.latents_std)}."
        )
    return config


def check_images(images: torch.Tensor, temporal: int, spatial: int) -> None:
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
        raise InputError(f"The images are {list(images.shape)}: a film [F,H,W,3] in 0..1 is needed.")
    frames, height, width, _ = images.shape
    if (frames - 1) % temporal:
        lower = (frames - 1) // temporal * temporal + 1
        raise InputError(
            f"{frames} frames do not fit the video VAE, which takes 1 + {temporal}n: cut the film to {lower} or lengthen it to {lower + temporal}."
        )
    if height % spatial or width % spatial:
        raise InputError(f"The images are {height}x{width} pixels: height and width must be multiples of {spatial}. Crop or resize them.")
    check_pixels(images, "film")


def check_latents(latents: torch.Tensor, channels: int) -> None:
    if latents.ndim != 5 or latents.shape[1] != channels or 0 in latents.shape:
        raise InputError(f"The latents are {list(latents.shape)}: [B,{channels},T,h,w] is needed.")
    if not latents.isfinite().all():
        raise InputError("The latents hold values that are no numbers (NaN or infinite), so there is nothing to decode: check the sampling that made them.")


def drop(caches: list[FeatureCache]) -> None:
    """Frees the features even while an exception's traceback still holds the caches."""
    for cache in caches:
        cache.clear()
