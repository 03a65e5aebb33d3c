"""The prompt nodes: what they declare, whom they ask, what they refuse, what they show; and where a key never goes."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from node_stand_ins import Cancelled
from prompt_server import fail, serve, stream

from headless.host import installed
from headless.runner import loaded_pack
from mova.demo_model import write_demo_model
from mova.media_reading import read_metadata

KEY = "sk-secret-0123456789abcdef"
IDEA = 'A woman turns and says: "Écoute, la mer."'
PROMPT = 'A woman stands on a pier at dusk. She turns and says: "Écoute, la mer."\n\nThe audio shows wind and her voice.'
NO_MODEL = "put a language model into models/LLM"
DECLARED = {
    "MOVAEnhancePrompt": (
        "MOVA Prompt Enhancer",
        [
            ("idea", "STRING", None), ("image", "IMAGE", None), ("provider", "COMBO", None), ("seed", "INT", 42), ("on_failure", "COMBO", None), ("local_model", "COMBO", None),
            ("language_model", "COMBO", None), ("max_tokens", "INT", 512), ("text_encoder", "MOVA_TEXT_ENCODER", None), ("no_subtitles", "BOOLEAN", False),
        ],
        ["idea", "provider", "seed"], [("prompt", "STRING"), ("elements", "STRING")],
    ),
    "MOVAPromptFields": (
        "MOVA Prompt Fields",
        [
            ("idea", "STRING", None), ("dialogue", "STRING", None), ("sound_effects", "STRING", None), ("music", "STRING", None), ("camera", "STRING", None),
            ("style", "STRING", None), ("avoid", "STRING", None), ("text_encoder", "MOVA_TEXT_ENCODER", None), ("no_subtitles", "BOOLEAN", False),
        ],
        ["idea", "dialogue", "sound_effects", "music", "camera", "style"], [("prompt", "STRING"), ("negative_prompt", "STRING")],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("host") / "models"
    write_demo_model(folder / "mova" / "demo")
    return folder


@pytest.fixture(scope="module")
def pack(models):
    with installed(models, models, models), loaded_pack(ROOT) as nodes:
        yield nodes


@pytest.fixture
def host(pack):
    return sys.modules[f"{pack['MOVAEnhancePrompt'].__module__.rpartition('.')[0]}.host"]


@pytest.fixture
def shown(host, monkeypatch):
    """What the page shows on the node, one text after another."""
    texts = []
    monkeypatch.setattr(host, "show_text", lambda node_id, text: texts.append((node_id, text)))
    return texts


@pytest.fixture
def run(pack, shown):
    def run(node_id, **given):
        node = type(node_id, (pack[node_id],), {"hidden": SimpleNamespace(unique_id="7")})
        required = {"idea": IDEA, "provider": "template", "seed": 42} if node_id == "MOVAEnhancePrompt" else dict.fromkeys(DECLARED[node_id][2], "")
        return node.execute(**required | given).args

    return run


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    for name in ("BASE_URL", "MODEL", "VISION_MODEL", "TIMEOUT", "API_KEY", "KEY_VARIABLE"):
        monkeypatch.delenv(f"MOVA_PROMPT_{name}", raising=False)


@pytest.fixture
def service(host, monkeypatch, tmp_path):
    """service(url): the settings in the user folder, the key in the environment."""

    def service(url):
        file = tmp_path / "__mova" / "prompt.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"base_url": url, "model": "tiny"}))
        monkeypatch.setattr(host.folder_paths, "get_user_directory", lambda: str(tmp_path))
        monkeypatch.setenv("MOVA_PROMPT_API_KEY", KEY)

    return service


# ---------------------------------------------------------------- what is declared, for ever


@pytest.mark.parametrize("node_id", DECLARED)
def test_ids_inputs_and_outputs_stay_as_they_are(pack, node_id):
    schema, (name, inputs, required, outputs) = pack[node_id].GET_SCHEMA(), DECLARED[node_id]
    assert (schema.display_name, schema.category) == (name, "MOVA/conditioning")
    assert [(item.id, item.io_type, getattr(item, "default", None)) for item in schema.inputs] == inputs
    assert [item.id for item in schema.inputs if not item.optional] == required
    assert [(item.display_name, item.io_type) for item in schema.outputs] == outputs
    assert all(item.tooltip for item in schema.inputs)
    assert not [item.id for item in schema.inputs if "key" in item.id.replace("keyframe", "")], "a key in a widget would be saved into workflows"


def test_choices(pack):
    options = {item.id: item.options for item in pack["MOVAEnhancePrompt"].GET_SCHEMA().inputs if item.io_type == "COMBO"}
    assert options == {
        "provider": ["template", "local", "openai-compatible"], "on_failure": ["error", "use template"],
        "local_model": [NO_MODEL], "language_model": ["same as local_model", NO_MODEL],
    }  # fmt: skip


def test_the_host_may_keep_a_result(pack):
    """Nothing makes the node run again with the same inputs: ComfyUI's own cache answers then."""
    for node_id in DECLARED:
        assert not getattr(pack[node_id].GET_SCHEMA(), "not_idempotent", False) and not hasattr(pack[node_id], "fingerprint_inputs")


