"""The host's memory manager, as a recording stand-in sees it: room is made before anything of ours is placed, and nothing stays, however the work ends."""

import asyncio
import importlib.util
import shutil
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from headless.host import installed

PACK = "remembering_pack"
VAE_DEVICE = torch.device("cpu", 0)  # not equal to torch.device("cpu"), where weights wait


class OldInterrupt(Exception):
    """What hosts before 0.21 raise on cancel."""


class NewInterrupt(BaseException):
    """What they raise since."""


class Recorder:
    """Takes the place of comfy.model_management's calls: keeps them in `calls`, and raises `fails` when it is asked about cancel for the `at`-th time."""

    def __init__(self, parts):
        self.parts, self.calls, self.asked, self.fails, self.at = parts, [], 0, None, 0

    def free_memory(self, need, device, keep_loaded=()):
        self.calls.append(SimpleNamespace(need=need, device=device, placed=self.parts.placed()))

    def check(self):
        self.asked += 1
        if self.asked == self.at:
            raise self.fails


class Parts:
    """The loaders' outputs, and what of them is on a device."""

    def __init__(self, nodes):
        def load(kind, **widgets):
            return nodes[f"MOVALoad{kind}"].execute(model="tiny", **widgets).result[0]

        self.text, self.video_vae, self.audio_vae = load("TextEncoder", device="cpu"), load("VideoVAE"), load("AudioVAE")
        self.models = {
            mode: load("Model", precision=precision, residency=mode, attention="auto") for mode, precision in (("auto", "as stored"), ("stream", "bf16"))
        }
        self.away = {}
        for name, socket in (("video VAE", self.video_vae), ("audio VAE", self.audio_vae)):
            socket.vae.to = self.follow(name, socket.vae.to)

    def follow(self, name, move):
        def to(device):
            self.away[name] = device == VAE_DEVICE
            return move("cpu")

        return to

    def placed(self):
        held = {name for name, away in self.away.items() if away}
        held |= {f"model ({mode})" for mode, model in self.models.items() if not model.residency.empty}
        return held | ({"text encoder"} if self.text.model is not None else set())


@pytest.fixture(scope="module")
def host(tmp_path_factory, tiny_mova):
    """Nodes by id, the parts, and a clip to work on."""
    folder = tmp_path_factory.mktemp("host")
    shutil.copytree(tiny_mova, folder / "mova" / "tiny")
    with installed(folder, folder, folder):
        spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
        sys.modules[PACK] = root = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(root)
        listed = asyncio.run(asyncio.run(root.comfy_entrypoint()).get_node_list())
        nodes = {node.GET_SCHEMA().node_id: node for node in listed}
        parts = Parts(nodes)
        parts.text.cache = None  # every prompt is computed
        positive, negative = nodes["MOVAEncodeText"].execute(parts.text, "A cat sings.", "").result
        size = dict(size="custom", width=64, height=48, length=9, fps=24.0, batch_size=1)
        positive, negative, video, audio, _ = nodes["MOVAImageToVideoAudio"].execute(positive, negative, parts.video_vae, **size).result
        clip = dict(positive=positive, negative=negative, video=video, audio=audio)
        yield SimpleNamespace(nodes=nodes, parts=parts, clip=clip, size=size, management=sys.modules["comfy.model_management"])
        for name in [name for name in sys.modules if name.partition(".")[0] == PACK]:
            del sys.modules[name]


@pytest.fixture
def recorder(host, monkeypatch):
    recorder = Recorder(host.parts)
    monkeypatch.setattr(host.management, "free_memory", recorder.free_memory)
    monkeypatch.setattr(host.management, "throw_exception_if_processing_interrupted", recorder.check)
    monkeypatch.setattr(host.management, "vae_device", lambda: VAE_DEVICE)
    return recorder


SETTINGS = dict(seed=1, steps=2, cfg=5.0, shift=0.0, schedule="reference", audio_cfg=0.0, audio_shift=0.0, bridge_guidance=1.0, boundary=0.0, denoise=1.0)
FILM, SOUND = torch.rand(9, 48, 64, 3), {"waveform": torch.rand(1, 1, 600) - 0.5, "sample_rate": 1500}
LATENTS = {"samples": torch.randn(1, 16, 3, 6, 8)}, {"samples": torch.randn(1, 16, 19)}

