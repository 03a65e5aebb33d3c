"""Listening: features and tags against the reference, sound of any length, dtypes, progress, bad sound, files, and the command line."""

import json
import subprocess
import sys
import wave

import pytest
import torch
from safetensors.torch import load_file
from test_cat_frontend import noise, pieces
from test_cat_stem import off

import cat_encoder
from cat_encoder import CatError, Checkpoint, Encoder
from cat_encoder.__main__ import keep, main
from cat_encoder.config import cat_architecture
from cat_encoder.head import Head
from cat_encoder.sound import open_sound
from cat_encoder.trunk import AudioTransformer

TOLERANCE = 2e-5  # MANIFEST: largest difference over max(1, largest value)
WINDOW = 10.24  # s


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return cat_encoder.write_demo_encoder(tmp_path_factory.mktemp("ear") / "demo.safetensors")


@pytest.fixture(scope="module")
def ear(demo) -> Encoder:
    return cat_encoder.load(demo)


def recorded_wave(golden_cat, name: str) -> torch.Tensor:
    return golden_cat("frontend/waves.safetensors")[name].float()[None, None] / 32768


# Reference, from the wave to the end


@pytest.mark.parametrize(("row", "name", "sounding"), [(0, "as_10s_16k", 63), (1, "as_3s_16k", 19)])
def test_reference_features(golden_cat, row, name, sounding):
    pretrained, expected = cat_encoder.load(golden_cat("checkpoint/cat_tiny_pretrain.pt")), golden_cat("encoder/tiny_expected.safetensors")["as.x"][row]
    features = pretrained.features(recorded_wave(golden_cat, name), 16_000, layers=True)
    assert off(features.tokens[0], expected) < TOLERANCE
    assert torch.equal(features.utterance, features.tokens[:, 0])
    assert off(features.columns[0], expected[1:].view(64, 8, 48).mean(1)) < TOLERANCE
    assert (features.sounding, len(features.layers), features.column_seconds) == (sounding, 3, 0.16)


def test_reference_tags(golden_cat):
    tagger, recorded = cat_encoder.load(golden_cat("checkpoint/cat_tiny_finetune_as527.pt")), golden_cat("classifier/classifier.json")["CLS_TOKEN"]
    for row, name in enumerate(("as_10s_16k", "as_3s_16k")):
        sound = recorded_wave(golden_cat, name)
        assert off(tagger.logits(sound, 16_000)[0], golden_cat("classifier/classifier.safetensors")["CLS_TOKEN.logits"][row]) < TOLERANCE
        tags = tagger.tags(sound, 16_000, top_k=5)[0]
        assert [label for label, _ in tags] == [tagger.labels[index] for index in recorded["top5_index"][row]]
        assert [score for _, score in tags] == pytest.approx(recorded["top5_prob"][row], abs=1e-5)


def test_a_converted_file_hears_the_same(golden_cat, tmp_path):
    source, sound = golden_cat("checkpoint/cat_tiny_finetune_as527.pt"), recorded_wave(golden_cat, "as_3s_16k")
    turned = cat_encoder.load(cat_encoder.convert(source, tmp_path / "out.safetensors"))
    original = cat_encoder.load(source)
    assert torch.equal(turned.logits(sound, 16_000), original.logits(sound, 16_000)) and turned.labels == original.labels


# Any length


