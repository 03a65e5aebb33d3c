"""Compiled blocks: close to the plain ones, compiled once for all layers, plain where no compiler works."""

import logging
from functools import partial

import pytest
import torch
from conftest import distance
from torch._dynamo.utils import counters

import mova
from mova import compiling

GRAPHS = 16  # two functions in pieces around attention, for two widths, views or not; twelve blocks on their own would be many more


@pytest.fixture
def backend(monkeypatch):
    """backend(name or function): what torch.compile works with instead of a C++ compiler, which would take a minute."""
    torch._dynamo.reset()
    counters.clear()
    plain = torch.compile
    yield lambda chosen: monkeypatch.setattr(compiling.torch, "compile", partial(plain, backend=chosen))
    torch._dynamo.reset()


def test_compiled_once_whatever_layer_step_weights_or_residency(backend, loop, tiny_mova):
    backend("eager")
    plain = mova.sample(mova.load_denoiser(tiny_mova), **loop)
    graphs = []
    for residency in ("stream", "auto"):
        denoiser = mova.load_denoiser(tiny_mova, residency=residency, compile=True)
        clip = mova.sample(denoiser, **loop, on_step=lambda step: graphs.append(counters["stats"]["unique_graphs"]))
        denoiser.release()
        assert all(distance(ours, theirs) < 1e-5 for ours, theirs in zip(clip, plain, strict=True))
    assert 0 < graphs[0] <= GRAPHS and set(graphs) == {graphs[0]}  # all in the first step; the second expert comes later


def test_without_a_compiler_blocks_run_as_they_are(backend, loop, tiny_mova, caplog):
    def missing(*_):
        raise FileNotFoundError("no C++ compiler")

    backend(missing)
    denoiser = mova.load_denoiser(tiny_mova, compile=True)
    with caplog.at_level(logging.WARNING, "mova"):
        clip = mova.sample(denoiser, **loop)
    assert [record.message.count("cannot be compiled") for record in caplog.records if record.name == "mova"] == [1]
    plain = mova.sample(mova.load_denoiser(tiny_mova), **loop)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(clip, plain, strict=True))


def test_errors_of_the_work_itself_are_not_taken_for_the_compilers(backend, loop, tiny_mova, monkeypatch):
    backend("eager")
    monkeypatch.setattr(compiling.Compilation, "run", lambda *_: (_ for _ in ()).throw(RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):
        mova.sample(mova.load_denoiser(tiny_mova, compile=True), **loop)


def test_off_unless_asked_for(tiny_mova):
    denoiser = mova.load_denoiser(tiny_mova)
    assert not any(isinstance(module, compiling.CompiledBlock) for tower in denoiser.parts.experts.values() for module in tower.modules())
