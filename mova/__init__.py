"""MOVA Studio's library: a picture and a prompt become a clip with synchronized sound (plain PyTorch, no ComfyUI)."""

from .audio_vae import AudioVAE, load_audio_vae
from .denoiser import Denoiser, load_denoiser
from .errors import CheckpointError, InputError, LoraError, MediaError, MovaError, PromptError, SamplingError
from .image import check_size, fit_image, image_condition, open_image, snap_length, snap_size
from .lora import Lora
from .media import Clip, write_audio, write_clip
from .media_reading import read_audio, read_metadata, read_video
from .pipeline import NEGATIVE_PROMPT, Pipeline, load_pipeline
from .prompt import enhance_prompt
from .resume import Resume
from .sampler import Step, sample
from .text import TextEncoder, load_text_encoder
from .video_vae import VideoVAE, load_video_vae

__all__ = [
    "NEGATIVE_PROMPT",
    "AudioVAE",
    "CheckpointError",
    "Clip",
    "Denoiser",
    "InputError",
    "Lora",
    "LoraError",
    "MediaError",
    "MovaError",
    "Pipeline",
    "PromptError",
    "Resume",
    "SamplingError",
    "Step",
    "TextEncoder",
    "VideoVAE",
    "check_size",
    "enhance_prompt",
    "fit_image",
    "image_condition",
    "load_audio_vae",
    "load_denoiser",
    "load_pipeline",
    "load_text_encoder",
    "load_video_vae",
    "open_image",
    "read_audio",
    "read_metadata",
    "read_video",
    "sample",
    "snap_length",
    "snap_size",
    "write_audio",
    "write_clip",
]
