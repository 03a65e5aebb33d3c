"""The model folders that widgets choose from: what is listed, what is said of other names, and that only what is listed has a path. Host-free."""

import sys

import pytest
from conftest import ROOT

from headless.host import installed
from headless.runner import PACK, loaded_pack

# One entry of every shelf, and things beside it that are none.
SHELVES = {
    "MODELS": ("mova/some/one/model_index.json", "some/one", ("mova/some/two/config.json", "mova/1/2/3/4/5/model_index.json")),
    "LANGUAGE_MODELS": ("LLM/some/one/config.json", "some/one", ("LLM/some/two/model_index.json",)),
    "EARS": ("audio_encoders/some/One.PT", "some/One.PT", ("audio_encoders/some/notes.txt", "ear.pt")),
    "LORAS": ("loras/some/one.safetensors", "some/one.safetensors", ("loras/some/lora_config.pt", "loras/notes.txt")),
    "LANDMARKERS": ("mova_eval/one.task", "one.task", ("mova_eval/one.model",)),
    "SYNCNETS": ("mova_eval/one.model", "one.model", ("mova_eval/one.task",)),
}
STRANGE = ["", "nowhere", "..", "../mova/some", "/etc/passwd", "C:\\secret.pt", "a{name}b", "{0}"]


@pytest.fixture
def shelves(tmp_path):
    with installed(tmp_path, tmp_path, tmp_path), loaded_pack(ROOT):
        yield sys.modules[f"{PACK}.nodes.shelves"]


@pytest.fixture
def put(tmp_path):
    def put(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("{}", encoding="utf-8")

    return put


@pytest.fixture(params=SHELVES)
def name(request):
    return request.param


def test_with_nothing_there_it_says_what_to_do(shelves, put, name):
    shelf, (_, _, beside) = getattr(shelves, name), SHELVES[name]
    put(*beside)
    assert shelf.choices() == [shelf.empty] and shelf.entries() == {}
    assert f"'{shelf.empty}'" not in shelf.check(shelf.empty), "nothing was chosen, so no name is wrong"


def test_only_what_is_listed_has_a_path(shelves, put, tmp_path, name):
    shelf, (file, entry, beside) = getattr(shelves, name), SHELVES[name]
    put(file, *beside)
    assert shelf.choices() == [entry] and shelf.check(entry) is None
    assert shelf.path(entry) == (tmp_path / file if shelf.endings else (tmp_path / file).parent)
    for given in STRANGE:
        assert f"'{given}'" in shelf.check(given) and str(tmp_path / shelf.place) in shelf.check(given)
        with pytest.raises(sys.modules[f"{PACK}.mova.errors"].InputError) as told:
            shelf.path(given)
        assert str(told.value) == shelf.check(given)


def test_a_broken_link_is_not_listed(shelves, put, tmp_path):
    put("loras/one.pt")
    try:
        (tmp_path / "loras" / "gone.pt").symlink_to(tmp_path / "gone.pt")
    except OSError:
        pytest.skip("no symbolic links here")
    assert shelves.LORAS.choices() == ["one.pt"]


def test_links_in_a_circle_end(shelves, tmp_path):
    root = tmp_path / "mova"
    root.mkdir()
    try:
        (root / "round").symlink_to(root, target_is_directory=True)
    except OSError:
        pytest.skip("no symbolic links here")
    assert shelves.MODELS.entries() == {}


def test_of_hundreds_of_loras_a_sentence_names_twenty(shelves, put):
    put(*(f"loras/{number:03}.pt" for number in range(21)))
    assert "019.pt and 1 more. Put" in shelves.LORAS.check("nowhere") and "020.pt" not in shelves.LORAS.check("nowhere")
    assert len(shelves.LORAS.choices()) == 21
