"""LoRAs: files of every common kind, what of them fits a model, and how it is added to weights (spec/mova.md 0.4, 7)."""

from .matching import Changes, LoadedLora, Lora, load_lora, match_lora, parse_lora

__all__ = ["Changes", "LoadedLora", "Lora", "load_lora", "match_lora", "parse_lora"]
