"""Every style of LoRA key finds its layer; files of other models are named."""

import loras
import pytest
import torch
from safetensors.torch import save_file

import mova
from mova import LoraError
from mova.lora import load_lora
from mova.lora.keys import in_diffusers

PEFT = ("lora_A.weight", "lora_B.weight")
KOHYA = ("lora_down.weight", "lora_up.weight")


@pytest.fixture(scope="module")
def shapes(tiny_mova):
    return mova.load_denoiser(tiny_mova).parts.shapes()


@pytest.fixture(scope="module")
def factors(tiny_mova):
    return loras.random_factors(loras.linears_of(tiny_mova, "video_dit"))


def load(file, shapes, **given):
    return load_lora(mova.Lora(file, **given), shapes)


def underscored(name):
    return lambda path: name.format(path.replace(".", "_"))


STYLES = {  # how a path is written, and the endings
    "original": ("{}".format, PEFT),
    "diffsynth": ("{}".format, ("lora_A.default.weight", "lora_B.default.weight")),
    "low-resource": ("{}".format, ("lora_A", "lora_B")),
    "comfy": ("diffusion_model.{}".format, PEFT),
    "lightx2v": ("diffusion_model.{}".format, KOHYA),
    "kohya": (underscored("lora_unet_{}"), KOHYA),
    "lycoris": (underscored("lycoris_{}"), KOHYA),
    "peft": ("base_model.model.{}".format, PEFT),
    "peft, named": ("base_model.model.{}".format, ("lora_A.robot.weight", "lora_B.robot.weight")),
    "fsdp": ("_fsdp_wrapped_module.{}".format, PEFT),
    "diffusers": (lambda path: f"transformer.{in_diffusers(path)}", PEFT),
    "diffusers, old": (lambda path: f"transformer.{in_diffusers(path)}", ("lora.down.weight", "lora.up.weight")),
    "kohya over diffusers": (lambda path: underscored("lora_unet_{}")(in_diffusers(path)), KOHYA),
}


@pytest.mark.parametrize("style", STYLES)
def test_styles(tmp_path, shapes, factors, style):
    name, endings = STYLES[style]
    file = loras.write_lora(tmp_path / "style.safetensors", {name(path): pair for path, pair in factors.items()}, name="{}", endings=endings, alpha=2)
    found = load(file, shapes)
    assert found.report.matched == len(factors) == 40 and not found.report.unmatched
    assert found.changes["high"].keys() == found.changes["low"].keys() == {f"{path}.weight" for path in factors}
    for path, (down, up) in factors.items():
        (change,) = found.changes["high"][f"{path}.weight"]
        assert torch.equal(change.delta.tensors["up"], up) and torch.equal(change.delta.tensors["down"], down) and change.delta.scale == 0.5


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "module.", "pipeline.", "video_dit._fsdp_wrapped_module."])
def test_components(tmp_path, shapes, tiny_mova, prefix):
    name = "audio_dit" if not prefix.startswith("video") else ""
    part = "audio" if name else "high"
    factors = loras.random_factors(loras.linears_of(tiny_mova, name or "video_dit"))
    file = loras.write_lora(tmp_path / "part.safetensors", factors, name=f"{prefix}{name}{'.' if name else ''}{{}}")
    assert load(file, shapes).report.towers == {part: len(factors)}


@pytest.mark.parametrize("component", loras.COMPONENTS)
def test_kohya_names_components_too(tmp_path, shapes, tiny_mova, component):
    factors = {path.replace(".", "_"): pair for path, pair in loras.random_factors(loras.linears_of(tiny_mova, component)).items()}
    file = loras.write_lora(tmp_path / "part.safetensors", factors, name=f"lora_unet_{component}_{{}}", endings=KOHYA)
    assert list(load(file, shapes).report.towers) == [
        {"video_dit": "high", "video_dit_2": "low", "audio_dit": "audio", "dual_tower_bridge": "bridge"}[component]
    ]


def test_a_bridge_needs_no_component(tmp_path, shapes, tiny_mova):
    file = loras.write_lora(tmp_path / "bridge.safetensors", loras.random_factors(loras.linears_of(tiny_mova, "dual_tower_bridge")))
    assert load(file, shapes).report.towers == {"bridge": 24}


