"""Help pages, translations and registry metadata follow the schemas. `python tests/test_docs.py` writes locales/en/nodeDefs.json anew."""

import asyncio
import contextlib
import importlib.util
import json
import re
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from headless.host import installed  # noqa: E402

PACK = "documented_pack"


@contextlib.contextmanager
def loaded_schemas(folder):
    """Every schema of the pack by node id."""
    with installed(folder, folder, folder):
        spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
        sys.modules[PACK] = root = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(root)
        nodes = asyncio.run(asyncio.run(root.comfy_entrypoint()).get_node_list())
        try:
            yield {schema.node_id: schema for schema in (node.GET_SCHEMA() for node in nodes)}
        finally:
            for name in [name for name in sys.modules if name.partition(".")[0] == PACK]:
                del sys.modules[name]


def english(schemas):
    """What nodeDefs.json says in English: the texts of the schemas, in the layout of ComfyUI's page."""
    return {node_id: describe(schema) for node_id, schema in schemas.items()}


def describe(schema):
    inputs = {item.id: {"name": item.display_name or item.id, "tooltip": item.tooltip} for item in schema.inputs}
    outputs = {str(i): {"name": item.display_name} | ({"tooltip": item.tooltip} if item.tooltip else {}) for i, item in enumerate(schema.outputs)}
    return {"display_name": schema.display_name, "description": schema.description, "inputs": inputs, "outputs": outputs}


@pytest.fixture(scope="module")
def schemas(tmp_path_factory):
    with loaded_schemas(tmp_path_factory.mktemp("host")) as found:
        yield found


def read_json(path):
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


# ---------------------------------------------------------------- help pages

PAGES = sorted((ROOT / "web" / "docs").rglob("*.md"))
SOURCES = "".join(file.read_text(encoding="utf-8") for folder in ("mova", "nodes", "cat_encoder") for file in sorted((ROOT / folder).rglob("*.py")))


def page_paths(node_id):
    """Where the page looks: DOCS/<id>/<language>.md, then DOCS/<id>.md, which is the English one."""
    docs = ROOT / "web" / "docs"
    return docs / f"{node_id}.md", docs / node_id / "zh.md"


def test_every_node_has_its_pages_and_no_page_is_left_over(schemas):
    assert PAGES == sorted(path for node_id in schemas for path in page_paths(node_id))


def test_pages_explain_every_input_and_output(schemas):
    for node_id, schema in schemas.items():
        for path in page_paths(node_id):
            rows = re.findall(r"^\| `(\w+)`", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert rows == [*(item.id for item in schema.inputs), *(item.display_name for item in schema.outputs)], path
            assert f"](images/{node_id}.png)" in path.read_text(encoding="utf-8")  # from DOCS/ in every language


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT / "web" / "docs")))
def test_quoted_messages_exist(page):
    """**"..."** is what the code says; dots and numbers stand for what changes."""
    for message in re.findall(r'\*\*"(.+)"\*\*', page.read_text(encoding="utf-8")):
        for piece in map(str.strip, re.split(r"\.\.\.|\d+| / |'", message)):
            assert len(piece) < 12 or piece in SOURCES, f"nothing says {piece!r} any more"


# ---------------------------------------------------------------- translations


def texts(described):
    """Every text with the way to it."""
    if isinstance(described, str):
        return {(): described}
    return {(key, *path): text for key, value in described.items() for path, text in texts(value).items()}


def test_english_is_what_the_schemas_say(schemas):
    assert read_json("locales/en/nodeDefs.json") == english(schemas), "run: python tests/test_docs.py"


def test_chinese_covers_exactly_the_same(schemas):
    mine, meant = texts(read_json("locales/zh/nodeDefs.json")), texts(english(schemas))
    assert mine.keys() == meant.keys()
    untranslated = [path for path, text in mine.items() if not re.search("[\u4e00-\u9fff]", text)]
    assert {mine[path] for path in untranslated} <= {"VAE", "cfg"}, untranslated


def test_chinese_keeps_the_choices(schemas):
    """Choices of a widget are not translated on the page, so texts name them as they are there."""
    chinese = read_json("locales/zh/nodeDefs.json")
    for node_id, schema in schemas.items():
        for item in schema.inputs:
            for choice in [option for option in item.options or [] if re.search(rf"\b{re.escape(option)}: ", item.tooltip)]:
                assert f"{choice}：" in chinese[node_id]["inputs"][item.id]["tooltip"], (node_id, item.id, choice)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_texts_mean_themselves(language):
    """The page reads { } @ | in a text as instructions."""
    for file in (ROOT / "locales" / language).glob("*.json"):
        assert not [text for text in texts(read_json(file)).values() if re.search(r"[{}@|]", text)]


def test_categories_are_ours(schemas):
    """Words of core are translated by core."""
    used = {part for schema in schemas.values() for part in schema.category.split("/")}
    english_words, chinese_words = (read_json(f"locales/{language}/main.json")["nodeCategories"] for language in ("en", "zh"))
    assert english_words.keys() == chinese_words.keys() <= used
    assert used - english_words.keys() <= {"loaders", "conditioning", "sampling", "latent"}


# ---------------------------------------------------------------- registry


@pytest.fixture(scope="module")
def project():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_registry_metadata(project):
    about, comfy = project["project"], project["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9-]{0,98}", about["name"]) and "comfy" not in about["name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", about["version"]) and f"## {about['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert about["license"] == "Apache-2.0" and (ROOT / "LICENSE").is_file() and (ROOT / about["readme"]).is_file()
    assert about["requires-python"] == ">=3.10" and about["description"] and about["urls"]["Repository"].startswith("https://")
    assert {"PublisherId", "DisplayName", "Icon"} <= comfy.keys() and comfy["requires-comfyui"] == ">=0.12.2"
    assert any(line.startswith("Operating System ::") for line in about["classifiers"])
    assert all((ROOT / folder).exists() for folder in comfy["includes"])


def test_dependencies_are_the_requirements(project):
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines())
    assert project["project"]["dependencies"] == [line for line in lines if line]


def test_the_icon_is_small_enough(project):
    from PIL import Image

    assert project["tool"]["comfy"]["Icon"].endswith("/assets/icon.png")
    with Image.open(ROOT / "assets" / "icon.png") as icon:
        assert icon.size[0] == icon.size[1] <= 400
    assert (ROOT / "assets" / "icon.png").stat().st_size < 100_000


def test_what_is_left_out_exists_and_what_runs_is_kept():
    ignored = [line.strip("/") for line in (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert {"tests", "bench"} <= set(ignored) and all((ROOT / name).exists() for name in ignored)
    needed = ("__init__.py", "nodes", "mova", "headless", "web", "locales", "workflows", "requirements.txt", "pyproject.toml", "LICENSE", "README.md")
    assert not set(needed) & set(ignored)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, loaded_schemas(Path(folder)) as schemas:
        text = json.dumps(english(schemas), indent=2, ensure_ascii=False) + "\n"
    (ROOT / "locales" / "en" / "nodeDefs.json").write_text(text, encoding="utf-8", newline="\n")
