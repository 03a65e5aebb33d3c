"""Core's nodes and ours in one prompt on a real ComfyUI, in both directions, and what does not fit: a sentence on the node."""

import pytest
from host.client import queue
from host.prompts import denoise, film, node, start
from host.running import NO_HOST, checkout, server  # noqa: F401  (fixtures)
from host.server import CHECKOUTS

if not CHECKOUTS:
    pytest.skip(NO_HOST, allow_module_level=True)

CLOSE = 1e-5  # relative; both sides compute in float32 with kernels of their own
CORE_VAE = {"core vae": node("VAELoader", vae_name="wan_2.1_vae.safetensors")}


@pytest.fixture
def run(server):  # noqa: F811
    """Queues a prompt that must succeed."""

    def run(prompt):
        done = queue(server.url, prompt)
        assert (done.end, done.node_errors) == ("execution_success", {}), f"{done.failed}: {done.error}"
        return done

    return run


@pytest.fixture
def fail(server):  # noqa: F811
    """Queues a prompt that must stop at one of our nodes with a sentence: (node id, sentence)."""

    def fail(prompt):
        done = queue(server.url, prompt)
        assert (done.end, done.node_errors) == ("execution_error", {}), done
        return done.failed, done.error

    return fail


def describe(value):
    return node("HostTestDescribe", value=value)


def distance(value, expected):
    return node("HostTestDistance", value=value, expected=expected)


# ---------------------------------------------------------------- core -> ours


def test_core_text_encoder_gives_our_embeddings(run):
    text = "A cat sings (loudly)."  # core takes brackets for weights
    prompt = {
        **start(prompt="A cat sings."),
        "clip model": node("HostTestCLIP"),
        "core prompt": node("CLIPTextEncode", clip=["clip model", 0], text="A cat sings."),
        "weighted": node("CLIPTextEncode", clip=["clip model", 0], text=text),
        "far": distance(["core prompt", 0], ["prompt", 0]),
        "shape": describe(["weighted", 0]),
    }
    done = run(prompt)
    assert done.text("far") < CLOSE and done.text("shape")[0][0] == [1, 512, 32]


def test_core_text_encoder_drives_the_denoiser(run):
    core = {
        "clip model": node("HostTestCLIP"),
        "core prompt": node("CLIPTextEncode", clip=["clip model", 0], text="A cat sings."),
        "core negative": node("CLIPTextEncode", clip=["clip model", 0], text="noise"),
    }
    both = {"positive": ["core prompt", 0], "negative": ["core negative", 0]}
    prompt = {**film(**both), **core, "our clip": start()["clip"], "far": None}
    links = {name: ["our clip", place] for place, name in enumerate(("positive", "negative", "video", "audio"))}
    prompt |= {"ours": denoise(**links), "far": distance(["denoise", 0], ["ours", 0])}
    assert run(prompt).text("far") < CLOSE


@pytest.mark.parametrize("kind", ["WanImageToVideo", "WanFirstLastFrameToVideo"])
def test_core_conditioning_drives_the_denoiser(run, kind):
    """Core's node with core's VAE gives the same clip as ours with ours, of a picture that has the clip's size."""
    size = {"width": 64, "height": 48, "length": 9, "batch_size": 1, "positive": ["prompt", 0], "negative": ["prompt", 1]}
    core = node(kind, **size, vae=["core vae", 0], start_image=["scaled", 0])
    given = {"start_image": ["scaled", 0]}
    if kind == "WanFirstLastFrameToVideo":
        core["inputs"]["end_image"] = given["end_image"] = ["scaled", 0]
    prompt = {
        **start(**given),
        **CORE_VAE,
        "scaled": node("ImageScale", image=["picture", 0], upscale_method="lanczos", width=64, height=48, crop="center"),
        "core clip": core,
        "ours": denoise(),
        "core": denoise(**{name: ["core clip", place] for place, name in enumerate(("positive", "negative", "video"))}, audio=["clip", 3]),
        "alone": denoise(**{name: ["core clip", place] for place, name in enumerate(("positive", "negative", "video"))}),
        "far": distance(["core", 0], ["ours", 0]),
        "sound": distance(["core", 1], ["ours", 1]),
        "shape": describe(["alone", 1]),
        "expected": describe(["ours", 1]),
    }
    del prompt["alone"]["inputs"]["audio"]
    done = run(prompt)
    assert done.text("far") < CLOSE and done.text("sound") < CLOSE
    assert done.text("shape") == done.text("expected")  # without audio: as long as the video


