"""The shipped workflows: each runs, to a film on the small demo model or to what it tells of a sound, and is whole, tidy and explained. ComfyUI's page is in
test_canvas."""

import json
from collections import Counter
from itertools import combinations

import loras
import pytest
import torch
from conftest import ROOT
from PIL import Image

from cat_encoder import write_demo_encoder
from headless.__main__ import main
from headless.host import installed
from headless.runner import loaded_pack, value_problem
from headless.workflow import MUTED, widget_slots, widget_values
from mova.demo_model import write_demo_model
from mova.media import write_audio
from mova.media_reading import read_video

MODEL = "MOVA-360p"
EAR_FOLDER = "SSLAM_AS2M_Finetuned"
EAR = f"{EAR_FOLDER}/model.safetensors"
DOWNLOADS = {  # what the first note says of each loader's file
    "MOVALoadModel": ("hf download OpenMOSS-Team/MOVA-360p", f"--local-dir models/mova/{MODEL}"),
    "CATLoadEncoder": (f"hf download ta012/{EAR_FOLDER}", f"--local-dir models/audio_encoders/{EAR_FOLDER}"),
}
LORAS = ("my_style.safetensors", "my_voice.safetensors")
CHOSEN = {"model": (MODEL,), "encoder": (EAR,), "lora_name": LORAS}  # in the widgets of these names
WORKFLOWS = {path.stem: path for path in sorted((ROOT / "workflows").glob("*.json"))}
BLUEPRINT = ROOT / "subgraphs" / "MOVA image to video+audio.json"  # the node menu shows the file's name
NOTE = "MarkdownNote"
TITLE = 30  # px above a node's body
FRAMES, FPS = 9, 24.0
SMALL = ("MOVAImageToVideoAudio.size=custom", "MOVAImageToVideoAudio.width=64", "MOVAImageToVideoAudio.height=48", "MOVADenoise.steps=4")
LISTS = ("MOVASeeds",)  # nodes that give lists, which are ComfyUI's own: muted, so that takes come as a batch
TWO_TAKES = ("MOVAImageToVideoAudio.batch_size=2", "MOVAPickBestTake.face_landmarks=none")  # there are no faces in noise
CORE = {  # nodes that only ComfyUI has, and what they give: the same in 0.12.2 and 0.33.0
    "CLIPLoader": ["CLIP"], "CLIPTextEncode": ["CONDITIONING"], "VAELoader": ["VAE"], "VAEDecode": ["IMAGE"], "VAEEncode": ["LATENT"],
    "LoadVideo": ["VIDEO"], "GetVideoComponents": ["IMAGE", "AUDIO", "FLOAT"], "GetImageSize": ["INT", "INT", "INT"],
    "ImageFromBatch": ["IMAGE"], "ImageScaleToTotalPixels": ["IMAGE"], "BatchImagesNode": ["IMAGE"],
}  # fmt: skip


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def nodes_of(workflow):
    return [node for node in workflow["nodes"] if node["type"] != NOTE]


def inner_graph():
    return load(BLUEPRINT)["definitions"]["subgraphs"][0]


def every_graph():
    """(name, graph), the inside of the blueprint among them, with links as [id, origin, output, target, input, type]."""
    inside = inner_graph()
    keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    inside["links"] = [[link[key] for key in keys] for link in inside["links"]]
    return [*((name, load(path)) for name, path in WORKFLOWS.items()), ("blueprint", inside)]


FILMS = [name for name, path in WORKFLOWS.items() if any(node["type"] == "CreateVideo" for node in load(path)["nodes"])]
GRAPHS = [pytest.param(graph, id=name) for name, graph in every_graph()]
BY_NAME = pytest.mark.parametrize("name", WORKFLOWS)
BY_GRAPH = pytest.mark.parametrize("graph", GRAPHS)
BY_FILM = pytest.mark.parametrize("name", FILMS)


