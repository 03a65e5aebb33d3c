"""The names of tensors here and in released files, and what a foreign file is by its names (spec/cat.md 3.2)."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from .config import Architecture
from .trunk import AudioTransformer

PREFIX = "modality_encoders.IMAGE."
POSITIONS = f"{PREFIX}fixed_positional_encoder.positions"

# Ours -> released; the last Linear of a multi-resolution stem has no name of its own there, only the next number.
RENAMES = (
    (r"^class_token$", f"{PREFIX}extra_tokens"),
    (r"^norm\.", f"{PREFIX}context_encoder.norm."),
    (r"^stem\.projection\.", f"{PREFIX}local_encoder.proj."),
    (r"^stem\.stages\.(\d+)\.projection\.", PREFIX + r"patch_embed.\1.proj."),
    (r"^stem\.stages\.(\d+)\.norm\.", PREFIX + r"patch_embed.\1.norm."),
    (r"^stem\.branches\.(\d+)\.", PREFIX + r"stage_output_decode.\1."),
    (r"^stem\.blocks\.(\d+\.\d+)\.pointwise([12])\.", PREFIX + r"conv_blocks.\1.conv\2."),
    (r"^stem\.blocks\.(\d+\.\d+)\.depthwise\.", PREFIX + r"conv_blocks.\1.attn."),
    (r"^stem\.blocks\.(\d+\.\d+)\.(norm[12])\.", PREFIX + r"conv_blocks.\1.\2."),
    (r"^stem\.blocks\.(\d+\.\d+)\.(fc[12])\.", PREFIX + r"conv_blocks.\1.mlp.\2."),
    (r"^blocks\.(\d+)\.qkv\.", r"blocks.\1.attn.qkv."),
    (r"^blocks\.(\d+)\.projection\.", r"blocks.\1.attn.proj."),
    (r"^blocks\.(\d+)\.(fc[12])\.", r"blocks.\1.mlp.\2."),
)
HEAD_NAMES = {"norm.weight": "fc_norm.weight", "norm.bias": "fc_norm.bias", "linear.weight": "head.weight", "linear.bias": "head.bias"}
ALIGNMENT_NAMES = {"alignment.weight": "clap_proj.weight", "alignment.bias": "clap_proj.bias"}

# Parts of training that no listener needs.
LEFT_BEHIND = (f"{PREFIX}decoder.", "clap_proj.", "recon_proj.", "cls_proj.", "shared_decoder.", "center")

# A part of a name that tells a family of checkpoints.
FAMILIES = (
    ("relative_attention_bias", "a BEATs checkpoint"),
    ("audio_branch.", "a CLAP checkpoint"),
    ("module.v.", "an AST checkpoint"),
    ("audio_spectrogram_transformer.", "an AST checkpoint"),
    ("decoder_pos_embed", "an Audio-MAE (or MAE) checkpoint"),
    ("modality_encoders.AUDIO", "a data2vec 2.0 checkpoint for speech"),
    ("modality_encoders.TEXT", "a data2vec 2.0 checkpoint for text"),
    ("feature_extractor.conv_layers", "a wav2vec 2.0, HuBERT or data2vec checkpoint"),
    ("encoder.layers.0.encoder_attn", "a Whisper checkpoint"),
    ("lora_", "a LoRA"),
    ("conditioners.", "a part of a MOVA model (its bridge)"),
    ("cross_attn", "a diffusion model"),
    ("quantizer", "an audio codec"),
    ("freq_bias", "a Dasheng checkpoint"),
    ("init_bn.", "a Dasheng checkpoint"),
)


def released_names(architecture: Architecture) -> dict[str, tuple[str, torch.Size]]:
    """Name in a released file -> (our name, our shape), for every tensor of the encoder."""
    with torch.device("meta"):
        encoder = AudioTransformer(architecture)
    return {rename(name, len(architecture.kernels)): (name, tensor.shape) for name, tensor in encoder.state_dict().items()}


def rename(name: str, stages: int) -> str:
    if name.startswith("stem.last."):
        return name.replace("stem.last.", f"{PREFIX}patch_embed.{stages}.")
    return next((re.sub(pattern, released, name) for pattern, released in RENAMES if re.match(pattern, name)), name)


def to_released(encoder: dict[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """An encoder's state dict under released names; 1x1 convolutions get their two sides of one back."""
    names = {ours: released for released, (ours, _) in released_names(architecture).items()}
    return {names[name]: with_sides(names[name], tensor) for name, tensor in encoder.items()}


def with_sides(name: str, tensor: Tensor) -> Tensor:
    return tensor[..., None, None] if "conv_blocks" in name and tensor.ndim == 2 else tensor


def is_encoder(names: object) -> bool:
    return any(f"{PREFIX}{stem}" in names for stem in ("local_encoder.proj.weight", "patch_embed.0.proj.weight"))


def name_family(names: object) -> str:
    """What a file of other tensors is, in words."""
    found = next((words for part, words in FAMILIES if any(part in name for name in names)), None)
    first = ", ".join(sorted(names)[:2])
    return found or (f"a file of {len(names)} other tensors (first: {first})" if names else "a file without tensors")
