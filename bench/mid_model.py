"""A random MOVA in the released folder layout, large enough to time on a CPU and small enough to write in a minute (spec/performance.md 4.1)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .plain import Bridge, Config, Tower

BOUNDARY_RATIO = 0.9
SCHEDULER = {"_class_name": "FlowMatchPairScheduler", "shift": 5.0, "extra_one_step": True, "num_train_timesteps": 1000}
REAL_ROWS = (27, 22)  # tokens of the positive and the negative prompt; the other rows are padding


@dataclass(frozen=True)
class Size:
    """The default is the model of performance.md 4.1: 560 video tokens, 36 audio tokens, 512 text rows; 5.5 GB in float32."""

    head_dim: int = 128
    video_heads: int = 12
    video_layers: int = 12
    video_ffn: int = 8960
    audio_heads: int = 6
    audio_layers: int = 12
    audio_ffn: int = 4480
    text_dim: int = 4096
    text_rows: int = 512
    freq_dim: int = 256
    audio_channels: int = 128
    latent_grid: tuple[int, int, int] = (7, 16, 20)  # T, h, w; tokens are T*(h/2)*(w/2)
    audio_length: int = 36


SIZES = {
    "mid": Size(),
    # 24 thin layers: an expert is many layers large, as in the release, and writes in seconds (0.5 GB in bfloat16)
    "memory": Size(64, 12, 24, 2048, 6, 20, 1024, 256, 64, 64, 16, (3, 8, 8), 19),
    "small": Size(48, 4, 3, 448, 2, 2, 224, 64, 512, 32, 16, (3, 6, 8), 19),
}


@dataclass(frozen=True)
class Inputs:
    """What one guided step takes: latents float32, contexts [1, rows, text_dim] whose padding is exactly zero, a timestep of the high-noise expert."""

    video: Tensor  # [1, 16, T, h, w]
    audio: Tensor  # [1, Ca, Ta]
    condition: Tensor  # [1, 20, T, h, w]: 4 mask channels, 1 in the first frame, then 16 of picture latents
    positive: Tensor
    negative: Tensor
    timestep: float


def mid_inputs(seed: int = 0, size: Size = SIZES["mid"]) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    video = torch.randn(1, 16, *size.latent_grid, generator=generator)
    audio = torch.randn(1, size.audio_channels, size.audio_length, generator=generator)
    mask = torch.zeros(1, 4, *size.latent_grid)
    mask[:, :, 0] = 1
    condition = torch.cat([mask, torch.randn(video.shape, generator=generator)], dim=1)
    contexts = torch.zeros(2, 1, size.text_rows, size.text_dim)
    for context, rows in zip(contexts, REAL_ROWS, strict=True):
        context[:, :rows] = torch.randn(rows, size.text_dim, generator=generator)
    return Inputs(video, audio, condition, contexts[0], contexts[1], 950.0)


def write_mid_model(folder: str | Path, dtype: torch.dtype, seed: int = 0, size: Size = SIZES["mid"]) -> Path:
    """Writes video_dit, video_dit_2, audio_dit, dual_tower_bridge and the scheduler; model_index.json comes last, so a folder that has it is whole.

    The same seed gives the same numbers in every dtype, rounded to it.
    """
    root = Path(folder)
    for number, (name, config) in enumerate(component_configs(size).items()):
        part = root / name
        part.mkdir(parents=True, exist_ok=True)
        write_json(part / "config.json", config)
        save_file(random_weights(config, dtype, torch.Generator().manual_seed(1000 * seed + number)), part / "diffusion_pytorch_model.safetensors")
    (root / "scheduler").mkdir(exist_ok=True)
    write_json(root / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(root / "model_index.json", {"_class_name": "MOVA", "audio_vae_type": "dac", "boundary_ratio": BOUNDARY_RATIO})
    return root


def component_configs(size: Size) -> dict[str, Config]:
    shared = {"text_dim": size.text_dim, "freq_dim": size.freq_dim, "eps": 1e-6, "has_image_input": False}
    video = {
        "_class_name": "WanModel", "dim": size.video_heads * size.head_dim, "in_dim": 36, "out_dim": 16, "ffn_dim": size.video_ffn,
        "num_heads": size.video_heads, "num_layers": size.video_layers, "patch_size": [1, 2, 2], "require_vae_embedding": True, "require_clip_embedding": False,
    }  # fmt: skip
    audio = {
        "_class_name": "WanAudioModel", "dim": size.audio_heads * size.head_dim, "in_dim": size.audio_channels, "out_dim": size.audio_channels, "ffn_dim": size.audio_ffn,
        "num_heads": size.audio_heads, "num_layers": size.audio_layers, "patch_size": [1], "vae_type": "dac",
    }  # fmt: skip
    bridge = {
        "_class_name": "DualTowerConditionalBridge", "visual_layers": size.video_layers, "audio_layers": size.audio_layers,
        "visual_hidden_dim": video["dim"], "audio_hidden_dim": audio["dim"], "audio_fps": 50.0, "head_dim": size.head_dim, "interaction_strategy": "full",
        "apply_cross_rope": True, "apply_first_frame_bias_in_rope": False, "trainable_condition_scale": False, "pooled_adaln": False,
    }  # fmt: skip
    return {"video_dit": video | shared, "video_dit_2": video | shared, "audio_dit": audio | shared, "dual_tower_bridge": bridge}


def random_weights(config: Config, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    """Normal numbers, drawn so that every layer, the prompt and the other stream show in the output: a model that hears nothing would hide a wrong sampler."""
    return {name: torch.empty(slot.shape).normal_(*centre_and_spread(name, slot), generator=generator).to(dtype) for name, slot in weight_slots(config).items()}


def weight_slots(config: Config) -> dict[str, Tensor]:
    """The tensors of a component, without memory."""
    with torch.device("meta"):
        return (Bridge if "audio_fps" in config else Tower)(config).state_dict()


def centre_and_spread(name: str, slot: Tensor) -> tuple[float, float]:
    """Matrices N(0, 0.8/sqrt(inputs)), which is 0.02 at width 1536; biases 0.02; modulations 0.3 (gates far from zero); norm weights around 1, of
    queries and keys around 1.6 (attention that selects)."""
    if name.endswith("modulation"):
        return 0.0, 0.3
    if name.endswith(("norm_q.weight", "norm_k.weight")):
        return 1.6, 0.02
    if slot.ndim == 1 and name.endswith("weight"):
        return 1.0, 0.02
    return 0.0, 0.8 / slot[0].numel() ** 0.5 if slot.ndim > 1 else 0.02


def write_json(path: Path, values: Config) -> None:
    path.write_text(json.dumps(values, indent=2), encoding="utf-8")
