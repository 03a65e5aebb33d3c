"""Words for sounds, the verdict on what is wanted and unwanted, tags over time and their pictures (spec/cat.md 11)."""

import json

import pytest
import torch

from cat_encoder import CatError, load, write_demo_encoder
from cat_encoder.labels import audioset
from cat_encoder.listening.aliases import Vocabulary, families, read_table
from cat_encoder.listening.sound_check import check_sound, judge, read_wish
from cat_encoder.listening.tagging import tag_sound, to_json
from cat_encoder.listening.timeline import draw_timeline, marks, spread_out

LABELS = [name for _, name in audioset()]


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary(LABELS)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return load(write_demo_encoder(tmp_path_factory.mktemp("ear") / "demo.safetensors"))


@pytest.fixture
def meant(vocabulary):
    """meant("dog, rain") -> the first label of each sound that was understood."""
    return lambda text: [sound.labels[0] for sound in vocabulary.read(text).sounds]


# ---------------------------------------------------------------- words


def test_every_alias_and_family_points_to_existing_labels():
    groups = read_table()["groups"]
    assert {label for group in groups for label in group["labels"]} <= set(LABELS)
    assert all(group["labels"] and group["words"] for group in groups)
    assert families().keys() | {label for members in families().values() for label in members} <= set(LABELS)


def test_every_alias_is_found_as_it_is_written(vocabulary):
    for group in read_table()["groups"]:
        for words in group["words"]:
            (sound,) = vocabulary.read(words).sounds
            assert set(group["labels"]) <= set(sound.labels), words


def test_every_label_means_itself(vocabulary):
    for label in LABELS:
        (sound,) = vocabulary.read(label).sounds
        assert label in sound.labels


@pytest.mark.parametrize(
    "text, labels",
    [
        ("Bark, Rain", ["Bark", "Rain"]),
        ("dog barking in heavy rain", ["Bark", "Rain"]),
        ("Dogs; BIRDS\nhorses", ["Dog", "Bird", "Horse"]),
        ("Male speech, man speaking, Vehicle horn, car horn, honking", ["Male speech, man speaking", "Vehicle horn, car horn, honking"]),
        ("car horn", ["Vehicle horn, car horn, honking"]),
        ("footsteps / a door slams", ["Walk, footsteps", "Slam"]),
        ("geese, wolves and mice", ["Goose", "Howl", "Rodents, rats, mice"]),
        ("humming, hum", ["Humming", "Hum"]),
        ("狗叫，雨声和海浪的声音", ["Bark", "Rain", "Waves, surf"]),
        ("", []),
    ],
)
def test_words_that_are_understood(meant, text, labels):
    assert meant(text) == labels


def test_plurals_and_verb_forms_of_labels(meant):
    forms = {"trains": "Train", "sneezes": "Sneeze", "coughing": "Cough", "violins": "Violin, fiddle", "thundering": "Thunder", "splashed": "Splash, splatter"}
    assert {word: meant(word)[0] for word in forms} == forms


@pytest.mark.parametrize("word", ["glasses of water", "care", "bassoonist", "string theory", "note"])
def test_words_are_not_taken_apart(meant, word):
    assert not {"Car", "Bass guitar", "Bass drum", "Singing"} & set(meant(word))


def test_unknown_words_are_told_with_what_was_perhaps_meant(vocabulary):
    reading = vocabulary.read("a wibbling flibber near the dog, knoking")
    assert [sound.words for sound in reading.sounds] == ["dog"] and reading.unknown == ("wibbling flibber near", "knoking")
    assert vocabulary.suggest("knoking") == " (did you mean knocking?)" and vocabulary.suggest("flibber") == ""


@pytest.mark.parametrize("text", ["no music or speech but rain", "rain, without music or speech", "没有音乐和说话，雨声"])
def test_negated_sounds(vocabulary, text):
    sounds = vocabulary.read(text).sounds
    assert {(sound.labels[0], sound.negated) for sound in sounds} == {("Music", True), ("Speech", True), ("Rain", False)}


