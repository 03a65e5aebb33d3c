"""Writes a checkpoint folder with 8-bit weights, half the size of the original (the format is told in mova.fp8).

A file is written under a temporary name, read back and compared, and only then gets its own; model_index.json, without which
a folder is no checkpoint, comes last. So whatever is there is whole, and the next call goes on where one was interrupted.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checkpoint import Component, TensorEntry, check_tensors, checkpoint_folder, open_component, open_safetensors, read_header, read_json, weight_files
from .denoiser import FOLDERS, Denoiser, load_denoiser
from .errors import CheckpointError, InputError
from .fp8 import QUANTIZATION, linears_to_quantize, quantize_rows
from .inspection import build_network, expected_shapes
from .sampler import sample

COPIED = ("text_encoder", "tokenizer", "scheduler", "video_vae", "audio_vae")
RECORD = "quantization.json"  # in the new folder: what it was made from, which tells our folders from those of others
DRAFT = ".part"  # ends the name of a file that is being written
PLAIN = ("F64", "F32", "F16", "BF16")  # what is quantized from
ALIGNMENT = 8  # bytes, of the first tensor in a file
SMALL = 4 * 2**30  # bytes of the denoiser up to which the command measures the error unasked
# The clip the error is measured on: latent frames (9 pictures), latent rows and columns, latents of sound, tokens of text.
FRAMES, CELLS, SOUND, TEXT = 3, 8, 19, 16


@dataclass(frozen=True)
class FileResult:
    """A file of the new folder: bytes before and after, and whether it was there already."""

    name: str
    before: int
    after: int
    kept: bool = False


OnFile = Callable[[FileResult], None]


def quantize(folder: str | Path, out: str | Path, on_file: OnFile | None = None) -> list[FileResult]:
    """Writes the checkpoint `folder` with 8-bit weights to `out`; on_file is called after every file and may raise to stop.

    `out` may be missing, empty, or what an earlier call left of the same checkpoint: files that are whole are kept. Weights
    that are not quantized and the other sub-folders are the same, bit for bit (hard links where possible). Takes the memory
    of one tensor. InputError for folders that cannot be used, CheckpointError for weights that are damaged or not finite,
    and where `out` cannot be written; no file is left half-written.
    """
    root, target = checkpoint_folder(folder), Path(out)
    parts = [plan_part(open_component(root, name)) for name in FOLDERS.values()]
    check_target(root, target)
    results = []
    for result in write_folder(root, target, parts):
        results.append(result)
        if on_file is not None:
            on_file(result)
    return results


# ---------------------------------------------------------------- what is to be done

Plan = dict[str, tuple[str, tuple[int, ...], int]]  # of a file: dtype, shape and bytes of its tensors, in the order they are stored


@dataclass(frozen=True)
class PartPlan:
    """A part of the original, and what its weight files become."""

    component: Component
    files: dict[Path, Plan]

    @property
    def nbytes(self) -> int:
        return sum(nbytes for plan in self.files.values() for *_, nbytes in plan.values())


def plan_part(component: Component) -> PartPlan:
    """CheckpointError or InputError unless this is a whole part with plain weights."""
    if "quantization" in component.config:
        raise InputError(f"{component.folder} is quantized already: give the original checkpoint.")
    check_tensors(component, expected_shapes(component.name, component.config))
    index = component.index
    chosen = {f"{name}.weight" for name in linears_to_quantize(build_network(component.name, component.config))}
    if odd := [f"{key} ({index[key].dtype})" for key in sorted(chosen) if index[key].dtype not in PLAIN]:
        raise CheckpointError(f"{component.folder} stores {len(odd)} weights in a form that cannot be quantized (first: {odd[0]}): give the released files.")
    files: dict[Path, Plan] = {file: {} for file in weight_files(component.folder)}
    for key, entry in index.items():
        files[entry.file] |= plan_tensor(key, entry, key in chosen)
    return PartPlan(component, {file: dict(sorted(plan.items(), key=storage_order)) for file, plan in files.items()})


def plan_tensor(key: str, entry: TensorEntry, chosen: bool) -> Plan:
    if not chosen:
        return {key: (entry.dtype, entry.shape, entry.nbytes)}
    rows, columns = entry.shape
    return {key: ("F8_E4M3", entry.shape, rows * columns), scale_of(key): ("F32", (rows,), 4 * rows)}


def scale_of(key: str) -> str:
    return f"{key}_scale"


def storage_order(item: tuple[str, tuple[str, tuple[int, ...], int]]) -> tuple[int, str]:
    """Wide numbers first, so that all are aligned; then by name."""
    key, (_, shape, nbytes) = item
    return -nbytes // max(1, math.prod(shape)), key


def check_target(root: Path, target: Path) -> None:
    """InputError when writing there would touch what is not ours."""
    if target.resolve().is_relative_to(root.resolve()):
        raise InputError(f"{target} is inside the checkpoint {root}: give a folder beside it.")
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file: give the name of a new folder.")
    if target.is_dir() and any(target.iterdir()) and not (target / RECORD).is_file():
        raise InputError(f"{target} is not empty and was not made by 'quantize': give a new or empty folder.")


def begin_folder(target: Path, parts: list[PartPlan]) -> None:
    """Makes the folder and its record. InputError when it has the record of another checkpoint, CheckpointError where the disk is too small."""
    source = {f"{part.component.name}/{file.name}": file.stat().st_size for part in parts for file in part.files}
    record = {**QUANTIZATION, "source": source}
    if (target / RECORD).is_file():
        if read_json(target / RECORD) != record:
            raise InputError(f"{target} holds a quantized copy of another checkpoint (or of another version of it): give a new or empty folder.")
        return
    target.mkdir(parents=True, exist_ok=True)
    needed, free = sum(part.nbytes for part in parts), shutil.disk_usage(target).free
    if free < needed:
        raise CheckpointError(f"{target} needs {needed / 1e9:.2f} GB, but the disk has {free / 1e9:.2f} GB free: make room, or give a folder on another disk.")
    write_json(target / RECORD, record)


# ---------------------------------------------------------------- files


def write_folder(root: Path, target: Path, parts: list[PartPlan]) -> Iterator[FileResult]:
    """Writes file after file; CheckpointError where the disk refuses."""
    try:
        begin_folder(target, parts)
        for part in parts:
            yield from write_part(part, target / part.component.name)
        for file in (file for name in COPIED for file in sorted((root / name).rglob("*")) if file.is_file()):
            yield copy_file(file, target, file.relative_to(root))
        write_json(target / "model_index.json", read_json(root / "model_index.json"))
    except OSError as error:
        raise CheckpointError(
            f"{target} cannot be written ({error.strerror or error}): make room, or give a folder where you may write. The same call goes on where it stopped."
        ) from error


def write_part(part: PartPlan, folder: Path) -> Iterator[FileResult]:
    """Writes the files of a part one by one, its config.json last."""
    component = part.component
    folder.mkdir(exist_ok=True)
    for file, plan in part.files.items():
        yield write_weights(file, folder / file.name, plan)
    for index in component.folder.glob("*.safetensors.index.json"):
        weight_map = {key: file.name for file, plan in part.files.items() for key in plan}
        yield write_settings(index, folder / index.name, {"metadata": {"total_size": part.nbytes}, "weight_map": weight_map})
    yield write_settings(component.folder / "config.json", folder / "config.json", component.config | {"quantization": QUANTIZATION})


def write_weights(file: Path, target: Path, plan: Plan) -> FileResult:
    """Quantizes one file, unless it is there and right."""
    kept = target.exists() and is_right(file, target, plan)
    if not kept:
        with drafted(target) as draft:
            write_tensors(file, draft, plan)
            if not is_right(file, draft, plan):
                raise CheckpointError(f"{target} read back is not what was written: the disk or the memory of this machine is damaged.")
    return FileResult(f"{target.parent.name}/{target.name}", file.stat().st_size, target.stat().st_size, kept)


def convert(key: str, tensor: Tensor, plan: Plan) -> dict[str, Tensor]:
    """A tensor of the original, or some rows of it, as it is stored."""
    if scale_of(key) not in plan:
        return {key: tensor}
    return dict(zip((key, scale_of(key)), quantize_rows(tensor), strict=True))


def write_tensors(file: Path, draft: Path, plan: Plan) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end, offsets = 0, {}
    for key, (dtype, shape, nbytes) in plan.items():
        offsets[key], end = end, end + nbytes
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [offsets[key], end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with open_safetensors(file) as source, draft.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        start = stream.tell()
        for key in source.keys():
            tensor = source.get_tensor(key)
            if not torch.isfinite(tensor).all():
                raise CheckpointError(f"{file}: {key} holds NaN or infinite numbers; the download is damaged. Download it again.")
            for name, stored in convert(key, tensor, plan).items():
                stream.seek(start + offsets[name])
                stream.write(memoryview(as_bytes(stored)))
        stream.flush()
        os.fsync(stream.fileno())


def is_right(file: Path, written: Path, plan: Plan) -> bool:
    """Whether a file holds the tensors planned, and in a sample of rows the numbers of the original."""
    try:
        found = {key: (entry.dtype, entry.shape, entry.nbytes) for key, entry in read_header(written).items()}
    except CheckpointError:
        return False
    if found != plan:
        return False
    with open_safetensors(file) as source, open_safetensors(written) as copy:
        for key in source.keys():
            tensor = source.get_tensor(key)
            table = tensor.reshape(len(tensor) if tensor.ndim else 1, -1)
            rows = sorted({0, len(table) // 2, len(table) - 1})
            for name, expected in convert(key, table[rows], plan).items():
                stored = as_bytes(copy.get_tensor(name)).reshape(len(table), -1)[rows]  # of bytes: PyTorch 2.4 cannot pick rows of 8-bit floats
                if not (stored.ravel() == as_bytes(expected)).all():
                    return False
    return True


def as_bytes(tensor: Tensor) -> np.ndarray:
    return tensor.contiguous().flatten().view(torch.uint8).numpy()


def write_settings(source: Path, target: Path, values: dict[str, Any]) -> FileResult:
    kept = target.is_file() and read_json(target) == values
    if not kept:
        write_json(target, values)
    return FileResult(f"{target.parent.name}/{target.name}", source.stat().st_size, target.stat().st_size, kept)


def copy_file(file: Path, target: Path, name: Path) -> FileResult:
    """The same file in the new folder: a hard link where the disk has them."""
    copy, size = target / name, file.stat().st_size
    kept = copy.is_file() and copy.stat().st_size == size
    if not kept:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with drafted(copy) as draft:
            try:
                os.link(file.resolve(), draft)  # a downloaded checkpoint may hold links to a cache
            except OSError:
                shutil.copyfile(file, draft)
    return FileResult(name.as_posix(), size, size, kept)


def write_json(path: Path, value: dict[str, Any]) -> None:
    with drafted(path) as draft:
        draft.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8", newline="\n")


@contextmanager
def drafted(path: Path) -> Iterator[Path]:
    """A name to write to; the file gets its own name when the block ends well, and is gone otherwise."""
    draft = path.with_name(path.name + DRAFT)
    draft.unlink(missing_ok=True)  # of a call that was killed
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


# ---------------------------------------------------------------- what it costs


@dataclass(frozen=True)
class StepError:
    """How far the predicted clean latents of a step are from the original model's: relative L2 of both streams."""

    step: int  # from 1
    expert: str
    video: float
    audio: float

    def __str__(self) -> str:
        return f"step {self.step} ({self.expert} expert): video {self.video:.4f}, audio {self.audio:.4f}"


