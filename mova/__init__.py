"""MOVA Studio's library: one picture and a prompt become a clip with synchronized sound (plain PyTorch, no ComfyUI)."""

from .denoiser import Denoiser, load_denoiser
from .errors import CheckpointError, InputError, LoraError, MediaError, MovaError, SamplingError
from .sampler import Guidance, Step, sample
