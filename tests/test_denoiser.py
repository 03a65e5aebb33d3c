"""The joint forward against the reference (golden single_step*; spec/mova.md 3.12), and what must hold for any input."""

import math

import pytest
import torch
from conftest import distance
from test_towers import fill, waves

import mova
from mova import InputError
from mova.bridge import Bridge, BridgeConfig
from mova.denoiser import Denoiser
from mova.parts import Parts
from mova.residency import Residency
from mova.schedule import ScheduleConfig
from mova.towers import AudioTower, AudioTowerConfig, TowerConfig, VideoTower

STEP = 2e-6
CASES = [(1000.0, None), (937.5, 880.25), (312.5, 625.0)]
EXPERTS = {"video_dit": "high", "video_dit_2": "low"}


@pytest.fixture(scope="module")
def denoiser(tiny_mova):
    return mova.load_denoiser(tiny_mova)


def predict(denoiser, case, timestep, audio_timestep=None, prefix="", **options):
    latents = case[f"{prefix}visual_latents"]
    return denoiser.velocity(
        latents[:, :16], case[f"{prefix}audio_latents"], latents[:, 16:], case[f"{prefix}context"], timestep, audio_timestep=audio_timestep, **options
    )


def assert_pair(pair, case, name, tolerance=STEP):
    assert pair[0].dtype == pair[1].dtype == torch.float32
    assert distance(pair[0], case[f"{name}.visual"]) < tolerance
    assert distance(pair[1], case[f"{name}.audio"]) < tolerance


@pytest.mark.parametrize("residency", ["resident", "stream"])
@pytest.mark.parametrize("folder", EXPERTS)
@pytest.mark.parametrize("number", range(3))
def test_single_step(golden, tiny_mova, residency, folder, number):
    denoiser = mova.load_denoiser(tiny_mova, residency=residency)
    case = golden("single_step")
    assert_pair(predict(denoiser, case, *CASES[number], expert=EXPERTS[folder]), case, f"{folder}.case{number}")


@pytest.mark.parametrize("folder", EXPERTS)
@pytest.mark.parametrize("number", range(3))
def test_single_step_bf16(golden, tiny_mova, folder, number):
    denoiser = mova.load_denoiser(tiny_mova, dtype=torch.bfloat16)
    pair = predict(denoiser, golden("single_step"), *CASES[number], expert=EXPERTS[folder])
    assert_pair(pair, golden("single_step_bf16"), f"{folder}.case{number}", tolerance=1.5e-2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, STEP), (torch.bfloat16, 4e-3)])
def test_layer_by_layer(golden, tiny_mova, dtype, tolerance):
    """The sharp test: each layer fed with the reference's own states."""
    denoiser = mova.load_denoiser(tiny_mova, dtype=dtype)
    case, inputs = golden("single_step" if dtype == torch.float32 else "single_step_bf16"), golden("single_step")
    hidden = {key.removeprefix("video_dit.case1.hid."): value for key, value in case.items() if ".hid." in key}
    denoiser.residency.settle(0)
    denoiser.residency.begin([("high", True)])
    tower, audio = denoiser.residency.enter("high"), denoiser.parts.audio
    (_, mod_v), (_, mod_a) = tower.time(torch.tensor([937.5])), audio.time(torch.tensor([880.25]))
    assert distance(mod_v.flatten(1), hidden["visual_t_mod_flat"]) < STEP and distance(mod_a.flatten(1), hidden["audio_t_mod_flat"]) < STEP
    context = inputs["context"].to(dtype)
    assert distance(tower.text_embedding(context), hidden["visual_context"]) < tolerance
    bridge_ropes = denoiser.parts.bridge.rope((3, 3, 4), 19, 24.0, dtype)
    for i, layer in enumerate(denoiser.residency.walk("high")):
        if i > 0 and layer.to_video:
            x, y = hidden[f"visual_block{i - 1}"], hidden[f"audio_block{i - 1}"]
            assert distance(layer.to_video(x, y, bridge_ropes, 1.0), hidden[f"bridge{i}_visual"]) < tolerance
            assert distance(layer.to_audio(y, x, bridge_ropes[::-1], 1.0), hidden[f"bridge{i}_audio"]) < tolerance
        x = hidden[f"bridge{i}_visual"] if layer.to_video else hidden[f"visual_block{i - 1}"]
        text = layer.video.cross_attn.keys(hidden["visual_context"])
        assert distance(layer.video(x, text, mod_v.to(dtype), tower.rope((3, 3, 4))), hidden[f"visual_block{i}"]) < tolerance
        if layer.audio and f"audio_block{i}" in hidden:
            text = layer.audio.cross_attn.keys(hidden["audio_context"])
            assert distance(layer.audio(hidden[f"bridge{i}_audio"], text, mod_a.to(dtype), audio.rope(19)), hidden[f"audio_block{i}"]) < tolerance


