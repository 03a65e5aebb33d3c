"""Reads LoRA files: safetensors, or what torch.save wrote, opened so that nothing in it can run (spec/mova.md 7.1, 7.2).

All tensors come into RAM: a file that is replaced later, as trainers do, changes nothing that is in use.
"""

from __future__ import annotations

import json
import math
import pickle
import zipfile
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..checkpoint import diagnose_file, open_safetensors, read_header, read_json
from ..errors import CheckpointError, LoraError
from ..pickles import ARCHIVE, load_pickle
from ..reading import TORCH_DTYPES
from .keys import split_key, unread_kind

ENDINGS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
# What a folder's weights are called, the first that is there counts; else its only file.
NAMES = ("lora_weights.pt", "adapter_model.safetensors", "pytorch_lora_weights.safetensors", "adapter_model.bin", "pytorch_lora_weights.bin")
BESIDE = ("lora_config.pt", "trainer_state.pt", "training_state.pt")  # what trainers write beside the weights
CONFIG, PEFT_CONFIG = "lora_config.pt", "adapter_config.json"
ADAPTER_METADATA = "lora_adapter_metadata"  # of diffusers: the trainer's config as JSON, names with the component before them
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
COUNTS = (torch.int64, torch.int32, torch.int8, torch.uint8)  # what some trainers store alpha as
HELD_AS = {torch.float8_e4m3fn: torch.bfloat16, torch.float8_e5m2: torch.bfloat16, **dict.fromkeys((torch.float64, *COUNTS), torch.float32)}
LARGEST_NOTE = 1e38  # that a rank or an alpha may be to be taken for one
SHARED = 4  # times that the tensors of an archive may use its bytes, on average: factors are shared among few layers
# Everything that unpickling random bytes has been seen to raise; with weights_only none of it runs code.
DAMAGE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    MemoryError,
)


@dataclass(frozen=True)
class Scaling:
    """What a trainer noted beside the weights. Values are as they were found, which may be anything."""

    rank: Any = None
    alpha: Any = None
    by_root: bool = False  # rsLoRA: alpha is divided by the rank's square root

    def factor(self, rank: int | None) -> float | None:
        """alpha / rank; None where the notes are not about these tensors."""
        numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST_NOTE for value in (self.rank, self.alpha))
        if not numbers or self.rank != rank:
            return None
        return self.alpha / (math.sqrt(rank) if self.by_root else rank)


@dataclass(frozen=True)
class LoraFile:
    """A LoRA as it was stored, checked for nothing but that its tensors are whole, finite numbers."""

    path: Path
    tensors: dict[str, Tensor] = field(repr=False)
    metadata: dict[str, str] = field(default_factory=dict, repr=False)
    scaling: Scaling | None = None

    @property
    def label(self) -> str:
        """What people call it: the file, with its folder where trainers give all files one name."""
        return f"{self.path.parent.name}/{self.path.name}" if self.path.name in NAMES else self.path.name


def read_lora_file(path: str | Path) -> LoraFile:
    """A file, or the folder a trainer wrote. LoraError for one that is damaged, no LoRA at all, or would run code."""
    try:
        file = find_file(Path(path))
        archive = is_archive(file)
    except OSError as error:
        raise LoraError(f"{str(path)[:300]} cannot be read ({error.strerror or error}).") from None
    tensors, metadata, scaling = read_archive(file) if archive else read_safetensors(file)
    for key, tensor in tensors.items():
        check_finite(file, key, tensor)
    return LoraFile(file, tensors, metadata, scaling)


def is_archive(file: Path) -> bool:
    """Whether torch.save may have written it."""
    with file.open("rb") as stream:
        return stream.read(len(ARCHIVE)) == ARCHIVE


def takes(key: str, dtype: torch.dtype | None) -> bool:
    """Whether a tensor of that name may hold numbers of that kind: alpha is sometimes counted."""
    return dtype in FLOATS or (dtype in COUNTS and key.endswith(".alpha"))


def holds_lora(keys: Collection[str]) -> bool:
    """Whether any key is that of an adapter; alpha alone may be something else."""
    roles = {found[1] for key in keys if (found := split_key(key))}
    return bool(roles - {"alpha", "magnitude"}) or any(unread_kind(key) for key in keys)


def check_keys(file: Path, keys: Collection[str]) -> None:
    """LoraError before anything large is read that is no LoRA."""
    if not keys:
        raise LoraError(f"{file} holds no weights. MOVA's single-GPU trainer writes such empty files: train with FSDP, or with the low-resource trainer.")
    if not holds_lora(keys):
        raise LoraError(f"{file} holds no LoRA: none of its {len(keys)} tensors changes another one (first: {next(iter(keys))[:120]}).")


def find_file(path: Path) -> Path:
    """The weights in a folder; a file is itself."""
    if path.is_file():
        if path.name in BESIDE:
            raise LoraError(f"{path} holds settings of a training, not weights: give lora_weights.pt, or the folder.")
        return path
    if not path.is_dir():
        raise LoraError(f"{path} is not there: give a LoRA file (.safetensors, .pt), or the folder its trainer wrote.")
    files = [file for file in sorted(path.iterdir()) if file.suffix.lower() in ENDINGS and file.is_file() and file.name not in BESIDE]
    named = [path / name for name in NAMES if path / name in files]
    if named or len(files) == 1:
        return (named or files)[0]
    steps = [folder.name for folder in sorted(path.iterdir()) if folder.is_dir() and any((folder / name).is_file() for name in NAMES)]
    if choice := [file.name for file in files] or steps:
        raise LoraError(f"{path} holds several LoRAs: give one of {', '.join(choice)}.")
    raise LoraError(f"{path} holds no LoRA file (.safetensors, .pt).")


