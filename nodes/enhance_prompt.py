"""From an idea to the prompt, before anything is sampled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from comfy_api.latest import io

from ..mova.prompt import Fields, LanguageModel, LocalModel, RemoteModel, compose_negative, compose_prompt, enhance_prompt, parse_lines
from ..mova.prompt.enhance import ON_FAILURE, SMALLEST
from ..mova.prompt.length import LONGEST
from ..mova.text import TextEncoder
from . import host
from .load import MovaTextEncoder
from .shelves import LANGUAGE_MODELS

TEMPLATE, LOCAL, SERVICE = PROVIDERS = ("template", "local", "openai-compatible")
SAME = "same as local_model"
BIGGEST_SEED = 2**64 - 1


def length_inputs() -> list[io.Input]:
    return [
        MovaTextEncoder.Input("text_encoder", optional=True, tooltip="From Load MOVA Text Encoder, to count the length exactly; without it a careful estimate is used."),
        io.Boolean.Input(
            "no_subtitles",
            default=False,
            optional=True,
            tooltip="Ends the prompt with the sentence that marks clips without subtitles in MOVA's training. For when subtitles appear in the picture.",
        ),
    ]  # fmt: skip


class MOVAEnhancePrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        names = LANGUAGE_MODELS.choices()
        return io.Schema(
            node_id="MOVAEnhancePrompt",
            display_name="MOVA Prompt Enhancer",
            category="MOVA/conditioning",
            description="Turns a line into the prompt MOVA was trained with: a long description in the order of time, what is said word for word, and at the end what is heard. "
            "The text appears on the node before anything is sampled.",
            search_aliases=["mova", "prompt", "llm", "rewrite", "qwen", "openai", "ollama", "caption"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.String.Input("idea", multiline=True, dynamic_prompts=True, tooltip="What happens, in any language, up to 30000 characters. What is said, or written on things, in quotes: it is kept letter by letter."),
                io.Image.Input("image", optional=True, tooltip="The start picture. local and openai-compatible look at it first; the template does not look, but contradicts nothing in it."),
                io.Combo.Input(
                    "provider",
                    options=list(PROVIDERS),
                    tooltip="Who writes. template: fixed rules, at once and without a model. local: a language model in models/LLM. "
                    "openai-compatible: the service set in the user folder's __mova/prompt.json or in MOVA_PROMPT_BASE_URL and MOVA_PROMPT_MODEL.",
                ),
                io.Int.Input("seed", default=42, min=0, max=BIGGEST_SEED, control_after_generate=True, tooltip="Another number is another take, 0 to 2^64-1. With the same inputs nothing is asked again."),
                io.Combo.Input("on_failure", options=list(ON_FAILURE), optional=True, tooltip="When the model fails or refuses. error: stop and say why. use template: go on with the template's text and say so."),
                io.Combo.Input("local_model", options=names, optional=True, tooltip="For local: a folder in models/LLM with config.json and safetensors. To look at a picture it must be a vision-language model."),
                io.Combo.Input("language_model", options=[SAME, *names], optional=True, tooltip="For local: another model for writing, which need not see. local_model looks at the picture then."),
                io.Int.Input("max_tokens", default=LONGEST, min=SMALLEST, max=LONGEST, optional=True, tooltip="Longest prompt in tokens of the text encoder, 64 to 512. What is said and the paragraph about sound are never cut."),
                *length_inputs(),
            ],
            outputs=[
                io.String.Output(display_name="prompt"),
                io.String.Output(display_name="elements", tooltip="What was seen in the picture, as JSON; empty when no model looked at one."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, provider: str | None = None, local_model: str | None = None, language_model: str | None = None) -> bool | str:
        if provider not in (None, *PROVIDERS):  # None: it comes over a link
            return f"provider is '{provider}': choose {', '.join(PROVIDERS)}."
        names = [name for name in (local_model, language_model) if provider == LOCAL and name not in (None, SAME)]
        return next(filter(None, (LANGUAGE_MODELS.check(name) for name in names)), True)

    @classmethod
    def execute(
        cls,
        idea: str,
        provider: str,
        seed: int,
        image: torch.Tensor | None = None,
        on_failure: str = ON_FAILURE[0],
        local_model: str = LANGUAGE_MODELS.empty,
        language_model: str = SAME,
        max_tokens: int = LONGEST,
        text_encoder: TextEncoder | None = None,
        no_subtitles: bool = False,
    ) -> io.NodeOutput:
        model = BUILD[provider](local_model, language_model)
        settings = {"on_failure": on_failure, "max_tokens": max_tokens, "no_subtitles": no_subtitles, "count": text_encoder and text_encoder.count_tokens}
        made = enhance_prompt(idea, image, model=model, seed=seed, on_text=host.TextProgress(cls.hidden.unique_id), **settings)
        host.show_text(cls.hidden.unique_id, "\n\n".join([made.prompt, *made.notes]))
        return io.NodeOutput(made.prompt, made.elements.to_json() if made.elements else "")


def open_local(local_model: str, language_model: str) -> LanguageModel:
    """The chosen folders; room is made for them on the device."""
    folder = LANGUAGE_MODELS.path(local_model)
    writer: Path | None = None if language_model == SAME else LANGUAGE_MODELS.path(language_model)
    model = LocalModel(folder, writer, device=host.torch_device())
    host.free_memory(model.bytes_needed(), model.device)
    return model


BUILD: dict[str, Callable[[str, str], LanguageModel | None]] = {
    TEMPLATE: lambda *_: None,
    LOCAL: open_local,
    SERVICE: lambda *_: RemoteModel(host.prompt_service()),
}


class MOVAPromptFields(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MOVAPromptFields",
            display_name="MOVA Prompt Fields",
            category="MOVA/conditioning",
            description="Puts a prompt together from separate fields, in the order MOVA was trained with: the scene, what is said and by whom, what is heard. Adds nothing of its own.",
            search_aliases=["mova", "prompt", "dialogue", "script", "storyboard", "template"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.String.Input("idea", multiline=True, dynamic_prompts=True, tooltip="What is seen and what happens, in the order of time."),
                io.String.Input(
                    "dialogue",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="One spoken line per row: speaker (language) [when]: words. Only the words are needed. Example: the old woman (French) [at the end]: Bonsoir. About 25 words fit into 8 seconds.",
                ),
                io.String.Input("sound_effects", multiline=True, dynamic_prompts=True, tooltip="Sounds and ambience, such as: rain on the window, a distant train."),
                io.String.Input("music", dynamic_prompts=True, tooltip="The music, such as: a slow solo piano. none: there is no music, in the negative prompt as well. Empty: left open."),
                io.String.Input("camera", dynamic_prompts=True, tooltip="Framing and camera, such as: a close-up at eye level, the camera pushes in slowly."),
                io.String.Input("style", dynamic_prompts=True, tooltip="Look and light, such as: a hand-drawn cartoon in warm evening light."),
                io.String.Input("avoid", dynamic_prompts=True, optional=True, tooltip="Added to the negative prompt, which begins with the release's own list of picture faults."),
                *length_inputs(),
            ],
            outputs=[io.String.Output(display_name="prompt"), io.String.Output(display_name="negative_prompt")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        idea: str,
        dialogue: str,
        sound_effects: str,
        music: str,
        camera: str,
        style: str,
        avoid: str = "",
        text_encoder: TextEncoder | None = None,
        no_subtitles: bool = False,
    ) -> io.NodeOutput:
        fields = Fields(idea, parse_lines(dialogue), sound_effects, music, camera, style)
        made = compose_prompt(fields, count=text_encoder and text_encoder.count_tokens, no_subtitles=no_subtitles)
        host.show_text(cls.hidden.unique_id, "\n\n".join([made.prompt, *made.notes]))
        return io.NodeOutput(made.prompt, compose_negative(music, avoid))
