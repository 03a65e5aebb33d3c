"""SyncNet: the network against the reference, what it decides, its weight files, and what is refused."""

import os
import pickle
import weakref

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from syncnet_formula import formula_weights

from mova.errors import CheckpointError, InputError
from mova.lipsync.sync_decision import LABEL, decide, window_distances
from mova.lipsync.syncnet import SAMPLES_PER_FRAME, SyncNet, SyncNetwork, film_chunks, load_syncnet

CASES = ["zero", "audio_late_4", "audio_early_6", "noise", "vshift10"]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # values reach 8 to 18
NAN = float("nan")


@pytest.fixture(scope="module")
def weights():
    return formula_weights()


@pytest.fixture(scope="module")
def weights_file(weights, tmp_path_factory):
    file = tmp_path_factory.mktemp("syncnet") / "syncnet.safetensors"
    save_file(weights, file)
    return file


@pytest.fixture(scope="module")
def syncnet(weights_file):
    return load_syncnet(weights_file)


def film(count, seed=0):
    return torch.randint(0, 256, (count, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def sound(frames, seed=0):
    return torch.randn(frames * SAMPLES_PER_FRAME, generator=torch.Generator().manual_seed(seed)) * 0.1


# Network


def test_formula_gives_values_that_were_written_down(weights):
    assert sum(tensor.numel() for key, tensor in weights.items() if "running" not in key and "num_batches" not in key) == 13_631_616
    bound = (6 / 735) ** 0.5
    assert weights["netcnnlip.0.weight"].abs().max() <= bound and weights["netcnnlip.0.weight"].std() == pytest.approx(bound / 3**0.5, rel=0.01)
    assert 1e4 < weights["netcnnlip.1.running_var"].min() < weights["netcnnlip.1.running_var"].max() < 3e4


def test_lips_match_reference(syncnet, golden_syncnet):
    case = golden_syncnet("unit")
    torch.testing.assert_close(syncnet.embed_lips(case["frames"].flip(-1)), case["lip_out"], **CLOSE)  # the reference is BGR
    with torch.no_grad():
        features = syncnet.network.lip_features(case["frames"].float().permute(3, 0, 1, 2)[None])
    torch.testing.assert_close(features, case["lipfeat_out"], **CLOSE)


def test_sounds_match_reference(syncnet, golden_syncnet):
    case = golden_syncnet("unit")
    windows = case["aud_in"].reshape(3, 1, 20, 13).transpose(2, 3)  # the file holds the values in the order [3, 1, 20, 13], whatever its shape says
    with torch.no_grad():
        torch.testing.assert_close(syncnet.network.embed_sounds(windows), case["aud_out"], **CLOSE)


def test_film_matches_reference(syncnet, golden_syncnet):
    case = golden_syncnet("e2e")
    crops, samples = case["frames"].flip(-1), case["audio"].float()
    lips, sounds = syncnet.embed(crops, samples, lambda done: None)
    torch.testing.assert_close(lips, case["video_features"], **CLOSE)
    torch.testing.assert_close(sounds, case["audio_features"], **CLOSE)
    score = syncnet.score((crop for crop in crops), samples / 32768)
    assert score.offset == int(case["offset"])
    assert score.confidence == pytest.approx(float(case["conf"]), rel=1e-4) and score.distance == pytest.approx(float(case["min_dist"]), rel=1e-4)
    torch.testing.assert_close(score.distances, case["dists"], rtol=1e-4, atol=0)


def test_one_pass_equals_window_by_window(weights, syncnet):
    plain = SyncNetwork().eval()
    plain.load_state_dict(weights)
    crops = film(9)
    with torch.no_grad():
        alone = [plain.embed_lips(crops[i : i + 5].flip(-1).float().permute(3, 0, 1, 2)[None]) for i in range(5)]
    torch.testing.assert_close(syncnet.embed_lips(crops), torch.cat(alone), **CLOSE)


def test_chunks_hold_every_window_once():
    for count in (6, 7, 20, 21, 22, 37, 38, 60):
        numbers = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 224, 224, 3)
        starts = [int(chunk[i, 0, 0, 0]) for chunk in film_chunks(numbers) for i in range(len(chunk) - 4)]
        assert starts == list(range(count - 5))


def test_crops_are_not_held(syncnet):
    alive, most = set(), 0

    def crops():
        nonlocal most
        for number in range(45):
            crop = film(1, number)[0].clone()
            alive.add(number)
            weakref.finalize(crop, alive.discard, number)
            most = max(most, len(alive))
            yield crop

    assert syncnet.score(crops(), sound(45)).distances.shape == (40, 31)
    assert most <= 23


# Decision


@pytest.mark.parametrize("name", CASES)
def test_decision_matches_reference(golden_syncnet, name):
    case = {key.removeprefix(f"{name}."): value for key, value in golden_syncnet("decision").items() if key.startswith(f"{name}.")}
    score = decide(case["dists"])
    assert score.offset == int(case["offset"]) and score.distances is case["dists"]
    assert score.confidence == pytest.approx(float(case["conf"]), rel=1e-4) and score.distance == pytest.approx(float(case["min_dist"]), rel=1e-4)
    torch.testing.assert_close(score.frame_confidence, case["frame_conf"], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_distances_match_reference(golden_syncnet, name):
    case = golden_syncnet("decision")
    if f"{name}.video" not in case:
        pytest.skip("the embeddings are not in the small parity set; the full one (../shared/golden) is not here")
    distances = window_distances(case[f"{name}.video"], case[f"{name}.audio"], int(case[f"{name}.vshift"]))
    torch.testing.assert_close(distances, case[f"{name}.dists"], rtol=1e-4, atol=0)


def test_distances_have_zeros_beyond_the_ends():
    lips, sounds = torch.randn(4, 8), torch.randn(4, 8)
    distances = window_distances(lips, sounds)
    assert distances.shape == (4, 31)
    torch.testing.assert_close(distances[1, 15], (lips[1] - sounds[1]).norm())
    torch.testing.assert_close(distances[1, 17], (lips[1] - sounds[3]).norm())
    torch.testing.assert_close(distances[:, 0], lips.norm(dim=1))


@pytest.mark.parametrize("late", [-6, -1, 0, 1, 4, 9])
def test_later_sound_lowers_the_offset(syncnet, late):
    original = sound(60).mul(32768).round()
    moved = torch.roll(original, late * SAMPLES_PER_FRAME)
    lips = syncnet.embed_sounds(original, 0, 55)  # of a mouth that tells just what the sound does
    score = decide(window_distances(lips, syncnet.embed_sounds(moved, 0, 55)))
    assert score.offset == -late and score.confidence > 1 and score.frame_confidence[20:35].min() > 1


def test_confidence_is_labelled():
    assert LABEL == "SyncNet confidence (uncompressed path)"


# What is scored


def test_progress_and_cancel(syncnet):
    calls = []
    syncnet.score(film(22), sound(30), on_window=lambda done, total: calls.append((done, total)))
    assert calls == [(16, 17), (17, 17)]
    calls.clear()
    syncnet.score(iter(film(6)), sound(30), on_window=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 25)]  # the length of an iterator is not known
    with pytest.raises(KeyboardInterrupt):
        syncnet.score(film(6), sound(30), on_window=lambda done, total: (_ for _ in ()).throw(KeyboardInterrupt))


def test_the_longer_of_both_is_cut(syncnet):
    crops, waveform = film(12), sound(14)
    short = syncnet.score(crops[:8], waveform)
    assert short.distances.shape == (3, 31) and short.frame_confidence.shape == (3,)
    read = []
    longer = syncnet.score((read.append(i) or crop for i, crop in enumerate(crops)), waveform[: 8 * SAMPLES_PER_FRAME + 639])
    assert len(read) == 8
    torch.testing.assert_close(longer.distances, short.distances, rtol=1e-5, atol=0)


def test_shortest_film(syncnet):
    crops, waveform = film(6), sound(6)
    score = syncnet.score(crops, waveform)
    assert score.distances.shape == (1, 31) and np.isfinite([score.confidence, score.distance]).all()
    assert torch.equal(crops, film(6)) and torch.equal(waveform, sound(6))


@pytest.mark.parametrize(
    ("crops", "waveform", "message"),
    [
        (film(5), sound(20), "film has 5 frames"),
        (film(0), sound(20), "film has 0 frames"),
        (film(20), sound(5), "sound is 0.20 s long"),
        (film(20), torch.zeros(0), "sound is 0.00 s long"),
        (film(20), torch.zeros(20000), "silent"),
        (film(20), torch.full((20000,), 0.3), "silent"),
        (film(20), torch.full((20000,), NAN), "no numbers"),
        (film(20), torch.cat([sound(20), torch.tensor([float("inf")])]), "no numbers"),
        (film(20), sound(20)[None], "floats \\[samples\\]"),
        (film(20), torch.zeros(20000, dtype=torch.int16), "int16 \\[20000\\]"),
        (film(20).float(), sound(20), "float32 \\[224, 224, 3\\]"),
        (film(20)[:, :100], sound(20), "uint8 \\[100, 224, 3\\]"),
        (film(20).movedim(-1, 1), sound(20), "uint8 \\[3, 224, 224\\]"),
    ],
)
def test_what_cannot_be_scored(syncnet, crops, waveform, message):
    with pytest.raises(InputError, match=message):
        syncnet.score(crops, waveform)


# Weight files


@pytest.mark.parametrize("name", ["syncnet_v2.model", "renamed.safetensors"])  # PyTorch from 2.13 on reads paths by their name
@pytest.mark.parametrize("zipped", [True, False])
def test_released_form_is_read(weights, syncnet, tmp_path, zipped, name):
    old = {key: torch.nn.Parameter(tensor) for key, tensor in weights.items() if not key.endswith("num_batches_tracked")}  # files of early torch lack it
    torch.save(old, tmp_path / name, _use_new_zipfile_serialization=zipped)
    other = load_syncnet(str(tmp_path / name))
    crops = film(6)
    assert torch.equal(other.embed_lips(crops), syncnet.embed_lips(crops))


class Attack:
    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return os.mkdir, (self.file,)


@pytest.mark.parametrize("kind", ["zip", "old", "bare"])
def test_code_in_a_file_is_refused(weights, tmp_path, kind):
    file, trace = tmp_path / "syncnet_v2.model", tmp_path / "trace"
    if kind == "bare":
        file.write_bytes(pickle.dumps(Attack(trace), protocol=2))
    else:
        torch.save({"netfclip.0.weight": Attack(trace)}, file, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(CheckpointError, match="wants to run|more than weights"):
        load_syncnet(file)
    assert not trace.exists()


@pytest.mark.parametrize("form", ["safetensors", "zip", "old"])
@pytest.mark.parametrize("share", [0, 1e-6, 0.01, 0.5, 0.99])
def test_truncated_files_are_refused(tmp_path, form, share):
    file, tensors = tmp_path / "syncnet", {"netfclip.0.weight": torch.zeros(512, 512), "netfclip.0.bias": torch.zeros(512)}
    if form == "safetensors":
        save_file(tensors, file)
    else:
        torch.save(tensors, file, _use_new_zipfile_serialization=form == "zip")
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    with pytest.raises(CheckpointError, match="truncated or damaged|damaged pickle"):
        load_syncnet(file)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"state_dict": {}, "epoch": 3}, "a dictionary of state_dict, epoch"),
        ([1, 2], "holds a list"),
        ({"L2Norm3_3.weight": torch.zeros(256)}, "looks like the face detector"),
        ({"face_encoder_blocks.0.weight": torch.zeros(3)}, "Wav2Lip"),
        ({}, "missing"),
    ],
)
def test_other_files_are_named(tmp_path, value, message):
    torch.save(value, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=message):
        load_syncnet(tmp_path / "weights.pth")


