"""recipes/benchmarks/gpu: the parts of suite.py, tiny and on the CPU, and that a run survives what fails in it.

The CUDA engine of K-means, which needs Triton's interpreter, is tried in tests/clustering/test_gpu.py.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from cluscomp_peft import ClusCompLayer
from tests.conftest import RECIPES, tiny_llama

GPU = RECIPES / "benchmarks" / "gpu"
SMALL = "suite.py --device cpu --scale 0.01 --repeat 1 --models 8B --bits 3 --quality fast".split()


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES / "benchmarks"))
    monkeypatch.syspath_prepend(str(GPU))
    return importlib.import_module


@pytest.fixture
def suite(load, monkeypatch, tmp_path):
    """Makes the rows of a part, in this process; returns what it wrote and what failed."""

    def run(part: str, *flags: str) -> tuple[dict, list[str]]:
        monkeypatch.setattr(sys, "argv", [*SMALL, *flags, "--part", part, "--output", str(tmp_path)])
        module = load("suite")
        failed = module.run_part(module.arguments().parse_args())
        return json.loads((tmp_path / f"{part}.json").read_text()), failed

    return run


# -- the parts


def test_the_ops_are_measured_and_right(suite, capsys):
    results, failed = suite("kernels")
    rows = results["rows"]
    assert not failed and len(rows) == 4 * 9
    assert {row["op"] for row in rows} == {"decode", "linear", "codebook_grad"}
    assert {row["tokens"] for row in rows if row["op"] == "linear"} == {1, 5, 16, 64, 512, 2048}
    assert all(row["call, µs"] > 0 and row["share"] > 0 and row["deviation"] < 1e-2 for row in rows)
    assert results["limits"]["bf16"] > 0 and results["settings"]["scale"] == 0.01
    # A wheel's metadata may leave out what the build adds to the version ("+cu130").
    assert results["environment"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    # A block has q and o, k and v, and three of the same size.
    times = {tuple(row["matrix"]): row["call, µs"] for row in rows if (row["op"], row["tokens"]) == ("linear", 1)}
    (block,) = (block for block in results["blocks"] if (block["op"], block["tokens"]) == ("linear", 1))
    shape = importlib.import_module("random_models").SHAPES["Llama-3-8B"].scaled(0.01)
    assert block["µs"] == pytest.approx(sum(times[size] for size in shape.matrices()))
    assert "graph, µs" in capsys.readouterr().out


def test_an_op_that_is_wrong_is_named(suite, load, monkeypatch, capsys):
    module = load("part_kernels")
    monkeypatch.setattr(module, "GRAD_TOKENS", (32,))
    monkeypatch.setattr(module, "TOKENS", (1,))
    right = module.ops.codebook_grad
    monkeypatch.setattr(
        module.ops, "codebook_grad", lambda *arguments: tuple(part * 1.01 for part in right(*arguments))
    )
    results, failed = suite("kernels")
    assert len(failed) == 4 and all("codebook_grad 32" in name for name in failed)
    assert {row["error"] for row in results["rows"] if "error" in row} == {"wrong: deviation 0.01"}
    assert "FAILED: wrong: deviation 0.01" in capsys.readouterr().out


@pytest.mark.slow
def test_training_of_both_sizes(suite, load, monkeypatch):
    monkeypatch.setattr(load("part_training"), "STEPS", 2)
    results, failed = suite("training", "--methods", "cluscomp-3", "lora", "dense")
    assert not failed and [row["method"] for row in results["rows"]] == ["cluscomp-3", "lora", "dense"]
    assert all(row["seconds"] > 0 and row["trained"] > 0 for row in results["rows"])
    assert results["ratios"]["cluscomp-3 / lora"]["seconds"] > 0
    results, failed = suite("large")
    assert not failed and [row["limit"] >> 30 for row in results["rows"]] == [24, 48]


def test_generation(suite, load, monkeypatch):
    monkeypatch.setattr(load("part_generation"), "NEW_TOKENS", 2)
    results, failed = suite("generation", "--methods", "dense", "cluscomp-4")
    assert not failed and [row["name"] for row in results["rows"]] == [
        "dense bf16",
        "ClusComp 4 bits",
        "ClusComp 4 bits + adapter",
        "dense bf16 generate",
        "ClusComp 4 bits generate",
    ]
    assert all(row["eager 1"] > 0 and row["eager 16"] > 0 for row in results["rows"][:3])
    assert all(results["relative_to_dense"][name]["eager 1"] > 0 for name in ("cluscomp-4", "cluscomp-4 + adapter"))


def test_the_step_that_is_captured_writes_what_generate_writes(load):
    decoder = load("part_generation").Decoder
    model = tiny_llama()
    prompt = torch.randint(3, 90, (2, 9))
    expected = model.generate(prompt, max_new_tokens=9, min_new_tokens=9, do_sample=False, eos_token_id=None)[:, 10:]
    writer = decoder(model, prompt)
    with torch.no_grad():
        for _ in range(2):  # it starts again where it started
            assert torch.equal(writer.write(8, writer.step), expected)


def test_kmeans_counts_a_model(suite, load):
    results, failed = suite("kmeans")
    shape = load("random_models").SHAPES["Llama-2-70B"].scaled(0.01)
    times = {tuple(row["matrix"]): row["seconds"] for row in results["rows"]}
    assert not failed and len(times) == 4
    assert results["seconds_of_all"] == {
        "3": pytest.approx(shape.layers * sum(times[size] for size in shape.matrices()))
    }


# -- surviving


def test_running_out_of_memory_is_a_row(suite, load, monkeypatch):
    def exhausted(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …")

    monkeypatch.setattr(load("part_training"), "train", exhausted)
    results, failed = suite("large")
    assert len(failed) == 2
    assert [row["error"][:52] for row in results["rows"]] == [
        "OutOfMemoryError: CUDA out of memory. Tried to alloc"
    ] * 2


def test_time_that_is_over_leaves_rows_out(suite, capsys):
    results, failed = suite("kmeans", "--minutes", "1e-9")
    assert results["rows"] == [] and len(results["missing"]) == 4 and not failed
    assert capsys.readouterr().out.count("left out") == 1


ROWS = """
    import os, sys, time
    sys.path.insert(0, {gpu!r})
    from report import Report

    report = Report({folder!r}, "rows")
    report.run("first", lambda: {{"value": 1}})
    report.run("raises", lambda: [][0])
    report.run("dies", lambda: os._exit(9))
    report.run("hangs", lambda: time.sleep(60))
    report.run("last", lambda: {{"value": 2}})
