"""The tensors of a LoRA file, layer by layer, as deltas: which kind, which scale, and whether they fit each other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import Tensor

from ..errors import LoraError
from .deltas import KINDS, Delta
from .files import LoraFile
from .keys import split_key, unread_kind

# What the tensors of a kind are called in split keys -> their role in a delta.
WANTED = {
    "low rank": {"up": "up", "down": "down"},
    "LoHa": {"hada_w1_a": "w1_a", "hada_w1_b": "w1_b", "hada_w2_a": "w2_a", "hada_w2_b": "w2_b"},
    "LoKr": {"lokr_w1": "w1", "lokr_w2": "w2"},
}
HALVES = ("_a", "_b")  # what a matrix of LoKr may be stored as instead
PLAIN = ("weight", "bias", "modulation")  # differences of one tensor of the layer
LARGEST = 1e38  # that a product of factors may reach: float32 ends at 3.4e38


@dataclass(frozen=True)
class Adapter:
    """What a file holds for one layer: changes by the tensor of the layer they belong to, and how their scale came about."""

    path: str  # as in the file
    changes: dict[str, list[Delta]] = field(repr=False)  # "weight" | "bias" | "modulation" ->
    scale: str = ""


def read_adapters(file: LoraFile, alpha: float | None) -> tuple[list[Adapter], list[str]]:
    """The adapters of a file, and the keys that are none. LoraError for tensors that do not belong together; alpha None = the file's."""
    layers, others = split_layers(file)
    return [read_adapter(file, path, roles, alpha) for path, roles in layers.items()], others


def split_layers(file: LoraFile) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """({path of a layer: {role: tensor}}, keys that are no adapter's)."""
    layers: dict[str, dict[str, Tensor]] = {}
    others: list[str] = []
    for key, tensor in file.tensors.items():
        if (kind := unread_kind(key)) is not None:
            raise LoraError(f"{file.path} holds {kind} ({key}), which is not read here: convert it to a plain LoRA, LoKr, LoHa or DoRA.")
        if (found := split_key(key)) is None:
            others.append(key)
            continue
        path, role = found
        if role in layers.setdefault(path, {}):
            raise LoraError(f"{file.path} holds two adapters for {path} ({key} is the second '{role}'): give a file with one.")
        layers[path][role] = tensor
    return layers, others


def read_adapter(file: LoraFile, path: str, roles: dict[str, Tensor], alpha: float | None) -> Adapter:
    changes: dict[str, list[Delta]] = {}
    scale, how = 1.0, ""
    for kind, tensors in find_factors(file, path, roles):
        check_factors(file, path, kind, tensors)
        rank = KINDS[kind].rank(tensors)
        scale, how = choose_scale(file, path, roles, rank, alpha)
        delta = Delta(kind, tensors | read_magnitude(file, path, roles, KINDS[kind].shape(tensors)), scale)
        check_size(file, path, delta)
        changes.setdefault("weight", []).append(delta)
    for name in PLAIN:
        if name in roles:
            changes.setdefault(name, []).append(Delta("difference", {"full": matrix(roles[name])}))
    if "up_bias" in roles:
        changes.setdefault("bias", []).append(Delta("difference", {"full": matrix(roles["up_bias"])}, scale))
    if not changes:
        raise LoraError(f"{file.path}: {path} has {' and '.join(sorted(roles))} but no weights: the file is incomplete or damaged.")
    return Adapter(path, changes, how)