@pytest.fixture(scope="module")
def schemas(tmp_path_factory):
    """Of our nodes and headless's, by class type."""
    folder = tmp_path_factory.mktemp("empty")
    with installed(folder, folder, folder), loaded_pack(ROOT) as nodes:
        return {kind: node.SCHEMA for kind, node in nodes.items()}


# ---------------------------------------------------------------- they run


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """Folders with the demo model and encoder, LoRAs for it, the picture and a recording of a rising tone, a second long."""
    folder = tmp_path_factory.mktemp("desk")
    write_demo_model(folder / "models" / "mova" / "demo")
    write_demo_encoder(folder / "models" / "audio_encoders" / EAR)
    (folder / "models" / "loras").mkdir()
    for seed, name in enumerate(LORAS):
        loras.write_full_lora(folder / "models" / "loras" / name, loras.full_factors(folder / "models" / "mova" / "demo", seed=seed), alpha=4)
    (folder / "input").mkdir()
    (folder / "input" / "mova_demo.jpg").write_bytes((ROOT / "assets" / "demo.jpg").read_bytes())
    seconds = torch.arange(48000) / 48000
    write_audio(folder / "input" / "mova_demo.wav", 0.5 * torch.sin(2 * torch.pi * (200 + 300 * seconds) * seconds)[None], 48000)
    return folder


@pytest.fixture
def run(desk, schemas, tmp_path, capsys):
    """run(name, *assignments) -> (files written, what was told) of the workflow as it is shipped but for these values."""

    def run(name, *assignments):
        if lacking := sorted({node["type"] for node in nodes_of(load(WORKFLOWS[name]))} - schemas.keys()):
            pytest.skip(f"needs ComfyUI itself, for {', '.join(lacking)}: run by test_host with COMFYUI_PATH")
        shipped = load(WORKFLOWS[name])
        for node in nodes_of(shipped):
            node["mode"] = MUTED if node["type"] in LISTS else node["mode"]
        (tmp_path / "workflow.json").write_text(json.dumps(shipped), encoding="utf-8")
        places = [f"--models={desk / 'models'}", f"--input={desk / 'input'}", f"--output={tmp_path}"]
        code = main(["run", str(tmp_path / "workflow.json"), *places, "--model=demo", *(f"--set={value}" for value in assignments)])
        files, told = capsys.readouterr()
        assert code == 0, told
        return files.splitlines(), told

    return run


@pytest.fixture
def film(run):
    """film(name) -> the film that the workflow makes at a small size."""

    def film(name):
        kinds = {node["type"] for node in nodes_of(load(WORKFLOWS[name]))}
        length = f"{'PrimitiveInt.value' if 'PrimitiveInt' in kinds else 'MOVAImageToVideoAudio.length'}={FRAMES}"
        (path,), _ = run(name, *SMALL, length, *(TWO_TAKES if kinds & set(LISTS) else ()))
        return read_video(path)

    return film


@BY_FILM
def test_runs_to_a_film_with_sound_as_long_as_the_picture(film, name):
    made = film(name)
    assert made.frames.shape == (FRAMES, 48, 64, 3) and made.fps == FPS
    assert made.frames.std() > 0.01 and made.audio.abs().max() > 0.01
    assert made.audio.shape[-1] == pytest.approx(made.sample_rate * FRAMES / FPS, abs=1)


def test_the_given_voice_is_what_the_film_says(film):
    made = film("mova_audio_driven")
    seconds = torch.arange(made.audio.shape[-1]) / made.sample_rate
    voice = torch.sin(2 * torch.pi * (200 + 300 * seconds) * seconds)
    assert torch.corrcoef(torch.stack([voice, made.audio[0]]))[0, 1] > 0.99


def test_the_sound_check_tells_of_tags_wanted_sounds_and_likeness(run):
    """With a random encoder: what is told, not that it is right."""
    files, told = run("cat_sound_check")
    assert not files and told.count("preview: 1 x") == 2
    assert "missing: waves" in told or "heard: waves" in told
    assert "100 of 100: likeness 1.000" in told, "the sound and its reference are one file"


