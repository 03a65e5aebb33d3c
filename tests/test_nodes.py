"""The ComfyUI nodes: what they declare (for ever), what they accept from other nodes, and that nothing stays behind. Host-free: headless's stand-ins."""

import asyncio
import importlib.util
import logging
import shutil
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import ROOT, distance

from headless.host import installed

PACK = "pack_under_test"
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))

# ---------------------------------------------------------------- the pack, loaded as ComfyUI does


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


def first_value(item):
    return item.default if item.default is not None else (item.options or [""])[0]


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


class Joint:
    """Several tensors travelling as one, as core's NestedTensor does."""

    is_nested = True

    def __init__(self, *tensors):
        self.tensors = list(tensors)

    def unbind(self):
        return self.tensors


class Cancelled(BaseException):
    """The host's interrupt, which newer hosts do not derive from Exception."""


@pytest.fixture
def cancel_after(pack, monkeypatch):
    """cancel_after(n): the n-th question whether the user cancelled is answered with the interrupt."""

    def cancel_after(count):
        asked = iter(range(count - 1))

        def check():
            if next(asked, None) is None:
                raise Cancelled

        monkeypatch.setattr(sys.modules["comfy.model_management"], "throw_exception_if_processing_interrupted", check)

    return cancel_after


# ---------------------------------------------------------------- what is declared, for ever

MODEL, DEVICE = ("model", "COMBO", "small/tiny"), ("device", "COMBO", "auto")
SOCKETS = ("MOVA_MODEL", "MOVA_TEXT_ENCODER", "CONDITIONING", "VAE", "LATENT", "IMAGE", "AUDIO")
DECLARED = {
    "MOVALoadModel": (
        "Load MOVA Model", "MOVA/loaders",
        [MODEL, ("precision", "COMBO", "as stored"), ("residency", "COMBO", "auto"), ("attention", "COMBO", "auto")],
        [("model", "MOVA_MODEL")],
    ),
    "MOVALoadTextEncoder": ("Load MOVA Text Encoder", "MOVA/loaders", [MODEL, DEVICE], [("text_encoder", "MOVA_TEXT_ENCODER")]),
    "MOVALoadVideoVAE": ("Load MOVA Video VAE", "MOVA/loaders", [MODEL], [("vae", "VAE")]),
    "MOVALoadAudioVAE": ("Load MOVA Audio VAE", "MOVA/loaders", [MODEL], [("vae", "VAE")]),
    "MOVAEncodeText": (
        "MOVA Text Encode", "MOVA/conditioning",
        [("text_encoder", "MOVA_TEXT_ENCODER"), ("prompt", "STRING", ""), ("negative_prompt", "STRING", "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指")],
        [("positive", "CONDITIONING"), ("negative", "CONDITIONING")],
    ),
    "MOVAImageToVideoAudio": (
        "MOVA Image to Video+Audio", "MOVA/conditioning",
        [
            ("positive", "CONDITIONING"), ("negative", "CONDITIONING"), ("vae", "VAE"), ("size", "COMBO", "match image 360p"), ("width", "INT", 640),
            ("height", "INT", 352), ("length", "INT", 193), ("fps", "FLOAT", 24.0), ("batch_size", "INT", 1), ("start_image", "IMAGE"), ("end_image", "IMAGE"),
        ],
        [("positive", "CONDITIONING"), ("negative", "CONDITIONING"), ("video", "LATENT"), ("audio", "LATENT"), ("fps", "FLOAT")],
    ),
    "MOVADenoise": (
        "MOVA Joint Denoiser", "MOVA/sampling",
        [
            ("model", "MOVA_MODEL"), ("positive", "CONDITIONING"), ("negative", "CONDITIONING"), ("video", "LATENT"), ("audio", "LATENT"), ("seed", "INT", 42),
            ("steps", "INT", 50), ("cfg", "FLOAT", 5.0), ("shift", "FLOAT", 0.0), ("schedule", "COMBO", "reference"), ("audio_cfg", "FLOAT", 0.0),
            ("audio_shift", "FLOAT", 0.0), ("bridge_guidance", "FLOAT", 1.0), ("boundary", "FLOAT", 0.0), ("denoise", "FLOAT", 1.0),
            ("keep_every", "INT", 0),
        ],
        [("video", "LATENT"), ("audio", "LATENT")],
    ),
    "MOVAKeepStream": (
        "MOVA Keep Picture / Sound", "MOVA/latent",
        [("samples", "LATENT"), ("keep", "FLOAT", 1.0), ("from_seconds", "FLOAT", 0.0), ("to_seconds", "FLOAT", 0.0), ("fps", "FLOAT", 24.0)],
        [("samples", "LATENT")],
    ),
    "MOVADecodeVideo": ("MOVA Video Decode", "MOVA/decode", [("samples", "LATENT"), ("vae", "VAE"), ("tiling", "COMBO", "auto")], [("images", "IMAGE")]),
    "MOVADecodeAudio": ("MOVA Audio Decode (Vocoder)", "MOVA/decode", [("samples", "LATENT"), ("vae", "VAE")], [("audio", "AUDIO")]),
    "MOVAEncodeAudio": (
        "MOVA Audio Encode", "MOVA/latent", [("audio", "AUDIO"), ("vae", "VAE"), ("length", "INT", 193), ("fps", "FLOAT", 24.0)], [("audio", "LATENT")]
    ),
    "MOVAEstimate": (
        "MOVA Estimate", "MOVA/sampling",
        [
            ("model", "MOVA_MODEL"), ("width", "INT", 640), ("height", "INT", 352), ("length", "INT", 193), ("steps", "INT", 50), ("cfg", "FLOAT", 5.0),
            ("residency", "COMBO", "auto"), ("device", "COMBO", "this machine"), ("bridge_guidance", "FLOAT", 1.0),
        ],
        [("text", "STRING"), ("vram_gb", "FLOAT"), ("ram_gb", "FLOAT"), ("minutes", "FLOAT")],
    ),
}  # fmt: skip
OPTIONAL = {
    "MOVAImageToVideoAudio": ["start_image", "end_image"],
    "MOVADenoise": ["audio", "keep_every"],
    "MOVAKeepStream": ["from_seconds", "to_seconds", "fps"],
}
ADVANCED = {
    "MOVALoadModel": ["attention"],
    "MOVADenoise": ["audio_cfg", "audio_shift", "bridge_guidance", "boundary", "denoise", "keep_every"],
    "MOVAEstimate": ["bridge_guidance"],
}


