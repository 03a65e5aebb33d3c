"""What a clip sounds like, and when: the strongest labels as a list, over time, and as a picture (spec/cat.md 11, N1)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..ear import OnStep
from ..errors import CatError
from .aliases import Vocabulary
from .steps import piece
from .timeline import draw_timeline

TOP = 10


@dataclass(frozen=True)
class Tags:
    """The strongest labels of one clip. Scores are the classifier's own, 0..1: for comparing, not probabilities."""

    names: tuple[str, ...]  # the strongest first
    scores: tuple[float, ...]  # of the clip as a whole
    times: Tensor  # [W] seconds, where windows begin
    over_time: Tensor  # [names, W]
    window: float  # seconds
    seconds: float

    def __str__(self) -> str:
        return "\n".join(f"{name} {score:.2f}" for name, score in zip(self.names, self.scores, strict=True))

    def as_json(self) -> dict[str, Any]:
        """{"seconds", "window_seconds", "times", "tags": [{"label", "score", "over_time"}, ...]}."""
        rows = zip(self.names, self.scores, self.over_time.tolist(), strict=True)
        tags = [{"label": name, "score": round(score, 4), "over_time": [round(value, 4) for value in values]} for name, score, values in rows]
        times = [round(time, 3) for time in self.times.tolist()]
        return {"seconds": round(self.seconds, 3), "window_seconds": self.window, "times": times, "tags": tags}

    def draw(self, title: str) -> Tensor:
        """Picture [H, W, 3]: one row a label, time from left to right."""
        return draw_timeline(self.names, self.over_time, self.times, self.window, self.seconds, title)


def tag_sound(
    encoder: Any, waveform: Tensor, sample_rate: int, top_k: int = TOP, only: str = "", window: float = 2.0, on_step: OnStep | None = None
) -> list[Tags]:
    """The tags of each clip of `waveform` [B,C,S].

    only: sounds in words, to look at their labels alone; empty = all. window: seconds that one moment of the timeline listens to, every half of it.
    The whole-clip score of a label is that of the clip as one piece. CatError when `only` names no label.
    """
    chosen = chosen_labels(encoder.labels, only)
    return [tag_clip(encoder, clip[None], sample_rate, chosen, top_k, window, piece(on_step, index, len(waveform))) for index, clip in enumerate(waveform)]


def tag_clip(encoder: Any, clip: Tensor, sample_rate: int, chosen: list[int], top_k: int, window: float, on_step: OnStep | None) -> Tags:
    """The tags of one clip [1,C,S] among the labels at the places `chosen`."""
    whole = encoder.probabilities(encoder.logits(clip, sample_rate, on_step=piece(on_step, 0, 2)))[0].cpu()  # [classes]
    scores, times = encoder.scores_over_time(clip, sample_rate, window=window, hop=window / 2, on_step=piece(on_step, 1, 2))
    order = sorted(chosen, key=lambda index: -float(whole[index]))[:top_k]
    names = tuple(encoder.labels[index] for index in order)
    return Tags(names, tuple(whole[order].tolist()), times.cpu(), scores[0].float().cpu()[:, order].T, window, clip.shape[-1] / sample_rate)


def chosen_labels(labels: Sequence[str], only: str) -> list[int]:
    """Places of the labels that the words in `only` mean; all for blank text."""
    if not only.strip():
        return list(range(len(labels)))
    meant = {label for sound in Vocabulary(labels).read(only).sounds for label in sound.labels}
    if not meant:
        raise CatError(f"'{only.strip()}' names no sound this encoder knows: give labels or everyday words such as 'dog, rain', or leave it empty for all.")
    return [index for index, label in enumerate(labels) if label in meant]


def to_json(found: Sequence[Tags]) -> str:
    """All clips as JSON text: {"clips": [...]}."""
    return json.dumps({"clips": [tags.as_json() for tags in found]}, ensure_ascii=False)
