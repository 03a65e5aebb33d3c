"""What a GPU and its machine can do at best: the rates that the other rows of bench.gpu are to be held against."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import mova
from mova.attention import KERNELS
from mova.layers import row_slices
from mova.reading import TORCH_DTYPES, Reader

from .gpu_meters import GPU, Figure, or_sentence, seconds
from .released_model import TWO_LAYERS, write_released_model

RIVALS = ("flash", "cudnn", "memory-efficient")  # attention kernels to compare
TOKENS = {"360p": 43120, "720p": 176400}
MATRIX = 8192
LAYER_BYTES = 973_000_000
LINEARS = ((5120, 5120), (5120, 13824), (13824, 5120), (1536, 5120), (5120, 1536))  # inputs, outputs: the shapes of a layer


def ceilings(folder: Path) -> dict[str, Figure]:
    """What the machine can do at best."""
    a, b = (torch.randn(MATRIX, MATRIX, device=GPU, dtype=torch.bfloat16) for _ in range(2))
    found: dict[str, Figure] = {"matmul_bf16_tflops": 2 * MATRIX**3 / seconds(lambda: a @ b)["median"] / 1e12}
    found |= {"copies_gb_per_s": copy_rates(), "attention_tflops": attention_rates(), "linear_360p_tflops": linear_rates()}
    return found | {"reading_gb_per_s": reading_rates(write_released_model(folder / "two-layers", TWO_LAYERS, GPU))}


def copy_rates() -> dict[str, float]:
    target, source = (torch.empty(LAYER_BYTES, dtype=torch.uint8, device=GPU) for _ in range(2))
    pageable = torch.ones(LAYER_BYTES, dtype=torch.uint8)
    pinned = pageable.pin_memory()
    ways = {
        "on_the_device": lambda: target.copy_(source),
        "pinned": lambda: target.copy_(pinned, non_blocking=True),
        "pageable": lambda: target.copy_(pageable),
        "pinned_per_use": lambda: target.copy_(pageable.pin_memory(), non_blocking=True),
    }
    return {name: round(LAYER_BYTES / seconds(way)["median"] / 1e9, 2) for name, way in ways.items()}


def attention_rates() -> dict[str, dict]:
    """Every kernel over all video tokens, and over one slice of queries as our block asks."""
    found: dict[str, dict] = {}
    for size, tokens in TOKENS.items():
        q, k, v = (torch.randn(1, tokens, 40, 128, device=GPU, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
        for part, rows in (("whole", tokens), ("slice", row_slices(tokens)[0].stop)):
            found[f"{size}, {part}"] = {
                name: or_sentence(lambda name=name, rows=rows, q=q, k=k, v=v: attention_rate(KERNELS[name], q[:, :, :rows], k, v)) for name in RIVALS
            }
    return found


def attention_rate(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> float:
    with sdpa_kernel(backend):
        took = seconds(lambda: F.scaled_dot_product_attention(q, k, v), repeats=2)["median"]
    return round(4 * q.shape[2] * k.shape[2] * 5120 / took / 1e12, 1)


def linear_rates() -> dict[str, dict]:
    return {f"{inputs} to {outputs}": linear_rate(TOKENS["360p"], inputs, outputs) for inputs, outputs in LINEARS}


def linear_rate(rows: int, inputs: int, outputs: int) -> dict[str, Figure]:
    """bf16, and fp8 with a scale per row and per output (torch._scaled_mm)."""
    x, weight = torch.randn(rows, inputs, device=GPU, dtype=torch.bfloat16), torch.randn(outputs, inputs, device=GPU, dtype=torch.bfloat16)
    small = [tensor.to(torch.float8_e4m3fn) for tensor in (x, weight)]
    scales = torch.ones(rows, 1, device=GPU), torch.ones(1, outputs, device=GPU)

    def fp8() -> Tensor:
        return torch._scaled_mm(small[0], small[1].T, scale_a=scales[0], scale_b=scales[1], out_dtype=torch.bfloat16)

    def rate(work: Callable[[], object]) -> float:
        return round(2 * rows * inputs * outputs / seconds(work)["median"] / 1e12, 1)

    return {"bf16": rate(lambda: F.linear(x, weight)), "fp8": or_sentence(lambda: rate(fp8))}


def reading_rates(model: Path) -> dict[str, dict]:
    """One layer from files to memory by the number of threads: first from the disk, then from the page cache."""
    denoiser = mova.load_denoiser(model)
    sources = denoiser.parts.sources(("high", 0)).values()
    wanted = [(entry, torch.ones(entry.shape, dtype=TORCH_DTYPES[entry.dtype])) for entry in sources]  # ones: pages that are there already
    found = {}
    for threads in (1, 4, 8):
        reader, rates = Reader(threads), []
        forget_files(model)
        for _ in range(2):
            start = perf_counter()
            reader.read(wanted)
            rates.append(round(sum(entry.nbytes for entry in sources) / (perf_counter() - start) / 1e9, 2))
        reader.close()
        found[f"{threads} threads"] = dict(zip(("disk", "page_cache"), rates, strict=True))
    return found


def forget_files(folder: Path) -> None:
    """Takes a folder's files out of the page cache (Linux)."""
    for file in folder.rglob("*.safetensors"):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
