"""Any checkpoint that can be read -> one safetensors file of ours (spec/cat.md 3.4)."""

from __future__ import annotations

from pathlib import Path

from .checkpoint import read_checkpoint, write_checkpoint


def convert(src: str | Path, out: str | Path, *, weights: str = "student") -> Path:
    """Reads `src` (.pt, .safetensors or a hub folder) and writes `out`; features and logits stay the same. weights: student or teacher. CatError as for loading."""
    return write_checkpoint(out, read_checkpoint(src, weights))