@pytest.mark.parametrize("node_id", DECLARED)
def test_ids_inputs_and_outputs_stay_as_they_are(pack, node_id):
    schema = pack.nodes[node_id].GET_SCHEMA()
    inputs = [(item.id, item.io_type, first_value(item)) if item.is_widget else (item.id, item.io_type) for item in schema.inputs]
    assert (schema.display_name, schema.category, inputs, [(item.display_name, item.io_type) for item in schema.outputs]) == DECLARED[node_id]
    assert [item.id for item in schema.inputs if item.optional] == OPTIONAL.get(node_id, [])
    assert [item.id for item in schema.inputs if item.advanced] == ADVANCED.get(node_id, [])


def test_every_node_and_input_is_explained(pack):
    for node in pack.nodes.values():
        schema = node.GET_SCHEMA()
        assert schema.description and schema.search_aliases
        assert all(item.tooltip for item in schema.inputs), schema.node_id


def test_seed_is_controlled_and_choices_are_complete(pack):
    inputs = {node_id: {item.id: item for item in node.GET_SCHEMA().inputs} for node_id, node in pack.nodes.items()}
    assert inputs["MOVADenoise"]["seed"].control_after_generate and inputs["MOVADenoise"]["seed"].max == 2**64 - 1
    assert inputs["MOVALoadModel"]["precision"].options == ["as stored", "bf16", "fp16", "fp32", "fp8"]
    assert inputs["MOVALoadModel"]["attention"].options == ["auto", "flash", "cudnn", "memory-efficient", "math"]
    assert inputs["MOVAImageToVideoAudio"]["size"].options == ["match image 360p", "match image 720p", "custom"]
    assert inputs["MOVADenoise"]["schedule"].options == ["reference", "simple"]


