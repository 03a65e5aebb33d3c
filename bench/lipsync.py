"""`python -m bench.lipsync --task face_landmarker.task --photo face.jpg`: frames a second in which a face is found and followed at 640x352. Prints JSON.

The photo slides a little from frame to frame, so that every frame is a new picture. `landmarks` is the time for the faces alone, `whole check` adds
mouth, loudness and correlation; the first frames, in which the models are loaded, are left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from PIL import Image, ImageOps

from mova.errors import MovaError
from mova.lipsync.check import check_lip_sync
from mova.lipsync.film import TimedFrame
from mova.lipsync.landmarks import open_landmarks

from .step import describe_machine

SIZE, FPS, SECONDS, RATE = (640, 352), 24, 8, 16000
WARM_UP = 24  # frames
TARGET = 25.0  # frames a second


def slide(photo: np.ndarray) -> Iterator[TimedFrame]:
    for number in range(FPS * SECONDS + 1):
        yield number / FPS, np.roll(photo, (number % 8, number % 5), axis=(0, 1))


def measure(task: Path, photo: Path) -> dict[str, object]:
    with Image.open(photo) as picture:
        frames = list(slide(np.array(ImageOps.fit(picture.convert("RGB"), SIZE))))
    sound = torch.randn(1, SECONDS * RATE, generator=torch.Generator().manual_seed(0)) / 10
    with open_landmarks(task) as landmarks:
        for _, frame in frames[:WARM_UP]:
            landmarks.landmarks(frame)
        start = perf_counter()
        found = [bool(len(landmarks.landmarks(frame))) for _, frame in frames]
        alone = len(frames) / (perf_counter() - start)
    with open_landmarks(task) as landmarks:
        start = perf_counter()
        report = check_lip_sync(frames, sound, RATE, landmarks)
        whole = len(frames) / (perf_counter() - start)
    speeds = {"landmarks_frames_per_second": round(alone, 1), "whole_check_frames_per_second": round(whole, 1), "target_frames_per_second": TARGET}
    return {
        "size": f"{SIZE[0]}x{SIZE[1]}",
        "frames": len(frames),
        "frames_with_a_face": sum(found),
        "faces": len(report.faces),
        **speeds,
        "met": alone >= TARGET,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.lipsync", description=__doc__)
    parser.add_argument("--task", type=Path, default=Path("../shared/media/face_landmarker_test.task"), help="MediaPipe's Face Landmarker")
    parser.add_argument("--photo", type=Path, default=Path("../shared/media/single_person.jpg"), help="a picture with a face")
    given = parser.parse_args()
    result: dict[str, object] = {"machine": describe_machine()}
    try:
        result |= measure(given.task, given.photo)
    except (MovaError, OSError) as error:  # no bundle, no picture, no MediaPipe: said in the result, so that the other benchmarks go on
        result["not_measured"] = str(error)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