"""


def test_rows_survive_what_ends_their_process(load, tmp_path, capfd):
    report = load("report")
    script = tmp_path / "rows.py"
    script.write_text(textwrap.dedent(ROWS.format(gpu=str(GPU), folder=str(tmp_path))))
    (tmp_path / "rows.json").write_text("{}")  # of an earlier run
    started = time.time()
    failed = report.supervise([sys.executable, str(script)], tmp_path, "rows", row_limit=2)
    assert failed == ["raises", "dies", "hangs"] and time.time() - started < 30
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert [*rows] == ["first", "raises", "dies", "hangs", "last"] and rows["last"]["value"] == 2
    assert rows["raises"]["error"] == "IndexError: list index out of range"
    assert rows["dies"]["error"] == "the process ended with status 9" and rows["hangs"]["error"] == "ended after 2 s"
    assert "IndexError" in (tmp_path / "rows.log").read_text()
    assert "FAILED: ended after 2 s" in capfd.readouterr().out


def test_a_process_that_makes_no_row_is_not_started_for_ever(load, tmp_path):
    failed = load("report").supervise([sys.executable, "-c", "raise SystemExit(3)"], tmp_path, "rows")
    assert failed == ["rows"]


def test_a_part_that_hangs_ends(load, tmp_path):
    script = tmp_path / "rows.py"
    script.write_text(textwrap.dedent(ROWS.format(gpu=str(GPU), folder=str(tmp_path))))
    failed = load("report").supervise([sys.executable, str(script)], tmp_path, "rows", row_limit=60, part_limit=1.5)
    assert failed == ["raises", "dies", "hangs", "rows"]
    assert json.loads((tmp_path / "rows.json").read_text())["missing"] == ["all that follows"]


# -- as users start them


@pytest.mark.slow
def test_the_scripts_run_where_the_package_is_not_installed(tmp_path):
    for script, flags in (("suite.py", [*SMALL[1:], "--parts", "kmeans"]), ("smoke.py", ["--steps", "load"])):
        command = [sys.executable, str(GPU / script), "--device", "cpu", *flags, "--output", str(tmp_path)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert [row["name"] for row in json.loads((tmp_path / "smoke.json").read_text())["rows"]] == ["load"]


@pytest.mark.slow
def test_the_steps_of_the_smoke_test(load, monkeypatch, tmp_path):
    """All of them but those that compile, which takes a minute on a CPU."""
    steps, report = load("smoke_steps"), load("report")
    names = [step.__name__.replace("_", " ") for step in steps.ALL if "compile" not in step.__name__]
    record = report.Report(tmp_path, "smoke")
    steps.run("cpu", str(tmp_path), record, names)
    assert record.failed == [] and [row["name"] for row in record.rows] == names
    with pytest.raises(SystemExit, match="no such steps: swim; there are kernels run, load"):
        steps.run("cpu", str(tmp_path), record, ["swim"])


def test_the_smoke_test_sees_a_merge_that_is_not_exact(load, monkeypatch, tmp_path):
    steps, report = load("smoke_steps"), load("report")
    merge = ClusCompLayer.merge

    def inexact(self, *arguments, **settings):
        merge(self, *arguments, **settings)
        self.base_layer.codebook.data[0, 0] += 0.1

    monkeypatch.setattr(ClusCompLayer, "merge", inexact)
    record = report.Report(tmp_path, "smoke")
    steps.run("cpu", str(tmp_path), record, ["merge", "load"])
    assert record.failed == ["merge"]
    assert next(row for row in record.rows if row["name"] == "merge")["error"].startswith(
        "AssertionError: merged logits differ at [1, 5, 40, 100] tokens"
    )


# -- the models


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
        with pytest.raises(ValueError, match=f"dense, lora, nf4 or cluscomp-BITS .*, got '{name}'"):
            load("random_models").bits_of(name)
