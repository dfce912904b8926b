"""recipes/benchmarks/training_speed.py, tiny: it runs, and holds what it measured against its targets."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest

from tests.conftest import RECIPES

BENCHMARKS = RECIPES / "benchmarks"
TINY = "--hidden 64 --intermediate 128 --layers 1 --heads 2 --kv-heads 2 --vocab 64 --length 16".split()


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("training_speed")


def test_all_methods_take_turns(script, monkeypatch, tmp_path, capsys):
    measured = []

    def peak(job):
        measured.append(job)
        return {"bytes": 100 if job["method"] == "nf4" else 90}

    monkeypatch.setattr(script, "child_peak", peak)
    monkeypatch.setattr(
        script, "forecast_training", lambda shape, method, *_, **__: 92 if "cluscomp" in method else None
    )
    methods = ["--methods", "dense", "nf4", "cluscomp-3"]
    rounds = ["--rounds", "2", "--token-rounds", "2", "--checkpointing", "off", "on"]
    command = ["training_speed.py", *TINY, *methods, *rounds, "--results", str(tmp_path / "speed")]
    monkeypatch.setattr(sys, "argv", command)
    script.main()
    written = json.loads((tmp_path / "speed.json").read_text())
    assert len(written["summary"]) == 6 and len(measured) == 2 * 6
    for row in written["summary"]:
        assert all(row[key] > 0 for key in ("step", "peak", "token", "linears", "step / dense", "token / nf4"))
    assert [row["checkpointing"] for row in written["summary"]] == [False] * 3 + [True] * 3
    found = {verdict["target"]: verdict for verdict in written["targets"] if not verdict["checkpointing"]}
    assert found["peak / NF4 + LoRA r 16"]["value"] == 0.9 and found["peak / NF4 + LoRA r 16"]["met"]
    assert found["forecast, error"]["value"] == pytest.approx(2 / 90)
    output = capsys.readouterr().out
    assert "ClusComp 3 bits, checkpoints" in output and "target 1.15" in output

    monkeypatch.setattr(script, "time_steps", lambda *_: pytest.fail("steps are timed again"))
    script.main()
    assert len(measured) == 12 and capsys.readouterr().out == output


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads peaks from /proc")
def test_a_process_of_its_own_measures_the_peak():
    job = json.dumps({"figure": "peak", "method": "cluscomp-3", "checkpointing": False})
    command = [sys.executable, str(BENCHMARKS / "training_speed.py"), *TINY, "--row", job]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert 0 < json.loads(done.stdout.strip().splitlines()[-1])["bytes"] < 300e6