def test_batch_frame_rate_and_bridge_switches(golden, tiny_mova, denoiser):
    case = golden("single_step")
    assert_pair(predict(denoiser, case, 750.0, 500.0, prefix="b2.", expert="high"), case, "b2")
    assert_pair(predict(denoiser, case, *CASES[1], expert="high", fps=30.0), case, "fps30")
    for name, changed in (("no_cross_rope", {"apply_cross_rope": False}), ("bias_flip", {"apply_first_frame_bias_in_rope": True})):
        other = mova.load_denoiser(tiny_mova)
        other.parts.bridge.config = BridgeConfig(**(vars(other.parts.bridge.config) | changed))
        assert_pair(predict(other, case, *CASES[1], expert="high"), case, name)


def test_each_sample_of_a_batch_has_its_own_time(golden, denoiser):
    case = golden("single_step")
    times, audio_times = torch.tensor([950.0, 990.0]), torch.tensor([700.0, 20.0])
    together = predict(denoiser, case, times, audio_times, prefix="b2.")
    for b in range(2):
        alone = {key: value[b : b + 1] for key, value in case.items() if key.startswith("b2.")}
        video, audio = predict(denoiser, alone, times[b].item(), audio_times[b].item(), prefix="b2.")
        assert distance(together[0][b : b + 1], video) < STEP and distance(together[1][b : b + 1], audio) < STEP


def test_expert_is_chosen_by_the_video_timestep(golden, denoiser):
    case = golden("single_step")
    for timestep, expert in ((900.0, "high"), (899.9, "low")):
        assert torch.equal(predict(denoiser, case, timestep)[0], predict(denoiser, case, timestep, expert=expert)[0])
    with pytest.raises(InputError, match="both sides"):
        predict(denoiser, case, torch.tensor([950.0, 100.0]), prefix="b2.")


def test_bridge_off_is_two_separate_towers(golden, denoiser):
    case = golden("single_step")
    other_sound = case | {"audio_latents": case["audio_latents"] * 0.5}
    off = dict(a2v_scale=0.0, v2a_scale=0.0)
    assert torch.equal(predict(denoiser, case, 950.0, **off)[0], predict(denoiser, other_sound, 950.0, **off)[0])
    deaf = dict(a2v_scale=0.0, v2a_scale=1.0)
    assert torch.equal(predict(denoiser, case, 950.0, **deaf)[0], predict(denoiser, other_sound, 950.0, **deaf)[0])
    assert not torch.equal(predict(denoiser, case, 950.0)[0], predict(denoiser, other_sound, 950.0)[0])


def test_padding_to_any_length_is_the_same(golden, denoiser):
    """The reference reads 512 rows, zeros behind the text; collapsing them must not change what is predicted."""
    case = golden("single_step")
    padded = torch.nn.functional.pad(case["context"][:, :9], (0, 0, 0, 503))
    uneven = padded.clone()
    uneven[:, -1] = 1e-30  # the last row differs: nothing is collapsed
    a, b = (predict(denoiser, case | {"context": context}, 950.0) for context in (padded, uneven))
    assert distance(a[0], b[0]) < STEP and distance(a[1], b[1]) < STEP


def test_inputs_are_not_mutated(golden, denoiser):
    case = golden("single_step")
    before = {key: value.clone() for key, value in case.items()}
    predict(denoiser, case, 950.0)
    assert all(torch.equal(before[key], case[key]) for key in ("visual_latents", "audio_latents", "context"))


