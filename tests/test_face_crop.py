"""Faces followed, steadied and cropped as the reference does, at any frame rate, one frame at a time."""

import itertools
import weakref

import numpy as np
import pytest
import torch

from mova.errors import InputError
from mova.lipsync.face_crop import GREY, crop_face, crop_faces, smooth_boxes
from mova.lipsync.frame_rate import frame_times, to_25_fps
from mova.lipsync.smoothing import median_filter
from mova.lipsync.tracks import follow_faces

NOBODY = np.empty((0, 4))
NAN = float("nan")


def face(x, y=50.0, side=120.0):
    return [x, y, x + side, y + side]


# Tracks


def test_track_matches_reference(golden_syncnet):
    case = golden_syncnet("crop")
    (track,) = follow_faces(case["boxes"], min_side=40)  # the second face is smaller than that
    assert track.first == 0 and np.array_equal(np.arange(len(track.boxes)), case["track_frames"])
    assert np.array_equal(track.boxes, case["track_boxes"])
    assert np.array_equal(track.detected, np.isfinite(case["boxes"][:, 0, 0].numpy()))


def test_small_faces_are_left_out(golden_syncnet):
    boxes = golden_syncnet("crop")["boxes"]
    assert not follow_faces(boxes)
    assert len(follow_faces(boxes, min_side=10)) == 2


def test_two_faces_in_any_order():
    frames = [[face(10 + t), face(400 - t)][:: 1 if t % 2 else -1] for t in range(30)]
    tracks = follow_faces(frames)
    starts = {track.boxes[0, 0]: track.boxes[-1, 0] for track in tracks}
    assert starts == {10: 39, 400: 371}


@pytest.mark.parametrize(("missing", "tracks"), [(24, 1), (25, 2)])
def test_a_gap_is_bridged_within_25_frames(missing, tracks):
    frames = [[face(10)]] * 25 + [NOBODY] * missing + [[face(35)]] * 25
    found = follow_faces(frames)
    assert len(found) == tracks
    if tracks == 1:
        assert np.allclose(np.diff(found[0].boxes[24:50, 0]), 1) and found[0].detected.sum() == 50


@pytest.mark.parametrize(("seen", "tracks"), [(20, 0), (21, 1)])
def test_more_than_20_detections_are_needed(seen, tracks):
    frames = list(itertools.islice(itertools.cycle([[face(10)], NOBODY]), 2 * seen))
    assert len(follow_faces(frames)) == tracks


@pytest.mark.parametrize(("step", "tracks"), [(0.3, 1), (0.4, 0)])
def test_half_of_the_area_must_overlap(step, tracks):
    assert len(follow_faces([[face(120 * step * t)] for t in range(30)])) == tracks


def test_a_track_takes_one_face_of_a_frame_the_nearest():
    frames = [[face(10)]] + [[face(40), face(10)]] * 25
    tracks = follow_faces(frames)
    assert [track.boxes[-1, 0] for track in tracks] == [10, 40] and [track.first for track in tracks] == [0, 1]


def test_no_faces_at_all():
    assert follow_faces([]) == [] and follow_faces([[]] * 40) == [] and follow_faces([[[NAN] * 4]] * 40) == []


def test_faces_of_another_shape_are_refused():
    with pytest.raises(InputError, match="faces of frame 1 are \\[4\\]"):
        follow_faces([NOBODY, face(0)])


# Crops


def test_smoothing_matches_reference(golden_syncnet):
    case = golden_syncnet("crop")
    expected = torch.stack([case["smooth_s"], case["smooth_x"], case["smooth_y"]], dim=1)
    assert torch.equal(smooth_boxes(case["track_boxes"].numpy()), expected)


def test_crops_match_reference(golden_syncnet):
    case = golden_syncnet("crop")
    crops = torch.stack(list(crop_faces(case["frames"], case["boxes"][:, 0])))[::4]  # gaps are filled on the way
    assert crops.dtype == torch.uint8 and (crops.int() - case["crops"].int()).abs().max() <= 1


def test_floats_are_cropped_as_bytes():
    frames = torch.randint(0, 256, (3, 80, 90, 3), dtype=torch.uint8)
    boxes = [face(20, 20, 30)] * 3
    for other in (frames.float() / 255, frames.numpy(), (frames.double() / 255).numpy()):
        assert all(torch.equal(a, b) for a, b in zip(crop_faces(frames, boxes), crop_faces(other, boxes), strict=True))


@pytest.mark.parametrize("count", range(1, 16))
def test_short_tracks_are_steadied_without_shrinking(count):
    assert torch.equal(smooth_boxes(np.array([face(10)] * count)), torch.tensor([[60.0, 70.0, 110.0]] * count, dtype=torch.float64))


