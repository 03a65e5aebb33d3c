"""The plain baseline is worth measuring against only if it is right: it must equal the reference wherever the reference is recorded."""

import json

import pytest
import torch
from conftest import distance

from bench import mid_model, plain, step

CLOSE = 2e-6  # float32, one forward
BF16_STEP = 1.5e-2  # a bfloat16 forward on kernels that round in another order; on the CPU that recorded them it is 0
BF16_PART = 2e-3  # one block or bridge layer from recorded states: compiled instead of eager rounding would be above
CASES = [(expert, number) for expert in ("video_dit", "video_dit_2") for number in range(3)]


@pytest.fixture(scope="module")
def baseline(tiny_mova):
    return plain.load_plain(tiny_mova)


@pytest.fixture(scope="module")
def baseline_bf16(tiny_mova):
    return plain.load_plain(tiny_mova).bfloat16()


def recorded_parts(model, expert):
    """Golden name -> the module whose output it is."""
    tower = getattr(model, expert)
    parts = {"visual_context": tower.text_embedding, "audio_context": model.audio_dit.text_embedding}
    parts |= {f"visual_block{i}": block for i, block in enumerate(tower.blocks)}
    return parts | {f"audio_block{i}": block for i, block in enumerate(model.audio_dit.blocks)}


def predict(model, inputs, expert, times, **options):
    """(video, audio, what the recorded parts gave) for inputs of single_step.safetensors; an audio time of None is the video's."""
    seen, parts = {}, recorded_parts(model, expert)
    hooks = [part.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out})) for name, part in parts.items()]
    both = torch.tensor([times[0], times[0] if times[1] is None else times[1]])[:, None]
    try:
        return *model(inputs["visual_latents"], inputs["audio_latents"], inputs["context"], both, expert, **options), seen
    finally:
        for hook in hooks:
            hook.remove()


def worst_distance(case, prefix, video, audio, seen):
    """The largest distance to the golden tensors under `prefix`; at least both predictions must be among them."""
    found = {"visual": video, "audio": audio} | {f"hid.{name}": value for name, value in seen.items()}
    compared = {name: distance(value, case[f"{prefix}.{name}"]) for name, value in found.items() if f"{prefix}.{name}" in case}
    assert {"visual", "audio"} <= compared.keys()
    return max(compared.values())


@pytest.mark.parametrize(("expert", "number"), CASES)
def test_forward_matches_reference(baseline, golden, golden_config, expert, number):
    case, times = golden("single_step"), golden_config("single_step")["cases"][number]
    assert worst_distance(case, f"{expert}.case{number}", *predict(baseline, case, expert, times)) < CLOSE


@pytest.mark.parametrize(("expert", "number"), CASES)
def test_bfloat16_forward_matches_reference(baseline_bf16, golden, golden_config, expert, number):
    case, times = golden("single_step_bf16"), golden_config("single_step_bf16")["cases"][number]
    assert worst_distance(case, f"{expert}.case{number}", *predict(baseline_bf16, golden("single_step"), expert, times)) < BF16_STEP


@pytest.mark.parametrize("name", ["single_step", "single_step_bf16"])
def test_each_part_matches_reference_from_recorded_states(baseline, baseline_bf16, golden, name):
    model, limit = (baseline, CLOSE) if name == "single_step" else (baseline_bf16, BF16_PART)
    hidden = {key.removeprefix("video_dit.case1.hid."): value for key, value in golden(name).items() if key.startswith("video_dit.case1.hid.")}
    bridge, dtype = model.dual_tower_bridge, hidden["visual_context"].dtype
    turn, audio_turn, *bridge_turns = model.rotations((3, 3, 4), 19, 24.0, dtype)
    for stream, tower, turn_own, time in (("visual", model.video_dit, turn, 937.5), ("audio", model.audio_dit, audio_turn, 880.25)):
        t_mod = tower.embed_time(torch.tensor([time]))[1]
        assert distance(t_mod.flatten(1), hidden[f"{stream}_t_mod_flat"]) < CLOSE
        for i in range(3):
            out = tower.blocks[i](hidden[f"bridge{i}_{stream}"], hidden[f"{stream}_context"], t_mod.to(dtype), turn_own)
            assert distance(out, hidden[f"{stream}_block{i}"]) < limit, (stream, i)
    for i in (1, 2):
        video, audio = hidden[f"visual_block{i - 1}"], hidden[f"audio_block{i - 1}"]
        to_video = bridge.audio_to_video_conditioners[i](video, audio, *bridge_turns)
        to_audio = bridge.video_to_audio_conditioners[i](audio, video, *reversed(bridge_turns))
        assert distance(video + to_video, hidden[f"bridge{i}_visual"]) < limit
        assert distance(audio + to_audio, hidden[f"bridge{i}_audio"]) < limit


