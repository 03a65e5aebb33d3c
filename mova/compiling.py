"""Regional torch.compile: what a block does row by row is fused into a few kernels, compiled once for all layers (spec/performance.md 4).

Weights are inputs of what is compiled, so a layer that streams in needs nothing new, and neither does another length.
Queries and keys stay as they are: their rotation is complex, which the compiler has no code for. Fused arithmetic rounds
less often: results are close to the plain ones, not equal.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .layers import Block

log = logging.getLogger("mova")


class Compilation:
    """Compiles functions when they are first called; where that fails they run as they are from then on, which one log line says."""

    def __init__(self) -> None:
        self.compiled: dict[Callable[..., Tensor], Callable[..., Tensor]] = {}
        self.failed = False

    def run(self, plain: Callable[..., Tensor], *args: Any) -> Tensor:
        if self.failed:
            return plain(*args)
        if plain not in self.compiled:
            self.compiled[plain] = torch.compile(plain, dynamic=True)
        try:
            return self.compiled[plain](*args)
        except torch._dynamo.exc.TorchDynamoException as error:  # nothing given was changed by then
            self.failed = True
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            log.warning("Blocks cannot be compiled here (%s); sampling goes on without. It takes a C++ compiler, and on a GPU triton.", reason)
            return plain(*args)


class CompiledBlock(Block):
    """A block whose row work is compiled."""

    compilation: Compilation

    def post(self, *args: Any) -> Tensor:
        return self.compilation.run(Block.post, self, *args)

    def rest(self, *args: Any) -> Tensor:
        return self.compilation.run(Block.rest, self, *args)


def compile_blocks(towers: list[nn.Module]) -> None:
    """Makes every block of the towers a compiled one; nothing is compiled before it is computed with."""
    compilation = Compilation()
    for tower in towers:
        for block in tower.blocks:
            block.__class__, block.compilation = CompiledBlock, compilation