def test_labels_of_another_classifier(vocabulary):
    own = Vocabulary(["kick", "snare", "Rain"])
    assert [sound.labels for sound in own.read("kicks, snare, downpour").sounds] == [("kick",), ("snare",), ("Rain",)]
    assert own.read("dog").unknown == ("dog",) and not Vocabulary([]).read("dog").sounds


# ---------------------------------------------------------------- wanted and unwanted

TIMES = torch.arange(7.0)  # windows of 2 s over 8 s


def scores_with(**heard):
    """[7, 527] as an AudioSet head gives them, low and uneven, with labels that stand out: name=(odds, windows); "_" is a space."""
    odds = -8 + 1.3 * torch.randn(7, len(LABELS), generator=torch.manual_seed(0))
    for name, (value, windows) in heard.items():
        odds[windows, LABELS.index(name.replace("_", " "))] = value
    return torch.sigmoid(odds)


def verdict(scores, wanted="", unwanted="", strictness=0.5, labels=LABELS, usual=None):
    usual = torch.full((len(labels),), -8.0) if usual is None else usual
    return judge(scores, TIMES, labels, read_wish(Vocabulary(labels), wanted, unwanted), strictness, 8.0, usual)


def test_heard_missing_and_unwanted_with_their_seconds():
    check = verdict(scores_with(Rain=(-1.0, slice(None)), Music=(-1.5, [3])), "rain, thunder", "music, siren")
    assert not check.passed and 0 < check.score < 0.3
    assert [(item.sound.words, item.heard) for item in check.found] == [("rain", True), ("thunder", False), ("music", True), ("siren", False)]
    assert check.found[0].spans == ((0.0, 8.0),) and check.found[2].spans == ((3.0, 5.0),) and check.found[0].rank == 1
    lines = str(check).splitlines()
    assert lines[0].startswith("not passed, score 0.") and lines[1] == "heard: rain at 0.0-8.0 s, rank 1"
    assert lines[2].startswith("missing: thunder") and lines[3] == "unwanted: music at 3.0-5.0 s, rank 2"


def test_everything_as_wished_passes():
    check = verdict(scores_with(Rain=(-1.0, slice(None))), "rain", "Music, Speech")
    assert check.passed and check.score > 0.7


def test_faint_scores_count_when_they_stand_out():
    """Nothing near 0.5: what counts is the rank and the distance to the other labels."""
    scores = scores_with(Rain=(-2.5, [2])) * 0.2
    assert scores.max() < 0.02 and verdict(scores, "rain").passed


def test_high_scores_do_not_count_when_all_are_high():
    odds = 3 + torch.randn(7, len(LABELS), generator=torch.manual_seed(1))
    check = verdict(torch.sigmoid(odds), "rain, dog barking", "music, speech")
    assert not any(item.heard for item in check.found)


def test_a_flat_classifier_hears_nothing():
    for value in (0.0, 0.5, 1.0):
        assert not verdict(torch.full((7, len(LABELS)), value), "rain").passed


def test_noise_alone_rarely_counts():
    """Random odds, 40 clips: the highest of 527 lies about 3 spreads above the middle."""
    heard = 0
    for seed in range(40):
        scores = torch.sigmoid(-8 + torch.randn(7, len(LABELS), generator=torch.manual_seed(seed)))
        heard += verdict(scores, "rain").passed
    assert heard <= 1


def test_score_grows_with_the_sound_and_falls_with_the_unwanted():
    scores = [verdict(scores_with(Rain=(odds, [2])), "rain", "music").score for odds in (-7, -5, -4, -2)]
    assert scores == sorted(scores) and scores[0] < 0.1 < 0.65 < scores[-1]
    worse = [verdict(scores_with(Rain=(-2, [2]), Music=(odds, [5])), "rain", "music").score for odds in (-8, -4, -2)]
    assert worse == sorted(worse, reverse=True) and worse[-1] < 0.2


