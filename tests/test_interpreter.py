"""Triton's kernels in its interpreter, which must be asked for before Triton is imported: tests of several files, that
are skipped there or take another backend, run once more in one process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TESTS = [
    "tests/ops/test_backends.py",
    "tests/ops/backends/test_triton.py",
    "tests/clustering/test_gpu.py",
    "tests/tuner/test_exactness.py::test_on_every_path_merging_is_exact",
    "tests/tuner/test_exactness.py::test_on_every_path_a_fresh_adapter_changes_nothing",
]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton here")
@pytest.mark.parametrize("share", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_the_kernels_in_the_interpreter(share):
    options = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", "-m", f"{share} and not gpu"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *TESTS],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
