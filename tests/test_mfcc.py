"""SyncNet's sound front end against the reference, in float64."""

import pytest
import torch

from mova.lipsync import mfcc as front_end
from mova.lipsync.mfcc import cepstra, filter_bank, mfcc

TOLERANCE = 1e-9


@pytest.mark.parametrize("name", ["16000", "399", "400", "401", "5767", "10240", "zero"])
def test_cepstra_match_reference(golden_syncnet, name):
    case = golden_syncnet("mfcc")
    actual, expected = mfcc(case[f"sig_{name}"]), case[f"mfcc_{name}"]
    assert actual.dtype == torch.float64 and actual.shape == expected.shape
    assert (actual - expected).abs().max() < TOLERANCE


def test_filter_bank_matches_reference(golden_syncnet):
    assert torch.equal(filter_bank(), golden_syncnet("mfcc")["filterbank"])


@pytest.mark.parametrize("kind", [torch.int16, torch.float32, torch.float64])
def test_any_kind_of_number_gives_the_same(golden_syncnet, kind):
    samples = golden_syncnet("mfcc")["sig_5767"]
    assert torch.equal(mfcc(samples.to(kind)), mfcc(samples))


@pytest.mark.parametrize("block", [1, 7, 98])
def test_blocks_change_nothing(golden_syncnet, monkeypatch, block):
    samples = golden_syncnet("mfcc")["sig_16000"]
    whole = mfcc(samples)
    monkeypatch.setattr(front_end, "BLOCK", block)
    torch.testing.assert_close(mfcc(samples), whole, rtol=0, atol=TOLERANCE)


def test_columns_alone_equal_those_of_the_whole(golden_syncnet):
    samples = golden_syncnet("mfcc")["sig_16000"]
    whole = mfcc(samples)
    for first, count in ((0, 20), (1, 1), (40, 33), (98, 1)):
        torch.testing.assert_close(cepstra(samples, first, count), whole[:, first : first + count], rtol=0, atol=TOLERANCE)


def test_input_is_not_changed():
    samples = torch.arange(1000.0)
    mfcc(samples)
    assert torch.equal(samples, torch.arange(1000.0))