def test_loading_the_pack_is_light(tmp_path):
    code = f"""
import importlib.util, sys, time
from pathlib import Path
from headless.host import installed
with installed(*[Path({str(tmp_path)!r})] * 3):
    spec = importlib.util.spec_from_file_location("p", "__init__.py", submodule_search_locations=["."])
    sys.modules["p"] = module = importlib.util.module_from_spec(spec)
    start = time.process_time()
    spec.loader.exec_module(module)
    print([name for name in ("transformers", "diffusers", "torchaudio", "av", "mediapipe") if name in sys.modules], time.process_time() - start < 2)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == "[] True"


# ---------------------------------------------------------------- the whole way


def test_node_chain_equals_the_reference(golden, golden_config, run, parts):
    case, asked = golden("cfg_loop"), golden_config("cfg_loop")["run"]
    positive, negative = run("MOVAEncodeText", text_encoder=parts.text, prompt=asked["prompt"], negative_prompt=asked["negative"])
    size = dict(size="custom", width=asked["width"], height=asked["height"], length=asked["num_frames"], fps=asked["fps"])
    positive, negative, video, audio, fps = run(
        "MOVAImageToVideoAudio", positive=positive, negative=negative, vae=parts.video_vae, start_image=case["image"][None] / 255, **size
    )
    assert fps == 24.0 and video["samples"].shape == case["noise_video"].shape and audio["samples"].shape == case["noise_audio"].shape
    video, audio = run(
        "MOVADenoise", model=parts.model, positive=positive, negative=negative, video=video, audio=audio, steps=asked["steps"], seed=asked["seed"]
    )
    assert distance(video["samples"], case["denorm_latents"]) < 3e-5
    assert (audio["type"], audio["sample_rate"]) == ("audio", 1500)
    (images,) = run("MOVADecodeVideo", samples=video, vae=parts.video_vae)
    (sound,) = run("MOVADecodeAudio", samples=audio, vae=parts.audio_vae)
    assert ((images * 255).round() - case["frames"].float()).abs().max() <= 1
    assert sound["sample_rate"] == 1500 and distance(sound["waveform"], case["audio"]) < 6e-5


def test_a_picture_and_a_last_picture_change_the_clip(clip, denoise):
    picture = torch.rand(1, 30, 40, 3, generator=torch.manual_seed(0))
    plain, first, both = (denoise(clip(**given))[0]["samples"] for given in ({}, {"start_image": picture}, {"start_image": picture, "end_image": picture}))
    assert not torch.equal(plain, first) and not torch.equal(first, both)


def test_batch_of_two_is_two_clips(clip, denoise, run, parts):
    video, audio = denoise(clip(batch_size=2))
    assert video["samples"].shape[0] == audio["samples"].shape[0] == 2 and not torch.equal(*video["samples"])
    assert run("MOVADecodeVideo", samples=video, vae=parts.video_vae)[0].shape == (18, 48, 64, 3)
    assert run("MOVADecodeAudio", samples=audio, vae=parts.audio_vae)[0]["waveform"].shape[:2] == (2, 1)


def test_same_seed_same_clip(clip, denoise):
    made = clip()
    assert torch.equal(denoise(made)[0]["samples"], denoise(made)[0]["samples"])
    assert not torch.equal(denoise(made)[0]["samples"], denoise(made, seed=43)[0]["samples"])


def test_zero_means_the_checkpoints_own_value(clip, denoise):
    made = clip()
    released = denoise(made, shift=5.0, audio_shift=5.0, audio_cfg=5.0, boundary=0.9)
    assert torch.equal(denoise(made)[1]["samples"], released[1]["samples"])
    assert not torch.equal(denoise(made, boundary=0.5)[1]["samples"], released[1]["samples"])


# ---------------------------------------------------------------- LATENT


def test_sound_is_as_long_as_the_video_when_nothing_else_is_said(clip, denoise):
    made = clip()
    expected = denoise(made)[1]["samples"]
    assert torch.equal(denoise(made, audio=None)[1]["samples"], expected)
    assert torch.equal(denoise(made, audio={"samples": torch.zeros(1, 64, 7)})[1]["samples"], expected)  # core's empty audio latent


def test_joint_latents_supply_both_streams(clip, denoise, pack):
    made = clip()
    joint = {"samples": Joint(made.video["samples"], made.audio["samples"])}
    for mine, expected in zip(denoise(made, video=joint, audio=None), denoise(made), strict=True):
        assert torch.equal(mine["samples"], expected["samples"])
    with pytest.raises(pack.errors.InputError, match="disconnect one"):
        denoise(made, video=joint)


def test_joint_mask_reaches_its_stream(clip, denoise):
    made = clip()
    video, audio = denoise(made)
    masks = Joint(torch.zeros(1, 1, 3, 1, 1), torch.ones(1, 1, 1))
    again = denoise(made, seed=1, audio=None, video={"samples": Joint(video["samples"], audio["samples"]), "noise_mask": masks})
    assert torch.equal(again[0]["samples"], video["samples"]) and not torch.equal(again[1]["samples"], audio["samples"])
    assert again[1]["type"] == "audio" and "noise_mask" in again[0]


@pytest.mark.parametrize("kept", [0, 1], ids=["picture", "sound"])
def test_a_kept_stream_is_kept_bit_for_bit(clip, denoise, run, kept):
    made = clip()
    takes = list(denoise(made))
    before = takes[kept]["samples"].clone()
    takes[kept] = run("MOVAKeepStream", samples=takes[kept])[0]
    again = denoise(made, video=takes[0], audio=takes[1], seed=7)
    assert torch.equal(again[kept]["samples"], before) and torch.equal(takes[kept]["samples"], before)
    assert not torch.equal(again[1 - kept]["samples"], takes[1 - kept]["samples"])


def test_a_span_of_seconds_is_kept(clip, denoise, run):
    made = clip(length=17)  # latent frames 0 | 1-4 | 5-8 | 9-12 | 13-16
    video, audio = denoise(made)
    held = run("MOVAKeepStream", samples=video, from_seconds=5 / 24, to_seconds=9 / 24)[0]
    assert held["noise_mask"].shape == (1, 1, 5, 1, 1) and held["noise_mask"].flatten().tolist() == [1, 1, 0, 1, 1]
    more = run("MOVAKeepStream", samples=held, keep=0.25, to_seconds=0.15)[0]
    assert more["noise_mask"][0, 0, :, 0, 0].tolist() == [0.75, 0.75, 0, 1, 1]
    sound = run("MOVAKeepStream", samples=audio, from_seconds=0.5)[0]  # 50 latents a second
    assert sound["noise_mask"].flatten().tolist() == [1.0] * 25 + [0.0] * (audio["samples"].shape[2] - 25)
    again = denoise(made, video=held, audio=sound, seed=7)
    assert torch.equal(again[0]["samples"][:, :, 2], video["samples"][:, :, 2]) and not torch.equal(again[0]["samples"][:, :, 1], video["samples"][:, :, 1])
    assert torch.equal(again[1]["samples"][..., 25:], audio["samples"][..., 25:]) and not torch.equal(again[1]["samples"][..., :25], audio["samples"][..., :25])


@pytest.mark.parametrize(
    "mask", [torch.zeros(1, 1, 96, 128), torch.zeros(48, 64), torch.zeros(3, 1, 6, 8), torch.zeros(1, 1, 3, 6, 8), torch.zeros(1, 16, 5, 3, 3)]
)
def test_masks_of_any_size(clip, denoise, mask):
    made = clip()
    video, _ = denoise(made)
    assert torch.equal(denoise(made, video=video | {"noise_mask": mask}, seed=3)[0]["samples"], video["samples"])


def test_half_a_picture_is_kept(clip, denoise):
    made = clip()
    video, _ = denoise(made)
    mask = torch.ones(1, 1, 48, 64)
    mask[..., :32] = 0
    again, _ = denoise(made, video=video | {"noise_mask": mask}, seed=3)
    assert torch.equal(again["samples"][..., :4], video["samples"][..., :4]) and not torch.equal(again["samples"][..., 4:], video["samples"][..., 4:])


def test_what_is_in_the_latents_counts_only_when_it_is_kept_or_started_from(clip, denoise):
    made = clip()
    video, audio = denoise(made)
    fresh = denoise(made, seed=5)
    assert torch.equal(denoise(made, video=video, audio=audio, seed=5)[0]["samples"], fresh[0]["samples"])
    assert torch.equal(denoise(made, video=video | {"noise_mask": torch.ones(1, 1, 48, 64)}, seed=5)[0]["samples"], fresh[0]["samples"])
    near = denoise(made, video=video, audio=audio, seed=5, denoise=0.2)[0]["samples"]
    assert distance(near, video["samples"]) < distance(fresh[0]["samples"], video["samples"])


@pytest.mark.parametrize(
    "given, complaint",
    [
        ({"denoise": 0.5}, "video latents are empty, but denoise is 0.5"),
        ({"video": {"samples": torch.zeros(1, 16, 3, 6, 8), "noise_mask": torch.zeros(1, 1, 4, 4)}}, "empty, but parts of it are to be kept"),
        ({"audio": {"samples": torch.zeros(1, 16, 19), "noise_mask": torch.zeros(1, 1, 19)}}, "audio latents are empty, but parts"),
        ({"video": {"samples": torch.zeros(1, 16, 6, 8)}}, r"\[1, 16, 6, 8\]: \[B, 16, T, h, w\] is needed"),
        ({"video": {"samples": torch.zeros(1, 4, 3, 6, 8)}}, "16"),
        ({"audio": {"samples": torch.ones(3, 16, 19)}}, "3 sounds do not fit 1 videos"),
        ({"audio": {"samples": torch.ones(1, 64, 19)}}, "16"),
        ({"audio": {"samples": torch.ones(1, 16, 19), "noise_mask": torch.zeros(1, 1, 8, 8)}}, "noise mask of the audio"),
    ],
)  # fmt: skip
def test_latents_that_do_not_fit(clip, denoise, pack, given, complaint):
    with pytest.raises(pack.errors.InputError, match=complaint):
        denoise(clip(), **given)


def test_spans_that_cannot_be(run, pack):
    sound = {"samples": torch.ones(1, 16, 19)}
    with pytest.raises(pack.errors.InputError, match="MOVA Audio Encode"):
        run("MOVAKeepStream", samples=sound, from_seconds=0.1)
    with pytest.raises(pack.errors.InputError, match="span from 2.0 to 1.0 seconds is empty"):
        run("MOVAKeepStream", samples={"samples": torch.ones(1, 16, 3, 6, 8)}, from_seconds=2.0, to_seconds=1.0)
    assert (run("MOVAKeepStream", samples=sound)[0]["noise_mask"] == 0).all() and "noise_mask" not in sound


# ---------------------------------------------------------------- CONDITIONING


def changed(conditioning, **values):
    return [[context, {key: value for key, value in (keys | values).items() if value is not ...}] for context, keys in conditioning]


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda clip: {"positive": clip.positive * 2}, "positive holds 2 prompts"),
        (lambda clip: {"negative": clip.negative * 2}, "negative holds 2 prompts"),
        (lambda clip: {"positive": []}, "positive holds 0 prompts"),
        (lambda clip: {"positive": changed(clip.positive, start_percent=0.5)}, "limited to a part of the steps"),
        (lambda clip: {"negative": changed(clip.negative, end_percent=0.5)}, "limited to a part of the steps"),
        (lambda clip: {"positive": changed(clip.positive, concat_latent_image=...)}, "MOVAImageToVideoAudio"),
        (lambda clip: {"positive": changed(clip.positive, concat_mask=torch.zeros(1, 3, 3, 6, 8))}, "concat_mask is"),
        (lambda clip: {"positive": changed(clip.positive, concat_latent_image=torch.zeros(1, 16, 3, 8, 6))}, "made for latents"),
        (lambda clip: {"positive": changed(clip.positive, concat_latent_image=torch.zeros(1, 16, 4, 6, 8))}, "made for latents"),
        (lambda clip: {"positive": [[torch.zeros(1, 5, 7), clip.positive[0][1]]]}, "32"),
    ],
)  # fmt: skip
def test_conditioning_that_does_not_fit(clip, denoise, pack, change, complaint):
    made = clip()
    with pytest.raises(pack.errors.InputError, match=complaint):
        denoise(made, **change(made))


def test_core_conditioning_means_the_same(clip, pack):
    """Core writes one mask channel for the four pixel frames of a latent frame, and nothing for what is to be made."""
    made, sockets, space = clip(), pack.sockets, sys.modules[f"{PACK}.mova.latents"].LatentSpace((0.5,) * 16, (2.0,) * 16, 4)
    expected = sockets.read_condition(made.positive, made.video["samples"], space)
    assert expected.shape == (1, 20, 3, 6, 8) and (expected[:, :4, 0] == 1).all() and (expected[:, :4, 1:] == 0).all()
    one = changed(made.positive, concat_mask=made.positive[0][1]["concat_mask"][:, :1])
    short = changed(made.positive, concat_mask=torch.zeros(1, 1, 1, 3, 4))
    assert torch.equal(sockets.read_condition(one, made.video["samples"], space), expected)
    assert torch.equal(sockets.read_condition(short, made.video["samples"], space), expected)
    first = changed(made.positive, concat_latent_image=made.positive[0][1]["concat_latent_image"][:, :, :1])
    assert torch.equal(sockets.read_condition(first, made.video["samples"], space)[:, :, 0], expected[:, :, 0])


def test_frame_rate_and_long_prompts_are_mentioned(clip, denoise, caplog):
    made = clip()
    with caplog.at_level(logging.INFO, "mova"):
        plain = denoise(made, positive=changed(made.positive, frame_rate=...))
        long = [[torch.zeros(1, 600, 32), made.positive[0][1]]]
        denoise(made, positive=long)
    assert torch.equal(plain[0]["samples"], denoise(made)[0]["samples"])
    assert "24 frames per second" in caplog.text and "600 tokens" in caplog.text


@pytest.mark.parametrize("shift", ["start_percent", "end_percent"])
def test_limits_that_limit_nothing_are_fine(clip, denoise, shift):
    made = clip()
    denoise(made, positive=changed(made.positive, **{shift: float(shift == "end_percent")}))


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    "size, given, picture, expected",
    [
        ("match image 360p", (640, 352), (30, 40), (640, 352)),
        ("match image 360p", (640, 352), (40, 30), (352, 640)),
        ("match image 720p", (640, 352), (40, 30), (720, 1280)),
        ("match image 720p", (640, 352), (30, 30), (1280, 720)),
        ("match image 360p", (352, 640), None, (352, 640)),
        ("match image 360p", (640, 352), None, (640, 352)),
        ("custom", (100, 200), (30, 40), (96, 208)),
    ],
)
def test_size_presets(pack, size, given, picture, expected):
    image = None if picture is None else torch.zeros(1, *picture, 3)
    assert pack.image_to_video_audio.choose_size(size, *given, image) == expected


def test_sizes_snap_and_say_so(clip, caplog):
    with caplog.at_level(logging.INFO, "mova"):
        made = clip(width=70, height=41, length=11)
    assert made.video["samples"].shape == (1, 16, 4, 6, 8)
    assert "70x41 became 64x48" in caplog.text and "11 became 13" in caplog.text
    assert clip(fps=12.0).audio["samples"].shape[2] > clip().audio["samples"].shape[2]


# ---------------------------------------------------------------- VAE


class CoreVAE:
    """Core's Wan VAE as other nodes see it: films come back as [B, F, H, W, 3]."""

    latent_channels = 16

    def __init__(self, socket):
        self.socket, self.tiled = socket, 0

    def encode(self, pixels):
        return self.socket.encode(pixels)

    def decode(self, samples):
        return self.socket.decode(samples)

    def decode_tiled(self, samples):
        self.tiled += 1
        return self.socket.decode_tiled(samples)

    def temporal_compression_decode(self):
        return 4


