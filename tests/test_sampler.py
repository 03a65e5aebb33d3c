"""The guided loop across the expert boundary against the reference (golden cfg_loop*), and what creators rely on."""

import math

import pytest
import torch
from conftest import distance

import mova
from mova import InputError, SamplingError
from mova.sampler import Guidance

VIDEO, AUDIO = 3e-5, 6e-5  # relative L2 of the last latents, MANIFEST


@pytest.fixture(scope="module")
def denoiser(tiny_mova):
    return mova.load_denoiser(tiny_mova)


@pytest.fixture
def loop(loop):
    """The reference run with its prompts padded to 512 rows, as the pipeline does."""
    padded = {key: torch.nn.functional.pad(loop[key], (0, 0, 0, 512 - loop[key].shape[1])) for key in ("context", "negative_context")}
    return loop | padded


@pytest.mark.parametrize("residency", ["resident", "stream"])
@pytest.mark.parametrize(("name", "options"), [("cfg_loop", {}), ("cfg_loop_dual", {"audio_shift": 3.0}), ("cfg_loop_nocfg", {"cfg": 1.0})])
def test_loop_matches_reference(golden, tiny_mova, loop, residency, name, options):
    case, seen = golden(name), []
    video, audio = mova.sample(mova.load_denoiser(tiny_mova, residency=residency), **loop, **options, on_step=seen.append)
    assert distance(video, case["step3.latents"]) < VIDEO and distance(audio, case["step3.audio_latents"]) < AUDIO
    assert [step.expert for step in seen] == ["high" if expert == 0 else "low" for expert in case["expert"].tolist()]
    torch.testing.assert_close(torch.tensor([step.timestep for step in seen]), case["pairs"][:, 0], rtol=0, atol=1e-4)


def test_every_pass_of_the_loop(golden, denoiser, loop):
    case = golden("cfg_loop")
    latents = {"visual": case["noise_video"], "audio": case["noise_audio"]}
    for k in range(4):
        for branch, context in (("pos", loop["context"]), ("neg", loop["negative_context"])):
            video, audio = denoiser.velocity(
                latents["visual"], latents["audio"], loop["condition"], context, case["pairs"][k, 0].item(), expert=["high", "low"][case["expert"][k]]
            )
            assert distance(video, case[f"step{k}.{branch}.visual"]) < 3e-5 and distance(audio, case[f"step{k}.{branch}.audio"]) < 3e-5
        latents = {"visual": case[f"step{k}.latents"], "audio": case[f"step{k}.audio_latents"]}


def test_loop_in_bf16(golden, tiny_mova, loop):
    case = golden("cfg_loop_bf16")
    video, audio = mova.sample(mova.load_denoiser(tiny_mova, dtype=torch.bfloat16), **loop | {"condition": case["condition"]})
    assert distance(video, case["step3.latents"]) < 4e-2 and distance(audio, case["step3.audio_latents"]) < 9e-2


def test_guidance_scales_per_stream_and_bridge(denoiser, loop):
    """One step against the formulas of spec/mova.md 4.6 and 4.7, pass by pass."""

    def velocity(context, bridge):
        return denoiser.velocity(loop["video_noise"], loop["audio_noise"], loop["condition"], context, 1000.0, a2v_scale=bridge, v2a_scale=bridge)

    full, negative, alone = velocity(loop["context"], 1.0), velocity(loop["negative_context"], 1.0), velocity(loop["negative_context"], 0.0)
    one = loop | {"steps": 1}
    for options, scales, bridge in (
        ({"cfg": 3.0, "audio_cfg": 7.0}, (3.0, 7.0), 1.0),
        ({"cfg": 5.0, "bridge_guidance": 3.5}, (5.0, 5.0), 3.5),
        ({"cfg": 1.0, "bridge_guidance": 2.0}, (1.0, 1.0), 2.0),
    ):
        video, audio = mova.sample(denoiser, **one, **options)
        for result, noise, stream, scale in ((video, loop["video_noise"], 0, scales[0]), (audio, loop["audio_noise"], 1, scales[1])):
            guided = alone[stream] + bridge * (negative[stream] - alone[stream]) + scale * (full[stream] - negative[stream])
            assert distance(result, noise - guided) < 1e-5


