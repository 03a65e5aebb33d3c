"""Sigma tables, grids and the expert switch against the reference scheduler (golden scheduler, scheduler_rounding_n24)."""

import dataclasses

import pytest
import torch
from conftest import golden_path
from safetensors.torch import load_file

from mova import CheckpointError, InputError
from mova.checkpoint import read_config
from mova.schedule import ScheduleConfig, choose_experts, make_grid

CONFIGS = ("ckpt", "default", "shift5_extra", "inverse", "reverse", "terminal", "expo", "train500")
RELEASE = ScheduleConfig(shift=5.0, extra_one_step=True)


@pytest.fixture
def scheduler(golden, golden_config):
    tensors, configs = golden("scheduler"), golden_config("scheduler")["configs"]
    return lambda name: (
        read_config(ScheduleConfig, configs[name], name),
        {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")},
    )


def assert_table(timesteps, expected):
    torch.testing.assert_close(timesteps, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_tables_match_reference(scheduler, name):
    config, expected = scheduler(name)
    train = config.sigmas(config.num_train_timesteps)
    assert_table(config.num_train_timesteps * train, expected["train_timesteps"])
    torch.testing.assert_close(train, expected["train_sigmas"], rtol=0, atol=1e-7)
    for steps in (4, 8, 50):
        grid = make_grid(config, steps)
        assert_table(grid.timesteps, expected[f"n{steps}.timesteps"])
        assert_table(torch.stack([grid.timesteps] * 2, 1), expected[f"n{steps}.pairs"])
        torch.testing.assert_close(grid.sigmas, expected[f"n{steps}.sigmas"], rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("steps", [4, 8, 50])
def test_each_stream_has_its_own_shift(scheduler, name, steps):
    config, expected = scheduler(name)
    if name == "expo":  # an exponential shift has a mu per stream instead (spec/mova.md 0.12)
        streams = [make_grid(dataclasses.replace(config, exponential_shift_mu=mu), steps) for mu in (1.1, 0.4)]
    else:
        streams = [make_grid(config, steps, shift=shift) for shift in (5.0, 3.0)]
    assert_table(torch.stack([grid.timesteps for grid in streams], 1), expected[f"n{steps}.dual_pairs"])
    torch.testing.assert_close(torch.stack([grid.sigmas for grid in streams], 1), expected[f"n{steps}.dual_pairs_sigmas"], rtol=0, atol=1e-7)


def test_strength_and_dynamic_length(scheduler):
    config, expected = scheduler("default")
    strength = [key for key in expected if "strength" in key and key.endswith("sigmas")][0]
    torch.testing.assert_close(config.sigmas(6, shift=7.0, denoise=0.6), expected[strength], rtol=0, atol=1e-7)
    config, expected = scheduler("expo")
    torch.testing.assert_close(config.sigmas(6, dynamic_length=3600), expected["n6.dyn3600.sigmas"], rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["ckpt", "default", "inverse"])
@pytest.mark.parametrize("dual", [0, 1])
def test_steps_follow_the_training_table(golden, golden_config, name, dual):
    tensors = golden("scheduler")
    config = read_config(ScheduleConfig, golden_config("scheduler")["configs"][name], name)
    shifts = (5.0, 3.0) if dual else (None, None)
    for column, (stream, shift) in enumerate(zip(("visual", "audio"), shifts, strict=True)):
        grid = make_grid(config, 4, shift=shift)
        torch.testing.assert_close(grid.path[:-1], tensors[f"run.{name}.dual{dual}.sigma_from"][:, column], rtol=0, atol=1e-7)
        x, exact = tensors[f"run.x_{stream}"], tensors[f"run.x_{stream}"]
        for k in range(4):
            velocity = tensors[f"run.model_{stream}"][k]
            x = x + velocity * (grid.path[k + 1] - grid.path[k])
            torch.testing.assert_close(x, tensors[f"run.{name}.dual{dual}.{stream}"][k], rtol=0, atol=3e-6)
            key = f"run.{name}.dual{dual}.step_{stream}"
            if key in tensors:
                sigmas = torch.cat((grid.sigmas, torch.tensor([config.final_sigma])))
                exact = exact + velocity * (sigmas[k + 1] - sigmas[k])
                torch.testing.assert_close(exact, tensors[key][k], rtol=0, atol=3e-6)


def test_rounding_to_the_training_table_is_visible(golden):
    tensors = load_file(golden_path("scheduler_rounding_n24.safetensors"))
    grid = make_grid(RELEASE, 24)
    assert_table(grid.timesteps, tensors["timesteps"])
    torch.testing.assert_close(grid.path[:-1], tensors["lookup_sigma"], rtol=0, atol=1e-7)
    torch.testing.assert_close(grid.sigmas, tensors["grid_sigma"], rtol=0, atol=1e-7)
    assert 1.1e-3 < float((grid.path[:-1] - grid.sigmas).abs().max()) < 1.3e-3


def test_released_grid_of_50_steps():
    grid = make_grid(RELEASE, 50)
    for k, timestep in ((0, 1000), (1, 995.947), (17, 906.977), (18, 899.301), (49, 105.035)):
        assert float(grid.timesteps[k]) == pytest.approx(timestep, abs=1e-3)
    torch.testing.assert_close(grid.path[:-1], grid.sigmas, rtol=0, atol=1e-7)
    assert float(grid.path[-1]) == 0
    audio = make_grid(RELEASE, 4, shift=1.0).timesteps
    torch.testing.assert_close(audio, torch.tensor([1000, 750.7485, 501.4970, 252.2455]), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("steps", "schedule", "high"),
    [
        (50, "reference", 18),
        (25, "reference", 9),
        (40, "reference", 15),
        (20, "reference", 8),
        (4, "reference", 2),
        (8, "simple", 3),
        (50, "simple", 18),
        (6, "simple", 3),
    ],
)
def test_expert_switch(steps, schedule, high):
    experts = choose_experts(make_grid(RELEASE, steps, schedule=schedule).timesteps, 900.0)
    assert experts == ["high"] * high + ["low"] * (steps - high)


def test_simple_schedule_is_used_exactly():
    grid = make_grid(RELEASE, 4, schedule="simple")
    torch.testing.assert_close(grid.path, torch.tensor([1, 0.9375, 0.8333333, 0.625, 0]))
    assert torch.equal(grid.path[:-1], grid.sigmas)
    assert float(make_grid(RELEASE, 4, schedule="simple", denoise=0.5).sigmas[0]) == pytest.approx(5 * 0.5 / (1 + 4 * 0.5))


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"steps": 2000}, {"denoise": 0.0}, {"denoise": 1.5}, {"shift": -1.0}, {"shift": float("nan")}, {"schedule": "karras"}]
)
def test_bad_values_are_named(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        make_grid(RELEASE, **({"steps": 4} | wrong))


def test_config_that_describes_no_schedule():
    with pytest.raises(CheckpointError, match="shift"):
        ScheduleConfig(shift=0.0)
    with pytest.raises(CheckpointError, match="exponential_shift_mu"):
        ScheduleConfig(exponential_shift=True).sigmas(4)
