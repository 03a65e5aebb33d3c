"""headless: workflow files become the right prompt, are checked before anything runs, and run to files that are there or not at all."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from headless.__main__ import main
from headless.host import installed
from headless.runner import loaded_pack
from headless.workflow import to_prompt
from mova.media import write_audio
from mova.media_reading import read_audio, read_metadata, read_video

ROOT = Path(__file__).resolve().parent.parent
NODES = Path(__file__).with_name("small_pack")


@pytest.fixture(scope="session")
def pack(tmp_path_factory) -> Path:
    """A node pack of the test's own, with this repository's libraries beside its nodes."""
    folder = tmp_path_factory.mktemp("pack") / "a.pack"
    for part in ("mova", "cat_encoder", "headless"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(NODES / "__init__.py", folder)
    return folder


@pytest.fixture
def run(pack, tmp_path, capsys):
    """run(workflow, *options) -> (exit code, paths on stdout, stderr); workflow is JSON content or text."""
    for name in ("models", "input"):
        (tmp_path / name).mkdir()

    def run_workflow(workflow, *options):
        file = tmp_path / "workflow.json"
        file.write_text(workflow if isinstance(workflow, str) else json.dumps(workflow), encoding="utf-8")
        places = [f"--{name}={tmp_path / name}" for name in ("models", "input", "output")]
        code = main(["run", str(file), *places, *options], pack=pack)
        out, err = capsys.readouterr()
        assert not [name for name in sys.modules if name.startswith(("headless_pack", "comfy", "folder_paths"))]
        return code, [Path(line) for line in out.splitlines()], err

    return run_workflow


@pytest.fixture(scope="session")
def schemas(pack, tmp_path_factory):
    folder = tmp_path_factory.mktemp("empty")
    with installed(folder, folder, folder), loaded_pack(pack) as nodes:
        return {name: node.SCHEMA for name, node in nodes.items()}


def canvas_node(number, kind, values=(), inputs=(), outputs=(), **more):
    """inputs: (name, type, link or None)."""
    entries = [{"name": name, "type": io_type, "link": link} for name, io_type, link in inputs]
    return {"id": number, "type": kind, "widgets_values": list(values), "inputs": entries, "outputs": [{"type": kind} for kind in outputs], "mode": 0, **more}


def canvas(*nodes, links=()):
    return {"nodes": list(nodes), "links": [list(link) for link in links], "version": 0.4}


def inputs_of(workflow, schemas):
    return {key: node["inputs"] for key, node in to_prompt(workflow, schemas).items()}


SHOW = canvas_node(9, "PreviewAny", inputs=[("source", "*", 1)])
NUMBER = {"seed": 4, "mode": "plain", "text": "t", "scale": 0.25}


# ---------------------------------------------------------------- files to prompts


def test_widgets_are_positional_with_optional_ones_last_and_the_seeds_control_skipped(schemas):
    workflow = canvas(canvas_node(1, "TestNumber", [4, "randomize", "plain", "t", 0.25]), SHOW, links=[(1, 1, 0, 9, 0, "INT")])
    assert inputs_of(workflow, schemas) == {"1": NUMBER, "9": {"source": ["1", 0]}}


def test_a_seed_saved_without_its_control_shifts_nothing(schemas):
    assert inputs_of(canvas(canvas_node(1, "TestNumber", [4, "plain", "t", 0.25])), schemas)["1"] == NUMBER


def test_a_widget_turned_into_an_input_keeps_its_place_and_the_link_wins(schemas):
    primitive = canvas_node(7, "PrimitiveInt", [33, "fixed"])
    number = canvas_node(1, "TestNumber", [4, "fixed", "double", "t", 0.25], [("seed", "INT", 5)])
    found = inputs_of(canvas(primitive, number, links=[(5, 7, 0, 1, 0, "INT")]), schemas)
    assert found == {"7": {"value": 33}, "1": NUMBER | {"mode": "double", "seed": ["7", 0]}}


def test_primitives_and_reroutes_of_the_page_vanish_and_notes_too(schemas):
    nodes = [
        canvas_node(2, "PrimitiveNode", [77, "fixed"]), canvas_node(3, "Reroute", inputs=[("", "*", 1)]), canvas_node(4, "Reroute", inputs=[("", "*", 2)]),
        canvas_node(1, "TestNumber", [4, "fixed", "plain", "t", 0.25], [("seed", "INT", 3)]), canvas_node(5, "Note", ["hi"]), canvas_node(6, "MarkdownNote"),
    ]  # fmt: skip
    links = [(1, 2, 0, 3, 0, "INT"), (2, 3, 0, 4, 0, "*"), (3, 4, 0, 1, 0, "*")]
    assert inputs_of(canvas(*nodes, links=links), schemas) == {"1": NUMBER | {"seed": 77}}


def test_a_bypassed_node_hands_on_the_first_input_of_the_same_type(schemas):
    source = canvas_node(1, "TestPictures", [5], outputs=["IMAGE", "AUDIO"])
    middle = canvas_node(2, "Anything", [], [("a", "AUDIO", None), ("x", "IMAGE", 1)], ["IMAGE", "LATENT"], mode=4)
    ends = [canvas_node(3, "PreviewImage", [], [("images", "IMAGE", 2)]), canvas_node(4, "PreviewAny", [], [("source", "*", 3)])]
    links = [(1, 1, 0, 2, 1, "IMAGE"), (2, 2, 0, 3, 0, "IMAGE"), (3, 2, 1, 4, 0, "LATENT")]
    assert inputs_of(canvas(source, middle, *ends, links=links), schemas) == {"1": {"count": 5}, "3": {"images": ["1", 0]}, "4": {}}


def test_what_a_muted_node_gave_is_missing(run):
    code, files, err = run(canvas(canvas_node(1, "TestNumber", mode=2), SHOW, links=[(1, 1, 0, 9, 0, "INT")]))
    assert (code, files) == (2, []) and "Node 9, Preview as Text: the input 'source' is missing" in err


@pytest.mark.parametrize(("values", "told"), [([4, "fixed", "plain"], "['text', 'scale']"), ([4, "fixed", "plain", "t", 0.25, 8], "[8]")])
def test_another_number_of_values_is_said(schemas, capsys, values, told):
    found = inputs_of(canvas(canvas_node(1, "TestNumber", values)), schemas)["1"]
    err = capsys.readouterr().err
    assert found["seed"] == 4 and "Node 1" in err and told in err


def test_upload_buttons_and_players_are_not_counted(schemas, capsys):
    found = inputs_of(canvas(canvas_node(1, "LoadImage", ["a.png", "image"]), canvas_node(2, "LoadAudio", ["a.wav", None, ""])), schemas)
    assert found == {"1": {"image": "a.png"}, "2": {"audio": "a.wav"}} and not capsys.readouterr().err


def test_api_prompts_keep_their_links_and_titles(schemas):
    nodes = {
        "1": {"class_type": "TestNumber", "inputs": {"seed": 1}, "_meta": {"title": "Mine"}},
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
    }
    for workflow in (nodes, {"prompt": nodes, "client_id": "x"}):
        prompt = to_prompt(workflow, schemas)
        assert [node["_meta"]["title"] for node in prompt.values()] == ["Mine", "Preview as Text"]
        assert prompt["2"]["inputs"] == {"source": ["1", 0]}


# ---------------------------------------------------------------- what is refused, before anything runs

FINE = {"1": {"class_type": "TestNumber", "inputs": NUMBER}, "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}}
NODE_9 = {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}


def changed(key, **inputs):
    return FINE | {key: FINE[key] | {"inputs": FINE[key]["inputs"] | inputs}}


@pytest.mark.parametrize(
    ("workflow", "told"),
    [
        ("{", "is no JSON"),
        ("[1, 2]", "no workflow"),
        ("{}", "no output node"),
        ('{"a": 1}', "no workflow"),
        ('{"nodes": 3}', "no workflow"),
        ('{"nodes": [], "links": [[1, 1e999, 1e999]]}', "no workflow"),
        ('{"1": {"class_type": [], "inputs": {}, "_meta": {"title": "Odd"}}}', "Node 1, Odd: '[]' does not run here"),
        ('{"nodes": [{"id": 1}]}', "no workflow"),
        (canvas(SHOW, links=[(1, 44, 0, 9, 0, "INT")]), "no workflow"),
        ({"1": {"class_type": "TestNumber", "inputs": NUMBER}}, "no output node"),
        (FINE | {"3": {"class_type": "KSampler", "inputs": {}, "_meta": {"title": "The Sampler"}}}, "Node 3, The Sampler: 'KSampler' does not run here"),
        (changed("1", seed=101), "Node 1, A Number: the input 'seed' is 101: a number from 0 to 100 is needed."),
        (changed("1", seed="many"), "the input 'seed' is 'many': a value of type INT is needed."),
        (changed("1", mode="triple"), "the input 'mode' is 'triple': one of plain, double is needed."),
        (changed("2", source=["7", 0]), "is linked to ['7', 0], which is not in the workflow"),
        (changed("2", source=["1", 2]), "is linked to output 2 of Node 1, A Number, which is not there: link it again."),
        (FINE | {"3": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}}, "the input 'images' takes IMAGE, but output 0 of Node 1, A Number gives INT."),
        ({"1": {"class_type": "TestMany", "inputs": {}}, "2": NODE_9}, "is linked to output 0 of Node 1, TestMany, which gives a list: run the workflow in ComfyUI."),
        ({"1": {"class_type": "LoadImage", "inputs": {"image": 5}}, "2": NODE_9}, "Node 1, Load Image: '5' is not in"),
        (FINE | {"3": {"class_type": "PreviewImage", "inputs": {"images": "x.png"}}}, "the input 'images' is 'x.png', but takes a link"),
        (changed("1", seed=["1", 0]), "circle, through the nodes 1 -> 1"),
        ({"1": {"class_type": "TestNumber", "inputs": NUMBER | {"text": ["3", 1]}}, "2": NODE_9, "3": {"class_type": "TestNumber", "inputs": NUMBER | {"text": ["1", 1]}}}, "1 -> 3 -> 1"),
        (canvas(canvas_node(1, "a-b-c", title="Mine")) | {"definitions": {"subgraphs": [{"id": "a-b-c"}]}}, "Node 1, Mine: 'a-b-c' does not run here"),
    ],
)  # fmt: skip
def test_bad_workflows_are_one_sentence_and_nothing_is_written(run, tmp_path, workflow, told):
    code, files, err = run(workflow)
    assert (code, files) == (2, []) and told in err and "Traceback" not in err and "[1/" not in err
    assert not (tmp_path / "output").exists()


def test_all_problems_are_listed_at_once(run):
    code, _, err = run(changed("1", seed=-1, mode="x") | {"3": {"class_type": "Nope", "inputs": {}}, "4": {"class_type": "PreviewImage", "inputs": {}}})
    assert code == 2 and len(err.splitlines()) == 4


def test_a_node_checks_its_own_values_instead_of_the_list(run, tmp_path):
    graph = {"1": {"class_type": "MOVALoadTest", "inputs": {"model": "none"}}, "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}}
    assert "  mine" in run(graph, "--model", "mine")[2].splitlines()
    code, _, err = run(graph, "--model", "other")
    assert code == 2 and err.strip() == f"Node 1, MOVALoadTest: 'other' is no model; put one into {tmp_path / 'models'}."


def test_unknown_inputs_are_dropped_and_said(run):
    code, _, err = run(changed("1", bit_depth=8))
    assert code == 0 and "the input 'bit_depth' is unknown here and ignored" in err


@pytest.mark.parametrize("prefix", ["../escaped", "a/../../escaped", "/escaped", "..", "", "a\0b"])
@pytest.mark.parametrize("linked", [False, True])
def test_files_are_written_inside_the_output_folder_only(run, tmp_path, prefix, linked):
    graph = {"1": {"class_type": "TestPictures", "inputs": {"count": 1}}, "3": {"class_type": "PrimitiveString", "inputs": {"value": prefix}}}
    name = ["3", 0] if linked else prefix
    code, files, err = run(graph | {"2": {"class_type": "SaveAudio", "inputs": {"audio": ["1", 1], "filename_prefix": name}}})
    assert code == (1 if linked else 2) and not files and "Traceback" not in err
    assert "give a name inside of it" in err
    assert not list(tmp_path.rglob("*.flac")) and not Path("/escaped_00001_.flac").exists()


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "../workflow.json", "../secret.png [output]", "nowhere.png"])
def test_files_are_read_from_the_input_folder_only(run, tmp_path, name):
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    graph = {"1": {"class_type": "LoadImage", "inputs": {"image": name}}, "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}}
    code, _, err = run(graph)
    assert code == 2 and ("give a name inside of it" in err or "put the file there" in err)


def test_folders_that_are_not_there(run, tmp_path):
    graph = {"1": {"class_type": "LoadImage", "inputs": {"image": "a.png"}}, "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}}
    code, _, err = run(graph, f"--input={tmp_path / 'nowhere'}")
    assert code == 2 and f"'a.png' is not in {tmp_path / 'nowhere'}" in err


# ---------------------------------------------------------------- --set

JOINED = {
    "1": {"class_type": "TestJoin", "inputs": {"numbers": 3, "loud": False}},
    "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
}


@pytest.mark.parametrize("target", ["1.seed", "A Number.seed", "TestNumber.seed"])
def test_set_takes_an_id_a_title_or_a_type(run, target):
    code, _, err = run(FINE, "--set", f"{target}=12", "--set", "1.mode=double")
    assert code == 0 and "  24" in err.splitlines()


@pytest.mark.parametrize("value", ["a = b.c", '"quoted"', '["1", 0]', "007", "true"])
def test_set_text_is_taken_as_it_is(run, value):
    code, _, err = run(FINE | {"2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 1]}}}, "--set", f"1.text={value}")
    assert code == 0 and f"  {value}" in err.splitlines()


@pytest.mark.parametrize(("value", "shown"), [("true", True), ("False", False)])
def test_set_switches(run, value, shown):
    code, _, err = run(JOINED, "--set", f"1.loud={value}")
    assert code == 0 and f"  joined [3] [{shown}]" in err.splitlines()


@pytest.mark.parametrize("target", ["1.loud", "1.numbers"])
def test_set_refuses_what_is_of_another_type(run, target):
    code, _, err = run(JOINED, "--set", f"{target}=maybe")
    assert code == 2 and "is 'maybe': a value of type" in err


def test_set_reaches_all_nodes_of_a_type(run):
    graph = {**FINE, "3": FINE["1"], "4": {"class_type": "PreviewAny", "inputs": {"source": ["3", 0]}}}
    assert run(graph, "--set", "TestNumber.seed=8")[2].splitlines().count("  8") == 2


@pytest.mark.parametrize("assignment", ["1.nothing=3", "Nobody.seed=3", "seed", "1.seed", "=3", ""])
def test_set_says_what_there_is(run, assignment):
    code, _, err = run(FINE, "--set", assignment)
    assert code == 2 and "NODE.INPUT=VALUE is needed" in err and "1 (A Number): seed, scale, mode, text; 2 (Preview as Text): source." in err


# ---------------------------------------------------------------- running


def test_a_film_is_written_listed_and_numbered(run, tmp_path):
    nodes = [
        canvas_node(1, "TestPictures", [5], outputs=["IMAGE", "AUDIO"]),
        canvas_node(2, "CreateVideo", [24.0], [("images", "IMAGE", 1), ("audio", "AUDIO", 2)], ["VIDEO"]),
        canvas_node(3, "SaveVideo", ["clips/mine", "auto", "auto"], [("video", "VIDEO", 3)]),
    ]
    workflow = canvas(*nodes, links=[(1, 1, 0, 2, 0, "IMAGE"), (2, 1, 1, 2, 1, "AUDIO"), (3, 2, 0, 3, 0, "VIDEO")])
    for number in (1, 2):
        code, files, err = run(workflow)
        assert code == 0 and files == [tmp_path / "output" / "clips" / f"mine_0000{number}_.mp4"]
        assert [line for line in err.splitlines() if line.startswith("[")] == ["[1/3] TestPictures", "[2/3] Create Video", "[3/3] Save Video"]
    film = read_video(files[0])
    assert film.frames.shape == (5, 32, 48, 3) and film.fps == 24 and film.sample_rate == 48000 and film.audio.shape == (1, 10000)
    assert read_metadata(files[0])["workflow"] == workflow and read_metadata(files[0])["prompt"]["2"]["inputs"]["fps"] == 24.0
    assert sorted(path.name for path in (tmp_path / "output" / "clips").iterdir()) == ["mine_00001_.mp4", "mine_00002_.mp4"]


def test_pictures_and_sounds_survive_reading_and_writing(run, tmp_path):
    Image.new("RGBA", (4, 6), (255, 0, 0, 0)).save(tmp_path / "input" / "clear.png")
    write_audio(tmp_path / "input" / "sound.wav", torch.linspace(-0.5, 0.5, 480)[None], 48000)
    graph = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "clear.png"}}, "2": {"class_type": "LoadAudio", "inputs": {"audio": "sound.wav"}},
        "4": {"class_type": "SaveAudio", "inputs": {"audio": ["2", 0], "filename_prefix": "s"}}, "5": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
        "6": {"class_type": "PreviewAudio", "inputs": {"audio": ["2", 0]}}, "7": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }  # fmt: skip
    code, (file,), err = run(graph)
    waveform, rate = read_audio(file)
    assert code == 0 and rate == 48000 and torch.allclose(waveform, read_audio(tmp_path / "input" / "sound.wav")[0], atol=1e-4)
    assert "preview: 1 x 4x6 px" in err and "preview: 0.01 s of sound" in err and str(torch.ones(1, 6, 4, 3)) in err  # transparent parts are white


def test_several_sounds_are_several_files(pack, tmp_path):
    with installed(tmp_path, tmp_path, tmp_path), loaded_pack(pack) as nodes:
        nodes["SaveAudio"].hidden = SimpleNamespace(prompt={}, extra_pnginfo={})
        nodes["SaveAudio"].execute({"waveform": torch.zeros(2, 1, 480), "sample_rate": 48000}, "s")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s_00001_.flac", "s_00002_.flac"]


def test_each_node_runs_once_small_outputs_first_and_stray_nodes_never(run):
    graph = {"1": {"class_type": "TestPictures", "inputs": {"count": 2}}, "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
             "3": {"class_type": "PreviewAudio", "inputs": {"audio": ["1", 1]}}, "4": {"class_type": "PreviewAny", "inputs": {"source": "now"}},
             "5": {"class_type": "TestMany", "inputs": {}}}  # fmt: skip
    code, _, err = run(graph)
    titles = [line.partition("] ")[2] for line in err.splitlines() if line.startswith("[")]
    assert code == 0 and titles == ["Preview as Text", "TestPictures", "Preview Image", "Preview Audio"]


def test_nodes_made_for_lists_get_lists_of_one(run):
    code, _, err = run({**JOINED, "1": {"class_type": "TestJoin", "inputs": {"numbers": ["3", 0], "loud": True}}, "3": FINE["1"]})
    assert code == 0 and "  joined [4] [True]" in err.splitlines()


def test_what_nodes_print_goes_to_stderr_with_progress_in_few_lines(run):
    code, files, err = run(FINE)
    assert code == 0 and not files and "printed by a node" in err and err.count("%") == 1


@pytest.mark.parametrize(("how", "told"), [("sentence", "The picture is too small: give a larger one."), ("ear", "The sound is too short: give a longer one.")])
def test_files_written_before_a_failure_are_listed(run, how, told):
    graph = {"1": {"class_type": "TestPictures", "inputs": {"count": 1}}, "2": {"class_type": "SaveAudio", "inputs": {"audio": ["1", 1], "filename_prefix": "x"}},
             "3": {"class_type": "CreateVideo", "inputs": {"images": ["1", 0], "fps": 24}}, "4": {"class_type": "TestFail", "inputs": {"how": how, "after": ["3", 0]}}}  # fmt: skip
    code, files, err = run(graph)
    assert code == 1 and [file.name for file in files] == ["x_00001_.flac"] and files[0].is_file()
    assert err.splitlines()[-1] == f"Node 4, TestFail: {told}" and "Traceback" not in err


def test_a_cancel_is_one_word(run):
    code, files, err = run({"1": {"class_type": "TestFail", "inputs": {"how": "cancel"}}})
    assert (code, files) == (130, []) and err.splitlines()[-1] == "Stopped."


def test_a_bug_keeps_its_traceback(pack, tmp_path):
    """In a process of its own: what the shell sees."""
    (tmp_path / "bug.json").write_text(json.dumps({"1": {"class_type": "TestFail", "inputs": {"how": "bug"}}}), encoding="utf-8")
    script = f"import sys; from headless.__main__ import main; from pathlib import Path; sys.exit(main(pack=Path({str(pack)!r})))"
    places = [f"--{name}={tmp_path}" for name in ("models", "input", "output")]
    done = subprocess.run([sys.executable, "-c", script, "run", str(tmp_path / "bug.json"), *places], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    assert "[1/1] TestFail" in done.stderr and "ZeroDivisionError" in done.stderr and "Traceback" in done.stderr


# ---------------------------------------------------------------- the stand-ins


def test_what_is_not_there_is_absent(tmp_path):
    with installed(tmp_path, tmp_path, tmp_path):
        from comfy_api.latest import io

        with pytest.raises(TypeError):
            io.NodeOutput(1, expand={})
        assert io.Combo.Input("a", ["x"]).options == ["x"] and io.Custom("MINE").Output(display_name="m").io_type == "MINE"
        with pytest.raises(ImportError):
            import comfy.nested_tensor  # noqa: F401
        with pytest.raises(ImportError):
            import latent_preview  # noqa: F401


def test_model_folders_are_comfyuis(tmp_path):
    (tmp_path / "loras" / "sub").mkdir(parents=True)
    (tmp_path / "loras" / "sub" / "a.safetensors").write_bytes(b"")
    (tmp_path / "loras" / "notes.txt").write_bytes(b"")
    with installed(tmp_path, tmp_path, tmp_path):
        import folder_paths

        name = str(Path("sub", "a.safetensors"))
        assert folder_paths.get_filename_list("loras") == [name]
        assert Path(folder_paths.get_full_path_or_raise("loras", name)) == tmp_path / "loras" / "sub" / "a.safetensors"
        with pytest.raises(FileNotFoundError):
            folder_paths.get_full_path_or_raise("loras", "b.safetensors")
        folder_paths.add_model_folder_path("mine", str(tmp_path))
        assert folder_paths.get_folder_paths("mine") == [str(tmp_path)] and len(folder_paths.get_filename_list("mine")) == 2


def test_headless_stays_small():
    """The design's bound, blank lines included."""
    assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in (ROOT / "headless").glob("*.py")) < 600