def find_factors(file: LoraFile, path: str, roles: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(kind, its tensors as matrices by role) of every kind that the layer has. LoraError where one is incomplete."""
    for kind, wanted in WANTED.items():
        found: dict[str, Tensor] = {}
        lacking: list[str] = []
        for name, role in wanted.items():
            halves = {name + half: role + half for half in HALVES}
            if name in roles:
                found[role] = matrix(roles[name])
            elif kind == "LoKr" and halves.keys() <= roles.keys():
                found |= {to: matrix(roles[half]) for half, to in halves.items()}
            else:
                lacking.append(name)
        if found and lacking:
            raise LoraError(f"{file.path}: {path} has a '{next(iter(found))}' matrix but no '{lacking[0]}': the file is incomplete or damaged.")
        if found:
            yield kind, found


def matrix(tensor: Tensor) -> Tensor:
    """[out, everything else]; of a vector [n, 1]."""
    return tensor.reshape(len(tensor), -1) if tensor.ndim and tensor.numel() else tensor.reshape(-1, 1)


def read_magnitude(file: LoraFile, path: str, roles: dict[str, Tensor], shape: tuple[int, int]) -> dict[str, Tensor]:
    """DoRA's lengths, one for each row [out, 1] or each column [1, in]; empty where the layer has none."""
    if "magnitude" not in roles:
        return {}
    found = matrix(roles["magnitude"])
    if tuple(found.shape) not in ((shape[0], 1), (1, shape[1])):
        raise LoraError(f"{file.path}: the DoRA scale of {path} is {list(found.shape)}; {[shape[0], 1]} belongs to a delta of {list(shape)}.")
    return {"magnitude": found}


def choose_scale(file: LoraFile, path: str, roles: dict[str, Tensor], rank: int | None, alpha: float | None) -> tuple[float, str]:
    """(alpha / rank, where it comes from); 1.0 where nothing that can be trusted tells it (spec/mova.md 0.4)."""
    if rank is None:
        return 1.0, ""
    if alpha is not None:
        return alpha / rank, f"alpha {alpha:g}, as given"
    if "alpha" in roles:
        if roles["alpha"].numel() != 1:
            raise LoraError(f"{file.path}: alpha of {path} is {list(roles['alpha'].shape)}, one number is needed: the file is damaged.")
        return roles["alpha"].item() / rank, f"alpha {roles['alpha'].item():g}, in the file"
    if file.scaling is None:
        return 1.0, "1, as the file names no alpha; give alpha if you know it"
    if (factor := file.scaling.factor(rank)) is not None:
        return factor, f"alpha {file.scaling.alpha:g}, in the trainer's config"
    noted = f"rank {str(file.scaling.rank)[:40]}, alpha {str(file.scaling.alpha)[:40]}"
    return 1.0, f"1, as the trainer's config ({noted}) is not about these tensors (rank {rank}); give alpha if you know it"


def check_factors(file: LoraFile, path: str, kind: str, tensors: dict[str, Tensor]) -> None:
    """LoraError unless the matrices can be multiplied."""
    if empty := [role for role, tensor in tensors.items() if not tensor.numel()]:
        raise LoraError(f"{file.path}: '{empty[0]}' of {path} is empty: the file is damaged.")
    for left, right in KINDS[kind].products:
        if left in tensors and tensors[left].shape[1] != tensors[right].shape[0]:
            shapes = f"{list(tensors[left].shape)} by {list(tensors[right].shape)}"
            raise LoraError(f"{file.path}: the factors of {path} cannot be multiplied ({shapes}): the file is damaged.")
    if kind == "LoHa" and (tensors["w1_a"].shape[0], tensors["w1_b"].shape[1]) != (tensors["w2_a"].shape[0], tensors["w2_b"].shape[1]):
        raise LoraError(f"{file.path}: the two products of {path} differ in shape: the file is damaged.")


def check_size(file: LoraFile, path: str, delta: Delta) -> None:
    """LoraError for factors, each finite, whose product may not be."""
    reach = abs(delta.scale) * math.prod(float(tensor.abs().amax()) for role, tensor in delta.tensors.items() if role != "magnitude")
    for _, right in KINDS[delta.kind].products:
        reach *= len(delta.tensors[right]) if right in delta.tensors else 1
    if not reach < LARGEST:
        raise LoraError(f"{file.path}: the numbers of {path} are so large that their product is infinite. The training went wrong, or the file is damaged.")


def list_ranks(adapters: Iterable[Adapter]) -> list[int]:
    ranks = {delta.rank for adapter in adapters for deltas in adapter.changes.values() for delta in deltas}
    return sorted(rank for rank in ranks if rank is not None)


def list_kinds(adapters: Iterable[Adapter]) -> list[str]:
    """Kinds of adapters, such as ["LoKr", "DoRA", "difference"]."""
    deltas = [delta for adapter in adapters for deltas in adapter.changes.values() for delta in deltas]
    kinds = dict.fromkeys("LoRA" if delta.kind == "low rank" else delta.kind for delta in deltas)
    return [*kinds, *(["DoRA"] if any(delta.decomposed for delta in deltas) else [])]
