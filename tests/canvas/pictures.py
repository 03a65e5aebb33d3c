"""Draws the pictures of the help pages: python -m tests.canvas.pictures     (needs Chromium; run it after a node changed its inputs)"""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from .browser import open_canvas
from .contract import NEWEST, ROOT, own_nodes, read_contract
from .recorded import find_frontend, serve_recorded

PICTURES = ROOT / "web" / "docs" / "images"
COLOURS = 64  # enough for a node, and a fourth of the size
SHOWN = {  # what is typed into the widgets; by default they show what the node begins with
    "MOVAEncodeText": {
        "prompt": 'A woman at a window by the sea turns to the camera and says: "Listen, the tide is coming in."',
        "negative_prompt": "(the release's own list of picture faults, in Chinese)",
    },
}


def picture_path(kind: str) -> Path:
    return PICTURES / f"{kind}.png"


def draw_pictures() -> None:
    """Each of our nodes, as the newest recorded ComfyUI shows a new one."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    with serve_recorded(read_contract(NEWEST), find_frontend()) as url, open_canvas(url) as canvas:
        for kind in own_nodes(NEWEST):
            picture = canvas.picture_node(kind, SHOWN.get(kind, {}))
            Image.open(io.BytesIO(picture)).convert("RGB").quantize(COLOURS).save(picture_path(kind), optimize=True)
            print(picture_path(kind).relative_to(ROOT))


if __name__ == "__main__":
    draw_pictures()
