"""The weights the reference outputs of SyncNet were made with: a formula, so that 54 MB need not be stored (spec/lipsync.md A.5)."""

import math
import zlib

import numpy as np
import torch

from mova.lipsync.syncnet import SyncNetwork

WIDE = {"netcnnlip.1": 2e4, "netcnnaud.1": 2e2}  # variances of the first layers, whose inputs are raw pixels and cepstra


def mix32(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> 16)) * np.uint32(0x7FEB352D)
    values = (values ^ (values >> 15)) * np.uint32(0x846CA68B)
    return values ^ (values >> 16)


def draw(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers in -1..1 that depend on the name alone."""
    places = np.arange(math.prod(shape), dtype=np.uint32) * np.uint32(2654435761) + np.uint32(zlib.crc32(key.encode()))
    return (mix32(places).astype(np.float64) / 2**31 - 1).reshape(shape)


def formula_weight(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    layer, kind = key.rsplit(".", 1)
    if kind == "num_batches_tracked":
        return torch.zeros(shape, dtype=torch.int64)
    numbers = draw(key, shape)
    if len(shape) > 1:
        numbers = numbers * math.sqrt(6 / math.prod(shape[1:]))
    elif kind == "weight":
        numbers = 1 + 0.2 * numbers
    elif kind == "running_var":
        numbers = (1 + 0.5 * numbers) * WIDE.get(layer, 1)
    else:
        numbers = 0.1 * numbers
    return torch.from_numpy(numbers).float()


def formula_weights() -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        expected = SyncNetwork().state_dict()
    return {key: formula_weight(key, tuple(tensor.shape)) for key, tensor in expected.items()}
