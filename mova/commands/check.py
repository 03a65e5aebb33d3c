"""python -m mova check: the first minute with real weights."""

from __future__ import annotations

import argparse
from pathlib import Path

from .placement import add_placement, placement


def add(commands: argparse._SubParsersAction) -> None:
    check = commands.add_parser("check", help="the first minute with real weights: measured values beside what is normal")
    check.add_argument("folder", type=Path)
    add_placement(check)
    check.add_argument("--height", type=int, default=352, help="pixels (default 352)")
    check.add_argument("--width", type=int, default=640, help="pixels (default 640)")
    check.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..check import check

    findings = []
    for finding in check(args.folder, height=args.height, width=args.width, **placement(args)):
        print(finding, flush=True)
        findings.append(finding)
    odd = sum(not finding.good for finding in findings)
    print(f"{odd} of {len(findings)} values are not normal: paste this into a bug report." if odd else "all values are normal")
    return 1 if odd else 0
