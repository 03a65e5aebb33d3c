"""The ear: what a sound holds, whether it is what was wanted, and how near it comes to a reference."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from comfy_api.latest import io

from ..cat_encoder import Encoder, load
from ..cat_encoder.listening.compare import MODES, match_to_reference
from ..cat_encoder.listening.sound_check import check_sound
from ..cat_encoder.listening.tagging import TOP, tag_sound, to_json
from ..cat_encoder.listening.timeline import draw_similarity
from ..mova.errors import InputError
from . import host
from .shelves import EARS

CatEncoder = io.Custom("CAT_ENCODER")

Audio = dict[str, Any]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
WINDOWS = {"2 s": 2.0, "1 s": 1.0, "5 s": 5.0, "10 s": 10.0}
WORKING_BYTES = 2_000_000_000  # beside the weights, for 8 windows at once
COARSE = "It hears in steps of 160 ms: not made for lip or hit sync."
UNCALIBRATED = "Scores are not calibrated: compare takes, do not read them as probabilities."
ENCODER_TIP = "From Load CAT Encoder."


@dataclass(frozen=True)
class EarSocket:
    """What goes over a CAT_ENCODER socket: the encoder, which lies on the CPU, and the device that it listens on."""

    encoder: Encoder
    device: torch.device

    def listening(self) -> AbstractContextManager[Encoder]:
        """The encoder on its device while the block runs; on the CPU, which it does not leave, no room is asked for."""
        weights = sum(weight.numel() * weight.element_size() for weight in self.encoder.trunk.parameters())
        return host.placed(self.encoder, 0 if self.device.type == "cpu" else weights + WORKING_BYTES, self.device)


class CATLoadEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CATLoadEncoder",
            display_name="Load CAT Encoder",
            category="MOVA/loaders",
            description="Opens an audio encoder, the ear of the sound checks: CAT, EAT or SSLAM. "
            "For tags and checks by words it has to be fine-tuned on AudioSet, such as SSLAM_AS2M_Finetuned; comparing needs no tags.",
            search_aliases=["cat", "eat", "sslam", "audio encoder", "audioset", "audio tagging"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Combo.Input(
                    "encoder",
                    options=EARS.choices(),
                    tooltip="A CAT, EAT or SSLAM file (.safetensors or .pt) in models/audio_encoders. Encoders of other kinds are refused.",
                ),
                io.Combo.Input(
                    "device",
                    options=["cpu", "auto"],
                    tooltip="Where it listens. cpu: beside the video model, which keeps the GPU to itself; a few seconds for 10 s of sound. "
                    "auto: on the GPU while it listens, 0.4 GB and about 2 GB of work.",
                ),
                io.Combo.Input(
                    "precision", options=list(PRECISIONS), tooltip="What is computed in. fp32: as trained. bf16: half the memory, scores differ a little."
                ),
            ],
            outputs=[
                CatEncoder.Output(display_name="encoder"),
                io.String.Output(display_name="report", tooltip="What the file is: kind, size, and how many labels it knows."),
                io.String.Output(display_name="labels", tooltip="The labels it can tag, one a line; empty without a head for tags."),
            ],
        )

    @classmethod
    def validate_inputs(cls, encoder: str | None = None) -> bool | str:
        return True if encoder is None else EARS.check(encoder) or True  # None: the name comes over a link

    @classmethod
    def execute(cls, encoder: str, device: str, precision: str) -> io.NodeOutput:
        ear = load(EARS.path(encoder), dtype=PRECISIONS[precision])
        report = describe(ear)
        host.show_text(cls.hidden.unique_id, report)
        return io.NodeOutput(EarSocket(ear, host.torch_device() if device == "auto" else torch.device("cpu")), report, "\n".join(ear.labels))


class CATTagAudio(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CATTagAudio",
            display_name="CAT Sound Tags",
            category="MOVA/check",
            description=f"Tells what is heard in a sound, and when: the strongest of the encoder's labels (527 for AudioSet). {UNCALIBRATED} {COARSE} "
            "Of a batch every clip is tagged by itself.",
            search_aliases=["cat", "sound tags", "audio tagging", "sound event detection", "what is in this audio", "audioset"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Audio.Input("audio", tooltip="Any sound of 25 ms or more; channels are averaged, any sample rate."),
                CatEncoder.Input("encoder", tooltip=f"{ENCODER_TIP} It needs a head for tags."),
                io.Int.Input("top_k", default=TOP, min=1, max=100, tooltip="How many labels are listed, 1 to 100."),
                io.Combo.Input(
                    "window",
                    options=list(WINDOWS),
                    tooltip="How many seconds one moment of the timeline listens to; the next begins half of it later. Shorter: finer in time, less certain. "
                    "The list judges the whole clip.",
                ),
                io.String.Input(
                    "only",
                    default="",
                    tooltip="Sounds to look at alone, as labels or everyday words, separated by commas: 'dog, rain'. Empty = all labels.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="tags", tooltip="One label with its score a line, the strongest first."),
                io.String.Output(display_name="data", tooltip="JSON: for each clip its labels, scores, and scores over time."),
                io.Image.Output(display_name="timeline", tooltip="A picture for each clip: labels downwards, seconds across, bright where the score is high."),
            ],
        )

    @classmethod
    def execute(cls, audio: Audio | None, encoder: EarSocket, top_k: int, window: str, only: str) -> io.NodeOutput:
        sound, rate = read_sound(audio, "audio")
        with encoder.listening() as ear:
            found = tag_sound(ear, sound, rate, top_k, only, WINDOWS[window], host.ChunkProgress())
        text = by_clip(found)
        host.show_text(cls.hidden.unique_id, text)
        pictures = [tags.draw(f"Sound tags{clip_title(index, len(found))}") for index, tags in enumerate(found)]
        return io.NodeOutput(text, to_json(found), torch.stack(pictures))


class CATCheckSound(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CATCheckSound",
            display_name="CAT Prompt vs Sound Check",
            category="MOVA/check",
            description="Listens for sounds that are wanted and for some that are not, such as background music, and tells when they are heard. "
            "A sound counts as heard when it stands out of the clip's other labels. "
            f"{UNCALIBRATED} It knows names of sounds, not free wording: 'an eerie mood' means nothing to it. {COARSE} Of a batch the worst clip counts.",
            search_aliases=["cat", "sound check", "background music", "unwanted music", "missing sound effect", "audio quality gate"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Audio.Input("audio", tooltip="Any sound of 25 ms or more; channels are averaged, any sample rate."),
                CatEncoder.Input("encoder", tooltip=f"{ENCODER_TIP} It needs a head for tags."),
                io.String.Input(
                    "wanted",
                    default="",
                    multiline=True,
                    tooltip="Sounds that should be heard, separated by commas: labels, or everyday words in English or Chinese. "
                    "'no music' counts as unwanted. The report names words it does not know.",
                ),
                io.String.Input(
                    "unwanted",
                    default="Music, Speech",
                    multiline=True,
                    tooltip="Sounds that should not be heard, likewise. What belongs to a wanted sound does not count: a wanted piano is music.",
                ),
                io.Float.Input(
                    "strictness",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=0.001,
                    tooltip="How far a sound has to stand out to be heard, 0 to 1. 0: among the first 30 labels; 1: among the first 3, and clearly above the rest.",
                ),
            ],
            outputs=[
                io.Float.Output(
                    display_name="score", tooltip="0 to 1, for comparing takes: how present the wanted sounds are, less the unwanted. No probability."
                ),
                io.Boolean.Output(display_name="pass", tooltip="True when everything wanted is heard and nothing unwanted."),
                io.String.Output(display_name="report", tooltip="Each sound: heard, missing or unwanted, at which seconds, and its rank among the labels."),
            ],
        )

    @classmethod
    def execute(cls, audio: Audio | None, encoder: EarSocket, wanted: str, unwanted: str, strictness: float) -> io.NodeOutput:
        sound, rate = read_sound(audio, "audio")
        with encoder.listening() as ear:
            checks = check_sound(ear, sound, rate, wanted, unwanted, strictness, host.ChunkProgress())
        report = by_clip(checks)
        host.show_text(cls.hidden.unique_id, report)
        return io.NodeOutput(min(check.score for check in checks), all(check.passed for check in checks), report)


class CATCompareAudio(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CATCompareAudio",
            display_name="CAT Match to Reference",
            category="MOVA/check",
            description="Tells how near a sound comes to a reference, 0 to 100, by overall character or by the order of its events. "
            f"100 is the reference with a little noise, 0 is as far from it as noises and tones made by rule. {COARSE} It does not tell voices or singers apart, "
            "nor judge quality. Of a batch the lowest score is given out.",
            search_aliases=["cat", "audio similarity", "compare sound", "match reference", "same sound"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Audio.Input("audio", tooltip="The sound to judge, 25 ms or more; channels are averaged, any sample rate."),
                io.Audio.Input("reference", tooltip="What it should sound like: one sound for all clips of a batch, or one for each."),
                CatEncoder.Input("encoder", tooltip=f"{ENCODER_TIP} It needs no head for tags."),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    tooltip="overall character: the same kinds of sound, whenever they come. order of events: the same sounds one after another; "
                    "they may come earlier, later or slower.",
                ),
                io.Boolean.Input(
                    "match_loudness",
                    default=True,
                    tooltip="On: the sound is brought to the loudness of the reference first, so that only its content counts. Off: a difference in level lowers the score.",
                ),
            ],
            outputs=[
                io.Float.Output(
                    display_name="score", tooltip="0 to 100. For comparing takes with one reference; scores of different references do not compare."
                ),
                io.Image.Output(
                    display_name="similarity", tooltip="A picture for each clip: its seconds across, the reference's downwards, bright where both are alike."
                ),
                io.String.Output(display_name="report", tooltip="The score of each clip, the likeness as measured, and the anchors."),
            ],
        )

    @classmethod
    def execute(cls, audio: Audio | None, reference: Audio | None, encoder: EarSocket, mode: str, match_loudness: bool) -> io.NodeOutput:
        clips, wanted = read_sound(audio, "audio"), read_sound(reference, "reference")
        with encoder.listening() as ear:
            matches = match_to_reference(ear, *clips, *wanted, mode, match_loudness, host.ChunkProgress())
        report = by_clip(matches)
        host.show_text(cls.hidden.unique_id, report)
        pictures = [draw_similarity(match, f"{match.score:.0f} of 100, {mode}{clip_title(index, len(matches))}") for index, match in enumerate(matches)]
        return io.NodeOutput(min(match.score for match in matches), torch.stack(pictures), report)


def read_sound(audio: Audio | None, name: str) -> tuple[torch.Tensor, int]:
    """(waveform [B,C,S] on the CPU, sample rate) of an AUDIO. InputError when it holds nothing."""
    if audio is None or not audio["waveform"].numel():
        raise InputError(f"There is no sound on {name}: it is empty, or the film it comes from has none. Connect another.")
    return audio["waveform"].cpu(), audio["sample_rate"]


def describe(encoder: Encoder) -> str:
    """What a file turned out to be."""
    shape = encoder.architecture
    grain = "several resolutions (CAT)" if shape.stem == "multi" else "one patch size (EAT, SSLAM)"
    head = (
        f"tags: {len(encoder.labels)} labels, such as {', '.join(encoder.labels[:3])}"
        if encoder.has_head
        else "tags: none, this encoder has no head; it can compare"
    )
    return f"{encoder.origin}\nstem: {grain}\nsize: width {shape.width}, {shape.depth} blocks\n{head}"


def by_clip(items: Sequence[Any]) -> str:
    """The texts of all clips, each under its number when there are several."""
    return "\n\n".join(f"Clip {number}:\n{item}" for number, item in enumerate(items, 1)) if len(items) > 1 else str(items[0])


def clip_title(index: int, clips: int) -> str:
    return f", clip {index + 1} of {clips}" if clips > 1 else ""
