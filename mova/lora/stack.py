"""LoRAs on weights that have just arrived: their factors travel with a layer and are added to it on the device.

A slab holds, beside the tensors of a layer, the factors of what changes them ("video.ffn.0.weight~0.down"), read with the
layer like the rest of it. Once both are there the changes are merged into the weights, or, where those have 8 bits, become
side branches. The files and whatever else reads them never see it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from ..fp8 import FP8, Side
from ..reading import Held
from .deltas import Change, Roles, merge, sum_changes
from .matching import Changes, LoadedLora

LayerChanges = Mapping[str, list[Change]]  # of one layer, by the name a tensor has in a slab


def stack_changes(loras: Iterable[LoadedLora]) -> Changes:
    """The changes of all LoRAs by part and tensor; parts without any are left out."""
    stacked: Changes = {}
    for lora in loras:
        for part, tensors in lora.changes.items():
            for name, changes in tensors.items():
                stacked.setdefault(part, {}).setdefault(name, []).extend(changes)
    return stacked


def factor_name(name: str, number: int, role: str) -> str:
    return f"{name}~{number}.{role}"


def list_factors(layer: LayerChanges) -> dict[str, Held]:
    """The factors of a layer's changes by their name in a slab."""
    return {
        factor_name(name, number, role): Held(tensor)
        for name, changes in layer.items()
        for number, change in enumerate(changes)
        for role, tensor in change.delta.tensors.items()
    }


def adapt_layer(layer: LayerChanges, weights: Mapping[str, Tensor], filled: Collection[str], dtype: torch.dtype) -> dict[str, tuple[Side, ...]]:
    """Changes those of a layer's weights that have just been filled, in place; returns the side branches of 8-bit ones by linear.

    `weights` holds the factors, too. dtype: what is computed in.
    """
    sides: dict[str, tuple[Side, ...]] = {}
    for name, changes in layer.items():
        if name in filled:
            here = [(change, {role: weights[factor_name(name, n, role)] for role in change.delta.tensors}) for n, change in enumerate(changes)]
            if weights[name].dtype == FP8:
                sides[name.removesuffix(".weight")] = tuple(branch_off(weights, name, change, roles, dtype) for change, roles in here)
            else:
                merge(weights[name], here)
    return sides


def branch_off(weights: Mapping[str, Tensor], name: str, change: Change, roles: Roles, dtype: torch.dtype) -> Side:
    """A change beside an 8-bit weight: two thin matrices where it is a product of such, one of the weight's size else."""
    if change.delta.kind == "low rank" and not change.delta.decomposed:
        scale = change.strength * change.delta.scale
        return roles["down"].to(dtype), roles["up"].float().mul(scale).to(dtype)
    base = weights[name].float() * weights[f"{name}_scale"][:, None]
    return (sum_changes([(change, roles)], base, dtype),)


def adapt_tensors(changes: LayerChanges, tensors: dict[str, Tensor]) -> None:
    """Replaces those tensors of a part, on any device, that LoRAs change."""
    for name in changes.keys() & tensors.keys():
        tensors[name] = tensors[name].clone(memory_format=torch.contiguous_format)  # it may be a view of the mapped file
        device = tensors[name].device
        merge(tensors[name], [(change, {role: tensor.to(device) for role, tensor in change.delta.tensors.items()}) for change in changes[name]])
