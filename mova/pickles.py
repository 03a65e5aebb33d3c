"""What torch.save wrote, read so that nothing in it can run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

ARCHIVE = b"PK\x03\x04"  # how today's files begin: they can be mapped


def load_pickle(file: Path) -> Any:
    """Its tensors, on the CPU, and plain values; of a damaged file whatever torch.load raises, pickle.UnpicklingError for one that wants more.

    Tensors stay in the mapped file where that is possible. Not under a name that ends in .safetensors: PyTorch from 2.13 on reads paths by their name.
    """
    with file.open("rb") as stream:
        mapped = stream.read(len(ARCHIVE)) == ARCHIVE and file.suffix != ".safetensors"
        stream.seek(0)
        return torch.load(file if mapped else stream, map_location="cpu", weights_only=True, mmap=mapped)
