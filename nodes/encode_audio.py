"""Sound to a LATENT that fits a clip."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..mova.errors import InputError
from ..mova.image import MAX_FRAMES
from ..mova.latents import fit_sound
from . import sockets
from .vae_sockets import AudioVAESocket


class MOVAEncodeAudio(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MOVAEncodeAudio",
            display_name="MOVA Audio Encode",
            category="MOVA/latent",
            description="Turns sound into audio latents as long as the clip; longer sound is cut, shorter sound is followed by silence. "
            "With MOVA Keep Picture / Sound behind it, the picture is made to this sound.",
            search_aliases=["mova", "vae encode audio", "audio to latent", "audio driven", "dubbing"],
            inputs=[
                io.Audio.Input("audio", tooltip="The sound; channels are averaged, any sample rate."),
                io.Vae.Input("vae", tooltip="From Load MOVA Audio VAE."),
                io.Int.Input("length", default=193, min=1, max=MAX_FRAMES, step=4, tooltip="Pictures in the clip, 1 to 1921: as in MOVA Image to Video+Audio."),
                io.Float.Input("fps", default=24.0, min=1.0, max=120.0, step=1.0, tooltip="Pictures per second, 1 to 120: as in MOVA Image to Video+Audio."),
            ],
            outputs=[io.Latent.Output(display_name="audio")],
        )

    @classmethod
    def execute(cls, audio: dict[str, Any] | None, vae: Any, length: int, fps: float) -> io.NodeOutput:
        if audio is None:
            raise InputError("There is no sound to encode: the film it comes from has none. Connect another, or leave the audio latents out.")
        if not isinstance(vae, AudioVAESocket):
            raise InputError("The vae is not MOVA's audio VAE, whose latents the model works with: connect Load MOVA Audio VAE.")
        clock = vae.audio_clock()
        covered = clock.latent_length(length, fps)  # latents; they reach a little beyond the last picture
        sound = fit_sound(audio["waveform"], audio["sample_rate"], covered * clock.hop / clock.sample_rate)
        latents = vae.encode(sound.movedim(1, -1), audio["sample_rate"])  # [B, C, S] -> [B, S, C] -> [B, Ca, Ta]
        return io.NodeOutput(sockets.audio_latent(latents[..., :covered], clock))
