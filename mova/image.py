"""The start picture: read from a file, fitted to the clip's size, and encoded as the model's condition (spec/mova.md 5.1, 5.2)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import InputError, MediaError

if TYPE_CHECKING:
    from .video_vae import OnChunk, Tiling, VideoVAE

SIDE = 16  # px: 8 of the VAE times 2 of the patch
MAX_SIDE = 4096  # px
MAX_FRAMES = 1921  # 80 s at 24 fps
OVERSHOOT = 0.25  # how far resizing and decoding may leave 0..1; more is another range of values

# What a file that Pillow does not know really is: (offset, bytes, words).
IMPOSTORS = (
    (4, b"ftyp", "a film or sound"),
    (8, b"AVI ", "a film"),
    (8, b"WAVE", "a sound"),
    (0, b"\x1aE\xdf\xa3", "a film (Matroska or WebM)"),
    (0, b"FLV", "a film"),
    (0, b"\x00\x00\x01\xba", "a film (MPEG)"),
    (0, b"ID3", "a sound (MP3)"),
    (0, b"\xff\xfb", "a sound (MP3)"),
    (0, b"OggS", "a sound or film (Ogg)"),
    (0, b"fLaC", "a sound (FLAC)"),
    (0, b"<!DOCTYPE", "a web page (the download was refused)"),
    (0, b"<!doctype", "a web page (the download was refused)"),
    (0, b"<html", "a web page (the download was refused)"),
    (0, b"<HTML", "a web page (the download was refused)"),
    (0, b"<svg", "a vector drawing"),
    (0, b"%PDF", "a PDF"),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the picture"),
)


def open_image(path: str | Path) -> torch.Tensor:
    """A picture file as [H,W,3] float32 in 0..1, upright (EXIF), transparent parts over white. MediaError when it is no readable picture."""
    with opened_picture(path) as image:
        image.load()
        return picture_tensor(ImageOps.exif_transpose(image))


def open_reduced(path: str | Path, side: int) -> torch.Tensor:
    """As `open_image`, a larger picture thinned out to about `side` px: it never lies in memory in full size as floats, a JPEG not even as bytes."""
    with opened_picture(path) as image:
        image.draft("RGB", (side, side))
        scale = max(1, max(image.size) // side)
        small = image.resize((max(1, image.width // scale), max(1, image.height // scale)), Image.Resampling.NEAREST)
        small.info, exif = image.info, image.getexif()
        small.getexif().update(exif)
        return picture_tensor(ImageOps.exif_transpose(small))


@contextmanager
def opened_picture(path: str | Path) -> Iterator[Image.Image]:
    """A picture file, not decoded yet. MediaError for whatever goes wrong while the block reads it."""
    file = Path(path)
    if not file.is_file():
        raise MediaError(f"{file} is {'a folder' if file.is_dir() else 'not there'}: give the path of a picture (PNG, JPEG, WebP, ...).")
    try:
        with Image.open(file) as image:
            yield image
    except UnidentifiedImageError:
        raise MediaError(f"{file} is {diagnose_file(file)}: give a picture (PNG, JPEG, WebP, ...).") from None
    except Image.DecompressionBombError:
        raise MediaError(
            f"{file} unfolds to more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels, which could exhaust the memory: give a smaller picture."
        ) from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:  # what Pillow's decoders raise on damaged data
        raise MediaError(f"{file} is truncated, damaged or not allowed to be read ({error}): copy or download it again.") from None


def diagnose_file(file: Path) -> str:
    with file.open("rb") as stream:
        head = stream.read(64)
    if not head:
        return "empty (0 bytes)"
    return next((words for offset, magic, words in IMPOSTORS if head[offset:].lstrip().startswith(magic)), "no picture that can be read here")


def picture_tensor(image: Image.Image) -> torch.Tensor:
    """A PIL image of any mode as [H,W,3] float32 in 0..1, transparent parts over white."""
    if image.mode.startswith("I"):  # 16-bit gray, which convert("RGB") would clip at 255
        gray = torch.from_numpy(np.array(image, dtype=np.float32)).clamp(0, 65535) / 65535
        return gray[..., None].expand(-1, -1, 3).contiguous()
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return torch.from_numpy(np.array(image.convert("RGB"))).float() / 255


def fit_image(image: torch.Tensor | Image.Image, height: int, width: int) -> torch.Tensor:
    """A picture cut to the aspect of `height` x `width` around its centre and resized to it: [height,width,3] float32 in -1..1.

    image: [H,W], [H,W,1|3|4] or [1,H,W,1|3|4], float in 0..1 or uint8, or a PIL image; transparent parts go over white.
    Rounded to uint8 and resized by PIL (bicubic), as the reference does. InputError for anything else.
    """
    if height < 1 or width < 1:
        raise InputError(f"A picture cannot be fitted to {height}x{width} pixels: both sides must be at least 1.")
    pixels = picture_tensor(image) if isinstance(image, Image.Image) else three_channels(image)
    full = Image.fromarray((pixels.cpu() * 255).round().clamp(0, 255).to(torch.uint8).numpy())
    fitted = full.crop(centre_crop(*full.size, height, width)).resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(fitted)).float() / 255 * 2 - 1


def three_channels(image: torch.Tensor) -> torch.Tensor:
    """One picture of any accepted layout as [H,W,3] float32 in 0..1."""
    if not isinstance(image, torch.Tensor):
        raise InputError(f"The picture is a {type(image).__name__}: a tensor or a PIL image is needed. Read a file with mova.open_image.")
    given = list(image.shape)
    if image.ndim == 4:
        if image.shape[0] != 1:
            raise InputError(f"The picture is {given}: one picture is needed, not {image.shape[0]}. Pick one frame.")
        image = image[0]
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[-1] not in (1, 3, 4) or 0 in image.shape:
        raise InputError(f"The picture is {given}: [H,W,3] (or 1 or 4 channels, channel last) is needed.")
    pixels = image.float() / 255 if image.dtype == torch.uint8 else image
    check_pixels(pixels, "picture")
    pixels = pixels.float()
    if pixels.shape[-1] == 4:
        alpha = pixels[..., 3:].clamp(0, 1)
        return pixels[..., :3] * alpha + (1 - alpha)
    return pixels.expand(-1, -1, 3)


def check_pixels(pixels: torch.Tensor, what: str) -> None:
    """InputError unless the values are floats of about 0..1."""
    if not pixels.is_floating_point():
        raise InputError(f"The {what} holds {str(pixels.dtype).removeprefix('torch.')} values: floats in 0..1 are needed.")
    low, high = (float(bound) for bound in torch.aminmax(pixels))
    if not (np.isfinite(low) and np.isfinite(high)):
        raise InputError(f"The {what} holds values that are no numbers (NaN or infinite): check the step that made it.")
    if low < -OVERSHOOT or high > 1 + OVERSHOOT:
        raise InputError(f"The {what} has values from {low:.3g} to {high:.3g}: 0..1 is needed. Divide by 255, or shift -1..1 to 0..1.")


def centre_crop(image_width: int, image_height: int, height: int, width: int) -> tuple[int, int, int, int]:
    """The largest box (left, top, right, bottom) of the aspect `height` x `width` in the middle of the picture, in whole pixels."""
    if image_height / image_width < height / width:
        crop_width, crop_height = max(int(image_height / height * width), 1), image_height
    else:
        crop_width, crop_height = image_width, max(int(image_width / width * height), 1)
    left, top = (image_width - crop_width) // 2, (image_height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def image_condition(
    vvae: VideoVAE,
    image: torch.Tensor | Image.Image | None,
    *,
    height: int,
    width: int,
    num_frames: int,
    last_image: torch.Tensor | Image.Image | None = None,
    tiling: Tiling = "auto",
    on_chunk: OnChunk | None = None,
) -> torch.Tensor:
    """What the model sees of the start picture: [1,20,T,h,w] float32, 4 mask channels (1 = given) and 16 normalised latents.

    image None = a white frame (text to video and sound). Pictures as in `fit_image`; the frames between them are mid grey.
    height, width: multiples of 16; num_frames: 4n+1. tiling, on_chunk: as in `VideoVAE.encode`. InputError names what does not fit.
    """
    check_size(height, width, num_frames)
    if last_image is not None and num_frames == 1:
        raise InputError("A clip of 1 frame has no room for a last picture: set num_frames to 5 or more, or leave the last picture out.")
    first = torch.ones(height, width, 3) if image is None else fit_image(image, height, width)
    last = None if last_image is None else fit_image(last_image, height, width)
    chunks = condition_chunks(first, last, num_frames, vvae.temporal_compression)
    latents = vvae.encode_chunks(chunks, num_frames=num_frames, height=height, width=width, tiling=tiling, on_chunk=on_chunk)
    given = torch.zeros(num_frames + 3)  # the first picture counts for the four pixel frames of its latent frame
    given[:4] = 1
    given[-1] = float(last is not None or num_frames == 1)
    mask = given.view(-1, 4).T[None, :, :, None, None].expand(-1, -1, -1, *latents.shape[-2:])  # [1, 4, T, h, w]
    return torch.cat([mask, vvae.normalize(latents)], dim=1)


def condition_chunks(first: torch.Tensor, last: torch.Tensor | None, num_frames: int, temporal: int) -> Iterator[torch.Tensor]:
    """The condition film chunk by chunk, [1,3,1,H,W] then [1,3,4,H,W]: the first picture, grey (0 in -1..1), the last picture."""
    height, width, _ = first.shape
    yield first.movedim(-1, 0)[None, :, None]
    grey = torch.zeros(1, 3, temporal, height, width)  # one object for all: the film itself would be 2 GB at 720p
    groups = (num_frames - 1) // temporal
    yield from [grey] * (groups if last is None else groups - 1)
    if last is not None:
        yield torch.cat([grey[:, :, 1:], last.movedim(-1, 0)[None, :, None]], dim=2)


def check_size(height: int, width: int, num_frames: int) -> None:
    """InputError, naming the nearest size that works, unless both sides are multiples of 16 and the length is 4n+1."""
    for name, side in (("height", height), ("width", width)):
        if side != snap_side(side):
            raise InputError(f"{name} is {side} px: a multiple of {SIDE} from {SIDE} to {MAX_SIDE} is needed. Nearest: {snap_side(side)}.")
    if num_frames != snap_length(num_frames):
        raise InputError(f"num_frames is {num_frames}: 1, 5, 9, ... up to {MAX_FRAMES} (4n+1) is needed. Nearest: {snap_length(num_frames)}.")


def snap_size(height: int, width: int) -> tuple[int, int]:
    """The nearest sides the model takes: multiples of 16 px, 16..4096."""
    return snap_side(height), snap_side(width)


def snap_side(pixels: int) -> int:
    return min(max(int(pixels + SIDE // 2) // SIDE * SIDE, SIDE), MAX_SIDE)


def snap_length(frames: int) -> int:
    """The nearest number of frames the model takes: 4n+1, 1..1921."""
    return min(max(int(frames + 1) // 4 * 4 + 1, 1), MAX_FRAMES)
