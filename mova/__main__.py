"""Command line: python -m mova generate | inspect | check | quantize | demo-model."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path

from .errors import MovaError

DTYPES = ("as-stored", "bf16", "fp16", "fp32")
CACHE = Path.home() / ".cache" / "mova-studio" / "text"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mova", description="MOVA: a picture and a prompt become a clip with sound.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_generate(commands)
    inspect = commands.add_parser("inspect", help="what a checkpoint folder or file is, and whether it is complete (loads nothing)")
    inspect.add_argument("path", type=Path)
    inspect.set_defaults(run=run_inspect)
    check = commands.add_parser("check", help="the first minute with real weights: measured values beside what is normal")
    check.add_argument("folder", type=Path)
    add_placement(check)
    check.add_argument("--height", type=int, default=352, help="pixels (default 352)")
    check.add_argument("--width", type=int, default=640, help="pixels (default 640)")
    check.set_defaults(run=run_check)
    add_quantize(commands)
    demo = commands.add_parser("demo-model", help="write a small random checkpoint in the released layout (it makes noise, not films)")
    demo.add_argument("folder", type=Path)
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(run=run_demo_model)
    return parser


def add_generate(commands: argparse._SubParsersAction) -> None:
    generate = commands.add_parser("generate", help="make a clip")
    generate.add_argument("--model", type=Path, required=True, help="MOVA checkpoint folder (the one with model_index.json)")
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--image", type=Path, help="start picture; without it the clip is made from the prompt alone")
    generate.add_argument("--last-image", type=Path, help="end picture")
    generate.add_argument("--out", type=Path, default=Path("clip.mp4"), help=".mp4, .mov or .webm (default clip.mp4)")
    generate.add_argument("--negative-prompt", help="default: the released one")
    for name, kind, text in (
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
    ):
        generate.add_argument(f"--{name}", type=kind, help=text)
    generate.add_argument("--schedule", choices=("reference", "simple"), default="reference")
    generate.add_argument("--text-cache", type=Path, default=CACHE, help="folder that keeps encoded prompts (default ~/.cache/mova-studio/text)")
    add_placement(generate)
    generate.set_defaults(run=run_generate)


def add_quantize(commands: argparse._SubParsersAction) -> None:
    quantize = commands.add_parser("quantize", help="write a checkpoint folder with 8-bit weights, half the size; an interrupted call goes on where it stopped")
    quantize.add_argument("folder", type=Path, metavar="IN", help="MOVA checkpoint folder; it is only read")
    quantize.add_argument("out", type=Path, metavar="OUT", help="new folder")
    quantize.add_argument("--measure", action="store_true", help="measure the error of a large checkpoint, too (passes all its weights twice)")
    quantize.add_argument("--device", help="where the error is measured: cuda, cpu, ... (default: cuda where there is one)")
    quantize.set_defaults(run=run_quantize)


def add_placement(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", help="cuda, cpu, ... (default: cuda where there is one)")
    command.add_argument("--dtype", choices=DTYPES, default="as-stored")
    command.add_argument("--residency", choices=("auto", "resident", "stream"), default="auto")


def placement(args: argparse.Namespace) -> dict:
    import torch

    dtypes = dict(zip(DTYPES, (None, torch.bfloat16, torch.float16, torch.float32), strict=True))
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return {"device": device, "dtype": dtypes[args.dtype], "residency": args.residency}


def run_generate(args: argparse.Namespace) -> int:
    from .media import check_output
    from .pipeline import load_pipeline

    check_output(args.out)
    names = (
        "negative_prompt",
        "height",
        "width",
        "num_frames",
        "fps",
        "steps",
        "cfg",
        "audio_cfg",
        "bridge_guidance",
        "shift",
        "audio_shift",
        "boundary",
        "seed",
        "last_image",
    )
    settings = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    pipe = load_pipeline(args.model, text_cache=args.text_cache, **placement(args))
    start = time.monotonic()

    def on_step(step):
        spent = time.monotonic() - start
        left = spent / (step.index + 1) * (step.total - step.index - 1)
        print(f"step {step.index + 1}/{step.total}  {step.expert} expert  sigma {step.sigma:.3f}  {spent:.0f} s, about {left:.0f} s left", file=sys.stderr)

    pipe.render(args.out, args.prompt, args.image, schedule=args.schedule, on_step=on_step, **settings)
    print(args.out)
    return 0


def run_inspect(args: argparse.Namespace) -> int:
    from .inspection import describe

    print(describe(args.path))
    return 0


def run_check(args: argparse.Namespace) -> int:
    from .check import check

    findings = []
    for finding in check(args.folder, height=args.height, width=args.width, **placement(args)):
        print(finding, flush=True)
        findings.append(finding)
    odd = sum(not finding.good for finding in findings)
    print(f"{odd} of {len(findings)} values are not normal: paste this into a bug report." if odd else "all values are normal")
    return 1 if odd else 0


def run_quantize(args: argparse.Namespace) -> int:
    import torch

    from .inspection import show_size
    from .quantize import SMALL, denoiser_bytes, measure_folders, quantize

    def on_file(file):
        state = "kept" if file.kept else "written" if file.before != file.after else "copied"
        print(f"{state:8} {show_size(file.before):>10} -> {show_size(file.after):>10}  {file.name}", flush=True)

    results = quantize(args.folder, args.out, on_file)
    print(f"{args.out}: {show_size(sum(file.before for file in results))} -> {show_size(sum(file.after for file in results))}", flush=True)
    if denoiser_bytes(args.folder) > SMALL and not args.measure:
        print("error not measured: --measure does it for a checkpoint of this size")
        return 0
    print("error against the original (relative L2 of the predicted clean latents, random text and noise):", flush=True)
    print(*measure_folders(args.folder, args.out, device=args.device or ("cuda" if torch.cuda.is_available() else "cpu")), sep="\n")
    return 0


def run_demo_model(args: argparse.Namespace) -> int:
    from .demo_model import write_demo_model

    write_demo_model(args.folder, seed=args.seed)
    print(args.folder)
    return 0


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
