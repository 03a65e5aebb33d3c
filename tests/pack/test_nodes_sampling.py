"""From prompt and picture to a clip: what the nodes accept from other nodes, and what they make of it."""

import logging
import sys

import pytest
import torch
from conftest import distance
from node_stand_ins import PACK, Joint

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
