"""A checkpoint's text encoder in core's own CLIP class, and its video VAE as a file for core's Load VAE."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.ldm.wan.vae
import comfy.sd
import comfy.text_encoders.t5
import folder_paths
import torch
from comfy import sd1_clip
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

MODEL = Path(folder_paths.models_dir) / "mova" / "MOVA-360p"
VAE_FILE = Path(folder_paths.models_dir) / "vae" / "wan_2.1_vae.safetensors"
NAME = "umt5xxl"  # what core calls this kind of text encoder


def read_part(name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Config and weights of a sub-folder of the checkpoint."""
    folder = MODEL / name
    return json.loads((folder / "config.json").read_text(encoding="utf-8")), load_file(next(folder.glob("*.safetensors")))


# ---------------------------------------------------------------- text encoder


class TokenizerFile:
    """tokenizer.json behind the few methods that core asks of a tokenizer."""

    def __init__(self, path: str) -> None:
        self.tokenizer = Tokenizer.from_file(path)

    from_pretrained = classmethod(lambda cls, path, **_: cls(path))

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": self.tokenizer.encode(text).ids}

    def get_vocab(self) -> dict[str, int]:
        return self.tokenizer.get_vocab()


class SmallTokenizer(sd1_clip.SDTokenizer):
    """As core's for UMT5: 512 tokens at least, padded with 0, no start token."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] | None = None) -> None:
        lengths = {"max_length": 99999999, "min_length": 512, "pad_token": 0, "pad_to_max_length": False, "pad_with_end": False, "has_start_token": False}
        super().__init__(str(MODEL / "tokenizer" / "tokenizer.json"), embedding_size=32, embedding_key=NAME, tokenizer_class=TokenizerFile, **lengths)


class SmallTextModel(sd1_clip.SDClipModel):
    """Core's T5 with the sizes of the checkpoint."""

    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: dict[str, Any] | None = None, **_: Any) -> None:
        tokens = {"special_tokens": {"end": 1, "pad": 0}, "enable_attention_masks": True, "zero_out_masked": True}
        config = read_part("text_encoder")[0] | {"dense_act_fn": "gelu_pytorch_tanh"}  # core's name for gelu_new
        super().__init__(
            device=device, dtype=dtype, textmodel_json_config=config, model_class=comfy.text_encoders.t5.T5, model_options=model_options or {}, **tokens
        )


class Tokens(sd1_clip.SD1Tokenizer):
    def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
        super().__init__(embedding_directory=embedding_directory, clip_name=NAME, tokenizer=SmallTokenizer)


class TextModel(sd1_clip.SD1ClipModel):
    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None, **_: Any) -> None:
        super().__init__(device=device, dtype=dtype, model_options=model_options or {}, name=NAME, clip_model=SmallTextModel)


def load_core_clip() -> comfy.sd.CLIP:
    clip = comfy.sd.CLIP(target=SimpleNamespace(params={}, clip=TextModel, tokenizer=Tokens), model_options={"dtype": torch.float32})
    missing, _ = getattr(clip.cond_stage_model, NAME).transformer.load_state_dict(read_part("text_encoder")[1], strict=False)
    assert not missing, missing
    return clip


# ---------------------------------------------------------------- video VAE


def write_core_vae() -> None:
    """The checkpoint's video VAE under the original Wan names. They are found by sending core's own names through diffusers' conversion."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    config, ours = read_part("video_vae")
    sizes = {"dim": config["base_dim"], "z_dim": config["z_dim"], "dim_mult": config["dim_mult"], "num_res_blocks": config["num_res_blocks"]}
    network = comfy.ldm.wan.vae.WanVAE(**sizes, attn_scales=[], temperal_downsample=config["temperal_downsample"], image_channels=3, dropout=0.0)
    theirs = network.state_dict()
    converted = convert_wan_vae_to_diffusers({name: name for name in theirs})  # diffusers' name -> Wan's name
    VAE_FILE.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: ours[key].reshape(theirs[name].shape).contiguous() for key, name in converted.items()}, VAE_FILE)
