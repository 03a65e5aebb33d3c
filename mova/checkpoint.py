"""A released checkpoint folder: configs as dataclasses, weights as views of the memory-mapped files.

Layout in spec/mova.md section 2. Only the sub-folder that a call needs is opened, and no tensor is read before it is used.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from .errors import CheckpointError

C = TypeVar("C")
SHOWN = 6  # names listed per kind of mismatch

# How a file that is no safetensors file begins -> what it is.
IMPOSTORS = {
    b"<!DOCTYPE": "a web page, not weights (the download was refused; log in, accept the license, download again)",
    b"<!doctype": "a web page, not weights (the download was refused; log in, accept the license, download again)",
    b"<html": "a web page, not weights (the download was refused; log in, accept the license, download again)",
    b"version https://git-lfs": "a Git LFS pointer, not the weights (run 'git lfs pull' in the folder)",
    b"PK\x03\x04": "a pickle archive (.pt), which could run code; only safetensors weights are read",
    b"\x80": "a pickle, which could run code; only safetensors weights are read",
    b"GGUF": "a GGUF file; safetensors weights are needed",
}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `dtype` is the safetensors name, such as "BF16"; `offset` and `nbytes` say which bytes of the file."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    offset: int
    nbytes: int

    def rows(self, start: int, stop: int) -> TensorEntry:
        """Part of the tensor, along its first dimension; a scalar is one row."""
        count = self.shape[0] if self.shape else 1
        row = self.nbytes // count
        return replace(self, shape=(stop - start, *self.shape[1:]) if self.shape else (), offset=self.offset + start * row, nbytes=(stop - start) * row)


@dataclass(frozen=True)
class Component:
    """One sub-folder of a checkpoint, such as `video_dit`."""

    name: str
    folder: Path
    config: dict[str, Any]

    @cached_property
    def index(self) -> dict[str, TensorEntry]:
        """Every stored tensor by name, from the file headers alone."""
        return {key: entry for file in weight_files(self.folder) for key, entry in read_header(file).items()}

    @property
    def bytes_on_disk(self) -> int:
        """Size of the weight files."""
        return sum(file.stat().st_size for file in weight_files(self.folder))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor as a view of its mapped file: pages are read when they are computed with."""
        tensors: dict[str, torch.Tensor] = {}
        for file in weight_files(self.folder):
            with open_safetensors(file) as handle:
                tensors |= {key: handle.get_tensor(key) for key in handle.keys()}
        return tensors


def open_component(folder: str | Path, name: str) -> Component:
    """Opens `folder/name` (its config.json; the weights stay closed). CheckpointError when it is not there."""
    part = checkpoint_folder(folder) / name
    if not part.is_dir():
        raise CheckpointError(
            f"{part} is missing: a MOVA checkpoint has a sub-folder '{name}'. Download it, or check that {folder} is the folder with model_index.json."
        )
    return Component(name, part, read_json(part / "config.json"))


def checkpoint_folder(folder: str | Path) -> Path:
    """The folder, when it looks like a checkpoint (model_index.json); CheckpointError otherwise."""
    root = Path(folder)
    if not root.is_dir():
        given = "a file" if root.is_file() else "not there"
        raise CheckpointError(f"{root} is {given}: a MOVA checkpoint is a folder with model_index.json and sub-folders such as video_dit.")
    if not (root / "model_index.json").is_file():
        raise CheckpointError(f"{root} has no model_index.json: give the top folder of a MOVA checkpoint (the one that holds video_dit, audio_dit, ...).")
    return root


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: download it again.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}): download it again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, a JSON object is needed: download it again.")
    return value


def read_config(kind: type[C], values: Mapping[str, Any], where: str) -> C:
    """Fills the dataclass `kind` from JSON values; keys it does not know are ignored, missing keys keep their default."""
    hints = typing.get_type_hints(kind)
    given = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name in values:
            given[field.name] = convert_value(values[field.name], hints[field.name], f"{where}: {field.name}")
    return kind(**given)


def convert_value(value: Any, hint: Any, where: str) -> Any:
    """A JSON value as the annotated type: int, float, bool, str, tuple[x, ...], or any of them | None."""
    options = typing.get_args(hint) if type(None) in typing.get_args(hint) else (hint,)
    for option in options:
        if option is type(None):
            if value is None:
                return None
        elif typing.get_origin(option) is tuple:
            if isinstance(value, (list, tuple)):
                return tuple(convert_value(item, typing.get_args(option)[0], where) for item in value)
        elif option is float:
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                return float(value)
        elif type(value) is option:
            return value
    raise CheckpointError(f"{where} is {value!r}, but {getattr(hint, '__name__', hint)} is needed: the config.json does not belong to MOVA or is damaged.")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a component: those of its index, or the only ones there."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        names = sorted(set(read_json(indexes[0]).get("weight_map", {}).values()))
        if any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise CheckpointError(f"{indexes[0]} points outside its folder: do not use this checkpoint.")
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if absent := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(f"{folder} lacks {', '.join(absent)}: download the missing shards.")
    if not files:
        raise CheckpointError(f"{folder} has no .safetensors file: download the weights (other formats are not read).")
    return files


def open_safetensors(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} {diagnose_file(file, error)}") from None


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of one file by name; CheckpointError when it is no whole safetensors file."""
    with open_safetensors(file), file.open("rb") as stream:  # opening checks the header against the file's size
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    entries = {}
    for key, value in header.items():
        start, end = value["data_offsets"]
        entries[key] = TensorEntry(file, tuple(value["shape"]), value["dtype"], 8 + length + start, end - start)
    return entries


def diagnose_file(file: Path, error: Exception) -> str:
    """What a file that safetensors refused really is."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            head = stream.read(64)
    except OSError as unreadable:
        return f"cannot be read ({unreadable.strerror or unreadable})."
    for start, what in IMPOSTORS.items():
        if head.lstrip().startswith(start):
            return f"is {what}."
    return f"is truncated or damaged ({size:,} bytes; {error}): download it again."


def check_tensors(component: Component, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compares names and shapes; one CheckpointError lists everything missing, unexpected or misshapen."""
    if found := compare_tensors(component.index, expected):
        raise CheckpointError(
            f"{component.folder} does not hold the weights its config.json describes ({len(expected)} tensors expected): {'; '.join(found)}. "
            "The download is incomplete or the folder is of another model."
        )


def compare_tensors(index: Mapping[str, TensorEntry], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What is missing, unexpected or misshapen, a phrase each; empty when all fits."""
    misshapen = [key for key, shape in expected.items() if key in index and index[key].shape != shape]
    differences = {
        "missing": [key for key in expected if key not in index],
        "unexpected": [key for key in index if key not in expected],
        "misshapen": [f"{key} is {list(index[key].shape)}, needed {list(expected[key])}" for key in misshapen],
    }
    return [list_names(kind, names) for kind, names in differences.items() if names]


def list_names(kind: str, names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} {kind}: {', '.join(names[:SHOWN])}{more}"


def load_weights(module: torch.nn.Module, component: Component) -> None:
    """Gives a module built on the meta device its weights: views of the mapped files, in the stored dtype."""
    check_tensors(component, {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()})
    module.load_state_dict(component.tensors(), assign=True)
    module.requires_grad_(False)
