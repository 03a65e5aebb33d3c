"""How near a clip comes to a reference: anchors, order of events, the best way through both, and its picture (spec/cat.md 11, N3)."""

import itertools

import pytest
import torch

from cat_encoder import CatError, load, write_demo_encoder
from cat_encoder.listening.compare import (
    EVENTS,
    LONGEST,
    MODES,
    OVERALL,
    cosines,
    events_likeness,
    find_path,
    listen,
    match_to_reference,
    overall_likeness,
    thin,
)
from cat_encoder.listening.timeline import MAP, draw_similarity
from cat_encoder.listening.yardsticks import RATE, add_noise, loudness, make_yardsticks, match_level

BY_MODE = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return load(write_demo_encoder(tmp_path_factory.mktemp("ear") / "demo.safetensors"))


def noise(seconds, seed=0):
    return 0.1 * torch.randn(1, 1, round(seconds * RATE), generator=torch.manual_seed(seed))


def tone(seconds, pitch):
    return 0.1 * torch.sin(2 * torch.pi * pitch * torch.arange(round(seconds * RATE)) / RATE)[None, None] + 0.02 * noise(seconds, 9)


STORY = torch.cat([noise(2), tone(2, 440), tone(2, 3000)], -1)
BACKWARDS = torch.cat([tone(2, 3000), tone(2, 440), noise(2)], -1)


def score(encoder, sound, reference=STORY, mode=OVERALL, **given):
    (match,) = match_to_reference(encoder, sound, RATE, reference, RATE, mode, **given)
    return match.score


# ---------------------------------------------------------------- the way through both


def cheapest(cost):
    """Every way there is, tried."""
    rows, columns = cost.shape

    def ways(row, column):
        if (row, column) == (0, 0):
            yield 2 * float(cost[0, 0])
        for up, left, weight in ((1, 1, 2), (1, 0, 1), (0, 1, 1)):
            if row >= up and column >= left and (row, column) != (0, 0):
                yield from (weight * float(cost[row, column]) + rest for rest in ways(row - up, column - left))

    return min(ways(rows - 1, columns - 1)) / (rows + columns)


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (4, 1), (3, 5), (5, 4)])
def test_the_way_is_the_cheapest_there_is(shape):
    cost = torch.rand(shape, generator=torch.manual_seed(sum(shape)))
    found, way = find_path(cost)
    assert found == pytest.approx(cheapest(cost))
    assert way[0] == (0, 0) and way[-1] == (shape[0] - 1, shape[1] - 1)
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(way)]
    assert set(steps) <= {(0, 1), (1, 0), (1, 1)}
    weights = [2, *(sum(step) for step in steps)]
    assert found == pytest.approx(sum(weight * float(cost[cell]) for weight, cell in zip(weights, way, strict=True)) / sum(shape))


def test_events_may_be_slower_but_not_in_another_order():
    events = torch.eye(6)
    slow, swapped = events.repeat_interleave(3, 0), events[[1, 0, 3, 2, 5, 4]]
    assert events_likeness(events, events) == events_likeness(slow, events) == 1.0
    assert events_likeness(swapped, events) < 0.7 and overall_likeness(swapped, events) == pytest.approx(1)


def test_columns_of_nothing_are_like_nothing():
    assert cosines(torch.zeros(2, 4), torch.ones(3, 4)).abs().max() == 0
    assert overall_likeness(torch.zeros(2, 4), torch.ones(3, 4)) == 0


def test_long_sounds_are_thinned():
    columns = torch.arange(2.0 * LONGEST)[:, None].expand(-1, 3)
    assert torch.equal(thin(columns)[:, 0], torch.arange(LONGEST) * 2 + 0.5) and torch.equal(thin(columns[:10]), columns[:10])
    assert len(thin(columns[: LONGEST + 1])) <= LONGEST


# ---------------------------------------------------------------- the score


@BY_MODE
def test_itself_is_100_and_something_else_is_near_0(encoder, mode):
    assert score(encoder, STORY, mode=mode) == 100
    assert score(encoder, tone(6, 7000), mode=mode) < 25


@BY_MODE
def test_a_little_noise_costs_little(encoder, mode):
    assert score(encoder, add_noise(STORY), mode=mode) > 80


def test_the_order_of_events_counts_where_it_is_asked_for(encoder):
    assert score(encoder, BACKWARDS, mode=OVERALL) > score(encoder, BACKWARDS, mode=EVENTS) + 40


@BY_MODE
def test_loudness_is_matched_unless_it_counts(encoder, mode):
    quiet = STORY * 0.05
    assert score(encoder, quiet, mode=mode) == pytest.approx(100, abs=1)
    assert score(encoder, quiet, mode=mode, match_loudness=False) < 95


