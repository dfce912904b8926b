"""Loading a compressed checkpoint never makes a dense weight; measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "recipes" / "benchmarks"


def python(code: str) -> str:
    """Runs code in a fresh process from the benchmarks' folder; returns what it printed last."""
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peaks from /proc")
def test_300_million_parameters_load_and_run_in_little_more_than_the_file(tmp_path):
    python(f"import memory; memory.write_compressed({str(tmp_path)!r}, 4.0); print('done')")
    for job in ("load compressed", "serve compressed"):
        code = (
            "import argparse, json, memory;"
            f"options = argparse.Namespace(job={job!r}, folder={str(tmp_path)!r}, seqlen=8, batch=1);"
            "print(json.dumps(memory.run_job(options)))"
        )
        measured = json.loads(python(code))
        assert measured["files"] > 200e6
        assert measured["peak"] < 1.3 * measured["files"], job
