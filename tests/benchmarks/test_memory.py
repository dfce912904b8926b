"""Loading a compressed checkpoint never makes a dense weight; measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "recipes" / "benchmarks" / "memory.py"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peaks from /proc")
def test_300_million_parameters_load_and_run_in_little_more_than_the_file(tmp_path):
    for job in ({"write": "compressed"}, {"job": "load compressed"}, {"job": "serve compressed"}):
        command = [sys.executable, SCRIPT, "--folder", tmp_path, "--row", json.dumps(job)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        measured = json.loads(done.stdout.strip().splitlines()[-1])
        if "write" in job:
            continue
        assert measured["files"] > 200e6
        assert measured["peak"] < 1.3 * measured["files"], job
