"""What a folder or file is, and whether it is complete: told from configs and file headers alone. Only LoRAs are read whole."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .audio_vae import DAC, AudioVAEConfig, stored_shapes
from .bridge import Bridge, BridgeConfig
from .checkpoint import Component, TensorEntry, compare_tensors, open_component, open_safetensors, read_config, read_header, read_json
from .errors import CheckpointError, InputError
from .fp8 import follow_config
from .lora.files import NAMES, find_file, holds_lora, is_archive
from .lora.inspection import explain_lora
from .parts import FOLDERS
from .schedule import ScheduleConfig
from .text import read_tokenizer
from .towers import AudioTower, AudioTowerConfig, TowerConfig, VideoTower
from .umt5 import EMBEDDING, TextEncoderConfig, import_transformers
from .video_vae import VideoVAEConfig, import_network, read_vae_config

Shapes = dict[str, tuple[int, ...]]

# ---------------------------------------------------------------- the parts of a checkpoint


def text_network(config: TextEncoderConfig) -> nn.Module:
    transformers = import_transformers()
    return transformers.UMT5EncoderModel(transformers.UMT5Config(**dataclasses.asdict(config)))


def video_network(config: Mapping[str, Any]) -> nn.Module:
    return import_network().from_config(dict(config))


@dataclass(frozen=True)
class Part:
    """A sub-folder with weights: class in config.json, our config (its defaults are the release), network, the sizes worth showing."""

    class_name: str
    config: type
    network: Callable[[Any], nn.Module]
    sizes: tuple[str, ...]


PARTS = {
    "video_dit": Part("WanModel", TowerConfig, VideoTower, ("dim", "num_layers")),
    "video_dit_2": Part("WanModel", TowerConfig, VideoTower, ("dim", "num_layers")),
    "audio_dit": Part("WanAudioModel", AudioTowerConfig, AudioTower, ("dim", "num_layers")),
    "dual_tower_bridge": Part("DualTowerConditionalBridge", BridgeConfig, Bridge, ("interaction_strategy",)),
    "audio_vae": Part("DAC", AudioVAEConfig, DAC, ("latent_dim", "sample_rate")),
    "video_vae": Part("AutoencoderKLWan", VideoVAEConfig, video_network, ("base_dim", "z_dim")),
    "text_encoder": Part("UMT5EncoderModel", TextEncoderConfig, text_network, ("d_model", "num_layers")),
}


def build_network(name: str, config: Mapping[str, Any]) -> nn.Module:
    """Part `name` on the meta device, as its config.json describes it."""
    part = PARTS[name]
    settings = config if name == "video_vae" else read_config(part.config, config, f"{name}/config.json")  # diffusers reads its own
    with torch.device("meta"):
        network = part.network(settings)
    follow_config(network, config, f"{name}/config.json")
    return network


def expected_shapes(name: str, config: Mapping[str, Any], stored: Collection[str] = ()) -> Shapes:
    """Names and shapes of the weights of part `name` by its config.json; the names `stored` choose between two spellings of the same weights."""
    network = build_network(name, config)
    if name == "audio_vae":
        return stored_shapes(network, weight_normed=any(key.endswith(".weight_g") for key in stored))
    shapes = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    if name == "text_encoder":  # one tensor with two names; a file holds either or both
        embedding = shapes[EMBEDDING[0]]
        shapes = {key: shape for key, shape in shapes.items() if key not in EMBEDDING}
        shapes |= dict.fromkeys([key for key in EMBEDDING if key in stored] or EMBEDDING[:1], embedding)
    return shapes


# ---------------------------------------------------------------- reports


@dataclass(frozen=True)
class Weights:
    """Tensors counted from file headers."""

    tensors: int = 0
    parameters: int = 0
    size: int = 0  # bytes
    dtypes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.parameters:,} parameters, {show_size(self.size)}, {' + '.join(self.dtypes) or 'no weights'}"


@dataclass(frozen=True)
class PartReport:
    """One sub-folder. `expected` tensors by its config, None when that could not be told; `problems` in sentences, none = complete."""

    name: str
    class_name: str = ""
    sizes: str = ""
    weights: Weights = Weights()
    expected: int | None = None
    released: bool = False
    problems: tuple[str, ...] = ()

    def __str__(self) -> str:
        counted = f"{self.weights.tensors:,} of {self.expected:,} tensors" if self.expected is not None else f"{self.weights.tensors:,} tensors"
        told = [text for text in (self.class_name, self.sizes, f"{counted}, {self.weights}" if self.weights.tensors else "") if text]
        state = "complete" if not self.problems else "NOT USABLE"
        return "\n".join([f"  {self.name:18} {state:11} {'; '.join(told)}", *(f"      {problem}" for problem in self.problems)])


@dataclass(frozen=True)
class Report:
    """What `inspect_path` found; str() is what a person reads."""

    path: Path
    what: str
    parts: tuple[PartReport, ...] = ()
    weights: Weights = Weights()
    notes: tuple[str, ...] = ()
    complete: bool = True

    def __str__(self) -> str:
        total = f"  {'total':18} {'complete' if self.complete else 'NOT USABLE':11} {self.weights}"
        return "\n".join([f"{self.path}: {self.what}", *map(str, self.parts), *([total] if len(self.parts) > 1 else []), *(f"  {note}" for note in self.notes)])


def describe(path: str | Path) -> str:
    """What a checkpoint folder, a component folder or a weight file is, for people. CheckpointError when there is nothing of that kind."""
    return str(inspect_path(path))


def inspect_path(path: str | Path) -> Report:
    """As `describe`, in structured form. Damaged files are reported, not raised."""
    path = Path(path)
    if path.is_file():
        return inspect_file(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist: give a MOVA checkpoint folder, one of its sub-folders, or a .safetensors file.")
    if (path / "model_index.json").is_file():
        return inspect_checkpoint(path)
    if (path / "config.json").is_file():
        return inspect_component_folder(path)
    if any((path / name).is_file() for name in NAMES):
        return inspect_file(find_file(path))
    raise CheckpointError(
        f"{path} has neither model_index.json nor config.json: give the top folder of a MOVA checkpoint, one of its sub-folders, or a .safetensors file."
    )


# ---------------------------------------------------------------- folders


def inspect_checkpoint(root: Path) -> Report:
    parts = [inspect_part(root, name) for name in PARTS] + [inspect_scheduler(root), inspect_tokenizer(root)]
    try:
        index = read_json(root / "model_index.json")
    except CheckpointError as error:
        index, parts = {}, [PartReport("model_index.json", problems=(str(error),)), *parts]
    complete = not any(part.problems for part in parts)
    released = all(part.released for part in parts if part.name in PARTS)
    what = "a MOVA checkpoint of the released size" if released else "a checkpoint in MOVA's layout, not (all) of the released size"
    origin = str(index.get("_name_or_path") or "").rpartition("/")[2]
    notes = [] if index.get("_class_name", "MOVA") == "MOVA" else [f"model_index.json names the class {index['_class_name']}, not MOVA."]
    if missing := [part.name for part in parts if not (root / part.name).exists()]:
        notes.append(f"Missing sub-folders: {', '.join(missing)}. Download them.")
    return Report(root, what + (f" ({origin})" if origin else ""), tuple(parts), add_up([part.weights for part in parts]), tuple(notes), complete)


def inspect_component_folder(folder: Path) -> Report:
    """A folder with config.json alone, such as `video_dit`."""
    try:
        config = read_json(folder / "config.json")
    except CheckpointError as error:
        return Report(folder, "a folder with a damaged config.json", notes=(str(error),), complete=False)
    names = [name for name, part in PARTS.items() if part.class_name == config.get("_class_name", (config.get("architectures") or [None])[0])]
    if not names:
        found = config.get("_class_name", "model of unknown class")
        raise CheckpointError(f"{folder} holds a {found}, no part of MOVA: give a folder with model_index.json, or one of its sub-folders.")
    name = folder.name if folder.name in names else names[0]
    part = judge_part(name, Component(folder.name, folder, config))
    return Report(folder, f"one part of a MOVA checkpoint ({name})", (part,), part.weights, complete=not part.problems)


def inspect_part(root: Path, name: str) -> PartReport:
    try:
        return judge_part(name, open_component(root, name))
    except CheckpointError as error:
        return PartReport(name, problems=(str(error),))


def judge_part(name: str, component: Component) -> PartReport:
    """Compares what is stored with what config.json describes."""
    part, config = PARTS[name], component.config
    report = PartReport(name, part.class_name, ", ".join(f"{key} {config[key]}" for key in part.sizes if key in config))
    try:
        index = component.index
        report = dataclasses.replace(report, weights=count_weights(index))
        values = read_vae_config(component) if name == "video_vae" else read_config(part.config, config, str(component.folder / "config.json"))
        expected = expected_shapes(name, config, index)
    except (CheckpointError, InputError) as error:
        return dataclasses.replace(report, problems=(str(error),))
    except (TypeError, ValueError, ImportError) as error:  # what diffusers says of a config it cannot build
        return dataclasses.replace(report, problems=(f"{component.folder}: the network that config.json describes cannot be built ({error}).",))
    return dataclasses.replace(report, expected=len(expected), released=values == part.config(), problems=tuple(compare_tensors(index, expected)))


def inspect_scheduler(root: Path) -> PartReport:
    try:
        config = read_config(ScheduleConfig, read_json(root / "scheduler" / "scheduler_config.json"), "scheduler/scheduler_config.json")
    except CheckpointError as error:
        return PartReport("scheduler", problems=(str(error),))
    return PartReport("scheduler", "FlowMatchPairScheduler", f"shift {config.shift:g}, sigma_min {config.sigma_min:.4g}")


def inspect_tokenizer(root: Path) -> PartReport:
    file = root / "tokenizer" / "tokenizer.json"
    if not file.is_file():
        return PartReport("tokenizer", problems=(f"{file} is missing: download the tokenizer folder.",))
    try:
        tokenizer = read_tokenizer(file, vocab_size=TextEncoderConfig.vocab_size)
    except CheckpointError as error:
        return PartReport("tokenizer", problems=(str(error),))
    return PartReport("tokenizer", type(tokenizer.model).__name__, f"{tokenizer.get_vocab_size():,} tokens")


# ---------------------------------------------------------------- single files

# What a file is, by a fragment of one of its keys; the first that fits wins.
SIGNATURES = {
    "audio_to_video_conditioners.": "MOVA dual_tower_bridge",
    "encoder.block.0.layer.0.SelfAttention.": "a UMT5 text encoder (MOVA text_encoder)",
    "encoder.block.1.block.0.block.": "MOVA audio_vae (DAC)",
    "decoder.up_blocks.0.resnets.": "a Wan 2.1 video VAE in diffusers naming (MOVA video_vae)",
    "decoder.upsamples.": "a Wan video VAE in the original naming (MOVA's video_vae has the same weights under diffusers names)",
    "condition_embedder.": "a Wan transformer in diffusers naming (MOVA reads the original naming)",
    ".cross_attn.norm_q.weight": "part of a Wan or MOVA tower",
}
# A whole tower, by the shape of patch_embedding.weight: (dimensions, channels in) -> what.
TOWERS = {
    (3, None): "MOVA audio_dit",
    (5, 36): "a Wan image-to-video expert in the original naming (MOVA video_dit and video_dit_2 look alike)",
    (5, 16): "a Wan text-to-video model; MOVA's experts read 36 channels, so it does not fit",
}


def inspect_file(file: Path) -> Report:
    """One weight file, told by its keys. What torch.save wrote is opened so that it cannot run code, and only as a LoRA."""
    if is_archive(file):
        explained = explain_lora(file, released_shapes())
        what = explained.what if explained.usable else f"a pickle archive, {explained.what}"
        return Report(file, what, notes=explained.notes, complete=explained.usable)
    try:
        with open_safetensors(file) as handle:
            metadata = handle.metadata() or {}
        index = read_header(file)
    except CheckpointError as error:
        return Report(file, str(error).removeprefix(f"{file} is "), complete=False)
    weights = count_weights(index)
    notes = [f"{weights.tensors:,} tensors, {weights}", *(f"metadata {key}: {value[:200]}" for key, value in sorted(metadata.items()))]
    if "-of-" in file.stem:
        notes.append("One shard of several; inspect the folder to see whether all are there.")
    if holds_lora(index):
        explained = explain_lora(file, released_shapes())
        return Report(file, explained.what, weights=weights, notes=(*notes, *explained.notes), complete=explained.usable)
    return Report(file, recognise_weights(index), weights=weights, notes=tuple(notes))


def released_shapes() -> dict[str, Shapes]:
    """Of the denoiser's weights, by part."""
    shapes = {part: expected_shapes(name, {}) for part, name in FOLDERS.items() if part != "low"}
    return shapes | {"low": shapes["high"]}


def recognise_weights(index: Mapping[str, TensorEntry]) -> str:
    patch = next((entry.shape for key, entry in index.items() if key.endswith("patch_embedding.weight")), ())
    for (dimensions, channels), what in TOWERS.items():
        if len(patch) == dimensions and channels in (None, patch[1]):
            return what
    return next((what for fragment, what in SIGNATURES.items() if any(fragment in key for key in index)), "weights of a kind that MOVA does not use")


def count_weights(index: Mapping[str, TensorEntry]) -> Weights:
    sizes = [math.prod(entry.shape) for entry in index.values()]
    return Weights(len(index), sum(sizes), sum(entry.nbytes for entry in index.values()), tuple(sorted({entry.dtype for entry in index.values()})))


def add_up(weights: list[Weights]) -> Weights:
    dtypes = sorted({dtype for one in weights for dtype in one.dtypes})
    return Weights(sum(one.tensors for one in weights), sum(one.parameters for one in weights), sum(one.size for one in weights), tuple(dtypes))


def show_size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"
