"""What the tests of the text encoder share."""

import shutil

import pytest

from mova.text import load_text_encoder


@pytest.fixture
def encoder(tiny_mova):
    return load_text_encoder(tiny_mova)


@pytest.fixture
def folder(tiny_mova, tmp_path):
    """A checkpoint folder with the tokenizer and the text encoder and nothing else, which a test may spoil."""
    target = tmp_path / "model"
    for part in ("tokenizer", "text_encoder"):
        shutil.copytree(tiny_mova / part, target / part, copy_function=shutil.copyfile)
    (target / "model_index.json").write_text("{}")
    return target
