"""LoRAs on the model: equal to the reference and to merged weights, wherever the weights live, and gone without a trace."""

import gc
import hashlib
import json
import logging
import shutil

import loras
import pytest
import torch
from conftest import distance, golden_path
from slab_stand_ins import with_rings

import mova
from mova import LoraError
from mova.cards import GPUS, find_device
from mova.estimate import estimate
from mova.fp8 import QuantizedLinear
from mova.quantize import quantize
from mova.residency import Placement, spread

EXPERTS = {"high": "video_dit", "low": "video_dit_2"}
HALVES = {"video_high": "video_dit", "video_low": "video_dit_2", "audio": "audio_dit", "bridge": "dual_tower_bridge"}


@pytest.fixture(scope="module")
def step(tiny_mova):
    """step(denoiser, "high") -> velocities of the reference's single step."""
    from safetensors.torch import load_file

    case = load_file(golden_path("single_step.safetensors"))
    latents = case["visual_latents"]

    def step(denoiser, expert="high"):
        return denoiser.velocity(latents[:, :16], case["audio_latents"], latents[:, 16:], case["context"], 625.0, audio_timestep=500.0, fps=24.0, expert=expert)

    return step


@pytest.fixture
def base(tiny_mova):
    return mova.load_denoiser(tiny_mova)


@pytest.fixture(scope="module")
def factors(tiny_mova):
    return loras.full_factors(tiny_mova)


@pytest.fixture
def lora(tmp_path, factors):
    """A LoRA on every linear of all four parts, rank 4, alpha 2."""
    return loras.write_full_lora(tmp_path / "robot.safetensors", factors, alpha=2)


def assert_equal(pair, other):
    assert torch.equal(pair[0], other[0]) and torch.equal(pair[1], other[1])


def assert_close(pair, other, tolerance=1e-6):
    assert max(distance(pair[0], other[0]), distance(pair[1], other[1])) < tolerance


# ---------------------------------------------------------------- the reference


@pytest.mark.parametrize(
    ("case", "folder", "alpha"),
    [
        ("low_resource_f32", "low_resource_f32", None),
        ("accelerate_r16.trained", "accelerate_r16_fsdp_peft", None),
        ("accelerate_r16.trained", "accelerate_r16_fsdp_diffsynth", None),
        ("accelerate_r16.trained", "accelerate_r16_nonfsdp_no_filter", None),
        ("accelerate_r16.trained", "accelerate_r16_fsdp_peft/lora_weights.mirror.safetensors", None),
        ("accelerate_r16.merged", "accelerate_r16_fsdp_peft", None),
        ("accelerate_r16_fsdp_peft.MOVALoRA", "accelerate_r16_fsdp_peft/lora_weights.pt", None),
        ("accelerate_r16_fsdp_peft.MOVALoRA.alpha8", "accelerate_r16_fsdp_peft", 8.0),
        ("accelerate_small_fsdp_peft.MOVALoRA", "accelerate_small_fsdp_peft", None),
        ("accelerate_small.trained", "accelerate_small_fsdp_peft", 8.0),
    ],
)
@pytest.mark.parametrize("expert", EXPERTS)
def test_equals_the_reference(base, step, golden, case, folder, alpha, expert):
    adapted = base.with_loras([mova.Lora(golden_path(f"lora/{folder}"), alpha=alpha)])
    expected = golden("lora")
    assert_close(step(adapted, expert), [expected[f"{case}.{EXPERTS[expert]}.{stream}"] for stream in ("visual", "audio")], 2e-6)


@pytest.mark.parametrize("expert", EXPERTS)
def test_bf16_is_close_to_the_references_side_branch(tiny_mova, step, golden, expert):
    adapted = mova.load_denoiser(tiny_mova, dtype=torch.bfloat16).with_loras([mova.Lora(golden_path("lora/low_resource_bf16"))])
    expected = golden("lora")
    assert_close(step(adapted, expert), [expected[f"low_resource_bf16.{EXPERTS[expert]}.{stream}"] for stream in ("visual", "audio")], 2e-2)


