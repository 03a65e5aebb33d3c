"""Any LoRA that is read here -> one clean safetensors file with the keys ComfyUI uses.

`diffusion_model.<layer>.lora_A.weight` and so on, with MOVA's component before the layer where the file names one; an `.alpha`
beside every product, so that the scale needs no other file; and metadata.
"""

from __future__ import annotations

import math
import os
import secrets
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import LoraError
from ..parts import FOLDERS
from .adapters import Adapter, read_adapter, split_layers
from .files import ADAPTER_METADATA, LoraFile, read_lora_file
from .keys import SECOND, LayerNames, name_layers, split_path
from .places import Shapes, refuse_file
from .report import EXPERT_METADATA, TRIGGERS, guess_expert, made_for_sound, trigger_words

PREFIX = "diffusion_model"
# Role of a tensor -> how its key ends.
ENDINGS = {
    "down": "lora_A.weight",
    "up": "lora_B.weight",
    "magnitude": "dora_scale",
    "weight": "diff",
    "bias": "diff_b",
    **{f"hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b")},
    **{f"lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")},
}


def convert_lora(path: str | Path, out: str | Path, released: Shapes, *, alpha: float | None = None) -> str:
    """Writes the LoRA at `path` (a file, or its trainer's folder) to `out` and tells what it did. Layer names are those of `released`.

    alpha None = the file's own. LoraError for a LoRA that cannot be used and for an `out` that exists; nothing is left half-written.
    """
    target = Path(out)
    if target.suffix.lower() != ".safetensors":
        raise LoraError(f"{target}: the new file must end in .safetensors.")
    if target.exists():
        raise LoraError(f"{target} exists already: give a new name.")
    if not math.isfinite(alpha or 0.0):
        raise LoraError(f"alpha is {alpha}; a finite number is needed.")
    file = read_lora_file(path)
    tensors, left_out = rename_tensors(file, released, alpha)
    write_file(target, tensors, describe_origin(file))
    lost = f"; {len(left_out)} layers that MOVA does not have are left out (first: {left_out[0]})" if left_out else ""
    return f"{target}: {len(tensors)} tensors, {sum(tensor.nbytes for tensor in tensors.values()) / 1e6:.1f} MB, from {file.label}{lost}"


def rename_tensors(file: LoraFile, released: Shapes, alpha: float | None) -> tuple[dict[str, Tensor], list[str]]:
    """(tensors by their new keys, paths that no layer has). LoraError where that is most of them."""
    layers, left_out = split_layers(file)
    names = {part: name_layers(released[part]) for part in ("high", "audio", "bridge")}
    both = any(SECOND.search(key) for key in file.tensors)
    tensors: dict[str, Tensor] = {}
    for path, roles in layers.items():
        if (place := find_place(path, names, both)) is None:
            left_out.append(path)
            continue
        renamed = rename_layer(place, roles, read_adapter(file, path, roles, alpha))
        if twice := renamed.keys() & tensors.keys():
            raise LoraError(f"{file.path} holds {min(twice)} twice, under several names: it is damaged.")
        tensors |= renamed
    if len(left_out) > len(layers) / 2:
        refuse_file(file, len(layers), left_out)
    return tensors, left_out


def find_place(path: str, names: dict[str, LayerNames], both: bool) -> str | None:
    """The new path of a layer; both: the file holds both experts in the manner of diffusers, so that `transformer` is the first."""
    told, inside = split_path(path)
    told = "high" if told == "expert" and both else told
    for part in (told,) if told in ("audio", "bridge") else ("high",) if told else ("high", "bridge"):
        if layer := names[part].find(inside):
            component = FOLDERS.get("bridge" if part == "bridge" else told)
            return ".".join(filter(None, (PREFIX, component, layer)))
    return None


def rename_layer(place: str, roles: dict[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """The tensors of a layer by their new keys."""
    tensors = {f"{place}.{ENDINGS[role]}": tensor for role, tensor in roles.items() if role in ENDINGS}
    if "magnitude" in roles and roles["magnitude"].ndim == 1:  # peft's; ComfyUI multiplies whole rows
        tensors[f"{place}.{ENDINGS['magnitude']}"] = roles["magnitude"][:, None]
    if "modulation" in roles:
        tensors[f"{place}.modulation.diff"] = roles["modulation"]
    for delta in adapter.changes.get("weight", []):
        if delta.rank is not None:
            tensors[f"{place}.alpha"] = torch.tensor(delta.scale * delta.rank)
    if "up_bias" in roles:
        scale = adapter.changes["bias"][-1].scale
        tensors[f"{place}.diff_b"] = roles["up_bias"] * scale + tensors.get(f"{place}.diff_b", 0.0)
    return tensors


def describe_origin(file: LoraFile) -> dict[str, str]:
    """Metadata: what the original had and what its name told. The scale is in the tensors now and nowhere else."""
    metadata = {key: value for key, value in file.metadata.items() if key != ADAPTER_METADATA}
    metadata |= {"format": "pt", "mova.source": file.label}
    expert, _ = guess_expert(file)
    if expert == "both" and made_for_sound(file):
        expert = "audio"
    if expert != "both":
        metadata[EXPERT_METADATA] = expert
    if words := trigger_words(file.metadata):
        metadata.setdefault(TRIGGERS[0], words)
    return metadata


def write_file(target: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Under the final name only when it is whole."""
    draft = target.with_name(f".{target.name}-{secrets.token_hex(6)}")
    try:
        save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, draft, metadata=metadata)
        os.replace(draft, target)
    except (OSError, SafetensorError) as error:
        raise LoraError(f"{target} cannot be written ({getattr(error, 'strerror', None) or error}): give a folder where you may write.") from None
    finally:
        draft.unlink(missing_ok=True)
