"""What real ComfyUI servers told about nodes (tests/contracts, written by tests/host/record.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACK = "mova-studio"  # the folder name of the pack when it was recorded
CONTRACTS = {json.loads(path.read_text(encoding="utf-8"))["comfyui"]: path for path in sorted((ROOT / "tests" / "contracts").glob("comfyui-*.json"))}
OLDEST, NEWEST = list(CONTRACTS)[0], list(CONTRACTS)[-1]


def read_contract(version: str) -> dict[str, Any]:
    return json.loads(CONTRACTS[version].read_text(encoding="utf-8"))


def own_nodes(version: str) -> dict[str, dict[str, Any]]:
    """Our nodes by id, as /object_info told them."""
    return {name: node for name, node in read_contract(version)["nodes"].items() if node["python_module"] == f"custom_nodes.{PACK}"}
