"""Command line: python -m cat_encoder pretrain | finetune."""

from __future__ import annotations

import argparse
import contextlib
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import PRESETS
from ..frontend import AUDIOSET, ESC50, SPEECH_COMMANDS
from .clips import find_clips, read_classes, with_labels
from .decoder import DecoderShape
from .finetune import RECIPES, finetune
from .log import ProgressLine
from .masks import MaskPlan
from .objective import MEASURES, SIDES, Weights
from .optimise import OPTIMISERS
from .pretrain import PretrainSettings, pretrain
from .run import PRECISIONS, OnStep, RunSettings, Step
from .teacher import DecaySchedule

NORMALISATIONS = {"audioset": AUDIOSET, "esc50": ESC50, "speech-commands": SPEECH_COMMANDS}

# Option, type, what it means: fields of RunSettings. Without them the recipe's values stand.
RUN_OPTIONS = (
    ("updates", int, "optimiser steps"),
    ("warmup", int, "of them, while the rate rises (pretrain: 2 of 15 updates)"),
    ("rate", float, "peak learning rate"),
    ("batch", int, "clips per update"),
    ("accumulate", int, "parts a batch is computed in, to save memory (1)"),
    ("weight-decay", float, "0.05"),
    ("clip", float, "largest gradient norm, 0 = no limit (4)"),
    ("seed", int, "of everything drawn by chance"),
    ("save-every", int, "updates between saves (1000)"),
    ("log-every", int, "updates between rows of log.csv (10)"),
)
PRETRAIN_OPTIONS = (
    ("frames", int, "10 ms each, per clip: shorter clips are padded, longer ones cut (1024)"),
    ("clones", int, "masks per clip (4)"),
    ("noise", float, "standard deviation of what stands at masked places (0.01)"),
    ("layers", int, "the teacher's last blocks that make targets, 0 = all"),
    ("layer", int, "block whose result is compared with the outside vector, from 1; 0 = the class token after the last"),
)
FINETUNE_OPTIONS = (
    ("frames", int, "10 ms each, per clip"),
    ("mixup", float, "0 = off"),
    ("bands", float, "share of time and frequency that SpecAug may hide"),
    ("drop-path", float, "of the last block"),
    ("smoothing", float, "of labels of classes that exclude each other"),
    ("balanced", int, "clips per epoch, drawn so that rare classes come as often; 0 = every clip once"),
    ("evaluate-every", int, "updates between evaluations"),
)


def add_parsers(commands: argparse._SubParsersAction) -> None:
    """Adds both commands; each sets `run`, a function of the parsed arguments that returns the exit status."""
    add_pretrain(commands)
    add_finetune(commands)


