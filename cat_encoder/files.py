"""Opens what users give as a checkpoint without ever executing it, and says what it is when it is none (spec/cat.md 3.1). Writes whole files or none."""

from __future__ import annotations

import json
import os
import pickle
import struct
import uuid
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import CatError

NEEDED = "a CAT, EAT or SSLAM checkpoint (.pt or .safetensors) is needed"
OWN = "cat_encoder"  # the metadata entry of files written by us
DAMAGE = (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, LookupError, AttributeError, TypeError, AssertionError, struct.error, OSError)

# What a file that is no checkpoint really is: first bytes, words.
IMPOSTORS = (
    (b"<", "a web page (the download was refused)"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file"),
    (b"GGUF", "a GGUF file"),
    (b"RIFF", "a sound or film"),
    (b"fLaC", "a sound (FLAC)"),
    (b"ID3", "a sound (MP3)"),
    (b"OggS", "a sound (Ogg)"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x1f\x8b", "a gzip archive: unpack it first"),
    (b"{", "a JSON file"),
)
# Roots of what real training runs leave in their files, and the built-in kinds of values a pickle may name.
STAND_INS = (
    "torch",
    "numpy",
    "omegaconf",
    "argparse",
    "fairseq",
    "examples",
    "collections",
    "copyreg",
    "enum",
    "typing",
    "pathlib",
    "datetime",
    "_codecs",
    "__main__",
)
PLAIN_KINDS = ("bool", "bytearray", "complex", "dict", "float", "frozenset", "int", "list", "object", "set", "slice", "str", "tuple")
REAL = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
}


@dataclass
class OpenedFile:
    """tensors by their names in the file; teacher: those of its nested `_ema`; cfg and label_indices as stored; metadata and siblings of safetensors."""

    path: Path
    tensors: dict[str, Tensor]
    teacher: dict[str, Tensor] = field(default_factory=dict)
    cfg: dict = field(default_factory=dict)
    label_indices: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)


def open_file(path: str | Path) -> OpenedFile:
    """A .pt or .safetensors file, or a folder with a model.safetensors. Told apart by content, not by name. CatError when it is neither."""
    file = Path(path)
    if file.is_dir():
        file = file / "model.safetensors"
    if not file.is_file():
        raise CatError(f"{file} is not there: {NEEDED}.")
    try:
        with file.open("rb") as stream:
            head = stream.read(64)
    except OSError as error:
        raise CatError(f"{file} cannot be read ({error.strerror}): check its permissions.") from None
    if not head:
        raise CatError(f"{file} is empty (0 bytes): download it again.")
    if head[8:9] == b"{":
        return open_safetensors(file)
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return open_pickle(file)
    what = next((words for magic, words in IMPOSTORS if head.lstrip().startswith(magic)), "no file of weights that can be read here")
    raise CatError(f"{file} is {what}: {NEEDED}.")


def open_safetensors(file: Path) -> OpenedFile:
    try:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CatError(f"{file} is cut off or damaged ({error}): download or copy it again.") from None
    return OpenedFile(file, tensors, cfg={} if OWN in metadata else read_sibling(file), metadata=metadata)


def read_sibling(file: Path) -> dict:
    """The config.json beside a model.safetensors from a hub, the only place where such a model tells its number of heads; {} without one."""
    config = file.with_name("config.json")
    if not config.is_file():
        return {}
    try:
        values = json.loads(config.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        raise CatError(f"{config}, which belongs to {file.name}, cannot be read ({error}): copy it again or take it away.") from None
    return {"model": values} if isinstance(values, dict) else {}


def open_pickle(file: Path) -> OpenedFile:
    content = unpickle(file)
    if not isinstance(content, dict):
        raise CatError(f"{file} holds a {type(content).__name__} instead of named tensors: {NEEDED}.")
    model = content.get("model") if isinstance(content.get("model"), dict) else content.get("state_dict", content)
    model = model if isinstance(model, dict) else {}
    states = content.get("task_state")
    indices = states.get("labels") if isinstance(states, dict) else None
    cfg = content.get("cfg")
    return OpenedFile(
        file,
        tensors=only_tensors(model),
        teacher=only_tensors(model.get("_ema")),
        cfg=cfg if isinstance(cfg, dict) else {},
        label_indices=indices if isinstance(indices, dict) else {},
    )


def only_tensors(values: object) -> dict[str, Tensor]:
    return {name: value for name, value in values.items() if isinstance(name, str) and isinstance(value, Tensor)} if isinstance(values, dict) else {}


def unpickle(file: Path) -> object:
    """What torch.save wrote. Files of real training runs may hold objects that torch's safe loader refuses: those are replaced by stand-ins, never made."""
    try:
        return torch_load(file, weights_only=True)
    except pickle.UnpicklingError:
        pass  # tried below, with stand-ins
    except DAMAGE as error:
        raise damaged(file, error) from None
    try:
        return torch_load(file, weights_only=False, pickle_module=SimpleNamespace(__name__=__name__, Unpickler=StandInUnpickler, load=load_plain))
    except ForeignCode as error:
        raise CatError(f"{file} would run code when it is loaded ({error}): it was not loaded. Delete it, and get the checkpoint from its authors.") from None
    except DAMAGE as error:
        raise damaged(file, error) from None


def torch_load(file: Path, **settings: object) -> object:
    """Mapped where that is possible: optimizer states, twice the size of the model, stay on the disk.

    Not under a name that ends in .safetensors: PyTorch from 2.13 on reads paths by their name.
    """
    with file.open("rb") as stream:
        mapped = stream.read(2) == b"PK" and file.suffix != ".safetensors"
        stream.seek(0)
        return torch.load(file if mapped else stream, map_location="cpu", mmap=mapped, **settings)


def damaged(file: Path, error: BaseException) -> CatError:
    reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
    return CatError(f"{file} is cut off, damaged or no PyTorch file ({reason}): download or copy it again.")


class ForeignCode(pickle.UnpicklingError):
    """The name of something in a pickle that is neither a tensor nor known to be left there by training."""


class StandIn(dict):
    """Takes the place of an object whose class is not imported: it accepts whatever a pickle does to it and does nothing."""

    def __new__(cls, *_, **__):
        return dict.__new__(cls)

    def __init__(self, *_, **__) -> None:
        super().__init__()

    def __setstate__(self, state: object) -> None:
        """Nothing of the object is kept."""

    def append(self, _: object) -> None:
        """Likewise."""

    extend = append
    __hash__ = object.__hash__


class StandInUnpickler(pickle.Unpickler):
    """Makes tensors, plain values and stand-ins, nothing else."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) in REAL:
            return REAL[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.split(".")[0] in STAND_INS or (module in ("builtins", "__builtin__") and name in PLAIN_KINDS):
            return StandIn
        raise ForeignCode(f"{module}.{name}")


def load_plain(stream: object, **settings: object) -> object:
    return StandInUnpickler(stream, **settings).load()


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """A name to write under; the file gets its own when it is complete. CatError when the place cannot be written."""
    draft = file.with_name(f"{file.stem}.{uuid.uuid4().hex[:8]}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield draft
            os.replace(draft, file)
        finally:
            draft.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise CatError(f"{file} cannot be written ({getattr(error, 'strerror', None) or error}): choose another place.") from None
