"""The few ComfyUI nodes that bring files in and out, under their ComfyUI names. Loaded as part of the pack, like its own nodes."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io, ui

from ..mova.image import open_image
from ..mova.media import Clip, write_audio
from ..mova.media_reading import read_audio

NODES: list[type[io.ComfyNode]] = []


def add(node_id: str, display_name: str, *inputs: Any, outputs: tuple[Any, ...] = (), run: Callable) -> None:
    """Adds a node that calls run(cls, **inputs). Without outputs it is an output node."""
    schema = io.Schema(node_id=node_id, display_name=display_name, inputs=list(inputs), outputs=[kind.Output() for kind in outputs], is_output_node=not outputs)
    methods = {"define_schema": lambda cls: schema, "validate_inputs": check_names, "execute": run}
    NODES.append(type(node_id, (io.ComfyNode,), {name: classmethod(method) for name, method in methods.items()}))


def check_names(cls: Any, image: str | None = None, audio: str | None = None, filename_prefix: str | None = None) -> bool | str:
    """A sentence for a file that is not in the input directory; raises for a name outside of its directory. None: it comes over a link, or no such input."""
    if filename_prefix is not None:
        folder_paths.get_annotated_filepath(filename_prefix, folder_paths.get_output_directory())
    name = audio if image is None else image
    there = name is None or os.path.isfile(folder_paths.get_annotated_filepath(str(name)))
    return there or f"'{name}' is not in {folder_paths.get_input_directory()}: put the file there."


def load_image(cls: Any, image: str) -> io.NodeOutput:
    return io.NodeOutput(open_image(folder_paths.get_annotated_filepath(image))[None])


def load_audio(cls: Any, audio: str) -> io.NodeOutput:
    waveform, rate = read_audio(folder_paths.get_annotated_filepath(audio))
    return io.NodeOutput({"waveform": waveform[None], "sample_rate": rate})


def create_video(cls: Any, images: torch.Tensor, fps: float, audio: dict[str, Any] | None = None) -> io.NodeOutput:
    film = Clip(images[..., :3], None, fps, 0)
    return io.NodeOutput(replace(film, audio=audio["waveform"][0], sample_rate=audio["sample_rate"]) if audio else film)


def next_file(cls: Any, prefix: str, ending: str) -> tuple[Path, dict[str, Any]]:
    """The next free name below the output directory, and what the file tells about its making."""
    folder, name, counter, *_ = folder_paths.get_save_image_path(prefix, folder_paths.get_output_directory())
    return Path(folder, f"{name}_{counter:05}_{ending}"), {"prompt": cls.hidden.prompt, **cls.hidden.extra_pnginfo}


def save_video(cls: Any, video: Clip, filename_prefix: str, **coding: str) -> io.NodeOutput:
    path, origin = next_file(cls, filename_prefix, ".mp4")
    replace(video, metadata=origin).save(path)
    return io.NodeOutput(ui={"files": [path]})


def save_audio(cls: Any, audio: dict[str, Any], filename_prefix: str) -> io.NodeOutput:
    paths = []
    for waveform in audio["waveform"]:
        path, origin = next_file(cls, filename_prefix, ".flac")
        write_audio(path, waveform, audio["sample_rate"], origin)
        paths.append(path)
    return io.NodeOutput(ui={"files": paths})


IMAGES, AUDIO, FPS = io.Image.Input("images"), io.Audio.Input("audio"), io.Float.Input("fps", default=30.0, min=1.0, max=120.0)
PREFIX = io.String.Input("filename_prefix", default="ComfyUI")
CODING = io.Combo.Input("format", options=["auto", "mp4"]), io.Combo.Input("codec", options=["auto", "h264"], optional=True)
add("LoadImage", "Load Image", io.Combo.Input("image"), outputs=(io.Image,), run=load_image)
add("LoadAudio", "Load Audio", io.Combo.Input("audio"), outputs=(io.Audio,), run=load_audio)
add("CreateVideo", "Create Video", IMAGES, FPS, io.Audio.Input("audio", optional=True), outputs=(io.Video,), run=create_video)
add("SaveVideo", "Save Video", io.Video.Input("video"), PREFIX, *CODING, run=save_video)
add("SaveAudio", "Save Audio (FLAC)", AUDIO, PREFIX, run=save_audio)
add("PreviewImage", "Preview Image", IMAGES, run=lambda cls, images: io.NodeOutput(ui=ui.PreviewImage(images, cls=cls)))
add("PreviewAudio", "Preview Audio", AUDIO, run=lambda cls, audio: io.NodeOutput(ui=ui.PreviewAudio(audio, cls=cls)))
add("PreviewAny", "Preview as Text", io.AnyType.Input("source"), run=lambda cls, source: io.NodeOutput(ui=ui.PreviewText(str(source))))
for name, kind in (("String", io.String), ("StringMultiline", io.String), ("Boolean", io.Boolean), ("Float", io.Float), ("Int", io.Int)):
    field = kind.Input("value", control_after_generate=kind is io.Int)
    add(f"Primitive{name}", name, field, outputs=(kind,), run=lambda cls, value: io.NodeOutput(value))