def test_a_label_that_is_high_on_anything_has_to_rise():
    """Speech and Music score high on most sounds of many classifiers."""
    scores, usual = scores_with(Music=(-2.0, slice(None)), Rain=(-2.0, [1])), torch.full((527,), -8.0)
    usual[LABELS.index("Music")] = -2.2
    found = verdict(scores, "rain", "music", usual=usual).found
    assert [item.heard for item in found] == [True, False] and found[1].rank <= 2
    assert verdict(scores_with(Music=(1.0, [3])), unwanted="music", usual=usual).found[0].heard


def test_strictness_moves_the_border():
    scores = scores_with(Rain=(-3.4, [2]))  # about 3.5 spreads
    assert [verdict(scores, "rain", strictness=strictness).passed for strictness in (0.0, 1.0)] == [True, False]


def test_any_label_of_a_word_counts():
    check = verdict(scores_with(Bark=(-1.0, [4])), "dog")
    assert check.passed and check.found[0].label == "Bark" and "heard: dog (Bark) at 4.0-6.0 s" in str(check)


def test_what_belongs_to_a_wanted_sound_is_not_unwanted():
    check = verdict(scores_with(Piano=(-1.0, slice(None)), Music=(0.0, slice(None))), "piano", "Music, Speech")
    assert check.passed and [item.sound.words for item in check.found] == ["piano", "speech"]
    assert "not counted: music, because piano is wanted, which is music too" in str(check)
    assert not verdict(scores_with(Rain=(-1.0, slice(None)), Music=(0.0, slice(None))), "rain", "Music").passed


def test_no_music_among_the_wanted_is_unwanted_music():
    check = verdict(scores_with(Rain=(-1.0, [0]), Music=(0.0, [1])), "rain, no music")
    assert [(item.sound.words, item.wanted) for item in check.found] == [("rain", True), ("music", False)] and not check.passed


def test_what_is_not_understood_never_passes_silently():
    check = verdict(scores_with(), "flibber", "music")
    assert not check.passed and "not known as a sound: flibber" in str(check)
    assert verdict(scores_with(Rain=(-1.0, [0])), "rain, flibber").passed  # what is known is judged
    nothing = verdict(scores_with(), "flibber")
    assert (nothing.score, nothing.passed, nothing.found) == (0.0, False, ())


def test_nothing_to_listen_for_and_nothing_to_compare_with():
    with pytest.raises(CatError, match="name sounds that are wanted"):
        verdict(scores_with(), " ", "")
    with pytest.raises(CatError, match="nothing to compare it with"):
        verdict(torch.full((7, 1), 0.5), "rain", labels=["Rain"])


def test_few_labels():
    labels = ["dog", "rain", "kick", "snare", "hum"]
    scores = torch.sigmoid(torch.tensor([[-4.0, 2.0, -4.5, -5.0, -3.8]])).expand(7, -1)
    assert verdict(scores, "rain", "kick", labels=labels).passed and not verdict(scores, "hum", labels=labels).passed