def test_cores_vae_works_in_our_nodes(clip, run, parts):
    core, picture = CoreVAE(parts.video_vae), torch.rand(1, 48, 64, 3, generator=torch.manual_seed(0))
    ours, theirs = (clip(vae=vae, start_image=picture) for vae in (parts.video_vae, core))
    assert distance(theirs.positive[0][1]["concat_latent_image"], ours.positive[0][1]["concat_latent_image"]) < 1e-5
    assert torch.equal(theirs.positive[0][1]["concat_mask"], ours.positive[0][1]["concat_mask"])
    latent = {"samples": torch.randn(2, 16, 2, 6, 8, generator=torch.manual_seed(0))}
    assert torch.equal(run("MOVADecodeVideo", samples=latent, vae=core)[0], run("MOVADecodeVideo", samples=latent, vae=parts.video_vae)[0])
    run("MOVADecodeVideo", samples=latent, vae=core, tiling="on")
    assert core.tiled == 1


def test_video_vae_as_core_uses_it(parts):
    vae, latents = parts.video_vae, torch.randn(2, 16, 2, 6, 8, generator=torch.manual_seed(0))
    film = vae.decode(latents)
    assert film.shape == (2, 5, 48, 64, 3) and 0 <= film.min() and film.max() <= 1
    film.mul_(0)  # as core does
    assert vae.decode(latents).any()
    tiled = vae.decode_tiled(latents, tile_x=4, tile_y=4, overlap=1, tile_t=16, overlap_t=2)
    assert tiled.shape == film.shape
    assert vae.encode(torch.rand(7, 50, 71, 4)).shape == (1, 16, 2, 6, 8)  # cut to 5 pictures of 48x64
    assert vae.encode_tiled(torch.rand(5, 48, 64, 3), tile_x=64, tile_y=64, overlap=16).shape == (1, 16, 2, 6, 8)
    assert (vae.spacial_compression_decode(), vae.spacial_compression_encode(), vae.temporal_compression_decode(), vae.latent_channels) == (8, 8, 4, 16)
    vae.throw_exception_if_invalid()