@pytest.mark.parametrize(
    ("name", "change", "fps"),
    [("no_cross_rope", {"apply_cross_rope": False}, 24.0), ("bias_flip", {"apply_first_frame_bias_in_rope": True}, 24.0), ("fps30", {}, 30.0)],
)
def test_bridge_positions_match_reference(baseline, golden, monkeypatch, name, change, fps):
    for key, value in change.items():
        monkeypatch.setitem(baseline.dual_tower_bridge.config, key, value)
    case = golden("single_step")
    assert worst_distance(case, name, *predict(baseline, case, "video_dit", (937.5, 880.25), fps=fps)) < CLOSE


def test_batch_matches_reference(baseline, golden):
    case = golden("single_step")
    inputs = {key.removeprefix("b2."): value for key, value in case.items() if key.startswith("b2.")}
    assert worst_distance(case, "b2", *predict(baseline, inputs, "video_dit", (750.0, 500.0))) < CLOSE


def test_guided_loop_matches_reference(baseline, golden, golden_config, tiny_mova):
    case, cfg = golden("cfg_loop"), golden_config("cfg_loop")["cfg_scale"]
    schedule = json.loads((tiny_mova / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    train, times = plain.sigma_table(1000, schedule), 1000 * plain.sigma_table(4, schedule)
    assert torch.equal(times, case["pairs"][:, 0])
    contexts = [torch.nn.functional.pad(case[name], (0, 0, 0, 512 - case[name].shape[1])) for name in ("prompt_embeds", "negative_embeds")]
    video, audio = case["noise_video"], case["noise_audio"]
    passes = []
    hook = baseline.register_forward_hook(lambda _, __, out: passes.append(out))
    for i, timestep in enumerate(times):
        expert = ("video_dit", "video_dit_2")[case["expert"][i]]
        video_velocity, audio_velocity = plain.guided_velocity(baseline, video, audio, case["condition"], contexts, timestep, cfg, expert)
        step = (plain.nearest_sigma(times[i + 1], train) if i + 1 < len(times) else 0.0) - plain.nearest_sigma(timestep, train)
        video, audio = video + video_velocity * step, audio + audio_velocity * step
        for branch in ("neg", "pos"):
            assert worst_distance(case, f"step{i}.{branch}", *passes.pop(), {}) < 3e-5
        assert distance(video, case[f"step{i}.latents"]) < 3e-5
        assert distance(audio, case[f"step{i}.audio_latents"]) < 6e-5
    hook.remove()


# spec/mova.md 3.12: weights and inputs by formula, results as printed there (sum, mean abs, first values)
TOWER = {"ffn_dim": 64, "text_dim": 20, "freq_dim": 16, "eps": 1e-6}
FORMULA_CONFIGS = {
    "video_dit": TOWER | {"dim": 48, "in_dim": 36, "out_dim": 16, "num_heads": 2, "num_layers": 3, "patch_size": [1, 2, 2]},
    "audio_dit": TOWER | {"dim": 24, "in_dim": 8, "out_dim": 8, "num_heads": 1, "num_layers": 2, "patch_size": [1], "ffn_dim": 40},
    "dual_tower_bridge": {
        "visual_layers": 3, "audio_layers": 2, "visual_hidden_dim": 48, "audio_hidden_dim": 24, "head_dim": 24, "audio_fps": 50.0,
        "apply_cross_rope": True, "apply_first_frame_bias_in_rope": False,
    },
}  # fmt: skip
FORMULA_CONFIGS["video_dit_2"] = FORMULA_CONFIGS["video_dit"]
FORMULA_RESULTS = {
    1.0: ((-2.174255, 0.29618344, (0.226865, -0.326370, 0.226987, -0.327632)), (2.571702, 0.04009107, (-0.057339, -0.057469, -0.057467, -0.057387))),
    0.0: ((-0.579092, 0.18110453, (0.288165, 0.036503, 0.288853, 0.035563)), (4.268886, 0.15050187, (0.166703, 0.168151, 0.169600, 0.171047))),
}


def wave(shape, frequency):
    return torch.cos(frequency * torch.arange(torch.Size(shape).numel(), dtype=torch.float64)).float().view(shape)


def fill_by_formula(module):
    for j, (name, value) in enumerate(sorted(module.state_dict().items())):
        centre = 1.0 if name.endswith(("norm_q.weight", "norm_k.weight", "norm3.weight", "y_norm.weight")) else 0.0
        value.copy_((0.05 * torch.sin(0.37 * torch.arange(value.numel(), dtype=torch.float64) + 0.11 * j)).view(value.shape) + centre)


@pytest.mark.parametrize("bridge_scale", FORMULA_RESULTS)
def test_formula_model_gives_the_printed_numbers(bridge_scale):
    model = plain.PlainMova(FORMULA_CONFIGS).requires_grad_(False)
    for part in (model.video_dit, model.audio_dit, model.dual_tower_bridge):
        fill_by_formula(part)
    model.dual_tower_bridge.scale = bridge_scale
    outputs = model(wave((1, 36, 3, 4, 6), 0.013), wave((1, 8, 13), 0.021), wave((1, 5, 20), 0.017), torch.full((2, 1), 873.5), "video_dit")
    for out, (total, mean, first) in zip(outputs, FORMULA_RESULTS[bridge_scale], strict=True):
        assert out.sum().item() == pytest.approx(total, abs=2e-5)
        assert out.abs().mean().item() == pytest.approx(mean, abs=2e-7)
        assert out.flatten()[:4].tolist() == pytest.approx(first, abs=2e-6)


# The random model of the benchmarks
@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    return mid_model.write_mid_model(tmp_path_factory.mktemp("small"), torch.float32, seed=3, size=mid_model.SIZES["small"])


def test_random_model_is_random_everywhere_and_repeats(small_model, tmp_path):
    again = plain.load_plain(mid_model.write_mid_model(tmp_path, torch.bfloat16, seed=3, size=mid_model.SIZES["small"])).state_dict()
    for name, value in plain.load_plain(small_model).state_dict().items():
        assert value.std() > 0.01 and torch.equal(value.bfloat16(), again[name]), name


def test_random_model_tells_prompts_experts_and_streams_apart(small_model):
    model, inputs = plain.load_plain(small_model), mid_model.mid_inputs(size=mid_model.SIZES["small"])
    latents, times = torch.cat([inputs.video, inputs.condition], dim=1), torch.full((2, 1), inputs.timestep)

    def run(context=inputs.positive, audio=inputs.audio, expert="video_dit"):
        return model(latents, audio, context, times, expert)[0]

    for changed in (run(context=inputs.negative), run(audio=-inputs.audio), run(expert="video_dit_2")):
        assert changed.isfinite().all()
        assert distance(changed, run()) > 5e-2


def test_random_inputs_end_in_exact_padding():
    inputs = mid_model.mid_inputs(size=mid_model.SIZES["small"])
    for context, rows in zip((inputs.positive, inputs.negative), mid_model.REAL_ROWS, strict=True):
        assert context[:, :rows].any(dim=-1).all() and not context[:, rows:].any()


def test_measured_step_compares_the_same_model(small_model):
    result = json.loads(json.dumps(step.measure(small_model, mid_model.mid_inputs(size=mid_model.SIZES["small"]), repeats=2)))
    assert result["ratio"] > 0
    for what, limit in (("first_velocity", 3e-5), ("last_latents", 6e-5)):  # guidance and steps widen what one forward may differ by
        assert all(result["difference"][what][stream]["rel_l2"] < limit for stream in ("video", "audio")), result["difference"]
