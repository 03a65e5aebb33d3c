"""The few ComfyUI nodes that bring files in and out, under their ComfyUI names. Loaded as part of the pack, like its own nodes."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image, ImageOps

from ..mova.image import open_image
from ..mova.media import Clip, new_file, write_audio
from ..mova.media_reading import read_audio

NODES: list[type[io.ComfyNode]] = []
BIG = 2**63 - 1


def add(node_id: str, display_name: str, *inputs: Any, outputs: tuple[Any, ...] = (), run: Callable, check: Callable | None = None) -> None:
    """Adds a node that calls run(cls, **inputs); check is its validate_inputs. Without outputs it is an output node."""
    schema = io.Schema(node_id=node_id, display_name=display_name, inputs=list(inputs), outputs=[kind.Output() for kind in outputs],
                       is_output_node=not outputs, hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo])  # fmt: skip
    methods = {"define_schema": lambda cls: schema, "execute": run} | ({"validate_inputs": check} if check else {})
    NODES.append(type(node_id, (io.ComfyNode,), {name: classmethod(method) for name, method in methods.items()}))


def check_input(name: str | None) -> bool | str:
    """A sentence, or an error, for a file that is not in the input directory; None: the name comes over a link."""
    there = name is None or os.path.isfile(folder_paths.get_annotated_filepath(name))
    return there or f"'{name}' is not in {folder_paths.get_input_directory()}: put the file there."


def check_name(cls: Any, filename_prefix: str | None) -> bool:
    """Raises for a name outside of the output directory; None: it comes over a link."""
    return filename_prefix is None or bool(folder_paths.get_annotated_filepath(filename_prefix, folder_paths.get_output_directory()))


def load_image(cls: Any, image: str) -> io.NodeOutput:
    """[1,H,W,3] upright, and a mask [1,H,W] that is 1 where the picture is transparent (64x64 zeros for one that never is)."""
    path = folder_paths.get_annotated_filepath(image)
    pixels, mask = open_image(path), torch.zeros(64, 64)
    with Image.open(path) as picture:
        if picture.has_transparency_data:  # the colours below the transparency stay, as in ComfyUI
            rgba = torch.from_numpy(np.array(ImageOps.exif_transpose(picture).convert("RGBA"))).float() / 255
            pixels, mask = rgba[..., :3], 1 - rgba[..., 3]
    return io.NodeOutput(pixels[None], mask[None])


def load_audio(cls: Any, audio: str) -> io.NodeOutput:
    waveform, rate = read_audio(folder_paths.get_annotated_filepath(audio))
    return io.NodeOutput({"waveform": waveform[None], "sample_rate": rate})


def create_video(cls: Any, images: torch.Tensor, fps: float, audio: dict[str, Any] | None = None) -> io.NodeOutput:
    film = Clip(images[..., :3], None, fps, 0)
    return io.NodeOutput(replace(film, audio=audio["waveform"][0], sample_rate=audio["sample_rate"]) if audio else film)


def save_all(cls: Any, prefix: str, ending: str, items: Any, save: Callable[[Path, Any, dict[str, Any]], None]) -> io.NodeOutput:
    """Calls save(path, item, how it was made) with the next free names below the output directory."""
    folder, name, counter, *_ = folder_paths.get_save_image_path(prefix, folder_paths.get_output_directory())
    paths = [Path(folder, f"{name}_{counter + index:05}_{ending}") for index in range(len(items))]
    for path, item in zip(paths, items, strict=True):
        save(path, item, {"prompt": cls.hidden.prompt, **cls.hidden.extra_pnginfo})
    return io.NodeOutput(ui={"files": paths})


def save_video(cls: Any, video: Clip, filename_prefix: str, **coding: str) -> io.NodeOutput:
    return save_all(cls, filename_prefix, ".mp4", [video], lambda path, film, origin: replace(film, metadata=origin).save(path))


def save_audio(cls: Any, audio: dict[str, Any], filename_prefix: str) -> io.NodeOutput:
    return save_all(cls, filename_prefix, ".flac", audio["waveform"], lambda path, sound, origin: write_audio(path, sound, audio["sample_rate"], origin))


def write_png(path: Path, pixels: torch.Tensor, origin: dict[str, Any]) -> None:
    with new_file(path) as temporary:
        Image.fromarray((pixels.cpu().float().clamp(0, 1) * 255).to(torch.uint8).numpy()).save(temporary)


IMAGES, AUDIO, FPS = io.Image.Input("images"), io.Audio.Input("audio"), io.Float.Input("fps", default=30.0, min=1.0, max=120.0)
PREFIX = io.String.Input("filename_prefix", default="ComfyUI")
CODING = io.Combo.Input("format", options=["auto", "mp4"]), io.Combo.Input("codec", options=["auto", "h264"], optional=True)
add("LoadImage", "Load Image", io.Combo.Input("image"), outputs=(io.Image, io.Mask), run=load_image, check=lambda cls, image: check_input(image))
add("LoadAudio", "Load Audio", io.Combo.Input("audio"), outputs=(io.Audio,), run=load_audio, check=lambda cls, audio: check_input(audio))
add("CreateVideo", "Create Video", IMAGES, FPS, io.Audio.Input("audio", optional=True), outputs=(io.Video,), run=create_video)
add("SaveVideo", "Save Video", io.Video.Input("video"), PREFIX, *CODING, run=save_video, check=check_name)
add("SaveAudio", "Save Audio (FLAC)", AUDIO, PREFIX, run=save_audio, check=check_name)
add(
    "SaveImage",
    "Save Image",
    IMAGES,
    PREFIX,
    check=check_name,
    run=lambda cls, images, filename_prefix: save_all(cls, filename_prefix, ".png", images, write_png),
)
add("PreviewImage", "Preview Image", IMAGES, run=lambda cls, images: io.NodeOutput(ui=ui.PreviewImage(images, cls=cls)))
add("PreviewAudio", "Preview Audio", AUDIO, run=lambda cls, audio: io.NodeOutput(ui=ui.PreviewAudio(audio, cls=cls)))
add("PreviewAny", "Preview as Text", io.AnyType.Input("source"), run=lambda cls, source: io.NodeOutput(ui=ui.PreviewText(str(source))))
for name, kind in (("String", io.String), ("StringMultiline", io.String), ("Boolean", io.Boolean), ("Float", io.Float)):
    add(f"Primitive{name}", name, kind.Input("value"), outputs=(kind,), run=lambda cls, value: io.NodeOutput(value))
WHOLE = io.Int.Input("value", min=-BIG, max=BIG, control_after_generate=True)
add("PrimitiveInt", "Int", WHOLE, outputs=(io.Int,), run=lambda cls, value: io.NodeOutput(value))