def test_core_vae_in_our_nodes(run):
    prompt = {
        **film(vae=["core vae", 0]),
        **CORE_VAE,
        "core images": node("MOVADecodeVideo", samples=["denoise", 0], vae=["core vae", 0], tiling="auto"),
        "core tiles": node("MOVADecodeVideo", samples=["denoise", 0], vae=["core vae", 0], tiling="on"),
        "far": distance(["core images", 0], ["images", 0]),
        "tiles": distance(["core tiles", 0], ["images", 0]),
        "our clip": start()["clip"],
        "condition": distance(["clip", 0], ["our clip", 0]),
    }
    done = run(prompt)
    assert done.text("far") < CLOSE and done.text("tiles") < 0.2 and done.text("condition") == 0


# ---------------------------------------------------------------- ours -> core


def test_our_latents_and_vaes_in_core_nodes(run):
    tiles = {"tile_size": 64, "overlap": 16, "temporal_size": 64, "temporal_overlap": 8}
    prompt = {
        **film(),
        **CORE_VAE,
        "core decode": node("VAEDecode", samples=["denoise", 0], vae=["core vae", 0]),
        "our decode": node("VAEDecode", samples=["denoise", 0], vae=["video vae", 0]),
        "our tiles": node("VAEDecodeTiled", samples=["denoise", 0], vae=["video vae", 0], **tiles),
        "core sound": node("VAEDecodeAudio", samples=["denoise", 1], vae=["audio vae", 0]),
        "core encode": node("VAEEncode", pixels=["images", 0], vae=["core vae", 0]),
        "our encode": node("VAEEncode", pixels=["images", 0], vae=["video vae", 0]),
        "our audio encode": node("VAEEncodeAudio", audio=["sound", 0], vae=["audio vae", 0]),
        "far": distance(["core decode", 0], ["images", 0]),
        "same": distance(["our decode", 0], ["images", 0]),
        "tiles": distance(["our tiles", 0], ["images", 0]),
        "latents": distance(["our encode", 0], ["core encode", 0]),
        "heard": describe(["core sound", 0]),
        "expected": describe(["sound", 0]),
        "audio latents": describe(["our audio encode", 0]),
        "made": describe(["denoise", 1]),
        "preview": node("PreviewAudio", audio=["sound", 0]),
        "pictures": node("PreviewImage", images=["images", 0]),
    }
    done = run(prompt)
    assert done.text("far") < CLOSE and done.text("same") == 0 and done.text("tiles") < 0.2 and done.text("latents") < CLOSE
    assert done.text("heard") == done.text("expected")
    assert done.text("audio latents")["samples"] == done.text("made")["samples"]
    assert {item["filename"].rpartition(".")[2] for item in done.files()} >= {"mp4", "flac", "png"}


def test_joint_latents_of_core_both_ways(run):
    """LTXVConcatAVLatent in front gives the same as two links; LTXVSeparateAVLatent takes what ours put together."""
    joined = denoise(video=["joint", 0])
    del joined["inputs"]["audio"]
    prompt = {
        **film(),
        "joint": node("LTXVConcatAVLatent", video_latent=["clip", 2], audio_latent=["clip", 3]),
        "from joint": joined,
        "made": node("LTXVConcatAVLatent", video_latent=["denoise", 0], audio_latent=["denoise", 1]),
        "parts": node("LTXVSeparateAVLatent", av_latent=["made", 0]),
        "video": distance(["from joint", 0], ["denoise", 0]),
        "audio": distance(["from joint", 1], ["denoise", 1]),
        "video part": distance(["parts", 0], ["denoise", 0]),
        "audio part": distance(["parts", 1], ["denoise", 1]),
        "joint pictures": node("MOVADecodeVideo", samples=["made", 0], vae=["video vae", 0], tiling="auto"),
        "joint sound": node("MOVADecodeAudio", samples=["made", 0], vae=["audio vae", 0]),
        "core pictures": node("VAEDecode", samples=["made", 0], vae=["video vae", 0]),
        "pictures": distance(["joint pictures", 0], ["images", 0]),
        "core": distance(["core pictures", 0], ["images", 0]),
        "sounds": distance(["joint sound", 0], ["sound", 0]),
    }
    done = run(prompt)
    compared = ("video", "audio", "video part", "audio part", "pictures", "core", "sounds")
    assert {name: done.text(name) for name in compared} == dict.fromkeys(compared, 0)