def test_guidance_of_one_runs_one_pass(denoiser, loop):
    passes = []
    prepare = denoiser.prepare

    class Spy(type(denoiser)):
        def prepare(self, video, audio, condition, branches, steps, fps):
            passes.append(len(branches))
            return prepare(video, audio, condition, branches, steps, fps)

    spy = object.__new__(Spy)
    spy.__dict__ = denoiser.__dict__
    without = {key: value for key, value in loop.items() if key != "negative_context"}
    mova.sample(spy, **without, cfg=1.0)
    mova.sample(spy, **loop)
    mova.sample(spy, **loop, bridge_guidance=2.0)
    assert passes == [1, 2, 3]
    with pytest.raises(InputError, match="negative_context"):
        mova.sample(denoiser, **without)


def test_kept_picture_is_exact_and_sound_is_new(denoiser, loop):
    start, audio_start = torch.randn_like(loop["video_noise"]), torch.randn_like(loop["audio_noise"])
    video, audio = mova.sample(denoiser, **loop, video_start=start, video_mask=torch.zeros(1, 1, 1, 1, 1))
    assert torch.equal(video, start) and torch.isfinite(audio).all()
    kept = torch.ones(1, 1, 19)
    kept[..., :8] = 0
    video, audio = mova.sample(denoiser, **loop, audio_start=audio_start, audio_mask=kept)
    assert torch.equal(audio[..., :8], audio_start[..., :8]) and not torch.allclose(audio[..., 8:], audio_start[..., 8:])
    free = mova.sample(denoiser, **loop)
    made = mova.sample(denoiser, **loop, video_start=start, video_mask=torch.ones(1))
    assert distance(made[0], free[0]) < 1e-5


def test_the_sound_hears_the_kept_picture(denoiser, loop):
    sounds = [mova.sample(denoiser, **loop, video_start=torch.full_like(loop["video_noise"], level), video_mask=torch.zeros(1))[1] for level in (0.0, 2.0)]
    assert distance(sounds[0], sounds[1]) > 1e-3


def test_denoise_starts_from_clean_latents(denoiser, loop):
    start = {"video_start": torch.randn_like(loop["video_noise"]), "audio_start": torch.randn_like(loop["audio_noise"])}
    near, far = (mova.sample(denoiser, **loop, **start, denoise=amount, cfg=1.0)[0] for amount in (0.02, 0.9))
    assert distance(near, start["video_start"]) < 0.5 * distance(far, start["video_start"])
    with pytest.raises(InputError, match="video_start"):
        mova.sample(denoiser, **loop, denoise=0.5)


def test_batch_equals_one_by_one(denoiser, loop):
    generator = torch.Generator().manual_seed(1)
    noise = {"video_noise": torch.randn(2, 16, 3, 6, 8, generator=generator), "audio_noise": torch.randn(2, 16, 19, generator=generator)}
    together = mova.sample(denoiser, **loop | noise)
    for b in range(2):
        alone = mova.sample(denoiser, **loop | {key: value[b : b + 1] for key, value in noise.items()})
        assert distance(together[0][b : b + 1], alone[0]) < 1e-5 and distance(together[1][b : b + 1], alone[1]) < 1e-5


def test_callbacks_see_the_predicted_clean_latents(denoiser, loop):
    seen, layers = [], []
    video, audio = mova.sample(denoiser, **loop, on_step=seen.append, on_layer=lambda done, total: layers.append((done, total)))
    assert [step.index for step in seen] == [0, 1, 2, 3] and {step.total for step in seen} == {4}
    assert layers == [(i, 4) for _ in range(4) for i in range(1, 5)]
    assert [step.sigma for step in seen] == pytest.approx([1.0, 0.9375, 0.8333333, 0.625])
    assert distance(seen[-1].video, video) < 1e-5 and distance(seen[-1].audio, audio) < 1e-5  # the last step ends at sigma 0


