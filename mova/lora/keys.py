"""What LoRA files call the layers of MOVA: endings, prefixes and names of every style, in tables (spec/mova.md 2.4, 7).

A key of a file is a layer's path and an ending that tells the tensor's role:
`diffusion_model.blocks.0.self_attn.q` + `.lora_A.weight`. Paths come with dots or, in kohya's files, with underscores; in the
original names of Wan, which MOVA has, or in those of diffusers; with or without the component they belong to.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# How keys end -> what the tensor is; the first that fits counts. The text in a group is the role itself.
ENDINGS = tuple(
    (re.compile(f"(?:{pattern})$"), role)
    for pattern, role in (
        (r"\.lora_B(?:\.\w+)?\.bias|\.lora_up\.bias", "up_bias"),
        (r"\.lora_A(?:\.\w+)?(?:\.weight)?|[._]lora[._]down(?:\.weight)?", "down"),
        (r"\.lora_B(?:\.\w+)?(?:\.weight)?|[._]lora[._]up(?:\.weight)?", "up"),
        (r"\.alpha", "alpha"),
        (r"\.dora_scale|\.lora_magnitude_vector(?:\.\w+)?(?:\.weight)?", "magnitude"),
        (r"\.hada_(w[12]_[ab])", "hada_"),
        (r"\.lokr_(w[12](?:_[ab])?)", "lokr_"),
        (r"\.diff|\.w_norm", "weight"),
        (r"\.diff_b|\.b_norm", "bias"),
        (r"\.diff_m", "modulation"),
    )
)

# Kinds of adapters that are not read here, by how their keys end.
UNREAD = {
    r"\.lora_mid\.weight|\.hada_t[12]|\.lokr_t2": "a Tucker decomposition",
    r"\.oft_(blocks|diag)|\.oft_R\.\w+(\.weight)?": "OFT",
    r"\.[ab][12]\.weight": "GLoRA",
    r"\.set_weight|\.reshape_weight": "replaced weights",
    r"\.lora_embedding_[AB]": "an adapted embedding",
    r"\.vera_lambda_[bd]": "VeRA",
}

# What may stand before a path without meaning, or within it (wrappers of trainers).
PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "pipeline.",
    "pipe.",
    "model.",
    "dit.",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
)
WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod|module|processor)\.")

# How the path begins in files that name the component -> part of the denoiser; "expert" is a video expert, which of them is told elsewhere.
COMPONENTS = {
    r"video_dit_2[._]|transformer_2\.|low_noise_model[._]": "low",
    r"video_dit[._]|high_noise_model[._]": "high",
    r"audio_dit[._]": "audio",
    r"dual_tower_bridge[._]": "bridge",
    r"transformer\.": "expert",
}
SECOND = re.compile(r"(^|\.)transformer_2\.")  # where there is one, `transformer` is the first: the high-noise expert

# Original names of a tower -> those of diffusers.
IN_BLOCK = {
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "self_attn.norm_q": "attn1.norm_q",
    "self_attn.norm_k": "attn1.norm_k",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "cross_attn.norm_q": "attn2.norm_q",
    "cross_attn.norm_k": "attn2.norm_k",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}
OUTSIDE = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
PARAMETERS = (".weight", ".bias")  # endings of tensors whose layer has a name of its own

# Keys that only other models have -> the model; the first that fits counts.
FAMILIES = tuple(
    (re.compile(pattern), family)
    for pattern, family in (
        (r"img_mlp[._]fc[12]|img_mod[._]linear|token_refiner|single_blocks[._]\d+[._]modulation[._]linear", "HunyuanVideo"),
        (r"img_mlp[._][02]\b|img_mod[._]lin\b|single_blocks[._]\d+[._]modulation[._]lin\b|single_transformer_blocks[._]\d", "Flux"),
        (r"(double|single)_blocks[._]\d", "Flux or HunyuanVideo"),
        (r"(img_mod|txt_mod|img_mlp|txt_mlp)[._]", "Qwen-Image"),
        (r"joint_blocks[._]\d|transformer_blocks[._]\d+[._]attn[._]add_[qkv]_proj", "Stable Diffusion 3"),
        (r"audio_attn[12]|audio_to_video_attn|transformer_blocks[._]\d+[._]attn2", "LTX-Video"),
        (r"lora_te2_|text_encoder_2|input_blocks[._][78][._]1[._]transformer_blocks|(down|up)_blocks\S*transformer_blocks[._][2-9][._]", "SDXL"),
        (r"(input|output|down|up)_blocks[._]\d|mid(dle)?_block[._]|lora_te_text_model", "Stable Diffusion 1.5 or SDXL"),
        (r"(?<!single_)transformer_blocks[._]\d+[._](attn1|norm1[._]linear)", "CogVideoX"),
        (r"attn[._](qkv|proj)_[xy]\b", "Mochi"),
        (r"(visual|text)_transformer_blocks[._]\d", "Kandinsky 5"),
        (r"(noise|context)_refiner[._]\d|layers[._]\d+[._](attention|feed_forward)[._]", "Lumina or Z-Image"),
        (r"layers[._]\d+[._](self_attn|mlp)[._](q|k|v|o|gate|up|down)_proj", "a language model"),
        (r"vace_blocks[._]\d", "Wan VACE"),
    )
)
# Models with Wan's names, by the width of their layers.
WIDTHS = {1536: "Wan 2.1 1.3B", 2048: "a small Wan model", 3072: "Wan 2.2 TI2V 5B", 5120: "Wan 2.1 or 2.2 14B"}


def split_key(key: str) -> tuple[str, str] | None:
    """(path of the layer, role of the tensor); None for an ending that is not known."""
    for pattern, role in ENDINGS:
        if found := pattern.search(key):
            return key[: found.start()], role + (found.group(1) if pattern.groups else "")
    return None


def unread_kind(key: str) -> str | None:
    """What kind of adapter a key belongs to that is not read here."""
    return next((kind for pattern, kind in UNREAD.items() if re.search(f"(?:{pattern})$", key)), None)


def split_path(path: str) -> tuple[str | None, str]:
    """(high, low, audio, bridge, expert, or None where the path does not tell; the path within the component)."""
    path = WRAPPERS.sub("", path)
    while prefix := next((prefix for prefix in PREFIXES if path.startswith(prefix)), None):
        path = path[len(prefix) :]
    for pattern, part in COMPONENTS.items():
        if found := re.match(pattern, path):
            return part, path[found.end() :]
    return None, path


@dataclass(frozen=True)
class LayerNames:
    """The layers of one tower or the bridge by every name they have in LoRA files."""

    paths: dict[str, str]  # any name -> original path

    def find(self, path: str) -> str | None:
        return self.paths.get(path)


def name_layers(keys: Iterable[str]) -> LayerNames:
    """The layers that have the tensors `keys`; a tensor that is no weight or bias counts as a layer, too."""
    found: dict[str, str] = {}
    for path in dict.fromkeys(layer_of(key) for key in keys):
        owners = (path, path.rpartition(".")[0]) if path.endswith(".modulation") else (path,)  # `.diff_m` is a tensor of the owner
        for name in owners:
            for spelling in (name, in_diffusers(name)):
                found |= {spelling: name, spelling.replace(".", "_"): name}
    return LayerNames(found)


def layer_of(key: str) -> str:
    """blocks.0.ffn.0.weight -> blocks.0.ffn.0; blocks.0.modulation stays."""
    return next((key[: -len(ending)] for ending in PARAMETERS if key.endswith(ending)), key)


def in_diffusers(path: str) -> str:
    """A tower's layer by the name diffusers gives it; other paths stay."""
    block, _, inside = path.partition(".")
    number, _, rest = inside.partition(".")
    if block == "blocks" and rest in IN_BLOCK:
        return f"blocks.{number}.{IN_BLOCK[rest]}"
    return OUTSIDE.get(path, path)


def guess_family(keys: Iterable[str], shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Which model a LoRA was made for, by its keys, then by the widths of Wan's layers."""
    keys = list(keys)
    for pattern, family in FAMILIES:
        if any(pattern.search(key) for key in keys):
            return family
    widths = [shapes[key][-1] for key in keys if re.search(r"(self_attn[._]q|attn1[._]to_q)\b.*(lora_A|lora[._]down)", key) and shapes[key]]
    return WIDTHS.get(widths[0]) if widths else None
