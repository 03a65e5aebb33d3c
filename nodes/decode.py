"""LATENTs to pictures and sound."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from . import sockets
from .vae_sockets import VideoVAESocket


class MOVADecodeVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MOVADecodeVideo",
            display_name="MOVA Video Decode",
            category="MOVA/decode",
            description="Turns video latents into pictures, one after another, so that memory does not grow with the length of the clip.",
            search_aliases=["mova", "vae decode", "latent to image"],
            inputs=[
                io.Latent.Input("samples", tooltip="Video latents, or joint audio-video latents."),
                io.Vae.Input("vae", tooltip="From Load MOVA Video VAE, or core's Load VAE with the Wan 2.1 VAE."),
                io.Combo.Input(
                    "tiling",
                    options=["auto", "on", "off"],
                    tooltip="Whether pictures are decoded in tiles of 256 px, which needs less memory and more time. auto: when they do not fit.",
                ),
            ],
            outputs=[io.Image.Output(display_name="images")],
        )

    @classmethod
    def execute(cls, samples: sockets.Latent, vae: Any, tiling: str) -> io.NodeOutput:
        return io.NodeOutput(decode_video(sockets.decodable(samples, 0), vae, tiling))


class MOVADecodeAudio(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MOVADecodeAudio",
            display_name="MOVA Audio Decode (Vocoder)",
            category="MOVA/decode",
            description="Turns audio latents into sound. The level is left as the model made it.",
            search_aliases=["mova", "vocoder", "audio vae", "dac", "latent to audio"],
            inputs=[
                io.Latent.Input("samples", tooltip="Audio latents, or joint audio-video latents."),
                io.Vae.Input("vae", tooltip="From Load MOVA Audio VAE."),
            ],
            outputs=[io.Audio.Output(display_name="audio")],
        )

    @classmethod
    def execute(cls, samples: sockets.Latent, vae: Any) -> io.NodeOutput:
        return io.NodeOutput(decode_audio(sockets.decodable(samples, -1), vae))


def decode_video(latents: Tensor, vae: Any, tiling: str = "auto") -> Tensor:
    """[B, 16, T, h, w] by our VAE or core's -> [B*F, H, W, 3] in 0..1."""
    sockets.check_video_vae(vae)
    if isinstance(vae, VideoVAESocket):
        film = vae.decode(latents, tiling)
    else:
        film = vae.decode_tiled(latents) if tiling == "on" else vae.decode(latents)
    return film.flatten(0, -4)


def decode_audio(latents: Tensor, vae: Any) -> dict[str, Any]:
    """[B, Ca, Ta] -> AUDIO."""
    sockets.check_audio_vae(vae)
    return {"waveform": vae.decode(latents).movedim(-1, 1), "sample_rate": vae.audio_sample_rate}  # [B, S, C] -> [B, C, S]
