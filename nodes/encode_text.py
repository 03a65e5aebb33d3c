"""Prompts to CONDITIONING."""

from __future__ import annotations

from comfy_api.latest import io

from ..mova import NEGATIVE_PROMPT, TextEncoder
from . import host
from .load import MovaTextEncoder


class MOVAEncodeText(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MOVAEncodeText",
            display_name="MOVA Text Encode",
            category="MOVA/conditioning",
            description="Encodes what the clip should show and sound like, and what it should not. Encoded prompts are kept on disk, so that a known one costs nothing.",
            search_aliases=["mova", "prompt", "clip text encode", "negative prompt"],
            inputs=[
                MovaTextEncoder.Input("text_encoder", tooltip="From Load MOVA Text Encoder."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="Picture and sound in one text, up to 512 tokens: who and what is seen, how it moves, what is said (in quotes) and heard.",
                ),
                io.String.Input(
                    "negative_prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default=NEGATIVE_PROMPT,
                    tooltip="What to stay away from; used when a guidance (cfg) is not 1. The text here is the release's own list of picture faults, in Chinese.",
                ),
            ],
            outputs=[io.Conditioning.Output(display_name="positive"), io.Conditioning.Output(display_name="negative")],
        )

    @classmethod
    def execute(cls, text_encoder: TextEncoder, prompt: str, negative_prompt: str) -> io.NodeOutput:
        prompts = [prompt, negative_prompt]
        host.free_memory(text_encoder.bytes_needed(prompts), text_encoder.device)
        encoded, progress = [], host.ChunkProgress()
        try:
            for text in prompts:
                host.check_cancel()
                encoded.append([[text_encoder.encode([text], on_layer=progress).to(host.intermediate_device()), {}]])
        finally:
            text_encoder.release()
        return io.NodeOutput(*encoded)
