"""Where a run stands, in one file that is replaced whole: tensors by name, and the rest as JSON in its header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import CatError
from ..files import whole_file

MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # what Adam remembers of each parameter


def save_state(file: Path, tensors: dict[str, torch.Tensor], story: dict[str, Any]) -> None:
    """story: JSON values. CatError when the place cannot be written."""
    with whole_file(file) as draft:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, draft, {"state": json.dumps(story)})


def load_state(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    try:
        with safe_open(file, "pt") as stored:
            story = json.loads((stored.metadata() or {})["state"])
            return {name: stored.get_tensor(name) for name in stored.keys()}, story
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CatError(f"{file} cannot be read as the state of a run ({error}): delete it to begin anew, or choose another output folder.") from None


def optimiser_tensors(model: torch.nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Adam's memory, named after the parameters."""
    return {
        f"optimiser.{moment}.{name}": optimiser.state[parameter][moment]
        for name, parameter in model.named_parameters()
        for moment in MOMENTS
        if parameter in optimiser.state
    }


def load_optimiser(model: torch.nn.Module, optimiser: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if f"optimiser.step.{name}" in tensors:
            memory = {moment: tensors[f"optimiser.{moment}.{name}"] for moment in MOMENTS}
            optimiser.state[parameter] = {k: v if k == "step" else v.to(parameter.device) for k, v in memory.items()}