@pytest.mark.parametrize(
    ("data", "message"), [(b"<!DOCTYPE html>", "a web page"), (b"version https://git-lfs.github.com/spec/v1", "Git LFS"), (b"GGUF...", "GGUF")]
)
def test_files_of_other_kinds_are_named(tmp_path, data, message):
    (tmp_path / "syncnet_v2.model").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        load_syncnet(tmp_path / "syncnet_v2.model")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(CheckpointError, match="not there.*syncnet_v2.model"):
        load_syncnet(tmp_path / "none")
    with pytest.raises(CheckpointError, match="a folder"):
        load_syncnet(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("netfclip.3.bias"), "1 missing: netfclip.3.bias"),
        (lambda weights: weights.update(extra=torch.zeros(2)), "1 unexpected: extra"),
        (lambda weights: weights.update({"netfclip.3.bias": torch.zeros(10)}), "netfclip.3.bias is \\[10\\], needed \\[1024\\]"),
        (lambda weights: weights.update({"netfclip.3.bias": torch.full((1024,), NAN)}), "no numbers \\(first: netfclip.3.bias"),
    ],
)
def test_weights_that_do_not_fit(weights, tmp_path, change, message):
    changed = dict(weights)
    change(changed)
    save_file(changed, tmp_path / "syncnet.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_syncnet(tmp_path / "syncnet.safetensors")


def test_half_precision_files_are_computed_in_float32(weights, tmp_path):
    save_file({key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in weights.items()}, tmp_path / "half.safetensors")
    assert load_syncnet(tmp_path / "half.safetensors").embed_lips(film(6)).dtype == torch.float32


def test_network_runs_without_weights_of_a_file():
    torch.manual_seed(0)
    assert SyncNet(SyncNetwork().eval()).embed_lips(film(6)).shape == (2, 1024)
