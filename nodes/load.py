"""Loaders: the parts of a MOVA checkpoint folder. Weights stay in their files until they are computed with."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..mova.attention import KERNELS
from ..mova.audio_vae import load_audio_vae
from ..mova.denoiser import load_denoiser
from ..mova.residency import MODES
from ..mova.text import load_text_encoder
from ..mova.video_vae import load_video_vae
from . import host
from .shelves import MODELS
from .vae_sockets import AudioVAESocket, VideoVAESocket

MovaModel = io.Custom("MOVA_MODEL")
MovaTextEncoder = io.Custom("MOVA_TEXT_ENCODER")

PRECISIONS = {"as stored": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": torch.float8_e4m3fn}


def model_input() -> io.Combo.Input:
    return io.Combo.Input(
        "model",
        options=MODELS.choices(),
        tooltip="A checkpoint folder in models/mova (the folder with model_index.json), as 'hf download OpenMOSS-Team/MOVA-360p' makes it.",
    )


class MovaLoader(io.ComfyNode):
    """What all loaders share: only a folder in the list is opened, and a missing one is explained before anything runs."""

    @classmethod
    def validate_inputs(cls, model: str | None = None) -> bool | str:
        return True if model is None else MODELS.check(model) or True  # None: the name comes over a link


class MOVALoadModel(MovaLoader):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MOVALoadModel",
            display_name="Load MOVA Model",
            category="MOVA/loaders",
            description="Opens both video experts, the audio tower and the bridge of a MOVA checkpoint. Quick: weights are read while sampling.",
            search_aliases=["mova", "audio video model", "talking video", "checkpoint"],
            inputs=[
                model_input(),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    tooltip="What is computed in. As stored: bf16 in the release. fp32 takes twice the memory. "
                    "fp8: the 8-bit weights of a checkpoint written by 'python -m mova quantize', half the memory.",
                ),
                io.Combo.Input(
                    "residency",
                    options=list(MODES),
                    tooltip="Where the weights are while sampling. resident: one expert, the audio tower and the bridge in GPU memory (about 36 GB). "
                    "stream: layer by layer from RAM, for smaller GPUs. auto: resident when it fits.",
                ),
                io.Combo.Input(
                    "attention",
                    options=list(KERNELS),
                    advanced=True,
                    tooltip="The attention kernel of PyTorch. auto: the fastest that agrees with PyTorch's default; others are refused where the GPU lacks them.",
                ),
            ],
            outputs=[MovaModel.Output(display_name="model")],
        )

    @classmethod
    def execute(cls, model: str, precision: str, residency: str, attention: str) -> io.NodeOutput:
        denoiser = load_denoiser(MODELS.path(model), device=host.torch_device(), dtype=PRECISIONS[precision], residency=residency)
        denoiser.attention = attention
        return io.NodeOutput(denoiser)


class MOVALoadTextEncoder(MovaLoader):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MOVALoadTextEncoder",
            display_name="Load MOVA Text Encoder",
            category="MOVA/loaders",
            description="Opens the text encoder (UMT5-XXL) of a MOVA checkpoint. Its weights are read at the first prompt that was not encoded before.",
            search_aliases=["mova", "umt5", "t5", "clip"],
            inputs=[
                model_input(),
                io.Combo.Input(
                    "device",
                    options=["auto", "cpu"],
                    tooltip="Where prompts are encoded. auto: where ComfyUI puts text encoders, layer by layer where they do not fit (11 GB). cpu: slower, needs no GPU memory.",
                ),
            ],
            outputs=[MovaTextEncoder.Output(display_name="text_encoder")],
        )

    @classmethod
    def execute(cls, model: str, device: str) -> io.NodeOutput:
        place = host.text_device() if device == "auto" else torch.device("cpu")
        return io.NodeOutput(load_text_encoder(MODELS.path(model), device=place, cache_dir=host.text_cache()))


class MOVALoadVideoVAE(MovaLoader):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MOVALoadVideoVAE",
            display_name="Load MOVA Video VAE",
            category="MOVA/loaders",
            description="Opens the video VAE of a MOVA checkpoint. It is the Wan 2.1 VAE: core's Load VAE with that file works as well.",
            search_aliases=["mova", "wan vae"],
            inputs=[model_input()],
            outputs=[io.Vae.Output(display_name="vae")],
        )

    @classmethod
    def execute(cls, model: str) -> io.NodeOutput:
        folder = MODELS.path(model)
        return io.NodeOutput(VideoVAESocket(load_video_vae(folder), folder))


class MOVALoadAudioVAE(MovaLoader):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MOVALoadAudioVAE",
            display_name="Load MOVA Audio VAE",
            category="MOVA/loaders",
            description="Opens the audio VAE of a MOVA checkpoint, which turns sound into latents (50 per second at 48 kHz in the release) and back.",
            search_aliases=["mova", "dac", "vocoder", "audio codec"],
            inputs=[model_input()],
            outputs=[io.Vae.Output(display_name="vae")],
        )

    @classmethod
    def execute(cls, model: str) -> io.NodeOutput:
        return io.NodeOutput(AudioVAESocket(load_audio_vae(MODELS.path(model))))
