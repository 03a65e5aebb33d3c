"""Pre-training against the reference: masks, every variant of the losses, targets, gradients, the teacher's averaging, the schedules."""

import math
from types import SimpleNamespace

import pytest
import torch

from cat_encoder.checkpoint import read_checkpoint
from cat_encoder.names import PREFIX, rename
from cat_encoder.training.decoder import Decoder, DecoderShape, fill_grid
from cat_encoder.training.masks import MaskPlan, Masks, draw_masks, split_cells
from cat_encoder.training.objective import PROJ_TYPES, Alignment, Weights
from cat_encoder.training.optimise import RateSchedule, layer_scale
from cat_encoder.training.student import Student
from cat_encoder.training.teacher import DecaySchedule, Teacher

CHECKPOINT = "checkpoint/cat_tiny_pretrain.model.safetensors"
LOSSES = {"IMAGE_regression": "frame", "cls": "utterance", "clap": "alignment", "dispersive": "dispersive"}
VARIANTS = "base_noise0 base l1 mse cosine ce layer2 topk1 disp no_rr beta1 proj1 proj2 proj3 proj4 proj5 proj6".split()


def close(actual, expected, tolerance):
    """The MANIFEST's measure: the largest difference over the largest value, or over 1 when that is larger."""
    assert actual.shape == expected.shape
    assert float((actual.detach() - expected).abs().max()) <= tolerance * max(1.0, float(expected.abs().max()))


@pytest.fixture(scope="module")
def case(golden_cat):
    """The reference's batch of two clips and two clones each, with its masks and vectors."""
    story, tensors = golden_cat("pretrain/pretrain.json"), golden_cat("pretrain/pretrain.safetensors")
    rows, notes = golden_cat("frontend/fbank.safetensors"), golden_cat("frontend/frontend.json")
    mel = torch.stack([pad(rows[name], notes[name]["pad_value"]) for name in ("as_10s_16k", "as_3s_16k")])[:, None]
    order = tensors["n0.ids_restore"].argsort(1)  # the reference's shuffle: visible cells first
    masks = Masks(64, 8, order[:, :102], order[:, 102:])
    return SimpleNamespace(story=story, tensors=tensors, mel=mel, masks=masks, raw=golden_cat(CHECKPOINT), path=golden_cat("checkpoint/cat_tiny_pretrain.pt"))


def pad(rows, value):
    return torch.cat([rows, torch.full((1024 - len(rows), 128), value)])


@pytest.fixture(scope="module")
def encoders(case):
    return [read_checkpoint(case.path, weights).build()[0] for weights in ("student", "teacher")]


@pytest.fixture
def student(case, encoders):
    """student(overrides) -> the reference's student with that variant's alignment head."""

    def build(overrides, beta=0.0):
        decoder = Decoder(48, DecoderShape(width=48, layers=2, kernel=3, groups=16))
        decoder.load_state_dict({name.removeprefix(f"{PREFIX}decoder."): tensor for name, tensor in case.raw.items() if name.startswith(f"{PREFIX}decoder.")})
        weights = Weights(dispersive=overrides.get("disp", 0.0), beta=beta)
        return Student(encoders[0], decoder, alignment_of(case, overrides), weights).requires_grad_(True)

    return build


def alignment_of(case, overrides):
    kind = overrides["proj"]
    if kind is None:
        return None
    width, side = PROJ_TYPES[kind]
    head = Alignment(48, width, side=side, measure=overrides["clap_type"], layer=overrides.get("clap_layer", 0))
    stored = case.raw if kind == 2 else case.tensors
    prefix = "" if kind == 2 else f"proj{kind}."
    head.proj.load_state_dict({part: stored[f"{prefix}clap_proj.{part}"] for part in ("weight", "bias")})
    return head


def run_variant(case, student, teacher, name):
    spec = case.story["variants"][name]
    overrides = spec["overrides"]
    model = student(overrides, beta=1.0 if spec["extra"] else 0.0)
    noise = torch.zeros(4, 410, 48)
    if "noise_seed" in spec:
        torch.manual_seed(spec["noise_seed"])
        noise = torch.randn(4, 410, 48) * 0.01
    targets = Teacher(teacher, layers=overrides.get("topk", 0)).targets(case.mel)
    guess = model(case.mel, case.masks, noise)
    external = case.tensors[f"clap_emb_{PROJ_TYPES[overrides['proj']][0]}"] if overrides["proj"] else None
    losses, spreads = model.losses(guess, case.masks, targets, external)
    return spec, model, guess, targets, losses, spreads


@pytest.mark.parametrize("name", VARIANTS)
def test_losses(case, student, encoders, name):
    spec, _, _, _, losses, spreads = run_variant(case, student, encoders[1], name)
    assert losses.masked == spec["sample_size"]
    for theirs, ours in LOSSES.items():
        value = float(getattr(losses, ours).detach()) * (1 if ours == "frame" else losses.masked)  # their sums are ours times the masked cells
        assert value == pytest.approx(spec["losses_sum"].get(theirs, 0.0), rel=1e-4)
    assert float(losses.objective().detach()) == pytest.approx(spec["loss_per_masked_token"], rel=1e-4)
    assert spreads == pytest.approx({"guess_spread": spec["pred_var"], "target_spread": spec["target_var"]}, rel=1e-4)


def test_every_variant_is_tried(case):
    assert set(VARIANTS) == set(case.story["variants"])