def test_audio_vae_as_core_uses_it(parts):
    vae, latents = parts.audio_vae, torch.randn(2, 16, 5, generator=torch.manual_seed(0))
    sound = vae.decode(latents)
    assert sound.shape == (2, 150, 1) and vae.audio_sample_rate == 1500
    sound /= 2
    assert not torch.equal(vae.decode(latents), sound) and torch.equal(vae.decode_tiled(latents, tile_x=64, overlap=8), vae.decode(latents))
    assert vae.encode(torch.zeros(1, 150, 2)).shape == (1, 16, 5)
    vae.throw_exception_if_invalid()


@pytest.mark.parametrize("samples", [100, 5000])
def test_encoded_sound_is_as_long_as_the_clip(run, parts, clip, samples):
    stereo = torch.rand(1, 2, samples, generator=torch.manual_seed(0)) - 0.5
    (latent,) = run("MOVAEncodeAudio", audio={"waveform": stereo, "sample_rate": 3000}, vae=parts.audio_vae, length=9)
    assert latent["samples"].shape == clip().audio["samples"].shape
    assert (latent["type"], latent["sample_rate"], latent["downscale_ratio_temporal"]) == ("audio", 1500, 30)
    mono = {"waveform": stereo.mean(1, keepdim=True), "sample_rate": 3000}
    assert distance(run("MOVAEncodeAudio", audio=mono, vae=parts.audio_vae, length=9)[0]["samples"], latent["samples"]) < 1e-5


