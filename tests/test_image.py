"""The start picture: files of all kinds, the reference's fit and condition, and what is refused."""

import numpy as np
import pytest
import torch
from conftest import distance
from PIL import Image

from mova.errors import InputError, MediaError
from mova.image import check_size, fit_image, image_condition, open_image, snap_length, snap_size
from mova.video_vae import load_video_vae

TOLERANCE = 1e-5  # spec/mova.md section 0 item 12: condition


@pytest.fixture(scope="module")
def vvae(tiny_mova):
    return load_video_vae(tiny_mova)


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))


# Files


def test_real_photos(media):
    for name in ("single_person.jpg", "multi_person.png"):
        pixels = open_image(media / name)
        assert pixels.ndim == 3 and pixels.shape[-1] == 3 and pixels.dtype == torch.float32
        assert 0 <= pixels.min() and pixels.max() <= 1 and pixels.std() > 0.05
        assert fit_image(pixels, 352, 640).shape == (352, 640, 3)


def test_png_comes_back_as_written(picture, tmp_path):
    picture.save(tmp_path / "a.png")
    assert torch.equal((open_image(str(tmp_path / "a.png")) * 255).round().to(torch.uint8), torch.from_numpy(np.array(picture)))


def test_exif_rotation_is_applied(picture, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    picture.save(tmp_path / "a.png", exif=exif)
    turned = torch.from_numpy(np.array(picture)).float().div(255).rot90(-1)
    torch.testing.assert_close(open_image(tmp_path / "a.png"), turned)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_are_white(picture, tmp_path, mode):
    file = tmp_path / "a.png"
    if mode == "P":
        palette = Image.new("P", (4, 4), 1)
        palette.putpalette([255, 0, 0, 0, 0, 0])
        palette.save(file, transparency=1)
    else:
        Image.new(mode, (4, 4), 0).save(file)
    assert torch.equal(open_image(file), torch.ones(4, 4, 3))


def test_half_transparent_is_blended_over_white(tmp_path):
    Image.new("RGBA", (2, 2), (255, 0, 0, 51)).save(tmp_path / "a.png")
    torch.testing.assert_close(open_image(tmp_path / "a.png")[0, 0], torch.tensor([1.0, 0.8, 0.8]), atol=0.005, rtol=0)


def test_sixteen_bit_gray_keeps_its_range(tmp_path):
    Image.fromarray(np.array([[0, 32768], [65535, 257]], dtype=np.uint16)).save(tmp_path / "a.png")
    expected = torch.tensor([[0, 32768], [65535, 257]]) / 65535
    torch.testing.assert_close(open_image(tmp_path / "a.png"), expected[..., None].expand(-1, -1, 3))


@pytest.mark.parametrize(("mode", "suffix"), [("L", "png"), ("1", "png"), ("CMYK", "jpg"), ("L", "jpg"), ("RGB", "webp"), ("P", "gif"), ("RGB", "bmp")])
def test_other_kinds_become_rgb(picture, tmp_path, mode, suffix):
    file = tmp_path / f"a.{suffix}"
    picture.convert(mode).save(file)
    assert open_image(file).shape == (20, 30, 3)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"\n  <html>", "a web page"),
        (b"\x00\x00\x00\x20ftypisom", "a film"),
        (b"RIFF\x00\x00\x00\x00WAVEfmt ", "a sound"),
        (b"some text", "no picture"),
    ],
)
def test_other_files_are_named(tmp_path, data, message):
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(MediaError, match=message):
        open_image(tmp_path / "a.png")


def test_film_is_named(media):
    with pytest.raises(MediaError, match="a film"):
        open_image(media / "mova_cat.mp4")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "tif"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_files_are_refused(picture, tmp_path, suffix, share):
    file = tmp_path / f"a.{suffix}"
    picture.resize((300, 200)).save(file)
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    with pytest.raises(MediaError, match="download it again|no picture"):
        open_image(file)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(MediaError, match="not there"):
        open_image(tmp_path / "none.png")
    with pytest.raises(MediaError, match="a folder"):
        open_image(tmp_path)


def test_picture_that_unfolds_too_far_is_refused(picture, tmp_path, monkeypatch):
    picture.save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(MediaError, match="more than 200 pixels"):
        open_image(tmp_path / "a.png")


# Fit


def test_fit_matches_reference(golden):
    case = golden("prepare_latents")
    raw, expected = case["image_raw"], case["image_pre"][0].movedim(0, -1)
    assert torch.equal(((fit_image(raw, 48, 64) + 1) * 127.5).round().to(torch.uint8), case["image_cropped"])
    for image in (raw, raw.float() / 255, raw[None].double() / 255, Image.fromarray(raw.numpy())):
        assert torch.equal(fit_image(image, 48, 64), expected)


def test_fit_does_not_touch_its_input():
    image = torch.rand(1, 10, 12, 4)
    before = image.clone()
    assert fit_image(image, 16, 16).shape == (16, 16, 3)
    assert torch.equal(image, before)


@pytest.mark.parametrize("shape", [(9, 7), (9, 7, 1), (1, 9, 7, 1)])
def test_gray_is_spread_over_the_colours(shape):
    fitted = fit_image(torch.rand(shape), 9, 7)
    assert torch.equal(fitted[..., 0], fitted[..., 2])


