"""MOVA Studio's library: a picture and a prompt become a clip with synchronized sound (plain PyTorch, no ComfyUI)."""

from .audio_vae import AudioVAE, load_audio_vae
from .denoiser import Denoiser, load_denoiser
from .errors import CheckpointError, InputError, LoraError, MediaError, MovaError, SamplingError
from .image import fit_image, image_condition, open_image
from .media import Clip
from .pipeline import NEGATIVE_PROMPT, Pipeline, load_pipeline
from .sampler import Step, sample
from .text import TextEncoder, load_text_encoder
from .video_vae import VideoVAE, load_video_vae

__all__ = [name for name in dir() if not name.startswith("_")]
