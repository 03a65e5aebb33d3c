"""Faces as 478 landmarks: from MediaPipe's Face Landmarker with the user's face_landmarker.task, or computed before."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from ..errors import CheckpointError, InputError, MediaError
from .face import POINTS, Array, has_lips_inside
from .persons import PersonTracker

TASK = "face_landmarker.task"
TASK_PAGE = "https://ai.google.dev/edge/mediapipe/solutions/vision/face_landmarker"
PARTS = ("face_detector.tflite", "face_landmarks_detector.tflite")  # inside of the bundle, which is a ZIP
FOLLOW, DISCOVER = 0.5, 0.7  # confidence wanted of a face where one was, and of a new one
FACES = 4  # looked for in one picture
INSTALL = "pip install 'mediapipe>=1.0'"


class Landmarks(Protocol):
    """Whatever finds faces in the frames of films, one film after another."""

    def begin(self) -> None:
        """The next frame is the first of a film: persons are counted anew."""
        ...

    def landmarks(self, frame: Array) -> Array:
        """The faces of the next frame (uint8 [H,W,3]): [persons,478,2] in pixels, NaN for a person not seen; a person keeps its row, new ones are added below."""
        ...


class GivenLandmarks:
    """Landmarks computed before: [F,478,2] or [F,persons,478,2] in pixels, NaN where there is no face. InputError for other shapes."""

    def __init__(self, points: Array) -> None:
        points = np.asarray(points, dtype=float)
        if points.ndim not in (3, 4) or points.shape[-2:] != (POINTS, 2):
            raise InputError(f"The landmarks are {list(points.shape)}: [frames, {POINTS}, 2] or [frames, persons, {POINTS}, 2] is needed, in pixels.")
        self.points = points[:, None] if points.ndim == 3 else points
        self.begin()

    def begin(self) -> None:
        self.next = 0

    def landmarks(self, frame: Array) -> Array:
        if self.next == len(self.points):
            raise InputError(f"There are landmarks for {len(self.points)} frames, and the film has more: compute them for the whole film.")
        self.next += 1
        return self.points[self.next - 1]


class FaceLandmarker:
    """MediaPipe's Face Landmarker on single pictures, so that a result depends on nothing before it. confidence: how sure to be of a face, 0..1."""

    def __init__(self, task: str | Path, confidence: float) -> None:
        check_task(Path(task))
        self.task, self.trusted = Path(task), False
        self.mediapipe, bundle = load_mediapipe(), self.task.read_bytes()
        from mediapipe.tasks.python import BaseOptions, vision

        with refusing(self.task):
            options = vision.FaceLandmarkerOptions(
                base_options=BaseOptions(model_asset_buffer=bundle),
                running_mode=vision.RunningMode.IMAGE,
                num_faces=FACES,
                min_face_detection_confidence=confidence,
            )
            self.landmarker = vision.FaceLandmarker.create_from_options(options)

    def detect(self, picture: Array) -> Array:
        """The faces in a picture (uint8 [H,W,3]): [faces,478,2] in pixels. CheckpointError when the first face found shows that the bundle is a wrong one."""
        height, width, _ = picture.shape
        image = self.mediapipe.Image(image_format=self.mediapipe.ImageFormat.SRGB, data=np.ascontiguousarray(picture))
        with refusing(self.task):
            faces = self.landmarker.detect(image).face_landmarks
        if not faces:
            return np.empty((0, POINTS, 2))
        points = [np.array([(point.x * width, point.y * height, point.z) for point in face]) for face in faces]
        if not self.trusted:
            check_face(points[0], self.task)
            self.trusted = True
        return np.stack(points)[..., :2]

    def close(self) -> None:
        try:
            self.landmarker.close()
        except (RuntimeError, ValueError):  # after a failed run: "not running"
            self.landmarker._handle = None  # else it closes itself again when Python collects it, at which moment it can wait for itself for ever


@contextlib.contextmanager
def open_landmarks(task: str | Path) -> Iterator[Landmarks]:
    """The faces of films by MediaPipe, each person followed by position. CheckpointError for a wrong bundle, MediaError without MediaPipe."""
    with contextlib.ExitStack() as opened:
        follow, discover = (opened.enter_context(contextlib.closing(FaceLandmarker(task, confidence))) for confidence in (FOLLOW, DISCOVER))
        yield PersonTracker(follow.detect, discover.detect)


def check_task(task: Path) -> None:
    """CheckpointError unless the file is a bundle with a face detector and a landmark model."""
    get = f"Download {TASK} from {TASK_PAGE}."
    if not task.is_file():
        raise CheckpointError(f"{task} is {'a folder' if task.is_dir() else 'not there'}: the file {TASK} is needed. {get}")
    try:
        with zipfile.ZipFile(task) as bundle:
            lacking = [part for part in PARTS if part not in bundle.namelist()]
    except (zipfile.BadZipFile, OSError):
        raise CheckpointError(f"{task} is no MediaPipe bundle, or is truncated ({task.stat().st_size:,} bytes). {get}") from None
    if lacking:
        raise CheckpointError(f"{task} is no Face Landmarker: {' and '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} not in it. {get}")


def check_face(points: Array, task: Path) -> None:
    """CheckpointError when [n,3] cannot be a face: a bundle with a wrong landmark model runs, and returns nonsense."""
    flat = len(points) == POINTS and not points[:, 2].any()
    if len(points) != POINTS or flat or not has_lips_inside(points[:, :2]):
        found = f"{len(points)} points" if len(points) != POINTS else "points without depth" if flat else "lips outside of the face"
        raise CheckpointError(
            f"{task} finds {found}: its landmark model is another one than the Face Landmarker's ({POINTS} points). Download {TASK} from {TASK_PAGE}."
        )


def check_mediapipe() -> None:
    """MediaError, saying how to install it, where MediaPipe is not installed. Imports nothing."""
    if find_spec("mediapipe") is None:
        raise MediaError(f"Faces are found with MediaPipe, which is not installed: {INSTALL}. Landmarks computed elsewhere work without it.")


def load_mediapipe() -> ModuleType:
    """The package. MediaError says what is missing: the package itself, or a system library."""
    check_mediapipe()
    try:
        import mediapipe
        from mediapipe.tasks.python import vision  # noqa: F401  loads the C library
    except (ImportError, OSError) as error:
        raise MediaError(f"MediaPipe is installed, but cannot be loaded ({error}). {explain_missing(str(error))}") from None
    if not hasattr(mediapipe, "Image"):
        raise MediaError(f"The MediaPipe that is installed has no Tasks API: {INSTALL}.")
    return mediapipe


def explain_missing(complaint: str) -> str:
    if "libEGL" in complaint or "libGLES" in complaint:
        return "On Debian and Ubuntu: apt-get install libegl1 libgles2."
    return f"Install it again: {INSTALL}."


@contextlib.contextmanager
def refusing(task: Path) -> Iterator[Any]:
    """What MediaPipe says about a bundle becomes a CheckpointError; a system library it misses only now, a MediaError."""
    try:
        yield
    except OSError as error:
        raise MediaError(f"MediaPipe cannot be loaded ({error}). {explain_missing(str(error))}") from None
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{task} does not work as a Face Landmarker ({reason}). Download {TASK} from {TASK_PAGE}.") from None
