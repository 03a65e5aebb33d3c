"""Command line: python -m mova generate | inspect | check | quantize | check-sync | enhance | convert-lora | demo-model."""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
import time
from pathlib import Path

from .errors import InputError, MovaError

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
    add_check_sync(commands)
    add_enhance(commands)
    add_convert_lora(commands)
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
    generate.add_argument("--lora", action="append", default=[], metavar="PATH[:STRENGTH]", help="a LoRA file or folder, may be repeated (strength 1)")
    generate.add_argument("--schedule", choices=("reference", "simple"), default="reference")
    generate.add_argument("--resume", type=Path, metavar="FILE", help="keep the run in this file while it lasts, and go on from it when it is there")
    generate.add_argument("--keep-every", type=int, default=5, metavar="STEPS", help="how often the run is kept (default every 5 steps)")
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


def add_check_sync(commands: argparse._SubParsersAction) -> None:
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
    sync.set_defaults(run=run_check_sync)


def add_enhance(commands: argparse._SubParsersAction) -> None:
    enhance = commands.add_parser(
        "enhance",
        help="from an idea to the prompt MOVA was trained with: prints the prompt",
        epilog="The key of a service is read from the environment variable MOVA_PROMPT_API_KEY and never from a file or an option.",
    )
    enhance.add_argument("--idea", required=True, help="what happens, in any language; what is said in quotes")
    enhance.add_argument("--image", type=Path, help="the start picture")
    enhance.add_argument("--provider", choices=("template", "local", "openai-compatible"), default="template", help="who writes (default template: no model)")
    enhance.add_argument("--seed", type=int, default=0, help="another number is another take (default 0)")
    enhance.add_argument("--model", type=Path, metavar="DIR", help="local: a language model that transformers opens; to look at a picture it must see")
    enhance.add_argument("--language-model", type=Path, metavar="DIR", help="local: another model for writing, which need not see")
    enhance.add_argument("--device", help="local: cuda, cpu, ... (default: cuda where there is one)")
    enhance.add_argument(
        "--settings", type=Path, metavar="FILE", help="openai-compatible: JSON with base_url and model (or MOVA_PROMPT_BASE_URL, MOVA_PROMPT_MODEL)"
    )
    enhance.add_argument("--max-tokens", type=int, default=512, help="longest prompt in tokens, 64 to 512 (default 512)")
    enhance.add_argument("--text-encoder", type=Path, metavar="DIR", help="MOVA checkpoint folder whose tokenizer counts; without it the length is estimated")
    enhance.add_argument("--on-failure", choices=("error", "template"), default="error", help="when the model fails (default error)")
    enhance.add_argument("--no-subtitles", action="store_true", help="end with the sentence that marks clips without subtitles")
    enhance.set_defaults(run=run_enhance)


def add_convert_lora(commands: argparse._SubParsersAction) -> None:
    convert = commands.add_parser("convert-lora", help="write any LoRA that MOVA reads as one safetensors file with ComfyUI's keys")
    convert.add_argument("lora", type=Path, metavar="IN", help="a LoRA file, or the folder its trainer wrote; it is only read")
    convert.add_argument("out", type=Path, metavar="OUT", help="new .safetensors file")
    convert.add_argument("--alpha", type=float, help="where the file's own cannot be trusted (see 'inspect')")
    convert.set_defaults(run=run_convert_lora)


def add_placement(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", help="cuda, cpu, ... (default: cuda where there is one)")
    command.add_argument("--dtype", choices=DTYPES, default="as-stored")
    command.add_argument("--residency", choices=("auto", "resident", "stream"), default="auto")


def choose_device(asked: str | None) -> str:
    """The device asked for, else cuda where there is one. InputError for one that is not there."""
    import torch

    if asked is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=asked)
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {asked} cannot be used ({reason}): cpu always works; without --device a GPU is used where there is one.") from None
    return asked


def placement(args: argparse.Namespace) -> dict:
    import torch

    dtypes = dict(zip(DTYPES, (None, torch.bfloat16, torch.float16, torch.float32), strict=True))
    device = choose_device(args.device)
    return {"device": device, "dtype": dtypes[args.dtype], "residency": args.residency}


def run_generate(args: argparse.Namespace) -> int:
    from .lora import parse_lora
    from .media import check_output
    from .pipeline import load_pipeline
    from .resume import Resume

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


def run_convert_lora(args: argparse.Namespace) -> int:
    from .inspection import released_shapes
    from .lora.convert import convert_lora

    print(convert_lora(args.lora, args.out, released_shapes(), alpha=args.alpha))
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
    print(*measure_folders(args.folder, args.out, device=choose_device(args.device)), sep="\n")
    return 0


def run_check_sync(args: argparse.Namespace) -> int:
    from .lipsync.check import check_lip_sync
    from .lipsync.film import open_film
    from .lipsync.landmarks import open_landmarks
    from .lipsync.plot import check_plot, save_plot
    from .lipsync.syncnet import load_syncnet
    from .lipsync.verdict import EXIT_CODES, kind_of

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


def run_enhance(args: argparse.Namespace) -> int:

    from .prompt import LocalModel, RemoteModel, enhance_prompt
    from .text import load_text_encoder

    if args.provider == "local" and args.model is None:
        raise InputError(
            "--provider local needs --model DIR: the folder of a language model, as 'hf download Qwen/Qwen3-VL-4B-Instruct --local-dir DIR' makes it."
        )
    build = {
        "template": lambda: None,
        "local": lambda: LocalModel(args.model, args.language_model, device=choose_device(args.device)),
        "openai-compatible": lambda: RemoteModel(args.settings),
    }
    made = enhance_prompt(
        args.idea,
        args.image,
        model=build[args.provider](),
        seed=args.seed,
        max_tokens=args.max_tokens,
        count=load_text_encoder(args.text_encoder).count_tokens if args.text_encoder else None,
        on_failure="use template" if args.on_failure == "template" else "error",
        no_subtitles=args.no_subtitles,
    )
    sys.stdout.reconfigure(encoding="utf-8")  # a file on Windows would take no other script than the system's
    print(made.prompt)
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
