"""Nodes that bring core's own objects in, make odd inputs, and tell what arrives."""

from __future__ import annotations

import json
from typing import Any

import torch
from comfy_api.latest import io, ui

from .core_models import load_core_clip


class HostTestCLIP(io.ComfyNode):
    """Core's CLIP; the name of the file that a Load CLIP would open goes unused."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="HostTestCLIP", category="tests", inputs=[], outputs=[io.Clip.Output()])

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(load_core_clip())


class HostTestConditioning(io.ComfyNode):
    """Random text embeddings, as an encoder of another model would make them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [io.Int.Input("tokens", default=77), io.Int.Input("width", default=768)]
        return io.Schema(node_id="HostTestConditioning", category="tests", inputs=inputs, outputs=[io.Conditioning.Output()])

    @classmethod
    def execute(cls, tokens: int, width: int) -> io.NodeOutput:
        return io.NodeOutput([[torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(0)), {}]])


class HostTestDescribe(io.ComfyNode):
    """JSON of what is inside: shapes, types and keys."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="HostTestDescribe", category="tests", inputs=[io.AnyType.Input("value")], outputs=[], is_output_node=True)

    @classmethod
    def execute(cls, value: Any) -> io.NodeOutput:
        return io.NodeOutput(ui=ui.PreviewText(json.dumps(describe(value))))


class HostTestDistance(io.ComfyNode):
    """Relative L2 distance of the tensors inside of two values."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [io.AnyType.Input("value"), io.AnyType.Input("expected")]
        return io.Schema(node_id="HostTestDistance", category="tests", inputs=inputs, outputs=[], is_output_node=True)

    @classmethod
    def execute(cls, value: Any, expected: Any) -> io.NodeOutput:
        value, expected = list(tensors(value)), list(tensors(expected))
        shapes = [[list(tensor.shape) for tensor in found] for found in (value, expected)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{shapes[0]} is not {shapes[1]}")
        far = max(float((mine - other).norm() / other.norm().clamp_min(1e-30)) for mine, other in zip(value, expected, strict=True))
        return io.NodeOutput(ui=ui.PreviewText(json.dumps(far)))


def tensors(value: Any) -> Any:
    """The main tensors of IMAGE, LATENT, AUDIO and CONDITIONING."""
    if isinstance(value, torch.Tensor):
        yield value.double()
    elif isinstance(value, dict):
        yield from tensors(value.get("samples", value.get("waveform")))
    elif isinstance(value, list):
        for context, _ in value:
            yield from tensors(context)
    else:  # core's NestedTensor
        for tensor in value.unbind():
            yield from tensors(tensor)


def describe(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return list(value.shape)
    if isinstance(value, dict):
        return {key: describe(item) for key, item in value.items()}
    if isinstance(value, list):
        return [describe(item) for item in value]
    if getattr(value, "is_nested", False):
        return {"nested": [describe(item) for item in value.unbind()]}
    return value if isinstance(value, (str, int, float, bool, type(None))) else type(value).__name__


NODES = [HostTestCLIP, HostTestConditioning, HostTestDescribe, HostTestDistance]
