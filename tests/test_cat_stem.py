"""Both stems against the reference: seven resolutions, masked and not, intermediates, and what a mask must guarantee."""

import pytest
import torch

from cat_encoder.config import CONV_OPTIONS, PRESETS, Architecture, cat_architecture
from cat_encoder.errors import CatError
from cat_encoder.names import PREFIX, released_names
from cat_encoder.stem import MultiResolutionStem
from cat_encoder.trunk import AudioTransformer

TOLERANCE = 2e-5  # MANIFEST: largest difference over max(1, largest value)
ZERO_TOLERANCE = 5e-6  # of the probe that tells the eps of the norms


def off(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1))


def small_architecture(option: int, width: int, channels: list[int]) -> Architecture:
    """The recorded sizes: the channel table is the only thing the reference changed."""
    return cat_architecture(option, channels=tuple(channels), width=width, heads=4, depth=1)


def reference_stem(golden_cat, option: int) -> tuple[MultiResolutionStem, dict, dict]:
    case, tensors = golden_cat("multires/multires.json")["tests"][f"option{option}"], golden_cat(f"multires/option{option}.safetensors")
    architecture = small_architecture(option, case["D"], case["conv_params"]["in_chans"][1:-1])
    names = {
        released.removeprefix(PREFIX): (ours.removeprefix("stem."), shape)
        for released, (ours, shape) in released_names(architecture).items()
        if ours.startswith("stem.")
    }
    weights = {name.removeprefix("w."): tensor for name, tensor in tensors.items() if name.startswith("w.")}
    assert set(weights) == set(names)
    stem = MultiResolutionStem(architecture)
    stem.load_state_dict({names[name][0]: tensor.reshape(names[name][1]) for name, tensor in weights.items()})
    return stem.requires_grad_(False), tensors, case


@pytest.fixture
def mel(golden_cat) -> torch.Tensor:
    """The two reference clips, [2,1,1024,128]."""
    return recorded_mel(golden_cat)


def recorded_mel(golden_cat) -> torch.Tensor:
    mels, pad = golden_cat("frontend/fbank.safetensors"), golden_cat("frontend/frontend.json")["as_10s_16k"]["pad_value"]
    clips = [torch.cat([mels[name], torch.full((1024 - len(mels[name]), 128), pad)]) for name in ("as_10s_16k", "as_3s_16k")]
    return torch.stack(clips)[:, None]


@pytest.mark.parametrize("option", CONV_OPTIONS)
def test_the_table_of_stems_is_the_reference(golden_cat, option):
    case = golden_cat("multires/multires.json")["tests"][f"option{option}"]
    kernels, channels, branches = CONV_OPTIONS[option]
    assert list(kernels) == case["conv_params"]["patch_sizes"] and list(branches) == case["conv_params"]["stage_output_patch_sizes"]
    assert len(channels) == len(case["conv_params"]["in_chans"]) - 2
    assert cat_architecture(option, width=48, heads=4).patch == case["patch_size"]


@pytest.mark.parametrize("option", CONV_OPTIONS)
def test_tokens_of_nothing(golden_cat, option):
    """All-zero input makes the norms see constants: a wrong eps shows here and nowhere else."""
    stem, tensors, _ = reference_stem(golden_cat, option)
    expected = tensors["zero_input.unmasked16"]
    assert off(stem(torch.zeros(1, 1, 1024, 128))[:, : expected.shape[1]], expected) < ZERO_TOLERANCE


@pytest.mark.parametrize("option", CONV_OPTIONS)
def test_tokens_unmasked_and_masked(golden_cat, mel, option):
    stem, tensors, case = reference_stem(golden_cat, option)
    mel = mel[: case["batch"]]
    visible = mask_on_grid(1 - tensors["mask"], mel, stem.patch)
    assert off(stem(mel), tensors["unmasked"]) < TOLERANCE
    assert int(visible[0].sum()) == case["visible"]
    assert off(stem(mel, visible), tensors["masked"]) < TOLERANCE
    repeated = mel.repeat_interleave(case["clones"], 0)
    torch.testing.assert_close(stem(repeated, visible), stem(mel, visible), rtol=0, atol=1e-5)


