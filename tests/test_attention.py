"""Which kernel computes attention: checked before it is used, refused or skipped where it is wrong."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import mova
from mova import InputError
from mova import attention as attention_module
from mova.attention import KERNELS, attention, attention_kernel, choose_kernel, find_fault

CPU = torch.device("cpu")
SHAPES = frozenset({(2, 24), (3, 16)})
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SDPA = F.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def nothing_known():
    choose_kernel.cache_clear()
    yield
    choose_kernel.cache_clear()


@pytest.fixture
def seen(monkeypatch):
    """Which kernel each call was made under: "flash", or None where PyTorch may choose."""
    calls = []

    def spy(q, k, v, attn_mask=None):
        alone = torch.backends.cuda.flash_sdp_enabled() and not torch.backends.cuda.math_sdp_enabled()
        calls.append(("flash" if alone else None, attn_mask is not None, q.shape))
        return SDPA(q, k, v, attn_mask=attn_mask)

    monkeypatch.setattr(attention_module.F, "scaled_dot_product_attention", spy)
    return calls


@pytest.fixture
def wrong_flash(monkeypatch):
    """wrong_flash(change): flash gives what `change` makes of its result; all others are as they are."""

    def install(change):
        def sdpa(q, k, v, attn_mask=None):
            out = SDPA(q, k, v, attn_mask=attn_mask)
            return change(out) if not torch.backends.cuda.math_sdp_enabled() else out

        monkeypatch.setattr(attention_module.F, "scaled_dot_product_attention", sdpa)

    return install


def qkv(length=7, heads=2, head_dim=24):
    return (*torch.randn(3, 1, length, heads * head_dim), heads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["flash", "math"])
def test_a_kernel_that_agrees_is_taken(name, dtype):
    assert choose_kernel(name, SHAPES, CPU, dtype) == name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "change",
    [lambda out: out * 1.1, lambda out: out.roll(1, dims=1), lambda out: out.where(out < 0, torch.nan)],
    ids=["louder", "heads swapped", "not a number"],
)
def test_a_wrong_kernel_is_refused(change, dtype, wrong_flash):
    wrong_flash(change)
    with pytest.raises(InputError, match=r"'flash' of PyTorch .* computes something else \(relative difference .* on cpu in torch.* choose another"):
        choose_kernel("flash", SHAPES, CPU, dtype)
    assert choose_kernel("math", SHAPES, CPU, torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)


def test_rounding_is_no_fault(wrong_flash):
    wrong_flash(lambda out: out * (1 + 1e-3))
    assert find_fault("flash", SHAPES, CPU, torch.bfloat16) is None and find_fault("flash", SHAPES, CPU, torch.float16) is None
    assert "relative difference 0.001" in find_fault("flash", SHAPES, CPU, torch.float32)


def test_a_kernel_wrong_for_one_shape_is_refused(wrong_flash):
    wrong_flash(lambda out: out * 2 if out.shape[1] == 3 else out)
    assert choose_kernel("flash", frozenset({(2, 24)}), CPU, torch.float32) == "flash"
    with pytest.raises(InputError, match="3 heads of 16"):
        choose_kernel("flash", SHAPES, CPU, torch.float32)


@pytest.mark.parametrize("change", [None, lambda out: out * 1.1])
def test_auto_skips_what_is_missing_or_wrong_and_says_so_once(change, wrong_flash, monkeypatch, caplog):
    monkeypatch.setattr(attention_module, "candidates", lambda device: ("cudnn", "flash"))
    if change:
        wrong_flash(change)
    with caplog.at_level(logging.INFO, "mova"):
        chosen = [choose_kernel("auto", SHAPES, CPU, torch.float32) for _ in range(2)]
    assert chosen == ["auto" if change else "flash"] * 2
    assert "not cudnn, which cannot compute this on cpu" in caplog.records[0].message
    assert len(caplog.records) == 2 and ("not flash, which computes something else" if change else "kernel: flash") in caplog.records[1].message


@pytest.mark.parametrize(("capability", "expected"), [((9, 0), ("cudnn", "flash")), ((8, 9), ("flash",)), ((12, 0), ("flash",))])
def test_what_auto_tries(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert attention_module.candidates(torch.device("cuda")) == expected
    assert attention_module.candidates(CPU) == () and choose_kernel("auto", SHAPES, CPU, torch.float32) == "auto"


def test_running_out_of_memory_is_no_verdict(monkeypatch):
    def fail(*_, **__):
        raise torch.cuda.OutOfMemoryError("as it were")

    monkeypatch.setattr(attention_module.F, "scaled_dot_product_attention", fail)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        choose_kernel("flash", SHAPES, CPU, torch.float32)


def test_each_is_checked_once(seen):
    for _ in range(3):
        with attention_kernel("flash", SHAPES, CPU, torch.float32):
            pass
    assert len(seen) == 2 * 2 * len(SHAPES)  # two lengths, default and flash


def test_only_attention_without_a_bias_is_bound_to_the_kernel(seen):
    q, k, v, heads = qkv()
    with attention_kernel("flash", frozenset({(2, 24)}), CPU, torch.float32):
        seen.clear()
        attention(q, k, v, heads)
        attention(q, k, v, heads, torch.zeros(1, 1, 1, 7))
    attention(q, k, v, heads)
    assert [call[:2] for call in seen] == [("flash", False), (None, True), (None, False)]


def test_what_the_caller_set_is_put_back_after_an_error():
    q, k, v, heads = qkv()
    with pytest.raises(KeyboardInterrupt), attention_kernel("flash", SHAPES, CPU, torch.float32):
        raise KeyboardInterrupt
    assert attention_module.INSISTED.get() is None
    with sdpa_kernel(SDPBackend.MATH):
        attention(q, k, v, heads)
        assert torch.backends.cuda.math_sdp_enabled() and not torch.backends.cuda.flash_sdp_enabled()


def test_the_random_numbers_of_the_caller_are_left_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    choose_kernel("math", SHAPES, CPU, torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_wrong_kernel_is_refused_before_weights_move(tiny_mova, golden, wrong_flash):
    case, denoiser = golden("single_step"), mova.load_denoiser(tiny_mova, residency="stream")
    latents = case["visual_latents"]
    denoiser.attention = "flash"
    wrong_flash(lambda out: out * 2)
    with pytest.raises(InputError, match="flash"):
        denoiser.velocity(latents[:, :16], case["audio_latents"], latents[:, 16:], case["context"], 950.0)
    assert denoiser.residency.empty and denoiser.report().bytes_moved == 0


def test_names():
    assert list(KERNELS) == ["auto", "flash", "cudnn", "memory-efficient", "math"]  # a widget's choices, saved in workflows
    with pytest.raises(InputError, match="telepathy"):
        choose_kernel("telepathy", SHAPES, CPU, torch.float32)
