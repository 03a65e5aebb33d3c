"""Do the lips follow the voice? One film in, one report out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..errors import InputError
from ..resampling import resample
from .face import Array
from .face_crop import crop_faces
from .film import TimedFrame
from .frame_rate import to_25_fps
from .landmarks import Landmarks
from .motion import SILENT, SOUND_RATE, compare_motion, is_silent, voice_envelope
from .report import Face, Report
from .sync_decision import REACH
from .verdict import GOOD_SECONDS, MIN_COVERAGE, MIN_SECONDS, MIN_WIDTH, NO_FACE, NO_VOICE, TOO_SHORT, Agreement, judge
from .watching import OnFrame, Watched, Watching, watch_faces

if TYPE_CHECKING:
    from .syncnet import SyncNet

METHODS = ("auto", "syncnet", "motion")
WINDOW = 40.0  # ms, SyncNet's frame
LOWEST_RATE = 4000  # Hz: below it lies half of the band of the voice, and a wrong rate would make hours of a clip
MISFIT = 0.05, 0.25  # share and seconds by which sound and picture may differ in length before the frame rate is doubted


def check_lip_sync(
    film: Iterable[TimedFrame],
    waveform: torch.Tensor | None,
    sample_rate: int,
    landmarks: Landmarks,
    *,
    method: str = "auto",
    syncnet: SyncNet | None = None,
    on_frame: OnFrame | None = None,
    on_window: Callable[[int, int], None] | None = None,
) -> Report:
    """Scores every face of a film against its sound and finds the one that speaks.

    film: (seconds, uint8 [H,W,3]) one after another, on the clock of the sound (`ImageFrames`, `FileFrames`); SyncNet reads it a second time for
    each face, so an iterator that can be read once only serves motion. waveform [C,S] in -1..1. auto: SyncNet where one is given, else motion.
    on_frame(done, total) and on_window follow the work and may raise to end it. InputError for what cannot be checked at all.
    """
    if method not in METHODS:
        raise InputError(f"The method is '{method}': {', '.join(METHODS)} is needed.")
    if method == "syncnet" and syncnet is None:
        raise InputError("The method is syncnet, but no SyncNet weights are given: choose them, or the method motion, which needs none.")
    sound = read_sound(waveform, sample_rate)
    method = "motion" if method == "motion" or syncnet is None else "syncnet"
    watching = watch_faces(film, landmarks, on_frame)
    envelope = voice_envelope(sound, SOUND_RATE)
    refusal = refuse_film(watching, envelope)

    def measure(person: Watched) -> tuple[Agreement, float | None]:
        if method == "syncnet":
            return ask_syncnet(syncnet, film, watching.times, person, sound[0], on_window)
        return compare_motion(np.array(watching.times), np.array(person.opening), np.array(person.height), envelope), None

    faces = [judge_face(person, refusal or refuse_face(person), method, measure) for person in watching.persons]
    speaker = find_speaker(faces)
    verdict = refusal or (NO_FACE if speaker is None else faces[speaker].verdict)
    notes = write_notes(watching, faces, verdict, sound.shape[1] / SOUND_RATE)
    return Report(method, verdict, len(watching.times), watching.seconds, faces, speaker, watching.times, envelope, notes)


def read_sound(waveform: torch.Tensor | None, sample_rate: int) -> torch.Tensor:
    """[1,S] at 16 kHz from [C,S]; InputError when there is no sound in it."""
    if waveform is None or waveform.ndim != 2 or not waveform.numel():
        given = "no sound" if waveform is None else f"a sound of shape {list(waveform.shape)}"
        raise InputError(f"There is {given} beside the picture: [channels, samples] is needed.")
    if isinstance(sample_rate, int) and 0 < sample_rate < LOWEST_RATE:
        raise InputError(f"The sound has {sample_rate} samples a second: voices need {LOWEST_RATE} or more. Is that its rate?")
    if not torch.isfinite(waveform).all():
        raise InputError("The sound holds NaN or infinite values: the model or the decoder left the range of numbers (try float32).")
    return resample(waveform.detach().float().cpu().mean(dim=0)[None, None], sample_rate, SOUND_RATE)[0]


def refuse_film(watching: Watching, envelope: Array) -> str | None:
    """The verdict on a film in which nothing can be judged, whoever is in it."""
    overlap = min(watching.times[0] + watching.seconds, len(envelope) / 100) - max(watching.times[0], 0.0)
    if overlap < MIN_SECONDS:
        return TOO_SHORT
    return NO_VOICE if is_silent(envelope) else None


def refuse_face(person: Watched) -> str | None:
    return NO_FACE if person.coverage < MIN_COVERAGE or person.width < MIN_WIDTH else None


def judge_face(person: Watched, refusal: str | None, method: str, measure: Callable[[Watched], tuple[Agreement, float | None]]) -> Face:
    """One person's part of the report; nothing is measured where there is a refusal."""
    agreement, distance = (None, None) if refusal else measure(person)
    verdict = refusal or judge(agreement, method)
    return Face(verdict, person.coverage, person.width, person.turned, np.array(person.opening), agreement, distance, person.portrait)


