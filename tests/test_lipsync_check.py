"""One film in, one report out: verdicts, several faces, bad input, memory, SyncNet, pictures, best takes, the command line."""

import json
import sys
import weakref

import numpy as np
import pytest
import torch
from puppet import FPS, SECONDS, drawn_face, drawn_film, opening_curve, puppet, read_photo, voice

from mova.__main__ import main
from mova.errors import InputError, MediaError
from mova.lipsync.best_take import Take, captions, describe_takes, draw_sheet, rate_sync
from mova.lipsync.check import check_lip_sync
from mova.lipsync.film import ImageFrames, open_film
from mova.lipsync.landmarks import GivenLandmarks, open_landmarks
from mova.lipsync.plot import FACE_PANEL, SIZE, draw_report, save_plot
from mova.lipsync.sync_decision import decide
from mova.media import write_clip


def check(seed=1, sound=None, points=None, **given):
    """The report on a drawn face; sound None = its own voice."""
    frames, own = drawn_film(seed)
    return check_lip_sync(frames, voice(seed) if sound is None else sound, 48000, GivenLandmarks(own if points is None else points), **given)


# ---------------------------------------------------------------- verdicts


def test_a_plausible_clip_and_its_json():
    report = check()
    told = json.loads(report.to_json())
    assert report.verdict == told["verdict"] == "plausible" and abs(report.lag_ms) < 15 and report.score > 0.4
    assert (told["frames"], told["speaking_face"], told["method"], told["notes"]) == (193, 1, "motion", [])
    assert told["faces"] == [
        {"face": 1, "verdict": "plausible", "coverage": 1.0, "width_px": 150, "turned_away_frames": 0}
        | {"score": told["score"], "lag_ms": told["lag_ms"], "peak": pytest.approx(report.score, abs=1e-3)}
    ]


def test_a_shifted_and_a_foreign_sound():
    late = check(sound=voice(1, 0.3))
    assert late.verdict == f"out of sync by {late.lag_ms:.0f} ms (sound late)" and late.lag_ms == pytest.approx(300, abs=15)
    foreign = check(sound=voice(4))
    assert foreign.verdict == "not in sync" and foreign.score < 0.5 * check().score


def test_silence_is_no_voice():
    report = check(sound=torch.zeros(2, 48000 * 8))
    assert (report.verdict, report.score, report.lag_ms, report.speaker) == ("no voice", 0, 0, None) and "silent" in report.notes[0]


@pytest.mark.parametrize("seconds", [0.0, 0.5, 2.9])
def test_short_films_are_not_judged(seconds):
    frames, points = drawn_film(1, seconds=seconds)
    report = check_lip_sync(frames, voice(1), 48000, GivenLandmarks(points))
    assert report.verdict == "too short" and report.score == 0 and "3 s" in report.notes[0] and len(report.faces) == 1


def test_four_seconds_are_judged_with_a_note():
    frames, points = drawn_film(1, seconds=4.0)
    report = check_lip_sync(frames, voice(1), 48000, GivenLandmarks(points))
    assert report.verdict == "plausible" and "steadier from 5 s on" in report.notes[0]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.55])
def test_a_face_in_few_frames_is_no_talking_face(share):
    _, points = drawn_film(1)
    points[np.random.default_rng(0).random(len(points)) > share] = np.nan
    report = check(points=points)
    assert (report.verdict, report.score, report.speaker) == ("no talking face", 0, None)
    assert "60% are needed" in report.notes[0]


def test_a_face_missing_now_and_then_is_judged():
    _, points = drawn_film(1)
    points[np.random.default_rng(0).random(len(points)) > 0.8] = np.nan
    report = check(points=points)
    assert report.verdict == "plausible" and abs(report.lag_ms) < 30 and 0.7 < report.faces[0].coverage < 0.9


def test_a_face_too_small_to_judge():
    frames, points = drawn_film(1, width=40)
    report = check_lip_sync(frames, voice(1), 48000, GivenLandmarks(points))
    assert report.verdict == "no talking face" and "40 pixels wide: 64" in report.notes[0]


def test_a_profile_is_no_talking_face():
    _, points = drawn_film(1)
    points[:, 1, 0] = points[:, 454, 0] + 8
    report = check(points=points)
    assert report.verdict == "no talking face" and "seen from the side in 193 frames" in report.notes[0]