def add_pretrain(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("pretrain", help="train an encoder on unlabelled sounds; the same call goes on where it stopped")
    add_common(parser, PRETRAIN_OPTIONS)
    parser.add_argument("--size", choices=PRESETS, default="cat-base")
    parser.add_argument("--start", type=Path, help="checkpoint to go on from instead of random weights")
    parser.add_argument(
        "--external", type=Path, help="outside encoder to stay close to: folder of .npy/.safetensors vectors, one .safetensors, or a transformers model folder"
    )
    parser.add_argument("--side", choices=SIDES, help="what the alignment head acts on (student)")
    parser.add_argument("--measure", choices=MEASURES, help="how vectors are compared (mse)")
    parser.add_argument("--roll", action="store_true", help="shift and scale each clip by chance")
    weights = (
        ("frame", "frames' error"),
        ("utterance", "clips' error"),
        ("alignment", "distance from the outside encoder"),
        ("dispersive", "crowding of clips"),
    )
    for name, text in weights:
        parser.add_argument(f"--{name}-weight", type=float, metavar="X", help=f"how much the {text} counts (default {getattr(Weights(), name):g})")
    parser.add_argument("--beta", type=float, help="where errors turn from squared to linear; 0 = never (0)")
    parser.add_argument("--mask", type=float, nargs=3, metavar=("SHARE", "EXTRA", "SQUARE"), help="0.8 0.07 5")
    parser.add_argument("--decoder", type=int, nargs=4, metavar=("WIDTH", "LAYERS", "KERNEL", "GROUPS"), help="768 6 3 16; large: 1024 3 5 16")
    parser.add_argument(
        "--ema", type=float, nargs=3, metavar=("START", "END", "UPDATES"), help="the teacher's slowness: 0.9998 0.99999 and a quarter of the updates"
    )
    parser.set_defaults(run=run_pretrain)


def add_finetune(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("finetune", help="train a classifier on labelled sounds, from a pre-trained encoder")
    add_common(parser, FINETUNE_OPTIONS)
    parser.add_argument("--start", type=Path, required=True, help="encoder to start from: CAT, EAT or SSLAM checkpoint")
    parser.add_argument(
        "--recipe", choices=RECIPES, default="as20k", help="settings of AudioSet-20k, AudioSet-2M, ESC-50 or Speech Commands v2 (default as20k)"
    )
    parser.add_argument(
        "--labels", type=Path, help="label file: a line per clip, name, tab, labels split by commas (default: sub-folders or the manifest's labels)"
    )
    parser.add_argument("--classes", type=Path, help="class names in order: one per line, or a table index,id,name (default: all labels, sorted)")
    parser.add_argument("--validation", type=Path, help="folder or manifest to measure on")
    parser.add_argument("--hold-out", type=float, default=0.0, help="share of the clips to measure on instead of training (0)")
    parser.add_argument("--single", action="store_true", default=None, help="classes exclude each other")
    parser.set_defaults(run=run_finetune)


def add_common(parser: argparse.ArgumentParser, options: tuple[tuple[str, type, str], ...]) -> None:
    parser.add_argument("source", type=Path, help="folder of sound files (sub-folders count) or manifest (.json, .jsonl, .tsv, .csv)")
    parser.add_argument("--out", type=Path, required=True, help="folder for encoder, state and log")
    for name, kind, text in (*RUN_OPTIONS, *options):
        parser.add_argument(f"--{name}", type=kind, help=text)
    parser.add_argument("--normalisation", choices=NORMALISATIONS, help="mean and deviation of the log-mel (default: the recipe's)")
    parser.add_argument("--optimiser", choices=OPTIMISERS, help="paper: weight decay on everything; adamw: not on biases and norms (paper)")
    parser.add_argument("--precision", choices=PRECISIONS, help="fp32")
    parser.add_argument("--tensorboard", action="store_true", default=None, help="curves besides log.csv")
    parser.add_argument("--shortest", type=int, default=10_000, help="samples at 16 kHz a clip must have (10000)")
    parser.add_argument("--workers", type=int, default=2, help="threads that read sounds (2)")
    parser.add_argument("--keep", type=int, default=0, help="clips kept in memory once read, 1.2 MB each for 10 s (0)")
    parser.add_argument("--device", help="cuda, cpu, ... (default: cuda where there is one)")
    parser.add_argument("--restart", action="store_true", help="begin anew where an earlier run could go on")


def run_pretrain(args: argparse.Namespace) -> int:
    settings = replace(PretrainSettings(), **given(args, "frames", "clones", "noise", "layers", "layer", "side", "measure", "roll"), **normalisation(args))
    weights = {name: getattr(args, f"{name}_weight") for name in ("frame", "utterance", "alignment", "dispersive")} | {"beta": args.beta}
    settings = replace(settings, weights=replace(Weights(), **{name: value for name, value in weights.items() if value is not None}))
    if args.mask:
        settings = replace(settings, mask=MaskPlan(args.mask[0], args.mask[1], int(args.mask[2])))
    if args.decoder:
        settings = replace(settings, decoder=DecoderShape(*args.decoder))
    if args.ema:
        settings = replace(settings, ema=DecaySchedule(args.ema[0], args.ema[1], int(args.ema[2])))
    more = {"architecture": PRESETS[args.size], "start": args.start, "external": args.external, "settings": settings, "run": run_settings(args, RunSettings())}
    return follow(args, lambda common: pretrain(args.source, args.out, **more, **common))


def run_finetune(args: argparse.Namespace) -> int:
    settings, run = RECIPES[args.recipe]
    settings = replace(settings, **given(args, *(name.replace("-", "_") for name, _, _ in FINETUNE_OPTIONS), "single"), **normalisation(args))
    clips = find_clips(args.source)
    more = {
        "classes": read_classes(args.classes) if args.classes else None,
        "validation": with_labels(find_clips(args.validation), args.labels) if args.validation and args.labels else args.validation,
        "hold_out": args.hold_out, "settings": settings, "run": run_settings(args, run),
    }  # fmt: skip
    return follow(args, lambda common: finetune(with_labels(clips, args.labels) if args.labels else clips, args.out, args.start, **more, **common))


def follow(args: argparse.Namespace, train: Callable[[dict[str, Any]], Path]) -> int:
    """Runs it with a line of progress; Ctrl-C stops it after the current update, saved."""
    import torch

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    show = ProgressLine()
    with stop_between_updates() as check:

        def on_step(step: Step) -> None:
            show(step)
            check(step)

        print(train({"shortest": args.shortest, "workers": args.workers, "keep": args.keep, "device": device, "resume": not args.restart, "on_step": on_step}))
    return 0


@contextlib.contextmanager
def stop_between_updates() -> Iterator[OnStep]:
    """Ctrl-C is kept until the update is done, so that its state can be saved; pressed again, it acts at once."""
    pressed = []

    def note(number: int, frame: Any) -> None:
        pressed.append(number)
        signal.signal(signal.SIGINT, before)

    def check(step: Step) -> None:
        if pressed:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


def given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The options that were given."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def run_settings(args: argparse.Namespace, run: RunSettings) -> RunSettings:
    """The recipe with the options that were given; a warm-up scales with the updates unless it was given, too."""
    chosen = given(args, *(name.replace("-", "_") for name, _, _ in RUN_OPTIONS), "optimiser", "precision", "tensorboard")
    if "updates" in chosen and "warmup" not in chosen and run.warmup:
        chosen["warmup"] = run.warmup * chosen["updates"] // run.updates
    return replace(run, **chosen)


def normalisation(args: argparse.Namespace) -> dict[str, Any]:
    return {"normalisation": NORMALISATIONS[args.normalisation]} if args.normalisation else {}