def test_sound_that_cannot_be_encoded(run, parts, pack):
    with pytest.raises(pack.errors.InputError, match="no sound"):
        run("MOVAEncodeAudio", audio=None, vae=parts.audio_vae)
    with pytest.raises(pack.errors.InputError, match="Load MOVA Audio VAE"):
        run("MOVAEncodeAudio", audio={"waveform": torch.zeros(1, 1, 9), "sample_rate": 9}, vae=CoreVAE(parts.video_vae))


# ---------------------------------------------------------------- model folders


def test_only_listed_folders_are_opened(pack, models, run, tmp_path):
    outside = models.parent / "outside"
    outside.mkdir()
    (outside / "model_index.json").write_text("{}")
    for name in ("../../outside", str(outside), "small", "small/tiny/video_dit", "small\\tiny", "", "."):
        complaint = pack.nodes["MOVALoadVideoVAE"].validate_inputs(model=name)
        assert "hf download OpenMOSS-Team/MOVA-360p --local-dir" in complaint and "small/tiny" in complaint
        with pytest.raises(pack.errors.InputError, match="model_index.json"):
            run("MOVALoadVideoVAE", model=name)
    assert pack.nodes["MOVALoadVideoVAE"].validate_inputs(model="small/tiny") is True
    assert pack.nodes["MOVALoadVideoVAE"].validate_inputs() is True  # the name comes over a link