def test_beyond_the_picture_is_grey():
    white = torch.full((100, 100, 3), 255, dtype=torch.uint8)
    corner = crop_face(white, 20, 0, 0)
    assert (corner[:70, :] == GREY).all() and (corner[:, :100] == GREY).all() and (corner[90:, 125:] == 255).all()
    for x, y in ((-200, 50), (50, -200), (300, 50), (50, 300), (-200, -200)):
        assert (crop_face(white, 20, x, y) == GREY).all()
        assert (crop_face(white / 255, 20, x, y) == GREY).all()


def test_large_frames_are_taken_one_by_one():
    alive, most = set(), 0

    def film():
        nonlocal most
        for number in range(20):
            frame = torch.zeros(2160, 3840, 3, dtype=torch.uint8)
            alive.add(number)
            weakref.finalize(frame, alive.discard, number)
            most = max(most, len(alive))
            yield frame

    for crop in crop_faces(film(), [face(100, 100, 900)] * 20):
        assert crop.untyped_storage().nbytes() == crop.numel()
    assert most <= 3


@pytest.mark.parametrize(
    ("frames", "boxes", "message"),
    [
        (3, [[NAN] * 4] * 3, "no face in any of 3 boxes"),
        (0, np.empty((0, 4)), "no face in any of 0 boxes"),
        (3, [face(0)] * 2, "boxes for 2 frames, but more frames"),
        (1, [face(0)] * 2, "boxes for 2 frames, but only 1 frames"),
        (3, face(0), "boxes of a face are \\[4\\]"),
        (1, [[50, 50, 10, 90]], "below 1 px"),
        (1, [[10, 10, 10.2, 10.2]], "below 1 px"),
    ],
)
def test_wrong_boxes_are_refused(frames, boxes, message):
    with pytest.raises(InputError, match=message):
        list(crop_faces(torch.zeros(frames, 60, 60, 3, dtype=torch.uint8), boxes))


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (torch.zeros(60, 60), "\\[H,W,3\\] is needed"),
        (torch.zeros(3, 60, 61), "\\[H,W,3\\] is needed"),
        (torch.zeros(60, 60, 3, dtype=torch.int32), "int32"),
        (torch.full((60, 60, 3), NAN), "no numbers"),
        (torch.full((60, 60, 3), 200.0), "Divide by 255"),
    ],
)
def test_wrong_frames_are_refused(frame, message):
    with pytest.raises(InputError, match=message):
        list(crop_faces([frame], [face(10, 10, 20)]))


# Running median


def test_median_has_zeros_beyond_the_ends():
    assert median_filter(torch.tensor([5.0, 9.0, 1.0, 7.0]), 3).tolist() == [5, 5, 7, 1]
    assert median_filter(torch.tensor([5.0, 9.0]), 9).tolist() == [0, 0]


# Frame rate


@pytest.mark.parametrize("fps", [25, 24, 30, 50, 60, 23.976, 12.5, 10, 1, 120])
@pytest.mark.parametrize("count", [1, 2, 6, 193])
def test_nearest_frames_at_25_fps(fps, count):
    made = list(to_25_fps(range(count), frame_times(fps)))
    lasting = count / fps if count > 1 else 1 / 25  # a single frame does not tell how long it lasts
    assert abs(len(made) - max(25 * lasting, 1)) <= 0.5 + 1e-6
    for shown, number in enumerate(made):
        near = abs(number / fps - shown / 25)
        assert near <= 0.5 / fps + 1e-9 or number == count - 1


def test_25_fps_stays_as_it_is():
    assert list(to_25_fps(range(1000), frame_times(25))) == list(range(1000))


def test_times_of_the_file_count():
    assert "".join(to_25_fps("abc", [0.1, 0.15, 0.3])) == "aaaabbccccc"
    assert list(to_25_fps("abcd", [-0.08, -0.04, 0.0, 0.04])) == ["c", "d"]  # before the sound begins


def test_frames_are_not_held():
    source = iter(range(10**9))
    made = to_25_fps(source, frame_times(50))
    assert list(itertools.islice(made, 5)) == [0, 2, 4, 6, 8]
    assert next(source) <= 11


@pytest.mark.parametrize("fps", [0, -24, NAN, float("inf")])
def test_wrong_rates_are_refused(fps):
    with pytest.raises(InputError, match="a number above 0"):
        frame_times(fps)


@pytest.mark.parametrize("times", [[0, 0.04, 0.04], [0, 0.04, 0.02], [0, NAN, 1], [NAN, 0, 1], [0, 0.04], [0, 1, float("inf")]])
def test_wrong_times_are_refused(times):
    with pytest.raises(InputError, match="every frame needs a time"):
        list(to_25_fps("abc", times))
