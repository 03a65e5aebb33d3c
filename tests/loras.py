"""LoRA files in every style, and checkpoints with them merged by hand."""

import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

WEIGHTS = "diffusion_pytorch_model.safetensors"
COMPONENTS = ("video_dit", "video_dit_2", "audio_dit", "dual_tower_bridge")


def weights_of(folder, component):
    return load_file(folder / component / WEIGHTS)


def linears_of(folder, component):
    """{path: [out, in]} of the linears within layers."""
    with safe_open(folder / component / WEIGHTS, "pt") as handle:
        shapes = {key: tuple(handle.get_slice(key).get_shape()) for key in handle.keys()}
    inside = ("blocks.", "audio_to", "video_to")
    return {key.removesuffix(".weight"): shape for key, shape in shapes.items() if len(shape) == 2 and key.startswith(inside)}


def random_factors(shapes, rank=4, seed=0, scale=0.1):
    """{path: (down [r, in], up [out, r])}."""
    generator = torch.Generator().manual_seed(seed)
    return {
        path: (torch.randn(rank, shape[1], generator=generator), scale * torch.randn(shape[0], rank, generator=generator)) for path, shape in shapes.items()
    }


def write_lora(file, factors, name="diffusion_model.{}", endings=("lora_A.weight", "lora_B.weight"), alpha=None, metadata=None):
    """A LoRA of plain factors; name: how a path is written."""
    tensors = {}
    for path, (down, up) in factors.items():
        place = name.format(path)
        tensors |= {f"{place}.{endings[0]}": down.clone(), f"{place}.{endings[1]}": up.clone()}
        if alpha is not None:
            tensors[f"{place}.alpha"] = torch.tensor(float(alpha))
    save_file(tensors, file, metadata=metadata)
    return file


def full_factors(folder, seed=0, components=COMPONENTS, **given):
    """Factors for every linear of every component, by component and path."""
    return {name: random_factors(linears_of(folder, name), seed=seed + number, **given) for number, name in enumerate(components)}


def write_full_lora(file, factors, **given):
    return write_lora(file, {f"{name}.{path}": pair for name, paths in factors.items() for path, pair in paths.items()}, name="{}", **given)


def products(factors, scale=1.0):
    """{component: {key of a weight: delta}}, float32."""
    return {name: {f"{path}.weight": scale * (up.float() @ down.float()) for path, (down, up) in paths.items()} for name, paths in factors.items()}


def merge_checkpoint(folder, target, deltas, dtype=None):
    """A copy of a checkpoint with the deltas added in float32 and rounded once; dtype: what it is stored in (None = as it was)."""
    shutil.copytree(folder, target, copy_function=shutil.copyfile)
    for name in COMPONENTS:
        tensors = weights_of(folder, name)
        for key, delta in deltas.get(name, {}).items():
            tensors[key] = (tensors[key].float() + delta.reshape(tensors[key].shape)).to(tensors[key].dtype)
        save_file(tensors if dtype is None else {key: tensor.to(dtype) for key, tensor in tensors.items()}, Path(target) / name / WEIGHTS)
    return Path(target)