# ---------------------------------------------------------------- the template and the fields


def test_the_template_needs_nothing(run, shown):
    prompt, elements = run("MOVAEnhancePrompt")
    assert '"Écoute, la mer."' in prompt and prompt.split("\n\n")[-1].startswith("The audio shows") and elements == ""
    assert shown[-1][0] == "7" and shown[-1][1].startswith(prompt) and "estimated" in shown[-1][1]
    assert run("MOVAEnhancePrompt") == (prompt, "") and run("MOVAEnhancePrompt", seed=1)[0] != prompt


def test_the_text_encoder_counts(run, pack, shown):
    (encoder,) = pack["MOVALoadTextEncoder"].execute(model="demo", device="cpu").args
    prompt, _ = run("MOVAEnhancePrompt", idea="She walks on. " * 300, text_encoder=encoder)
    assert encoder.count_tokens(prompt) <= 512 and f"{encoder.count_tokens(prompt)} of 512 tokens." in shown[-1][1]
    assert encoder.model is None, "counting opens no weights"


def test_fields(run):
    prompt, negative = run("MOVAPromptFields", idea="A pier", dialogue="she (French): Oui", music="none", style="a watercolour", avoid="fog", no_subtitles=True)
    assert prompt.startswith('A pier. The look is a watercolour.\n\nShe says in French: "Oui".') and prompt.endswith("This video has no subtitles.")
    assert negative.endswith(", music, 音乐, fog") and "最差质量" in negative


# ---------------------------------------------------------------- local


def test_a_model_in_the_folder_writes(run, host, models, pack, monkeypatch):
    pytest.importorskip("transformers")
    from prompt_models import write_writer

    folder = write_writer(models / "LLM" / "some" / "tiny", PROMPT)
    freed = []
    monkeypatch.setattr(host, "free_memory", lambda need, device: freed.append(need))
    monkeypatch.setattr(host, "torch_device", lambda: torch.device("cpu"))
    assert "some/tiny" in next(item.options for item in pack["MOVAEnhancePrompt"].GET_SCHEMA().inputs if item.id == "local_model")
    assert run("MOVAEnhancePrompt", provider="local", local_model="some/tiny")[0] == PROMPT
    assert run("MOVAEnhancePrompt", provider="local", local_model="some/tiny", language_model="some/tiny")[0] == PROMPT
    assert freed[0] > (folder / "model.safetensors").stat().st_size


@pytest.mark.parametrize("name", ["nowhere", "../mova/demo", "..", "/etc", "", NO_MODEL])
def test_only_listed_folders_are_opened(run, pack, name):
    checked = pack["MOVAEnhancePrompt"].validate_inputs
    assert "hf download Qwen/Qwen3-VL-4B-Instruct" in checked(provider="local", local_model=name)
    assert checked(provider="template", local_model=name, language_model=name) is True, "who does not use it need not have it"
    with pytest.raises(Exception, match="Found there"):
        run("MOVAEnhancePrompt", provider="local", local_model=name)


