"""Training CAT: `pretrain` on unlabelled sounds, `finetune` on labelled ones (spec/cat.md 6, 7)."""

from .finetune import RECIPES, FinetuneSettings, finetune
from .pretrain import PretrainSettings, pretrain
from .run import RunSettings, Step

__all__ = ["RECIPES", "FinetuneSettings", "PretrainSettings", "RunSettings", "Step", "finetune", "pretrain"]