def test_a_scale_that_cannot_be_trusted_is_one_and_told(base):
    report = base.with_loras([mova.Lora(golden_path("lora/accelerate_small_fsdp_peft"))]).loras[0].report
    assert "Scale: 1, as the trainer's config (rank 16, alpha 16.0) is not about these tensors (rank 4)" in str(report)
    assert "134 of 134 layers matched" in str(report) and "video high 40 layers x 1" in str(report) and "bridge 24 layers x 1" in str(report)


# ---------------------------------------------------------------- merged weights


def test_equals_merged_weights(base, step, lora, factors, tmp_path):
    merged = mova.load_denoiser(loras.merge_checkpoint(base.folder, tmp_path / "merged", loras.products(factors, 0.5)))
    adapted = base.with_loras([mova.Lora(lora)])
    for expert in EXPERTS:
        assert_close(step(adapted, expert), step(merged, expert))
        assert distance(step(adapted, expert)[0], step(base, expert)[0]) > 0.01


@pytest.mark.parametrize("residency", ["auto", "stream"])
def test_bf16_is_an_offline_bf16_merge_bit_for_bit(tiny_mova, step, tmp_path, factors, residency):
    halved = loras.merge_checkpoint(tiny_mova, tmp_path / "bf16", {}, torch.bfloat16)
    stored = {name: {path: (down.bfloat16(), up.bfloat16()) for path, (down, up) in paths.items()} for name, paths in factors.items()}
    lora = loras.write_full_lora(tmp_path / "lora.safetensors", stored, alpha=3)
    merged = mova.load_denoiser(loras.merge_checkpoint(halved, tmp_path / "merged", loras.products(stored, 0.75)))
    adapted = mova.load_denoiser(halved, residency=residency).with_loras([mova.Lora(lora)])
    for expert in EXPERTS:
        assert_equal(step(adapted, expert), step(merged, expert))


@pytest.mark.parametrize("strengths", [(0.5, -1.0, 2.0, 0.25), (1.0, 0.0, 0.0, 1.0), (0.0, 1.0, -0.5, 0.0)], ids=str)
def test_strengths_are_linear_and_per_tower(base, step, lora, factors, tmp_path, strengths):
    given = dict(zip(HALVES, strengths, strict=True))
    deltas = {name: loras.products({name: factors[name]}, 0.5 * given[strength])[name] for strength, name in HALVES.items()}
    merged = mova.load_denoiser(loras.merge_checkpoint(base.folder, tmp_path / "merged", deltas))
    adapted = base.with_loras([mova.Lora(lora, **given)])
    for expert in EXPERTS:
        assert_close(step(adapted, expert), step(merged, expert))


def test_strength_zero_is_the_base_bit_for_bit(base, step, lora):
    silent = base.with_loras([mova.Lora(lora, video_high=0, video_low=0, audio=0, bridge=0)])
    assert_equal(step(silent), step(base))
    assert "skipped" in str(silent.loras[0].report) and silent.loras[0].report.nbytes == 0


def test_a_lora_for_one_expert_leaves_the_other_alone(base, step, tmp_path, factors):
    lora = loras.write_lora(tmp_path / "style_high_noise.safetensors", factors["video_dit"])
    adapted = base.with_loras([mova.Lora(lora)])
    assert_equal(step(adapted, "low"), step(base, "low"))
    assert distance(step(adapted, "high")[0], step(base, "high")[0]) > 0.01


