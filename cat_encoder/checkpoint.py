"""Checkpoints of CAT, EAT and SSLAM: read and checked, or written in our own layout (spec/cat.md 3)."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .config import MEL_BINS, Architecture
from .errors import CatError
from .files import OWN, OpenedFile, open_file, whole_file
from .frontend import AUDIOSET, ESC50, FRAMES, SPEECH_COMMANDS, Normalisation
from .head import CLAP_MODES, EPS, MODES, Head
from .labels import name_labels
from .names import ALIGNMENT_NAMES, HEAD_NAMES, LEFT_BEHIND, POSITIONS, PREFIX, is_encoder, name_family, released_names, to_released
from .trunk import AudioTransformer, position_table

HUB_EPS = 1e-5  # of fc_norm in the wrapper that hub files were made with (3.4)
POSITION_TOLERANCE = 2e-3  # a table stored in half precision is off by so much
WEIGHTS = ("student", "teacher")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # weights are stored in; smaller ones need scales, which no such file has
BEYOND = 2**31  # no setting of an encoder is so large
DESCRIBED = ("labels", "mode", "head_eps", "single_label", "frames", "normalisation", "origin")  # in files of ours, beside the architecture


@dataclass
class Checkpoint:
    """An encoder and what is needed to listen with it.

    encoder: state dict of AudioTransformer. head: state dict of Head, empty = the file has none. mode, head_eps: of that head.
    single_label: its classes exclude each other (softmax instead of sigmoid). frames, normalisation: what it was trained on. origin: what the file was, in words.
    """

    architecture: Architecture
    encoder: dict[str, Tensor]
    head: dict[str, Tensor] = field(default_factory=dict)
    labels: list[str] = field(default_factory=list)
    mode: str = "CLS_TOKEN"
    head_eps: float = EPS
    single_label: bool = False
    frames: int = FRAMES
    normalisation: Normalisation = AUDIOSET
    origin: str = "an encoder"

    def build(self, dtype: torch.dtype = torch.float32) -> tuple[AudioTransformer, Head | None]:
        """Both as modules on the CPU, in eval mode; the tensors are copied."""
        with torch.device("meta"):
            encoder = AudioTransformer(self.architecture)
        encoder.load_state_dict({name: tensor.to(dtype, copy=True) for name, tensor in self.encoder.items()}, assign=True)
        encoder.positions = encoder.positions.to(dtype)
        return encoder.requires_grad_(True).eval(), self.build_head(dtype) if self.head else None

    def build_head(self, dtype: torch.dtype) -> Head:
        aligned = self.head["alignment.weight"].shape[0] if self.mode in CLAP_MODES else 0
        with torch.device("meta"):
            head = Head(self.architecture.width, len(self.labels), mode=self.mode, eps=self.head_eps, aligned=aligned, norm="norm.weight" in self.head)
        head.load_state_dict({name: tensor.to(dtype, copy=True) for name, tensor in self.head.items()}, assign=True)
        return head.requires_grad_(True).eval()


def read_checkpoint(path: str | Path, weights: str = "student") -> Checkpoint:
    """A fairseq-style .pt, released EAT or SSLAM safetensors, or a file of ours; `weights`: student, or teacher where the file has one.

    CatError, a sentence, for anything else, and for tensors that are missing, unknown, of another shape or not finite.
    """
    opened = open_file(path)
    tensors = choose_weights(opened, weights)
    if OWN in opened.metadata:
        checkpoint = read_own(opened)
    elif hub := any(name in tensors for name in ("local_encoder.proj.weight", "model.local_encoder.proj.weight")):
        tensors = rename_hub(tensors)
        checkpoint = describe(opened, tensors, hub)
    else:
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        if not is_encoder(tensors):
            raise CatError(f"{opened.path} is {name_family(tensors)}: a CAT, EAT or SSLAM checkpoint is needed.")
        checkpoint = describe(opened, tensors, hub=False)
    return take_tensors(checkpoint, tensors, opened.path)


def choose_weights(opened: OpenedFile, weights: str) -> dict[str, Tensor]:
    if weights not in WEIGHTS:
        raise CatError(f"The weights {weights!r} are unknown: {' or '.join(WEIGHTS)}.")
    if weights == "student":
        return opened.tensors
    if not opened.teacher:
        raise CatError(f"{opened.path} holds no teacher: only pre-training files (.pt) do. Load the student.")
    return opened.teacher


def rename_hub(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hub names to the names of a pre-training file."""
    names = {name: name.removeprefix("model.") for name in tensors}
    moved = {
        "pre_norm.": "context_encoder.norm.",
        "local_encoder.": "local_encoder.",
        "extra_tokens": "extra_tokens",
        "fixed_positional_encoder.": "fixed_positional_encoder.",
    }
    for name, plain in names.items():
        part = next((part for part in moved if plain.startswith(part)), None)
        if part:
            names[name] = PREFIX + plain.replace(part, moved[part], 1)
    return {names[name]: tensor for name, tensor in tensors.items()}


