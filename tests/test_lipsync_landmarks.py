"""Finding faces and keeping persons apart: with drawn faces everywhere, and with the real Face Landmarker on real pictures where it is there."""

import sys
import zipfile
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from puppet import SECONDS, drawn_face, opening_curve, puppet, read_photo, voice

from mova.errors import CheckpointError, InputError, MediaError
from mova.lipsync import persons
from mova.lipsync.check import check_lip_sync
from mova.lipsync.face import NOSE, face_width, is_facing, mouth_opening
from mova.lipsync.film import open_film
from mova.lipsync.landmarks import GivenLandmarks, check_face, check_mediapipe, check_task, open_landmarks
from mova.lipsync.persons import PersonTracker, square_around, tile_boxes

# ---------------------------------------------------------------- persons, with drawn faces


class Stage:
    """Faces at known places; a detector for them that sees a face only when it is whole and a tenth as wide as the picture it is given, or wider."""

    def __init__(self, width=1280, height=720):
        self.frame = np.zeros((height, width, 3), np.uint16)  # each pixel tells where it lies, so that the detector knows what part it is given
        self.frame[..., 0], self.frame[..., 1] = np.arange(width), np.arange(height)[:, None]
        self.faces, self.calls = [], 0

    def detect(self, picture):
        self.calls += 1
        (x0, y0), (height, width) = picture[0, 0, :2].astype(int), picture.shape[:2]
        inside = [face - (x0, y0) for face in self.faces]
        seen = [face for face in inside if (face > 0).all() and (face < (width, height)).all() and face_width(face) >= width / 10]
        return np.array(seen).reshape(-1, 478, 2)

    def show(self, tracker, *faces):
        self.faces = list(faces)
        return tracker.landmarks(self.frame)


@pytest.fixture
def stage():
    return Stage()


@pytest.fixture
def tracker(stage):
    return PersonTracker(stage.detect, stage.detect)


def noses(rows):
    return [None if np.isnan(row).any() else tuple(row[NOSE].round()) for row in rows]


def test_two_persons_keep_their_rows_while_they_move(stage, tracker):
    for step in range(40):
        left, right = drawn_face(0.2, 300 + 4 * step, 200, 150), drawn_face(0.4, 1000 - 4 * step, 400, 160)
        rows = stage.show(tracker, *((left, right) if step % 2 else (right, left)))  # detectors list faces in any order
        assert rows.shape == (2, 478, 2)
        assert rows == pytest.approx(np.stack([right, left]))


def test_a_person_who_leaves_is_nobody_and_is_known_again(stage, tracker):
    stays, goes = drawn_face(0.2, 300, 300, 200), drawn_face(0.2, 1000, 300, 200)
    assert len(stage.show(tracker, stays, goes)) == 2
    for _ in range(30):
        rows = stage.show(tracker, stays)
        assert noses(rows).count(None) == 1
    for _ in range(persons.SEARCH_EVERY):
        rows = stage.show(tracker, stays, goes)
    assert rows.shape[0] == 2 and None not in noses(rows)


def test_a_newcomer_gets_a_row_of_their_own(stage, tracker):
    assert stage.show(tracker).shape == (0, 478, 2)
    for _ in range(persons.SEARCH_EVERY):
        rows = stage.show(tracker, drawn_face(0.2, 400, 300, 200))
    assert len(rows) == 1
    for _ in range(persons.SEARCH_EVERY):
        rows = stage.show(tracker, drawn_face(0.2, 400, 300, 200), drawn_face(0.2, 900, 300, 200))
    assert noses(rows) == [(400, 310), (900, 310)]


def test_in_a_new_film_nobody_is_known(stage, tracker):
    for _ in range(2):  # the search of a new film does not wait for its turn
        stage.show(tracker, drawn_face(0.2, 300, 300, 200))
    tracker.begin()
    assert noses(stage.show(tracker, drawn_face(0.2, 1000, 300, 200))) == [(1000, 310)]


def test_two_persons_do_not_share_one_face(stage, tracker):
    """One walks behind the other: the face that is left is taken once."""
    for step in range(30):
        rows = stage.show(tracker, drawn_face(0.2, 300, 300, 200), drawn_face(0.2, 700 - 13 * step, 300, 200))
    rows = stage.show(tracker, drawn_face(0.2, 300, 300, 200))
    assert sum(nose is not None for nose in noses(rows)) == 1


@pytest.mark.parametrize("width", [100, 80, 45])
def test_small_faces_are_found_in_tiles(stage, tracker, width):
    """As a real detector, this one misses them in the whole frame of 1280 pixels."""
    for x in (130, 640, 1150):
        stage.faces = [drawn_face(0.2, x, 350, width)]
        assert len(stage.detect(stage.frame)) == 0
        rows = stage.show(PersonTracker(stage.detect, stage.detect), drawn_face(0.2, x, 350, width))
        assert len(rows) == 1 and rows[0, NOSE, 0] == pytest.approx(x)


