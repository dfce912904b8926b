"""Lets tests run the ops on a backend of their choice, Triton's kernels in its interpreter among them.

A file of tests that takes its backends from here is run once more in the interpreter by `tests/test_interpreter.py`.
The interpreter rounds to bf16 by truncation and cannot multiply bf16 tiles, so fp16 stands for both dtypes of 16 bits.
"""

from __future__ import annotations

import importlib
import importlib.util
import os

import pytest
import torch

from cluscomp_peft.ops import backends

__all__ = [
    "BACKENDS",
    "DTYPES",
    "INTERPRETED",
    "backend",
    "needs_triton",
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
