"""A start picture, sizes and lengths to CONDITIONING and empty LATENTs."""

from __future__ import annotations

import logging
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..mova.audio_vae import AudioVAEConfig
from ..mova.image import MAX_FRAMES, MAX_SIDE, SIDE, image_condition, snap_length, snap_size
from . import host, sockets

log = logging.getLogger("mova")

SIZES = {"match image 360p": (640, 352), "match image 720p": (1280, 720)}  # longer and shorter side in pixels, as released
CUSTOM = "custom"
CELL = 8  # pixels per latent of the Wan 2.1 VAE


class MOVAImageToVideoAudio(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MOVAImageToVideoAudio",
            display_name="MOVA Image to Video+Audio",
            category="MOVA/conditioning",
            description="Prepares a clip: the start picture becomes part of the conditioning, and empty latents tell size and length of picture and sound. "
            "Without a start picture the clip is made from text alone.",
            search_aliases=["mova", "i2v", "image to video", "text to video", "talking video", "start image", "first last frame"],
            inputs=[
                io.Conditioning.Input("positive", tooltip="What the clip should be. From MOVA Text Encode, or core's CLIP Text Encode of type wan."),
                io.Conditioning.Input("negative", tooltip="What the clip should not be."),
                io.Vae.Input("vae", tooltip="From Load MOVA Video VAE, or core's Load VAE with the Wan 2.1 VAE."),
                io.Combo.Input(
                    "size",
                    options=[*SIZES, CUSTOM],
                    tooltip="match image 360p: 640x352 or 352x640 px, whichever lies as the picture does. match image 720p: 1280x720 or 720x1280 px. custom: width and height below.",
                ),
                io.Int.Input(
                    "width",
                    default=640,
                    min=SIDE,
                    max=MAX_SIDE,
                    step=SIDE,
                    tooltip="Pixels, 16 to 4096; rounded to a multiple of 16. Used by size 'custom'; without a picture it tells upright from lying.",
                ),
                io.Int.Input(
                    "height",
                    default=352,
                    min=SIDE,
                    max=MAX_SIDE,
                    step=SIDE,
                    tooltip="Pixels, 16 to 4096; rounded to a multiple of 16. Used by size 'custom'; without a picture it tells upright from lying.",
                ),
                io.Int.Input(
                    "length",
                    default=193,
                    min=1,
                    max=MAX_FRAMES,
                    step=4,
                    tooltip="Pictures in the clip, 1 to 1921; rounded to 4n+1. 193 = 8 seconds at 24 per second, what MOVA was trained on.",
                ),
                io.Float.Input(
                    "fps",
                    default=24.0,
                    min=1.0,
                    max=120.0,
                    step=1.0,
                    tooltip="Pictures per second, 1 to 120; the sound's length follows from it. MOVA was trained on 24.",
                ),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Clips made at once, 1 to 64, each from noise of its own. Memory grows with it."),
                io.Image.Input(
                    "start_image", optional=True, tooltip="The clip's first picture; cut to the clip's aspect around the centre. Empty: video from text alone."
                ),
                io.Image.Input("end_image", optional=True, tooltip="The clip's last picture. MOVA was not trained for it; results vary."),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
                io.Latent.Output(display_name="video"),
                io.Latent.Output(display_name="audio"),
                io.Float.Output(display_name="fps", tooltip="For Create Video, whose own default is 30."),
            ],
        )

    @classmethod
    def execute(
        cls,
        positive: sockets.Conditioning,
        negative: sockets.Conditioning,
        vae: Any,
        size: str,
        width: int,
        height: int,
        length: int,
        fps: float,
        batch_size: int,
        start_image: Tensor | None = None,
        end_image: Tensor | None = None,
    ) -> io.NodeOutput:
        width, height = choose_size(size, width, height, start_image)
        length = choose_length(length)
        first, last = (image if image is None else image[picked] for image, picked in ((start_image, slice(0, 1)), (end_image, slice(-1, None))))
        condition = image_condition(sockets.ConditionVAE(vae), first, height=height, width=width, num_frames=length, last_image=last)
        device, clock = host.intermediate_device(), find_audio_clock(vae)
        values = {"concat_latent_image": condition[:, 4:].to(device), "concat_mask": (1 - condition[:, :4]).to(device), "frame_rate": fps}
        video = torch.zeros(batch_size, sockets.VIDEO_CHANNELS, condition.shape[2], height // CELL, width // CELL, device=device)
        audio = torch.zeros(batch_size, clock.latent_channels, clock.latent_length(length, fps), device=device)
        return io.NodeOutput(
            sockets.with_values(positive, values), sockets.with_values(negative, values), sockets.video_latent(video), sockets.audio_latent(audio, clock), fps
        )


def choose_size(size: str, width: int, height: int, picture: Tensor | None) -> tuple[int, int]:
    """(width, height) in pixels; a preset lies or stands as the picture does, or as width and height without one."""
    if size in SIZES:
        seen_height, seen_width = (height, width) if picture is None else picture.shape[1:3]
        return SIZES[size][::-1] if seen_height > seen_width else SIZES[size]
    snapped_height, snapped_width = snap_size(height, width)
    if (snapped_width, snapped_height) != (width, height):
        log.info("MOVA works with sides of a multiple of %d pixels: %dx%d became %dx%d.", SIDE, width, height, snapped_width, snapped_height)
    return snapped_width, snapped_height


def choose_length(length: int) -> int:
    if snap_length(length) != length:
        log.info("MOVA works with 4n+1 pictures: %d became %d.", length, snap_length(length))
    return snap_length(length)


def find_audio_clock(vae: Any) -> AudioVAEConfig:
    """The rates of the checkpoint the VAE is of; core's VAE knows none, so they are the released ones (the denoiser replaces empty sound anyway)."""
    return vae.audio_clock() if hasattr(vae, "audio_clock") else AudioVAEConfig()
