"""The benchmark of what a call costs beside its kernels, in a process of its own: it takes the kernels away."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "recipes/benchmarks/host_time.py"


@pytest.mark.slow
def test_it_times_every_way_through_a_layer(tmp_path):
    command = [sys.executable, SCRIPT, "--calls", "20", "--results", tmp_path / "found"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    found = {row["call"]: row["microseconds"] for row in rows}
    assert list(found) == ["frozen", "adapted", "forward", "training"] and found["training"] > found["forward"] > 0
