"""A small random checkpoint in the released layout (spec/mova.md section 2): it makes colours and noise, but every step of the real model runs on it."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .checkpoint import read_json
from .errors import CheckpointError, InputError
from .inspection import expected_shapes

NAME = "mova-studio-demo"  # in model_index.json: tells our folders from those of others
README = """A small random model in the folder layout of MOVA (seed {seed}).

It makes noise, not films: its weights are random numbers, never trained. It shows that an installation works and what
the files of a checkpoint are called. For real clips download OpenMOSS-Team/MOVA-360p or MOVA-720p.
"""

# ---------------------------------------------------------------- configs (spec/mova.md 2.2, 2.3, with small sizes)

TEXT_DIM, LATENTS, AUDIO_LATENTS = 32, 16, 16
SWITCHES = {
    "add_control_adapter": False, "fuse_vae_embedding_in_latents": False, "has_image_input": False, "has_image_pos_emb": False,
    "has_ref_conv": False, "in_dim_control_adapter": 24, "require_clip_embedding": False, "seperated_timestep": False,
}  # fmt: skip
TOWER = {"eps": 1e-6, "freq_dim": 48, "text_dim": TEXT_DIM, **SWITCHES}
VIDEO_TOWER = {
    "_class_name": "WanModel", "dim": 80, "in_dim": LATENTS + 4 + LATENTS, "ffn_dim": 176, "out_dim": LATENTS, "num_heads": 4, "num_layers": 4,
    "patch_size": [1, 2, 2], "require_vae_embedding": True, **TOWER,
}  # fmt: skip
VIDEO_VAE = {
    "_class_name": "AutoencoderKLWan", "attn_scales": [], "base_dim": 8, "dim_mult": [1, 2, 4, 4], "dropout": 0.0, "num_res_blocks": 2,
    "scale_factor_spatial": 8, "scale_factor_temporal": 4, "temperal_downsample": [False, True, True], "z_dim": LATENTS,
    "latents_mean": [-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508, 0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921],
    "latents_std": [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.916],
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "video_dit": VIDEO_TOWER,
    "video_dit_2": VIDEO_TOWER,
    "audio_dit": {
        "_class_name": "WanAudioModel", "dim": 40, "in_dim": AUDIO_LATENTS, "ffn_dim": 96, "out_dim": AUDIO_LATENTS, "num_heads": 2, "num_layers": 3,
        "patch_size": [1], "require_vae_embedding": False, "vae_type": "dac", **TOWER,
    },
    "dual_tower_bridge": {
        "_class_name": "DualTowerConditionalBridge", "visual_layers": 4, "audio_layers": 3, "visual_hidden_dim": 80, "audio_hidden_dim": 40, "audio_fps": 50.0,
        "head_dim": 20, "interaction_strategy": "full", "apply_cross_rope": True, "apply_first_frame_bias_in_rope": False,
        "trainable_condition_scale": False, "pooled_adaln": False,
    },
    "audio_vae": {
        "_class_name": "DAC", "encoder_dim": 4, "encoder_rates": [2, 3, 4, 5, 8], "decoder_dim": 128, "decoder_rates": [8, 5, 4, 3, 2],
        "latent_dim": AUDIO_LATENTS, "sample_rate": 48000, "continuous": True, "use_weight_norm": False,
        "n_codebooks": 9, "codebook_size": 1024, "codebook_dim": 8, "quantizer_dropout": False,
    },
    "video_vae": VIDEO_VAE,
    "text_encoder": {
        "architectures": ["UMT5EncoderModel"], "model_type": "umt5", "d_model": TEXT_DIM, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
        "feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new", "is_gated_act": True, "is_encoder_decoder": True, "layer_norm_epsilon": 1e-6,
        "relative_attention_max_distance": 128, "relative_attention_num_buckets": 32, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
        "dropout_rate": 0.0, "tie_word_embeddings": False, "use_cache": False, "tokenizer_class": "T5TokenizerFast", "dtype": "float32",
    },
}  # fmt: skip
SCHEDULER = {
    "_class_name": "FlowMatchPairScheduler", "num_inference_steps": 50, "num_train_timesteps": 1000, "shift": 5.0, "sigma_max": 1.0,
    "sigma_min": 0.003 / 1.002, "extra_one_step": True, "inverse_timesteps": False, "reverse_sigmas": False, "exponential_shift": False,
    "exponential_shift_mu": None, "shift_terminal": None,
}  # fmt: skip
MODEL_INDEX = {
    "_class_name": "MOVA",
    "_name_or_path": NAME,
    "audio_dit": ["mova.diffusion.models.wan_audio_dit", "WanAudioModel"],
    "audio_vae": ["mova.diffusion.models.dac_vae", "DAC"],
    "audio_vae_type": "dac",
    "boundary_ratio": 0.9,
    "dual_tower_bridge": ["mova.diffusion.models.interactionv2", "DualTowerConditionalBridge"],
    "scheduler": ["mova.diffusion.schedulers.flow_match_pair", "FlowMatchPairScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "video_dit": ["mova.diffusion.models.wan_video_dit", "WanModel"],
    "video_dit_2": ["mova.diffusion.models.wan_video_dit", "WanModel"],
    "video_vae": ["diffusers", "AutoencoderKLWan"],
}

# ---------------------------------------------------------------- tokenizer

SPECIAL = ("<pad>", "</s>", "<s>", "<unk>")
WORDS = """the a an of and to in on is at with for by from as he she it they his her its their who that this one two man woman person child people face voice
speaks says talks sings laughs looks smiles walks stands sits holds turns opens window door room street city house garden sea lake river mountain forest sky sun
moon star light dark night day dusk dawn rain snow wind storm thunder fire water wave bird dog cat horse car train boat music piano guitar drum bell song sound
noise quiet soft loud slow fast warm cold red green blue yellow white black old young small large close up camera shot scene background foreground film picture
while then behind before under over between through into out down away video audio microphone crowd applause steps footsteps breath whisper""".split()
ENDINGS = ("ing", "ed", "er", "ly", "tion", "th", "en", "re", "al")


def build_tokenizer() -> Any:
    """Any text in any script -> tokens and back: common words, single ASCII characters, and bytes for all that is neither."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    vocabulary = [(piece, 0.0) for piece in SPECIAL]
    vocabulary += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    vocabulary += [("▁", -4.0)] + [(chr(code), -9.0) for code in range(0x21, 0x7F)]
    vocabulary += [(f"▁{word}", -6.0) for word in dict.fromkeys(WORDS)] + [(ending, -8.0) for ending in ENDINGS]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=SPECIAL.index("<unk>"), byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def write_tokenizer(folder: Path) -> int:
    """The files of `tokenizer/`; returns the size of the vocabulary."""
    folder.mkdir()
    tokenizer = build_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(folder / "special_tokens_map.json", names)
    settings = {
        "tokenizer_class": "T5TokenizerFast",
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
        "extra_ids": 0,
        "additional_special_tokens": [],
    }
    write_json(folder / "tokenizer_config.json", {**names, **settings})
    return tokenizer.get_vocab_size()


