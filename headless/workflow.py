"""Workflow files -> the prompt: {node id: {"class_type", "inputs", "_meta": {"title"}}}, a link being [node id, output number]."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import WorkflowError, say

Prompt = dict[str, dict[str, Any]]
Schemas = dict[str, Any]  # by class type
Links = dict[str, tuple[str, int]]  # link id -> origin node, output number
MUTED, BYPASSED = 2, 4  # "mode" of a node on the canvas
PAGE_ONLY = ("Note", "MarkdownNote", "Reroute", "PrimitiveNode")  # nodes that exist on the page alone
CONTROLS = ("fixed", "increment", "increment-wrap", "decrement", "randomize")  # the extra value saved after a seed
UNNAMED = (None, "", "image")  # what the page saves after the widgets, for upload buttons and players


def read_workflow(path: Path) -> Any:
    """The JSON of the file. WorkflowError when there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise WorkflowError(f"{path} cannot be read ({error.strerror}): give the path of a workflow saved from ComfyUI.") from None
    except (ValueError, RecursionError) as error:
        raise WorkflowError(f"{path} is no JSON ({error}): save the workflow again.") from None


def to_prompt(workflow: Any, schemas: Schemas) -> Prompt:
    """The prompt of a canvas or API workflow. Nodes without a schema come without their widgets' values. WorkflowError."""
    try:
        if "nodes" in workflow:
            return read_canvas(workflow, schemas)
        nodes = workflow.get("prompt", workflow)  # the latter is inside when a whole request was saved
        return {str(key): entry(node["class_type"], dict(node["inputs"]), node.get("_meta", {}).get("title"), schemas) for key, node in nodes.items()}
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise WorkflowError(f"This JSON is no workflow, or a damaged one ({type(error).__name__}: {error}): save it again from ComfyUI.") from error


def entry(kind: str, inputs: dict[str, Any], title: str | None, schemas: Schemas) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": title or getattr(schemas.get(kind), "display_name", None) or kind}}


def read_canvas(workflow: dict[str, Any], schemas: Schemas) -> Prompt:
    """The nodes on a page that the page would send, their links followed to the real source."""
    nodes = {str(node["id"]): node for node in workflow["nodes"]}
    saved = workflow.get("links") or []  # lists or objects, in a list or by id
    rows = [
        link if isinstance(link, list) else (link["id"], link["origin_id"], link["origin_slot"])
        for link in (saved.values() if isinstance(saved, dict) else saved)
    ]
    links = {str(row[0]): (str(row[1]), int(row[2])) for row in rows}
    subgraphs = [graph["id"] for graph in (workflow.get("definitions") or {}).get("subgraphs") or []]
    prompt = {}
    for key, node in nodes.items():
        kind, name = node["type"], f"Node {key}, {node.get('title') or node['type']}"
        if node.get("mode") in (MUTED, BYPASSED) or kind in PAGE_ONLY:
            continue
        if kind in subgraphs:
            raise WorkflowError(f"{name}, is a subgraph, which is not supported here: unpack it in ComfyUI and save the workflow again.")
        inputs = widget_values(name, node.get("widgets_values"), schemas[kind]) if kind in schemas else {}
        arriving = {socket["name"]: follow(socket.get("link"), nodes, links) for socket in node.get("inputs") or []}
        prompt[key] = entry(kind, inputs | {socket: value for socket, value in arriving.items() if value is not None}, node.get("title"), schemas)
    return prompt


def follow(link: Any, nodes: dict[str, Any], links: Links) -> Any:
    """What arrives over a link, through reroutes and bypassed nodes: [node id, output], a primitive's value, or None."""
    passed = set()
    while str(link) in links and link not in passed:
        passed.add(link)
        origin, output = links[str(link)]
        node = nodes[origin]
        kind, mode, inputs = node["type"], node.get("mode"), node.get("inputs") or []
        if mode == MUTED:
            return None
        if kind != "Reroute" and mode != BYPASSED:
            return literal(node["widgets_values"][0]) if kind == "PrimitiveNode" else [origin, output]
        wanted = None if kind == "Reroute" else node["outputs"][output]["type"]
        candidates = inputs[output : output + 1] + inputs  # the page tries the input beside the output first
        link = next((socket.get("link") for socket in candidates if wanted in (None, socket["type"])), None)
    return None