def test_stacked_loras_add_up_in_any_order(base, step, tmp_path, tiny_mova):
    sets = [loras.full_factors(tiny_mova, seed=seed, rank=rank) for seed, rank in ((0, 4), (10, 7), (20, 1))]
    files = [mova.Lora(loras.write_full_lora(tmp_path / f"{i}.safetensors", found)) for i, found in enumerate(sets)]
    sums = {name: {key: sum(loras.products(one)[name][key] for one in sets) for key in loras.products(sets[0])[name]} for name in loras.COMPONENTS}
    merged = step(mova.load_denoiser(loras.merge_checkpoint(tiny_mova, tmp_path / "merged", sums)))
    assert_close(step(base.with_loras(files)), merged)
    assert_close(step(base.with_loras(reversed(files))), merged)
    chained = base.with_loras(files[:1]).with_loras(files[1:])
    assert len(chained.loras) == 3
    assert_equal(step(chained), step(base.with_loras(files)))


# Tensors that are no linears of a layer, and some that are: component -> keys.
ELSEWHERE = {
    "video_dit": [
        "patch_embedding.weight", "patch_embedding.bias", "text_embedding.0.weight", "time_embedding.2.bias", "time_projection.1.weight", "head.head.weight",
        "head.modulation", "blocks.1.modulation", "blocks.2.norm3.weight", "blocks.2.norm3.bias", "blocks.3.self_attn.norm_q.weight", "blocks.0.ffn.0.bias",
        "blocks.0.cross_attn.k.bias", "blocks.0.cross_attn.norm_k.weight",
    ],
    "audio_dit": ["head.modulation", "text_embedding.2.weight", "blocks.0.norm3.weight"],
    "dual_tower_bridge": ["audio_to_video_conditioners.0.y_norm.weight", "video_to_audio_conditioners.1.inner.norm_q.weight"],
}  # fmt: skip


def test_differences_reach_every_tensor(base, step, tmp_path):
    """As in lightx2v's files: .diff, .diff_b, norms and modulation."""
    generator, deltas, tensors = torch.Generator().manual_seed(0), {}, {}
    for name, keys in ELSEWHERE.items():
        for key in keys:
            delta = 0.1 * torch.randn(loras.weights_of(base.folder, name)[key].shape, generator=generator)
            deltas.setdefault(name, {})[key] = delta
            path, _, leaf = key.rpartition(".")
            ending = {"weight": "diff", "bias": "diff_b", "modulation": "diff_m"}[leaf]
            tensors[f"diffusion_model.{name}.{path}.{ending}"] = delta
    loras.save_file(tensors, tmp_path / "diff.safetensors")
    adapted = base.with_loras([mova.Lora(tmp_path / "diff.safetensors")])
    assert not adapted.loras[0].report.unmatched and "difference" in str(adapted.loras[0].report)
    merged = mova.load_denoiser(loras.merge_checkpoint(base.folder, tmp_path / "merged", deltas))
    assert_close(step(adapted), step(merged))


# ---------------------------------------------------------------- where the weights live


@pytest.fixture
def placed(base, lora, monkeypatch):
    """placed(own) -> a denoiser with the LoRA that streams, with so many of its four layers kept."""
    made = []

    def build(own):
        denoiser = base.with_loras([mova.Lora(lora)])
        placement = Placement("stream", "for the test", spread(own, 4), 2 if own < 4 else 0)
        monkeypatch.setattr(denoiser.residency, "settle", lambda *_: setattr(denoiser.residency, "placement", placement))
        made.append(denoiser)
        return denoiser

    yield build
    for denoiser in made:
        denoiser.release()


@pytest.fixture
def expected(base, lora, loop):
    return mova.sample(base.with_loras([mova.Lora(lora)]), **loop)


@pytest.mark.parametrize("own", [0, 2, 4])
def test_any_number_of_resident_layers_gives_the_same_clip(placed, expected, loop, own):
    denoiser = placed(own)
    for _ in range(2):  # the second run meets slabs that hold something
        assert_equal(mova.sample(denoiser, **loop), expected)
    denoiser.release()
    assert denoiser.residency.empty


def test_through_a_ring_of_host_buffers(placed, expected, loop, monkeypatch):
    with_rings(monkeypatch)
    assert_equal(mova.sample(placed(0), **loop), expected)


