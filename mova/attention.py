"""Attention: the only one of this library, and which of PyTorch's kernels computes it.

A kernel is insisted on only where there is no bias, which few of them take: on self-attention and the bridge, where the time
goes. Each is held against PyTorch's default on a small problem before anything is computed with it (spec/performance.md 0.8).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .errors import InputError

log = logging.getLogger("mova")

# What a caller may insist on; "auto" is the fastest that agrees with PyTorch's default.
KERNELS = {
    "auto": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
HOPPER = 9  # major compute capability, where cuDNN is 1.6 times as fast as flash
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 2e-3}  # relative; what rounding explains
TOLERANCE_OF_OTHERS = 1e-5
LENGTHS = ((320, 320), (192, 403))  # queries and keys of the problems compared on; the bridge has other keys than queries
NO_KERNEL = ("No available kernel", "No viable backend")  # how PyTorch says that the kernel insisted on does not fit
INSISTED: ContextVar[SDPBackend | None] = ContextVar("mova_attention", default=None)

Shapes = frozenset[tuple[int, int]]  # (heads, head_dim)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(head_dim) + bias) v over [B, L, heads * head_dim]; bias broadcasts to [B, heads, Lq, Lk]."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # [B, H, L, d]
    if bias is not None or (backend := INSISTED.get()) is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)  # [B, Lq, H * d]
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@contextmanager
def attention_kernel(name: str, shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """While this is open, `attention` is computed by the kernel of that name, chosen as by `choose_kernel`."""
    chosen = choose_kernel(name, shapes, device, dtype)
    try:
        with insist(KERNELS[chosen]):
            yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in NO_KERNEL):
            raise
        raise InputError(refusal(chosen, device, dtype, "cannot compute this")) from None


@contextmanager
def insist(backend: SDPBackend | None) -> Iterator[None]:
    token = INSISTED.set(backend)
    try:
        yield
    finally:
        INSISTED.reset(token)


@cache
def choose_kernel(name: str, shapes: Shapes, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the kernel for attention of these shapes; "auto" = PyTorch's own choice, call by call.

    InputError for one that does not exist, cannot compute them there, or does it wrongly.
    """
    if name not in KERNELS:
        raise InputError(f"attention is {name!r}; choose {', '.join(KERNELS)}.")
    for candidate in candidates(device) if name == "auto" else (name,):
        fault = find_fault(candidate, shapes, device, dtype)
        if fault is None:
            log.info("Attention kernel: %s", candidate)
            return candidate
        if name != "auto":
            raise InputError(refusal(name, device, dtype, fault))
        log.info("Attention kernel: not %s, which %s on %s in %s", candidate, fault, device, dtype)
    return "auto"


def candidates(device: torch.device) -> tuple[str, ...]:
    """Kernels that are faster than PyTorch's own choice, or the same; the fastest first."""
    if device.type != "cuda":
        return ()
    return ("cudnn", "flash") if torch.cuda.get_device_capability(device)[0] == HOPPER else ("flash",)


@torch.no_grad()
def find_fault(name: str, shapes: Shapes, device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with a kernel, in words; None when it agrees with PyTorch's default."""
    generator = torch.Generator().manual_seed(0)
    for heads, head_dim in sorted(shapes):
        for queries, keys in LENGTHS:
            q, k, v = (torch.randn(1, length, heads * head_dim, generator=generator).to(device, dtype) for length in (queries, keys, keys))
            with insist(None):
                expected = attention(q, k, v, heads).float()
            try:
                with insist(KERNELS[name]), warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # PyTorch gives its reasons, a line for every kernel
                    found = attention(q, k, v, heads).float()
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError:  # each kernel has words of its own for what it lacks
                return "cannot compute this"
            off = float((found - expected).norm() / expected.norm())
            if not off <= TOLERANCE.get(dtype, TOLERANCE_OF_OTHERS):  # NaN is off, too
                return f"computes something else (relative difference {off:.2g} with {heads} heads of {head_dim})"
    return None


def refusal(name: str, device: torch.device, dtype: torch.dtype, fault: str) -> str:
    return f"The attention kernel '{name}' of PyTorch {torch.__version__} {fault} on {device} in {dtype}: choose another one."
