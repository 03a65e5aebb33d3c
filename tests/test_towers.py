"""Block, towers and bridge against the reference modules (golden video_dit_block*, *_dit_forward, bridge; spec/mova.md 3.12)."""

import json
import math

import pytest
import torch
from conftest import distance, golden_path
from safetensors.torch import load_file

from mova import CheckpointError
from mova.bridge import Bridge, BridgeConfig, Conditioner
from mova.checkpoint import open_component, read_config
from mova.layers import Block, attention, collapse_padding, rotate_pairs, shifted_norm, sinusoid
from mova.towers import AudioTower, AudioTowerConfig, Head, TowerConfig, VideoTower

BLOCK = 2e-6  # relative L2, MANIFEST


def load_tower(folder, name, **changed):
    component = open_component(folder, name)
    kind, config = (AudioTower, AudioTowerConfig) if name == "audio_dit" else (VideoTower, TowerConfig)
    tower = kind(read_config(config, component.config | changed, name))
    tower.load_state_dict(component.tensors())
    return tower.requires_grad_(False)


def complex_table(pairs):
    """The reference's [L, 1, d/2, 2] real/imaginary float64 table as ours."""
    return torch.view_as_complex(pairs).to(torch.complex64)


@pytest.fixture
def block_case(golden, tiny_mova):
    case = golden("video_dit_block")
    return case, load_tower(tiny_mova, "video_dit").blocks[1], complex_table(case["freqs"])


def test_block_matches_reference(block_case):
    case, block, rope = block_case
    text = block.cross_attn.keys(case["context"])
    for x, y, t_mod in (("x", "y", case["t_mod"].unsqueeze(1)), ("x_small", "y_small", case["t_mod"].unsqueeze(1)), ("x", "y_t_mod4", case["t_mod4"])):
        before = case[x].clone()
        assert distance(block(case[x], text, t_mod, rope), case[y]) < BLOCK
        assert torch.equal(case[x], before)


def test_parts_of_the_block(block_case):
    case, block, rope = block_case
    x, mod = case["x"], block.modulate(case["t_mod"].unsqueeze(1))
    q, (k, v) = block.queries(x, mod, rope), block.keys(x, mod, rope)
    assert distance(q, case["self_attn.q_rope"]) < BLOCK and distance(k, case["self_attn.k_rope"]) < BLOCK and distance(v, case["self_attn.v"]) < BLOCK
    attended = attention(q, k, v, block.heads)
    assert distance(attended, case["self_attn.sdpa"]) < BLOCK
    assert distance(block.self_attn.o(attended), case["self_attn"]) < BLOCK
    after = block.post(x, attended, mod)
    assert distance(block.norm3(after), case["norm3"]) < BLOCK
    crossed = block.cross_attn(block.norm3(after), block.cross_attn.keys(case["context"]))
    assert distance(crossed, case["cross_attn"]) < BLOCK
    shift, scale = case["t_mod"][:, 0:1], case["t_mod"][:, 1:2]
    assert distance(x * (1 + scale) + shift, case["modulate"]) < BLOCK
    nothing = torch.zeros(1)
    assert distance(shifted_norm(x, nothing, nothing, 1e-6), case["norm1"]) < BLOCK
    assert distance(shifted_norm(case["x_small"], nothing, nothing, 1e-6), case["small.norm1"]) < BLOCK
    assert distance(block.norm3(case["x_small"]), case["small.norm3"]) < BLOCK
    assert distance(block.self_attn.norm_q(case["x_small"]), case["small.self_norm_q"]) < BLOCK
    assert distance(block.cross_attn.norm_k(case["x_small"]), case["small.cross_norm_k"]) < BLOCK
    assert distance(rotate_pairs(x, rope, 4), case["rope_apply"]) < BLOCK


def test_small_head(golden, tiny_mova):
    case = golden("video_dit_block")
    head = load_tower(tiny_mova, "video_dit").head
    assert distance(head(case["x_small"][:1], case["t_mod"][:1, 0]), case["small.head"]) < BLOCK


