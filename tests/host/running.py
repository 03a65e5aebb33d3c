"""The server that host tests share, and the folder it works in."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import loras
import pytest
import torch
from canvas.recorded import find_frontend

from cat_encoder import write_demo_encoder
from mova.demo_model import write_demo_model
from mova.media import Clip, write_audio

from .record import EAR, INPUT_FILES, MODEL, ROOT, saved_nodes
from .server import CHECKOUTS, Server, serve

PACKS = {"other_name.v2": ROOT, "host_tests": ROOT / "tests" / "host_pack"}  # the pack works under any folder name
NO_HOST = "no real ComfyUI: set COMFYUI_PATH to a checkout, or to several"


def prepare(folder: Path) -> Path:
    """A small model and encoder under the names that the workflows have, and the files that they load."""
    (folder / "models" / "mova").mkdir(parents=True)
    write_demo_model(folder / "models" / "mova" / MODEL)
    write_demo_encoder(folder / "models" / "audio_encoders" / EAR)
    (folder / "input").mkdir()
    shutil.copy(ROOT / "assets" / "demo.jpg", folder / "input" / "mova_demo.jpg")
    sound = 0.1 * torch.sin(torch.arange(48000) / 20)[None]
    write_audio(folder / "input" / "voice.wav", sound, 48000)
    (folder / "models" / "loras").mkdir()
    for seed, node in enumerate(node for node in saved_nodes() if node["type"] == "MOVALoadLora"):
        factors = loras.full_factors(folder / "models" / "mova" / MODEL, seed=seed)
        loras.write_full_lora(folder / "models" / "loras" / node["widgets_values"][0], factors, alpha=4)
    for node in saved_nodes():
        path = folder / "input" / str((node.get("widgets_values") or [""])[0])
        if node["type"] not in INPUT_FILES or path.exists():
            continue
        if node["type"] == "LoadImage":
            shutil.copy(ROOT / "assets" / "demo.jpg", path)
        elif node["type"] == "LoadAudio":
            write_audio(path, sound, 48000)
        else:
            Clip(torch.rand(17, 48, 64, 3), sound, 24.0, 48000).save(path)
    return folder


@pytest.fixture(scope="module", params=CHECKOUTS, ids=[path.name for path in CHECKOUTS])
def checkout(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture(scope="module")
def server(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A ComfyUI with its own page, the pack, the test nodes and a small model."""
    page = re.search(r"comfyui-frontend-package==(\S+)", (checkout / "requirements.txt").read_text(encoding="utf-8"))[1]
    with serve(checkout, prepare(tmp_path_factory.mktemp("comfy")), PACKS, frontend=find_frontend(page)) as server:
        yield server
