"""What a clip will cost, told before it is made."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..mova.cards import GPUS, find_device
from ..mova.denoiser import Denoiser
from ..mova.estimate import estimate
from ..mova.image import MAX_FRAMES, MAX_SIDE, SIDE
from ..mova.residency import MODES
from ..mova.sampler import Guidance
from ..mova.schedule import MAX_STEPS
from . import host
from .denoise import SCALE
from .image_to_video_audio import CUSTOM, choose_length, choose_size
from .load import MovaModel

THIS_DEVICE = "this machine"


class MOVAEstimate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MOVAEstimate",
            display_name="MOVA Estimate",
            category="MOVA/sampling",
            description="Predicts time and memory of a clip before it is made, from the size of the model and published timings of known graphics cards. "
            "A prediction, not a measurement: 5 to 10 % off on RTX 4090, H100 and H200, more on others, no time where nothing is known. "
            "Sampling and video decoding are counted, prompt encoding and the first reading of the files are not.",
            search_aliases=["mova", "vram", "memory", "how long", "duration", "requirements"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                MovaModel.Input("model", tooltip="From Load MOVA Model, whose precision and attention count."),
                io.Int.Input("width", default=640, min=SIDE, max=MAX_SIDE, step=SIDE, tooltip="Pixels, 16 to 4096; rounded to a multiple of 16."),
                io.Int.Input("height", default=352, min=SIDE, max=MAX_SIDE, step=SIDE, tooltip="Pixels, 16 to 4096; rounded to a multiple of 16."),
                io.Int.Input("length", default=193, min=1, max=MAX_FRAMES, step=4, tooltip="Pictures in the clip, 1 to 1921; rounded to 4n+1."),
                io.Int.Input("steps", default=50, min=1, max=MAX_STEPS, tooltip="Steps from noise to clip, 1 to 1000, as in MOVA Joint Denoiser."),
                io.Float.Input("cfg", default=5.0, **SCALE, tooltip="0 to 100, as in MOVA Joint Denoiser. Only 1 counts: it halves the time."),
                io.Combo.Input(
                    "residency",
                    options=list(MODES),
                    tooltip="Where the weights are while sampling: resident in GPU memory, or stream, layer by layer. auto: resident when it fits.",
                ),
                io.Combo.Input(
                    "device",
                    options=[THIS_DEVICE, *GPUS],
                    tooltip="The graphics card to predict for: the one of this machine, or another one.",
                ),
                io.Float.Input(
                    "bridge_guidance",
                    default=1.0,
                    **SCALE,
                    advanced=True,
                    tooltip="0 to 100, as in MOVA Joint Denoiser. Other values than 1 are a third pass per step.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="text"),
                io.Float.Output(display_name="vram_gb", tooltip="Peak GPU memory in GB (10^9 bytes); 0 on the CPU."),
                io.Float.Output(display_name="ram_gb", tooltip="RAM in GB that the system cannot take back while the clip is made."),
                io.Float.Output(display_name="minutes", tooltip="Of sampling; nan where the speed of the device is not known."),
            ],
        )

    @classmethod
    def execute(
        cls, model: Denoiser, width: int, height: int, length: int, steps: int, cfg: float, residency: str, device: str, bridge_guidance: float
    ) -> io.NodeOutput:
        width, height = choose_size(CUSTOM, width, height, None)
        made_on = find_device(*host.describe_device(model.device)) if device == THIS_DEVICE else GPUS[device]
        clip = {"width": width, "height": height, "num_frames": choose_length(length)}
        found = estimate(model, made_on, **clip, steps=steps, passes=Guidance(cfg, cfg, bridge_guidance).passes, residency=residency)
        host.show_text(cls.hidden.unique_id, str(found))
        return io.NodeOutput(str(found), found.vram_bytes / 1e9, found.ram_bytes / 1e9, found.minutes, ui=ui.PreviewText(str(found)))
