"""What the nodes declare is what real ComfyUI servers recorded (tests/contracts): ids, types and the order of inputs never change, they only grow."""

import json
from pathlib import PurePosixPath
from types import SimpleNamespace

import pytest
from canvas.contract import CONTRACTS, own_nodes
from conftest import ROOT
from host.record import place_files

from headless.host import installed
from headless.runner import loaded_pack

RECORD = "record it: COMFYUI_PATH=CHECKOUT python -m tests.host.record"


@pytest.fixture(scope="module")
def declared(tmp_path_factory):
    """Our nodes' schemas as the code declares them now, by id."""
    folder = tmp_path_factory.mktemp("comfyui")
    place_files(folder)
    with installed(folder / "models", folder, folder), loaded_pack(ROOT) as nodes:
        yield {name: node.SCHEMA for name, node in nodes.items() if ".headless." not in node.__module__}


def recorded_inputs(node, group):
    """[(name, type, default)] in the recorded order."""
    inputs = node["input"].get(group, {})
    return [(name, inputs[name][0], inputs[name][1].get("default")) for name in node["input_order"].get(group, [])]


def declared_inputs(schema, optional):
    return [(item.id, item.io_type, item.default) for item in schema.inputs if item.optional == optional]


@pytest.mark.parametrize("version", CONTRACTS)
def test_every_node_is_recorded(declared, version):
    assert sorted(own_nodes(version)) == sorted(declared), RECORD


@pytest.mark.parametrize("version", CONTRACTS)
def test_inputs_and_outputs_only_grow(declared, version):
    for name, node in own_nodes(version).items():
        schema, optional = declared[name], recorded_inputs(node, "optional")
        assert declared_inputs(schema, False) == recorded_inputs(node, "required"), name
        assert declared_inputs(schema, True)[: len(optional)] == optional, name
        outputs = [(item.display_name, item.io_type, item.is_output_list) for item in schema.outputs]
        before = list(zip(node["output_name"], node["output"], node["output_is_list"], strict=True))
        assert outputs[: len(before)] == before, name
        assert (schema.is_input_list, schema.is_output_node, schema.category) == (node["is_input_list"], node["output_node"], node["category"]), name


@pytest.mark.parametrize("version", CONTRACTS)
def test_choices_and_limits_only_widen(declared, version):
    for name, node in own_nodes(version).items():
        now = {item.id: item for item in declared[name].inputs}
        for key, (_, settings) in {**node["input"].get("required", {}), **node["input"].get("optional", {})}.items():
            lost = set(settings.get("options", ())) - set(now[key].options or ())
            assert not lost, f"{name}.{key}: workflows with {lost} no longer open"
            assert settings.get("min", 0) >= (now[key].min or 0) and settings.get("max", 0) <= (now[key].max or float("inf")), f"{name}.{key}"
            assert bool(settings.get("control_after_generate")) == bool(now[key].control_after_generate), f"{name}.{key}"


def test_contracts_are_small_and_the_same_on_every_machine():
    assert list(CONTRACTS)[0] == "0.12.2", "the oldest supported version is missing"
    for path in CONTRACTS.values():
        text = path.read_text(encoding="utf-8")
        assert len(text) < 200_000 and "tooltip" not in text and not any(PurePosixPath(choice).is_absolute() for choice in find_choices(json.loads(text))), (
            path.name
        )


def find_choices(value):
    """Every choice of every list in a contract."""
    if isinstance(value, dict):
        yield from (option for option in value.get("options", ()) if isinstance(option, str))
        value = value.values()
    elif not isinstance(value, list):
        return
    for item in value:
        yield from find_choices(item)


@pytest.mark.parametrize("change", ["renamed", "retyped", "reordered", "appended"])
def test_a_change_is_noticed(declared, change):
    """The comparison itself: only a new optional input at the end passes."""
    schema = declared["MOVAKeepStream"]
    inputs = [SimpleNamespace(**vars(item)) for item in schema.inputs]
    if change == "renamed":
        inputs[1].id = "amount"
    elif change == "retyped":
        inputs[1].io_type = "INT"
    elif change == "reordered":
        inputs[2:4] = inputs[3:1:-1]
    else:
        inputs.append(SimpleNamespace(**{**vars(inputs[-1]), "id": "new"}))
    changed = {**declared, "MOVAKeepStream": SimpleNamespace(**{**vars(schema), "inputs": inputs})}
    if change == "appended":
        test_inputs_and_outputs_only_grow(changed, "0.12.2")
    else:
        with pytest.raises(AssertionError, match="MOVAKeepStream"):
            test_inputs_and_outputs_only_grow(changed, "0.12.2")