# ---------------------------------------------------------------- they are whole


@BY_GRAPH
def test_nodes_are_known_and_every_link_fits(graph, schemas):
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert len(nodes) == len(graph["nodes"]) and len({link[0] for link in graph["links"]}) == len(graph["links"])
    assert {node["type"] for node in nodes_of(graph)} <= schemas.keys() | CORE.keys()
    for number, origin, output, target, slot, kind in graph["links"]:
        if origin in nodes:  # else the left side of a subgraph
            source = nodes[origin]
            known = CORE.get(source["type"]) or [item.io_type for item in schemas[source["type"]].outputs]
            assert known[output] == source["outputs"][output]["type"] == kind and number in source["outputs"][output]["links"]
        if target in nodes:
            arriving = nodes[target]["inputs"][slot]
            assert arriving["link"] == number and arriving["type"] in (kind, "*")
            if schema := schemas.get(nodes[target]["type"]):
                assert {kind, "*"} & set({item.id: item.io_type for item in schema.inputs}[arriving["name"]].split(","))
    ends = Counter(link[0] for link in graph["links"])
    assert all(socket["link"] is None or ends[socket["link"]] for node in nodes.values() for socket in node["inputs"])


@BY_GRAPH
def test_widgets_hold_what_their_nodes_take(graph, schemas, capsys):
    for node in nodes_of(graph):
        if node["type"] not in schemas or not node["type"].startswith(("MOVA", "CAT")):
            continue
        schema, saved = schemas[node["type"]], node.get("widgets_values")
        values = widget_values(node["type"], saved, schema)
        assert not capsys.readouterr().err, "the number of values does not fit"
        for item in schema.inputs:
            if item.is_widget and item.id in CHOSEN:
                assert values[item.id] in CHOSEN[item.id]
            elif item.is_widget:
                assert not value_problem(item, values, ranged=True), f"{node['type']}.{item.id}"


@BY_GRAPH
def test_seeds_are_fixed(graph, schemas):
    for node in nodes_of(graph):
        slots = list(widget_slots(schemas[node["type"]])) if node["type"] in schemas else []
        controls = [at for at, slot in enumerate(slots) if isinstance(slot, tuple) and "fixed" in slot]
        assert [node["widgets_values"][at] for at in controls] == ["fixed"] * len(controls)


@pytest.mark.parametrize("graph", [graph for graph in GRAPHS if graph.id in (*FILMS, "blueprint")])
def test_the_frame_rate_is_wired_to_the_film(graph):
    nodes, links = {node["id"]: node for node in graph["nodes"]}, {link[0]: link for link in graph["links"]}
    (film,) = (node for node in nodes.values() if node["type"] == "CreateVideo")
    (fps,) = (socket["link"] for socket in film["inputs"] if socket["name"] == "fps")
    source = nodes[links[fps][1]]
    assert (source["type"], source["outputs"][links[fps][2]]["name"]) == ("MOVAImageToVideoAudio", "fps")


@BY_NAME
def test_missing_models_are_hinted_on_core_loaders_only(name):
    for node in nodes_of(load(WORKFLOWS[name])):
        hints = node.get("properties", {}).get("models", [])
        assert bool(hints) == (node["type"] in ("CLIPLoader", "VAELoader")), node["type"]
        for hint in hints:
            assert hint["name"] == node["widgets_values"][0] and hint["url"].endswith(f"/{hint['directory']}/{hint['name']}")
            assert hint["url"].startswith("https://huggingface.co/Comfy-Org/")


# ---------------------------------------------------------------- they are tidy and explained


def box(node):
    (left, top), (width, height) = node["pos"], node["size"]
    return left, top - TITLE, left + width, top + height


def apart(first, second):
    return first[2] <= second[0] or second[2] <= first[0] or first[3] <= second[1] or second[3] <= first[1]


