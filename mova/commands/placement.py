"""Where a command computes, and in which numbers."""

from __future__ import annotations

import argparse

from ..errors import InputError

DTYPES = ("as-stored", "bf16", "fp16", "fp32")


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
