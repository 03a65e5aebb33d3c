"""The prediction: the published table, the published timings, sums of memory, and what any clip must obey."""

import asyncio
import dataclasses
import importlib.util
import math
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

import mova
from headless.host import installed
from mova import InputError
from mova.bridge import Bridge, BridgeConfig
from mova.cards import GPUS, find_device
from mova.denoiser import BLOCK_PEAK, SMALL_TENSORS, Denoiser
from mova.estimate import estimate
from mova.parts import Parts
from mova.residency import Residency
from mova.sampler import Guidance
from mova.schedule import ScheduleConfig
from mova.towers import AudioTower, AudioTowerConfig, TowerConfig, VideoTower
from mova.work import add, forward_work

SIZES = {"360p": (352, 640), "720p": (720, 1280)}
TOKENS = {"360p": 43120, "720p": 176400}
AUDIO_TOKENS = 403
H100 = dataclasses.replace(GPUS["H100"], attention={"auto": 648e12})  # with FlashAttention 3, as published
H200 = dataclasses.replace(GPUS["H200"], attention={"auto": GPUS["H200"].attention["flash"]})  # without it, as published
CPU = find_device("cpu", None)


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A denoiser of the released size without weights."""
    folder = tmp_path_factory.mktemp("release")
    (folder / "model_index.json").write_text("{}")
    for part in ("video_vae", "audio_vae"):
        (folder / part).mkdir()
        (folder / part / "config.json").write_text("{}")  # what is not there has the released value
    save_file({"weight": torch.zeros(1, dtype=torch.bfloat16)}, folder / "video_vae" / "model.safetensors")
    with torch.device("meta"):
        video, audio, bridge = VideoTower(TowerConfig()), AudioTower(AudioTowerConfig()), Bridge(BridgeConfig())
    modules = {"high": video, "audio": audio, "bridge": bridge}
    tensors = {name: module.bfloat16().state_dict() for name, module in modules.items()}
    tensors["low"] = tensors["high"]
    entries = {name: {key: SimpleNamespace(shape=tuple(tensor.shape)) for key, tensor in stored.items()} for name, stored in tensors.items()}
    parts = Parts({"high": video, "low": video}, audio, bridge, tensors, entries)
    return Denoiser(parts, Residency(parts, torch.device("cpu"), torch.bfloat16), ScheduleConfig(), 0.9, folder)


@pytest.fixture
def predict(release):
    def predict(device=H100, size="360p", frames=193, **given):
        height, width = SIZES[size] if isinstance(size, str) else size
        return estimate(release, device, **{"height": height, "width": width, "num_frames": frames} | given)

    return predict


# ---------------------------------------------------------------- published numbers

TABLE = {  # TFLOP of one forward (spec/performance.md 1.2)
    "self-attention": (1523.2, 25491.0),
    "self-attention projections": (361.7, 1479.8),
    "cross-attention": (201.1, 816.0),
    "feed-forward": (488.3, 1997.7),
    "bridge audio to video": (146.7, 599.0),
    "bridge video to audio": (44.0, 179.7),
    "audio tower": (1.2, 1.2),
    "patch, head, text": (0.1, 0.4),
}


@pytest.mark.parametrize("column, size", list(enumerate(SIZES)))
def test_work_is_the_published_table(release, predict, column, size):
    rows = forward_work(release.parts, TOKENS[size], AUDIO_TOKENS)
    assert {name: round(work.total / 1e12, 1) for name, work in rows.items()} == {name: row[column] for name, row in TABLE.items()}
    assert add(rows.values()).total == pytest.approx((2766e12, 30565e12)[column], rel=1e-3)
    assert add(rows.values()).attention == pytest.approx((3.110e15, 51.24e15)[column] / 2, rel=1e-3)
    assert predict(size=size).flops_per_step == pytest.approx((5.533e15, 61.13e15)[column], rel=1e-3)


@pytest.mark.parametrize("frames, petaflop", [(97, 2.06), (49, 0.87), (17, 0.29)])
def test_work_of_shorter_clips(predict, frames, petaflop):
    assert predict(frames=frames).flops_per_step / 1e15 == pytest.approx(petaflop, rel=0.02)


def test_weights_are_the_published_bytes(release, predict):
    assert release.parts.bytes(torch.bfloat16) == 36_735_664_512  # 28.578 + 2.838 + 5.319 GB
    assert predict(residency="resident").weights_bytes == pytest.approx(36.22e9, rel=1e-3)  # without what lies outside the layers
    assert predict(GPUS["RTX 4090"], residency="stream").weights_bytes == pytest.approx(2 * 0.973e9, rel=1e-3)
    assert predict(H100, residency="stream").weights_bytes == pytest.approx(3 * 0.973e9, rel=1e-3)  # it computes nearly as fast as layers arrive
    assert predict(H100, size="720p", residency="stream").weights_bytes == pytest.approx(2 * 0.973e9, rel=1e-3)


@pytest.mark.parametrize(
    "device, size, seconds",
    [(H100, "360p", 8.93), (GPUS["RTX 4090"], "360p", 37.1), (H200, "720p", 155), (GPUS["RTX 4060"], "360p", 210), (GPUS["RTX 3090"], "360p", 90),
     (GPUS["RTX 5090"], "360p", 30), (GPUS["A100"], "360p", 27), (GPUS["RTX 4060"], "720p", 2200)],
    ids=lambda value: getattr(value, "name", None),
)  # fmt: skip
def test_published_times(predict, device, size, seconds):
    tolerance = 0.03 if "calibrated" in device.source else 0.06
    assert predict(device, size, residency="resident").seconds_per_step == pytest.approx(seconds, rel=tolerance)


def test_cudnn_on_hopper(release, predict, monkeypatch):
    assert predict(GPUS["H200"]).seconds_per_step == pytest.approx(9.2, rel=0.05) and "is faster" not in str(predict(GPUS["H200"]))
    monkeypatch.setattr(release, "attention", "flash")
    assert predict(GPUS["H200"]).seconds_per_step == pytest.approx(12.3, rel=0.05)
    assert "Attention 'auto' in Load MOVA Model is faster" in str(predict(GPUS["H200"]))
    monkeypatch.setattr(release, "attention", "math")
    assert math.isnan(predict(GPUS["H200"]).minutes) and "attention 'math'" in str(predict(GPUS["H200"]))


# ---------------------------------------------------------------- memory


def test_memory_adds_up(predict):
    unit, prompts = TOKENS["360p"] * 5120 * 2, 2 * 2 * 512 * 5120 * 40 * 2
    streamed, resident = predict(residency="stream"), predict(residency="resident")
    assert streamed.activation_bytes == resident.activation_bytes == int((2 + BLOCK_PEAK) * unit + prompts) + SMALL_TENSORS
    assert resident.vram_bytes == resident.weights_bytes + resident.activation_bytes
    assert streamed.decoding_bytes == pytest.approx(2.55e9, rel=0.01) and predict(size="720p").decoding_bytes == pytest.approx(10.4e9, rel=0.01)
    assert predict(size="720p", frames=1, residency="stream").vram_bytes == pytest.approx(10.4e9, rel=0.01)  # the decoder, not the sampler
    assert streamed.ram_bytes == pytest.approx(2e9 + 1.07e9 + 0.52e9, rel=0.01)


def test_what_fits_is_resident(predict):
    assert [predict(GPUS[name]).mode for name in ("RTX 4090", "A100")] == ["stream", "resident"]
    assert predict(CPU).mode == "resident" and predict(CPU).vram_bytes == 0  # views of the mapped files


def test_on_the_cpu_everything_is_in_ram(release, predict, monkeypatch):
    views = predict(CPU)
    assert views.ram_bytes < predict(CPU, residency="stream").ram_bytes < views.ram_bytes + 3e9
    monkeypatch.setattr(release, "residency", Residency(release.parts, torch.device("cpu"), torch.float32))
    assert predict(CPU).mode == "stream"  # converted layer by layer


def test_weights_that_come_too_late_set_the_time(predict):
    assert predict(residency="stream").seconds_per_step == predict(residency="resident").seconds_per_step
    assert predict(frames=5, residency="stream").seconds_per_step > 10 * predict(frames=5, residency="resident").seconds_per_step


# ---------------------------------------------------------------- any clip


def test_more_costs_more(predict):
    small = predict(size=(64, 64), frames=17, steps=4, residency="resident")
    for more in ({"size": (64, 80)}, {"frames": 21}, {"steps": 5}, {"passes": 3}):
        found = predict(**{"size": (64, 64), "frames": 17, "steps": 4, "residency": "resident"} | more)
        assert found.minutes > small.minutes
        assert found.activation_bytes > small.activation_bytes or "steps" in more
    assert predict(passes=1).minutes == pytest.approx(predict().minutes / 2)


def test_report(predict):
    text = str(predict(GPUS["RTX 4060"], "720p"))
    assert text.startswith("30.4 hours, 12 GB VRAM, 5.21 GB RAM\nPredicted, not measured, for 1280x720, 193 frames, 50 steps of 2 passes, stream, on RTX 4060.")
    assert "Sampling: 30.4 hours" in text and "does not fit in 8 GB: choose a smaller or shorter clip" in text
    assert "choose residency auto or stream" in str(predict(GPUS["RTX 4090"], residency="resident"))
    unknown = predict(CPU)
    assert math.isnan(unknown.minutes) and "Time: unknown." in str(unknown) and "GPU memory" not in str(unknown)


@pytest.mark.parametrize(
    "name, known",
    [("NVIDIA GeForce RTX 4090", True), ("NVIDIA H100 80GB HBM3", True), ("NVIDIA H200", True), ("NVIDIA A100-SXM4-80GB", True), ("RTX 3060", True),
     ("NVIDIA GeForce RTX 4090 D", False), ("NVIDIA GeForce RTX 4060 Ti", False), ("NVIDIA GeForce RTX 4090 Laptop GPU", False),
     ("NVIDIA H100 PCIe", False), ("NVIDIA RTX A1000", False), ("cpu", False), ("AMD Radeon RX 7900 XTX", False)],
)  # fmt: skip
def test_cards_are_known_by_name(predict, name, known):
    device = find_device(name, 24e9)
    assert bool(device.attention) == known and device.name == name
    assert math.isnan(predict(device).minutes) != known


@pytest.mark.parametrize(
    "given, complaint",
    [({"size": (350, 640)}, "height is 350"), ({"frames": 10}, "4n"), ({"steps": 0}, "steps is 0"), ({"passes": 4}, "passes is 4"), ({"passes": 0}, "passes is 0"),
     ({"residency": "disk"}, "residency is 'disk'"), ({"fps": 0.0}, "positive frame rate")],
)  # fmt: skip
def test_values_that_cannot_be(predict, given, complaint):
    with pytest.raises(InputError, match=complaint):
        predict(**given)


def test_passes_are_counted_as_they_are_made():
    context = torch.zeros(1, 1, 1)
    for values in ((1, 1, 1), (5, 5, 1), (1, 5, 1), (5, 5, 3.5), (1, 1, 3.5)):
        assert Guidance(*values).passes == len(Guidance(*values).branches(context, context))


def test_tiny_model(tiny_mova):
    found = estimate(mova.load_denoiser(tiny_mova), GPUS["RTX 4060"], height=48, width=64, num_frames=9, steps=4)
    assert found.mode == "resident" and 0 < found.minutes < 0.01 and found.weights_bytes < 5e6


# ---------------------------------------------------------------- the node


def test_the_node_tells_it_on_the_page(tmp_path, tiny_mova, monkeypatch):
    shutil.copytree(tiny_mova, tmp_path / "mova" / "tiny")
    shown, server = [], SimpleNamespace(send_progress_text=lambda text, node_id: shown.append((node_id, text)))
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=server)))
    with installed(tmp_path, tmp_path, tmp_path):
        spec = importlib.util.spec_from_file_location("estimating_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
        sys.modules["estimating_pack"] = root = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(root)
        nodes = {node.GET_SCHEMA().node_id: node for node in asyncio.run(asyncio.run(root.comfy_entrypoint()).get_node_list())}
        node = type("Queued", (nodes["MOVAEstimate"],), {"hidden": SimpleNamespace(unique_id="7")})
        assert node.SCHEMA.is_output_node
        (model,) = nodes["MOVALoadModel"].execute(model="tiny", precision="as stored", residency="auto", attention="auto").result
        values = dict(model=model, width=70, height=48, length=9, steps=4, cfg=1.0, residency="auto", bridge_guidance=1.0)
        output = node.execute(**values, device="RTX 4090")
        here = node.execute(**values, device="this machine")
        for name in [name for name in sys.modules if name.partition(".")[0] == "estimating_pack"]:
            del sys.modules[name]
    text, vram, ram, minutes = output.result
    assert "for 64x48, 9 frames, 4 steps of 1 passes" in text and output.ui.as_dict() == {"text": (text,)}
    assert shown[0] == ("7", text) and 1 < vram < 1.2 and 2 < ram < 2.1 and minutes < 0.01
    assert len(here.result) == 4 and " on " in here.result[0]