def widget_values(name: str, saved: Any, schema: Any) -> dict[str, Any]:
    """Values by input, from the positional (or named) values of a canvas node; says so when their number does not fit."""
    if isinstance(saved, dict):
        return {item.id: literal(saved.get(item.id, first_value(item))) for item in widget_slots(schema) if not isinstance(item, tuple)}
    values, found, lacking = list(saved or []), {}, []
    for item in widget_slots(schema):
        if isinstance(item, tuple):  # a value beside the inputs
            del values[: bool(values and values[0] in item)]
        else:
            lacking += [] if values else [item.id]
            found[item.id] = literal(values.pop(0) if values else first_value(item))
    surplus = [value for value in values if value not in UNNAMED]
    if lacking or surplus:
        fate = f"the default is used for {', '.join(lacking)}" if lacking else f"{surplus} at the end is ignored"
        say(f"{name}: saved by another version of this node, with {len(saved or [])} values for its widgets; {fate}. Check the others too.")
    return found


def widget_slots(schema: Any) -> Iterator[Any]:
    """The widgets in the order of their saved values, and for each value that belongs to no input the tuple of what it may be."""
    for item in sorted(schema.inputs, key=lambda item: item.optional):  # the page puts optional inputs last
        if item.is_widget:
            yield item
            control = item.control_after_generate
            if control or (control is None and item.io_type == "INT" and item.id in ("seed", "noise_seed")):
                yield CONTROLS
                yield ("",) if item.io_type == "COMBO" else ()  # the filter of what is chosen next


def first_value(item: Any) -> Any:
    """What the page shows before anybody touches the widget."""
    blank = {"STRING": "", "BOOLEAN": False, "COMBO": next(iter(item.options or []), None)}.get(item.io_type, item.min or 0)
    return blank if item.default is None else item.default


def literal(value: Any) -> Any:
    """A value that is a list is wrapped, because a bare list in a prompt is a link."""
    return {"__value__": value} if isinstance(value, list) else value


def plain(value: Any) -> Any:
    """The value that `literal` may have wrapped."""
    return value["__value__"] if isinstance(value, dict) and "__value__" in value else value


def set_inputs(prompt: Prompt, schemas: Schemas, model: str | None, assignments: list[str]) -> None:
    """`model` goes into the model widget of every MOVA loader. Then NODE.INPUT=VALUE: NODE is an id, else a title, else a class type;
    VALUE is a JSON number, true, false or string, else plain text. WorkflowError for what is not there."""
    fields = {key: schemas[node["class_type"]].inputs if node["class_type"] in schemas else [] for key, node in prompt.items()}
    for key, node in prompt.items():
        if model and node["class_type"].startswith("MOVALoad") and any(item.id == "model" and item.is_widget for item in fields[key]):
            node["inputs"]["model"] = model
    names = [
        {key: key for key in prompt},
        {key: node["_meta"]["title"] for key, node in prompt.items()},
        {key: node["class_type"] for key, node in prompt.items()},
    ]
    for assignment in assignments:
        target, equals, text = assignment.partition("=")
        name, dot, field = target.rpartition(".")
        if not equals or not dot:
            raise WorkflowError(f"--set {assignment}: NODE.INPUT=VALUE is needed, such as --set 3.steps=8.")
        matches = next((found for called in names if (found := [key for key in prompt if called[key] == name])), [])
        if not matches:
            there = ", ".join(f"{key} ({title})" for key, title in names[1].items())
            raise WorkflowError(f"--set {assignment}: no node has the id, title or type '{name}'. There are: {there}.")
        for key in matches:
            if field not in (there := [item.id for item in fields[key]]):
                raise WorkflowError(f"--set {assignment}: {names[1][key]} has no input '{field}'. It has: {', '.join(there)}.")
            value = None
            with contextlib.suppress(ValueError):
                value = json.loads(text)
            prompt[key]["inputs"][field] = value if isinstance(value, (bool, int, float, str)) else text
