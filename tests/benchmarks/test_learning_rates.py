"""recipes/benchmarks/learning_rates.py, tiny: runs, goes on, and reads its table off its results."""

from __future__ import annotations

import importlib
import json
import sys

import pytest

from tests.conftest import RECIPES, WORDS


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES / "benchmarks"))
    # Workers find the module by its name.
    monkeypatch.setenv("PYTHONPATH", str(RECIPES / "benchmarks"))
    return importlib.import_module("learning_rates")


def row(script, rate: float, loss: float, peak: float | None = None) -> dict:
    run = script.Run("toy", "text.jsonl", 3.0, 8, 4, 40, 0.1, None, rate, 0)
    return {**run._asdict(), "before": 5.0, "loss": loss, "peak": loss if peak is None else peak}


@pytest.mark.slow
def test_runs_are_written_and_not_repeated(script, dense_dir, tmp_path, monkeypatch, capsys):
    text, output = tmp_path / "text.jsonl", tmp_path / "rates.json"
    lines = [" ".join(WORDS[3 + (i + j) % 90] for j in range(8 + i % 3)) for i in range(24)]
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    arguments = ["--train", text, "--valid", text, "--bits", 6, "--ranks", 2, "--batches", 2, "--steps", 4]
    arguments += ["--folder", tmp_path / "bases", "--results", tmp_path / "rates", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["x", dense_dir, *map(str, arguments), "--rates", "1e-3", "1e-4"])
    script.main()
    rows = json.loads(output.read_text())["rows"]
    assert [found["rate"] for found in rows] == [1e-3, 1e-4]
    assert rows[0]["train"][0] == rows[1]["train"][0] == pytest.approx(rows[0]["before"], rel=0.5)
    assert all(len(found["train"]) == 4 and found["loss"] != found["before"] for found in rows)
    assert rows[0]["loss"] != rows[1]["loss"]
    monkeypatch.setattr(sys, "argv", ["x", dense_dir, *map(str, arguments), "--rates", "1e-3", "1e-4"])
    monkeypatch.setattr(script, "prepare", lambda *_: pytest.fail("all runs are known"))
    capsys.readouterr()
    script.main()
    assert json.loads(output.read_text())["rows"] == rows
    assert capsys.readouterr().out.count("\n") == 3


def test_the_columns_of_a_cell(script):
    losses = {5e-5: 4.0, 1e-4: 3.5, 2e-4: 3.52, 4e-4: 4.5}
    cell = {rate: row(script, rate, loss) for rate, loss in losses.items()}
    cell[8e-4] = row(script, 8e-4, 4.9, peak=5.5)
    found = script.summary(cell, 2e-4)
    assert (found["best"], found["inside"], found["within"], found["diverges"]) == (1e-4, True, (1e-4, 2e-4), 8e-4)
    assert (found["at best"], found["at default"]) == (1.5, pytest.approx(1.48))
    # Without anything above it, the best rate may be higher.
    found = script.summary({rate: cell[rate] for rate in (5e-5, 1e-4)}, 2e-4)
    assert (found["best"], found["inside"], found["within"]) == (1e-4, False, (1e-4, 1e-4))
    assert found["at default"] is found["diverges"] is None


def test_a_run_that_ends_in_nothing_is_no_best(script, capsys):
    cell = {1e-4: row(script, 1e-4, 4.0), 2e-4: row(script, 2e-4, float("nan"), float("inf"))}
    script.print_table(list(cell.values()), 2e-4)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.endswith("| 5.000 | (0.0001) | 1.000 | -inf | 0.0001 to 0.0001 | 0.0002 |")