@BY_GRAPH
def test_nodes_do_not_overlap_and_are_read_from_left_to_right(graph):
    for first, second in combinations(graph["nodes"], 2):
        assert apart(box(first), box(second)), f"{first['type']} {first['id']} lies on {second['type']} {second['id']}"
    lefts = {node["id"]: node["pos"][0] for node in graph["nodes"]}
    assert all(lefts[origin] <= lefts[target] for _, origin, _, target, *_ in graph["links"] if {origin, target} <= lefts.keys())


@BY_GRAPH
def test_every_node_lies_in_one_group(graph):
    frames = [(left, top, left + width, top + height) for left, top, width, height in (group["bounding"] for group in graph["groups"])]
    assert all(apart(first, second) for first, second in combinations(frames, 2))
    for node in nodes_of(graph):
        left, top, right, bottom = box(node)
        assert [frame for frame in frames if frame[0] <= left and frame[1] <= top and right <= frame[2] and bottom <= frame[3]], node["type"]


@BY_NAME
def test_notes_tell_a_newcomer_what_to_do(name):
    notes = {node["title"]: node["widgets_values"][0] for node in load(WORKFLOWS[name])["nodes"] if node["type"] == NOTE}
    assert {"Start here", "What to change first"} <= notes.keys()
    assert notes["Start here"].startswith("## ")
    for loader, pieces in DOWNLOADS.items():
        needed = any(node["type"] == loader for node in nodes_of(load(WORKFLOWS[name])))
        assert not needed or all(piece in notes["Start here"] for piece in pieces), loader


@BY_NAME
def test_thumbnails(name):
    path = WORKFLOWS[name].with_suffix(".jpg")
    assert path.stat().st_size < 60_000
    with Image.open(path) as picture:
        assert picture.format == "JPEG" and picture.size == (480, 480)


def test_the_folder_is_flat_and_holds_nothing_else():
    """ComfyUI lists workflows/*.json of a pack, and shows the .jpg of the same name."""
    assert {path.name for path in (ROOT / "workflows").iterdir()} == {f"{name}.{end}" for name in WORKFLOWS for end in ("json", "jpg")}


# ---------------------------------------------------------------- the blueprint


def test_the_blueprint_is_the_default_workflow_in_one_box():
    inside = {node["type"]: node for node in inner_graph()["nodes"]}
    outside = {node["type"]: node for node in nodes_of(load(WORKFLOWS["mova_image_to_video_audio"]))}
    assert outside.keys() - inside.keys() == {"LoadImage", "SaveVideo"} and inside.keys() < outside.keys()
    for kind, node in inside.items():
        assert kind == "MOVAEncodeText" or node.get("widgets_values") == outside[kind].get("widgets_values")
    assert inside["MOVAEncodeText"]["widgets_values"] == ["", outside["MOVAEncodeText"]["widgets_values"][1]]


def test_the_blueprint_shows_few_things_and_chooses_the_model_once():
    graph = inner_graph()
    (instance,) = load(BLUEPRINT)["nodes"]
    assert instance["type"] == graph["id"] and graph["name"] == BLUEPRINT.stem and graph["description"]
    shown = [socket["name"] for socket in instance["inputs"] if "widget" in socket]
    assert dict(zip(shown, instance["widgets_values"], strict=True)) == {"prompt": "", "model": MODEL, "length": 193, "steps": 50, "seed": 42}
    for side in ("inputs", "outputs"):
        assert [(socket["name"], socket["type"]) for socket in instance[side]] == [(socket["name"], socket["type"]) for socket in graph[side]]
    loaders = [node for node in graph["nodes"] if node["type"].startswith("MOVALoad")]
    model = next(socket for socket in graph["inputs"] if socket["name"] == "model")
    assert sorted(model["linkIds"]) == sorted(node["inputs"][0]["link"] for node in loaders) and len(loaders) == 4