def check_finite(file: Path, key: str, tensor: Tensor) -> None:
    if tensor.numel() and not math.isfinite(float(tensor.abs().amax())):  # NaN passes through both
        raise LoraError(f"{file}: {key} holds NaN or infinite numbers. The training went wrong, or the file is damaged.")


# ---------------------------------------------------------------- safetensors


def read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str], Scaling | None]:
    try:
        header = read_header(file)
        check_keys(file, header)
        odd = [f"{key} is {entry.dtype}" for key, entry in header.items() if not takes(key, TORCH_DTYPES.get(entry.dtype))]
        if odd:
            raise LoraError(f"{file} holds {len(odd)} tensors that are no plain numbers (first: {odd[0]}): it is quantized, or no LoRA.")
        with open_safetensors(file) as handle:
            metadata = handle.metadata() or {}
            tensors = {key: hold(handle.get_tensor(key)) for key in handle.keys()}
    except CheckpointError as error:
        raise LoraError(str(error)) from None
    except (SafetensorError, OSError) as error:
        raise LoraError(f"{file} {diagnose_file(file, error)}") from None
    return tensors, metadata, read_peft_config(file) or read_adapter_metadata(metadata)


def hold(tensor: Tensor) -> Tensor:
    """A copy in RAM, in a dtype that can be computed with."""
    return tensor.detach().to(HELD_AS.get(tensor.dtype, tensor.dtype), copy=True).contiguous()


def read_peft_config(file: Path) -> Scaling | None:
    """adapter_config.json of peft, beside the weights."""
    config = file.parent / PEFT_CONFIG
    if not config.is_file():
        return None
    try:
        values = read_json(config)
    except CheckpointError as error:
        raise LoraError(str(error)) from None
    return Scaling(values.get("r"), values.get("lora_alpha"), bool(values.get("use_rslora")))


def read_adapter_metadata(metadata: dict[str, str]) -> Scaling | None:
    """The notes of diffusers in a file's metadata: {"transformer.r": 16, "transformer.lora_alpha": 8, ...}."""
    try:
        values = json.loads(metadata[ADAPTER_METADATA])
        found = {name.rpartition(".")[2]: value for name, value in values.items()}
    except (KeyError, ValueError, AttributeError, RecursionError):
        return None
    return Scaling(found.get("r"), found.get("lora_alpha"), bool(found.get("use_rslora")))


# ---------------------------------------------------------------- torch.save


def read_archive(file: Path) -> tuple[dict[str, Tensor], dict[str, str], Scaling | None]:
    """MOVA's trainers: {lora_state_dict, rank, alpha, ...}, or a flat dict with lora_config.pt beside it."""
    content, scaling = load_archive(file), read_peft_config(file)
    if isinstance(content.get("lora_state_dict"), dict):
        content, scaling = content["lora_state_dict"], Scaling(content.get("rank"), content.get("alpha"))
    elif (file.parent / CONFIG).is_file():
        config = load_archive(file.parent / CONFIG)
        scaling = Scaling(config.get("rank"), config.get("alpha"))
    content = content if not isinstance(content.get("state_dict"), dict) else content["state_dict"]
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor) and isinstance(key, str)}
    if content and not tensors:
        raise LoraError(f"{file} holds no tensors by name (first entry: {str(next(iter(content)))[:80]!r}): it is no LoRA.")
    check_keys(file, tensors)
    check_tensors(file, tensors)
    return {key: hold(tensor) for key, tensor in tensors.items()}, {}, scaling


def load_archive(file: Path) -> dict:
    """What torch.save wrote, which must be a dict; numbers, text and tensors only. LoraError for a pickle that wants more."""
    try:
        check_archive(file)
        content = load_pickle(file)
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "weights_only" in str(error).lower():
            raise LoraError(
                f"{file} holds more than weights; such a pickle could run code when it is opened, so it is refused. Ask for a .safetensors file."
            ) from None
        raise LoraError(f"{file} is damaged ({first_line(error)}): download it again.") from None
    except (zipfile.BadZipFile, *DAMAGE) as error:
        raise LoraError(f"{file} is truncated or damaged ({first_line(error)}): download it again.") from None
    if not isinstance(content, dict):
        raise LoraError(f"{file} holds a {type(content).__name__}, not weights by name: it is no LoRA.")
    return content


def check_archive(file: Path) -> None:
    """BadZipFile or LoraError unless the file is a whole archive of stored, not compressed, entries: reading takes no more memory than it has bytes."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or sum(entry.file_size for entry in entries) > file.stat().st_size:
        raise LoraError(f"{file} is a compressed archive, which torch.save never writes: it is no LoRA.")


def check_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """LoraError for tensors that are not what they seem, such as one number shown as a terabyte."""
    size = file.stat().st_size
    for key, tensor in tensors.items():
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and takes(key, tensor.dtype)
        if not plain or tensor.numel() * tensor.element_size() > size:
            raise LoraError(f"{file}: {key} is no plain tensor of numbers ({tensor.dtype}, {list(tensor.shape)}): the file is damaged, or no LoRA.")
    if (shown := sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())) > SHARED * size:
        raise LoraError(f"{file} shows {shown / size:,.0f} times the numbers it holds: the file is damaged, or no LoRA.")


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
