"""Where the reference outputs and the real media lie, and how close is close enough."""

import json
import sys
from pathlib import Path

import pytest
import torch
from node_stand_ins import Cancelled
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
GOLDEN = [folder for folder in (SHARED / "golden" / "mova", ROOT / "tests" / "golden" / "mova") if folder.is_dir()]


def golden_path(name: str) -> Path:
    """A file or folder of the reference outputs: the full set where it is present, else the small one of this repository."""
    for folder in GOLDEN:
        if (folder / name).exists():
            return folder / name
    pytest.skip(f"{name} is not in the small parity set; the full one (../shared/golden) is not here")


@pytest.fixture
def golden():
    """golden("single_step") -> the tensors of that reference file, by name."""
    return lambda name: load_file(golden_path(f"{name}.safetensors"))


@pytest.fixture
def golden_config():
    """golden_config("single_step") -> the "config" of its sidecar."""
    return lambda name: json.loads(golden_path(f"{name}.json").read_text(encoding="utf-8"))["config"]


def golden_cat_path(name: str) -> Path:
    """A file of the encoder's reference outputs: the full set where it is present, else the small one of this repository."""
    for folder in (SHARED / "golden" / "cat", ROOT / "tests" / "golden" / "cat"):
        if (folder / name).exists():
            return folder / name
    pytest.skip(f"{name} is not in the small parity set of the encoder; the full one (../shared/golden/cat) is not here")


class Recorded(dict):
    """Recorded tensors by name; asking for one that only the full set holds skips the test."""

    def __missing__(self, name):
        pytest.skip(f"{name} is not in the small parity set of the encoder; the full one (../shared/golden/cat) is not here")


@pytest.fixture(scope="session")
def golden_cat():
    """golden_cat("multires/option0.safetensors") -> its tensors by name; a .json file as written; anything else as its path."""

    def read(name: str):
        path = golden_cat_path(name)
        readers = {".safetensors": lambda file: Recorded(load_file(file)), ".json": lambda file: json.loads(file.read_text(encoding="utf-8"))}
        return readers.get(path.suffix, lambda file: file)(path)

    return read


@pytest.fixture(scope="session")
def golden_syncnet():
    """golden_syncnet("mfcc") -> the tensors of that reference file of SyncNet, by name."""

    def load(name):
        for folder in (SHARED / "golden", ROOT / "tests" / "golden"):
            if (folder / "syncnet" / f"{name}.safetensors").is_file():
                return load_file(folder / "syncnet" / f"{name}.safetensors")
        pytest.skip(f"syncnet/{name} is not in the small parity set; the full one (../shared/golden) is not here")

    return load


@pytest.fixture
def loop(golden):
    """The reference's guided run of four steps as arguments of `mova.sample`, prompts as short as they are."""
    case = golden("cfg_loop")
    return dict(
        context=case["prompt_embeds"], negative_context=case["negative_embeds"], condition=case["condition"],
        video_noise=case["noise_video"], audio_noise=case["noise_audio"], steps=4,
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny_mova() -> Path:
    """The reference's small random checkpoint, in the released layout."""
    return golden_path("tiny-mova")


@pytest.fixture(scope="session")
def media() -> Path:
    """Real pictures and a real clip."""
    if not (SHARED / "media").is_dir():
        pytest.skip("../shared/media (real pictures and a clip) is not here")
    return SHARED / "media"


@pytest.fixture
def cancel_after(monkeypatch):
    """cancel_after(n): the n-th question whether the user cancelled is answered with the interrupt."""

    def cancel_after(count):
        asked = iter(range(count - 1))

        def check():
            if next(asked, None) is None:
                raise Cancelled

        monkeypatch.setattr(sys.modules["comfy.model_management"], "throw_exception_if_processing_interrupted", check)

    return cancel_after


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 error, the unit of the MANIFEST's tolerances."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))