@pytest.mark.parametrize(("height", "width"), [(352, 640), (640, 352), (512, 512), (704, 1280), (64, 300), (1, 1)])
@pytest.mark.parametrize("share", persons.TILES)
def test_tiles_lie_in_the_frame_cover_it_and_overlap_by_half(height, width, share):
    side = max(int(min(height, width) * share), 1)
    boxes = list(tile_boxes(height, width, side))
    if (height, width) == (side, side):
        assert boxes == []
        return
    covered = np.zeros((height, width), int)
    for x0, y0, x1, y1 in boxes:
        assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height and (x1 - x0, y1 - y0) == (side, side)
        covered[y0:y1, x0:x1] += 1
    lefts = sorted({box[0] for box in boxes})
    assert covered.min() >= 1 and all(after - before <= side // 2 + 1 for before, after in zip(lefts, lefts[1:], strict=False))


def test_the_square_around_a_face_stays_in_the_frame(stage):
    for x, y, width in ((10, 10, 200), (1270, 710, 200), (640, 360, 2000), (640, 360, 3)):
        x0, y0, x1, y1 = square_around(drawn_face(0.2, x, y, width), stage.frame)
        assert 0 <= x0 < x1 <= 1280 and 0 <= y0 < y1 <= 720


def test_following_costs_one_look_a_frame_between_searches(stage, tracker):
    face = drawn_face(0.2, 640, 300, 300)
    stage.show(tracker, face)
    stage.calls = 0
    for _ in range(persons.SEARCH_EVERY - 1):
        stage.show(tracker, face)
    assert stage.calls == persons.SEARCH_EVERY - 1


# ---------------------------------------------------------------- landmarks computed before


def test_given_landmarks_of_one_or_several_persons():
    one = np.stack([drawn_face(opening) for opening in (0.1, 0.2)])
    assert GivenLandmarks(one).landmarks(None).shape == (1, 478, 2)
    given = GivenLandmarks(np.stack([one, one + 300], axis=1))
    assert given.landmarks(None).shape == (2, 478, 2)
    given.landmarks(None)
    with pytest.raises(InputError, match="landmarks for 2 frames, and the film has more"):
        given.landmarks(None)


@pytest.mark.parametrize("shape", [(5, 468, 2), (5, 478, 3), (478, 2), (0,)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(InputError, match=r"\[frames, 478, 2\]"):
        GivenLandmarks(np.zeros(shape))


# ---------------------------------------------------------------- wrong files, and no MediaPipe


def test_files_that_are_no_bundle_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="not there.*Download face_landmarker.task"):
        check_task(tmp_path / "face_landmarker.task")
    with pytest.raises(CheckpointError, match="is a folder"):
        check_task(tmp_path)
    (tmp_path / "a.task").write_bytes(b"<html>not found</html>")
    with pytest.raises(CheckpointError, match="no MediaPipe bundle.*22 bytes"):
        check_task(tmp_path / "a.task")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "b.task")  # a ZIP as well
    with pytest.raises(CheckpointError, match="no Face Landmarker: face_detector.tflite and face_landmarks_detector.tflite are not in it"):
        check_task(tmp_path / "b.task")


def test_points_that_cannot_be_a_face_are_refused(tmp_path):
    good = np.concatenate([drawn_face(0.2), np.linspace(-1, 1, 478)[:, None]], axis=1)
    check_face(good, tmp_path)
    for points, told in ((good[:468], "468 points"), (good * (1, 1, 0), "points without depth"), (np.roll(good, 100, axis=0), "lips outside of the face")):
        with pytest.raises(CheckpointError, match=told):
            check_face(points, tmp_path)


@pytest.fixture
def bundle(tmp_path):
    """A file that looks like a bundle from outside."""
    with zipfile.ZipFile(tmp_path / "face_landmarker.task", "w") as out:
        out.writestr("face_detector.tflite", b"model")
        out.writestr("face_landmarks_detector.tflite", b"model")
    return tmp_path / "face_landmarker.task"


def test_without_mediapipe_the_sentence_tells_how_to_install_it(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "mediapipe", None)
    with pytest.raises(MediaError, match="not installed: pip install 'mediapipe>=1.0'"), open_landmarks(bundle):
        pass
    with pytest.raises(MediaError, match="not installed"):
        check_mediapipe()


@pytest.mark.parametrize(
    ("complaint", "told"),
    [("libEGL.so.1: cannot open shared object file", "apt-get install libegl1 libgles2"), ("numpy.core.multiarray failed to import", "Install it again")],
)
def test_a_library_that_is_missing_is_told_with_how_to_install_it(bundle, tmp_path, monkeypatch, complaint, told):
    """The package is found, and its C library cannot be loaded, as on a server without a display."""
    package = tmp_path / "path" / "mediapipe"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"raise OSError({complaint!r})")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.delitem(sys.modules, "mediapipe", raising=False)
    with pytest.raises(MediaError, match=f"{complaint}.*{told}"), open_landmarks(bundle):
        pass