def test_intermediates(case, student, encoders):
    _, model, guess, targets, _, _ = run_variant(case, student, encoders[1], "base_noise0")
    stored = case.tensors
    tokens = model.encoder(case.mel, case.masks.visible, case.masks.keep).tokens
    close(tokens, stored["n0.student_x"], 2e-5)
    close(targets, stored["n0.targets"], 2e-5)
    close(fill_grid(tokens[:, 1:], case.masks, torch.zeros(4, 410, 48))[:2], stored["n0.dec_in"], 2e-5)
    close(guess.tokens[:2], stored["n0.dec_out"], 2e-5)


def test_masked_cells_hold_the_noise_that_was_drawn(case, student, encoders):
    torch.manual_seed(case.story["variants"]["base"]["noise_seed"])
    noise = torch.randn(4, 410, 48) * 0.01
    tokens = encoders[0](case.mel, case.masks.visible, case.masks.keep).tokens
    close(fill_grid(tokens[:, 1:], case.masks, noise)[:1], case.tensors["noisy.dec_in"], 2e-5)


@pytest.mark.parametrize("name", ["base_noise0", "base", "disp"])
def test_gradients(case, student, encoders, name):
    spec, model, _, _, losses, _ = run_variant(case, student, encoders[1], name)
    model.zero_grad()
    losses.objective().backward()
    gradients = {rename_all(ours): parameter.grad for ours, parameter in model.named_parameters()}
    assert math.sqrt(sum(float(grad.square().sum()) for grad in gradients.values())) == pytest.approx(spec["grad_norm"], rel=2e-4)
    if name == "base_noise0":
        stored = {key.removeprefix("grad."): value for key, value in case.tensors.items() if key.startswith("grad.")}
        assert len(stored) == 7
        for key, value in stored.items():
            close(gradients[key].reshape(value.shape), value, 2e-4)


def rename_all(name):
    """Our parameter name of a student -> the released one."""
    if name.startswith("encoder."):
        return rename(name.removeprefix("encoder."), 3)
    return name.replace("alignment.proj", "clap_proj") if name.startswith("alignment") else PREFIX + name


def test_every_parameter_learns(case, student, encoders):
    _, model, _, _, losses, _ = run_variant(case, student, encoders[1], "base_noise0")
    model.zero_grad()
    losses.objective().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in Teacher(encoders[1]).encoder.parameters())


# The teacher


def test_teacher_follows_as_the_reference(case, encoders, golden_cat):
    stored = golden_cat("pretrain/ema.safetensors")
    teacher = Teacher(encoders[1])
    ours = {rename(name, 3): tensor for name, tensor in teacher.encoder.named_parameters()}
    for update, moment in enumerate(("before", "after_1", "after_2")):
        if update:
            teacher.follow(encoders[0], update)
        for name in ("blocks.0.attn.qkv.weight", "blocks.1.norm2.bias", f"{PREFIX}conv_blocks.0.0.conv1.weight", f"{PREFIX}extra_tokens"):
            close(ours[name].reshape(stored[f"{moment}.{name}"].shape), stored[f"{moment}.{name}"], 1e-6)
    assert not torch.equal(stored["before.blocks.0.attn.qkv.weight"], stored["after_1.blocks.0.attn.qkv.weight"])


def test_decay_schedule(golden_cat):
    for update, decay in golden_cat("pretrain/pretrain.json")["ema"]["decay_at_update"].items():
        assert DecaySchedule().at(int(update)) == pytest.approx(decay, rel=1e-12)


def test_a_resumed_count_is_no_step(encoders):
    teacher = Teacher(encoders[1])
    before = [parameter.clone() for parameter in teacher.encoder.parameters()]
    teacher.follow(encoders[0], 500)  # from 0 to 500: a resumed run
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.encoder.parameters(), strict=True))
    teacher.follow(encoders[0], 500)
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.encoder.parameters(), strict=True))
    teacher.follow(encoders[0], 501)
    assert not all(torch.equal(a, b) for a, b in zip(before, teacher.encoder.parameters(), strict=True))


# Rates


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("pretrain_400k", RateSchedule(5e-4, 53_333, 400_000)),
        ("sft_as20k", RateSchedule(5e-5, 4_000, 40_000, 1e-6)),
        ("sft_as2m", RateSchedule(5e-5, 30_000, 300_000, 1e-6)),
    ],
)
def test_rate_schedule(golden_cat, name, schedule):
    for update, rate in golden_cat("pretrain/pretrain.json")["lr"][name].items():
        assert schedule.at(int(update)) == pytest.approx(rate, rel=1e-6, abs=1e-15)


def test_layer_decay_of_fine_tuning(golden_cat, case, encoders):
    story = golden_cat("classifier/classifier.json")["optim_overrides"]
    scales = {name: layer_scale(f"encoder.{name}", 3, 0.65) for name, _ in encoders[0].named_parameters()}
    for name, scale in scales.items():
        assert scale == pytest.approx(story[f"model.{rename(name, 3)}"].get("lr_scale", 1.0), rel=1e-12)
    assert len(set(scales.values())) == 4


# Masks


@pytest.mark.parametrize("name", ["m0", "m1", "m2", "m3"])
def test_masks(golden_cat, name):
    note, stored = golden_cat("pretrain/masks.json")[name], golden_cat("pretrain/masks.safetensors")[name]
    generator = torch.Generator().manual_seed(note["seed"])
    plan = MaskPlan(note["mask_prob"], note["mask_prob_adjust"], note["mask_length"])
    masks = draw_masks(len(stored), *note["img_shape"], plan, generator)
    assert torch.equal(masks, stored.bool())
    split = split_cells(masks, *note["img_shape"])
    assert (split.keep.shape[1], split.hide.shape[1]) == (note["visible"], note["masked"])
    assert torch.equal(split.visible.flatten(1) == 0, masks)
