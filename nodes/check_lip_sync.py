"""Whether lips follow the voice, and a shift of the sound where they do so at a constant distance."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image

from ..mova.errors import InputError, MovaError
from ..mova.lipsync.check import METHODS, check_lip_sync
from ..mova.lipsync.film import ImageFrames
from ..mova.lipsync.fix_lag import fix_lag
from ..mova.lipsync.landmarks import TASK, check_mediapipe, open_landmarks
from ..mova.lipsync.plot import draw_report
from ..mova.lipsync.report import Report
from ..mova.lipsync.syncnet import load_syncnet
from ..mova.lipsync.verdict import allows_shift
from . import host
from .shelves import AUTO, LANDMARKERS, SYNCNETS

log = logging.getLogger("mova")

SYNCNET = "syncnet"  # in the name of a weight file that auto takes
SYNCNET_BYTES = 600_000_000  # weights and the largest chunk of pictures
MAX_SHIFT = 10_000.0  # ms


def check_inputs(*choices: str, told: str = "") -> list[Any]:
    """The widgets that every check of lips has; `choices` are further ones of face_landmarks, and `told` what they do."""
    return [
        io.Float.Input(
            "fps", default=24.0, min=1.0, max=120.0, step=1.0, round=0.001, tooltip="Pictures per second, 1 to 120. Wire it from MOVA Image to Video+Audio."
        ),
        io.Combo.Input(
            "method",
            options=list(METHODS),
            tooltip="syncnet: a network trained on talking faces, which needs its weights. motion: mouth movement against loudness, without weights; coarse, wants 5 s "
            "of speech or more. auto: syncnet where its weights are in models/mova_eval, else motion. Compare takes of one shot; do not read absolute values.",
        ),
        io.Combo.Input(
            "face_landmarks",
            options=[AUTO, *choices, *LANDMARKERS.entries()],
            tooltip=f"MediaPipe's {TASK} in models/mova_eval, with which faces are found. auto: the file of that name, else the first .task file.{told}",
        ),
        io.Combo.Input(
            "syncnet_weights",
            options=[AUTO, *SYNCNETS.entries()],
            tooltip="SyncNet's weights in models/mova_eval (syncnet_v2.model, or a safetensors copy). auto: the first file with 'syncnet' in its name.",
        ),
    ]


class MOVACheckLipSync(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MOVACheckLipSync",
            display_name="MOVA Lip-Sync Check",
            category="MOVA/check",
            description="Measures whether the lips follow the voice, and by how much the sound is early or late. Compare takes of one shot with it; "
            "do not read absolute values. Of several faces the one that speaks is found.",
            search_aliases=["mova", "lip sync", "lipsync", "syncnet", "lse-c", "talking head", "av offset"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Image.Input("images", tooltip="The pictures of the clip."),
                io.Audio.Input("audio", tooltip="Its sound, beginning with the first picture. Of a batch, the first is used."),
                *check_inputs(),
            ],
            outputs=[
                io.Float.Output(
                    display_name="score",
                    tooltip="The more, the better: motion -1 to 1 (0.22 and more is plausible), SyncNet about 0 to 10 (3). 0 without a face.",
                ),
                io.Float.Output(display_name="lag_ms", tooltip="How much later than the lips the sound is; negative = earlier."),
                io.String.Output(display_name="verdict"),
                io.Image.Output(display_name="plot", tooltip="Mouth and voice over time, agreement by lag, and the face."),
                io.String.Output(display_name="report", tooltip="Everything measured, as JSON."),
            ],
        )

    @classmethod
    def validate_inputs(cls, method: str | None = None, face_landmarks: str | None = None, syncnet_weights: str | None = None) -> bool | str:
        return check_files(method, face_landmarks, syncnet_weights)

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> str:
        return files_there()

    @classmethod
    def execute(cls, images: torch.Tensor, audio: dict[str, Any], fps: float, method: str, face_landmarks: str, syncnet_weights: str) -> io.NodeOutput:
        report = check_clip(images, audio, fps, method, face_landmarks, syncnet_weights)
        host.show_text(cls.hidden.unique_id, report.verdict)
        values = report.score, report.lag_ms, report.verdict, to_image(draw_report(report)), report.to_json()
        return io.NodeOutput(*values, ui=ui.PreviewText("\n".join([f"{report.verdict}, score {report.score:.2f}", *report.notes])))


class MOVAFixLag(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MOVAFixLag",
            display_name="MOVA Fix Lag",
            category="MOVA/check",
            description="Moves the sound by the lag that MOVA Lip-Sync Check measured, if its verdict is 'out of sync by ...'; else the sound is left alone.",
            search_aliases=["mova", "shift audio", "delay audio", "av offset", "lip sync"],
            inputs=[
                io.Audio.Input("audio", tooltip="The sound of the clip."),
                io.Float.Input(
                    "lag_ms",
                    default=0.0,
                    min=-MAX_SHIFT,
                    max=MAX_SHIFT,
                    step=10.0,
                    round=0.1,
                    tooltip="How much later than the lips the sound is, -10000 to 10000 ms; it is moved by as much the other way.",
                ),
                io.String.Input(
                    "verdict",
                    optional=True,
                    force_input=True,
                    tooltip="Of MOVA Lip-Sync Check: nothing is moved unless it allows it. Not connected: always moved.",
                ),
            ],
            outputs=[io.Audio.Output(display_name="audio")],
        )

    @classmethod
    def execute(cls, audio: dict[str, Any], lag_ms: float, verdict: str | None = None) -> io.NodeOutput:
        if verdict is not None and not allows_shift(verdict):
            log.info("The sound is left as it is: the verdict is '%s', which a shift does not repair.", verdict)
            return io.NodeOutput(audio)
        return io.NodeOutput(audio | {"waveform": fix_lag(audio["waveform"], audio["sample_rate"], lag_ms)})


def check_clip(images: torch.Tensor, audio: dict[str, Any] | None, fps: float, method: str, face_landmarks: str, syncnet_weights: str) -> Report:
    """The report on one clip, with progress and cancel."""
    if audio is None:
        raise InputError("The clip has no sound: connect the audio that belongs to the pictures.")
    progress, weights = host.ChunkProgress(), find_syncnet(syncnet_weights)
    network = None
    if method == "syncnet" or (method == AUTO and weights):
        host.free_memory(SYNCNET_BYTES, host.torch_device())
        network = load_syncnet(weights or SYNCNETS.path(AUTO), host.torch_device())
    with open_landmarks(find_task(face_landmarks)) as landmarks:
        sound = audio["waveform"][0], audio["sample_rate"]
        return check_lip_sync(ImageFrames(images, fps), *sound, landmarks, method=method, syncnet=network, on_frame=progress, on_window=progress)


def check_files(method: str | None, face_landmarks: str | None, syncnet_weights: str | None) -> bool | str:
    """True, or what is missing, asked before anything runs; None: the value comes over a link."""
    try:
        if face_landmarks is not None:
            find_task(face_landmarks)
            check_mediapipe()
        if syncnet_weights is not None and find_syncnet(syncnet_weights) is None and method == "syncnet":
            return SYNCNETS.check(AUTO)
    except MovaError as error:
        return str(error)
    return True


def find_task(name: str) -> Path:
    """The bundle of that name; auto takes the one called TASK, else the first. InputError when it is not there."""
    names = list(LANDMARKERS.entries())
    if name == AUTO and names:
        name = TASK if TASK in names else names[0]
    return LANDMARKERS.path(name)


def find_syncnet(name: str) -> Path | None:
    """The weights of that name, None where auto finds none. InputError for another name that is not there."""
    if name == AUTO:
        return next((path for file, path in SYNCNETS.entries().items() if SYNCNET in file.lower()), None)
    return SYNCNETS.path(name)


def files_there() -> str:
    """Changes when files for checks come or go, so that 'auto' is asked again."""
    return "\n".join([*LANDMARKERS.entries(), *SYNCNETS.entries()])


def to_image(picture: Image.Image) -> torch.Tensor:
    """[1,H,W,3] in 0..1."""
    return torch.from_numpy(np.array(picture)).float()[None] / 255
