"""CAT, the pack's ear: an audio encoder that runs CAT, EAT and SSLAM weights. Needs torch and torchaudio only."""

from .checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from .config import Architecture
from .convert import convert
from .demo import write_demo_encoder
from .ear import Encoder, Features, load
from .errors import CatError

__all__ = ["Architecture", "CatError", "Checkpoint", "Encoder", "Features", "convert", "load", "read_checkpoint", "write_checkpoint", "write_demo_encoder"]