@pytest.mark.parametrize("swapped", [False, True])
def test_of_two_faces_the_one_that_speaks_is_found(swapped):
    speaker, listener = drawn_film(1)[1], drawn_film(7, x=120.0, width=100)[1]
    pair = np.stack([listener, speaker] if swapped else [speaker, listener], axis=1)
    for late in (0.0, 0.25):
        report = check(points=pair, sound=voice(1, late))
        assert report.speaker == int(swapped) and len(report.faces) == 2
        assert report.score == report.face.score and report.lag_ms == pytest.approx(1000 * late, abs=15)
        assert report.faces[1 - report.speaker].verdict == "not in sync"


def test_one_finder_of_faces_serves_one_film_after_another():
    given = GivenLandmarks(drawn_film(1)[1])
    reports = [check_lip_sync(drawn_film(1)[0], voice(1), 48000, given) for _ in range(2)]
    assert reports[0].to_json() == reports[1].to_json()


def test_somebody_who_comes_later_counts_from_the_beginning():
    points = np.full((193, 2, 478, 2), np.nan)
    points[:, 0], points[150:, 1] = drawn_film(1)[1], drawn_face(0.2, 120, 180, 100)

    class Growing:
        def begin(self):
            self.frame = -1

        def landmarks(self, frame):
            self.frame += 1
            return points[self.frame, : 1 if self.frame < 150 else 2]

    report = check_lip_sync(drawn_film(1)[0], voice(1), 48000, Growing())
    assert [len(face.opening) for face in report.faces] == [193, 193] and report.faces[1].coverage == pytest.approx(43 / 193)
    assert report.verdict == "plausible" and report.faces[1].verdict == "no talking face"


# ---------------------------------------------------------------- bad input


def test_a_rate_that_no_voice_has_is_refused_before_it_becomes_hours():
    with pytest.raises(InputError, match="has 1 samples a second: voices need 4000"):
        check_lip_sync(drawn_film(1)[0], voice(1), 1, GivenLandmarks(drawn_film(1)[1]))


@pytest.mark.parametrize("sound", [None, torch.zeros(1, 0), torch.zeros(48000), torch.full((1, 48000), torch.nan)], ids=["none", "empty", "1-D", "NaN"])
def test_sounds_that_are_none(sound):
    with pytest.raises(InputError, match=r"^(There is|The sound holds NaN)"):
        check_lip_sync(drawn_film(1)[0], sound, 48000, GivenLandmarks(drawn_film(1)[1]))


def test_films_without_frames_and_with_a_clock_that_stands():
    with pytest.raises(InputError, match="no frames"):
        check_lip_sync([], voice(1), 48000, GivenLandmarks(np.zeros((0, 478, 2))))
    frames, points = drawn_film(1)
    with pytest.raises(InputError, match="the times must rise"):
        check_lip_sync([(0.0, frame) for _, frame in frames], voice(1), 48000, GivenLandmarks(points))


@pytest.mark.parametrize("fps", [0.0, -24.0, float("nan"), float("inf")])
def test_frame_rates_that_are_none(fps):
    with pytest.raises(InputError, match="frame rate"):
        ImageFrames(torch.zeros(2, 8, 8, 3), fps)


@pytest.mark.parametrize("images", [torch.zeros(0, 8, 8, 3), torch.zeros(8, 8, 3), torch.zeros(2, 8, 8, 1), torch.zeros(2, 8, 8, 3, dtype=torch.uint8)])
def test_images_that_are_none(images):
    with pytest.raises(InputError, match=r"\[frames, height, width, 3\]"):
        ImageFrames(images, 24.0)


def test_a_wrong_frame_rate_is_suspected():
    """Played at 16 instead of 24 the film is longer than its sound, and the lips run away from it."""
    _, points = drawn_film(1)
    slow = [(number / 16, np.zeros((8, 8, 3), np.uint8)) for number in range(len(points))]
    report = check_lip_sync(slow, voice(1), 48000, GivenLandmarks(points))
    assert report.verdict != "plausible" and "the frame rate is wrong" in report.notes[-1]


def test_a_sound_longer_than_the_film_is_cut_to_it():
    report = check(sound=voice(1, seconds=20.0))
    assert report.verdict == "plausible" and "20.00 s" in report.notes[0]


@pytest.mark.parametrize(("given", "told"), [({"method": "guess"}, "auto, syncnet, motion"), ({"method": "syncnet"}, "no SyncNet weights")])
def test_methods_that_cannot_be_used(given, told):
    with pytest.raises(InputError, match=told):
        check(**given)


