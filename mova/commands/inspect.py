"""python -m mova inspect: what a folder or file is."""

from __future__ import annotations

import argparse
from pathlib import Path


def add(commands: argparse._SubParsersAction) -> None:
    inspect = commands.add_parser("inspect", help="what a checkpoint folder or file is, and whether it is complete (loads nothing)")
    inspect.add_argument("path", type=Path)
    inspect.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..inspection import describe

    print(describe(args.path))
    return 0
