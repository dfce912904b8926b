"""Lets tests run the ops on a backend of their choice, Triton's kernels in its interpreter among them.

The interpreter must be asked for before Triton is imported, so it needs a process of its own: a file of tests that
takes its backends from here is run once more by [`run_in_the_interpreter`]. The interpreter rounds to bf16 by
truncation and cannot multiply bf16 tiles, so fp16 stands for both 16-bit dtypes there.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cluscomp_peft.ops import backends

__all__ = [
    "BACKENDS",
    "DTYPES",
    "INTERPRETED",
    "backend",
    "needs_triton",
    "run_in_the_interpreter",
    "shares",
    "use_backend",
]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["triton"] if INTERPRETED else ["reference", "cpu"]
DTYPES = [torch.float32, torch.float16 if INTERPRETED else torch.bfloat16]
_MODULES = {"reference": "reference", "cpu": "cpu", "triton": "cuda"}

needs_triton = pytest.mark.skipif(
    INTERPRETED or importlib.util.find_spec("triton") is None, reason="no Triton here, or running in it already"
)


def backend(name: str) -> backends.Backend:
    module = importlib.import_module(f"cluscomp_peft.ops.backends.{_MODULES[name]}")
    return backends._CPU._replace(decode=module.decode, linear=module.linear, codebook_grad=module.codebook_grad)


def use_backend(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Tensors on the CPU go to the backend `name` of [`BACKENDS`] from now on."""
    monkeypatch.setattr(backends, "_CPU", backend(name))


# The quick tests of a file, and the slow ones.
shares = pytest.mark.parametrize("share", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])


def run_in_the_interpreter(path: str, share: str, *options: str) -> None:
    """Runs a share of a file's tests in a process whose Triton interprets its kernels."""
    options = ("-q", "-o", "addopts=", "-p", "no:cacheprovider", "-m", f"{share} and not gpu", *options)
    command = [sys.executable, "-m", "pytest", *options, path]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