def test_a_wrong_provider(pack):
    checked = pack["MOVAEnhancePrompt"].validate_inputs
    assert "choose template, local, openai-compatible" in checked(provider="magic")
    assert checked() is checked(provider="template") is True


# ---------------------------------------------------------------- a service


def test_a_service_of_the_user_folder_writes(run, service, shown):
    elements = {"style": "photo", "camera": "wide", "subjects": "a cat", "setting": "a room", "light": "dusk", "visible_text": []}
    with serve(stream(json.dumps(elements)), stream(PROMPT, pause=0.05)) as server:
        service(server.url)
        prompt, seen = run("MOVAEnhancePrompt", provider="openai-compatible", image=torch.rand(1, 40, 60, 3))
        assert len(server.requests) == 2
    assert prompt == PROMPT and json.loads(seen) == elements
    assert [text for _, text in shown if text and PROMPT.startswith(text)], "the text grows on the node"


def test_without_settings_it_says_where_to_write_them(run, host):
    with pytest.raises(Exception, match="No base_url .*__mova.prompt.json.*MOVA_PROMPT_BASE_URL"):
        run("MOVAEnhancePrompt", provider="openai-compatible")
    assert run("MOVAEnhancePrompt", provider="openai-compatible", on_failure="use template")[0] == run("MOVAEnhancePrompt")[0]


def test_cancel_reaches_a_service_that_never_answers(run, service, cancel_after):
    cancel_after(6)
    with serve(lambda handler: time.sleep(20)) as server:
        service(server.url)
        begun = time.monotonic()
        with pytest.raises(Cancelled):
            run("MOVAEnhancePrompt", provider="openai-compatible", on_failure="use template")
        assert time.monotonic() - begun < 1.5


# ---------------------------------------------------------------- keys


def test_a_key_is_in_no_file_log_or_text(models, tmp_path):
    """The shipped workflow in a process of its own, with a service that repeats the key in an error: film, words and files are searched."""
    places = {name: tmp_path / name for name in ("input", "output")}
    for folder in places.values():
        folder.mkdir()
    (places["input"] / "mova_demo.jpg").write_bytes((ROOT / "assets" / "demo.jpg").read_bytes())
    values = {
        "MOVAEnhancePrompt": {"provider": "openai-compatible", "on_failure": "use template"},
        "MOVAImageToVideoAudio": {"size": "custom", "width": 64, "height": 48, "length": 5},
        "MOVADenoise": {"steps": 1},
    }
    words = [f"--set={node}.{name}={value}" for node, given in values.items() for name, value in given.items()]
    words += [f"--models={models}", "--model=demo", *(f"--{name}={folder}" for name, folder in places.items())]
    with serve(fail(401, f"Incorrect API key provided: {KEY}, {KEY[:9]}***")) as server:
        settings = {"MOVA_PROMPT_API_KEY": KEY, "MOVA_PROMPT_MODEL": "tiny", "MOVA_PROMPT_BASE_URL": server.url}
        command = [sys.executable, "-m", "headless", "run", str(ROOT / "workflows" / "mova_prompt_enhancer.json"), *words]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr
        assert server.requests[0][0]["Authorization"] == f"Bearer {KEY}"
    (film,) = places["output"].rglob("*.mp4")
    assert "MOVAEnhancePrompt" in json.dumps(read_metadata(film)), "the film tells how it was made"
    assert "The template was used" in done.stderr and "HTTP 401" in done.stderr
    texts = [
        done.stdout,
        done.stderr,
        json.dumps(read_metadata(film)),
        *(path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()),
    ]
    assert not [text[:200] for text in texts if KEY in text or KEY[:9] in text]


def test_no_shipped_file_holds_a_key():
    for path in [*(ROOT / "workflows").glob("*.json"), *(ROOT / "subgraphs").glob("*.json")]:
        text = path.read_text(encoding="utf-8").lower()
        assert not any(word in text for word in ("sk-", "api_key", "apikey", "bearer", "authorization")), path
