"""The student of pre-training: encoder, decoder and alignment head, from masked clips to errors (spec/cat.md 6.2, 6.4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..trunk import AudioTransformer
from .decoder import Decoder
from .masks import Masks
from .objective import Alignment, Losses, Weights, dispersion, scaled_error, spread


@dataclass(frozen=True)
class Guess:
    """What the student makes of R masked rows. utterance: class token [R,D]; aligned: the vector compared with the outside one [R,D]; tokens [R,N,D]."""

    utterance: torch.Tensor
    aligned: torch.Tensor
    tokens: torch.Tensor


class Student(nn.Module):
    def __init__(self, encoder: AudioTransformer, decoder: Decoder, alignment: Alignment | None = None, weights: Weights | None = None) -> None:
        super().__init__()
        self.encoder, self.decoder, self.alignment = encoder, decoder, alignment
        self.weights = weights or Weights()

    def forward(self, mel: torch.Tensor, masks: Masks, noise: torch.Tensor) -> Guess:
        """mel [B,1,T,F]; masks of R = B * clones rows, the clone's number fastest; noise [R,M,D] stands where cells are masked."""
        layer = self.alignment.layer if self.alignment else 0
        seen = self.encoder(mel, masks.visible, masks.keep, layers=layer > 0)  # [R, 1+V, D]
        utterance = seen.tokens[:, 0]
        aligned = seen.layer_results[layer - 1][:, 0] if layer else utterance
        return Guess(utterance, aligned, self.decoder(seen.tokens[:, 1:], masks, noise))

    def losses(self, guess: Guess, masks: Masks, targets: torch.Tensor, external: torch.Tensor | None = None) -> tuple[Losses, dict[str, float]]:
        """Errors against the teacher's targets [B,N,D] and outside vectors [B,E], and the spread of guess and target (collapse shows there)."""
        clones = len(guess.utterance) // len(targets)
        places = masks.hide[..., None].expand(-1, -1, targets.shape[-1])
        guessed = guess.tokens.float().gather(1, places).flatten(0, 1)  # [masked cells, D]
        target = targets.repeat_interleave(clones, 0).gather(1, places).flatten(0, 1)
        whole = targets.mean(1).repeat_interleave(clones, 0)  # [R, D]
        weights, nothing = self.weights, targets.new_zeros(())
        losses = Losses(
            frame=weights.frame * scaled_error(guessed, target, weights.beta),
            utterance=weights.utterance * scaled_error(guess.utterance, whole, weights.beta),
            alignment=weights.alignment * self.align(guess.aligned, external, clones) if self.alignment else nothing,
            dispersive=weights.dispersive * dispersion(guess.utterance, clones) if weights.dispersive else nothing,
            masked=masks.masked_cells,
        )
        return losses, {"guess_spread": spread(guessed), "target_spread": spread(target)}

    def align(self, student: torch.Tensor, external: torch.Tensor, clones: int) -> torch.Tensor:
        return self.alignment(student, external.to(student.device, torch.float32).repeat_interleave(clones, 0), self.weights.beta)