@pytest.mark.parametrize("residency", ["auto", "stream"])
def test_under_inference_mode_as_in_comfyui(tiny_mova, lora, expected, loop, residency):
    with torch.inference_mode():
        adapted = mova.load_denoiser(tiny_mova, residency=residency).with_loras([mova.Lora(lora)])
        assert_equal(mova.sample(adapted, **loop), expected)


def test_little_ram_streams_instead(base, lora, expected, loop, monkeypatch):
    monkeypatch.setattr("mova.residency.available_ram", lambda: 10**6)
    denoiser = base.with_loras([mova.Lora(lora)])
    assert_equal(mova.sample(denoiser, **loop), expected)
    assert denoiser.report().mode == "stream" and base.report().mode == "not decided"


def test_the_base_is_never_touched(base, lora, loop, tiny_mova):
    """Both run in turns; the files stay as they are, and without the LoRA every bit is as before."""
    files = sorted(tiny_mova.rglob("*.safetensors"))
    before, plain = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files], mova.sample(base, **loop)
    adapted = base.with_loras([mova.Lora(lora)])
    first = mova.sample(adapted, **loop)
    for _ in range(2):
        assert_equal(mova.sample(base, **loop), plain)
        assert_equal(mova.sample(adapted, **loop), first)
    assert [hashlib.sha256(file.read_bytes()).hexdigest() for file in files] == before
    assert adapted.parts.tensors is base.parts.tensors  # mapped once


def test_a_file_that_is_replaced_changes_nothing_in_use(base, lora, step):
    adapted = base.with_loras([mova.Lora(lora)])
    before = step(adapted)
    lora.write_bytes(b"another training")
    adapted.release()
    assert_equal(step(adapted), before)


def live_bytes():
    gc.collect()
    found = [tensor for tensor in gc.get_objects() if type(tensor) in (torch.Tensor, torch.nn.Parameter) and not tensor.is_meta]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in found}.values())


def test_switching_loras_leaks_nothing(base, lora, tmp_path, tiny_mova, loop):
    other = loras.write_full_lora(tmp_path / "other.safetensors", loras.full_factors(tiny_mova, seed=5, rank=8))

    def switch():
        for file in (lora, other):
            adapted = base.with_loras([mova.Lora(file)])
            mova.sample(adapted, **loop)
            adapted.release()
            assert adapted.residency.empty
        del adapted

    switch()
    before = live_bytes()
    for _ in range(3):
        switch()
    assert live_bytes() == before


def test_the_estimate_counts_it(base, lora):
    adapted, sizes = base.with_loras([mova.Lora(lora)]), dict(height=48, width=64, num_frames=9)
    with_lora, without = (estimate(denoiser, GPUS["RTX 4090"], **sizes) for denoiser in (adapted, base))
    assert with_lora.ram_bytes >= without.ram_bytes + adapted.loras[0].report.nbytes > without.ram_bytes
    assert with_lora.weights_bytes > without.weights_bytes  # factors lie beside the weights
    on_cpu = [estimate(denoiser, find_device("cpu", None), **sizes) for denoiser in (adapted, base)]
    assert on_cpu[0].mode == "resident" and on_cpu[0].ram_bytes - on_cpu[1].ram_bytes >= sum(adapted.residency.sizes)


def test_attention_and_residency_are_those_of_the_original(tiny_mova, lora):
    base = mova.load_denoiser(tiny_mova, residency="stream")
    base.attention = "math"
    adapted = base.with_loras([mova.Lora(lora)])
    assert adapted.attention == "math" and adapted.residency.mode == "stream" and not base.loras


# ---------------------------------------------------------------- 8-bit weights


