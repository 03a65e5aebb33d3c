"""A linear probe: how much a frozen encoder's vectors tell about classes (spec/cat.md 7)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..trunk import AudioTransformer

BATCH = 64


READINGS = ("class_token", "patch_mean")


@torch.no_grad()
def clip_vectors(encoder: AudioTransformer, mel: torch.Tensor) -> dict[str, torch.Tensor]:
    """mel [clips,1,T,F] -> each of READINGS as [clips,D]. The encoder is left in the mode it was in."""
    training = encoder.training
    encoder.eval()
    tokens = [encoder(part).tokens for part in mel.split(BATCH)]
    encoder.train(training)
    return {"class_token": torch.cat([part[:, 0] for part in tokens]), "patch_mean": torch.cat([part[:, 1:].mean(1) for part in tokens])}


def fit_probe(vectors: torch.Tensor, classes: torch.Tensor, count: int, *, penalty: float = 1e-3) -> torch.nn.Linear:
    """Multinomial logistic regression on standardised vectors [clips,D]; classes [clips] int64 of `count`. The same input gives the same result."""
    mean, scale = vectors.mean(0), vectors.std(0).clamp_min(1e-6)
    inputs = ((vectors - mean) / scale).double()
    weight = torch.zeros(count, vectors.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(count, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def error() -> torch.Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(F.linear(inputs, weight, bias), classes) + penalty * weight.square().sum()
        loss.backward()
        return loss

    solver.step(error)
    probe = torch.nn.Linear(vectors.shape[1], count)
    with torch.no_grad():  # the standardisation goes into the layer
        probe.weight.copy_(weight / scale)
        probe.bias.copy_(bias - (weight / scale) @ mean.double())
    return probe.requires_grad_(False)


def probe_accuracy(encoder: AudioTransformer, train: tuple[torch.Tensor, torch.Tensor], test: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
    """Per reading, the share of `test` clips that a probe fitted on `train` gets right. Each: (mel [clips,1,T,F], classes [clips])."""
    count = int(max(train[1].max(), test[1].max())) + 1
    known, asked = clip_vectors(encoder, train[0]), clip_vectors(encoder, test[0])
    guesses = {reading: fit_probe(known[reading], train[1], count)(asked[reading]).argmax(1) for reading in READINGS}
    return {reading: round(float((guess == test[1]).double().mean()), 4) for reading, guess in guesses.items()}
