"""What the student sees of each clip: squares of visible cells on the token grid, drawn anew for every clone (spec/cat.md 6.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import CatError


@dataclass(frozen=True)
class MaskPlan:
    """How masks are drawn. share: of cells hidden, 0..1; extra: share added when squares are counted (they overlap); square: its side in cells."""

    share: float = 0.8
    extra: float = 0.07
    square: int = 5

    def visible_cells(self, cells: int) -> int:
        """How many of `cells` stay visible. CatError when all or none would."""
        visible = int(cells * (1 - self.share))
        if not 0 < visible < cells:
            raise CatError(f"A mask share of {self.share:g} leaves {visible} of {cells} cells visible: at least one must be hidden and one visible. Use 0.8.")
        return visible


@dataclass(frozen=True)
class Masks:
    """Masks of R rows (clip times clone) over a grid of h x w cells."""

    height: int
    width: int
    keep: torch.Tensor  # [R, V] int64, the visible cells' places t*w + f
    hide: torch.Tensor  # [R, M] int64, the masked cells' places

    @property
    def visible(self) -> torch.Tensor:
        """[R,1,h,w] float32, 1 = visible: what the stem multiplies with."""
        grid = torch.zeros(len(self.keep), self.height * self.width, device=self.keep.device)
        return grid.scatter_(1, self.keep, 1.0).view(-1, 1, self.height, self.width)

    @property
    def masked_cells(self) -> int:
        return self.hide.numel()

    def to(self, device: torch.device | str) -> Masks:
        return Masks(self.height, self.width, self.keep.to(device), self.hide.to(device))


def draw_masks(rows: int, height: int, width: int, plan: MaskPlan, generator: torch.Generator | None = None) -> torch.Tensor:
    """[rows, height*width] bool on the CPU, True = masked; every row hides equally many cells."""
    cells = height * width
    target = plan.visible_cells(cells)
    squares = int(cells * ((1 - plan.share + plan.extra) / plan.square**2))
    centres = torch.randint(0, cells, (rows, squares), generator=generator)
    visible = torch.zeros(rows, cells).scatter_(1, square_cells(centres, height, width, plan.square), 1.0)
    for row in visible:
        surplus = int(row.sum()) - target
        if surplus > 0:
            row[torch.multinomial(row, surplus, generator=generator)] = 0
        elif surplus < 0:
            row[torch.multinomial(1 - row, -surplus, generator=generator)] = 1
    return visible == 0


def square_cells(centres: torch.Tensor, height: int, width: int, square: int) -> torch.Tensor:
    """The places of the cells around each centre: [rows, n] -> [rows, n*square*square]; beyond the edge counts as the edge."""
    reach = torch.arange(square) - square // 2
    down = (centres // width)[..., None, None] + reach[:, None]
    across = (centres % width)[..., None, None] + reach
    return (down.clamp(0, height - 1) * width + across.clamp(0, width - 1)).flatten(1)


def split_cells(masked: torch.Tensor, height: int, width: int) -> Masks:
    """Rows of [rows, height*width] bool (True = masked) as places, in the order of the grid."""
    order = masked.byte().argsort(dim=1, stable=True)  # visible ones first
    visible = int((~masked[0]).sum())
    return Masks(height, width, order[:, :visible], order[:, visible:])
