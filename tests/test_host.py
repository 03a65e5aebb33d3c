"""The pack in a real ComfyUI, always a process of its own: start, canvas, Run button, caching, cancel, memory, missing dependencies."""

import json
import os
import shutil
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
from canvas.browser import find_chromium, open_canvas
from canvas.contract import NEWEST, own_nodes
from conftest import ROOT
from host.client import queue
from host.prompts import film, shrink
from host.record import MODEL
from host.running import NO_HOST, PACKS, checkout, prepare, server  # noqa: F401  (fixtures)
from host.server import CHECKOUTS, direct, serve

from mova.demo_model import write_demo_model
from mova.media_reading import read_audio, read_video

if not CHECKOUTS:
    pytest.skip(NO_HOST, allow_module_level=True)

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
FILMS = [path for path in WORKFLOWS if '"CreateVideo"' in path.read_text(encoding="utf-8")]
OURS = next(iter(PACKS))
OUR_NODES = own_nodes(NEWEST).keys()
NEEDS_CANVAS = pytest.mark.skipif(not (find_spec("playwright") and find_chromium()), reason="no playwright or no Chromium: the page cannot be opened")


@pytest.fixture
def run(server):  # noqa: F811
    def run(prompt, **given):
        done = queue(server.url, prompt, **given)
        assert done.node_errors == {}, done
        return done

    return run


# ---------------------------------------------------------------- start


def test_pack_starts_quickly_under_any_name(server, capsys):  # noqa: F811
    """Under two seconds of a server's start are ours, and nothing heavy is imported before a node needs it."""
    seconds, version = server.import_seconds(), server.get("/system_stats")["system"]["comfyui_version"]
    with capsys.disabled():
        print(f"\nComfyUI {version}: ready after {server.ready_s:.1f} s, import of the pack {seconds[OURS]:.1f} s, {server.resident_mib():.0f} MiB resident")
    assert seconds[OURS] < 2
    declared = server.get("/object_info")
    assert OUR_NODES <= declared.keys()
    assert declared["MOVALoadModel"]["input"]["required"]["model"][1]["options"] == [MODEL]
    assert {declared[name]["python_module"] for name in OUR_NODES} == {f"custom_nodes.{OURS}"}


def test_help_pages_and_pictures_are_served(server):  # noqa: F811
    for path in sorted((ROOT / "web").rglob("*.*")):
        with direct.open(f"{server.url}/extensions/{OURS}/{path.relative_to(ROOT / 'web').as_posix()}", timeout=30) as reply:
            assert reply.read() == path.read_bytes()


# ---------------------------------------------------------------- the canvas


@NEEDS_CANVAS
@pytest.mark.parametrize("path", FILMS, ids=lambda path: path.stem)
def test_workflow_runs_from_the_run_button(server, path):  # noqa: F811
    """Opened in the real page at small sizes, run, saved as an mp4 with sound, which the page plays."""
    already = set((server.folder / "output").rglob("*.mp4"))
    with open_canvas(server.url) as canvas:
        opened = canvas.open(path.name, shrink(json.loads(path.read_text(encoding="utf-8"))))
        assert opened.complaints == []
        ended = canvas.run()
        canvas.page.screenshot(path=server.folder / f"{path.stem}.png")
    assert (ended.end, ended.error, ended.reply.get("node_errors")) == ("execution_success", "", {}), ended
    assert ended.previews > 0, "the preview does not move"
    (new,) = set((server.folder / "output").rglob("*.mp4")) - already
    film_, (sound, rate) = read_video(new), read_audio(new)
    assert film_.frames.shape[0] == 17 and sound.shape[-1] / rate > 0.5
    (video,) = [player for player in ended.players if player["kind"] == "video"]
    assert video["error"] is None and video["at"] > 0 and video["width"] == 64 and video["sound"] > 0


@NEEDS_CANVAS
def test_the_sound_check_runs_from_the_run_button(server):  # noqa: F811
    with open_canvas(server.url) as canvas:
        path = ROOT / "workflows" / "cat_sound_check.json"
        opened = canvas.open(path.name, json.loads(path.read_text(encoding="utf-8")))
        assert opened.complaints == []
        ended = canvas.run()
    assert (ended.end, ended.error, ended.reply.get("node_errors")) == ("execution_success", "", {}), ended


# ---------------------------------------------------------------- what runs again


def test_only_what_changed_runs_again(run):
    assert run(film()).end == "execution_success"
    assert run(film()).ran == set()
    downstream = {"denoise", "images", "sound", "film", "save"}
    assert run(film(settings={"seed": 5})).ran == downstream
    assert run(film(prompt="A dog sings.", settings={"seed": 5})).ran == downstream | {"prompt", "clip"}
    assert run(film(prompt="A dog sings.", settings={"seed": 5}, tiling="on")).ran == {"images", "film", "save"}


