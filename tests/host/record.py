"""Records what nodes declare: COMFYUI_PATH=CHECKOUT[:CHECKOUT...] COMFY_PYTHON=... python -m tests.host.record

Writes tests/contracts/comfyui-VERSION.json for each checkout: our nodes and the core nodes of the shipped workflows, as /object_info tells them,
without texts, and with the same files in every list on every machine. Run it after a new node, input or workflow, and commit the result.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .server import CHECKOUTS, serve

ROOT = Path(__file__).resolve().parents[2]
CONTRACTS = ROOT / "tests" / "contracts"
PACK = "mova-studio"
MODEL = "MOVA-360p"  # the checkpoint that the shipped workflows name
EAR = "SSLAM_AS2M_Finetuned/model.safetensors"  # and the audio encoder
TEXTS = {"tooltip", "description", "output_tooltips", "search_aliases", "help", "price_badge", "essentials_category"}
INPUT_FILES = ("LoadImage", "LoadAudio", "LoadVideo")  # nodes whose first widget is a file in input/
FILES = {**dict.fromkeys(INPUT_FILES, "input"), "MOVALoadLora": "models/loras"}  # where the file of a node's first widget lies
PAGE_ONLY = ("Note", "MarkdownNote", "Reroute", "PrimitiveNode")


def saved_nodes() -> Iterator[dict[str, Any]]:
    """Every node of the shipped workflows and blueprints, inside subgraphs as well."""
    for path in sorted([*ROOT.glob("workflows/*.json"), *ROOT.glob("subgraphs/*.json")]):
        workflow = json.loads(path.read_text(encoding="utf-8"))
        subgraphs = (workflow.get("definitions") or {}).get("subgraphs") or []
        own = {graph["id"] for graph in subgraphs}
        for graph in [workflow, *subgraphs]:
            yield from (node for node in graph["nodes"] if node["type"] not in own and node["type"] not in PAGE_ONLY)


def model_hints() -> Iterator[dict[str, str]]:
    """What the workflows say about files that core's loaders open: name, url, directory."""
    for node in saved_nodes():
        yield from node.get("properties", {}).get("models", [])


def place_files(folder: Path) -> None:
    """Empty files under the names that the workflows choose, so that each list offers those and no others."""
    wanted = [
        f"models/mova/{MODEL}/model_index.json",
        f"models/audio_encoders/{EAR}",
        *(f"models/{hint['directory']}/{hint['name']}" for hint in model_hints()),
    ]
    for node in saved_nodes():
        if node["type"] in FILES:
            wanted.append(f"{FILES[node['type']]}/{node['widgets_values'][0]}")
    for name in wanted:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def without_texts(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_texts(item) for key, item in value.items() if key not in TEXTS}
    return [without_texts(item) for item in value] if isinstance(value, list) else value


def record(checkout: Path) -> Path:
    with tempfile.TemporaryDirectory() as folder:
        place_files(Path(folder))
        with serve(checkout, Path(folder), {PACK: ROOT}) as server:
            if server.import_seconds()[PACK] == float("inf"):
                raise SystemExit(f"The pack cannot be loaded:\n{server.log()}")
            declared, system = server.get("/object_info"), server.get("/system_stats")["system"]
            models = {folder: server.get(f"/models/{folder}") for folder in sorted({hint["directory"] for hint in model_hints()})}
    core = {node["type"] for node in saved_nodes()}
    nodes = {name: without_texts(node) for name, node in sorted(declared.items()) if name in core or node["python_module"] == f"custom_nodes.{PACK}"}
    contract = {"comfyui": system["comfyui_version"], "frontend": system["required_frontend_version"], "models": models, "nodes": nodes}
    if absent := sorted(core - nodes.keys()):
        raise SystemExit(f"ComfyUI {contract['comfyui']} has no node {', '.join(absent)}: a shipped workflow does not open there.")
    path = CONTRACTS / f"comfyui-{contract['comfyui']}.json"
    path.write_text(json.dumps(contract, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
    return path


if __name__ == "__main__":
    if not CHECKOUTS:
        raise SystemExit("COMFYUI_PATH names no checkout of ComfyUI: set it to one, or to several.")
    for source in CHECKOUTS:
        print(record(source))
