"""Regional torch.compile: what a block does row by row becomes a few fused kernels, compiled once for all layers (spec/performance.md 4).

Weights are inputs of what is compiled, so a layer whose weights were exchanged needs nothing new, and neither does another
length. Fused arithmetic rounds less often: results are close to the plain ones, not equal.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from .layers import Block

log = logging.getLogger("mova")

ROW_WORK = ("queries", "keys", "post", "rest")  # methods of Block


class Compilation:
    """The row work of blocks, compiled when it is first done; where that fails it is done as it is, which one log line says."""

    def __init__(self) -> None:
        self.compiled: dict[Callable, Callable] = {}
        self.failed = False

    def apply(self, blocks: nn.ModuleList) -> None:
        for block in blocks:
            for name in ROW_WORK:
                setattr(block, name, partial(self.work, getattr(type(block), name), block))

    def work(self, plain: Callable, block: Block, *args: Any) -> Any:
        if self.failed:
            return plain(block, *args)
        known = plain in self.compiled
        compiled = self.compiled.setdefault(plain, torch.compile(plain, dynamic=True)) if not known else self.compiled[plain]
        try:
            return compiled(block, *args)
        except torch._dynamo.exc.TorchDynamoException as error:
            self.failed = True
            log.warning("Blocks are not compiled (%s): install a C++ compiler, and on a GPU triton. Sampling goes on without.", str(error).strip().splitlines()[0])
            return plain(block, *args)
