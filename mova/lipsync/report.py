"""The report of a lip-sync check: numbers, a verdict and a sentence for each face, as an object and as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from PIL import Image

from .face import Array
from .sync_decision import LABEL
from .verdict import Agreement

METHOD_NAMES = {"motion": "mouth motion against loudness, no weights: a coarse check", "syncnet": LABEL}


@dataclass
class Face:
    """One person. `agreement` is None when the face, the film or the sound could not be judged."""

    verdict: str
    coverage: float  # share of the frames
    width: float  # px
    turned: int  # frames seen from the side
    opening: Array  # [F], of the mouth
    agreement: Agreement | None = None
    distance: float | None = None  # SyncNet's LSE-D
    portrait: Image.Image | None = None

    @property
    def score(self) -> float:
        return self.agreement.score if self.agreement else 0.0


@dataclass
class Report:
    """What a check has found. `speaker` is the face that the verdict, score and lag are of; None when there is no face that could be judged."""

    method: str
    verdict: str
    frames: int
    seconds: float
    faces: list[Face]
    speaker: int | None
    times: list[float]  # of the frames, in seconds
    envelope: Array  # loudness of the voice band in dB, 100 a second
    notes: list[str] = field(default_factory=list)

    @property
    def face(self) -> Face | None:
        return None if self.speaker is None else self.faces[self.speaker]

    @property
    def score(self) -> float:
        """For comparing takes of one shot: the more, the better; 0 without a verdict on a face. Motion: -1..1. SyncNet: the confidence, about 0..10."""
        return self.face.score if self.face else 0.0

    @property
    def lag_ms(self) -> float:
        """How much later than the lips the sound is; 0 where that is not known."""
        return self.face.agreement.lag if self.face and self.face.agreement else 0.0

    def to_json(self) -> str:
        found = {
            "verdict": self.verdict,
            "score": round(self.score, 4),
            "lag_ms": round(self.lag_ms, 1),
            "method": self.method,
            "method_is": METHOD_NAMES[self.method],
            "frames": self.frames,
            "seconds": round(self.seconds, 3),
            "speaking_face": None if self.speaker is None else self.speaker + 1,
            "faces": [describe_face(number, face) for number, face in enumerate(self.faces, 1)],
            "notes": self.notes,
        }
        return json.dumps(found, indent=2)


def describe_face(number: int, face: Face) -> dict:
    words = {"face": number, "verdict": face.verdict, "coverage": round(face.coverage, 3), "width_px": round(face.width), "turned_away_frames": face.turned}
    if face.agreement:
        words |= {"score": round(face.score, 4), "lag_ms": round(face.agreement.lag, 1), "peak": round(face.agreement.peak, 4)}
    return words if face.distance is None else words | {"distance": round(face.distance, 4)}