@pytest.fixture
def folders(pack, monkeypatch, tmp_path):
    """An empty models/mova of its own."""
    monkeypatch.setattr(sys.modules["folder_paths"], "get_folder_paths", lambda name: [str(tmp_path / "mova")])
    return tmp_path / "mova"


def test_the_list_is_never_empty_and_walks_to_the_first_hit(pack, folders):
    schema = pack.nodes["MOVALoadModel"].GET_SCHEMA  # with no folder at all
    assert schema().inputs[0].options == ["put a MOVA folder into models/mova"]
    assert pack.nodes["MOVALoadModel"].validate_inputs(model="put a MOVA folder into models/mova").startswith("No model is chosen.")
    for place in ("b/deep", "b/deep/copy", "a", "c"):
        (folders / place).mkdir(parents=True)
    for place in ("b/deep", "b/deep/copy", "a"):
        (folders / place / "model_index.json").write_text("{}")
    assert schema().inputs[0].options == ["a", "b/deep"]
    (folders / "model_index.json").write_text("{}")
    assert schema().inputs[0].options == ["mova"]


def test_links_in_a_circle_end(pack, folders):
    folders.mkdir()
    try:
        (folders / "round").symlink_to(folders, target_is_directory=True)
    except OSError:
        pytest.skip("no symbolic links here")
    assert pack.host.walk_folders("mova", "model_index.json") == {}


# ---------------------------------------------------------------- nothing stays behind


def placed(model):
    return not model.residency.empty


@pytest.mark.parametrize("residency", ["resident", "stream"])
@pytest.mark.parametrize("asked", [1, 3, 9])
def test_cancel_takes_the_weights_off_the_device(clip, denoise, pack, cancel_after, residency, asked):
    made = clip()
    (model,) = pack.nodes["MOVALoadModel"].execute(model="small/tiny", precision="as stored", residency=residency, attention="auto").result
    cancel_after(asked)
    with pytest.raises(Cancelled):
        denoise(made, model=model)
    assert not placed(model)