BAD = {
    "video": {"visual_latents": torch.zeros(1, 36, 3, 5, 8)},
    "audio": {"audio_latents": torch.zeros(1, 15, 19)},
    "context": {"context": torch.zeros(1, 40, 33)},
    "condition": {"visual_latents": torch.zeros(1, 35, 3, 6, 8)},
}


@pytest.mark.parametrize("name", BAD)
def test_shapes_that_do_not_fit_are_named(golden, denoiser, name):
    with pytest.raises(InputError, match=name):
        predict(denoiser, golden("single_step") | BAD[name], 950.0)


@pytest.mark.parametrize("options", [{"fps": 0.0}, {"fps": math.nan}, {"expert": "middle"}])
def test_values_out_of_range(golden, denoiser, options):
    with pytest.raises(InputError, match=next(iter(options))):
        predict(denoiser, golden("single_step"), 950.0, **options)


def test_attention_kernels_agree(golden, tiny_mova):
    case, results = golden("single_step"), {}
    for kernel in ("auto", "math", "flash"):
        denoiser = mova.load_denoiser(tiny_mova)
        denoiser.attention = kernel
        results[kernel] = predict(denoiser, case, *CASES[1], expert="high")
    assert all(distance(pair[0], results["auto"][0]) < STEP for pair in results.values())
    denoiser.attention = "telepathy"
    with pytest.raises(InputError, match="telepathy"):
        predict(denoiser, case, 950.0)


def test_a_kernel_that_the_device_lacks_is_named(golden, tiny_mova):
    denoiser = mova.load_denoiser(tiny_mova)
    denoiser.attention = "cudnn"
    with pytest.raises(InputError, match="'cudnn' of PyTorch .* cannot compute this on cpu"):
        predict(denoiser, golden("single_step"), 950.0)
    denoiser.attention = "math"

    def fail(done, total):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"), denoiser.attention_backend():
        fail(1, 1)


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_deterministic_model(tmp_path, scale):
    """spec/mova.md 3.12: head_dim 24 splits 8/8/8, two audio layers under three of the video."""
    small = dict(text_dim=20, freq_dim=16)
    video = fill(VideoTower(TowerConfig(dim=48, ffn_dim=64, num_heads=2, num_layers=3, **small)))
    audio = fill(AudioTower(AudioTowerConfig(dim=24, in_dim=8, out_dim=8, ffn_dim=40, num_heads=1, num_layers=2, **small)))
    bridge = fill(Bridge(BridgeConfig(visual_layers=3, audio_layers=2, visual_hidden_dim=48, audio_hidden_dim=24, head_dim=24)))
    state = {"high": video.state_dict(), "low": video.state_dict(), "audio": audio.state_dict(), "bridge": bridge.state_dict()}
    parts = Parts({"high": video, "low": video}, audio, bridge, {name: dict(tensors) for name, tensors in state.items()}, dict.fromkeys(state, {}))
    denoiser = Denoiser(parts, Residency(parts, torch.device("cpu"), torch.float32, "resident"), ScheduleConfig(), 0.9, tmp_path)
    latents = waves((1, 36, 3, 4, 6), 0.013)
    v, a = denoiser.velocity(
        latents[:, :16], waves((1, 8, 13), 0.021), latents[:, 16:], waves((1, 5, 20), 0.017), 873.5, expert="high", a2v_scale=scale, v2a_scale=scale
    )
    if scale:
        rows = ((v, -2.174255, 0.29618344, [0.226865, -0.326370, 0.226987, -0.327632]), (a, 2.571702, 0.04009107, [-0.057339, -0.057469, -0.057467, -0.057387]))
    else:
        rows = ((v, -0.579092, 0.18110453, [0.288165, 0.036503, 0.288853, 0.035563]), (a, 4.268886, 0.15050187, [0.166703, 0.168151, 0.169600, 0.171047]))
    for tensor, total, mean, first in rows:
        assert float(tensor.double().sum()) == pytest.approx(total, abs=2e-3)
        assert float(tensor.abs().double().mean()) == pytest.approx(mean, abs=1e-6)
        torch.testing.assert_close(tensor.flatten()[:4], torch.tensor(first), rtol=0, atol=5e-6)