def test_sinusoid(golden):
    case = golden("video_dit_block")
    torch.testing.assert_close(sinusoid(torch.tensor([1000.0, 937.5]), 48), case["sinusoidal_2"], rtol=0, atol=1e-6)
    torch.testing.assert_close(sinusoid(torch.tensor([3.25]), 48), case["sinusoidal_1"], rtol=0, atol=1e-6)


def test_block_with_image_attention(golden):
    case, plain = golden("video_dit_block_img"), golden("video_dit_block")
    block = Block(80, 176, 4, image=True)
    block.load_state_dict({key.removeprefix("w."): value for key, value in case.items() if key.startswith("w.")})
    block.requires_grad_(False)
    y = block(plain["x"][:1], block.cross_attn.keys(case["context"]), plain["t_mod"][:1].unsqueeze(1), complex_table(plain["freqs"]))
    assert distance(y, case["y"]) < BLOCK


def run_tower(tower, x, context, timestep):
    """A tower alone, as the reference's own forward: -> (output, hidden states after each block)."""
    t, t_mod = tower.time(timestep)
    tokens, bias = tower.read_prompt(context)
    video = isinstance(tower, VideoTower)
    h, grid = tower.embed(x) if video else (tower.embed(x), None)
    rope = tower.rope(grid if video else x.shape[2])
    hidden = []
    for block in tower.blocks:
        h = block(h, block.cross_attn.keys(tokens, bias), t_mod, rope)
        hidden.append(h)
    return (tower.predict(h, t, grid) if video else tower.predict(h, t)), hidden


@pytest.mark.parametrize("name", ["video_dit", "video_dit_2"])
def test_video_tower(golden, tiny_mova, name):
    case, tower = golden("video_dit_forward"), load_tower(tiny_mova, name)
    y, hidden = run_tower(tower, case["x"][:1], case["context"][:1], case[f"{name}.timestep_b1"])
    assert distance(y, case[f"{name}.y_b1"]) < BLOCK
    for i, state in enumerate(hidden):
        assert distance(state, case[f"{name}.block{i}_b1"]) < BLOCK


def test_video_tower_in_a_batch(golden, tiny_mova):
    case, tower = golden("video_dit_forward"), load_tower(tiny_mova, "video_dit")
    assert distance(run_tower(tower, case["x"], case["context"], case["timestep_same"])[0], case["y_batch_same_t"]) < BLOCK
    each_its_own = run_tower(tower, case["x"], case["context"], case["timestep_diff"])[0]
    assert distance(each_its_own, case["y_batch_diff_t.per_sample"]) < BLOCK
    assert distance(each_its_own, case["y_batch_diff_t.upstream_bug"]) > 1e-3
    assert distance(tower.embed(case["x"][:1])[0], case["patchify_b1"]) < BLOCK