def test_alpha_goes_over_white():
    image = torch.zeros(4, 4, 4)
    assert torch.equal(fit_image(image, 4, 4), torch.ones(4, 4, 3))
    image[..., 3] = 1
    assert torch.equal(fit_image(image, 4, 4), -torch.ones(4, 4, 3))


def test_crop_takes_the_middle():
    image = torch.zeros(10, 40, 3)
    image[:, 15:25] = 1
    assert torch.equal(fit_image(image, 10, 10), torch.ones(10, 10, 3))
    assert torch.equal(fit_image(image.transpose(0, 1), 10, 10), torch.ones(10, 10, 3))


def test_extreme_aspect_keeps_at_least_a_pixel():
    assert fit_image(torch.rand(1, 1000, 3), 64, 16).shape == (64, 16, 3)


def test_slight_overshoot_is_clamped():
    assert torch.equal(fit_image(torch.full((4, 4, 3), 1.02), 4, 4), torch.ones(4, 4, 3))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.full((4, 4, 3), float("nan")), "no numbers"),
        (torch.full((4, 4, 3), float("inf")), "no numbers"),
        (torch.full((4, 4, 3), 200.0), "Divide by 255"),
        (torch.full((4, 4, 3), -1.0), "shift -1..1"),
        (torch.zeros(0, 4, 3), "channel last"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "int64"),
        (torch.zeros(3, 8, 8), "channel last"),
        (torch.zeros(2, 4, 4, 3), "Pick one frame"),
        ("photo.png", "open_image"),
    ],
)
def test_wrong_pictures_are_refused(image, message):
    with pytest.raises(InputError, match=message):
        fit_image(image, 16, 16)


# Condition


def test_condition_matches_reference(vvae, golden):
    case = golden("prepare_latents")
    size = {"height": 48, "width": 64, "num_frames": 9}
    condition = image_condition(vvae, case["image_raw"], **size)
    assert condition.dtype == torch.float32 and distance(condition, case["condition"]) < TOLERANCE
    last = image_condition(vvae, case["image_raw"], last_image=case["last_image_raw"], **size)
    assert distance(last, case["condition_last"]) < TOLERANCE
    assert torch.equal(last[:, :4], case["condition_last"][:, :4])


def test_bf16_condition_matches_reference(tiny_mova, golden):
    vvae = load_video_vae(tiny_mova, dtype=torch.bfloat16)
    condition = image_condition(vvae, golden("cfg_loop")["image"], height=48, width=64, num_frames=9)
    assert distance(condition, golden("cfg_loop_bf16")["condition"]) < 1.5e-2  # bit-equal where diffusers normalises in float32


def test_no_picture_is_a_white_frame(vvae):
    size = {"height": 16, "width": 32, "num_frames": 5}
    assert torch.equal(image_condition(vvae, None, **size), image_condition(vvae, torch.ones(7, 9, 3), **size))


def test_single_frame_is_all_given(vvae):
    condition = image_condition(vvae, torch.rand(16, 16, 3), height=16, width=16, num_frames=1)
    assert condition.shape == (1, 20, 1, 2, 2) and torch.equal(condition[:, :4], torch.ones(1, 4, 1, 2, 2))
    with pytest.raises(InputError, match="no room for a last picture"):
        image_condition(vvae, None, height=16, width=16, num_frames=1, last_image=torch.rand(16, 16, 3))


def test_condition_reports_and_can_be_cancelled(vvae):
    calls = []
    image_condition(vvae, None, height=16, width=16, num_frames=193, on_chunk=lambda done, total: calls.append((done, total)))
    assert calls == [(i, 49) for i in range(1, 50)]
    with pytest.raises(KeyboardInterrupt):
        image_condition(vvae, None, height=16, width=16, num_frames=9, on_chunk=lambda done, total: (_ for _ in ()).throw(KeyboardInterrupt))


def test_tiling_reaches_the_encoder(vvae):
    size = {"height": 80, "width": 64, "num_frames": 5}
    image = torch.rand(80, 64, 3, generator=torch.Generator().manual_seed(0))
    whole, tiled = image_condition(vvae, image, tiling="off", **size), image_condition(vvae, image, tiling=(64, 48), **size)
    assert torch.equal(tiled[:, :4], whole[:, :4])
    assert 0 < distance(tiled, whole) < 0.4  # random weights look far around


# Sizes


@pytest.mark.parametrize(
    ("height", "width", "frames", "message"),
    [
        (360, 640, 193, "height is 360.*Nearest: 368"),
        (352, 650, 193, "width is 650.*Nearest: 656"),
        (352, 640, 192, "num_frames is 192.*Nearest: 193"),
        (0, 640, 193, "Nearest: 16"),
        (352, 640, 0, "Nearest: 1"),
        (352, 100000, 193, "Nearest: 4096"),
        (352, 640, 10**9, "Nearest: 1921"),
    ],
)
def test_wrong_sizes_name_the_nearest(height, width, frames, message):
    with pytest.raises(InputError, match=message):
        check_size(height, width, frames)


def test_snapped_sizes_are_accepted():
    assert snap_size(720, 1280) == (720, 1280) and snap_size(1, 650) == (16, 656)
    assert [snap_length(n) for n in (-3, 0, 1, 2, 3, 5, 193, 194)] == [1, 1, 1, 1, 5, 5, 193, 193]
    for n in range(0, 300, 7):
        check_size(*snap_size(n, 2 * n), snap_length(n))