def test_frames_are_taken_one_by_one_and_let_go():
    """4K: a frame is 25 MB, so a film kept whole would be 5 GB."""
    _, points = drawn_film(1, width=600, x=1900, y=1000)
    alive, most = 0, 0

    def gone():
        nonlocal alive
        alive -= 1

    class Frame(np.ndarray):
        pass

    def film():
        nonlocal alive, most
        for number in range(24 * 4):
            frame = np.zeros((2160, 3840, 3), np.uint8).view(Frame)
            weakref.finalize(frame, gone)
            alive += 1
            most = max(most, alive)
            yield number / FPS, frame

    report = check_lip_sync(film(), voice(1), 48000, GivenLandmarks(points))
    assert report.verdict == "plausible" and most <= 2


def test_progress_and_cancel():
    told = []
    check(on_frame=lambda done, total: told.append((done, total)))
    assert told == [(number, 193) for number in range(1, 194)]

    class Cancelled(BaseException):
        pass

    def cancel(done, total):
        if done == 10:
            raise Cancelled

    with pytest.raises(Cancelled):
        check(on_frame=cancel)


# ---------------------------------------------------------------- SyncNet


class Listener:
    """In SyncNet's place: takes its input, and says that one offset fits best."""

    def __init__(self, offset, confidence):
        self.offset, self.confidence = offset, confidence

    def score(self, crops, waveform, *, on_window=None):
        self.crops, self.samples = list(crops), waveform.shape
        on_window and on_window(1, 1)
        distances = torch.full((20, 31), 10.0)
        distances[:, 15 - self.offset] -= self.confidence
        return decide(distances)


@pytest.mark.parametrize(
    ("offset", "confidence", "verdict"),
    [(0, 7.0, "plausible"), (-8, 7.0, "out of sync by 320 ms (sound late)"), (6, 7.0, "out of sync by 240 ms (sound early)"), (0, 1.0, "not in sync")],
)
def test_syncnet_gets_25_crops_a_second_and_tells_the_lag(offset, confidence, verdict):
    listener = Listener(offset, confidence)
    windows = []
    report = check(syncnet=listener, on_window=lambda done, total: windows.append(done))
    assert (report.method, report.verdict, report.lag_ms, windows) == ("syncnet", verdict, -40 * offset, [1])
    assert report.score == pytest.approx(confidence) and report.face.distance == pytest.approx(10 - confidence)
    assert abs(len(listener.crops) - 201) <= 1 and listener.crops[0].shape == (224, 224, 3) and listener.samples == (SECONDS * 16000,)
    curve = report.face.agreement
    assert curve.lags[curve.curve.argmax()] == -40 * offset and "uncompressed" in json.loads(report.to_json())["method_is"]


def test_auto_and_motion_do_without():
    assert check().method == "motion"
    assert check(method="motion", syncnet=Listener(0, 7.0)).method == "motion"


# ---------------------------------------------------------------- pictures


def test_plots_of_every_kind_of_report(tmp_path):
    reports = [
        check(),
        check(sound=voice(1, 0.3)),
        check(syncnet=Listener(3, 5.0)),
        check(sound=torch.zeros(1, 400000)),
        check(points=drawn_film(1)[1] * np.nan),
    ]
    pictures = [np.array(draw_report(report)) for report in reports]
    assert {picture.shape for picture in pictures} == {(*SIZE[::-1], 3)} and len({picture.tobytes() for picture in pictures}) == len(reports)
    for report in reports:
        draw_report(check_lip_sync(drawn_film(1, seconds=0.0)[0], voice(1), 48000, GivenLandmarks(drawn_film(1)[1][:1])))
        save_plot(report, tmp_path / "plot.png")
    with pytest.raises(MediaError, match="gone"):
        save_plot(reports[0], tmp_path / "gone" / "plot.png")
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]


def test_the_face_seen_most_is_shown_where_none_is_judged():
    """The portrait's corner is the paper's colour without one."""
    corner = FACE_PANEL[2] - 5, FACE_PANEL[3] - 5
    for points, seen in ((drawn_film(1)[1], True), (drawn_film(1)[1] * np.nan, False)):
        picture = draw_report(check(points=points, sound=torch.zeros(1, 400000)))
        assert (picture.getpixel(corner) == (90, 90, 90)) == seen


