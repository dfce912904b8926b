"""The benchmark of finetuning quality, tiny: every kind of method trains and is accounted for.

All but NF4, which bitsandbytes cannot run on matrices this small.
"""

from __future__ import annotations

import importlib
import json
from argparse import Namespace

import pytest
import torch

from tests.conftest import RECIPES, WORDS

BENCHMARKS = RECIPES / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # of the tests to come
    return importlib.import_module("finetune_quality")


@pytest.fixture
def options(tmp_path, dense_dir):
    text = tmp_path / "text.jsonl"
    rows = [{"text": " ".join(WORDS[3 + i % 40 : 15 + i % 40])} for i in range(120)]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"model": dense_dir, "train": str(text), "valid": None, "pretraining": str(text), "hold_out": 20}
    settings |= {"bits": [6.0], "ranks": [2], "steps": 3, "batch": 2, "seqlen": 16, "bases": str(tmp_path)}
    return Namespace(**settings)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full linears", "dora", "lora 6", "cluscomp 6 r2"])
def test_a_run_trains_and_is_accounted_for(benchmark, options, method):
    benchmark.compress_all(options)
    start = benchmark.run({"method": method, "rate": 0.0, "seed": 0}, options)
    trained = benchmark.run({"method": method, "rate": 1e-2, "seed": 0}, options)
    assert trained["loss"] != start["loss"] and trained["before"] == start["before"]
    assert trained["trained"] > 0 and trained["step"] > 0
    assert (trained["adapter_bytes"] > 0) == (not method.startswith("full"))
    if method.startswith("cluscomp"):
        assert trained["bits"] <= 6 and trained["bits"] <= trained["merged_bits"]
