"""Test-only nodes: core's own CLIP and VAE classes with the weights of a small MOVA checkpoint, and nodes that tell what travels over a link."""

from comfy_api.latest import ComfyExtension, io

from .core_models import write_core_vae
from .nodes import NODES


class HostTests(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> HostTests:
    write_core_vae()
    return HostTests()
