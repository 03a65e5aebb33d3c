"""A node pack with a node for each thing that headless does; the tests put the library beside it."""

import comfy.model_management
import folder_paths
import torch
from comfy.utils import ProgressBar
from comfy_api.latest import ComfyExtension, io

from .cat_encoder.errors import CatError
from .mova.errors import InputError


class TestNumber(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TestNumber",
            display_name="A Number",
            search_aliases=["n"],
            inputs=[
                io.Int.Input("seed", default=1, min=0, max=100),
                io.Float.Input("scale", default=0.5, optional=True, advanced=True),
                io.Combo.Input("mode", options=["plain", "double"], tooltip="how"),
                io.String.Input("text", default="hello", multiline=True, dynamic_prompts=False),
            ],
            outputs=[io.Int.Output(display_name="number"), io.String.Output()],
        )

    @classmethod
    def execute(cls, seed, mode, text, scale=0.5):
        print("printed by a node")
        ProgressBar(2).update(2)
        return io.NodeOutput(seed * (2 if mode == "double" else 1), text)


class MOVALoadTest(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="MOVALoadTest", inputs=[io.Combo.Input("model", options=["none"])], outputs=[io.String.Output()])

    @classmethod
    def validate_inputs(cls, model):
        return True if model in ("none", "mine") else f"'{model}' is no model; put one into {folder_paths.models_dir}."

    @classmethod
    async def execute(cls, model):
        return io.NodeOutput(model)


class TestPictures(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        inputs = [io.Int.Input("count", default=5, min=1, max=9), io.Image.Input("image", optional=True)]
        return io.Schema(node_id="TestPictures", inputs=inputs, outputs=[io.Image.Output("images"), io.Audio.Output()], hidden=[io.Hidden.unique_id])

    @classmethod
    def execute(cls, count, image=None):
        assert torch.is_inference_mode_enabled() and cls.hidden.unique_id
        pictures = torch.linspace(0, 1, count)[:, None, None, None].expand(count, 32, 48, 3).clone()
        return io.NodeOutput(pictures, {"waveform": torch.zeros(1, 1, count * 2000), "sample_rate": 48000})


class TestFail(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        inputs = [io.Combo.Input("how", options=["sentence", "ear", "bug", "cancel"]), io.AnyType.Input("after", optional=True)]
        return io.Schema(node_id="TestFail", inputs=inputs, is_output_node=True)

    @classmethod
    def execute(cls, how, after=None):
        if how == "sentence":
            raise InputError("The picture is too small: give a larger one.")
        if how == "ear":
            raise CatError("The sound is too short: give a longer one.")
        if how == "cancel":
            raise comfy.model_management.InterruptProcessingException
        return 1 / 0


class TestJoin(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        inputs = [io.Int.Input("numbers"), io.Boolean.Input("loud", default=False)]
        return io.Schema(node_id="TestJoin", inputs=inputs, outputs=[io.String.Output()], is_input_list=True)

    @classmethod
    def execute(cls, numbers, loud):
        return io.NodeOutput(f"joined {numbers} {loud}")


class TestMany(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="TestMany", outputs=[io.Int.Output(is_output_list=True)])

    @classmethod
    def execute(cls):
        return io.NodeOutput([1, 2, 3])


class TestExtension(ComfyExtension):
    async def get_node_list(self):
        return [TestNumber, MOVALoadTest, TestPictures, TestFail, TestJoin, TestMany]


async def comfy_entrypoint():
    return TestExtension()
