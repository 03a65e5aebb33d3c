"""SyncNet's weight file: safetensors, or the released pickle read without running code; any other file is named."""

from __future__ import annotations

import pickle
import re
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import compare_tensors, open_safetensors
from ..errors import CheckpointError
from ..pickles import ARCHIVE, load_pickle

NEEDED = "Needed: syncnet_v2.model of robots.ox.ac.uk/~vgg/software/lipsync/, or a safetensors copy of it."
COUNTER = "num_batches_tracked"  # of training; old files lack it
PICKLES = (ARCHIVE, b"\x80")  # of torch.save: today's ZIP, and the older form
BROKEN = (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError, struct.error)  # what torch.load raises on damage

# How a tensor of another file begins -> what that file is.
OTHERS = {
    "L2Norm3_3.": "the face detector of SyncNet's scripts (sfd_face.pth)",
    "face_encoder": "the lip-sync expert of Wav2Lip, another network",
    "blocks.": "a diffusion transformer",
    "encoder.": "an encoder of something else",
}


def read_weights(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of SyncNet in float32, named and shaped as `expected`. CheckpointError when the file is something else, damaged, or not there."""
    if not path.is_file():
        raise CheckpointError(f"{path} is {'a folder' if path.is_dir() else 'not there'}: SyncNet's weights are one file. {NEEDED}")
    with path.open("rb") as stream:
        head = stream.read(4)
    tensors = read_pickle(path) if head.startswith(PICKLES) else read_safetensors(path)
    shapes = {key: tuple(tensor.shape) for key, tensor in expected.items() if not key.endswith(COUNTER)}
    found = {key: tensor for key, tensor in tensors.items() if not key.endswith(COUNTER)}
    if differences := compare_tensors(found, shapes):
        raise CheckpointError(f"{path} is not SyncNet{guess_kind(found)} ({len(shapes)} tensors expected): {'; '.join(differences)}. {NEEDED}")
    if broken := [key for key, tensor in found.items() if not tensor.isfinite().all()]:
        raise CheckpointError(f"{path} holds values that are no numbers (first: {broken[0]}): download it again. {NEEDED}")
    counters = {key: torch.zeros((), dtype=torch.int64) for key in expected if key.endswith(COUNTER)}
    return counters | {key: tensor.float() for key, tensor in found.items()}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    with open_safetensors(path) as handle:
        return {key: handle.get_tensor(key) for key in handle.keys()}


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Tensors by name from what torch.save wrote; code in it is refused, not run."""
    try:
        value = load_pickle(path)
    except pickle.UnpicklingError as error:
        wants = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = (
            f"wants to run {wants[1]}, which weights never need: it is damaged or not to be trusted"
            if wants
            else "is a damaged pickle, or holds more than weights"
        )
        raise CheckpointError(f"{path} {reason}. {NEEDED}") from None
    except BROKEN as error:
        reason = str(error).split(". ")[0] or type(error).__name__
        raise CheckpointError(f"{path} is truncated or damaged ({path.stat().st_size:,} bytes; {reason}): download it again. {NEEDED}") from None
    if not isinstance(value, Mapping) or not all(isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in value.items()):
        raise CheckpointError(f"{path} holds {describe_value(value)}, not tensors by name: it is not SyncNet. {NEEDED}")
    return dict(value)


def describe_value(value: object) -> str:
    if isinstance(value, Mapping):
        return f"a dictionary of {', '.join(map(str, list(value)[:4]))}"
    return f"a {type(value).__name__}"


def guess_kind(tensors: Mapping[str, Tensor]) -> str:
    for start, what in OTHERS.items():
        if any(key.startswith(start) for key in tensors):
            return f"; it looks like {what}"
    return ""