def describe(opened: OpenedFile, tensors: dict[str, Tensor], hub: bool) -> Checkpoint:
    """All but the tensors, from the file's settings where it has them."""
    model = part(opened.cfg, "model")
    task, trained = part(opened.cfg, "task"), part(part(model, "pretrained_model_args"), "model") or model
    if trained.get("layer_norm_first"):
        raise CatError(f"{opened.path} was trained with norms before its blocks: only norms after them, as released encoders have, are supported.")
    architecture = infer_architecture(opened.path, tensors, trained)
    family = "CAT" if architecture.stem == "multi" else "EAT or SSLAM"
    classes = tensors["head.weight"].shape[:1].numel() if "head.weight" in tensors else 0
    known = {"esc50_eval": ESC50, "spcv1_eval": SPEECH_COMMANDS, "spcv2_eval": SPEECH_COMMANDS}
    mode = model.get("prediction_mode") or "CLS_TOKEN"
    if mode not in MODES:
        raise CatError(f"{opened.path} has a head of the kind {mode!r}: {', '.join(MODES)} are supported.")
    return Checkpoint(
        architecture, {}, mode=mode,
        labels=name_labels(opened.label_indices or hub_labels(model), classes),
        head_eps=HUB_EPS if hub else number(model, "norm_eps", EPS) if classes else EPS,
        single_label=bool(task.get("esc50_eval")),
        frames=trained_frames(task, architecture),
        normalisation=next((pair for flag, pair in known.items() if task.get(flag)), AUDIOSET),
        origin=f"{family}, {'fine-tuned' if classes else 'pre-trained'}" + (", from a hub" if hub else ""),
    )  # fmt: skip


def part(values: dict, name: str) -> dict:
    found = values.get(name)
    return found if isinstance(found, dict) else {}


def number(values: dict, name: str, default: float) -> float:
    found = values.get(name)
    return found if isinstance(found, (int, float)) and 0 < found < BEYOND else default


def hub_labels(config: dict) -> dict[str, str]:
    """Label -> its index, from a hub's config.json; {} where it has only the numbered names a hub puts in by itself."""
    return {name: index for index, name in part(config, "id2label").items() if isinstance(name, str) and not name.startswith("LABEL_")}


