"""Marks what of a LATENT is kept while the rest is made."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..mova.latents import audio_span, video_span
from ..mova.video_vae import VideoVAEConfig
from . import sockets

SECONDS = {"min": 0.0, "max": 3600.0, "step": 0.1, "round": 0.001, "optional": True}


class MOVAKeepStream(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MOVAKeepStream",
            display_name="MOVA Keep Picture / Sound",
            category="MOVA/latent",
            description="Keeps the picture while the sound is made anew, or the sound while the picture is made to it; the whole stream or a span of seconds. "
            "Goes between the latents and MOVA Joint Denoiser. Several in a row add up.",
            search_aliases=["mova", "noise mask", "lock audio", "lock video", "dubbing", "inpaint"],
            inputs=[
                io.Latent.Input("samples", tooltip="The stream to keep: video latents or audio latents that hold something."),
                io.Float.Input(
                    "keep", default=1.0, min=0.0, max=1.0, step=0.01, round=0.001, tooltip="How much is kept, 0 to 1. 1 = exactly as it is, 0 = made anew."
                ),
                io.Float.Input("from_seconds", default=0.0, **SECONDS, tooltip="Where keeping begins, 0 to 3600 seconds."),
                io.Float.Input("to_seconds", default=0.0, **SECONDS, tooltip="Where keeping ends, 0 to 3600 seconds. 0 = the end of the clip."),
                io.Float.Input(
                    "fps",
                    default=24.0,
                    min=1.0,
                    max=120.0,
                    step=1.0,
                    optional=True,
                    tooltip="Pictures per second of the clip, 1 to 120; used for a span of video latents.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="samples")],
        )

    @classmethod
    def execute(cls, samples: sockets.Latent, keep: float, from_seconds: float = 0.0, to_seconds: float = 0.0, fps: float = 24.0) -> io.NodeOutput:
        stream = sockets.read_stream(samples, "audio" if samples["samples"].ndim == 3 else "video")
        span = kept_span(stream, from_seconds, to_seconds or None, fps)
        mask = sockets.keep_cells(stream, span, keep)
        return io.NodeOutput(samples | {"noise_mask": mask})


def kept_span(stream: sockets.Stream, start: float, end: float | None, fps: float) -> torch.Tensor:
    """[T] bool: which latents of the stream the seconds cover."""
    length = stream.samples.shape[2]
    if stream.name == "video":
        return video_span(length, start, end, fps, VideoVAEConfig().scale_factor_temporal)
    if start == 0 and end is None:
        return torch.ones(length, dtype=torch.bool)
    return audio_span(length, start, end, sockets.latents_per_second(stream))
