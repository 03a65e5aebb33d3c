"""python -m mova demo-model: a small random checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path


def add(commands: argparse._SubParsersAction) -> None:
    demo = commands.add_parser("demo-model", help="write a small random checkpoint in the released layout (it makes noise, not films)")
    demo.add_argument("folder", type=Path)
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..demo_model import write_demo_model

    write_demo_model(args.folder, seed=args.seed)
    print(args.folder)
    return 0
