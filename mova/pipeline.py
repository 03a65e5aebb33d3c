"""All parts of a checkpoint together: a prompt and a picture become a clip (spec/mova.md 1.2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .audio_vae import AudioVAE, load_audio_vae
from .denoiser import Denoiser, OnLayer, load_denoiser
from .image import check_size, image_condition, open_image
from .media import Clip, write_clip
from .resume import Resume, kept_until_saved
from .sampler import OnStep, choose_guidance, plan_steps, sample
from .text import TextEncoder, load_text_encoder
from .video_vae import VideoVAE, load_video_vae

# The release's own (spec/mova.md 4.8): oversaturated, overexposed, static, subtitles, low quality, deformed, ...
NEGATIVE_PROMPT = "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指"
Picture = Tensor | str | Path


@dataclass(frozen=True)
class Latents:
    """A clip before decoding: normalised video [1, 16, T, h, w], audio [1, Ca, Ta], and how it was made."""

    video: Tensor
    audio: Tensor
    fps: float
    settings: dict[str, Any]


class Pipeline:
    """Made by `load_pipeline`. One part at a time is on the device; between calls none is."""

    def __init__(self, folder: Path, denoiser: Denoiser, text: TextEncoder, video_vae: VideoVAE, audio_vae: AudioVAE) -> None:
        self.folder, self.denoiser, self.text, self.video_vae, self.audio_vae = folder, denoiser, text, video_vae, audio_vae

    def generate(self, prompt: str, image: Picture | None = None, *, resume: Resume | None = None, **settings: Any) -> Clip:
        """A clip in memory; settings as in `make_latents`. Errors are MovaErrors that say what to change."""
        with kept_until_saved(resume) as kept:
            latents = self.make_latents(prompt, image, resume=kept, **settings)
            frames = self.on_device(self.video_vae, lambda vae: vae.decode(vae.denormalize(latents.video)))
            return Clip(frames, self.decode_audio(latents), latents.fps, self.audio_vae.sample_rate, latents.settings)

    def render(
        self,
        path: str | Path,
        prompt: str,
        image: Picture | None = None,
        *,
        resume: Resume | None = None,
        on_frame: Callable[[int], None] | None = None,
        **settings: Any,
    ) -> None:
        """As `generate`, straight into a file: frames go from the decoder to the encoder one by one, so a long clip needs no more memory."""
        with kept_until_saved(resume) as kept:
            latents = self.make_latents(prompt, image, resume=kept, **settings)
            sound = {"audio": self.decode_audio(latents), "sample_rate": self.audio_vae.sample_rate}
            self.on_device(
                self.video_vae,
                lambda vae: write_clip(
                    path, vae.decode_stream(vae.denormalize(latents.video)), fps=latents.fps, metadata=latents.settings, on_frame=on_frame, **sound
                ),
            )

    def make_latents(
        self,
        prompt: str,
        image: Picture | None = None,
        *,
        negative_prompt: str = NEGATIVE_PROMPT,
        height: int = 352,
        width: int = 640,
        num_frames: int = 193,
        fps: float = 24.0,
        steps: int = 50,
        cfg: float = 5.0,
        audio_cfg: float | None = None,
        bridge_guidance: float = 1.0,
        shift: float | None = None,
        audio_shift: float | None = None,
        boundary: float | None = None,
        schedule: str = "reference",
        seed: int = 42,
        last_image: Picture | None = None,
        resume: Resume | None = None,
        on_step: OnStep | None = None,
        on_layer: OnLayer | None = None,
    ) -> Latents:
        """Everything up to decoding. image, last_image: [H, W, 3] in 0..1 or a file; None = text to video and sound.

        height, width: pixels, multiples of 16; num_frames: 4n+1; fps: frames per second; the rest as in `mova.sample`.
        Values are checked before anything large is opened.
        """
        check_size(height, width, num_frames)
        audio_length = self.audio_vae.config.latent_length(num_frames, fps)
        plan_steps(self.denoiser, steps=steps, shift=shift, audio_shift=audio_shift, boundary=boundary, schedule=schedule, denoise=1.0)
        guided = choose_guidance(cfg, audio_cfg, bridge_guidance)
        first, last = (None if picture is None else read_picture(picture) for picture in (image, last_image))
        condition = self.on_device(
            self.video_vae,
            lambda vae: image_condition(vae, first, height=height, width=width, num_frames=num_frames, last_image=last),
        )
        texts = [prompt] if guided.plain else [prompt, negative_prompt]
        embedded = self.on_device(self.text, lambda encoder: encoder.encode(texts)).split(1)
        video_noise, audio_noise = draw_noise(seed, (1, self.denoiser.video_channels, *condition.shape[2:]), (1, self.denoiser.audio_channels, audio_length))
        sampling = dict(
            steps=steps,
            cfg=cfg,
            audio_cfg=audio_cfg,
            bridge_guidance=bridge_guidance,
            shift=shift,
            audio_shift=audio_shift,
            boundary=boundary,
            schedule=schedule,
        )
        try:
            video, audio = sample(
                self.denoiser,
                context=embedded[0],
                negative_context=None if guided.plain else embedded[1],
                condition=condition,
                video_noise=video_noise,
                audio_noise=audio_noise,
                fps=fps,
                resume=resume,
                on_step=on_step,
                on_layer=on_layer,
                **sampling,
            )
        finally:
            self.denoiser.release()
        settings = dict(
            prompt=prompt, negative_prompt=negative_prompt, seed=seed, height=height, width=width, num_frames=num_frames, fps=fps, model=self.folder.name
        )
        if self.denoiser.loras:
            settings["loras"] = [lora.settings for lora in self.denoiser.loras]
        return Latents(video, audio, fps, settings | sampling)

    def decode_audio(self, latents: Latents) -> Tensor:
        """[1, S], untrimmed, on the CPU."""
        return self.on_device(self.audio_vae, lambda vae: vae.decode(latents.audio).cpu())[0]

    def on_device(self, part: Any, work: Callable[[Any], Any]) -> Any:
        """Does the work with a part on the device, and takes the part away again."""
        try:
            return work(part.to(self.denoiser.device))
        finally:
            part.to("cpu")


def load_pipeline(
    folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, residency: str = "auto", text_cache: str | Path | None = None
) -> Pipeline:
    """Opens a released checkpoint; weights stay in their files until they are computed with.

    dtype None = as stored. residency: auto | resident | stream. text_cache: a folder that keeps encoded prompts, so that
    the text encoder is not opened again for a known one. CheckpointError tells what is missing or does not fit.
    """
    denoiser = load_denoiser(folder, device=device, dtype=dtype, residency=residency)
    text = load_text_encoder(folder, dtype=dtype, cache_dir=text_cache, residency=residency)
    return Pipeline(Path(folder), denoiser, text, load_video_vae(folder, dtype=dtype), load_audio_vae(folder, dtype=dtype))


def draw_noise(seed: int, video_shape: tuple[int, ...], audio_shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Noise of both streams from one CPU generator, the video's first: the same on every machine."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(video_shape, generator=generator), torch.randn(audio_shape, generator=generator)


def read_picture(picture: Picture) -> Tensor:
    return picture if isinstance(picture, Tensor) else open_image(picture)