# ---------------------------------------------------------------- the real Face Landmarker on real pictures


@pytest.fixture(scope="module")
def task(media):
    pytest.importorskip("mediapipe", reason="mediapipe is not installed: drawn faces cover the logic", exc_type=ImportError)
    return media / "face_landmarker_test.task"


@pytest.fixture
def find(task):
    """find(picture) -> the faces in it; a new film each time."""
    with ExitStack() as opened:
        yield lambda picture: opened.enter_context(open_landmarks(task)).landmarks(picture)


@pytest.mark.parametrize("size", [None, (640, 360)])
def test_the_photo_shows_one_face_with_an_open_mouth(find, media, size):
    """In the whole frame the opening is 0.22; how the face is cut out moves it by up to 0.05 (spec/lipsync.md C.2)."""
    (face,) = find(read_photo(media / "single_person.jpg", size))
    assert 0.2 < mouth_opening(face) < 0.28 and is_facing(face)
    assert face_width(face) == pytest.approx(338 if size is None else 113, abs=4)


def test_two_small_faces_are_found_in_a_wide_picture(find, media):
    """The whole frame shows neither to the detector. One of the two is seen from the side."""
    faces = find(read_photo(media / "multi_person.png"))
    assert sorted(face_width(face) > 150 for face in faces) == [True, True] and sorted(map(is_facing, faces)) == [False, True]


def test_a_still_picture_gives_still_landmarks(task, media):
    picture = read_photo(media / "single_person.jpg", (640, 360))
    with open_landmarks(task) as landmarks:
        openings = [mouth_opening(landmarks.landmarks(picture)[0]) for _ in range(8)]
    assert np.ptp(openings[1:]) < 1e-6


def test_a_frame_without_a_face_and_a_very_small_one(find):
    assert find(np.full((352, 640, 3), 127, np.uint8)).shape == (0, 478, 2)
    assert find(np.zeros((1, 1, 3), np.uint8)).shape == (0, 478, 2)


@pytest.mark.parametrize("damage", ["truncated", "landmarks are the detector", "empty models"])
def test_a_wrong_bundle_is_refused_with_a_sentence(task, media, tmp_path, damage):
    wrong = tmp_path / "wrong.task"
    if damage == "truncated":
        wrong.write_bytes(task.read_bytes()[:-100_000])
    else:
        with zipfile.ZipFile(task) as bundle, zipfile.ZipFile(wrong, "w") as out:
            for name in bundle.namelist():
                source = "face_detector.tflite" if name.endswith("landmarks_detector.tflite") and damage.startswith("landmarks") else name
                out.writestr(name, b"" if damage == "empty models" and name.endswith(".tflite") else bundle.read(source))
    with pytest.raises(CheckpointError, match=r"wrong\.task.*Download face_landmarker.task"), open_landmarks(wrong) as landmarks:
        landmarks.landmarks(read_photo(media / "single_person.jpg", (640, 360)))


class Recorded:
    """Landmarks as they come, kept to be given again."""

    def __init__(self, landmarks):
        self.live, self.rows, self.begin = landmarks, [], landmarks.begin

    def landmarks(self, frame):
        rows = self.live.landmarks(frame)
        self.rows.append(rows[:1])
        return rows


def test_the_photo_puppet_is_measured(task, media):
    """The lip of the photo follows a known curve: the lag is 0 +- 20 ms, moves by 200 +- 15 ms with the sound, and a foreign voice scores lower."""
    photo = read_photo(media / "single_person.jpg", (640, 360))
    with open_landmarks(task) as landmarks:
        frames = list(puppet(photo, landmarks.landmarks(photo)[0], seed=1))
        recorded = Recorded(landmarks)
        own = check_lip_sync(frames, voice(1), 48000, recorded)
    rows = np.concatenate(recorded.rows)
    true = opening_curve(np.array([seconds for seconds, _ in frames]), 1)
    assert np.corrcoef(own.faces[0].opening, true)[0, 1] > 0.98
    assert own.verdict == "plausible" and abs(own.lag_ms) < 20 and len(own.faces) == 1
    for late in (0.2, -0.2):
        moved = check_lip_sync(frames, voice(1, late), 48000, GivenLandmarks(rows))
        assert moved.lag_ms - own.lag_ms == pytest.approx(1000 * late, abs=15) and moved.verdict.startswith("out of sync by")
    foreign = [check_lip_sync(frames, voice(other), 48000, GivenLandmarks(rows)) for other in (11, 12, 13)]
    assert max(report.score for report in foreign) < 0.6 * own.score


def test_the_real_clip_of_a_cat_has_no_talking_face(task, media):
    film, waveform, rate = open_film(media / "mova_cat.mp4")
    with open_landmarks(task) as landmarks:
        report = check_lip_sync(film, waveform, rate, landmarks)
    assert (report.verdict, report.score, report.frames) == ("no talking face", 0, 193)
    assert report.seconds == pytest.approx(SECONDS, abs=0.1) and report.notes
