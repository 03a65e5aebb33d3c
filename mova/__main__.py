"""Command line: python -m mova generate | inspect | check | quantize | check-sync | enhance | convert-lora | demo-model."""

from __future__ import annotations

import argparse
import logging
import sys

from .commands import COMMANDS
from .errors import MovaError


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mova", description="MOVA: a picture and a prompt become a clip with sound.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser


def main() -> int:
    args = build_parser().parse_args()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("mova").setLevel(logging.INFO)
    try:
        return args.run(args)
    except MovaError as error:
        print(f"mova: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mova: stopped; nothing was left half-written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