def trained_frames(task: dict, architecture: Architecture) -> int:
    frames = int(number(task, "target_length", FRAMES))
    return max(architecture.patch, min(frames, architecture.max_frames) // architecture.patch * architecture.patch)


def infer_architecture(path: Path, tensors: dict[str, Tensor], cfg: dict) -> Architecture:
    """All shapes from the tensors; heads and norm eps, which no shape tells, from the settings (heads: else one per 64 channels)."""

    def shape(name: str, dims: int) -> tuple[int, ...]:
        if name not in tensors or tensors[name].ndim != dims:
            raise CatError(
                f"{path}: the tensor {name} {'is missing' if name not in tensors else 'has another number of dimensions'}: the file is damaged or of another model."
            )
        return tuple(tensors[name].shape)

    stages = sum(f"{PREFIX}patch_embed.{i}.proj.weight" in tensors for i in range(len(tensors)))
    projections = [f"{PREFIX}patch_embed.{i}.proj.weight" for i in range(stages)] or [f"{PREFIX}local_encoder.proj.weight"]
    shapes = [shape(name, 4) for name in projections]
    if shapes[0][1] != 1:
        raise CatError(f"{path} reads pictures of {shapes[0][1]} channels (a data2vec 2.0 model for images): an encoder for sound is needed.")
    kernels, width = tuple(each[2] for each in shapes), shape(f"{PREFIX}extra_tokens", 3)[2]
    patch = max(1, math.prod(kernels))
    depth = 1 + max((int(name.split(".")[1]) for name in tensors if name.startswith("blocks.") and name.split(".")[1].isdecimal()), default=-1)
    if depth > len(tensors):
        raise CatError(f"{path}: blocks are numbered up to {depth - 1}, but there are only {len(tensors)} tensors: the file is damaged or of another model.")
    sizes = {
        "stem": "multi" if stages else "patch",
        "kernels": kernels,
        "channels": tuple(each[0] for each in shapes[:-1]),
        "branches": tuple(shape(f"{PREFIX}stage_output_decode.{i}.weight", 4)[2] for i in range(max(0, stages - 1))),
        "width": width,
        "depth": depth,
        "heads": int(number(cfg, "num_heads", max(1, width // 64))),
        "mlp_ratio": shape("blocks.0.mlp.fc1.weight", 2)[0] / max(1, width),
        "eps": number(cfg, "norm_eps", EPS),
        "position_rows": shape(POSITIONS, 3)[1] // max(1, MEL_BINS // patch),
        "bottleneck": shape("bottleneck.weight", 2)[0] if "bottleneck.weight" in tensors else 0,
    }
    try:
        return Architecture(**sizes)
    except CatError as error:
        raise CatError(f"{path}: {error} The file is damaged or of another model.") from None


def take_tensors(checkpoint: Checkpoint, tensors: dict[str, Tensor], path: Path) -> Checkpoint:
    """Fills encoder and head, all of whose tensors must be there, fit and be finite."""
    wanted = released_names(checkpoint.architecture)
    head = {name: ours for ours, name in (HEAD_NAMES | (ALIGNMENT_NAMES if checkpoint.mode in CLAP_MODES else {})).items()}
    missing = [name for name in wanted if name not in tensors]
    extra = [name for name in tensors if name not in wanted and name not in head and name != POSITIONS and not name.startswith(LEFT_BEHIND)]
    odd = [
        f"{name} is {tell_kind(tensors[name])} instead of {list(shape)}"
        for name, (_, shape) in wanted.items()
        if name in tensors and not (tensors[name].shape in (shape, (*shape, 1, 1)) and is_plain(tensors[name]))  # 1, 1: of a convolution
    ]
    odd += [f"{name} is {tell_kind(tensors[name])}" for name in (POSITIONS, *head) if name in tensors and not is_plain(tensors[name])]
    faults = [
        f"{len(names)} {what} ({'; '.join(names[:3])}{'; ...' if len(names) > 3 else ''})"
        for what, names in (("missing", missing), ("unknown", extra), ("of another shape or kind", odd))
        if names
    ]
    if faults:
        raise CatError(f"{path}: tensors of the encoder do not fit {checkpoint.origin}: {', '.join(faults)}. The file is damaged or of another model.")
    check_positions(tensors.get(POSITIONS), checkpoint.architecture, path)
    checkpoint.encoder = {ours: tensors[name].reshape(shape) for name, (ours, shape) in wanted.items()}
    if "head.weight" in tensors:
        checkpoint.head = {ours: tensors[name] for name, ours in head.items() if name in tensors}
        check_head(checkpoint, path)
    check_finite(checkpoint, path)
    return checkpoint


def is_plain(tensor: Tensor) -> bool:
    return tensor.dtype in DTYPES and tensor.layout == torch.strided and not tensor.is_meta


def tell_kind(tensor: Tensor) -> str:
    words = [] if is_plain(tensor) else [str(each).removeprefix("torch.") for each in (tensor.dtype, tensor.layout, tensor.device)]
    return " ".join([*words, str(list(tensor.shape))])


def check_positions(table: Tensor | None, architecture: Architecture, path: Path) -> None:
    """The table of a file is a formula's: it is compared, then ours is used."""
    if table is None:
        return
    same_size = tuple(table.shape) == (1, architecture.position_rows * architecture.bands, architecture.width)
    off = float((table[0].float() - position_table(architecture)).abs().max()) if same_size else float("inf")
    if not off <= POSITION_TOLERANCE:
        raise CatError(
            f"{path}: its position table, {list(table.shape)}, is not the sine table these encoders have (off by up to {off:.2g}): damaged, or of another model."
        )


def check_head(checkpoint: Checkpoint, path: Path) -> None:
    width, classes = checkpoint.architecture.width, len(checkpoint.labels)
    channels = checkpoint.head["alignment.bias"].numel() if "alignment.bias" in checkpoint.head else width
    expected = {"linear.weight": (classes, channels), "linear.bias": (classes,), "norm.weight": (channels,), "norm.bias": (channels,)}
    expected |= {"alignment.weight": (channels, width), "alignment.bias": (channels,)} if checkpoint.mode in CLAP_MODES else {}
    optional = {"norm.weight", "norm.bias"} if not {"norm.weight", "norm.bias"} & set(checkpoint.head) else set()
    wrong = [name for name, shape in expected.items() if name not in optional and (name not in checkpoint.head or checkpoint.head[name].shape != shape)]
    if wrong:
        raise CatError(
            f"{path}: the head for {classes} classes does not fit an encoder of {width} channels ({', '.join(wrong)}): the file is damaged or of another model."
        )


def check_finite(checkpoint: Checkpoint, path: Path) -> None:
    broken = [name for name, tensor in (checkpoint.encoder | checkpoint.head).items() if not tensor.isfinite().all()]
    if broken:
        raise CatError(f"{path}: {len(broken)} tensors hold NaN or Inf (first: {broken[0]}): the training went wrong or the file is damaged.")


def read_own(opened: OpenedFile) -> Checkpoint:
    try:
        values = json.loads(opened.metadata[OWN])
        architecture, pair = Architecture.from_json(values["architecture"]), Normalisation(*map(float, values["normalisation"]))
        known = {name: values[name] for name in DESCRIBED if name in values}
        checkpoint = Checkpoint(architecture, {}, **known | {"normalisation": pair})
        check_described(checkpoint)
        return checkpoint
    except (ValueError, TypeError, LookupError, CatError) as error:
        raise CatError(
            f"{opened.path}: its description of the encoder cannot be read ({error}). It was written by another version or changed: convert it again."
        ) from None


def check_described(checkpoint: Checkpoint) -> None:
    """ValueError for values in the description of a file of ours that `write_checkpoint` never puts there."""
    frames, architecture, (mean, std) = checkpoint.frames, checkpoint.architecture, checkpoint.normalisation
    rules = {
        "frames": isinstance(frames, int) and 0 < frames <= architecture.max_frames and frames % architecture.patch == 0,
        "mode": checkpoint.mode in MODES,
        "labels": isinstance(checkpoint.labels, list) and all(isinstance(label, str) for label in checkpoint.labels),
        "head_eps": 0 < checkpoint.head_eps < 1,
        "single_label": isinstance(checkpoint.single_label, bool),
        "normalisation": abs(mean) < BEYOND and 0 < std < BEYOND,
        "origin": isinstance(checkpoint.origin, str),
    }
    wrong = [f"{name} {getattr(checkpoint, name)}" for name, holds in rules.items() if not holds]
    if wrong:
        raise ValueError(", ".join(wrong))


def write_checkpoint(path: str | Path, checkpoint: Checkpoint) -> Path:
    """Our layout: safetensors under released names, everything else in its metadata. The file appears when it is complete. CatError when it cannot be written."""
    file = Path(path)
    if file.suffix != ".safetensors":
        raise CatError(f"{file} has to end in .safetensors.")
    tensors = to_released(checkpoint.encoder, checkpoint.architecture)
    tensors |= {(HEAD_NAMES | ALIGNMENT_NAMES)[name]: tensor for name, tensor in checkpoint.head.items()}
    values = {"architecture": checkpoint.architecture.as_json()} | {name: getattr(checkpoint, name) for name in DESCRIBED}
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole_file(file) as draft:
        save_file(content, draft, {OWN: json.dumps(values)})
    return file
