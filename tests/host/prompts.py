"""Small prompts and small copies of the shipped workflows, as a server takes them. Node ids are words."""

from __future__ import annotations

import copy
from typing import Any

from .client import Prompt
from .record import MODEL

PICTURE = "mova_demo.jpg"
# What makes a shipped workflow small: node type -> values by their place among the widgets.
SMALL = {
    "MOVAImageToVideoAudio": {0: "custom", 1: 64, 2: 48, 3: 17},
    "MOVADenoise": {2: 2},
    "MOVASeeds": {2: 2},
    "MOVAPickBestTake": {2: "none"},
    "MOVAEncodeAudio": {0: 17},
    "PrimitiveInt": {0: 17},
    "ImageScaleToTotalPixels": {1: 0.01},
}
STAND_INS = {"CLIPLoader": "HostTestCLIP"}  # core's loader opens the UMT5 of 11 GB and no other


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def loaders(model: str = MODEL) -> Prompt:
    return {
        "model": node("MOVALoadModel", model=model, precision="as stored", residency="auto", attention="auto"),
        "text encoder": node("MOVALoadTextEncoder", model=model, device="auto"),
        "video vae": node("MOVALoadVideoVAE", model=model),
        "audio vae": node("MOVALoadAudioVAE", model=model),
    }


def denoise(**given: Any) -> dict[str, Any]:
    """MOVADenoise behind the node "clip"."""
    links = {"model": ["model", 0], "positive": ["clip", 0], "negative": ["clip", 1], "video": ["clip", 2], "audio": ["clip", 3]}
    own = {"shift": 0, "schedule": "reference", "audio_cfg": 0, "audio_shift": 0, "bridge_guidance": 1, "boundary": 0, "denoise": 1}
    return node("MOVADenoise", **{**links, "seed": 1, "steps": 2, "cfg": 5, **own, **given})


def start(prompt: str = "A cat sings.", model: str = MODEL, **given: Any) -> Prompt:
    """Everything before the denoiser: "clip" gives conditioning and empty latents of 64x48 px, 9 pictures."""
    size = {"size": "custom", "width": 64, "height": 48, "length": 9, "fps": 24, "batch_size": 1, "start_image": ["picture", 0]}
    links = {"positive": ["prompt", 0], "negative": ["prompt", 1], "vae": ["video vae", 0]}
    return {
        **loaders(model),
        "picture": node("LoadImage", image=PICTURE),
        "prompt": node("MOVAEncodeText", text_encoder=["text encoder", 0], prompt=prompt, negative_prompt="noise"),
        "clip": node("MOVAImageToVideoAudio", **{**links, **size, **given}),
    }


def film(tiling: str = "auto", settings: dict[str, Any] | None = None, **given: Any) -> Prompt:
    """The whole way to an mp4; settings: of the denoiser."""
    return {
        **start(**given),
        "denoise": denoise(**(settings or {})),
        "images": node("MOVADecodeVideo", samples=["denoise", 0], vae=["video vae", 0], tiling=tiling),
        "sound": node("MOVADecodeAudio", samples=["denoise", 1], vae=["audio vae", 0]),
        "film": node("CreateVideo", images=["images", 0], audio=["sound", 0], fps=["clip", 4]),
        "save": node("SaveVideo", video=["film", 0], filename_prefix="test/mova", format="mp4", codec="h264"),
    }


def shrink(workflow: dict[str, Any]) -> dict[str, Any]:
    """A copy of a canvas workflow at small sizes, that runs on a small model."""
    workflow = copy.deepcopy(workflow)
    for graph in [workflow, *(workflow.get("definitions") or {}).get("subgraphs", [])]:
        for saved in graph["nodes"]:
            for place, value in SMALL.get(saved["type"], {}).items():
                saved["widgets_values"][place] = value
            if saved["type"] in STAND_INS:
                saved.update(type=STAND_INS[saved["type"]], widgets_values=[], inputs=[], properties={})
    return workflow
