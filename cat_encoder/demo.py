"""A small random encoder with a head for the 527 AudioSet classes: workflows and tests run with it anywhere. Its tags mean nothing."""

from __future__ import annotations

from pathlib import Path

import torch

from .checkpoint import Checkpoint, write_checkpoint
from .config import cat_architecture
from .head import Head
from .labels import audioset
from .trunk import AudioTransformer

SIZES = {"channels": (16, 24), "width": 48, "depth": 2, "heads": 4, "mlp_ratio": 2.0}


def write_demo_encoder(path: str | Path, seed: int = 0) -> Path:
    """Writes the same ~0.6 MB safetensors for the same seed; torch's own generator is left as it was. CatError when the file cannot be written."""
    names = [name for _, name in audioset()]
    architecture = cat_architecture(**SIZES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder, head = AudioTransformer(architecture).initialise(), Head(architecture.width, len(names))
        torch.nn.init.normal_(head.linear.weight, std=0.3)  # so that tags differ
        torch.nn.init.normal_(head.linear.bias, mean=-2.0)
    return write_checkpoint(path, Checkpoint(architecture, encoder.state_dict(), head.state_dict(), names, origin="a random demo encoder (CAT)"))
