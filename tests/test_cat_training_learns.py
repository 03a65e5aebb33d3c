"""A small pre-training run on sounds made here learns: the loss falls, a linear probe finds what was learnt, the outside encoder makes it faster.

The curves over more updates and seeds: python -m bench.ear_training.
"""

import pytest
import torch

from bench.ear_sounds import KINDS, MovementEncoder, labelled, make_sound
from bench.ear_training import compare, learn, steps_to
from cat_encoder.training.probe import fit_probe

RUN = {"updates": 120, "every": 40, "seed": 2, "clips": 480}


@pytest.fixture(scope="module")
def runs():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same sums on every machine
    outside = {"with": MovementEncoder(), "without": None}
    yield {name: learn(external=each, **RUN) for name, each in outside.items()}
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["with", "without"])
def test_the_loss_falls(runs, name):
    first, last = runs[name]["loss"][0][1], runs[name]["loss"][-1][1]
    assert last < 0.5 * first


@pytest.mark.parametrize(("reading", "margin"), [("class_token", 0.15), ("patch_mean", 0.2)])
def test_the_probe_beats_the_untrained_encoder_by_far(runs, reading, margin):
    curve = runs["with"][reading]  # chance is 0.17
    assert curve[0][1] < 0.4 and curve[-1][1] > curve[0][1] + margin


def test_regularization_gets_there_in_fewer_steps(runs):
    with_it, without = runs["with"]["class_token"], runs["without"]["class_token"]
    assert with_it[-1][1] > without[-1][1] + 0.1
    best = max(value for _, value in without)
    assert steps_to(with_it, best) < RUN["updates"]


def test_the_outside_encoder_tells_the_kinds_apart():
    describe = MovementEncoder()
    sets = [[(describe(make_sound(number)[None], 16_000)[0], number % len(KINDS)) for number in numbers] for numbers in (range(300), range(300, 420))]
    (known, classes), (asked, truth) = ((torch.stack([vector for vector, _ in each]), torch.tensor([kind for _, kind in each])) for each in sets)
    assert float((fit_probe(known, classes, len(KINDS))(asked).argmax(1) == truth).float().mean()) > 0.8


def test_steps_to_a_mark():
    without, with_it = [[0, 0.2], [10, 0.4], [20, 0.5], [30, 0.6]], [[0, 0.2], [10, 0.6], [20, 0.55], [30, 0.59]]
    assert steps_to(without, 0.5) == 20 and steps_to(without, 0.7) is None
    found = compare(without, with_it)
    assert {name: mark["ratio"] for name, mark in found.items()} == {"half": 1.0, "three_quarters": 2.0, "whole": 3.0}
    assert compare(without, [[0, 0.2], [10, 0.3]])["whole"] == {"accuracy": 0.6, "without": 30, "with": None, "ratio": None}


def test_sounds_repeat_and_differ_within_a_kind():
    assert torch.equal(make_sound(7), make_sound(7)) and not torch.equal(make_sound(7), make_sound(7 + len(KINDS)))
    mel, kinds = labelled(range(12))
    assert mel.shape == (12, 1, 64, 128) and kinds.tolist() == [0, 1, 2, 3, 4, 5] * 2
