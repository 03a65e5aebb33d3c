"""python -m mova check-sync: do the lips follow the voice."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .placement import choose_device


def add(commands: argparse._SubParsersAction) -> None:
    sync = commands.add_parser(
        "check-sync",
        help="do the lips follow the voice in a film: prints a report as JSON",
        epilog="Exit code: 0 plausible, 3 out of sync by a constant time, 4 not in sync, 5 no talking face, 6 too short, 7 no voice; 1 an error.",
    )
    sync.add_argument("clip", type=Path, help="a film with sound")
    sync.add_argument("--landmarks", type=Path, default=Path("face_landmarker.task"), help="MediaPipe's Face Landmarker (default: face_landmarker.task here)")
    sync.add_argument("--syncnet", type=Path, metavar="FILE", help="SyncNet's weights; without them mouth motion is compared with loudness")
    sync.add_argument("--plot", type=Path, metavar="FILE", help="draw the report: .png, .jpg or .webp")
    sync.add_argument("--device", default="cpu", help="where SyncNet runs: cpu (default), cuda, ...")
    sync.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..lipsync.check import check_lip_sync
    from ..lipsync.film import open_film
    from ..lipsync.landmarks import open_landmarks
    from ..lipsync.plot import check_plot, save_plot
    from ..lipsync.syncnet import load_syncnet
    from ..lipsync.verdict import EXIT_CODES, kind_of

    if args.plot:
        check_plot(args.plot)
    film, waveform, rate = open_film(args.clip)
    network = load_syncnet(args.syncnet, choose_device(args.device)) if args.syncnet else None
    with open_landmarks(args.landmarks) as landmarks:
        report = check_lip_sync(film, waveform, rate, landmarks, syncnet=network)
    print(report.to_json())
    print(f"{report.verdict}, score {report.score:.2f}: compare takes of one shot, do not read absolute values", file=sys.stderr)
    if args.plot:
        save_plot(report, args.plot)
    return EXIT_CODES[kind_of(report.verdict)]
