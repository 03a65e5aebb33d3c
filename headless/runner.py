"""Loads the pack as ComfyUI does, checks a workflow as its server does, and runs it node by node."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import torch

from . import WorkflowError, say
from .host import WIDGETS, NodeOutput, installed
from .workflow import Prompt, set_inputs, to_prompt

PACK = "headless_pack"  # any name does; ComfyUI takes the folder's path
CONVERT = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": lambda value: {"true": True, "false": False}[str(value).lower()]}
LISTED = 20  # choices named in a message


def run(path: Path, *, models: Path, inputs: Path, outputs: Path, model: str | None, assignments: list[str], pack: Path) -> int:
    """Runs a workflow with the nodes of the folder `pack`; returns the exit code. The paths of new files go to stdout, the rest to stderr. WorkflowError."""
    listing = sys.stdout
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise WorkflowError(f"{path} is no JSON that can be read ({error}): give a workflow saved from ComfyUI.") from None
    with contextlib.redirect_stdout(sys.stderr), installed(models, inputs, outputs), loaded_pack(pack) as nodes, torch.inference_mode():
        schemas = {kind: node.SCHEMA for kind, node in nodes.items()}
        prompt = to_prompt(content, schemas)
        set_inputs(prompt, schemas, model, assignments)
        told = (WorkflowError, importlib.import_module(f"{PACK}.mova.errors").MovaError, importlib.import_module(f"{PACK}.cat_encoder.errors").CatError)
        classes = {key: nodes.get(node["class_type"]) for key, node in prompt.items()}
        graph = Graph(prompt, classes, {"workflow": content} if "nodes" in content else {}, told)
        return graph.execute(graph.check(), listing)


@contextlib.contextmanager
def loaded_pack(root: Path) -> Iterator[dict[str, Any]]:
    """The node classes of the pack and ComfyUI's file nodes, by id; the folder is imported as a package under a name of its own."""
    spec = importlib.util.spec_from_file_location(PACK, root / "__init__.py", submodule_search_locations=[str(root)])
    sys.modules[PACK] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        core = importlib.import_module(f"{PACK}.headless.core_nodes").NODES
        extension = asyncio.run(module.comfy_entrypoint())
        yield {node.GET_SCHEMA().node_id: node for node in [*core, *asyncio.run(extension.get_node_list())]}
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == PACK]:
            del sys.modules[name]