class Stop(BaseException):
    """As ComfyUI's interrupt: not an Exception."""


@pytest.mark.parametrize("residency", ["resident", "stream"])
def test_cancel_between_layers_leaves_a_working_model(tiny_mova, loop, residency, monkeypatch):
    monkeypatch.delattr(torch, "OutOfMemoryError", raising=False)  # PyTorch 2.4 has it as torch.cuda's only
    denoiser = mova.load_denoiser(tiny_mova, residency=residency)
    expected = mova.sample(denoiser, **loop)[0]
    calls = []

    def stop(done, total):
        calls.append(done)
        if len(calls) == 6:  # in the second step
            raise Stop

    with pytest.raises(Stop):
        mova.sample(denoiser, **loop, on_layer=stop)
    assert len(calls) == 6
    assert torch.equal(mova.sample(denoiser, **loop)[0], expected)


@pytest.mark.parametrize(("stream", "key"), [("video", "video_noise"), ("audio", "audio_noise")])
def test_nan_names_step_and_stream(denoiser, loop, stream, key):
    broken = loop[key].clone()
    broken.view(-1)[3] = math.nan
    with pytest.raises(SamplingError, match=r"step 1 of 4: the (video|audio) latents"):
        mova.sample(denoiser, **loop | {key: broken})
    with pytest.raises(SamplingError, match=f"the {stream} latents"):
        mova.sample(denoiser, **loop | {key: broken}, bridge_guidance=1.0, cfg=1.0) if stream == "video" else mova.sample(
            DeafVideo(denoiser), **loop | {key: broken}
        )


class DeafVideo:
    """The denoiser with the bridge silent, so that a broken sound does not reach the picture."""

    def __init__(self, denoiser):
        self.denoiser = denoiser

    def __getattr__(self, name):
        return getattr(self.denoiser, name)

    def prepare(self, video, audio, condition, branches, steps, fps):
        silent = [type(branch)(branch.context, 0.0, 0.0) for branch in branches]
        return self.denoiser.prepare(video, audio, condition, silent, steps, fps)


@pytest.mark.parametrize("wrong", [
    {"cfg": math.nan}, {"boundary": 1.5}, {"steps": 0}, {"schedule": "karras"}, {"shift": 0.0}, {"video_mask": torch.zeros(1)},
    {"audio_start": torch.zeros(1, 16, 18)}, {"fps": -1.0},
])  # fmt: skip
def test_bad_values_are_named(denoiser, loop, wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        mova.sample(denoiser, **loop | wrong)


@pytest.mark.parametrize("mask", [torch.zeros(1, 1, 3, 6, 9), torch.full((1,), 2.0), torch.full((1,), math.nan)])
def test_masks_that_do_not_fit(denoiser, loop, mask):
    with pytest.raises(InputError, match="video_mask"):
        mova.sample(denoiser, **loop, video_start=loop["video_noise"], video_mask=mask)


def test_noise_is_not_mutated(denoiser, loop):
    before = {key: value.clone() for key, value in loop.items() if isinstance(value, torch.Tensor)}
    mova.sample(denoiser, **loop)
    assert all(torch.equal(loop[key], value) for key, value in before.items())


def test_two_passes_reduce_to_plain_guidance():
    positive, negative, alone = (torch.full((1,), value) for value in (3.0, 1.0, 0.5))
    with_bridge = Guidance(5.0, 5.0, 1.0).combine([(positive, positive), (negative, negative), (alone, alone)])
    assert torch.equal(with_bridge[0], Guidance(5.0, 5.0, 1.0).combine([(positive, positive), (negative, negative)])[0])
