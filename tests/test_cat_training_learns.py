"""A small pre-training run on sounds made here learns: the loss falls, a linear probe finds what was learnt, the outside encoder makes it faster."""

import pytest
import torch

from bench.ear_sounds import KINDS, MovementEncoder, make_sound
from bench.ear_training import compare, learn, steps_to

KINDS_HERE, UPDATES, EVERY = 4, 100, 20  # two glides, two tremolos; chance is 0.25


@pytest.fixture(scope="module")
def runs():
    torch.set_num_threads(1)  # the same sums on every machine
    outside = {"with": MovementEncoder(), "without": None}
    return {name: learn(updates=UPDATES, seed=0, external=each, every=EVERY, kinds=KINDS_HERE) for name, each in outside.items()}


@pytest.mark.parametrize("name", ["with", "without"])
def test_the_loss_falls(runs, name):
    first, last = runs[name]["loss"][0][1], runs[name]["loss"][-1][1]
    assert last < 0.6 * first


def test_the_probe_beats_the_untrained_encoder_by_far(runs):
    untrained, trained = runs["with"]["class_token"][0][1], runs["with"]["class_token"][-1][1]
    assert untrained < 0.5 and trained > untrained + 0.2


def test_regularization_gets_there_in_fewer_steps(runs):
    with_it, without = runs["with"]["class_token"], runs["without"]["class_token"]
    assert with_it[-1][1] > without[-1][1] + 0.1
    best = max(value for _, value in without)
    assert steps_to(with_it, best) < UPDATES / 2


def test_steps_to_a_mark():
    without, with_it = [[0, 0.2], [10, 0.4], [20, 0.5], [30, 0.6]], [[0, 0.2], [10, 0.6], [20, 0.55], [30, 0.59]]
    assert steps_to(without, 0.5) == 20 and steps_to(without, 0.7) is None
    found = compare(without, with_it)
    assert {name: mark["ratio"] for name, mark in found.items()} == {"half": 1.0, "three_quarters": 2.0, "whole": 3.0}
    assert compare(without, [[0, 0.2], [10, 0.3]])["whole"] == {"accuracy": 0.6, "without": 30, "with": None, "ratio": None}


def test_sounds_differ_within_a_kind_and_repeat():
    assert torch.equal(make_sound(7), make_sound(7)) and not torch.equal(make_sound(7), make_sound(7 + len(KINDS)))
    assert all(make_sound(number).abs().max() < 0.6 for number in range(24))