@pytest.fixture(scope="module")
def small_weights(tiny_mova, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8") / "model"
    quantize(tiny_mova, folder)
    return folder


def dequantized(folder, target):
    """The same numbers, stored as float32."""
    shutil.copytree(folder, target, copy_function=shutil.copyfile)
    for name in loras.COMPONENTS:
        tensors = loras.weights_of(folder, name)
        scales = {key: tensors.pop(key) for key in list(tensors) if key.endswith("_scale")}
        for key, scale in scales.items():
            tensors[key.removesuffix("_scale")] = tensors[key.removesuffix("_scale")].float() * scale[:, None]
        loras.save_file(tensors, target / name / loras.WEIGHTS)
        config = target / name / "config.json"
        values = json.loads(config.read_text())
        config.write_text(json.dumps({key: value for key, value in values.items() if key != "quantization"}))
    return target


@pytest.mark.parametrize("residency", ["auto", "stream"])
def test_on_8_bit_weights_it_is_a_side_branch(small_weights, step, lora, factors, tmp_path, residency):
    plain = dequantized(small_weights, tmp_path / "plain")
    merged = mova.load_denoiser(loras.merge_checkpoint(plain, tmp_path / "merged", loras.products(factors, 0.5)))
    adapted = mova.load_denoiser(small_weights, residency=residency).with_loras([mova.Lora(lora)])
    for expert in EXPERTS:
        assert_close(step(adapted, expert), step(merged, expert), 2e-6)
    sides = [module.sides for part in adapted.parts.experts.values() for module in part.modules() if isinstance(module, QuantizedLinear)]
    assert sides and not any(sides)  # none stays behind a layer that has run


def test_other_kinds_on_8_bit_weights(small_weights, step, factors, tmp_path):
    """A full difference and a DoRA cannot be thin; they act beside the weight all the same."""
    plain = dequantized(small_weights, tmp_path / "plain")
    weight = loras.weights_of(plain, "video_dit")["blocks.1.ffn.0.weight"]
    (down, up), difference = factors["video_dit"]["blocks.1.ffn.0"], 0.1 * torch.randn(80, 80, generator=torch.Generator().manual_seed(0))
    magnitude = 1.5 * weight.norm(dim=1, keepdim=True)
    loras.save_file(
        {
            "video_dit.blocks.1.ffn.0.lora_A.weight": down,
            "video_dit.blocks.1.ffn.0.lora_B.weight": up,
            "video_dit.blocks.1.ffn.0.dora_scale": magnitude,
            "video_dit.blocks.2.self_attn.q.diff": difference,
        },
        tmp_path / "mixed.safetensors",
    )
    wanted = weight + up @ down
    deltas = {"video_dit": {"blocks.1.ffn.0.weight": magnitude * wanted / wanted.norm(dim=1, keepdim=True) - weight, "blocks.2.self_attn.q.weight": difference}}
    merged = mova.load_denoiser(loras.merge_checkpoint(plain, tmp_path / "merged", deltas))
    adapted = mova.load_denoiser(small_weights).with_loras([mova.Lora(tmp_path / "mixed.safetensors")])
    assert_close(step(adapted), step(merged), 2e-6)


# ---------------------------------------------------------------- what is told


def test_a_log_line_tells_what_it_did(base, lora, caplog):
    with caplog.at_level(logging.INFO, logger="mova"):
        base.with_loras([mova.Lora(lora, audio=0)])
    assert "robot.safetensors: LoRA, rank 4" in caplog.text and "audio 30 layers skipped" in caplog.text and "alpha 2, in the file" in caplog.text


def test_two_runs_differ_by_file_and_strength(base, lora):
    def identity(**given):
        return base.with_loras([mova.Lora(lora, **given)]).loras[0].identity

    assert identity() == identity() != identity(audio=0.5)
    before = identity()
    content = lora.read_bytes()
    lora.write_bytes(content[:-4] + bytes(4))
    assert identity() != before


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"audio": float("nan")}, "strength of audio is nan"),
        ({"alpha": float("inf")}, "alpha is inf"),
        ({"expert": "middle"}, "'middle'"),
        ({"bridge": "1"}, "strength of bridge is '1'"),
    ],
)
def test_values_that_are_no_numbers(given, said):
    with pytest.raises(LoraError, match=said):
        mova.Lora("robot.safetensors", **given)
