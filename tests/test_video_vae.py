"""The video VAE: the reference's numbers, flat memory, tiles, and what it refuses."""

import gc
import json
import shutil

import pytest
import torch
from conftest import distance

from mova import tiles
from mova.errors import CheckpointError, InputError
from mova.image import fit_image, image_condition
from mova.video_vae import FeatureCache, load_video_vae

TOLERANCE = 1e-5  # MANIFEST: VAE, rel L2


@pytest.fixture(scope="module")
def vvae(tiny_mova):
    return load_video_vae(tiny_mova)


@pytest.fixture(scope="module")
def vvae_bf16(tiny_mova):
    return load_video_vae(tiny_mova, dtype=torch.bfloat16)


def film(pixels: torch.Tensor) -> torch.Tensor:
    """[1,3,F,H,W] in -1..1 -> [F,H,W,3] in 0..1, in the given dtype, then float32."""
    return (pixels[0].movedim(0, -1) * 0.5 + 0.5).clamp(0, 1).float()


def live_bytes() -> int:
    gc.collect()
    storages = {o.untyped_storage().data_ptr(): o.untyped_storage().nbytes() for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)}
    return sum(storages.values())


def full_caches() -> list[FeatureCache]:
    return [o for o in gc.get_objects() if type(o) is FeatureCache and o]


# Parity


def test_attributes_come_from_the_checkpoint(vvae, vvae_bf16):
    assert (vvae.latent_channels, vvae.spatial_compression, vvae.temporal_compression) == (16, 8, 4)
    assert vvae.device.type == "cpu" and vvae.dtype == torch.float32 and vvae_bf16.dtype == torch.bfloat16
    assert vvae.to("cpu") is vvae and vvae.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in vvae.network.parameters())


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_encode_and_decode_match_reference(vvae, golden, frames):
    case = golden("wan_vae")
    latents = vvae.encode(film(case[f"f{frames}.x"]))
    assert latents.dtype == torch.float32
    assert distance(latents, case[f"f{frames}.mean"]) < TOLERANCE
    assert distance(vvae.decode(case[f"f{frames}.mean"]), film(case[f"f{frames}.recon"])) < TOLERANCE


def test_batch_is_decoded_clip_after_clip(vvae, golden):
    case = golden("wan_vae")
    expected = torch.cat([film(clip[None]) for clip in case["decode_rand"]])
    assert distance(vvae.decode(case["z_rand"]), expected) < TOLERANCE


def test_normalisation_is_exact_and_undoes_itself(vvae, golden):
    case = golden("prepare_latents")
    assert torch.equal(vvae.normalize(case["norm_in"]), case["normalized"])
    assert torch.equal(vvae.denormalize(case["norm_in"]), case["denormalized"])
    torch.testing.assert_close(vvae.denormalize(vvae.normalize(case["norm_in"])), case["norm_in"])
    with pytest.raises(InputError, match="16 channels"):
        vvae.normalize(torch.zeros(1, 48, 1, 2, 2))


def test_end_of_the_loop_matches_reference(vvae, golden):
    case = golden("cfg_loop")
    latents = vvae.denormalize(case["step3.latents"])
    assert torch.equal(latents, case["denorm_latents"])
    frames = vvae.decode(latents)
    assert distance(frames * 2 - 1, film(case["decoded"]) * 2 - 1) < 3e-5
    assert ((frames * 255).round().int() - case["frames"].int()).abs().max() <= 1


def test_bf16_decode_matches_reference(vvae_bf16, golden):
    case = golden("cfg_loop_bf16")
    latents = vvae_bf16.denormalize(case["step3.latents"])
    frames = vvae_bf16.decode(latents)
    with torch.no_grad():
        plain = vvae_bf16.network.decode(latents.bfloat16()).sample
    assert distance(frames, film(plain)) < 1e-3
    # Bit-equal where diffusers normalises in float32 (as the reference's 0.39 does) and the CPU has the same kernels; 0.36 is 1.4e-2 away.
    assert distance(frames * 2 - 1, film(case["decoded"]) * 2 - 1) < 1.5e-2
    assert ((frames * 255).round().int() - case["frames"].int()).abs().max() <= 10


# Chunks


def test_stream_yields_one_frame_then_four(vvae):
    latents = torch.randn(2, 16, 3, 2, 3, generator=torch.Generator().manual_seed(0))
    before, calls = latents.clone(), []
    chunks = list(vvae.decode_stream(latents, on_chunk=lambda done, total: calls.append((done, total))))
    assert [tuple(chunk.shape) for chunk in chunks] == [(1, 16, 24, 3), (4, 16, 24, 3), (4, 16, 24, 3)] * 2
    assert calls == [(i, 6) for i in range(1, 7)]
    frames = vvae.decode(latents)
    assert torch.equal(torch.cat(chunks), frames) and torch.equal(latents, before)
    assert frames.dtype == torch.float32 and 0 <= frames.min() and frames.max() <= 1


