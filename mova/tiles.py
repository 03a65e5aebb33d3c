"""A large picture in overlapping tiles: where they lie, how they are joined without seams, and when they are needed.

The layout and the blending are those of diffusers' `tiled_decode`, so tiled results agree with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from .errors import InputError

TILE, STRIDE = 256, 192  # px
WORKSPACE = 1.2  # what convolutions take for themselves on top of the tensors
MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class Tiles:
    """Overlapping squares over a picture of `height` x `width` cells (latent pixels), row by row; one tile covers a picture that fits in it."""

    height: int
    width: int
    tile: int
    stride: int

    @property
    def rows(self) -> range:
        return self._starts(self.height)

    @property
    def columns(self) -> range:
        return self._starts(self.width)

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    def cut(self, x: torch.Tensor, scale: int) -> Iterator[torch.Tensor]:
        """The tiles of x [..., height*scale, width*scale] as views."""
        size = self.tile * scale
        for top in self.rows:
            for left in self.columns:
                yield x[..., top * scale : top * scale + size, left * scale : left * scale + size]

    def join(self, pieces: Iterable[torch.Tensor], scale: int) -> torch.Tensor:
        """The picture [..., height*scale, width*scale] from its tiles, which are consumed one by one and written to."""
        pieces, overlap, kept = iter(pieces), (self.tile - self.stride) * scale, self.stride * scale
        if len(self) == 1:
            return next(pieces)
        above: list[torch.Tensor] = []
        joined = []
        for _ in self.rows:
            row: list[torch.Tensor] = []
            for j in range(len(self.columns)):
                piece = next(pieces)
                if above:
                    blend(above[j], piece, overlap, dim=-2)
                if row:
                    blend(row[-1], piece, overlap, dim=-1)
                row.append(piece)
            joined.append(torch.cat([piece[..., :kept, :kept] for piece in row], dim=-1))
            above = row
        return torch.cat(joined, dim=-2)

    def _starts(self, size: int) -> range:
        whole = self.height <= self.tile and self.width <= self.tile
        return range(1) if whole else range(0, size, self.stride)


def blend(before: torch.Tensor, after: torch.Tensor, extent: int, dim: int) -> None:
    """Fades the end of `before` linearly into the start of `after` (in place) over `extent` pixels along `dim`."""
    extent = min(before.shape[dim], after.shape[dim], extent)
    weight = torch.arange(extent, dtype=torch.float64, device=after.device).div(extent)
    weight = weight.view(-1, *[1] * (-dim - 1))
    start = after.narrow(dim, 0, extent)
    start.copy_(before.narrow(dim, before.shape[dim] - extent, extent) * (1 - weight).float() + start * weight.float())


def choose_tiles(tiling: str | tuple[int, int], height: int, width: int, *, cell: int, peak: float, device: torch.device) -> Tiles:
    """Tiles for a picture of `height` x `width` pixels and cells of `cell` pixels.

    tiling: "off"; "on" (256 px tiles, one every 192 px); "auto" (on when `peak` bytes do not fit the free memory of the device);
    or (tile, stride) in pixels. InputError for anything else.
    """
    if tiling == "auto":
        free = free_memory(device)
        tiling = "on" if free is not None and peak * WORKSPACE > free else "off"
    if tiling == "off":
        return Tiles(height // cell, width // cell, max(height, width) // cell, max(height, width) // cell)
    tile, stride = (TILE, STRIDE) if tiling == "on" else check_tiling(tiling, cell)
    return Tiles(height // cell, width // cell, tile // cell, stride // cell)


def check_tiling(tiling: str | tuple[int, int], cell: int) -> tuple[int, int]:
    match tiling:
        case (int(tile), int(stride)) if 0 < stride <= tile and tile % cell == stride % cell == 0:
            return tile, stride
    raise InputError(f"tiling is {tiling!r}: give 'auto', 'on', 'off', or (tile, stride) in pixels, multiples of {cell} with stride no larger than tile.")


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on the device, None where that is not known."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "cpu" and MEMINFO.is_file():
        fields = dict(line.split(":", 1) for line in MEMINFO.read_text(encoding="ascii").splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None
    return None
