"""How every matrix of a run is stored: as the settings say, or so that a budget of bits or bytes costs least loss."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Collection
from typing import Any

import torch

from ..codes import ClusterSpec
from ..dense import weight_of
from .budget.allocation import Demand, allocate
from .budget.sensitivity import measure_sensitivity, with_floor
from .policy import CODEBOOK_DTYPES, Policy
from .report.page import render_report
from .stream.journal import JOURNAL, LOCK, Journal
from .stream.pipeline import Calibration
from .stream.source import DenseCheckpoint

__all__ = ["SENSITIVITY_TOKENS", "specs_of_run"]

# Of three pieces of 4096 tokens each, sensitivities of SmolLM2-135M differ by factors of e^0.18 to e^0.33
# (standard deviation of the logarithm). Shares of bits that are off by half of that, as they are with twice the
# tokens, cost about 1 % of what is above dense.
SENSITIVITY_TOKENS = 8192
_MARGIN = 4096  # bytes of a size budget that stay free for what is written last


def specs_of_run(
    model: Any,
    layers: dict[str, Any],
    policy: Policy,
    dense: DenseCheckpoint,
    dtype: torch.dtype,
    journal: Journal,
    given: Calibration | None,
) -> dict[str, ClusterSpec]:
    """How every matrix is stored: what an earlier run chose, what the settings say, or the best allocation."""
    if "specs" in journal.content:
        return {name: ClusterSpec(**fields) for name, fields in journal.content["specs"].items()}
    started = time.perf_counter()
    embeddings = policy.embedding_specs(model)
    if policy.size is None and (given is None or policy.group_size is not None):
        specs = policy.specs(model)
    else:
        shapes = {name: tuple(weight_of(layer).shape) for name, layer in layers.items()}
        weights = {name: out * inputs for name, (out, inputs) in shapes.items()}
        sensitivity: dict[str, float] = {name: float(weight) for name, weight in weights.items()}
        if given is not None:
            enough = -(-SENSITIVITY_TOKENS // given.batches[0].numel())
            assert given.blocks is not None
            tokens = sum(batch.numel() for batch in given.fitted[:enough])
            print(f"measuring on {tokens} tokens which matrices the loss minds most", file=sys.stderr, flush=True)
            measured = measure_sensitivity(given.blocks, given.fitted[:enough])
            sensitivity = {name: measured.get(name, min(measured.values(), default=1.0)) for name in layers}
            sensitivity = with_floor(sensitivity, weights)
        demands = {name: Demand(inputs, out, sensitivity[name]) for name, (out, inputs) in shapes.items()}
        if policy.size is not None:
            budget = policy.size - _other_bytes([*layers, *embeddings], dense, dtype, journal.folder)
            for name, spec in embeddings.items():
                vocabulary, hidden = weight_of(model.get_submodule(name)).shape
                budget -= spec.num_bytes(hidden, vocabulary, CODEBOOK_DTYPES[policy.codebook_dtype].itemsize)
        else:
            assert policy.bits is not None
            budget = int(policy.bits * sum(weights.values()) / 8)
        try:
            itemsize = CODEBOOK_DTYPES[policy.codebook_dtype].itemsize
            specs = allocate(demands, budget, scales=policy.scales, codebook_itemsize=itemsize)
        except ValueError as error:
            if policy.size is None:
                raise
            raise ValueError(
                f"a size of {policy.size} bytes is out of reach: {policy.size - budget} bytes are taken by tensors "
                f"that stay dense (--dtype can narrow them, --embeddings cluster the largest), embeddings, tokenizer "
                f"and reports, and {error}"
            ) from error
    specs |= embeddings
    journal.commit(
        specs={name: spec.to_dict() for name, spec in specs.items()}, measured=time.perf_counter() - started
    )
    return specs


def _other_bytes(layers: Collection[str], dense: DenseCheckpoint, dtype: torch.dtype, work: str) -> int:
    """Bytes of the folder that are no clustered matrix: dense tensors, file headers, tokenizer, config, reports."""
    keys = [dense.weight_key(name) for name in layers]
    clustered = {held for key in keys if key is not None for held in dense.keys_of(key)}
    total = 0
    for key, shape in dense.shapes.items():
        itemsize = dtype.itemsize if dense.dtypes[key].is_floating_point else dense.dtypes[key].itemsize
        total += 0 if key in clustered else math.prod(shape) * itemsize
    total += sum(entry.stat().st_size for entry in os.scandir(work) if entry.name not in (JOURNAL, LOCK))
    entry = {
        "shape": [65536, 65536],
        "spec": {"group_size": 16, "num_clusters": 65536, "scale_in": True, "scale_out": True},
        "bytes": 10**9, "true_bits": 1 / 3, "relative_error": 1 / 3, "squared_error": 1 / 3, "squared_norm": 1 / 3,
        "output_error": {"clustered": 1 / 3, "feedback": 1 / 3},
    }  # fmt: skip
    report = {"summary": {"true_bits": 1 / 3}, "matrices": dict.fromkeys(layers, entry)}
    # Headers of safetensors name each tensor once, the index again.
    names = sum(len(key) + 130 for key in dense.shapes) + sum(3 * len(name) + 700 for name in layers)
    return total + names + len(json.dumps(report, indent=1)) + len(render_report("x", report)) + 3 * _MARGIN
