"""The joint sampler: noise to video and audio LATENTs."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..mova.denoiser import Denoiser
from ..mova.errors import InputError
from ..mova.pipeline import draw_noise
from ..mova.resume import Resume
from ..mova.sampler import Guidance, sample
from ..mova.schedule import MAX_STEPS, SCHEDULES
from ..mova.video_vae import open_latent_space
from . import host, sockets
from .load import MovaModel

SCALE = {"min": 0.0, "max": 100.0, "step": 0.1, "round": 0.01}
ZERO_IS_OWN = ("shift", "audio_cfg", "audio_shift", "boundary")  # widgets where 0 is the checkpoint's own value, or the picture's
SHARE = {"max": 1.0, "step": 0.01, "round": 0.001}


class MOVADenoise(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MOVADenoise",
            display_name="MOVA Joint Denoiser",
            category="MOVA/sampling",
            description="Makes picture and sound together, step by step from noise. Cancel works at any layer; the preview moves.",
            search_aliases=["mova", "sampler", "ksampler", "joint audio video", "euler"],
            inputs=[
                MovaModel.Input("model", tooltip="From Load MOVA Model."),
                io.Conditioning.Input("positive", tooltip="From MOVA Image to Video+Audio: prompt, start picture and frame rate."),
                io.Conditioning.Input("negative", tooltip="What to stay away from; not used when every guidance is 1."),
                io.Latent.Input(
                    "video",
                    tooltip="Video latents: empty ones for a new clip, or a clip to keep parts of or to start from. Joint audio-video latents supply both.",
                ),
                io.Latent.Input("audio", optional=True, tooltip="Audio latents, likewise. Empty: sound as long as the video."),
                io.Int.Input(
                    "seed",
                    default=42,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=True,
                    tooltip="Number the noise is drawn with, 0 to 2^64-1. The same seed and settings give the same clip.",
                ),
                io.Int.Input(
                    "steps", default=50, min=1, max=MAX_STEPS, tooltip="Steps from noise to clip, 1 to 1000. 50 is the release's; few-step LoRAs need 4 to 8."
                ),
                io.Float.Input(
                    "cfg", default=5.0, **SCALE, tooltip="How strictly the prompt is followed, 0 to 100. 5 is the release's. 1 = no guidance, twice as fast."
                ),
                io.Float.Input(
                    "shift", default=0.0, **SCALE, tooltip="How long steps stay at high noise, above 0 to 100. 0 = the checkpoint's own (5 in the release)."
                ),
                io.Combo.Input(
                    "schedule", options=list(SCHEDULES), tooltip="reference: the released grid of noise levels. simple: evenly spaced ones, for few-step LoRAs."
                ),
                io.Float.Input("audio_cfg", default=0.0, **SCALE, advanced=True, tooltip="cfg of the sound alone, above 0 to 100. 0 = as cfg."),
                io.Float.Input("audio_shift", default=0.0, **SCALE, advanced=True, tooltip="shift of the sound alone, above 0 to 100. 0 = as shift."),
                io.Float.Input(
                    "bridge_guidance",
                    default=1.0,
                    **SCALE,
                    advanced=True,
                    tooltip="How strictly picture and sound follow each other, 0 to 100. 1 = as the model does by itself. Other values: a third pass per step, closer sync; 3.5 is a start.",
                ),
                io.Float.Input(
                    "boundary",
                    default=0.0,
                    min=0.0,
                    **SHARE,
                    advanced=True,
                    tooltip="Noise level where the second video expert takes over, above 0 to 1. 0 = the checkpoint's own (0.9 in the release).",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.01,
                    **SHARE,
                    advanced=True,
                    tooltip="Share of the noise to start with, 0.01 to 1. 1 = a new clip; below 1 the given video and audio are changed that far.",
                ),
                io.Int.Input(
                    "keep_every",
                    default=0,
                    min=0,
                    max=MAX_STEPS,
                    optional=True,
                    advanced=True,
                    tooltip="Steps, 1 to 1000, between two copies of an unfinished run on disk; queued again with the same settings, it goes on from there. 0 = none is kept.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="video"), io.Latent.Output(display_name="audio")],
        )

    @classmethod
    def execute(
        cls,
        model: Denoiser,
        positive: sockets.Conditioning,
        negative: sockets.Conditioning,
        video: sockets.Latent,
        seed: int,
        denoise: float,
        audio: sockets.Latent | None = None,
        keep_every: int = 0,
        **settings: Any,  # the other widgets, which are called as `mova.sample` calls them
    ) -> io.NodeOutput:
        settings |= {name: settings[name] or None for name in ZERO_IS_OWN}
        context, negative_context = sockets.read_prompt(positive, "positive"), sockets.read_prompt(negative, "negative")
        space, fps = open_latent_space(model.folder), sockets.read_frame_rate(positive)
        picture, sound = sockets.read_streams(video, audio)
        frames = space.frames(picture.samples.shape[2])
        if sound is None or (sound.empty and sound.mask is None):
            sound = empty_sound(model, picture.samples, frames, fps)
        check_length(sound, model.audio_clock().latent_length(frames, fps), frames, fps)
        condition = sockets.read_condition(positive, picture.samples, space)
        starts = {"video_start": picture.start(denoise, space.normalize), "audio_start": sound.start(denoise)}
        masks = {"video_mask": picture.mask, "audio_mask": sound.mask}
        video_noise, audio_noise = draw_noise(seed, tuple(picture.samples.shape), tuple(sound.samples.shape))
        noises = {"video_noise": video_noise, "audio_noise": audio_noise}
        passes = Guidance(settings["cfg"], settings["audio_cfg"] or settings["cfg"], settings["bridge_guidance"]).passes
        rows = max(context.shape[1], negative_context.shape[1])
        host.free_memory(model.wanted_bytes(tuple(picture.samples.shape), passes, rows), model.device)
        progress = host.SamplingProgress(settings["steps"], model.device)
        callbacks = {"on_step": progress.on_step, "on_layer": progress.on_layer}
        prompts = {"context": context, "negative_context": negative_context, "condition": condition, "fps": fps}
        resume = Resume(host.kept_runs(), keep_every) if keep_every else None
        try:
            made_video, made_audio = sample(model, denoise=denoise, **settings, **prompts, **noises, **starts, **masks, **callbacks, resume=resume)
        finally:
            model.release()
        device = host.intermediate_device()
        return io.NodeOutput(picture.finish(space.denormalize(made_video), device), sound.finish(made_audio, device) | sockets.audio_rates(model.audio_clock()))


def empty_sound(model: Denoiser, video: torch.Tensor, frames: int, fps: float) -> sockets.Stream:
    """Sound to be made, as long as a clip of `frames` pictures."""
    clock = model.audio_clock()
    samples = torch.zeros(len(video), model.audio_channels, clock.latent_length(frames, fps))
    return sockets.read_stream(sockets.audio_latent(samples, clock), "audio")


def check_length(sound: sockets.Stream, expected: int, frames: int, fps: float) -> None:
    """InputError unless the sound is as long as the clip; encoders round up or down to a whole latent."""
    given = sound.samples.shape[2]
    if abs(given - expected) > 1:
        raise InputError(
            f"The audio latents are {given} long, but {frames} pictures at {fps:g} per second need {expected}: encode the sound with MOVA Audio Encode, "
            "with the length and fps of MOVA Image to Video+Audio."
        )
