"""MOVA Studio in ComfyUI: nodes for joint video + audio generation."""

from .nodes import comfy_entrypoint

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
