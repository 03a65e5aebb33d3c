"""The feeder hides transfers as far as the formula says; tolerances leave room for a busy machine."""

import pytest

from bench import overlap

COMPUTE = 0.04


def stalled(pattern, slabs, layers=16):
    """(as it was, as predicted): the share of the time in which nothing is computed."""
    transfers = [COMPUTE * part for part in pattern]
    return [1 - layers * COMPUTE / play(transfers, COMPUTE, slabs, layers) for play in (overlap.run, overlap.predict)]


@pytest.mark.parametrize("slabs", [2, 3])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 2.0])
def test_hidden_as_long_as_arrival_keeps_up_with_compute(ratio, slabs):
    measured, predicted = stalled([ratio], slabs)
    assert predicted == pytest.approx(max(0.0, 1 - 1 / ratio), abs=0.05)
    assert measured == pytest.approx(predicted, abs=0.15)


def test_uneven_arrival_takes_one_slab_more():
    pattern = overlap.ARRIVALS["uneven"]
    assert overlap.slabs_needed(pattern, 1) == 3
    (two, expected), (three, nothing) = stalled(pattern, 2), stalled(pattern, 3)
    assert expected > 0.12 and nothing == pytest.approx(0, abs=0.02)
    assert two > three


def test_one_slab_hides_nothing():
    measured, predicted = stalled([0.5], 1)
    assert predicted == pytest.approx(1 / 3, abs=0.03) and measured > 0.25