def test_a_batch_and_its_references(encoder):
    clips = torch.cat([STORY, BACKWARDS])
    one = match_to_reference(encoder, clips, RATE, STORY, RATE, EVENTS)
    each = match_to_reference(encoder, clips, RATE, clips, RATE, EVENTS)
    assert one[0].score == 100 > one[1].score and [match.score for match in each] == [100, 100]
    with pytest.raises(CatError, match="2 clips cannot be compared with 3 references"):
        match_to_reference(encoder, clips, RATE, torch.cat([clips, STORY]), RATE)


def test_nothing_is_changed_and_every_run_is_the_same(encoder):
    sound, state = STORY.clone(), torch.random.get_rng_state()
    first = match_to_reference(encoder, sound, RATE, STORY, RATE, EVENTS)[0]
    again = match_to_reference(encoder, sound, RATE, STORY, RATE, EVENTS)[0]
    assert torch.equal(sound, STORY) and torch.equal(torch.random.get_rng_state(), state)
    assert first.score == again.score and torch.equal(first.similarity, again.similarity)


@BY_MODE
@pytest.mark.parametrize(
    "sound, rate",
    [(torch.zeros(1, 1, 16000), 16000), (noise(0.5).repeat(1, 7, 1), 48000), (noise(2), 192000), (noise(0.1), 4000)],
    ids=["silence", "seven channels", "192 kHz", "short"],
)
def test_any_sound_has_a_score(encoder, mode, sound, rate):
    for match in (*match_to_reference(encoder, sound, rate, STORY, RATE, mode), *match_to_reference(encoder, STORY, RATE, sound, rate, mode)):
        assert 0 <= match.score <= 100 and match.similarity.isfinite().all() and match.unrelated < match.same <= 1.0001
        assert torch.isfinite(draw_similarity(match, "x")).all()


def test_sound_that_is_none(encoder):
    for sound in (torch.zeros(1, 1, 160), torch.full((1, 1, 16000), float("inf"))):
        with pytest.raises(CatError):
            match_to_reference(encoder, sound, RATE, STORY, RATE)


def test_progress_is_told_for_all_of_the_work_and_may_stop_it(encoder):
    told = []
    match_to_reference(encoder, STORY, RATE, STORY, RATE, on_step=lambda done, total: told.append(done / total))
    assert told == sorted(told) and told[-1] == 1 and len(told) == 7

    class Stop(BaseException):
        pass

    def stop(done, total):
        raise Stop

    with pytest.raises(Stop):
        match_to_reference(encoder, STORY, RATE, STORY, RATE, on_step=stop)


def test_columns_know_their_place_in_the_window(encoder):
    window, longer = encoder.frames // encoder.architecture.patch, noise(15)
    heard = listen(encoder, longer, RATE, None)
    assert torch.equal(heard.places[:window], torch.arange(window)) and heard.places[-1] == window - 1
    assert len(heard.columns) == len(heard.places) == encoder.features(longer, RATE).sounding


# ---------------------------------------------------------------- yardsticks


def test_yardsticks_are_different_sounds_of_one_loudness():
    made = make_yardsticks(1.0, 0.05)
    assert made.shape == (4, 1, RATE) and torch.equal(made, make_yardsticks(1.0, 0.05))
    assert [loudness(sound[None]) for sound in made] == pytest.approx([0.05] * 4, rel=1e-4)
    assert torch.corrcoef(made[:, 0]).fill_diagonal_(0).abs().max() < 0.5


def test_level_of_silence_stays():
    silence = torch.zeros(1, 2, 100)
    assert torch.equal(match_level(silence, 0.1), silence) and torch.equal(match_level(STORY, 0.0), STORY) and torch.equal(add_noise(silence), silence)
    assert loudness(match_level(STORY, 0.2)) == pytest.approx(0.2, rel=1e-4)


# ---------------------------------------------------------------- the picture


@BY_MODE
def test_the_picture_shows_both_times(encoder, mode):
    (match,) = match_to_reference(encoder, STORY[..., : 3 * RATE], RATE, STORY, RATE, mode)
    picture = draw_similarity(match, "Match")
    assert picture.ndim == 3 and picture.shape[-1] == 3 and 0 <= picture.min() and picture.max() <= 1
    assert bool(match.path) == (mode == EVENTS) and match.seconds == (3.0, 6.0)
    bright = picture[48 : 48 + MAP, 125 : 125 + MAP].sum(-1)
    night = bright[0, -1]
    assert (bright[:, MAP // 2 + 2 :] == night).all() and not (bright[:, : MAP // 2] == night).all()  # half as long, so half as wide


@BY_MODE
def test_pictures_of_a_batch_have_one_size(encoder, mode):
    shapes = {draw_similarity(match_to_reference(encoder, clip, RATE, STORY, RATE, mode)[0], "").shape for clip in (STORY, noise(1), noise(9))}
    assert len(shapes) == 1
