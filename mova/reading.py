"""Checkpoint files -> host memory, by several threads (spec/performance.md 3.1).

One thread reading or faulting in a mapped file reaches a fraction of what a disk or the page cache can deliver. Bytes are
read straight to where they are needed; nothing is allocated per read unless the dtype must change.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from .checkpoint import TensorEntry
from .errors import CheckpointError

PIECE = 32 * 2**20  # bytes of one read: large enough to stream, small enough to share a layer among the threads
THREADS = max(2, min(4, os.cpu_count() or 2))
TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip

Stamp = tuple[int, int]


@dataclass(frozen=True)
class Held:
    """A tensor in RAM that is read like one of a file."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def rows(self, start: int, stop: int) -> Held:
        return Held(self.tensor[start:stop])


Source = TensorEntry | Held


class Reader:
    """Reads stored tensors into tensors of the CPU. Files are held open; one that changes meanwhile is an error, never a mixture."""

    def __init__(self, threads: int = THREADS) -> None:
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="mova-read")
        self.local = threading.local()
        self.stamps: dict[Path, Stamp] = {}
        self.opened: list[BinaryIO] = []

    def read(self, wanted: list[tuple[Source, Tensor]]) -> None:
        """Fills each tensor (contiguous, on the CPU) from its place in the files; returns when all are there. CheckpointError."""
        jobs: list[Future] = []
        for entry, target in wanted:
            if isinstance(entry, Held):
                jobs.append(self.pool.submit(self.copy, entry.tensor, target))
            elif target.dtype == TORCH_DTYPES.get(entry.dtype):
                view = memoryview(target.flatten().view(torch.uint8).numpy())
                pieces = range(0, entry.nbytes, PIECE)
                jobs += [self.pool.submit(self.read_bytes, entry.file, entry.offset + start, view[start : start + PIECE]) for start in pieces]
            else:
                jobs.append(self.pool.submit(self.convert, entry, target))
        wait(jobs)
        for job in jobs:
            job.result()

    def read_bytes(self, file: Path, offset: int, view: memoryview) -> None:
        try:
            stream = self.open(file)
            stream.seek(offset)
            got = stream.readinto(view)
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read ({error.strerror or error}): is the disk still there? Load the model again.") from error
        if got != len(view):
            raise CheckpointError(f"{file} ended after {offset + got:,} bytes while it was being read: it was cut or replaced. Load the model again.")

    def convert(self, entry: TensorEntry, target: Tensor) -> None:
        """Reads in the stored dtype and rounds to the target's."""
        stored = torch.empty(entry.shape, dtype=stored_dtype(entry))
        self.read_bytes(entry.file, entry.offset, memoryview(stored.flatten().view(torch.uint8).numpy()))
        self.copy(stored, target)

    @torch.inference_mode()  # the target may have been made so
    def copy(self, tensor: Tensor, target: Tensor) -> None:
        target.copy_(tensor)

    def open(self, file: Path) -> BinaryIO:
        """This thread's handle of a file; CheckpointError when the file is not the one that was read before."""
        handles: dict[Path, BinaryIO] = self.local.__dict__.setdefault("handles", {})
        if file not in handles:
            handles[file] = file.open("rb", buffering=0)
            self.opened.append(handles[file])
        status = os.fstat(handles[file].fileno())
        if (status.st_size, status.st_mtime_ns) != self.stamps.setdefault(file, (status.st_size, status.st_mtime_ns)):
            raise CheckpointError(f"{file} was changed while it was in use: load the model again.")
        return handles[file]

    def close(self) -> None:
        self.pool.shutdown(wait=True)
        for stream in self.opened:
            stream.close()


def stored_dtype(entry: TensorEntry) -> torch.dtype:
    if entry.dtype not in TORCH_DTYPES:
        raise CheckpointError(f"{entry.file} stores numbers as {entry.dtype}, which cannot be computed with: use the released files.")
    return TORCH_DTYPES[entry.dtype]
