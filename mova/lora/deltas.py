"""What a LoRA adds to a weight: low rank, Hadamard (LoHa), Kronecker (LoKr), plain differences; with DoRA's magnitudes or without.

A weight is a matrix here, [out, everything else]. Deltas are computed in float32, a stretch of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Roles = Mapping[str, Tensor]

# Elements of a weight that are changed at a time: what a CPU core has in its cache, what keeps a GPU busy.
PIECE = {"cpu": 2**18}
PIECE_OF_OTHERS = 2**24


@dataclass(frozen=True)
class Delta:
    """One tensor's change: scale * (what `tensors` of this kind multiply to), or DoRA's change of length on top."""

    kind: str
    tensors: dict[str, Tensor]  # by role, each a matrix; "magnitude" makes it a DoRA
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix it is added to."""
        return KINDS[self.kind].shape(self.tensors)

    @property
    def rank(self) -> int | None:
        return KINDS[self.kind].rank(self.tensors)

    @property
    def decomposed(self) -> bool:
        return "magnitude" in self.tensors


# ---------------------------------------------------------------- kinds


def low_rank_rows(roles: Roles, rows: slice) -> Tensor:
    return roles["up"][rows].float() @ roles["down"].float()


def hadamard_rows(roles: Roles, rows: slice) -> Tensor:
    first, second = (roles[f"{name}_a"][rows].float() @ roles[f"{name}_b"].float() for name in ("w1", "w2"))
    return first.mul_(second)


def kronecker_rows(roles: Roles, rows: slice) -> Tensor:
    """Rows of kron(w1 [a, b], w2 [c, d]): row i*c + j is w1[i] times w2[j]."""
    first, second = kronecker_sides(roles)
    numbers = torch.arange(*rows.indices(len(first) * len(second)), device=first.device)
    left, right = first[numbers // len(second)], second[numbers % len(second)]  # [n, b], [n, d]
    return (left[:, :, None] * right[:, None, :]).flatten(1)


def kronecker_sides(roles: Roles) -> list[Tensor]:
    """w1 and w2, each stored whole or as a product of two."""
    return [roles[name].float() if name in roles else roles[f"{name}_a"].float() @ roles[f"{name}_b"].float() for name in ("w1", "w2")]


def full_rows(roles: Roles, rows: slice) -> Tensor:
    return roles["full"][rows].to(torch.float32, copy=True)


def kronecker_shape(roles: Roles) -> tuple[int, int]:
    heights = [len(roles.get(name, roles.get(f"{name}_a"))) for name in ("w1", "w2")]
    widths = [roles.get(name, roles.get(f"{name}_b")).shape[1] for name in ("w1", "w2")]
    return heights[0] * heights[1], widths[0] * widths[1]


@dataclass(frozen=True)
class Kind:
    """How deltas of a kind are computed; `products` are the pairs of roles that are multiplied, [n, r] by [r, m]."""

    rows: Callable[[Roles, slice], Tensor]
    shape: Callable[[Roles], tuple[int, int]]
    products: tuple[tuple[str, str], ...] = ()

    def rank(self, roles: Roles) -> int | None:
        return next((roles[right].shape[0] for _, right in self.products if right in roles), None)


KINDS = {
    "low rank": Kind(low_rank_rows, lambda roles: (len(roles["up"]), roles["down"].shape[1]), (("up", "down"),)),
    "LoHa": Kind(hadamard_rows, lambda roles: (len(roles["w1_a"]), roles["w1_b"].shape[1]), (("w1_a", "w1_b"), ("w2_a", "w2_b"))),
    "LoKr": Kind(kronecker_rows, kronecker_shape, (("w1_a", "w1_b"), ("w2_a", "w2_b"))),
    "difference": Kind(full_rows, lambda roles: tuple(roles["full"].shape)),
}

# ---------------------------------------------------------------- sums


@dataclass(frozen=True)
class Change:
    """A delta as loudly as it is wanted."""

    delta: Delta
    strength: float


def change_rows(change: Change, roles: Roles, base: Tensor, rows: slice) -> Tensor:
    """What a change adds to rows of a weight, float32; `roles` are the delta's tensors where the weight is, base [rows, in] float32."""
    delta, found = change.delta, KINDS[change.delta.kind].rows(roles, rows)
    if not delta.decomposed:
        return found.mul_(delta.scale * change.strength)
    wanted = found.mul_(delta.scale).add_(base)
    magnitude = roles["magnitude"].float()  # [out, 1], or [1, in] where columns are decomposed
    by_row = len(magnitude) == delta.shape[0]
    length = torch.linalg.vector_norm(wanted, dim=1 if by_row else 0, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return wanted.div_(length).mul_(magnitude[rows] if by_row else magnitude).sub_(base).mul_(change.strength)  # in this order a row of zeros stays one


def merge(weight: Tensor, changes: Sequence[tuple[Change, Roles]]) -> None:
    """Adds the changes to a weight in place: their sum in float32, added in float32, rounded once. Contiguous, on any device."""
    matrix, changes = weight.view(len(weight), -1), widen(changes)
    for rows in row_pieces(matrix, changes):
        base = matrix[rows].float()
        matrix[rows] = add_up(changes, base, rows).add_(base)


def sum_changes(changes: Sequence[tuple[Change, Roles]], base: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of the changes alone, in `dtype`; base: the weight, [out, in] float32."""
    whole, changes = torch.empty_like(base, dtype=dtype), widen(changes)
    for rows in row_pieces(whole, changes):
        whole[rows] = add_up(changes, base[rows], rows)
    return whole


def widen(changes: Sequence[tuple[Change, Roles]]) -> list[tuple[Change, Roles]]:
    """Factors in float32 once, not for every piece of the weight; a difference is as large as the weight and converted piece by piece."""
    return [(change, {role: tensor if role == "full" else tensor.float() for role, tensor in roles.items()}) for change, roles in changes]


def add_up(changes: Sequence[tuple[Change, Roles]], base: Tensor, rows: slice) -> Tensor:
    (first, roles), *others = changes
    total = change_rows(first, roles, base, rows)
    for change, roles in others:
        total.add_(change_rows(change, roles, base, rows))
    return total


def row_pieces(matrix: Tensor, changes: Sequence[tuple[Change, Roles]]) -> Iterator[slice]:
    """Stretches of rows; all rows at once where a change needs whole columns."""
    count, width = matrix.shape
    if any(change.delta.decomposed and len(roles["magnitude"]) != count for change, roles in changes):
        yield slice(0, count)
        return
    step = max(1, PIECE.get(matrix.device.type, PIECE_OF_OTHERS) // width)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))
