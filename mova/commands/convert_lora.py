"""python -m mova convert-lora: any LoRA as one clean file."""

from __future__ import annotations

import argparse
from pathlib import Path


def add(commands: argparse._SubParsersAction) -> None:
    convert = commands.add_parser("convert-lora", help="write any LoRA that MOVA reads as one safetensors file with ComfyUI's keys")
    convert.add_argument("lora", type=Path, metavar="IN", help="a LoRA file, or the folder its trainer wrote; it is only read")
    convert.add_argument("out", type=Path, metavar="OUT", help="new .safetensors file")
    convert.add_argument("--alpha", type=float, help="where the file's own cannot be trusted (see 'inspect')")
    convert.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..inspection import released_shapes
    from ..lora.convert import convert_lora

    print(convert_lora(args.lora, args.out, released_shapes(), alpha=args.alpha))
    return 0
