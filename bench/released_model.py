"""A random MOVA of the released size on disk: 37 GB, both experts the same file (spec/performance.md 5.2). Needs a GPU to draw the numbers in seconds."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from .mid_model import BOUNDARY_RATIO, SCHEDULER, Config, Size, centre_and_spread, component_configs, weight_slots, write_json

RELEASED = Size(128, 40, 40, 13824, 12, 30, 8960, 4096, 512, 256, 128, (49, 44, 80), 403)  # 360p, 193 frames
RELEASED_720P = replace(RELEASED, latent_grid=(49, 90, 160))
TWO_LAYERS = replace(RELEASED, video_layers=2, audio_layers=1)  # one with sound and bridge, one without
BYTES = {RELEASED: 37e9, TWO_LAYERS: 3e9}


def write_released_model(folder: Path, size: Size, device: torch.device) -> Path:
    """Writes the denoiser's components, a shard per layer; a folder that is whole is used again. OSError when the disk is too small."""
    if (folder / "model_index.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder).free < BYTES[size] + 2e9:
        raise OSError(
            f"{folder} has {shutil.disk_usage(folder).free / 1e9:.0f} GB free; the random model takes {BYTES[size] / 1e9:.0f}: choose another --folder."
        )
    for name, config in component_configs(size).items():
        part = folder / name
        part.mkdir(exist_ok=True)
        write_json(part / "config.json", config)
        if name == "video_dit_2":
            share_weights(folder / "video_dit", part)
        else:
            write_shards(part, config, device)
    (folder / "scheduler").mkdir(exist_ok=True)
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(folder / "model_index.json", {"_class_name": "MOVA", "audio_vae_type": "dac", "boundary_ratio": BOUNDARY_RATIO})
    return folder


def write_shards(part: Path, config: Config, device: torch.device) -> None:
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, slot in weight_slots(config).items():
        layer = re.match(r"\w+\.(\d+)\.", name) if name.startswith(("blocks.", "audio_to_", "video_to_")) else None
        shards.setdefault(f"diffusion_pytorch_model-{layer[1] if layer else 'rest'}.safetensors", {})[name] = slot
    for file, slots in shards.items():
        drawn = {name: torch.empty(slot.shape, device=device).normal_(*centre_and_spread(name, slot)).bfloat16().cpu() for name, slot in slots.items()}
        save_file(drawn, part / file)
    weight_map = {name: file for file, slots in shards.items() for name in slots}
    (part / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


def share_weights(source: Path, target: Path) -> None:
    for file in source.glob("diffusion_pytorch_model*"):
        os.link(file, target / file.name)