def test_a_cancelled_run_that_is_kept_goes_on_where_it_stopped(clip, denoise, pack, cancel_after, monkeypatch):
    made, steps = clip(), []
    expected = denoise(made, steps=3)
    cancel_after(8)  # 4 layers and a step are asked about: in the second step
    with pytest.raises(Cancelled):
        denoise(made, steps=3, keep_every=100)
    monkeypatch.undo()
    assert len(list(pack.host.kept_runs().iterdir())) == 1
    advance = pack.host.SamplingProgress.on_step
    monkeypatch.setattr(pack.host.SamplingProgress, "on_step", lambda progress, step: (steps.append(step.index), advance(progress, step)))
    again = denoise(made, steps=3, keep_every=100)
    assert steps == [1, 2] and not list(pack.host.kept_runs().iterdir())
    assert all(torch.equal(a["samples"], b["samples"]) for a, b in zip(again, expected, strict=True))


def test_success_and_errors_take_them_off_too(clip, denoise, parts, pack):
    made = clip()
    denoise(made)
    assert not placed(parts.model)
    with pytest.raises(pack.errors.InputError):
        denoise(made, audio={"samples": torch.ones(1, 3, 19)})
    assert not placed(parts.model)


def test_room_is_made_before_and_vaes_leave_the_device(parts, pack, monkeypatch, cancel_after, run, clip, denoise):
    """Places as a GPU host would see them: each part is moved there after room was made, and back however it ends."""
    events = []
    monkeypatch.setattr(parts.text, "cache", None)  # a prompt that is known needs no room
    monkeypatch.setattr(sys.modules["comfy.model_management"], "free_memory", lambda need, device: events.append(("room", need > 0)))
    monkeypatch.setattr(sys.modules["comfy.model_management"], "vae_device", lambda: torch.device("cpu", 0))
    for socket in (parts.video_vae, parts.audio_vae):
        move = socket.vae.to
        monkeypatch.setattr(socket.vae, "to", lambda device, move=move: (events.append(("to", str(device))), move("cpu"))[1], raising=False)
    visit = [("room", True), ("to", "cpu:0"), ("to", "cpu")]
    latents = {"samples": torch.randn(1, 16, 3, 6, 8)}
    run("MOVADecodeVideo", samples=latents, vae=parts.video_vae)
    run("MOVADecodeAudio", samples={"samples": torch.randn(1, 16, 5)}, vae=parts.audio_vae)
    assert events == visit * 2
    made = clip()  # encodes the text, then the picture
    assert events == visit * 2 + [("room", True)] + visit and parts.text.model is None
    denoise(made)
    assert events[-1] == ("room", True)
    cancel_after(2)
    with pytest.raises(Cancelled):
        run("MOVADecodeVideo", samples=latents, vae=parts.video_vae)
    assert events[-3:] == visit


def test_text_encoder_is_released_when_cancelled(parts, pack, cancel_after, run):
    cancel_after(2)
    with pytest.raises(Cancelled):
        run("MOVAEncodeText", text_encoder=parts.text, prompt="A prompt that was never encoded before.")
    assert parts.text.model is None


def test_progress_counts_layers_and_the_preview_moves(clip, denoise, pack, monkeypatch):
    made, shown, bar = clip(), [], []

    class Previewer:
        def decode_latent_to_preview_image(self, preview_format, x0):
            shown.append(x0)
            return (preview_format, "picture", 512)

    preview, formats = ModuleType("latent_preview"), ModuleType("comfy.latent_formats")
    preview.get_previewer, formats.Wan21 = lambda device, latent_format: Previewer(), type("Wan21", (), {})
    monkeypatch.setitem(sys.modules, "latent_preview", preview)
    monkeypatch.setitem(sys.modules, "comfy.latent_formats", formats)
    monkeypatch.setattr(pack.host, "PREVIEW_SECONDS", 0)
    monkeypatch.setattr(
        sys.modules["comfy.utils"], "ProgressBar", lambda total: SimpleNamespace(update_absolute=lambda value, total, preview=None: bar.append((value, total)))
    )
    denoise(made, steps=3)
    assert bar == [(value, 12) for value in (1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 10, 11, 12, 12)]  # 4 layers; a picture after every step
    assert all(frame.shape == (1, 16, 1, 6, 8) for frame in shown) and len(shown) == 11
    assert not torch.equal(shown[0], shown[1]) and torch.equal(shown[0], shown[3])  # three latent frames, again and again