def ask_syncnet(
    syncnet: SyncNet, film: Iterable[TimedFrame], times: list[float], person: Watched, sound: torch.Tensor, on_window: Callable[[int, int], None] | None
) -> tuple[Agreement, float]:
    """(agreement, distance) of one person. The curve is how far the mean distance at a lag is below the median one."""
    frames: Iterator[Array] = to_25_fps((frame for _, frame in film), times)
    boxes = list(to_25_fps(person.boxes, times))
    found = syncnet.score(crop_faces(frames, boxes), sound, on_window=on_window)
    means = found.distances.mean(dim=0).double()
    lags = (np.arange(2 * REACH + 1) - REACH) * WINDOW
    return Agreement(found.confidence, -found.offset * WINDOW, found.confidence, lags, (means.median() - means).cpu().numpy()), found.distance


def find_speaker(faces: list[Face]) -> int | None:
    """Which of the faces that could be judged agrees most with the voice, at whatever lag."""
    judged = [number for number, face in enumerate(faces) if face.agreement]
    return max(judged, key=lambda number: faces[number].agreement.peak, default=None)


def write_notes(watching: Watching, faces: list[Face], verdict: str, sound_seconds: float) -> list[str]:
    """Sentences beside the numbers: why there is no verdict, and what makes it doubtful."""
    notes = []
    if verdict == TOO_SHORT:
        notes.append(f"Picture and sound are together for less than {MIN_SECONDS:g} s, in which chance decides: give a longer clip, better {GOOD_SECONDS:g} s.")
    elif watching.seconds < GOOD_SECONDS:
        notes.append(f"The clip is {watching.seconds:.1f} s long; results are steadier from {GOOD_SECONDS:g} s on.")
    if verdict == NO_VOICE:
        notes.append(f"The sound is silent between 0.8 and 3.5 kHz, where voices are: its loud passages are below {SILENT:g} dB of full scale.")
    if verdict == NO_FACE:
        notes.append(explain_no_face(faces))
    share, least = MISFIT
    if abs(sound_seconds - watching.seconds) > max(share * watching.seconds, least):
        notes.append(f"The picture lasts {watching.seconds:.2f} s and the sound {sound_seconds:.2f} s: if they should end together, the frame rate is wrong.")
    return notes


def explain_no_face(faces: list[Face]) -> str:
    if not faces:
        return "No face was found in any frame."
    best = max(faces, key=lambda face: face.coverage)
    if best.coverage >= MIN_COVERAGE:
        return f"The face is {best.width:.0f} pixels wide: {MIN_WIDTH:g} are needed to see what the lips do."
    away = f" (it is seen from the side in {best.turned} frames)" if best.turned else ""
    return f"The face seen most is there in {best.coverage:.0%} of the frames{away}: {MIN_COVERAGE:.0%} are needed."