def test_decoding_memory_is_flat_in_the_number_of_frames(vvae):
    def peak(length: int) -> int:
        latents = torch.zeros(1, 16, 1, 2, 3).expand(-1, -1, length, -1, -1)
        return max(live_bytes() for step, _ in enumerate(vvae.decode_stream(latents)) if step in (length // 2, length - 1))

    frame = 16 * 24 * 3 * 4
    assert peak(60) <= peak(5) + 8 * frame  # kept whole, the longer film would take 220 frames more


def test_encoding_memory_is_flat_in_the_number_of_frames(vvae):
    def peak(length: int) -> int:
        peaks = []
        chunks = (torch.full((1, 3, 4 if step else 1, 16, 24), step / 60) for step in range(length))
        vvae.encode_chunks(
            chunks, num_frames=4 * length - 3, height=16, width=24, on_chunk=lambda done, total: peaks.append(live_bytes()) if done == total else None
        )
        return peaks[0]

    frame, latent = 16 * 24 * 3 * 4, 16 * 2 * 3 * 4
    assert peak(30) <= peak(5) + 8 * frame + 25 * latent


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_standing_film_is_encoded_no_further_than_needed(tiny_mova, monkeypatch, dtype):
    vvae = load_video_vae(tiny_mova, dtype=dtype)
    image = torch.rand(32, 16, 3, generator=torch.Generator().manual_seed(1))
    first, grey, past = fit_image(image, 32, 16).movedim(-1, 0)[None, :, None], torch.zeros(1, 3, 4, 32, 16), [None] * 100
    with torch.no_grad():
        moments = [vvae.network.encoder(chunk.to(dtype), feat_cache=past, feat_idx=[0]) for chunk in [first, *[grey] * 48]]
        full = torch.cat([vvae.network.quant_conv(moment) for moment in moments], dim=2)[:, :16]
    forward, calls = vvae.network.encoder.forward, []
    monkeypatch.setattr(vvae.network.encoder, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    condition = image_condition(vvae, image, height=32, width=16, num_frames=193)
    assert torch.equal(condition[:, 4:], vvae.normalize(full))
    assert len(calls) == 30  # stationary from latent 29 (spec/performance.md, fact 10); the reference encodes all 49


def test_film_that_moves_again_is_encoded_again(vvae):
    grey, moving = torch.zeros(1, 3, 4, 16, 16), torch.rand(1, 3, 4, 16, 16)
    chunks = [grey[:, :, :1], *[grey] * 40, moving, *[grey] * 3]
    with torch.no_grad():
        full = vvae.network.encode(torch.cat(chunks, dim=2)).latent_dist.mode()
    assert distance(vvae.encode_chunks(chunks, num_frames=177, height=16, width=16), full) < TOLERANCE


class Stop(BaseException):
    pass


def test_callback_cancels_and_nothing_stays_behind(vvae):
    def stop(done: int, total: int) -> None:
        if done == 2:
            raise Stop

    with pytest.raises(Stop) as kept:
        vvae.decode(torch.zeros(1, 16, 4, 2, 2), on_chunk=stop)
    assert not full_caches() and kept.traceback
    with pytest.raises(Stop) as kept:
        vvae.encode(torch.zeros(9, 16, 16, 3), on_chunk=stop)
    assert not full_caches() and kept.traceback
    stream = vvae.decode_stream(torch.zeros(1, 16, 4, 2, 2))
    next(stream)
    stream.close()
    assert not full_caches()


def test_gradients_of_the_caller_are_left_alone(vvae):
    stream = vvae.decode_stream(torch.zeros(1, 16, 2, 2, 2))
    assert not next(stream).requires_grad and torch.is_grad_enabled()


# Tiles


def test_tiled_decode_matches_reference(vvae, golden):
    case = golden("wan_vae")
    tiled = vvae.decode(case["z_tile"], tiling=(64, 48))
    assert distance(tiled * 2 - 1, film(case["decode_tiled"]) * 2 - 1) < TOLERANCE
    untiled = vvae.decode(case["z_tile"], tiling="off")
    assert distance(untiled * 2 - 1, film(case["decode_tile_ref"]) * 2 - 1) < TOLERANCE
    assert distance(tiled, untiled) < 0.15  # the random weights look far around; the reference's own distance is 0.097


@pytest.mark.parametrize(("height", "width"), [(64, 64), (56, 104), (136, 96)])
def test_tiles_agree_with_diffusers(tiny_mova, height, width):
    vvae = load_video_vae(tiny_mova)
    vvae.network.enable_tiling(64, 64, 48, 48)
    generator = torch.Generator().manual_seed(2)
    pixels = torch.rand(1, 3, 5, height, width, generator=generator) * 2 - 1
    latents = torch.randn(1, 16, 2, height // 8, width // 8, generator=generator)
    with torch.no_grad():
        assert distance(vvae.encode(film(pixels), tiling=(64, 48)), vvae.network.encode(pixels).latent_dist.mode()) < TOLERANCE
        assert distance(vvae.decode(latents, tiling=(64, 48)), film(vvae.network.decode(latents).sample)) < TOLERANCE


def test_joining_uncut_tiles_gives_the_picture_back():
    grid = tiles.Tiles(13, 21, tile=8, stride=6)
    picture = torch.randn(1, 3, 2, 13 * 4, 21 * 4)
    pieces = [piece.clone() for piece in grid.cut(picture, 4)]
    assert len(pieces) == len(grid)
    torch.testing.assert_close(grid.join(pieces, 4), picture)


def test_auto_tiles_only_what_does_not_fit(monkeypatch):
    def number(free):
        monkeypatch.setattr(tiles, "free_memory", lambda device: free)
        return len(tiles.choose_tiles("auto", 720, 1280, cell=8, peak=10.4e9, device=torch.device("cpu")))

    assert number(24e9) == 1 and number(None) == 1 and number(8e9) == 4 * 7


def test_estimate_of_the_peak(tiny_mova, vvae, monkeypatch):
    peaks = []
    monkeypatch.setattr("mova.video_vae.choose_tiles", lambda *args, peak, **rest: peaks.append(peak) or tiles.Tiles(2, 2, 2, 2))
    for dtype in (torch.bfloat16, torch.float32):
        load_video_vae(tiny_mova, dtype=dtype).decode(torch.zeros(1, 16, 1, 2, 2))
    assert peaks == [11300 * 256 * 8 // 96, 2 * 11300 * 256 * 8 // 96]
    assert (vvae.decode_bytes(16, 16), vvae.encode_bytes(16, 16)) == (peaks[1], 2 * 7500 * 256 * 8 // 96)


def test_free_memory_of_this_machine():
    free = tiles.free_memory(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50
    assert tiles.free_memory(torch.device("meta")) is None


@pytest.mark.parametrize("tiling", ["yes", None, True, (64,), (64, 72), (60, 48), (64, 0)])
def test_wrong_tiling_is_refused(vvae, tiling):
    with pytest.raises(InputError, match="'auto', 'on', 'off'"):
        vvae.decode(torch.zeros(1, 16, 1, 2, 2), tiling=tiling)


def test_parked_caches_keep_their_marks():
    cache = FeatureCache({0: torch.ones(2), 1: "Rep"})
    cache.still = True
    cache.move("cpu")
    assert cache.still and cache[1] == "Rep" and torch.equal(cache[0], torch.ones(2)) and cache[7] is None


# What is refused


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(8, 16, 16, 3), "cut the film to 5 or lengthen it to 9"),
        (torch.zeros(1, 16, 20, 3), "multiples of 8"),
        (torch.zeros(1, 3, 16, 16), r"\[F,H,W,3\]"),
        (torch.zeros(0, 16, 16, 3), r"\[F,H,W,3\]"),
        (torch.full((1, 16, 16, 3), float("nan")), "no numbers"),
        (torch.full((1, 16, 16, 3), -1.0), "shift -1..1"),
        (torch.zeros(1, 16, 16, 3, dtype=torch.uint8), "uint8"),
    ],
)
def test_wrong_images_are_refused(vvae, images, message):
    with pytest.raises(InputError, match=message):
        vvae.encode(images)


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (torch.zeros(1, 48, 1, 2, 2), r"\[B,16,T,h,w\]"),
        (torch.zeros(16, 1, 2, 2), r"\[B,16,T,h,w\]"),
        (torch.zeros(1, 16, 0, 2, 2), r"\[B,16,T,h,w\]"),
        (torch.full((1, 16, 1, 2, 2), float("inf")), "no numbers"),
    ],
)
def test_wrong_latents_are_refused_before_the_first_frame(vvae, latents, message):
    with pytest.raises(InputError, match=message):
        vvae.decode_stream(latents)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_dim": 12}, "misshapen"),
        ({"num_res_blocks": 3}, "missing"),
        ({"z_dim": 8}, "8 values each"),
        ({"patch_size": 2}, "Wan 2.2 5B"),
        ({"dim_mult": [1, 2, 4]}, "describes no VAE"),
        ({"base_dim": "wide"}, "base_dim is 'wide'"),
    ],
)
def test_config_that_does_not_fit_is_one_sentence(tiny_mova, tmp_path, change, message):
    shutil.copy(tiny_mova / "model_index.json", tmp_path)
    shutil.copytree(tiny_mova / "video_vae", tmp_path / "video_vae")
    config = tmp_path / "video_vae" / "config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    config.chmod(0o644)
    config.write_text(json.dumps(values | change | {"_unknown": 1}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        load_video_vae(tmp_path)


def test_unknown_config_keys_are_ignored(tiny_mova, tmp_path):
    shutil.copy(tiny_mova / "model_index.json", tmp_path)
    shutil.copytree(tiny_mova / "video_vae", tmp_path / "video_vae")
    config = tmp_path / "video_vae" / "config.json"
    config.chmod(0o644)
    config.write_text(json.dumps(json.loads(config.read_text(encoding="utf-8")) | {"later_key": 1, "_note": "x"}), encoding="utf-8")
    assert load_video_vae(tmp_path).latent_channels == 16
