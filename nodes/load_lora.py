"""LoRAs on top of a MOVA model, as many in a row as wanted."""

from __future__ import annotations

from comfy_api.latest import io

from ..mova.denoiser import Denoiser
from ..mova.lora import Lora
from ..mova.lora.places import CHOICES
from . import host
from .load import MovaModel
from .shelves import LORAS

STRENGTH = {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.05, "round": 0.001}


class MOVALoadLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MOVALoadLora",
            display_name="Load MOVA LoRA",
            category="MOVA/loaders",
            description="Adds a LoRA for MOVA, Wan 2.2 A14B or Wan 2.1 14B to the model. Several in a row add up, in any order; the model's files stay as they are. "
            "What it found is told on the node.",
            search_aliases=["mova", "lora", "lokr", "loha", "dora", "adapter", "style", "few steps"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                MovaModel.Input("model", tooltip="From Load MOVA Model, or another Load MOVA LoRA."),
                io.Combo.Input(
                    "lora_name",
                    options=LORAS.choices(),
                    tooltip="A file in models/loras, sub-folders too: .safetensors, or the lora_weights.pt of MOVA's trainers.",
                ),
                io.Float.Input(
                    "video_high", **STRENGTH, tooltip="Strength in the expert for high noise (layout, motion), -10 to 10. 1 = as trained, 0 = not at all."
                ),
                io.Float.Input("video_low", **STRENGTH, tooltip="Strength in the expert for low noise (detail), -10 to 10. 1 = as trained, 0 = not at all."),
                io.Float.Input("audio", **STRENGTH, tooltip="Strength in the audio tower, -10 to 10. 1 = as trained, 0 = not at all."),
                io.Float.Input("bridge", **STRENGTH, tooltip="Strength in what ties picture and sound together, -10 to 10. 1 = as trained, 0 = not at all."),
                io.Combo.Input(
                    "expert",
                    options=list(CHOICES),
                    optional=True,
                    tooltip="Where a file goes that names no tower, as those for Wan do. auto: by its name (high_noise, low), else both video experts.",
                ),
                io.Float.Input(
                    "alpha",
                    default=0.0,
                    min=0.0,
                    max=4096.0,
                    step=1.0,
                    round=0.001,
                    optional=True,
                    advanced=True,
                    tooltip="The LoRA's alpha, above 0 to 4096, where the file does not tell it rightly. 0 = the file's own.",
                ),
            ],
            outputs=[
                MovaModel.Output(display_name="model"),
                io.String.Output(display_name="trigger_words", tooltip="From the file's metadata; empty where it has none."),
            ],
        )

    @classmethod
    def validate_inputs(cls, lora_name: str | None = None) -> bool | str:
        return True if lora_name is None else LORAS.check(lora_name) or True  # None: the name comes over a link

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None = None, **_: object) -> tuple[int, int] | None:
        """A file that was replaced under its name, as trainers do, is read again."""
        path = LORAS.entries().get(lora_name)
        return None if path is None else (path.stat().st_size, path.stat().st_mtime_ns)

    @classmethod
    def execute(cls, model: Denoiser, lora_name: str, expert: str = "auto", alpha: float = 0.0, **strengths: float) -> io.NodeOutput:
        adapted = model.with_loras([Lora(LORAS.path(lora_name), alpha or None, expert=expert, **strengths)])
        report = adapted.loras[-1].report
        host.show_text(cls.hidden.unique_id, str(report))
        return io.NodeOutput(adapted, report.words)