@pytest.mark.parametrize("option", CONV_OPTIONS)
def test_maps_on_the_way(golden_cat, mel, option):
    stem, tensors, case = reference_stem(golden_cat, option)
    last = len(stem.stages)
    modules = {f"patch_embed.{i}": stage for i, stage in enumerate(stem.stages)} | {f"conv_blocks.{i}.last": blocks[-1] for i, blocks in enumerate(stem.blocks)}
    seen = {}
    for name, module in modules.items():
        module.register_forward_hook(lambda _, __, out, name=name: seen.__setitem__(name, out))
    stem(mel[: case["batch"]])
    for name, out in seen.items():
        assert list(out.movedim(-1, 1).shape) == case["mid_shapes"][name]
        assert off(out.movedim(-1, 1)[:1, :, :3, :3], tensors[f"mid.{name}"]) < TOLERANCE
    assert f"mid.patch_embed.{last}" in tensors


def mask_on_grid(visible: torch.Tensor, mel: torch.Tensor, patch: int) -> torch.Tensor:
    return visible.view(len(visible), 1, mel.shape[2] // patch, 128 // patch)


# What masks must guarantee


@pytest.fixture(params=[0, 2, 6])
def random_stem(request) -> MultiResolutionStem:
    torch.manual_seed(0)
    architecture = cat_architecture(request.param, channels=(8, 12, 8)[: len(CONV_OPTIONS[request.param][1])], width=16, heads=4, depth=1)
    return MultiResolutionStem(architecture).requires_grad_(False)


def test_nothing_hidden_reaches_what_is_visible(random_stem):
    grid = 128 // random_stem.patch
    visible = (torch.rand(3, 1, grid, grid, generator=torch.Generator().manual_seed(1)) < 0.3).float()
    mel = torch.randn(1, 1, 128, 128)
    hidden = visible.repeat_interleave(random_stem.patch, 2).repeat_interleave(random_stem.patch, 3)
    changed = torch.where(hidden.bool(), mel, 100 * torch.randn(3, 1, 128, 128))
    before, after = random_stem(mel, visible), random_stem(changed, visible)
    seen = visible.flatten(1).bool()
    assert torch.equal(before[seen], after[seen])
    assert not torch.allclose(before[~seen], after[~seen])


def test_all_visible_is_no_mask(random_stem):
    mel, grid = torch.randn(2, 1, 128, 128), 128 // random_stem.patch
    torch.testing.assert_close(random_stem(mel, torch.ones(2, 1, grid, grid)), random_stem(mel), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 1, 8, 8), (2, 1, 8, 4), (2, 8, 8), (0, 1, 8, 8)])
def test_a_mask_that_does_not_fit_is_said(shape):
    stem = MultiResolutionStem(cat_architecture(channels=(8, 12), width=16, heads=4, depth=1))
    with pytest.raises(CatError, match="mask"):
        stem(torch.zeros(2, 1, 128, 128), torch.ones(shape))


def test_slices_of_large_maps_are_the_whole(monkeypatch, random_stem):
    mel = torch.randn(1, 1, 256, 128)
    whole = random_stem(mel)
    monkeypatch.setattr("cat_encoder.stem.ROOM", 32 * 10)
    torch.testing.assert_close(random_stem(mel), whole, rtol=0, atol=1e-5)


# Sizes


def test_released_sizes():
    """The counts of spec/cat.md 2.4; they decide whether base is what the paper trained."""
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in AudioTransformer(PRESETS[name]).parameters()) / 1e6 for name in ("cat-base", "eat-base")}
        stems = [sum(p.numel() for p in MultiResolutionStem(cat_architecture(option)).parameters()) / 1e6 for option in CONV_OPTIONS]
    assert counts["cat-base"] == pytest.approx(88.77, abs=0.005) and counts["eat-base"] == pytest.approx(85.25, abs=0.005)
    assert stems == pytest.approx([10.81, 0.79, 5.94, 13.02, 5.96, 40.35, 40.36], abs=0.005)


@pytest.mark.parametrize(
    "values",
    [
        dict(heads=5),
        dict(heads=0),
        dict(kernels=(0, 2, 2)),
        dict(kernels=()),
        dict(width=0),
        dict(stem="other"),
        dict(kernels=(4, 2)),
        dict(branches=(4, 4)),
        dict(kernels=(3, 2, 2)),
        dict(stem="patch"),
        dict(width=6, heads=3),
    ],
)
def test_shapes_that_cannot_be_are_said(values):
    with pytest.raises(CatError, match="No encoder has these shapes"):
        Architecture(**values)
