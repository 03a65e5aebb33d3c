"""Loads the pack as ComfyUI does, checks a workflow as its server does, and runs it node by node."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import torch

from . import WorkflowError, say
from .host import KEYWORDS, Hidden, NodeOutput, installed
from .workflow import Prompt, literal, plain, read_workflow, set_inputs, to_prompt

PACK = "headless_pack"  # any name does; ComfyUI takes the folder's path
CONVERT = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}
LISTED = 20  # choices named in a message


def run(path: Path, *, models: Path, inputs: Path, outputs: Path, model: str | None, assignments: list[str], pack: Path) -> int:
    """Runs a workflow with the nodes of the folder `pack`; returns the exit code. The paths of new files go to stdout, the rest to stderr."""
    listing = sys.stdout
    try:
        for option, folder in (("--models", models), ("--input", inputs)):
            if not folder.is_dir():
                raise WorkflowError(f"{option} {folder} is no folder: give one that exists.")
        content = read_workflow(path)
        with contextlib.redirect_stdout(sys.stderr), installed(models, inputs, outputs), loaded_pack(pack) as nodes, torch.inference_mode():
            schemas = {kind: node.SCHEMA for kind, node in nodes.items()}
            prompt = to_prompt(content, schemas)
            set_inputs(prompt, schemas, model, assignments)
            told = (WorkflowError, sys.modules[f"{PACK}.mova.errors"].MovaError)
            classes = {key: nodes.get(node["class_type"]) for key, node in prompt.items()}
            graph = Graph(prompt, classes, {"workflow": content} if "nodes" in content else {}, told)
            return graph.execute(graph.check(), listing)
    except WorkflowError as error:
        say(str(error))
        return 2


@contextlib.contextmanager
def loaded_pack(root: Path) -> Iterator[dict[str, Any]]:
    """The node classes of the pack and ComfyUI's file nodes, by id; the folder is imported as a package under a name of its own."""
    spec = importlib.util.spec_from_file_location(PACK, root / "__init__.py", submodule_search_locations=[str(root)])
    sys.modules[PACK] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        core = importlib.import_module(f"{PACK}.headless.core_nodes").NODES
        extension = asyncio.run(module.comfy_entrypoint())
        asyncio.run(extension.on_load())
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
        problems = [
            f"{self.label(key)}: the type '{self.prompt[key]['class_type']}' is neither in this pack nor one of the few others that run here (files in "
            "and out, previews, primitives). Run the workflow in ComfyUI with the pack that has it, or take the node out."
            for key, node in self.nodes.items() if not node
        ]  # fmt: skip
        ends = [key for key, node in self.nodes.items() if node and node.SCHEMA.is_output_node]
        if not ends:
            problems.append("The workflow has no output node that runs here, such as Save Video: there is nothing to run.")
        orders = sorted((list(self.upstream(key, {})) for key in ends), key=len)  # an estimate runs before the sampler
        order = list(dict.fromkeys(key for needed in orders for key in needed))
        problems += [f"{self.label(key)}: {problem}" for key in order if self.nodes[key] for problem in self.problems(key)]
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
        """What is wrong with the inputs of a node. Values are converted in place and inputs it does not declare dropped, as the server does."""
        node, given, found = self.nodes[key], self.prompt[key]["inputs"], []
        for name in given.keys() - {item.id for item in node.SCHEMA.inputs}:
            say(f"{self.label(key)}: the input '{name}' is unknown here and ignored.")
            del given[name]
        checks = inspect.signature(node.validate_inputs).parameters if hasattr(node, "validate_inputs") else {}
        if any(parameter.kind == parameter.VAR_KEYWORD for parameter in checks.values()):
            checks = given
        for item in node.SCHEMA.inputs:
            if item.id not in given:
                problem = "" if item.optional else "is missing: link it (a muted or bypassed source gives nothing)."
            elif isinstance(given[item.id], list):
                problem = self.link_problem(item, given[item.id])
            else:
                problem = value_problem(item, given, ranged=item.id not in checks)
            found += [f"the input '{item.id}' {problem}"] if problem else []
        own = {name: None if isinstance(given[name], list) else given[name] for name in checks if name in given}
        if own and not found:
            try:
                answer = node.validate_inputs(**own)
            except self.told as error:
                answer = str(error)
            found += [] if answer is True else [str(answer or "its values do not fit.")]
        return found

    def link_problem(self, item: Any, link: list[Any]) -> str:
        if len(link) != 2 or str(link[0]) not in self.prompt:
            return f"is linked to {link}, which is not in the workflow: link it again."
        if (source := self.nodes[str(link[0])]) is None:
            return ""  # has been told
        if link[1] not in range(len(source.SCHEMA.outputs)):
            return f"is linked to output {link[1]} of {self.label(str(link[0]))}, which has {len(source.SCHEMA.outputs)}: link it again."
        wanted, arriving = item.io_type, source.SCHEMA.outputs[link[1]].io_type
        fits = "*" in (wanted, arriving) or set(wanted.split(",")) & set(arriving.split(","))
        return "" if fits else f"takes {wanted}, but {self.label(str(link[0]))} gives {arriving}."

    def execute(self, order: list[str], listing: TextIO) -> int:
        """Runs each node once; the paths of new files go to `listing`. Returns 0, or 1 when one stops with a sentence; other errors pass."""
        results: dict[str, list[list[Any]]] = {}
        for count, key in enumerate(order, 1):
            say(f"[{count}/{len(order)}] {self.prompt[key]['_meta']['title']}")
            try:
                output = self.run_node(key, results)
            except self.told as error:
                say(f"{self.label(key)}: {error}")
                return 1
            results[key] = [value if kind.is_output_list else [value] for kind, value in zip(self.nodes[key].SCHEMA.outputs, output.args, strict=True)]
            needed = {source for later in order[count:] for source in self.sources(later)}
            results = {done: values for done, values in results.items() if done in needed}
            shown = output.ui if isinstance(output.ui, dict) else output.ui.as_dict() if output.ui else {}
            for text in shown.get("text", ()):
                say(f"  {text}")
            for file in shown.get("files", ()):
                print(file, file=listing, flush=True)
        return 0

    def run_node(self, key: str, results: dict[str, list[list[Any]]]) -> NodeOutput:
        node, inputs = self.nodes[key], {}
        for name, value in self.prompt[key]["inputs"].items():
            values = results[str(value[0])][value[1]] if isinstance(value, list) else [plain(value)]
            if not node.SCHEMA.is_input_list and len(values) != 1:
                raise WorkflowError(f"the input '{name}' gets a list of {len(values)}, which only nodes made for lists take here. Run it in ComfyUI.")
            inputs[name] = values if node.SCHEMA.is_input_list else values[0]
        known = {"unique_id": key, "prompt": self.prompt, "extra_pnginfo": self.extra}
        hidden = SimpleNamespace(**{item.name: known.get(item.name) if item in node.SCHEMA.hidden else None for item in Hidden})
        method = type(node.__name__, (node,), {"hidden": hidden}).execute
        output = asyncio.run(method(**inputs)) if inspect.iscoroutinefunction(method) else method(**inputs)
        return output if isinstance(output, NodeOutput) else NodeOutput(*(output or ()))


def value_problem(item: Any, given: dict[str, Any], ranged: bool) -> str:
    """Converts given[item.id] in place; what is wrong with it."""
    value = plain(given[item.id])
    if not {"*", *KEYWORDS} & set(item.io_type.split(",")):
        return f"is {value!r}, but takes a link from a node that gives {item.io_type}."
    try:
        value = CONVERT.get(item.io_type, lambda same: same)(value)
    except (TypeError, ValueError, OverflowError):
        return f"is {value!r}: a value of type {item.io_type} is needed."
    given[item.id] = literal(value)
    if ranged and not ((item.min is None or value >= item.min) and (item.max is None or value <= item.max)):
        return f"is {value}: a number from {item.min} to {item.max} is needed."
    if ranged and item.io_type == "COMBO" and item.options is not None and value not in item.options:
        return f"is {value!r}: one of {', '.join(map(str, item.options[:LISTED]))}{', ...' * (len(item.options) > LISTED)} is needed."
    return ""