STAGES = {
    "encode text": lambda host: host.nodes["MOVAEncodeText"].execute(host.parts.text, "A dog barks.", "noise"),
    "sample, views": lambda host: host.nodes["MOVADenoise"].execute(host.parts.models["auto"], **host.clip, **SETTINGS),
    "sample, stream": lambda host: host.nodes["MOVADenoise"].execute(host.parts.models["stream"], **host.clip, **SETTINGS),
    "encode a start picture": lambda host: host.nodes["MOVAImageToVideoAudio"].execute(
        host.clip["positive"], host.clip["negative"], host.parts.video_vae, **host.size, start_image=FILM[:1]
    ),
    "encode a film": lambda host: host.parts.video_vae.encode(FILM),
    "encode a film in tiles": lambda host: host.parts.video_vae.encode_tiled(FILM, tile_x=32, tile_y=32, overlap=8),
    "decode a film": lambda host: host.nodes["MOVADecodeVideo"].execute(LATENTS[0], host.parts.video_vae, "off"),
    "decode a film in tiles": lambda host: host.parts.video_vae.decode_tiled(LATENTS[0]["samples"], tile_x=4, tile_y=4, overlap=1),
    "encode sound": lambda host: host.nodes["MOVAEncodeAudio"].execute(SOUND, host.parts.audio_vae, 9, 24.0),
    "decode sound": lambda host: host.nodes["MOVADecodeAudio"].execute(LATENTS[1], host.parts.audio_vae),
}
stages = pytest.mark.parametrize("stage", STAGES)


def devices(host, stage):
    return VAE_DEVICE if "film" in stage or "sound" in stage or "picture" in stage else torch.device("cpu")


@stages
def test_room_is_made_first_and_nothing_stays(host, recorder, stage):
    threads = set(threading.enumerate())
    STAGES[stage](host)
    assert recorder.asked >= 1  # about cancel
    assert [(call.need > 0, call.device, call.placed) for call in recorder.calls] == [(True, devices(host, stage), set())]
    assert isinstance(recorder.calls[0].need, int) and not host.parts.placed()
    assert set(threading.enumerate()) == threads


@stages
@pytest.mark.parametrize(
    "fails", [OldInterrupt("cancelled"), NewInterrupt("cancelled"), RuntimeError("the disk is gone")], ids=lambda error: type(error).__name__
)
def test_nothing_stays_wherever_it_is_broken_off(host, recorder, stage, fails):
    STAGES[stage](host)
    questions, threads = recorder.asked, set(threading.enumerate())
    for at in {1, questions // 2 + 1, questions}:
        recorder.calls, recorder.asked, recorder.fails, recorder.at = [], 0, fails, at
        with pytest.raises(type(fails), match=str(fails)):
            STAGES[stage](host)
        assert recorder.asked == at and not host.parts.placed() and set(threading.enumerate()) == threads
        assert all(call.need > 0 and not call.placed for call in recorder.calls)
    recorder.at = 0
    STAGES[stage](host)  # and the next run works
    assert not host.parts.placed()


NO_NUMBERS, NARROW = {"samples": torch.full((1, 16, 3, 6, 8), torch.nan)}, {"samples": torch.randn(1, 3, 19)}
BAD = {
    "video latents that are no numbers": (lambda host: host.nodes["MOVADecodeVideo"].execute(NO_NUMBERS, host.parts.video_vae, "off"), "no numbers"),
    "audio latents of another model": (lambda host: host.nodes["MOVADecodeAudio"].execute(NARROW, host.parts.audio_vae), "3 channels"),
    "a film that is none": (lambda host: host.parts.video_vae.encode(FILM * torch.nan), "film"),
    "a prompt that is none": (lambda host: host.nodes["MOVAEncodeText"].execute(host.parts.text, None, ""), "must be text"),
    "a boundary beyond 1": (
        lambda host: host.nodes["MOVADenoise"].execute(host.parts.models["stream"], **host.clip, **SETTINGS | {"boundary": 2.0}),
        "boundary",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_nothing_stays_after_bad_input(host, recorder, name):
    run, complaint = BAD[name]
    threads = set(threading.enumerate())
    with pytest.raises(sys.modules[f"{PACK}.mova.errors"].InputError, match=complaint):
        run(host)
    assert not host.parts.placed() and set(threading.enumerate()) == threads


def test_sampling_asks_for_more_room_the_more_there_is_to_do(host, recorder):
    def asked(mode, clip=host.clip, **settings):
        host.nodes["MOVADenoise"].execute(host.parts.models[mode], **clip, **SETTINGS | settings)
        return recorder.calls.pop().need

    longer = host.clip | {"video": {"samples": torch.zeros(2, 16, 3, 6, 8)}, "audio": None}
    assert asked("stream", cfg=1.0) < asked("stream") < asked("stream", bridge_guidance=3.0)
    assert asked("auto") < asked("auto", clip=longer)
    weights = host.parts.models["auto"].parts.bytes(torch.float32)
    assert asked("auto") > weights


def test_vaes_ask_for_what_the_picture_needs(host, recorder):
    for side in (1, 2):
        host.parts.video_vae.decode(torch.zeros(1, 16, 1, 2 * side, 2))
    assert [call.need for call in recorder.calls] == [host.parts.video_vae.vae.decode_bytes(16 * side, 16) for side in (1, 2)]
