"""The encoder: stem, positions, class token, transformer blocks (spec/cat.md 2.2, 2.3)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Architecture
from .errors import CatError
from .stem import ConvBlock, MultiResolutionStem, PatchStem

STEMS = {"multi": MultiResolutionStem, "patch": PatchStem}


@dataclass
class Encoded:
    """tokens [B,1+N,D], index 0 = class token. layer_results: per block its MLP output before the residual, [B,1+N,D]; empty unless asked for."""

    tokens: Tensor
    layer_results: list[Tensor] = field(default_factory=list)


class AudioTransformer(nn.Module):
    """CAT, or EAT and SSLAM with the other stem. Freshly made it holds PyTorch's default values: load a checkpoint or call `initialise`."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        width, narrow = architecture.width, architecture.bottleneck
        self.architecture = architecture
        self.stem = STEMS[architecture.stem](architecture)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.norm = nn.LayerNorm(width, architecture.eps)
        self.bottleneck, self.unbottleneck = (nn.Linear(width, narrow), nn.Linear(narrow, width)) if narrow else (nn.Identity(), nn.Identity())
        self.blocks = nn.ModuleList(Block(architecture) for _ in range(architecture.depth))
        self.register_buffer("positions", position_table(architecture), persistent=False)  # [rows*bands, D]; a formula, so no file of ours holds it

    def forward(self, mel: Tensor, visible: Tensor | None = None, keep: Tensor | None = None, layers: bool = False) -> Encoded:
        """mel [B,1,T,128] normalised -> Encoded. T is at least one patch and at most architecture.max_frames.

        visible: mask on the final grid for the stem, [B*n,1,h,w] (see MultiResolutionStem). keep: token numbers [B*n,K] that go on into the trunk.
        """
        x = self.embed(mel, visible, keep)  # [B, 1+K, D]
        results = []
        for block in self.blocks:
            x, t = block(x)
            if layers:
                results.append(t)
        return Encoded(x, results)

    def embed(self, mel: Tensor, visible: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """What the first block reads: [B,1+N,D], or [B,1+K,D] with `keep`."""
        frames, most = mel.shape[2], self.architecture.max_frames
        if not self.architecture.patch <= frames <= most:
            raise CatError(f"A log-mel of {frames} frames cannot be read: {self.architecture.patch} to {most} fit the position table. Cut it into windows.")
        tokens = self.stem(mel, visible)  # [B, N, D]
        tokens = tokens + self.positions[: tokens.shape[1]]
        if keep is not None:
            tokens = tokens.gather(1, keep[..., None].expand(-1, -1, tokens.shape[2]))
        tokens = torch.cat([self.class_token.expand(len(tokens), -1, -1), tokens], 1)
        return self.unbottleneck(self.bottleneck(self.norm(tokens)))

    @torch.no_grad()
    def initialise(self) -> AudioTransformer:
        """The values training starts from (6.5), from torch's global generator. Conv blocks and branches keep PyTorch's default of a convolution."""
        linears = [
            module for part in (self.bottleneck, self.unbottleneck, self.blocks, self.stem) for module in part.modules() if isinstance(module, nn.Linear)
        ]
        inside = {
            id(module) for block in self.stem.modules() if isinstance(block, ConvBlock) for module in block.modules()
        }  # 1x1 convolutions written as Linear
        for linear in linears:
            if id(linear) not in inside:
                nn.init.normal_(linear.weight, std=0.02)
                nn.init.zeros_(linear.bias)
        for projection in self.stem.projections:
            nn.init.xavier_uniform_(projection.weight.flatten(1))
        nn.init.normal_(self.class_token)
        return self


class Block(nn.Module):
    """Attention and MLP, each normed after its residual. `drop_path`: share of clips whose branch is skipped while training."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        width, hidden = architecture.width, round(architecture.width * architecture.mlp_ratio)
        self.heads, self.drop_path = architecture.heads, 0.0
        self.norm1, self.norm2 = nn.LayerNorm(width, architecture.eps), nn.LayerNorm(width, architecture.eps)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B,L,D] -> (block output, its MLP's output t), both [B,L,D]."""
        r = self.norm1(x + self.skip(self.attend(x)))
        t = self.fc2(F.gelu(self.fc1(r)))
        return self.norm2(r + self.skip(t)), t

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, H, L, d], views; the kernels keep the softmax in float32
        return self.projection(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def skip(self, branch: Tensor) -> Tensor:
        if not (self.training and self.drop_path):
            return branch
        kept = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path
        return branch * kept / (1 - self.drop_path)


def move(module: nn.Module, device: str | torch.device | None, dtype: torch.dtype | None = None) -> nn.Module:
    """The module itself, there. CatError when the device is not there or is full."""
    try:
        return module.to(device=device, dtype=dtype)
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise CatError(f"The encoder cannot go to the device {str(device)!r} ({reason}): cpu always works.") from None


def position_table(architecture: Architecture) -> Tensor:
    """[rows*bands, D] float32 on the CPU: row t*bands + f is [sin, cos of the frequency f, sin, cos of the time t] (2.2)."""
    quarter = architecture.width // 4
    waves = np.float32(1) / np.float32(10000) ** (
        np.arange(quarter, dtype=np.float32) / np.float32(quarter)
    )  # NumPy's powers, as recorded: torch's last digit differs
    frequency, time = (turn(count, torch.from_numpy(waves)) for count in (architecture.bands, architecture.position_rows))  # [bands, D/2], [rows, D/2]
    rows, bands = architecture.position_rows, architecture.bands
    return torch.cat([frequency.expand(rows, -1, -1), time[:, None].expand(-1, bands, -1)], 2).flatten(0, 1)


def turn(count: int, waves: Tensor) -> Tensor:
    angles = torch.outer(torch.arange(count, dtype=torch.float32, device="cpu"), waves)
    return torch.cat([angles.sin(), angles.cos()], 1)