def measure_error(original: Denoiser, quantized: Denoiser, **settings: Any) -> list[StepError]:
    """Runs `mova.sample` with these settings on both and compares them step by step; errors add up from step to step."""
    steps: dict[str, list] = {"original": [], "quantized": []}
    for name, denoiser in (("original", original), ("quantized", quantized)):
        try:
            sample(denoiser, **settings, on_step=steps[name].append)
        finally:
            denoiser.release()
    return [
        StepError(a.index + 1, a.expert, relative(b.video, a.video), relative(b.audio, a.audio))
        for a, b in zip(steps["original"], steps["quantized"], strict=True)
    ]


def denoiser_bytes(folder: str | Path) -> int:
    """Of the weights that are measured."""
    return sum(open_component(folder, name).bytes_on_disk for name in FOLDERS.values())


def measure_folders(folder: str | Path, out: str | Path, *, device: str | torch.device = "cpu") -> list[StepError]:
    """The error of `out` against `folder` on a clip of 9 frames from random text: one step of each expert."""
    original, quantized = (load_denoiser(path, device=device) for path in (folder, out))
    config, generator = original.parts.experts["high"].config, torch.Generator("cpu").manual_seed(0)
    shape = (FRAMES, CELLS, CELLS)
    return measure_error(
        original,
        quantized,
        context=torch.randn(1, TEXT, config.text_dim, generator=generator),
        condition=torch.randn(1, config.in_dim - config.out_dim, *shape, generator=generator),
        video_noise=torch.randn(1, config.out_dim, *shape, generator=generator),
        audio_noise=torch.randn(1, original.audio_channels, SOUND, generator=generator),
        steps=2,
        cfg=1.0,
    )


def relative(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).double().norm() / reference.double().norm())