@dataclass
class Graph:
    """A prompt and the classes of its nodes (None for types unknown here), by node id."""

    prompt: Prompt
    nodes: dict[str, Any]
    extra: dict[str, Any]  # what saved files tell about their making, beside the prompt
    told: tuple[type[Exception], ...]  # errors that are sentences for the user

    def label(self, key: str) -> str:
        return f"Node {key}, {self.prompt[key]['_meta']['title']}"

    def sources(self, key: str) -> list[str]:
        return [str(value[0]) for value in self.prompt[key]["inputs"].values() if isinstance(value, list) and value]

    def check(self) -> list[str]:
        """The ids of the nodes that the outputs need, in running order. WorkflowError listing everything that is wrong."""
        ends = [key for key, node in self.nodes.items() if node and node.SCHEMA.is_output_node]
        orders = sorted((list(self.upstream(key, {})) for key in ends), key=len)  # an estimate runs before the sampler
        order = list(dict.fromkeys(key for needed in orders for key in needed))
        faulty = [key for key, node in self.nodes.items() if key in order or not node]
        problems = [f"{self.label(key)}: {problem}" for key in faulty for problem in self.problems(key)]
        if not ends:
            problems.append("The workflow has no output node that runs here, such as Save Video: there is nothing to run.")
        if problems:
            raise WorkflowError("\n".join(problems))
        return order

    def upstream(self, key: str, order: dict[str, None], path: tuple[str, ...] = ()) -> dict[str, None]:
        """`order` with the nodes added that `key` needs, and itself, each after what it needs. WorkflowError for links in a circle."""
        if key in path:
            raise WorkflowError(f"The links go in a circle, through the nodes {' -> '.join([*path[path.index(key) :], key])}: cut one of them.")
        if key not in order:
            for source in filter(self.prompt.__contains__, self.sources(key)):
                self.upstream(source, order, (*path, key))
            order[key] = None
        return order

    def problems(self, key: str) -> list[str]:
        """What is wrong with a node and its inputs. Values are converted in place and inputs it does not declare dropped, as the server does."""
        node, given, found = self.nodes[key], self.prompt[key]["inputs"], []
        if not node:
            told = "does not run here: this pack, files in and out, previews and primitives do, no subgraphs. Take it out or run it in ComfyUI."
            return [f"'{self.prompt[key]['class_type']}' {told}"]
        for name in given.keys() - {item.id for item in node.SCHEMA.inputs}:
            say(f"{self.label(key)}: the input '{name}' is unknown here and ignored.")
            del given[name]
        checks = inspect.signature(node.validate_inputs).parameters if hasattr(node, "validate_inputs") else ()
        for item in node.SCHEMA.inputs:
            if item.id not in given:
                problem = "" if item.optional else "is missing: link it (a muted or bypassed source gives nothing)."
            elif isinstance(given[item.id], list):
                problem = self.link_problem(item, given[item.id])
            else:
                problem = value_problem(item, given, ranged=item.id not in checks)
            found += [f"the input '{item.id}' {problem}"] if problem else []
        if checks and not found:
            try:
                answer = node.validate_inputs(**{name: None if isinstance(given[name], list) else given[name] for name in checks if name in given})
            except self.told as error:
                answer = str(error)
            found += [] if answer is True else [str(answer)]
        return found

    def link_problem(self, item: Any, link: list[Any]) -> str:
        if len(link) != 2 or str(link[0]) not in self.prompt:
            return f"is linked to {link}, which is not in the workflow: link it again."
        if (source := self.nodes[str(link[0])]) is None:
            return ""  # has been told
        wanted, at = item.io_type, f"output {link[1]} of {self.label(str(link[0]))}"
        output = next((kind for number, kind in enumerate(source.SCHEMA.outputs) if number == link[1]), None)
        if output is None or output.is_output_list:
            return f"is linked to {at}, which {'gives a list: run the workflow in ComfyUI' if output else 'is not there: link it again'}."
        fits = "*" in (wanted, output.io_type) or set(wanted.split(",")) & set(output.io_type.split(","))
        return "" if fits else f"takes {wanted}, but {at} gives {output.io_type}."

    def execute(self, order: list[str], listing: TextIO) -> int:
        """Runs each node once; the paths of new files go to `listing`. Returns 0, or 1 when one stops with a sentence; other errors pass."""
        results: dict[str, tuple[Any, ...]] = {}
        for count, key in enumerate(order, 1):
            say(f"[{count}/{len(order)}] {self.prompt[key]['_meta']['title']}")
            try:
                output = self.run_node(key, results)
            except self.told as error:
                say(f"{self.label(key)}: {error}")
                return 1
            needed = {source for later in order[count:] for source in self.sources(later)}
            results = {done: values for done, values in [*results.items(), (key, output.args)] if done in needed}
            shown = output.ui if isinstance(output.ui, dict) else output.ui.as_dict() if output.ui else {}
            for text in shown.get("text", ()):
                say(f"  {text}")
            for file in shown.get("files", ()):
                print(file, file=listing, flush=True)
        return 0

    def run_node(self, key: str, results: dict[str, tuple[Any, ...]]) -> NodeOutput:
        node, given = self.nodes[key], self.prompt[key]["inputs"]
        inputs = {name: results[str(value[0])][value[1]] if isinstance(value, list) else value for name, value in given.items()}
        if node.SCHEMA.is_input_list:
            inputs = {name: [value] for name, value in inputs.items()}
        hidden = SimpleNamespace(unique_id=key, prompt=self.prompt, extra_pnginfo=self.extra)
        method = type(node.__name__, (node,), {"hidden": hidden}).execute
        return asyncio.run(method(**inputs)) if inspect.iscoroutinefunction(method) else method(**inputs)


def value_problem(item: Any, given: dict[str, Any], ranged: bool) -> str:
    """Converts given[item.id] in place; what is wrong with it."""
    value = given[item.id]
    if not {"*", *WIDGETS} & set(item.io_type.split(",")):
        return f"is {value!r}, but takes a link from a node that gives {item.io_type}."
    try:
        given[item.id] = value = CONVERT.get(item.io_type, lambda same: same)(value)
    except (TypeError, ValueError, OverflowError, KeyError):
        return f"is {value!r}: a value of type {item.io_type} is needed."
    if ranged and not ((item.min is None or value >= item.min) and (item.max is None or value <= item.max)):
        return f"is {value}: a number from {item.min} to {item.max} is needed."
    if ranged and item.io_type == "COMBO" and item.options is not None and value not in item.options:
        return f"is {value!r}: one of {', '.join(map(str, item.options[:LISTED]))}{', ...' * (len(item.options) > LISTED)} is needed."
    return ""
