"""python -m mova enhance: a prompt out of an idea."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..errors import InputError
from .placement import choose_device


def add(commands: argparse._SubParsersAction) -> None:
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
    enhance.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..prompt import LocalModel, RemoteModel, enhance_prompt
    from ..text import load_text_encoder

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
