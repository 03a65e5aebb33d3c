"""What the released size costs, counted without computing it: the bars of spec/performance.md 1.7 and 5.1."""

import pytest
import torch

from bench import ledger
from bench.counting import GPUKernels, Ledger
from mova.denoiser import activation_bytes
from mova.residency import SLABS
from mova.work import forward_work

# Device bytes of a streamed guided step.
DEVICE = {"360p": 6.0e9, "720p": 10.7e9}
DEVICE_WITH_UNPADDED_PROMPTS = {"360p": 6.0e9, "720p": 13.5e9}


@pytest.fixture(scope="module")
def full():
    return ledger.build_denoiser(40, 30)


@pytest.fixture(scope="module")
def observed():
    """The first and a later step at both sizes."""
    two = ledger.build_denoiser(2, 1)
    return {size: ledger.observe_steps(two, latents, ledger.TEXT) for size, latents in ledger.LATENTS.items()}


@pytest.fixture(scope="module")
def streaming(full):
    return ledger.count_streaming(full)


@pytest.mark.parametrize("size", ledger.LATENTS)
def test_flops_equal_the_closed_form_and_the_published_table(full, observed, size):
    first, later = (step.flops for step in observed[size])
    closed = {name: ledger.BRANCHES * work.total for name, work in forward_work(full.parts, ledger.video_tokens(size), ledger.AUDIO, ledger.TEXT).items()}
    shared = closed.keys() - {"patch, head, text"}  # both branches begin from one embedding
    assert {name: first[name] for name in shared} == pytest.approx({name: closed[name] for name in shared}, rel=2e-3)
    assert first["self-attention"] == closed["self-attention"] and first["feed-forward"] == closed["feed-forward"]
    assert sum(first.values()) == pytest.approx(ledger.PUBLISHED[size], rel=5e-4)
    assert sum(later.values()) < sum(first.values())  # the keys of the prompts stay


def test_collapsed_padding_saves_attention_to_the_prompt_only(observed):
    usual = ledger.observe_steps(ledger.build_denoiser(2, 1), ledger.LATENTS["360p"], ledger.REAL_TEXT)[1].flops
    whole = observed["360p"][1].flops
    saved = {name for name in whole if usual[name] < whole[name]}
    assert saved == {"cross-attention", "audio tower"}
    assert 0.99 < sum(usual.values()) / ledger.PUBLISHED["360p"] < 1


@pytest.mark.parametrize("size", ledger.LATENTS)
def test_a_layer_holds_little_beside_the_tokens(observed, size):
    found = ledger.describe_activations(observed[size][1], size)
    assert 2 < found["layer_peak_u"] <= 2.5  # the reference holds 12
    assert 4 < found["step_peak_u"] <= 4.5
    assert found["video_block_traffic_u"] <= 73  # the reference moves 71 to 125


def test_each_weight_travels_once_per_step_in_a_few_copies_per_layer(streaming):
    assert streaming["first_step_bytes"] <= 36.3e9 and streaming["later_step_bytes"] <= 32e9
    assert streaming["steps_equal"], "both experts, and every later step, move the same"
    assert streaming["later_step_copies"] <= 4 * 40 and streaming["first_step_copies"] <= 5 * 40
    assert streaming["tensors_made_in_the_loop"] == 0


@pytest.mark.parametrize("size", ledger.LATENTS)
def test_a_streamed_step_fits_small_devices(full, streaming, observed, size):
    device = ledger.count_device(full.parts, streaming, observed[size][0].peak_bytes, size)
    assert device["sum"] <= DEVICE[size] and device["while_prompts_are_read"] < device["sum"]
    assert device["sum_with_unpadded_prompts"] <= DEVICE_WITH_UNPADDED_PROMPTS[size]


@pytest.mark.parametrize("size", ledger.LATENTS)
def test_the_estimate_is_just_above_the_ledger(full, streaming, observed, size):
    """What mova.estimate adds up for a streamed step on a GPU with two slabs."""
    counted = ledger.count_device(full.parts, streaming, observed[size][0].peak_bytes, size)["sum_with_unpadded_prompts"]
    predicted = SLABS * max(full.residency.sizes) + activation_bytes(full, ledger.video_tokens(size), ledger.BRANCHES, 1, ledger.TEXT)
    assert 1 < predicted / counted < 1.07


def test_little_memory_of_the_host_is_taken_for_good(streaming):
    assert streaming["pinned_bytes"] + ledger.PROCESS_BYTES <= 3e9


def test_the_ledger_sees_what_is_live_and_what_moves():
    x = torch.empty(1, 1000, 64, device="meta", dtype=torch.bfloat16)
    unit = x.nbytes
    with torch.no_grad(), GPUKernels(), Ledger() as seen:
        y = x * 2  # reads and writes a unit
        assert (seen.live, seen.peak, seen.traffic) == (unit, unit, 2 * unit)
        y[:, :500] = x[:, :500]  # half of each, and nothing new
        assert (seen.live, seen.traffic) == (unit, 3 * unit)
        heads = y.unflatten(-1, (4, -1)).transpose(1, 2)
        attended = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
        assert seen.traffic == 3 * unit and unit * 2 <= seen.live < unit * 2.2  # never heads x rows x rows
        del y, heads, attended
    assert seen.live == 0