# ---------------------------------------------------------------- weights

# Which tensors are no plain weights: pattern of the name -> (mean, spread).
SPREADS = {
    r"relative_attention_bias\.weight$": (0.0, 0.5),
    r"shared\.weight$": (0.0, 1.0),
    r"(norm\w*\.weight|\.gamma|\.alpha)$": (1.0, 0.1),
    r"\.?modulation$": (0.0, 0.3),
    r"^decoder\.model\.7\.bias$": (0.0, 0.002),  # hardly any constant offset in the sound
    r"\.bias$": (0.0, 0.05),
}
# Where 1/sqrt(fan in) is not what a trained model has: pattern of the name -> factor.
GAINS = {
    r"SelfAttention\.q\.weight$": 8**-0.5,  # this attention has no 1/sqrt(d_kv) of its own
    r"block\.\d\.block\.3\.weight$": 0.3,  # residual units of the audio VAE: each adds a little
    r"^decoder\.model\.\d\.block\.1\.weight$": 0.7,
    r"^decoder\.model\.7\.weight$": 0.3,  # the sound's level
}


def random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Values of a size that keeps activations about as large as they come in."""
    noise = torch.randn(shape, generator=generator)
    for pattern, (mean, spread) in SPREADS.items():
        if re.search(pattern, name):
            return mean + spread * noise
    if name == "decoder.model.7.weight":
        noise -= noise.mean(dim=-1, keepdim=True)  # nor from the channels that feed it
    gain = next((factor for pattern, factor in GAINS.items() if re.search(pattern, name)), 1.0)
    return noise * gain / math.sqrt(math.prod(shape[1:]))


def write_weights(folder: Path, name: str, config: dict[str, Any], generator: torch.Generator) -> None:
    folder.mkdir()
    write_json(folder / "config.json", config)
    tensors = {key: random_tensor(key, shape, generator) for key, shape in sorted(expected_shapes(name, config).items())}
    file = "model.safetensors" if name == "text_encoder" else "diffusion_pytorch_model.safetensors"
    save_file(tensors, folder / file, metadata={"format": "pt"})


# ---------------------------------------------------------------- the folder


def write_demo_model(folder: str | Path, *, seed: int = 0) -> Path:
    """Writes the checkpoint into `folder` (a few MB; the same seed gives the same bytes) and returns it.

    The folder may be missing, empty, or an earlier demo model, which is replaced; with anything else in it: InputError.
    It appears complete or not at all. CheckpointError when it cannot be written.
    """
    target = Path(folder).resolve()
    draft = target.with_name(f".{target.name}-{secrets.token_hex(6)}")
    try:
        check_free(target)
        draft.mkdir(parents=True)
        fill_folder(draft, seed)
        if target.exists():
            shutil.rmtree(target)
        os.replace(draft, target)
    except OSError as error:
        raise CheckpointError(f"The demo model cannot be written to {target} ({error.strerror or error}): give a folder where you may write.") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def fill_folder(folder: Path, seed: int) -> None:
    generator = torch.Generator("cpu").manual_seed(seed)
    vocabulary = write_tokenizer(folder / "tokenizer")
    for name, config in CONFIGS.items():
        write_weights(folder / name, name, config | ({"vocab_size": vocabulary} if name == "text_encoder" else {}), generator)
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(folder / "model_index.json", MODEL_INDEX)
    (folder / "README.txt").write_text(README.format(seed=seed), encoding="utf-8", newline="\n")


def check_free(target: Path) -> None:
    """InputError when writing there would destroy what is not ours."""
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(f"{target} is a file: give the name of a folder for the demo model.")
    foreign = [file.name for file in sorted(target.rglob("*")) if file.is_file() and not is_own_file(file.relative_to(target))]
    ours = not any(target.iterdir()) or read_name(target) == NAME
    if foreign or not ours:
        raise InputError(f"{target} is not empty ({foreign[0] if foreign else 'another model'} is in it): give a new or empty folder for the demo model.")


def is_own_file(path: Path) -> bool:
    return path.as_posix() in ("model_index.json", "README.txt") or (
        len(path.parts) == 2 and path.parts[0] in MODEL_INDEX and path.suffix in (".json", ".safetensors")
    )


def read_name(folder: Path) -> str | None:
    try:
        return read_json(folder / "model_index.json").get("_name_or_path")
    except CheckpointError:
        return None


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8", newline="\n")
