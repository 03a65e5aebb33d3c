"""Workflow files -> the prompt: {node id: {"class_type", "inputs", "_meta": {"title"}}}, a link being [node id, output number]."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from . import WorkflowError, say

Prompt = dict[str, dict[str, Any]]
MUTED, BYPASSED = 2, 4  # "mode" of a node on the canvas
PAGE_ONLY = ("Note", "MarkdownNote", "Reroute", "PrimitiveNode")  # nodes that exist on the page alone
CONTROLS = ("fixed", "increment", "increment-wrap", "decrement", "randomize")  # the extra value saved after a seed
UNNAMED = (None, "", "image")  # what the page saves after the widgets, for upload buttons and players


def to_prompt(workflow: Any, schemas: dict[str, Any]) -> Prompt:
    """The prompt of a canvas or API workflow; schemas by class type, nodes without one come without their widgets' values. WorkflowError."""
    try:
        if "nodes" in workflow:
            return read_canvas(workflow, schemas)
        nodes = workflow.get("prompt", workflow)  # the latter is inside when a whole request was saved
        return {str(key): entry(str(node["class_type"]), dict(node["inputs"]), node.get("_meta", {}).get("title"), schemas) for key, node in nodes.items()}
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        raise WorkflowError(f"This JSON is no workflow, or a damaged one ({type(error).__name__}: {error}): save it again from ComfyUI.") from error


def entry(kind: str, inputs: dict[str, Any], title: str | None, schemas: dict[str, Any]) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": title or getattr(schemas.get(kind), "display_name", None) or kind}}


def read_canvas(workflow: dict[str, Any], schemas: dict[str, Any]) -> Prompt:
    """The nodes on a page that the page would send, their links followed to the real source."""
    nodes = {str(node["id"]): node for node in workflow["nodes"]}
    links = {str(link[0]): (str(link[1]), int(link[2])) for link in workflow.get("links") or []}
    prompt = {}
    for key, node in nodes.items():
        kind, name = node["type"], f"Node {key}, {node.get('title') or node['type']}"
        if node.get("mode") in (MUTED, BYPASSED) or kind in PAGE_ONLY:
            continue
        inputs = widget_values(name, node.get("widgets_values"), schemas[kind]) if kind in schemas else {}
        arriving = {socket["name"]: follow(socket.get("link"), nodes, links) for socket in node.get("inputs") or []}
        prompt[key] = entry(kind, inputs | {socket: value for socket, value in arriving.items() if value is not None}, node.get("title"), schemas)
    return prompt


def follow(link: Any, nodes: dict[str, Any], links: dict[str, tuple[str, int]]) -> Any:
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
            return node["widgets_values"][0] if kind == "PrimitiveNode" else [origin, output]
        wanted = None if kind == "Reroute" else node["outputs"][output]["type"]
        candidates = inputs[output : output + 1] + inputs  # the page tries the input beside the output first
        link = next((socket.get("link") for socket in candidates if wanted in (None, socket["type"])), None)
    return None


def widget_values(name: str, saved: Any, schema: Any) -> dict[str, Any]:
    """Values by input, from the positional values of a canvas node; says so when their number does not fit."""
    values, found, lacking = list(saved or []), {}, []
    for item in widget_slots(schema):
        if isinstance(item, tuple):  # a value beside the inputs
            del values[: bool(values and values[0] in item)]
        else:
            lacking += [] if values else [item.id]
            blank = {"STRING": "", "BOOLEAN": False, "COMBO": next(iter(item.options or []), None)}.get(item.io_type, item.min or 0)  # on the page
            found[item.id] = values.pop(0) if values else blank if item.default is None else item.default
    surplus = [value for value in values if value not in UNNAMED]
    if lacking or surplus:
        say(f"{name}: saved by another version of this node. Defaults are used for {lacking}, values ignored are {surplus}: check the others too.")
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


def set_inputs(prompt: Prompt, schemas: dict[str, Any], model: str | None, assignments: list[str]) -> None:
    """`model` goes into the model widget of every MOVA loader, NODE.INPUT=VALUE into each node of this id, title or type with this input (WorkflowError: none)."""
    fields = {key: {item.id: item for item in schemas[node["class_type"]].inputs} for key, node in prompt.items() if node["class_type"] in schemas}
    names = {key: (key, prompt[key]["_meta"]["title"], prompt[key]["class_type"]) for key in fields}
    for key, items in fields.items():
        if model and names[key][2].startswith("MOVALoad") and "model" in items and items["model"].is_widget:
            prompt[key]["inputs"]["model"] = model
    for assignment in assignments:
        target, equals, value = assignment.partition("=")
        node, _, field = target.rpartition(".")
        fitting = [key for key in fields if node in names[key] and field in fields[key]]
        if not equals or not fitting:
            there = "; ".join(f"{key} ({title}): {', '.join(fields[key])}" for key, title, _ in names.values())
            raise WorkflowError(f"--set {assignment}: NODE.INPUT=VALUE is needed, such as 3.steps=8. The nodes and their inputs are {there}.")
        for key in fitting:
            prompt[key]["inputs"][field] = value