def test_a_kept_sound_and_core_set_latent_noise_mask(run):
    """Audio driven: the sound is kept, the picture made to it; core's mask node marks what our denoiser makes anew."""
    prompt = {
        **film(),
        "voice": node("MOVAEncodeAudio", audio=["sound", 0], vae=["audio vae", 0], length=9, fps=24),
        "kept": node("MOVAKeepStream", samples=["voice", 0], keep=1.0),
        "again": denoise(audio=["kept", 0], seed=2),
        "far": distance(["again", 1], ["voice", 0]),
        "mask": node("SolidMask", value=0.0, width=64, height=48),
        "masked": node("SetLatentNoiseMask", samples=["denoise", 0], mask=["mask", 0]),
        "third": denoise(video=["masked", 0], audio=["denoise", 1], seed=3),
        "picture far": distance(["third", 0], ["denoise", 0]),
    }
    done = run(prompt)
    assert done.text("far") == 0 and done.text("picture far") == 0


# ---------------------------------------------------------------- what does not fit


def stopped(**changed):
    """A prompt whose denoiser gets other links, and the nodes they come from."""
    extra = changed.pop("nodes", {})
    return {**film(), **extra, "denoise": denoise(**changed)}


def test_latents_of_another_family(fail):
    four = {"other": node("EmptyLatentImage", width=64, height=48, batch_size=1)}
    assert_sentence(fail(stopped(video=["other", 0], nodes=four)), "denoise", "[B, 16, T, h, w] is needed")
    ltx = {"other": node("EmptyLTXVLatentVideo", width=64, height=64, length=9, batch_size=1)}
    assert_sentence(fail(stopped(video=["other", 0], nodes=ltx)), "denoise", "video latents")
    longer = {"other": start(length=17)["clip"]}
    assert_sentence(fail(stopped(positive=["other", 0], nodes=longer)), "denoise", "use the same width, height and length")
    prompt = {**film(), **four}
    prompt["images"]["inputs"]["samples"] = ["other", 0]
    assert_sentence(fail(prompt), "images", "16")
    prompt = {**film(), **four}
    prompt["sound"]["inputs"]["samples"] = ["other", 0]
    assert_sentence(fail(prompt), "sound", "audio")


def test_conditioning_that_does_not_fit(fail):
    other = {"other": node("HostTestConditioning", tokens=77, width=768), "other clip": start(positive=["other", 0])["clip"]}
    assert_sentence(fail(stopped(positive=["other clip", 0], nodes=other)), "denoise", "768")
    several = {"both": node("ConditioningCombine", conditioning_1=["clip", 0], conditioning_2=["clip", 0])}
    assert_sentence(fail(stopped(positive=["both", 0], nodes=several)), "denoise", "follows exactly one")
    part = {"part": node("ConditioningSetTimestepRange", conditioning=["clip", 0], start=0.5, end=1.0)}
    assert_sentence(fail(stopped(positive=["part", 0], nodes=part)), "denoise", "part of the steps")
    assert_sentence(fail(stopped(positive=["prompt", 0])), "denoise", "MOVAImageToVideoAudio")


def test_a_vae_of_the_wrong_kind(fail):
    prompt = film()
    prompt["images"]["inputs"]["vae"] = ["audio vae", 0]
    assert_sentence(fail(prompt), "images", "Load MOVA Video VAE")
    prompt = film()
    prompt["sound"]["inputs"]["vae"] = ["video vae", 0]
    assert_sentence(fail(prompt), "sound", "Load MOVA Audio VAE")
    assert_sentence(fail(film(vae=["audio vae", 0])), "clip", "Load MOVA Video VAE")
    taesd = {"pixels": node("VAELoader", vae_name="pixel_space")}  # core's VAE class without compression
    assert_sentence(fail({**film(vae=["pixels", 0]), **taesd}), "clip", "Load MOVA Video VAE")


@pytest.mark.parametrize("length", [5, 33])
@pytest.mark.parametrize("kept", [False, True])
def test_sound_shorter_or_longer_than_the_picture(fail, length, kept):
    voice = {"voice": node("MOVAEncodeAudio", audio=["earlier", 0], vae=["audio vae", 0], length=length, fps=24)}
    voice |= {"kept": node("MOVAKeepStream", samples=["voice", 0], keep=1.0), "earlier": node("LoadAudio", audio="voice.wav")}
    assert_sentence(fail(stopped(audio=["kept" if kept else "voice", 0], nodes=voice)), "denoise", "9 pictures at 24 per second")


def test_empty_sound_of_another_length_is_fitted(run):
    other = {"other": start(length=33)["clip"], "far": distance(["denoise", 1], ["plain", 1]), "plain": denoise()}
    assert run(stopped(audio=["other", 3], nodes=other)).text("far") == 0


def assert_sentence(found, failed, words):
    """The node, and a sentence of ours: no name of an exception, no tensor arithmetic."""
    assert found[0] == failed, found
    assert words in found[1] and found[1].rstrip().endswith((".", ")")) and "size of tensor" not in found[1], found[1]
