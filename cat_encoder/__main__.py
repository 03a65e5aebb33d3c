"""Command line: python -m cat_encoder features | tags | convert | demo-encoder | pretrain | finetune."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from . import convert, load, write_demo_encoder
from .checkpoint import WEIGHTS
from .ear import Encoder, Features, mean_logits
from .errors import CatError
from .files import whole_file
from .sound import open_sound
from .training.commands import add_parsers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KINDS = ("columns", "tokens")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cat_encoder", description="CAT hears what is in a sound: features, tags, and the training of encoders.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_features(commands)
    add_tags(commands)
    turn = commands.add_parser("convert", help="rewrite a CAT, EAT or SSLAM checkpoint as one safetensors file")
    turn.add_argument("src", type=Path, metavar="IN", help=".pt, .safetensors or a hub folder; it is only read")
    turn.add_argument("out", type=Path, metavar="OUT", help="new .safetensors")
    turn.add_argument("--weights", choices=WEIGHTS, default="student", help="which of the two a pre-training file holds (default student)")
    turn.set_defaults(run=run_convert)
    demo = commands.add_parser("demo-encoder", help="write a small random encoder (its tags mean nothing)")
    demo.add_argument("out", type=Path, metavar="OUT", help="new .safetensors")
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(run=run_demo)
    add_parsers(commands)
    return parser


def add_features(commands: argparse._SubParsersAction) -> None:
    features = commands.add_parser("features", help="write what the encoder makes of sound files, of any length")
    add_listening(features)
    features.add_argument("--out", type=Path, help="folder for one .safetensors per sound (default: beside each sound)")
    features.add_argument("--kind", choices=KINDS, default="columns", help="one vector each 0.16 s, or all its tokens, 8 times as much (default columns)")
    features.set_defaults(run=run_features)


def add_tags(commands: argparse._SubParsersAction) -> None:
    tags = commands.add_parser("tags", help="print what is heard in sound files")
    add_listening(tags)
    tags.add_argument("--top", type=int, default=10, help="tags of each line (default 10)")
    tags.add_argument("--over-time", action="store_true", help="one line for each 10 s instead of one for the whole sound")
    tags.add_argument("--json", action="store_true", help="one JSON object for each line instead of words")
    tags.set_defaults(run=run_tags)


def add_listening(command: argparse.ArgumentParser) -> None:
    command.add_argument("sounds", type=Path, nargs="+", metavar="SOUND", help="sound files or films")
    command.add_argument("--model", type=Path, required=True, help="CAT, EAT or SSLAM checkpoint (.pt, .safetensors or a hub folder)")
    command.add_argument("--weights", choices=WEIGHTS, default="student", help="which of the two a pre-training file holds (default student)")
    command.add_argument("--device", default="cpu", help="cpu, cuda, ... (default cpu)")
    command.add_argument("--dtype", choices=DTYPES, default="float32")


def open_encoder(args: argparse.Namespace) -> Encoder:
    return load(args.model, device=args.device, dtype=DTYPES[args.dtype], weights=args.weights)


def run_features(args: argparse.Namespace) -> int:
    encoder = open_encoder(args)
    for sound in args.sounds:
        out = (args.out or sound.parent) / f"{sound.name}.safetensors"
        with open_sound(sound) as (rate, pieces):
            write_features(out, list(keep(encoder.stream(pieces, rate), args.kind)), args.kind)
        print(out)
    return 0


def keep(stream: Iterator[Features], kind: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Of each window its class token [D] and the columns or tokens that hold sound: copies, since views would keep all tokens of an hour in memory."""
    for features in stream:
        rows = {"columns": features.columns, "tokens": features.tokens[:, 1:]}[kind]
        per_column = 1 if kind == "columns" else features.bands
        yield features.utterance[0].clone(), rows[0, : features.sounding * per_column].clone()


def write_features(file: Path, parts: list[tuple[torch.Tensor, torch.Tensor]], kind: str) -> None:
    """ "utterance" [D], the mean over windows weighted by their length, and `kind` [n,D]. The file appears when it is complete."""
    rows = torch.cat([part for _, part in parts])
    utterance = sum(len(part) * vector for vector, part in parts) / len(rows)
    with whole_file(file) as draft:
        save_file({"utterance": utterance.cpu(), kind: rows.cpu()}, draft)


def run_tags(args: argparse.Namespace) -> int:
    encoder = open_encoder(args)
    for sound in args.sounds:
        with open_sound(sound) as (rate, pieces):
            heard = []
            for each in encoder.stream_logits(pieces, rate):
                heard.append(each)
                if args.over_time:
                    show(sound, each.start, each.seconds, encoder.top_tags(each.logits, args.top)[0], args.json)
        if not args.over_time:
            show(sound, 0.0, heard[-1].start + heard[-1].seconds, encoder.top_tags(mean_logits(heard), args.top)[0], args.json)
    return 0


def show(sound: Path, start: float, seconds: float, tags: list[tuple[str, float]], as_json: bool) -> None:
    listed = [{"label": label, "score": round(score, 4)} for label, score in tags]
    line = json.dumps({"file": str(sound), "start": round(start, 2), "end": round(start + seconds, 2), "tags": listed}, ensure_ascii=False)
    words = f"{sound.name}  {start:.1f}-{start + seconds:.1f} s  " + ", ".join(f"{label} {score:.2f}" for label, score in tags)
    print(line if as_json else words, flush=True)


def run_convert(args: argparse.Namespace) -> int:
    print(convert(args.src, args.out, weights=args.weights))
    return 0


def run_demo(args: argparse.Namespace) -> int:
    print(write_demo_encoder(args.out, args.seed))
    return 0


def main() -> int:
    args = build_parser().parse_args()
    try:
        return args.run(args)
    except CatError as error:
        print(f"cat_encoder: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("cat_encoder: stopped; nothing was left half-written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