def test_diffusers_file_of_both_experts(tmp_path, shapes, factors):
    paths = {f"{name}.{in_diffusers(path)}": pair for name in ("transformer", "transformer_2") for path, pair in factors.items()}
    found = load(loras.write_lora(tmp_path / "low_noise_only_by_name.safetensors", paths, name="{}"), shapes)
    assert found.report.towers == {"high": 40, "low": 40} and "name both experts" in str(found.report)


# ---------------------------------------------------------------- which expert


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("wan2.2_i2v_high_noise_robot", ["high"]),
        ("Wan22-HighNoise-robot", ["high"]),
        ("robot_low_noise", ["low"]),
        ("WAN2.2-LowNoise_robot", ["low"]),
        ("robot_HIGH", ["high"]),
        ("robot-low-r64", ["low"]),
        ("robot_H", ["high"]),
        ("wan22_L_robot", ["low"]),
        ("robot-HN", ["high"]),
        ("robot_LN_v2", ["low"]),
        ("robot", ["high", "low"]),
        ("high_quality_robot", ["high", "low"]),
        ("slow_motion_highlights", ["high", "low"]),
        ("low_light", ["high", "low"]),
        ("robot_high_and_low", ["high", "low"]),
    ],
)
def test_the_name_tells_the_expert(tmp_path, shapes, factors, name, parts):
    file = loras.write_lora(tmp_path / f"{name}.safetensors", factors)
    assert list(load(file, shapes).report.towers) == parts
    for asked, expected in (("high", ["high"]), ("low", ["low"]), ("both", ["high", "low"])):
        assert list(load(file, shapes, expert=asked).report.towers) == expected


def test_folder_and_metadata_tell_the_expert(tmp_path, shapes, factors):
    (tmp_path / "high_noise").mkdir()
    assert list(load(loras.write_lora(tmp_path / "high_noise" / "robot.safetensors", factors), shapes).report.towers) == ["high"]
    file = loras.write_lora(tmp_path / "renamed.safetensors", factors, metadata={"ss_output_name": "robot-low_noise"})
    assert list(load(file, shapes).report.towers) == ["low"]


def test_an_audio_lora_without_component(tmp_path, shapes, tiny_mova):
    factors = loras.random_factors(loras.linears_of(tiny_mova, "audio_dit"))
    assert load(loras.write_lora(tmp_path / "my_audio.safetensors", factors), shapes).report.towers == {"audio": 30}
    file = loras.write_lora(tmp_path / "voice.safetensors", factors)
    assert load(file, shapes, expert="audio").report.towers == {"audio": 30}
    with pytest.raises(LoraError, match=r"blocks\.0\.\w+\.\w changes a tensor of 40 x 40.*is 80 x 80.*choose expert 'audio'"):
        load(file, shapes)


def test_a_video_lora_that_speaks_of_audio(tmp_path, shapes, factors):
    assert list(load(loras.write_lora(tmp_path / "audio_reactive.safetensors", factors), shapes).report.towers) == ["high", "low"]


# ---------------------------------------------------------------- other models

OTHERS = {
    "Flux": ["transformer.single_transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.0.attn.to_q"],
    "HunyuanVideo": ["lora_unet_double_blocks_0_img_mlp_fc1", "lora_unet_single_blocks_0_linear1"],
    "Flux or HunyuanVideo": ["lora_unet_double_blocks_0_img_attn_qkv"],
    "Qwen-Image": ["transformer.transformer_blocks.0.attn.add_q_proj", "transformer.transformer_blocks.0.img_mlp.net.0.proj"],
    "LTX-Video": ["transformer.transformer_blocks.0.attn1.to_q", "transformer.transformer_blocks.0.attn2.to_q"],
    "CogVideoX": ["transformer.transformer_blocks.0.attn1.to_q", "transformer.transformer_blocks.0.attn1.to_k"],
    "SDXL": ["lora_te2_text_model_encoder_layers_0_self_attn_q_proj", "lora_unet_input_blocks_7_1_transformer_blocks_0_attn1_to_q"],
    "Stable Diffusion 1.5": ["lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", "lora_unet_mid_block_attentions_0_proj_in"],
    "a language model": ["base_model.model.model.layers.0.self_attn.q_proj", "base_model.model.model.layers.0.mlp.up_proj"],
}


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_are_named(tmp_path, shapes, family):
    pair = (torch.randn(4, 64), torch.randn(64, 4))
    file = loras.write_lora(tmp_path / "robot.safetensors", dict.fromkeys(OTHERS[family], pair), name="{}", endings=KOHYA)
    with pytest.raises(LoraError, match=f"robot.safetensors: .* fit no layer .*It looks like a LoRA for {family}.*MOVA takes LoRAs for"):
        load(file, shapes)


