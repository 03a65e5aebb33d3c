"""Clocks and memory meters of the GPU benchmarks."""

from __future__ import annotations

import gc
import re
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import mova

GPU = torch.device("cuda")
Figure = float | int | str | bool | dict


def seconds(work: Callable[[], object], repeats: int = 3) -> dict[str, float]:
    """Of work on the GPU after one run that is not counted, by CUDA events."""
    work()
    return spread([one_time(work) for _ in range(repeats)])


def one_time(work: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def spread(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 5), "min": round(min(values), 5), "max": round(max(values), 5)}


def or_sentence(work: Callable[[], Figure]) -> Figure:
    """What is measured, or why it cannot be."""
    try:
        return work()
    except (RuntimeError, mova.MovaError) as error:  # torch.OutOfMemoryError is a RuntimeError
        return f"not possible here: {str(error).strip().splitlines()[0]}"


@contextmanager
def clean_gpu() -> Iterator[None]:
    """Nothing of the rows before is left, and peaks start anew."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield
    gc.collect()
    torch.cuda.empty_cache()


def memory() -> dict[str, int]:
    """Peaks of the GPU since `clean_gpu`, and what this process has in RAM now; pinned memory is among the anonymous or the shared pages."""
    found = {"peak_allocated": torch.cuda.max_memory_allocated(), "peak_reserved": torch.cuda.max_memory_reserved()}
    status = Path("/proc/self/status")
    if status.is_file():
        pages = dict(re.findall(r"(Rss\w+):\s+(\d+) kB", status.read_text(encoding="ascii")))
        found |= {f"host_{name[3:].lower()}": int(count) * 1024 for name, count in pages.items()}
    return found