def test_takes_are_ranked_and_shown():
    picture = np.zeros((48, 64, 3), np.uint8)
    good, shifted, foreign = (rate_sync(check(sound=sound)) for sound in (None, voice(1, 0.3), voice(4)))
    assert 1 >= good > 0.5 > shifted > 0 and 0.5 > foreign and rate_sync(check(sound=torch.zeros(1, 400000))) == 0
    takes = [Take(42, picture, "plausible", 3.0, 0.8, 0.2), Take(43, picture, "not in sync", 0.0, 0.2, 1.0), Take(None, picture)]
    assert [take.total(0.5) for take in takes] == [0.5, 0.6, 0] and takes[0].total(0.0) == 0.8 and takes[1].total(1.0) == 1
    assert Take(1, picture, sync=0.3).total(0.9) == 0.3 == Take(1, picture, sound=0.3).total(0.1)
    told = json.loads(describe_takes(takes, 1, 0.5))
    assert told["best"] == 2 and [take["seed"] for take in told["takes"]] == [42, 43, None]
    sheets = [np.array(draw_sheet(takes, best, 0.5)) for best in range(3)]
    assert len({sheet.tobytes() for sheet in sheets}) == 3 and sheets[0].shape == (2 * 321 + 12, 2 * 332 + 12, 3)
    assert draw_sheet(takes[:1], 0, 0.5).width == 332 + 12


def test_captions_stay_below_their_take():
    """The longest there are: a random seed, the longest verdict, both scores."""
    picture = np.zeros((48, 64, 3), np.uint8)
    take = Take(2**64 - 1, picture, "out of sync by 600 ms (sound early)", -600.0, 0.25, 0.75)
    assert captions(63, take, 0.5) == ("64:  0.50   (lips 0.25, sound 0.75)", take.verdict, f"seed {2**64 - 1}")
    sheet = np.array(draw_sheet([take, Take(None, picture)], 1, 0.5)).astype(int)
    between = sheet[:240, 12 + 320 : 24 + 320 - 4]  # up to the frame of the best take
    assert (between == between[0, 0]).all() and (sheet[270:315, 16:330] > 130).all(axis=-1).any(axis=1).sum() > 20


# ---------------------------------------------------------------- films in files, the command line


@pytest.fixture(scope="module")
def speaking(media, tmp_path_factory):
    """A film of the photo puppet, its sound 0.3 s late: (path, landmark bundle)."""
    pytest.importorskip("mediapipe", reason="mediapipe is not installed", exc_type=ImportError)
    task, path = media / "face_landmarker_test.task", tmp_path_factory.mktemp("film") / "late.mp4"
    photo = read_photo(media / "single_person.jpg", (640, 360))
    with open_landmarks(task) as landmarks:
        points = landmarks.landmarks(photo)[0]
    frames = (torch.from_numpy(frame).float()[None] / 255 for _, frame in puppet(photo, points, seed=2, reach=0.16))
    write_clip(path, frames, fps=FPS, audio=voice(2, 0.3), sample_rate=48000)
    return path, task


@pytest.fixture
def command(monkeypatch, capsys):
    """command("clip.mp4", ...) -> exit code, stdout, stderr of check-sync."""

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["mova", "check-sync", *map(str, words)])
        return main(), *capsys.readouterr()

    return command


def test_the_command_line_tells_by_its_exit_code(speaking, command, tmp_path):
    path, task = speaking
    code, told, _ = command(path, "--landmarks", task, "--plot", tmp_path / "plot.png")
    report = json.loads(told)
    assert code == 3 and report["verdict"].endswith("(sound late)") and report["lag_ms"] == pytest.approx(300, abs=20)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_film_is_read_on_the_clock_of_its_sound(speaking):
    frames, waveform, rate = open_film(speaking[0])
    times = [seconds for seconds, _ in frames]
    assert len(frames) == len(times) == 193 and times[0] == pytest.approx(0, abs=0.03) and np.diff(times) == pytest.approx(1 / FPS, abs=1e-4)
    assert rate == 48000 and waveform.shape[1] / rate == pytest.approx(193 / FPS, abs=0.03)
    assert len(list(frames)) == 193  # once more


def test_files_that_cannot_be_checked(command, tmp_path):
    silent = tmp_path / "silent.mp4"
    write_clip(silent, torch.zeros(5, 16, 16, 3), fps=FPS)
    code, told, error = command(silent, "--landmarks", tmp_path / "no.task")
    assert code == 1 and told == "" and "has no sound in it" in error and "Traceback" not in error
    with pytest.raises(MediaError, match="does not exist"):
        open_film(tmp_path / "gone.mp4")
    code, _, error = command(tmp_path / "gone.mp4", "--plot", "plot.gif")
    assert code == 1 and "written as .png" in error


def test_the_curve_of_the_puppet_is_a_curve():
    """The tests above stand on it: it opens and closes, and two seeds have nothing in common."""
    times = np.arange(0, 8, 0.01)
    one, other = opening_curve(times, 1), opening_curve(times, 4)
    assert 0 <= one.min() < 0.05 and 0.8 < one.max() <= 1 and abs(np.corrcoef(one, other)[0, 1]) < 0.3
