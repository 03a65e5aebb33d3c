"""ComfyUI's real page opens every shipped workflow cleanly and turns it into the prompt that headless makes of the same file."""

import io
import json
import os
from dataclasses import dataclass
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from canvas.browser import Canvas, find_chromium, open_canvas
from canvas.contract import NEWEST, OLDEST, own_nodes, read_contract
from canvas.pictures import SHOWN, picture_path
from canvas.recorded import find_frontend, serve_recorded
from conftest import ROOT
from PIL import Image

from headless.workflow import to_prompt

WORKFLOWS, BLUEPRINTS = (sorted((ROOT / folder).glob("*.json")) for folder in ("workflows", "subgraphs"))
PAGES = {OLDEST: (OLDEST, read_contract(OLDEST)["frontend"]), NEWEST: (NEWEST, None)}  # the oldest with its own page, the newest with the installed one
DYNAMIC = "COMFY_DYNAMICCOMBO_V3"
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", DYNAMIC)
PAGE_WIDGETS = ("audioUI", "preview", "previewMode")  # what the page sends along of its players and text previews
DRAW = "python -m tests.canvas.pictures"


@dataclass
class Desk:
    """A page over a recorded contract."""

    canvas: Canvas
    contract: dict


@pytest.fixture(scope="module", params=PAGES.values(), ids=PAGES)
def desk(request):
    version, frontend = request.param
    lacking = "playwright is not installed" if not find_spec("playwright") else "no Chromium is installed" if not find_chromium() else None
    if lacking is None:
        try:
            files = find_frontend(frontend)
        except RuntimeError as error:
            lacking = str(error)
    if lacking:
        (pytest.fail if "canvas" in os.environ.get("MOVA_REQUIRE", "") else pytest.skip)(f"the page cannot be opened: {lacking}")
    contract = read_contract(version)
    with serve_recorded(contract, files) as url, open_canvas(url) as canvas:
        yield Desk(canvas, contract)


def as_schemas(contract):
    """The recorded nodes as headless knows nodes."""
    return {name: SimpleNamespace(display_name=node["display_name"], inputs=list(as_inputs(node))) for name, node in contract["nodes"].items()}


def as_inputs(node):
    for group in ("required", "optional"):
        for name in node["input_order"].get(group, []):
            kind, settings = node["input"][group][name][0], (node["input"][group][name][1:] or [{}])[0]
            options = kind if isinstance(kind, list) else settings.get("options")
            kind = "COMBO" if isinstance(kind, list) else kind
            known = {key: settings.get(key) for key in ("default", "min", "control_after_generate")}
            yield SimpleNamespace(
                id=name, io_type=kind, optional=group == "optional", is_widget=kind in WIDGETS and not settings.get("forceInput"), options=options, **known
            )


def comparable(prompt, schemas):
    """Without titles, and without what the dynamic list of a core node unfolds into: headless has a Save Video of its own."""
    result = {}
    for key, node in prompt.items():
        kinds = [(item.id, item.io_type) for item in schemas[node["class_type"]].inputs]
        unfolded = {name for at, (name, _) in enumerate(kinds) if any(kind == DYNAMIC for _, kind in kinds[:at])}
        result[key] = node["class_type"], {name: value for name, value in node["inputs"].items() if "." not in name and name not in {*unfolded, *PAGE_WIDGETS}}
    return result


def widget_values(node):
    """Without the empty places at the end, which players and upload buttons have."""
    values = list(node.get("widgets_values") or [])
    while values and values[-1] is None:
        values.pop()
    return values


def load_workflow(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_opens_cleanly_and_gives_the_prompt(desk, path):
    workflow, schemas = load_workflow(path), as_schemas(desk.contract)
    opened = desk.canvas.open(path.name, workflow)
    assert opened.complaints == []
    assert len(opened.graph["nodes"]) == len(workflow["nodes"]) and len(opened.graph["links"]) == len(workflow["links"])
    loaded = {node["id"]: node for node in opened.graph["nodes"]}
    for node in workflow["nodes"]:
        saved = widget_values(node)
        assert widget_values(loaded[node["id"]])[: len(saved)] == saved, f"{node['type']} shows other values than were saved"
    assert comparable(opened.prompt, schemas) == comparable(to_prompt(workflow, schemas), schemas)


def test_a_workflow_saved_by_an_older_version_gets_the_defaults(desk):
    """Before the advanced widgets of the denoiser were there: the values that are saved keep their places."""
    workflow, schemas = load_workflow(ROOT / "workflows" / "mova_image_to_video_audio.json"), as_schemas(desk.contract)
    node = next(node for node in workflow["nodes"] if node["type"] == "MOVADenoise")
    node.update(widgets_values=[7, "fixed", 20, 4.5], inputs=[item for item in node["inputs"] if "widget" not in item])
    opened = desk.canvas.open("older.json", workflow)
    assert opened.complaints == []
    assert comparable(opened.prompt, schemas) == comparable(to_prompt(workflow, schemas), schemas)


@pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda path: path.stem)
def test_blueprint_opens_cleanly(desk, path):
    opened = desk.canvas.open(path.name, load_workflow(path))
    assert opened.complaints == [] and opened.prompt.keys()


def test_a_workflow_with_an_unknown_node_or_model_is_noticed(desk):
    """The checks themselves: what they are there to find is found."""
    for change in ({"type": "NoSuchNode"}, {"widgets_values": ["gone", "as stored", "auto", "auto"]}):
        workflow = load_workflow(ROOT / "workflows" / "mova_image_to_video_audio.json")
        next(node for node in workflow["nodes"] if node["type"] == "MOVALoadModel").update(change)
        assert desk.canvas.open("broken.json", workflow).complaints


# ---------------------------------------------------------------- pictures of the help pages


@pytest.mark.parametrize("kind", own_nodes(NEWEST))
def test_help_pictures(kind):
    path = picture_path(kind)
    assert path.is_file(), f"{path.name} is missing: {DRAW}"
    assert path.stat().st_size < 40_000


@pytest.mark.parametrize("desk", [PAGES[NEWEST]], ids=[NEWEST], indirect=True)
def test_help_pictures_show_the_nodes_as_they_are(desk):
    for kind in own_nodes(NEWEST):
        drawn = desk.canvas.picture_node(kind, SHOWN.get(kind, {}))
        with Image.open(io.BytesIO(drawn)) as now, Image.open(picture_path(kind)) as committed:
            assert abs(now.height - committed.height) <= 2, f"{kind} looks different: {DRAW}"  # its widgets tell the height; the width hangs on fonts
