"""python -m mova quantize: a checkpoint of half the size."""

from __future__ import annotations

import argparse
from pathlib import Path

from .placement import choose_device


def add(commands: argparse._SubParsersAction) -> None:
    quantize = commands.add_parser("quantize", help="write a checkpoint folder with 8-bit weights, half the size; an interrupted call goes on where it stopped")
    quantize.add_argument("folder", type=Path, metavar="IN", help="MOVA checkpoint folder; it is only read")
    quantize.add_argument("out", type=Path, metavar="OUT", help="new folder")
    quantize.add_argument("--measure", action="store_true", help="measure the error of a large checkpoint, too (passes all its weights twice)")
    quantize.add_argument("--device", help="where the error is measured: cuda, cpu, ... (default: cuda where there is one)")
    quantize.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..inspection import show_size
    from ..quantize import SMALL, denoiser_bytes, measure_folders, quantize

    def on_file(file):
        state = "kept" if file.kept else "written" if file.before != file.after else "copied"
        print(f"{state:8} {show_size(file.before):>10} -> {show_size(file.after):>10}  {file.name}", flush=True)

    device = choose_device(args.device)  # one that is not there is told before hours of work, not behind them
    results = quantize(args.folder, args.out, on_file)
    print(f"{args.out}: {show_size(sum(file.before for file in results))} -> {show_size(sum(file.after for file in results))}", flush=True)
    if denoiser_bytes(args.folder) > SMALL and not args.measure:
        print("error not measured: --measure does it for a checkpoint of this size")
        return 0
    print("error against the original (relative L2 of the predicted clean latents, random text and noise):", flush=True)
    print(*measure_folders(args.folder, args.out, device=device), sep="\n")
    return 0