def test_check_reads_every_clip_of_a_batch(encoder):
    steps = []
    sound = torch.stack([torch.zeros(1, 24000), 0.1 * torch.randn(1, 24000, generator=torch.manual_seed(0))])
    before = sound.clone()
    checks = check_sound(encoder, sound, 8000, "rain", "music", on_step=lambda done, total: steps.append((done, total)))
    assert len(checks) == 2 and all(0 <= check.score <= 1 for check in checks) and torch.equal(sound, before)
    assert steps[-1][0] == steps[-1][1] and [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert checks[1].score == check_sound(encoder, sound[1:], 8000, "rain", "music")[0].score


@pytest.mark.parametrize("shape, rate", [((1, 7, 9600), 48000), ((1, 1, 96000), 192000), ((1, 2, 400), 16000), ((1, 1, 8000), 8000)])
def test_any_sound(encoder, shape, rate):
    sound = 0.1 * torch.randn(shape, generator=torch.manual_seed(0))
    assert check_sound(encoder, sound, rate, "rain")[0].found and tag_sound(encoder, sound, rate)[0].names


def test_sound_that_is_none(encoder):
    for sound in (torch.zeros(1, 1, 160), torch.full((1, 1, 16000), float("nan"))):
        with pytest.raises(CatError):
            check_sound(encoder, sound, 16000, "rain")


def test_an_encoder_without_tags(encoder, tmp_path):
    from cat_encoder import read_checkpoint, write_checkpoint

    checkpoint = read_checkpoint(write_demo_encoder(tmp_path / "demo.safetensors"))
    checkpoint.head, checkpoint.labels = {}, []
    bare = load(write_checkpoint(tmp_path / "bare.safetensors", checkpoint))
    with pytest.raises(CatError, match="no head"):
        check_sound(bare, torch.randn(1, 1, 16000), 16000, "rain")
    with pytest.raises(CatError, match="no head"):
        tag_sound(bare, torch.randn(1, 1, 16000), 16000)


# ---------------------------------------------------------------- tags and pictures


def test_tags_are_the_encoders_own(encoder):
    sound = 0.1 * torch.randn(1, 1, 5 * 16000, generator=torch.manual_seed(0))
    (tags,) = tag_sound(encoder, sound, 16000, top_k=7)
    (expected,) = encoder.tags(sound, 16000, top_k=7)
    assert list(tags.names) == [name for name, _ in expected] and tags.scores == pytest.approx([score for _, score in expected], abs=1e-6)
    scores, times = encoder.scores_over_time(sound, 16000, window=2.0, hop=1.0)
    assert torch.equal(tags.over_time, scores[0][:, [LABELS.index(name) for name in tags.names]].T) and torch.equal(tags.times, times)
    assert str(tags).splitlines()[0] == f"{tags.names[0]} {tags.scores[0]:.2f}"


def test_tags_as_data(encoder):
    clips = json.loads(to_json(tag_sound(encoder, torch.zeros(2, 1, 48000), 16000, top_k=3, window=1.0)))["clips"]
    assert len(clips) == 2 and clips[0].keys() == {"seconds", "window_seconds", "times", "tags"} and clips[0]["seconds"] == 3.0
    assert all(len(tag["over_time"]) == len(clips[0]["times"]) for tag in clips[0]["tags"]) and len(clips[0]["tags"]) == 3


def test_only_some_sounds(encoder):
    (tags,) = tag_sound(encoder, torch.zeros(1, 1, 16000), 16000, only="dog, rain")
    assert set(tags.names) <= {label for word in ("dog", "rain") for label in Vocabulary(LABELS).read(word).sounds[0].labels} and len(tags.names) > 3
    with pytest.raises(CatError, match="'flibber' names no sound"):
        tag_sound(encoder, torch.zeros(1, 1, 16000), 16000, only="flibber")


def test_timeline_is_bright_where_the_sound_is():
    scores = torch.zeros(2, 7)
    scores[0, 2], scores[1, 5] = 0.8, 0.4
    picture = draw_timeline(["rain", "a name that is much too long for the room it has on the left"], scores, TIMES, 2.0, 8.0, "Sound tags")
    assert picture.shape[1:] == (960, 3) and picture.dtype == torch.float32 and 0 <= picture.min() and picture.max() <= 1
    rows = picture[[48 + 15, 48 + 45], 250:890].sum(-1)  # [2, px] in the middle of each row
    centre = ((TIMES + 1) / 8 * 640).long()
    assert rows[0].argmax() in range(int(centre[2]) - 60, int(centre[2]) + 60) and rows[0, centre[2]] > rows[1, centre[5]] > rows[0, centre[5]]


def test_a_long_timeline_loses_no_peak():
    values = torch.zeros(1, 5000)
    values[0, 3210] = 1
    spread = spread_out(values.numpy(), torch.arange(5000).numpy() + 1.0, 5001.0, 640)
    assert spread.shape == (1, 640) and spread.max() == 1 and spread.argmax() == pytest.approx(3211 / 5001 * 640, abs=2)


@pytest.mark.parametrize("seconds", [0.025, 0.5, 1.0, 8.04, 61.0, 3600.0, 100_000.0])
def test_axes_have_a_few_round_marks(seconds):
    assert 1 <= len(marks(seconds)) <= 11 and marks(seconds)[-1] <= seconds
