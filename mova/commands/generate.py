"""python -m mova generate: a clip."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from pathlib import Path

from .placement import add_placement, placement

CACHE = Path.home() / ".cache" / "mova-studio" / "text"
# Of Pipeline.render, by the name of the option.
SETTINGS = (
    ("height", int, "pixels, a multiple of 16 (default 352)"),
    ("width", int, "pixels, a multiple of 16 (default 640)"),
    ("num-frames", int, "4n+1 (default 193 = 8 s)"),
    ("fps", float, "frames per second (default 24)"),
    ("steps", int, "denoising steps (default 50)"),
    ("cfg", float, "how strictly the prompt is followed (default 5; 1 = off, twice as fast)"),
    ("audio-cfg", float, "the same for the sound (default: as --cfg)"),
    ("bridge-guidance", float, "how strictly picture and sound follow each other (default 1 = off)"),
    ("shift", float, "default: the checkpoint's"),
    ("audio-shift", float, "default: as --shift"),
    ("boundary", float, "share of the noise where the experts switch, 0..1 (default: the checkpoint's)"),
    ("seed", int, "default 42"),
)


def add(commands: argparse._SubParsersAction) -> None:
    generate = commands.add_parser("generate", help="make a clip")
    generate.add_argument("--model", type=Path, required=True, help="MOVA checkpoint folder (the one with model_index.json)")
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--image", type=Path, help="start picture; without it the clip is made from the prompt alone")
    generate.add_argument("--last-image", type=Path, help="end picture")
    generate.add_argument("--out", type=Path, default=Path("clip.mp4"), help=".mp4, .mov or .webm (default clip.mp4)")
    generate.add_argument("--negative-prompt", help="default: the released one")
    for name, kind, text in SETTINGS:
        generate.add_argument(f"--{name}", type=kind, help=text)
    generate.add_argument("--lora", action="append", default=[], metavar="PATH[:STRENGTH]", help="a LoRA file or folder, may be repeated (strength 1)")
    generate.add_argument("--schedule", choices=("reference", "simple"), default="reference")
    generate.add_argument("--resume", type=Path, metavar="FILE", help="keep the run in this file until the clip is saved, and go on from it when it is there")
    generate.add_argument("--keep-every", type=int, default=5, metavar="STEPS", help="how often the run is kept (default every 5 steps)")
    generate.add_argument("--text-cache", type=Path, default=CACHE, help="folder that keeps encoded prompts (default ~/.cache/mova-studio/text)")
    add_placement(generate)
    generate.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..lora import parse_lora
    from ..media import check_output
    from ..pipeline import load_pipeline
    from ..resume import Resume

    check_output(args.out)
    names = ["negative_prompt", "last_image", *(name.replace("-", "_") for name, *_ in SETTINGS)]
    settings = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    resume = None if args.resume is None else Resume(args.resume, args.keep_every)
    pipe = load_pipeline(args.model, text_cache=args.text_cache, **placement(args))
    pipe.denoiser = pipe.denoiser.with_loras(map(parse_lora, args.lora)) if args.lora else pipe.denoiser
    start, done = time.monotonic(), itertools.count(1)  # of the steps that are made now: a resumed run begins later

    def on_step(step):
        spent = time.monotonic() - start
        left = spent / next(done) * (step.total - step.index - 1)
        print(f"step {step.index + 1}/{step.total}  {step.expert} expert  sigma {step.sigma:.3f}  {spent:.0f} s, about {left:.0f} s left", file=sys.stderr)

    pipe.render(args.out, args.prompt, args.image, schedule=args.schedule, resume=resume, on_step=on_step, **settings)
    print(args.out)
    return 0