# ---------------------------------------------------------------- cancel


def test_cancel_stops_at_once_and_the_next_run_works(run, server):  # noqa: F811
    cancelled = run(film(settings={"steps": 500, "seed": 11}), interrupt_at=0.02)
    assert cancelled.end == "execution_interrupted" and 0 < cancelled.stopped_after < 1
    assert run(film(settings={"seed": 12})).end == "execution_success"
    assert "Traceback" not in server.log().rpartition("got prompt")[2]


# ---------------------------------------------------------------- model folders


@pytest.mark.parametrize("name", ["gone", "../MOVA-360p", f"{MODEL}/../{MODEL}", os.path.abspath("models"), ""])
def test_a_model_that_is_not_in_the_list_is_refused(server, name):  # noqa: F811
    refused = queue(server.url, film(model=name))
    assert refused.end == "refused" and refused.node_errors.keys() == {"model", "text encoder", "video vae", "audio vae"}
    for (sentence,) in refused.node_errors.values():
        assert f"'{name}' is no folder with model_index.json" in sentence and f"Found there: {MODEL}" in sentence and "hf download" in sentence


def test_a_folder_that_vanishes_after_the_page_was_loaded(server, run):  # noqa: F811
    folder = server.folder / "models" / "mova" / "short lived"
    write_demo_model(folder)
    assert run(film(model=folder.name)).end == "execution_success"
    shutil.rmtree(folder)
    refused = queue(server.url, film(model=folder.name, settings={"seed": 99}))
    assert refused.end == "refused" and "is no folder with model_index.json" in refused.node_errors["model"][0]


# ---------------------------------------------------------------- memory


def test_twenty_runs_need_no_more_memory_than_three(run, server, capsys):  # noqa: F811
    sizes = []
    for seed in range(100, 120):
        assert run(film(settings={"seed": seed})).end == "execution_success"
        sizes.append(server.resident_mib())
    with capsys.disabled():
        print(f"\nresident after run 1, 3, 20: {sizes[0]:.0f}, {sizes[2]:.0f}, {sizes[-1]:.0f} MiB")
    assert abs(sizes[-1] - sizes[2]) < 50


# ---------------------------------------------------------------- dependencies that are not there

HIDDEN = """
from importlib.machinery import PathFinder
found = PathFinder.find_spec
PathFinder.find_spec = classmethod(lambda cls, name, path=None, target=None: None if name.partition(".")[0] == {!r} else found(name, path, target))
"""


@contextmanager
def start_without(lacking, checkout, folder, name, code):  # noqa: F811
    """A server whose Python runs `code` as the module `name`. Skips where ComfyUI itself does not start without the lacking module."""
    (folder / "stubs").mkdir()
    (folder / "stubs" / f"{name}.py").write_text(code, encoding="utf-8")
    try:
        with serve(checkout, prepare(folder / "comfy"), {OURS: ROOT}, {"PYTHONPATH": str(folder / "stubs")}) as host:
            yield host
    except RuntimeError as error:
        if f"import {lacking}" not in str(error):
            raise
        pytest.skip(f"this ComfyUI itself does not start without {lacking}")


@pytest.mark.parametrize(
    ("lacking", "stops", "sentence"), [("torchaudio", "", ""), ("diffusers", "video vae", "pip install diffusers"), ("ftfy", "prompt", "pip install ftfy")]
)
def test_without_a_dependency_only_what_needs_it_says_so(checkout, tmp_path, lacking, stops, sentence):  # noqa: F811
    with start_without(lacking, checkout, tmp_path, "sitecustomize", HIDDEN.format(lacking)) as host:
        assert host.import_seconds()[OURS] < 2 and OUR_NODES <= host.get("/object_info").keys()
        done = queue(host.url, film())
        assert (done.end, done.failed) == ("execution_error" if stops else "execution_success", stops) and sentence in done.error, done


def test_torchaudio_that_does_not_fit_torch(checkout, tmp_path):  # noqa: F811
    """diffusers and transformers import it, so it stops more than it should; the sentence tells what to repair."""
    with start_without("torchaudio", checkout, tmp_path, "torchaudio", "raise OSError('libcudart.so.13: cannot open shared object file')") as host:
        assert host.import_seconds()[OURS] < 2 and OUR_NODES <= host.get("/object_info").keys()
        done = queue(host.url, film())
        assert done.end == "execution_error" and "libcudart" in done.error and "a torchaudio made for another version of torch" in done.error
