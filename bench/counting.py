"""What the ledger counts with: kernels as opaque operations, and a ledger of every operation on the meta device.

Nothing is computed: tensors of the released size have shapes and no memory, so FLOPs, bytes and live storages are exact.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

FLASH = torch.ops.aten._scaled_dot_product_flash_attention
NOT_ELEMENTWISE = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.convolution, FLASH, torch.ops.aten.new_empty)


@torch.library.custom_op("bench::rms_norm", mutates_args=(), schema="(Tensor x, Tensor weight) -> Tensor")
def fused_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """CUDA's one kernel; on the meta device PyTorch would show the float32 steps of a CPU."""
    raise NotImplementedError("counted, never computed")


@fused_rms_norm.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(x)


class GPUKernels(TorchFunctionMode):
    """Attention and RMSNorm as the one kernel each that a GPU runs, where the meta device would show their formulas."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.scaled_dot_product_attention:  # a bias costs next to nothing and is left out
            return FLASH(*args[:3])[0]
        if func is F.rms_norm:
            return torch.ops.bench.rms_norm(args[0], kwargs["weight"])
        return func(*args, **(kwargs or {}))


class Ledger(TorchDispatchMode):
    """Live and peak bytes of the storages made on the meta device while active, how many were made on any device, and bytes of elementwise traffic."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.traffic = self.made = 0
        self.known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        before = tensors_in((args, kwargs))
        for tensor in before:
            self.known[tensor.untyped_storage()] = True
        result = func(*args, **(kwargs or {}))
        after = tensors_in(result)
        fresh = sum(self.notice(tensor) for tensor in after)
        moves = before and (fresh or func._schema.is_mutable)  # neither a view nor made from nothing
        if moves and func.overloadpacket not in NOT_ELEMENTWISE:
            read = before[1:] if func.overloadpacket is torch.ops.aten.copy_ else before  # whose target is not read
            self.traffic += sum(tensor.nbytes for tensor in (*read, *after) if tensor.is_meta)
        return result

    def notice(self, tensor: Tensor) -> bool:
        """Whether the tensor's storage is new; it is live until nothing holds it."""
        storage = tensor.untyped_storage()
        if storage in self.known:
            return False
        self.known[storage] = True
        self.made += 1
        if tensor.is_meta:
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.free, storage.nbytes())
        return True

    def free(self, nbytes: int) -> None:
        self.live -= nbytes


def tensors_in(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]