@pytest.mark.parametrize(("width", "family"), [(1536, "Wan 2.1 1.3B"), (3072, "Wan 2.2 TI2V 5B"), (5120, "Wan 2.1 or 2.2 14B")])
def test_wans_of_another_size_are_told_by_their_width(tmp_path, shapes, width, family):
    pair = (torch.randn(4, width), torch.randn(width, 4))
    file = loras.write_lora(tmp_path / "robot.safetensors", {"blocks.0.self_attn.q": pair})
    with pytest.raises(
        LoraError, match=f"changes a tensor of {width} x {width}, but blocks.0.self_attn.q.weight .* is 80 x 80. It looks like a LoRA for {family}"
    ):
        load(file, shapes)


def test_half_a_match_goes_on_and_says_so(tmp_path, shapes, factors, caplog, tiny_mova):
    """As a Wan 2.1 image-to-video LoRA does, whose image keys MOVA lacks."""
    pair = (torch.randn(4, 80), torch.randn(80, 4))
    extra = {f"blocks.{i}.cross_attn.{name}": pair for i in range(4) for name in ("k_img", "v_img")} | {"img_emb.proj.1": pair}
    file = loras.write_lora(tmp_path / "i2v.safetensors", factors | extra)
    with caplog.at_level("WARNING", logger="mova"):
        adapted = mova.load_denoiser(tiny_mova).with_loras([mova.Lora(file)])
    assert adapted.loras[0].report.matched == 40 and len(adapted.loras[0].report.unmatched) == 9
    assert "9 of 49 layers fit nothing in this model" in caplog.text and "blocks.0.cross_attn.k_img" in caplog.text
    few = dict(list(factors.items())[:8])
    with pytest.raises(LoraError, match="9 of 17 layers fit no layer"):
        load(loras.write_lora(tmp_path / "less.safetensors", few | extra), shapes)


def test_a_text_to_video_lora_has_another_patch_embedding(tmp_path, shapes, factors):
    save_file(
        {f"{path}.{ending}": tensor for path, pair in factors.items() for ending, tensor in zip(PEFT, pair, strict=True)}
        | {"patch_embedding.diff": torch.randn(80, 16, 1, 2, 2), "patch_embedding.diff_b": torch.randn(80)},
        tmp_path / "t2v.safetensors",
    )
    assert load(tmp_path / "t2v.safetensors", shapes).report.unmatched == ("patch_embedding",)


def test_one_layer_under_two_names(tmp_path, shapes, factors):
    twice = factors | {f"diffusion_model.{path}": (down.clone(), up.clone()) for path, (down, up) in factors.items()}
    with pytest.raises(LoraError, match=r"changes one layer twice, as blocks.* and as diffusion_model"):
        load(loras.write_lora(tmp_path / "twice.safetensors", twice, name="{}"), shapes)


def test_a_misshapen_layer_is_named(tmp_path, shapes, factors):
    wrong = factors | {"blocks.2.ffn.0": factors["blocks.2.ffn.2"]}
    with pytest.raises(LoraError, match="blocks.2.ffn.0 changes a tensor of 80 x 176, but blocks.2.ffn.0.weight of this model's video high is 176 x 80"):
        load(loras.write_lora(tmp_path / "wrong.safetensors", wrong), shapes)
