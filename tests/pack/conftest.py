"""The pack as ComfyUI loads it, over headless's stand-ins, with a small checkpoint among the models."""

import asyncio
import importlib.util
import shutil
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT
from node_stand_ins import PACK, first_value

from headless.host import installed


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_mova):
    folder = tmp_path_factory.mktemp("host") / "models"
    shutil.copytree(tiny_mova, folder / "mova" / "small" / "tiny")
    return folder


@pytest.fixture(scope="module")
def pack(models):
    """The pack's modules by name; `nodes` by id."""
    with installed(models, models, models):
        spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
        sys.modules[PACK] = root = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(root)

        async def list_nodes():
            return await (await root.comfy_entrypoint()).get_node_list()

        nodes = {node.GET_SCHEMA().node_id: node for node in asyncio.run(list_nodes())}
        parts = {name: sys.modules[f"{PACK}.{name}"] for name in ("nodes.host", "nodes.sockets", "nodes.image_to_video_audio", "mova.errors")}
        yield SimpleNamespace(nodes=nodes, **{name.split(".")[1]: module for name, module in parts.items()})
        for name in [name for name in sys.modules if name.partition(".")[0] == PACK]:
            del sys.modules[name]


@pytest.fixture
def run(pack):
    """run("MOVADenoise", steps=2, ...) -> its outputs; widgets that are not given have their default."""

    def run(node_id, **given):
        node = pack.nodes[node_id]
        values = {item.id: first_value(item) for item in node.GET_SCHEMA().inputs if item.is_widget} | given
        return node.execute(**values).result

    return run


@pytest.fixture(scope="module")
def parts(pack):
    """The four loaders' outputs."""
    load = {node_id: pack.nodes[node_id].execute for node_id in pack.nodes if node_id.startswith("MOVALoad")}
    return SimpleNamespace(
        text=load["MOVALoadTextEncoder"](model="small/tiny", device="cpu").result[0],
        video_vae=load["MOVALoadVideoVAE"](model="small/tiny").result[0],
        audio_vae=load["MOVALoadAudioVAE"](model="small/tiny").result[0],
        model=load["MOVALoadModel"](model="small/tiny", precision="as stored", residency="auto", attention="auto").result[0],
    )


@pytest.fixture
def clip(run, parts):
    """clip(...) -> conditioning and empty latents of a small clip: 64x48, 9 pictures."""

    def clip(**given):
        positive, negative = run("MOVAEncodeText", text_encoder=parts.text, prompt="A cat sings.", negative_prompt="")
        size = dict(size="custom", width=64, height=48, length=9)
        outputs = run("MOVAImageToVideoAudio", **{**dict(positive=positive, negative=negative, vae=parts.video_vae), **size, **given})
        return SimpleNamespace(**dict(zip(("positive", "negative", "video", "audio", "fps"), outputs, strict=True)))

    return clip


@pytest.fixture
def denoise(run, parts):
    def denoise(clip, **given):
        inputs = dict(model=parts.model, positive=clip.positive, negative=clip.negative, video=clip.video, audio=clip.audio, steps=2)
        return run("MOVADenoise", **inputs | given)

    return denoise
