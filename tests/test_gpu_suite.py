"""The parts of recipes/benchmarks/gpu_suite.py, tiny and on the CPU: they run, and an op that is wrong is named.

K-means, which needs Triton's interpreter, is tried in test_clustering_gpu.py.
"""

from __future__ import annotations

import importlib
import json
import sys

import pytest
import torch

from .conftest import RECIPES

SMALL = "gpu_suite.py --device cpu --scale 0.01 --repeat 1".split()


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def suite(load, monkeypatch, tmp_path):
    """Runs parts of the suite; returns what it wrote."""

    def run(*parts: str) -> dict:
        output = tmp_path / "suite.json"
        monkeypatch.setattr(sys, "argv", [*SMALL, "--parts", *parts, "--output", str(output)])
        load("gpu_suite").main()
        return json.loads(output.read_text())

    return run


def test_the_ops_are_measured_and_right(suite, capsys):
    results = suite("kernels")
    rows = results["kernels"]["rows"]
    assert {row["op"] for row in rows} == {"decode", "linear", "codebook_grad"}
    assert {row["tokens"] for row in rows if row["op"] == "linear"} == {1, 16, 512}
    assert {row["bits"] for row in rows} == {2.0, 3.0, 4.0}
    assert results["kernels"]["wrong"] == [] and all(row["µs"] > 0 and row["share"] > 0 for row in rows)
    assert results["limits"]["bf16"] > 0 and results["settings"]["scale"] == 0.01
    assert "graph, µs" in capsys.readouterr().out


def test_an_op_that_is_wrong_is_named(suite, load, monkeypatch, tmp_path):
    right = load("cluscomp_peft.ops").codebook_grad
    module = load("gpu_kernels").ops
    monkeypatch.setattr(module, "codebook_grad", lambda *arguments: tuple(part * 1.01 for part in right(*arguments)))
    with pytest.raises(SystemExit, match=r"codebook_grad of 64x64 at 2 bits, 512 tokens: error 0\.01"):
        suite("kernels")
    assert len(json.loads((tmp_path / "suite.json").read_text())["kernels"]["wrong"]) > 0


def test_training_and_generation_run(suite, load, monkeypatch):
    training = load("gpu_training")
    monkeypatch.setattr(training, "NEW_TOKENS", 2)
    monkeypatch.setattr(training, "STEPS", 2)
    results = suite("training", "generation", "large")
    clustered = [row["method"] for row in results["training"] if row["method"].startswith("cluscomp")]
    assert clustered == ["cluscomp-2", "cluscomp-4"] and results["training"][-1]["method"] == "dense"
    for row in (*results["training"], *results["large"]):
        assert row["seconds"] > 0 and row["trained"] > 0 and "error" not in row
    for row in results["generation"]:
        assert set(row["tokens per second"]) == {"1", "16"}
    assert [row["limit"] >> 30 for row in results["large"]] == [24, 48]


def test_running_out_of_memory_is_a_row(load, monkeypatch):
    training = load("gpu_training")

    def exhausted(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …")

    monkeypatch.setattr(training, "train", exhausted)
    options = type("Options", (), {"device": "cpu", "scale": 0.01})
    rows = training.large(options)
    assert [row["error"] for row in rows] == ["out of memory: Tried to allocate 2.00 GiB"] * 2


def test_shapes_are_those_of_the_models(load):
    shapes = load("random_models").SHAPES
    weights = {
        name: shape.layers * sum(inputs * outputs for inputs, outputs in shape.matrices())
        + 2 * shape.vocab * shape.hidden
        for name, shape in shapes.items()
    }
    assert weights["Llama-3-8B"] == pytest.approx(8.03e9, rel=1e-3)
    assert weights["Llama-2-70B"] == pytest.approx(68.98e9, rel=1e-3)


def test_a_method_that_does_not_exist_is_named(load):
    for name in ("qlora", "cluscomp-", "cluscomp-four"):
        with pytest.raises(ValueError, match=f"dense, nf4 or cluscomp-BITS .*, got '{name}'"):
            load("random_models").bits_of(name)