@pytest.mark.parametrize("seconds", [0.03, 3.0, 8.04, WINDOW + 0.015])
def test_one_window_keeps_its_padding(ear, seconds):
    features = ear.features(noise(seconds), 16_000)
    frames = 1 + (round(seconds * 16_000) - 400) // 160
    assert features.tokens.shape == (1, 513, 48) and features.columns.shape == (1, 64, 48)
    assert features.sounding == -(-frames // 16)


@pytest.mark.parametrize("seconds", [WINDOW + 0.025, 12.0, 2 * WINDOW + 0.015, 27.3])
def test_long_sound_is_its_windows(ear, seconds):
    sound = noise(seconds, batch=2)
    features = ear.features(sound, 16_000, layers=True)
    columns = -(-(1 + (sound.shape[-1] - 400) // 160) // 16)
    assert features.sounding == columns and features.columns.shape == (2, columns, 48)
    assert all(layer.shape == features.tokens.shape for layer in features.layers)
    first, last_start = ear.features(sound[..., :164_080], 16_000), (columns - 64) * 2560
    last = ear.features(sound[..., last_start:], 16_000)
    torch.testing.assert_close(features.tokens[:, 1:513], first.tokens[:, 1:], rtol=0, atol=2e-4)
    new = columns - columns // 64 * 64 or 64
    torch.testing.assert_close(features.columns[:, -new:], last.columns[:, -new:], rtol=0, atol=2e-4)


def test_a_stream_is_the_whole(ear):
    sound = noise(33.0, 44_100)
    whole, parts = ear.features(sound, 44_100), list(ear.stream(iter(pieces(sound, [100_000, 7, 44_100])), 44_100))
    assert [round(part.start, 2) for part in parts] == [0.0, 10.24, 20.48, 30.72]
    torch.testing.assert_close(torch.cat([part.tokens[:, 1:] for part in parts], 1), whole.tokens[:, 1:], rtol=0, atol=2e-4)
    heard = list(ear.stream_logits(iter(pieces(sound, [100_000])), 44_100))
    assert sum(each.fresh for each in heard) == pytest.approx(32.98, abs=0.011)
    torch.testing.assert_close(cat_encoder.ear.mean_logits(heard), ear.logits(sound, 44_100), rtol=0, atol=1e-3)


def test_a_long_stream_needs_no_more_memory(ear):
    """Twenty minutes, made as they are read, at 48 kHz: 230 MB if they were held."""
    resource = pytest.importorskip("resource", reason="Windows does not tell the peak of a process this way")
    generator, peaks = torch.Generator().manual_seed(0), []
    chunks = (0.1 * torch.randn(1, 1, 480_000, generator=generator) for _ in range(120))
    for _ in ear.stream(chunks, 48_000):
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert len(peaks) > 115
    assert peaks[-1] - peaks[12] < 30_000  # KiB


def test_a_batch_is_its_clips(ear):
    sound = noise(11.0, batch=3)
    together, alone = ear.features(sound, 16_000).tokens, torch.cat([ear.features(clip[None], 16_000).tokens for clip in sound])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)


# Tags


def test_tags_are_sorted_and_named(ear):
    tags = ear.tags(noise(2, batch=2), 16_000, top_k=4)
    assert len(tags) == 2 and all(len(row) == 4 for row in tags)
    for row in tags:
        scores = [score for _, score in row]
        assert scores == sorted(scores, reverse=True) and all(0 <= score <= 1 for score in scores) and {label for label, _ in row} <= set(ear.labels)
    assert len(ear.tags(noise(1), 16_000, top_k=9_999)[0]) == 527
    with pytest.raises(CatError, match="at least 1 tag"):
        ear.tags(noise(1), 16_000, top_k=0)


@pytest.mark.parametrize(("seconds", "starts"), [(0.5, [0]), (2.0, [0]), (4.0, [0, 1, 1.92]), (8.04, [0, 1, 2, 3, 4, 5, 6])])
def test_scores_over_time(ear, seconds, starts):
    sound = noise(seconds, batch=2)
    scores, times = ear.scores_over_time(sound, 16_000)
    assert scores.shape == (2, len(times), 527) and scores.min() >= 0 and scores.max() <= 1
    assert times.tolist()[: len(starts)] == pytest.approx(starts, abs=0.161)
    assert times[-1] + 2.08 >= seconds - 0.03 and len(times) - len(starts) in (0, 1)
    middle = len(times) // 2
    start = round(float(times[middle]) * 16_000)
    alone, _ = ear.scores_over_time(sound[..., start : start + 400 + 160 * 207], 16_000)
    torch.testing.assert_close(alone[:, 0], scores[:, middle], rtol=0, atol=1e-3)


@pytest.mark.parametrize(("window", "hop"), [(0, 1), (2, 3), (2, 0), (float("nan"), 1), (1e9, 1)])
def test_windows_that_cannot_be(ear, window, hop):
    with pytest.raises(CatError, match="cannot be made"):
        ear.scores_over_time(noise(4), 16_000, window=window, hop=hop)


def test_classes_that_exclude_each_other_share_one():
    torch.manual_seed(0)
    architecture = cat_architecture(channels=(8, 12), width=16, heads=4, depth=1)
    checkpoint = Checkpoint(architecture, AudioTransformer(architecture).state_dict(), Head(16, 3).state_dict(), ["a", "b", "c"], single_label=True)
    assert sum(score for _, score in Encoder(checkpoint).tags(noise(1), 16_000)[0]) == pytest.approx(1, abs=1e-5)


def test_without_a_head_there_are_no_tags():
    architecture = cat_architecture(channels=(8, 12), width=16, heads=4, depth=1)
    deaf = Encoder(Checkpoint(architecture, AudioTransformer(architecture).state_dict(), origin="CAT, pre-trained"))
    assert not deaf.has_head and deaf.labels == []
    for call in (deaf.logits, deaf.tags, deaf.scores_over_time):
        with pytest.raises(CatError, match=r"\(CAT, pre-trained\) has no head"):
            call(noise(1), 16_000)


# Types, progress, cancel


def test_bfloat16(demo, ear):
    half = cat_encoder.load(demo, dtype=torch.bfloat16)
    features, exact = half.features(noise(3), 16_000), ear.features(noise(3), 16_000)
    assert features.tokens.dtype == torch.bfloat16 and half.logits(noise(3), 16_000).dtype == torch.float32
    assert (features.tokens.float() - exact.tokens).norm() / exact.tokens.norm() < 0.03
    assert half.to(dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("device", ["cuda:99", "nowhere"])
def test_devices_that_are_not_there(demo, device):
    with pytest.raises(CatError, match="cpu always works"):
        cat_encoder.load(demo, device=device)


def test_nothing_is_changed_and_nothing_remembers(ear):
    sound = noise(3)
    before, state = sound.clone(), torch.get_rng_state()
    first, second = ear.features(sound, 16_000).tokens, ear.features(sound, 16_000).tokens
    assert torch.equal(sound, before) and torch.equal(first, second) and torch.equal(torch.get_rng_state(), state) and not first.requires_grad


def test_progress_counts_windows_and_passes_on_what_it_raises(ear):
    for call, seconds, total in ((ear.features, 25, 3), (ear.logits, 25, 3), (ear.scores_over_time, 8.04, 7), (ear.features, 1, 1)):
        steps = []
        call(noise(seconds), 16_000, on_step=lambda done, total, steps=steps: steps.append((done, total)))
        assert steps == [(i + 1, total) for i in range(total)]

    def cancel(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ear.features(noise(25), 16_000, on_step=cancel)


# Sound that is odd or none


@pytest.mark.parametrize("rate", [8_000, 44_101, 192_000])
@pytest.mark.parametrize("channels", [1, 7])
def test_odd_rates_and_channels(ear, rate, channels):
    assert ear.features(noise(1, rate, channels), rate).tokens.isfinite().all()


def test_silence_and_clipping(ear):
    for sound in (torch.zeros(1, 1, 160_000), noise(10).mul(1000).clamp(-1, 1)):
        assert ear.features(sound, 16_000).tokens.isfinite().all() and len(ear.tags(sound, 16_000)[0]) == 10


@pytest.mark.parametrize(
    ("sound", "words"),
    [
        (noise(0.01), "10 ms"),
        (torch.zeros(1, 1, 0), "0 ms"),
        (torch.full((1, 1, 16_000), torch.nan), "NaN"),
        (torch.zeros(16_000), "batch, channels"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_sound(ear, sound, words):
    for call in (ear.features, ear.logits, ear.tags, ear.scores_over_time):
        with pytest.raises(CatError, match=words):
            call(sound, 16_000)


def test_one_broken_sample_late_in_a_long_sound(ear):
    sound = noise(30)
    sound[..., -5] = float("inf")
    with pytest.raises(CatError, match="NaN or Inf"):
        ear.features(sound, 16_000)


# Files and the command line


@pytest.fixture
def sound_file(tmp_path):
    path = tmp_path / "drei Glöckchen.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(44_100)
        file.writeframes((noise(12, 44_100, 2)[0].T * 20_000).to(torch.int16).numpy().tobytes())
    return path


def test_a_file_is_read_in_pieces(sound_file):
    with open_sound(sound_file) as (rate, chunks):
        parts = list(chunks)
    assert rate == 44_100 and len(parts) == 3
    torch.testing.assert_close(torch.cat(parts, 2), noise(12, 44_100, 2) * 20_000 / 32_768, rtol=0, atol=1 / 32_768)


def test_files_that_are_no_sound(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"RIFF but then nothing")
    for path, words in ((tmp_path / "a.wav", "no sound file"), (tmp_path / "b.wav", "not there"), (tmp_path, "a folder")):
        with pytest.raises(CatError, match=words), open_sound(path) as (_, chunks):
            list(chunks)


def run(monkeypatch, *words) -> int:
    monkeypatch.setattr(sys, "argv", ["cat_encoder", *map(str, words)])
    return main()


def test_cli_features(monkeypatch, capsys, sound_file, demo, ear, tmp_path):
    for kind, rows in (("columns", 75), ("tokens", 600)):
        assert run(monkeypatch, "features", sound_file, "--model", demo, "--out", tmp_path / "out", "--kind", kind) == 0
        out = tmp_path / "out" / f"{sound_file.name}.safetensors"
        assert capsys.readouterr().out.strip() == str(out)
        assert load_file(out)[kind].shape == (rows, 48) and load_file(out)["utterance"].shape == (48,)
    with open_sound(sound_file) as (rate, chunks):
        whole = ear.features(torch.cat(list(chunks), 2), rate)
    torch.testing.assert_close(load_file(out)["tokens"], whole.tokens[0, 1:], rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", ["columns", "tokens"])
def test_an_hour_keeps_nothing_but_what_is_written(ear, kind):
    for vector, rows in keep(ear.stream([noise(25.0)], 16_000), kind):
        assert vector.untyped_storage().nbytes() == 4 * vector.numel() and rows.untyped_storage().nbytes() == 4 * rows.numel()


def test_cli_tags(monkeypatch, capsys, sound_file, demo, ear):
    assert run(monkeypatch, "tags", sound_file, "--model", demo, "--top", 3, "--json") == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole["file"] == str(sound_file) and whole["end"] == pytest.approx(12, abs=0.03) and len(whole["tags"]) == 3
    assert run(monkeypatch, "tags", sound_file, "--model", demo, "--over-time") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith("drei Glöckchen.wav  0.0-10.2 s")


def test_cli_converts_and_says_what_is_wrong(monkeypatch, capsys, demo, tmp_path):
    assert run(monkeypatch, "demo-encoder", tmp_path / "d.safetensors") == 0
    assert run(monkeypatch, "convert", tmp_path / "d.safetensors", tmp_path / "e.safetensors") == 0
    assert cat_encoder.load(tmp_path / "e.safetensors").has_head
    capsys.readouterr()
    (tmp_path / "page.pt").write_text("<html>", encoding="utf-8")
    assert run(monkeypatch, "convert", tmp_path / "page.pt", tmp_path / "f.safetensors") == 1
    assert "web page" in capsys.readouterr().err and not (tmp_path / "f.safetensors").exists()


def test_cli_lists_its_commands():
    done = subprocess.run([sys.executable, "-m", "cat_encoder", "--help"], capture_output=True, text=True, check=True)
    assert all(command in done.stdout for command in ("features", "tags", "convert", "pretrain", "finetune"))
