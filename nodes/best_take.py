"""Several takes of one shot: seeds to make them with, and the best of them."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..cat_encoder.listening.sound_check import check_sound
from ..mova.errors import InputError
from ..mova.lipsync.best_take import Take, describe_takes, draw_sheet, gather_remarks, rate_sync
from ..mova.lipsync.film import ImageFrames
from . import host, sockets
from .check_lip_sync import check_clip, check_files, check_inputs, files_there, to_image
from .decode import decode_audio, decode_video
from .listen import CatEncoder

NONE = "none"
MAX_TAKES = 64
NOT_ASKED = "The CAT encoder is connected, but wanted_sounds is empty: it was not asked, and sounds do not count."


class MOVASeeds(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MOVASeeds",
            display_name="MOVA Seeds for Takes",
            category="MOVA/sampling",
            description="A list of seeds: whatever they are linked to runs once for each. Linked to the seed of MOVA Joint Denoiser, it makes several takes, "
            "one after another, in the memory of one.",
            search_aliases=["mova", "seed list", "best of n", "variations", "several takes"],
            inputs=[
                io.Int.Input(
                    "seed",
                    default=42,
                    min=0,
                    max=2**64 - 1 - MAX_TAKES,
                    control_after_generate=True,
                    tooltip="Seed of the first take; the others follow it: 42, 43, 44, ...",
                ),
                io.Int.Input("takes", default=4, min=1, max=MAX_TAKES, tooltip="How many takes, 1 to 64. Time grows with it, memory does not."),
            ],
            outputs=[io.Int.Output(display_name="seeds", is_output_list=True)],
        )

    @classmethod
    def execute(cls, seed: int, takes: int) -> io.NodeOutput:
        return io.NodeOutput(list(range(seed, seed + takes)))


class MOVAPickBestTake(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MOVAPickBestTake",
            display_name="MOVA Pick Best Take",
            category="MOVA/check",
            description="Decodes takes one at a time, scores each by lip-sync and, with a CAT encoder, by the sounds that are wanted, and gives out the best. "
            "Takes come as a list (MOVA Seeds for Takes before the denoiser), as a batch, or both.",
            search_aliases=["mova", "best of n", "rank", "choose", "contact sheet", "lip sync"],
            is_input_list=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Latent.Input("video", tooltip="Video latents of all takes, from MOVA Joint Denoiser."),
                io.Latent.Input("audio", tooltip="Audio latents of the same takes."),
                io.Vae.Input("video_vae", tooltip="From Load MOVA Video VAE."),
                io.Vae.Input("audio_vae", tooltip="From Load MOVA Audio VAE."),
                *check_inputs(NONE, told=" none: lips are not checked."),
                io.Int.Input("seeds", optional=True, force_input=True, tooltip="From MOVA Seeds for Takes: written beside each take."),
                CatEncoder.Input("cat_encoder", optional=True, tooltip="From Load CAT Encoder: takes are judged by their sound as well."),
                io.String.Input(
                    "wanted_sounds",
                    default="",
                    optional=True,
                    tooltip="Sounds that should be heard, separated by commas, such as 'speech, rain'. Used with a CAT encoder.",
                ),
                io.Float.Input(
                    "sound_share",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=0.01,
                    optional=True,
                    tooltip="How much the sounds count, 0 to 1; the rest is the lips. Used where both are judged.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images"),
                io.Audio.Output(display_name="audio"),
                io.Int.Output(display_name="index", tooltip="Which take it is, 0 = the first."),
                io.String.Output(display_name="scores", tooltip="All takes and their scores, as JSON."),
                io.Image.Output(display_name="contact_sheet", tooltip="First frame, score and seed of every take."),
            ],
        )

    @classmethod
    def validate_inputs(cls, method: Any = None, face_landmarks: Any = None, syncnet_weights: Any = None) -> bool | str:
        asked = [value[0] if isinstance(value, list) else value for value in (method, face_landmarks, syncnet_weights)]
        return True if asked[1] == NONE else check_files(*asked)

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> str:
        return files_there()

    @classmethod
    def execute(
        cls, video: list[sockets.Latent], audio: list[sockets.Latent], seeds: list[int] | None = None, sound_share: list[float] = (0.5,), **given: list[Any]
    ) -> io.NodeOutput:
        one = {name: values[0] for name, values in given.items()}
        pairs, share = pair_takes(video, audio, seeds), sound_share[0]
        takes: list[Take] = []
        best, kept = 0, None
        for picture, sound, seed in pairs:
            host.show_text(cls.hidden.unique_id, f"take {len(takes) + 1} of {len(pairs)}")
            clip = decode_video(picture, one["video_vae"]), decode_audio(sound, one["audio_vae"])
            takes.append(judge_take(*clip, seed, **one))
            if len(takes) == 1 or takes[-1].total(share) > takes[best].total(share):
                best, kept = len(takes) - 1, clip
            del clip  # two decoded takes at most: the best, and the one that is looked at
        scores, sheet = describe_takes(takes, best, share), to_image(draw_sheet(takes, best, share))
        host.show_text(cls.hidden.unique_id, "\n".join([f"take {best + 1} of {len(takes)}: {takes[best].total(share):.2f}", *gather_remarks(takes)]))
        return io.NodeOutput(*kept, best, scores, sheet)


def pair_takes(video: list[sockets.Latent], audio: list[sockets.Latent], seeds: list[int] | None) -> list[tuple[torch.Tensor, torch.Tensor, int | None]]:
    """(video latents [1,16,T,h,w], audio latents [1,Ca,Ta], seed) of every take, batches taken apart. InputError when the lists do not fit together."""
    if len(video) != len(audio) or (seeds and len(seeds) != len(video)):
        told = f" and {len(seeds)} seeds" if seeds else ""
        raise InputError(
            f"There are {len(video)} video latents, {len(audio)} audio latents{told}: one of each for every take is needed, from the same denoiser."
        )
    takes = []
    for picture, sound, seed in zip(video, audio, seeds or [None] * len(video), strict=True):
        pictures, sounds = sockets.decodable(picture, 0), sockets.decodable(sound, -1)
        if len(pictures) != len(sounds):
            raise InputError(f"A batch has {len(pictures)} videos and {len(sounds)} sounds: one sound for every video is needed.")
        takes += [(pictures[i : i + 1], sounds[i : i + 1], seed) for i in range(len(pictures))]
    return takes


def judge_take(
    images: torch.Tensor,
    audio: dict[str, Any],
    seed: int | None,
    *,
    fps: float,
    method: str,
    face_landmarks: str,
    syncnet_weights: str,
    cat_encoder: Any = None,
    wanted_sounds: str = "",
    **_: Any,  # the VAEs
) -> Take:
    """One decoded take and what it is worth."""
    _, first = next(iter(ImageFrames(images, fps)))
    found: dict[str, Any] = {}
    if face_landmarks != NONE:
        report = check_clip(images, audio, fps, method, face_landmarks, syncnet_weights)
        found = {"verdict": report.verdict, "lag_ms": report.lag_ms, "sync": rate_sync(report)}
    if cat_encoder is not None and not wanted_sounds.strip():
        found["remarks"] = (NOT_ASKED,)
    elif cat_encoder is not None:
        with cat_encoder.listening() as ear:
            check = check_sound(ear, audio["waveform"], audio["sample_rate"], wanted_sounds, on_step=host.ChunkProgress())[0]
        found |= {"sound": check.score if check.found else None, "remarks": check.remarks}
    return Take(seed, first, **found)
