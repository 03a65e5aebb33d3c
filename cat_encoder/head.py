"""From tokens to class scores (spec/cat.md 5)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import CatError

CLAP_MODES = ("CLAP_TYPE2", "CLAP_TYPE4", "CLAP_TYPE6")
MODES = ("CLS_TOKEN", "MEAN_POOLING", "LIN_SOFTMAX", *CLAP_MODES)
EPS = 1e-6


class Head(nn.Module):
    """Norm and Linear over the class token (CLS_TOKEN), the mean of the patch tokens (MEAN_POOLING), or a pool of them that favours the strong (LIN_SOFTMAX).

    CLAP modes read the first patch token through an alignment Linear of `aligned` channels: so they were trained.
    """

    def __init__(self, width: int, classes: int, *, mode: str = "CLS_TOKEN", eps: float = EPS, aligned: int = 0, norm: bool = True) -> None:
        super().__init__()
        if mode not in MODES or (mode in CLAP_MODES) != bool(aligned):
            raise CatError(
                f"A head of mode {mode!r} with {aligned} aligned channels cannot be made: the modes are {', '.join(MODES)}; only CLAP ones are aligned."
            )
        self.mode, channels = mode, aligned or width
        self.alignment = nn.Linear(width, aligned) if aligned else nn.Identity()
        self.norm = nn.LayerNorm(channels, eps) if norm else nn.Identity()
        self.linear = nn.Linear(channels, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B,1+N,D] -> logits [B,classes]."""
        pools = {"CLS_TOKEN": lambda x: x[:, 0], "MEAN_POOLING": lambda x: x[:, 1:].mean(1), "LIN_SOFTMAX": lambda x: linear_softmax(x[:, 1:])}
        pooled = pools.get(self.mode, lambda x: x[:, 1])(tokens)  # [B, D]
        return self.linear(self.norm(self.alignment(pooled)))


def linear_softmax(tokens: Tensor) -> Tensor:
    """[B,N,D] -> [B,D]: channels read as logits, their probabilities weighted by themselves, as a logit again; what leaves the range of numbers becomes 0."""
    z = F.logsigmoid(tokens)
    y = (torch.logsumexp(2 * z, 1) - torch.logsumexp(z + 1e-6, 1)).clamp(max=0)  # log of the pooled probability
    return torch.logit(y.exp()).nan_to_num(0.0, 0.0, 0.0)
