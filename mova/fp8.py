"""Weights in 8 bits: e4m3 numbers with one float32 scale for each output row (spec/performance.md 0.9, 1.1).

A quantized part of a checkpoint says so in its config.json (QUANTIZATION); its linears that are quantized are stored as
`<name>.weight` [out, in] F8_E4M3 beside `<name>.weight_scale` [out] F32, and weight ~ number * scale. They are those between
the first and the last block of a tower, and queries, keys and values of the bridge. All else is stored as in the original:
the ends of a tower and what the bridge adds to the streams are where errors do most harm.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoint import Component
from .errors import CheckpointError
from .reading import stored_dtype

log = logging.getLogger("mova")

QUANTIZATION = {"format": "fp8_e4m3", "scales": "row"}  # of config.json, under "quantization"
FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # that e4m3 can say
LEAST_ROW = 1e-12  # activations below are nothing; keeps the scale of a row of zeros finite
TILE = 16  # the kernel takes widths in multiples of it
KERNEL_SINCE = (2, 6)  # PyTorch's row-wise kernel read beyond its rows in earlier ones


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [out, in] as (numbers [out, in] e4m3, scales [out] float32); the largest of each row is kept to float32 rounding."""
    weight = weight.float()
    scale = (weight.abs().amax(dim=1) / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)  # rows of zeros stay zeros
    return (weight / scale[:, None]).clamp(-LARGEST, LARGEST).to(FP8), scale


Side = tuple[Tensor, ...]  # matrices that an input passes one after the other, in its dtype


class QuantizedLinear(nn.Module):
    """A linear layer with e4m3 weights: multiplied as they are where the device can, as numbers of x's dtype elsewhere."""

    DTYPES = {"weight": FP8, "weight_scale": torch.float32}  # whatever is computed in
    sides: tuple[Side, ...] = ()  # what LoRAs add to the output: rounding their sum with the weight to 8 bits would lose it

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty_like(linear.weight, dtype=FP8), requires_grad=False)
        self.weight_scale = nn.Parameter(linear.weight.new_empty(linear.out_features, dtype=torch.float32), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        out = self.product(x)
        for side in self.sides:
            out = out.add_(functools.reduce(F.linear, side, x))
        return out

    def product(self, x: Tensor) -> Tensor:
        if x.dtype == torch.bfloat16 and not any(size % TILE for size in self.weight.shape) and multiplies_rows(x.device):
            return self.multiply(x)
        return F.linear(x, self.dequantized(x.dtype), self.bias)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in], rounded once from its float32 product."""
        return self.weight.to(dtype).mul_(self.weight_scale[:, None])

    def multiply(self, x: Tensor) -> Tensor:
        """Both sides in e4m3, each row of x with a scale of its own; sums in float32."""
        rows = x.flatten(0, -2)  # [n, in]
        fitting = LARGEST / rows.abs().amax(dim=1, keepdim=True).clamp_min(LEAST_ROW)  # [n, 1], in x's dtype like the product: no float32 copy of x
        numbers = (rows * fitting).to(FP8)
        out = torch._scaled_mm(numbers, self.weight.t(), 1 / fitting.float(), self.weight_scale[None], bias=self.bias, out_dtype=x.dtype)
        return out.unflatten(0, x.shape[:-1])


@torch.compiler.assume_constant_result  # a compiled block asks while it is compiled
def multiplies_rows(device: torch.device) -> bool:
    """Whether the device multiplies e4m3 rows with this PyTorch (Ada, Hopper and later)."""
    return try_product(device)


@functools.cache
def try_product(device: torch.device) -> bool:
    if device.type != "cuda" or torch.__version__ < KERNEL_SINCE or torch.cuda.get_device_capability(device) < (8, 9):
        return False
    numbers, scale = torch.ones(TILE, TILE, device=device).to(FP8), torch.ones(TILE, 1, device=device)
    try:
        torch._scaled_mm(numbers, numbers.t(), scale, scale.t(), out_dtype=torch.bfloat16)
    except torch.cuda.OutOfMemoryError:
        raise  # says nothing about the kernel
    except (RuntimeError, ValueError) as error:
        log.info("MOVA: fp8 weights are computed with in bf16, as PyTorch %s has no fp8 product for this GPU (%s)", torch.__version__, error)
        return False
    return True


# ---------------------------------------------------------------- modules of a quantized part


def linears_to_quantize(part: nn.Module) -> list[str]:
    """Names of the linears of a tower or the bridge that are quantized."""
    ends = (0, len(getattr(part, "blocks", ())) - 1)

    def chosen(name: str) -> bool:
        if name.startswith("blocks."):
            return int(name.split(".")[1]) not in ends
        return name.endswith((".inner.q", ".inner.k", ".inner.v"))

    return [name for name, module in part.named_modules() if isinstance(module, nn.Linear) and chosen(name)]


def follow_config(part: nn.Module, config: Mapping[str, Any], where: str) -> None:
    """Gives a tower or the bridge the linears its config.json tells of. CheckpointError for a format that is not known."""
    if (found := config.get("quantization")) is None:
        return
    if found != QUANTIZATION:
        raise CheckpointError(f"{where} is quantized as {found}; {QUANTIZATION} is read here: write it anew with 'python -m mova quantize'.")
    for name in linears_to_quantize(part):
        path, _, leaf = name.rpartition(".")
        setattr(part.get_submodule(path), leaf, QuantizedLinear(part.get_submodule(name)))


def fixed_dtypes(module: nn.Module, prefix: str = "") -> dict[str, torch.dtype]:
    """The parameters whose dtype does not follow what is computed in, by name."""
    quantized = ((path, child) for path, child in module.named_modules(prefix=prefix) if isinstance(child, QuantizedLinear))
    return {f"{path}.{leaf}": dtype for path, child in quantized for leaf, dtype in child.DTYPES.items()}


def check_stored(component: Component, part: nn.Module) -> None:
    """CheckpointError unless quantized weights are stored as such."""
    index = component.index
    if wrong := [key for key, dtype in fixed_dtypes(part).items() if stored_dtype(index[key]) != dtype]:
        raise CheckpointError(
            f"{component.folder} is quantized as its config.json says, but {len(wrong)} of its weights are not (first: {wrong[0]} is "
            f"{index[wrong[0]].dtype}): files of two checkpoints are mixed. Quantize again, or download the original."
        )