def test_video_rope(golden, tiny_mova):
    case, tower = golden("video_dit_forward"), load_tower(tiny_mova, "video_dit")
    torch.testing.assert_close(tower.rope((3, 3, 4)), complex_table(case["freqs"]), rtol=0, atol=1e-7)
    table = tower.rope((32, 32, 1))
    assert table.shape == (1024, 1, 10)
    torch.testing.assert_close(table[::32, 0, :4], complex_table(case["freqs_table_f"]), rtol=0, atol=1e-7)
    torch.testing.assert_close(table[:32, 0, 4:7], complex_table(case["freqs_table_h"]), rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", ["dac", "oobleck"])
def test_audio_tower(golden, tiny_mova, kind):
    case, tower = golden("audio_dit_forward"), load_tower(tiny_mova, "audio_dit", vae_type=kind)
    prefix = "" if kind == "dac" else "oobleck."
    y, hidden = run_tower(tower, case["x"][:1], case["context"][:1], case["timestep_b1"])
    assert distance(y, case[f"{prefix}y_b1"]) < BLOCK
    torch.testing.assert_close(tower.rope(19), complex_table(case[f"{prefix}freqs"]), rtol=0, atol=1e-7)
    if kind == "dac":
        assert all(distance(state, case[f"block{i}_b1"]) < BLOCK for i, state in enumerate(hidden))
        assert distance(run_tower(tower, case["x"], case["context"], case["timestep_diff"])[0], case["y_batch_diff_t"]) < BLOCK


# -- bridge ---------------------------------------------------------------------------------------------------------


def load_bridge(pooled, strategy="full", **changed):
    stem = "weights_pooled" if pooled else "weights_plain"
    weights = load_file(golden_path(f"bridge/{stem}.safetensors"))
    config = json.loads(golden_path(f"bridge/{stem}.json").read_text())["config"] | {"interaction_strategy": strategy} | changed
    bridge = Bridge(read_config(BridgeConfig, config, "bridge"))
    bridge.load_state_dict({key: weights[key] for key in bridge.state_dict()})
    return bridge.requires_grad_(False)


def talk(bridge, i, video, audio, ropes, a2v=None, v2a=None, grid=(3, 2, 3)):
    to_video, to_audio = bridge.audio_to_video_conditioners[str(i)], bridge.video_to_audio_conditioners[str(i)]
    return to_video(video, audio, ropes, a2v), to_audio(audio, video, ropes and ropes[::-1], v2a, grid)


@pytest.mark.parametrize("strategy", ["full", "shallow_focus", "distributed", "progressive", "custom"])
@pytest.mark.parametrize("pooled", [0, 1])
def test_bridge_matches_reference(golden, strategy, pooled):
    case = golden("bridge/bridge")
    variants = {key.rsplit(".", 1)[0] for key in case if key.startswith(f"{strategy}.pool{pooled}.") and "layer" not in key}
    assert variants
    for variant in variants:
        rope, bias = (variant.split(name)[1][0] == "1" for name in (".rope", ".bias"))
        bridge = load_bridge(pooled, strategy, apply_cross_rope=rope, apply_first_frame_bias_in_rope=bias)
        ropes = bridge.rope((3, 2, 3), 19, 24.0, torch.float32)
        video, audio = case["visual"], case["audio"]
        for i in bridge.config.layers:
            video, audio = talk(bridge, i, video, audio, ropes)
            if f"{variant}.layer{i}.visual" in case:
                assert distance(video, case[f"{variant}.layer{i}.visual"]) < BLOCK
                assert distance(audio, case[f"{variant}.layer{i}.audio"]) < BLOCK
        assert distance(video, case[f"{variant}.visual"]) < BLOCK
        assert distance(audio, case[f"{variant}.audio"]) < BLOCK


def test_interaction_layers(golden_config):
    for counts, strategies in golden_config("bridge/bridge")["interaction_layers"].items():
        visual, audio = (int(number) for number in counts.split("x"))
        for strategy, layers in strategies.items():
            assert BridgeConfig(visual_layers=visual, audio_layers=audio, interaction_strategy=strategy).layers == layers


def test_aligned_positions(golden):
    case = golden("bridge/bridge")
    for key in [key for key in case if key.startswith("freqs.") and key.endswith("cos_v")]:
        fps, bias = float(key.split("fps")[1].split(".bias")[0]), key.split(".bias")[1][0] == "1"
        ropes = load_bridge(0, apply_first_frame_bias_in_rope=bias).rope((3, 2, 3), 19, fps, torch.float32)
        stem = key.removesuffix("cos_v")
        for stream, letter in ((ropes.video, "v"), (ropes.audio, "a")):
            torch.testing.assert_close(stream[0][:, 0], case[f"{stem}cos_{letter}"][0], rtol=0, atol=2e-6)
            torch.testing.assert_close(stream[1][:, 0], case[f"{stem}sin_{letter}"][0], rtol=0, atol=2e-6)


@pytest.mark.parametrize(("name", "a2v", "v2a"), [("none", None, None), ("cond0.5", 0.5, 0.5), ("a2v0.25_v2a1.5", 0.25, 1.5)])
def test_bridge_scales(golden, name, a2v, v2a):
    case, bridge = golden("bridge/bridge"), load_bridge(0)
    video, audio = talk(bridge, 1, case["visual"], case["audio"], bridge.rope((3, 2, 3), 19, 24.0, torch.float32), a2v, v2a)
    assert distance(video, case[f"scale.{name}.visual"]) < BLOCK and distance(audio, case[f"scale.{name}.audio"]) < BLOCK


def test_trained_scale(golden):
    case, plain = golden("bridge/bridge"), load_bridge(0)
    bridge = Bridge(BridgeConfig(**(vars(plain.config) | {"trainable_condition_scale": True}))).requires_grad_(False)
    bridge.load_state_dict(plain.state_dict() | {key: torch.tensor([0.7]) for key in bridge.state_dict() if key.endswith("condition_scale")})
    video, audio = talk(bridge, 1, case["visual"], case["audio"], bridge.rope((3, 2, 3), 19, 24.0, torch.float32))
    assert distance(video, case["scale.trainable0.7.visual"]) < BLOCK and distance(audio, case["scale.trainable0.7.audio"]) < BLOCK


def test_pooling_and_small_states(golden):
    case, bridge = golden("bridge/bridge"), load_bridge(1)
    conditioner: Conditioner = bridge.video_to_audio_conditioners["0"]
    pooled = conditioner.per_frame_pooling(case["visual"], (3, 2, 3))
    assert distance(pooled, case["pooled.per_frame_pooling"]) < BLOCK
    interpolated = torch.nn.functional.interpolate(pooled.transpose(1, 2), size=19, mode="linear").transpose(1, 2)
    assert distance(interpolated, case["pooled.interp"]) < BLOCK
    assert distance(conditioner.y_norm(case["small.visual"]), case["small.y_norm"]) < BLOCK
    assert distance(conditioner.inner.norm_q(case["small.audio"]), case["small.inner_norm_q"]) < BLOCK
    assert distance(conditioner.per_frame_pooling.layernorm(case["small.visual"]), case["small.pool_layernorm"]) < BLOCK
    video, audio = talk(bridge, 0, case["small.visual"], case["small.audio"], bridge.rope((3, 2, 3), 19, 24.0, torch.float32))
    assert distance(video, case["small.out_visual"]) < BLOCK and distance(audio, case["small.out_audio"]) < BLOCK


# -- the released sizes ---------------------------------------------------------------------------------------------


def test_released_keys_and_parameters():
    with torch.device("meta"):
        parts = {
            "video": (VideoTower(TowerConfig()), 1095, 14_288_901_184),
            "audio": (AudioTower(AudioTowerConfig()), 825, 1_419_193_472),
            "bridge": (Bridge(BridgeConfig()), 720, 2_659_737_600),
        }
    for module, tensors, parameters in parts.values():
        state = module.state_dict()
        assert (len(state), sum(tensor.numel() for tensor in state.values())) == (tensors, parameters)
    video, audio, bridge = (part[0].state_dict() for part in parts.values())
    assert video["patch_embedding.weight"].shape == (5120, 36, 1, 2, 2) and video["head.modulation"].shape == (1, 2, 5120)
    assert video["time_projection.1.weight"].shape == (30720, 5120) and video["blocks.39.ffn.0.weight"].shape == (13824, 5120)
    assert audio["patch_embedding.weight"].shape == (1536, 128, 1) and audio["blocks.29.cross_attn.norm_k.weight"].shape == (1536,)
    assert bridge["audio_to_video_conditioners.29.inner.k.weight"].shape == (5120, 1536) and bridge["video_to_audio_conditioners.0.y_norm.bias"].shape == (
        5120,
    )


def fill(module, ones=("norm_q.weight", "norm_k.weight", "norm3.weight", "y_norm.weight")):
    """The deterministic weights of spec/mova.md 3.12."""
    state = module.state_dict()
    for j, key in enumerate(sorted(state)):
        wave = 0.05 * torch.sin(0.37 * torch.arange(state[key].numel(), dtype=torch.float64) + 0.11 * j) + key.endswith(ones)
        state[key].copy_(wave.float().view(state[key].shape))
    return module.requires_grad_(False)


def waves(shape, frequency):
    return torch.cos(frequency * torch.arange(math.prod(shape), dtype=torch.float64)).float().view(shape)


def assert_row(tensor, total, mean, first, atol=2e-6):
    assert float(tensor.double().sum()) == pytest.approx(total, abs=3e-5)
    assert float(tensor.abs().double().mean()) == pytest.approx(mean, abs=1e-7)
    torch.testing.assert_close(tensor.flatten()[: len(first)], torch.tensor(first), rtol=0, atol=atol)


@torch.no_grad()
def test_deterministic_heads_times_and_conditioner():
    small = dict(text_dim=20, freq_dim=16)
    assert_row(fill(Head(48, 64, 1e-6))(waves((1, 6, 48), 0.03), waves((1, 48), 0.07)), 2.132570, 0.29469086, [0.578873, 0.146714, -0.426076, -0.509503])
    assert_row(fill(Head(24, 8, 1e-6))(waves((1, 5, 24), 0.03), waves((1, 24), 0.07)), 2.915635, 0.31796028, [0.209745, -0.214742, 0.222209, -0.044809])
    t, t_mod = fill(VideoTower(TowerConfig(dim=48, ffn_dim=64, num_heads=2, num_layers=3, **small))).time(torch.tensor([873.5]))
    assert_row(t, -0.104218, 0.04713994, [-0.079823, -0.100927, -0.054682, 0.003790])
    assert_row(t_mod, 0.013176, 0.03522282, [-0.008606, -0.026838, -0.061282, -0.076673])
    bridge = fill(Bridge(BridgeConfig(visual_layers=3, audio_layers=2, visual_hidden_dim=48, audio_hidden_dim=24, head_dim=24)))
    ropes = bridge.rope((3, 2, 3), 13, 24.0, torch.float32)
    x, y, conditioner = waves((1, 18, 48), 0.03), waves((1, 13, 24), 0.05), bridge.audio_to_video_conditioners["0"]
    assert_row(conditioner(x, y, ropes) - x, 2.030084, 0.04672102, [0.080421, 0.045989, -0.003845, -0.006143])
    assert_row(conditioner(x, y, None) - x, 2.042423, 0.04673651, [0.081700, 0.047840, -0.003410, -0.007592])
    torch.testing.assert_close(ropes.video[0][6, 0, :4], torch.tensor([-0.461204, -0.747572, -0.222683, 0.672412]), rtol=0, atol=2e-6)
    torch.testing.assert_close(ropes.video[1][12, 0, :4], torch.tensor([-0.818447, 0.993046, -0.434183, 0.995408]), rtol=0, atol=2e-6)
    torch.testing.assert_close(ropes.audio[0][5, 0, :4], torch.tensor([0.283662, -0.681637, 0.473781, 0.877583]), rtol=0, atol=2e-6)


def test_padding_as_two_keys_is_the_same_attention():
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(2, 7, 20, generator=generator)
    context = torch.cat((real, torch.zeros(2, 505, 20)), dim=1)
    context[1, 5:] = 0  # the second prompt is shorter
    collapsed, bias = collapse_padding(context)
    assert collapsed.shape == (2, 9, 20) and bias is not None
    for dtype in (torch.float32, torch.bfloat16):
        collapsed, bias = collapse_padding(context.to(dtype))
        weights = bias.float().exp().flatten()
        assert torch.equal(weights[:7], torch.ones(7)) and float(weights[7:].sum()) == pytest.approx(505, rel=3e-4)
    q = torch.randn(2, 11, 20, generator=generator)
    collapsed, bias = collapse_padding(context)
    assert distance(attention(q, collapsed, collapsed, 2, bias), attention(q, context, context, 2)) < 1e-6
    assert collapse_padding(real)[1] is None


@pytest.mark.parametrize("wrong", [{"dim": 0}, {"num_heads": 7}, {"has_ref_conv": True}, {"seperated_timestep": True}])
def test_configs_of_other_models_are_refused(wrong):
    with pytest.raises(CheckpointError):
        TowerConfig(**wrong)
    with pytest.raises(CheckpointError, match="interaction_strategy"):
        BridgeConfig(interaction_strategy="everywhere")
