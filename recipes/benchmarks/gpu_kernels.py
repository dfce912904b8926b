"""Are the ops right on a device, and how near do they come to what it can do? A part of gpu_suite.py.

For every matrix of a block of Llama-3-8B and every number of bits, with random codes stored as `choose_spec` would:

    decode              the weight in bf16
    linear, T tokens    T = 1 and 16 (generation), 512 (training)
    codebook_grad       512 tokens

error       ‖y − y_ref‖ / ‖y_ref‖ against `cluscomp_peft.ops.reference` on the same device, computed in fp32 (fp64 for
            the gradient, whose sums are long). More than rounding to bf16 explains is wrong, and named at the end.
µs          of a call, launching and Python included; calls go round as many copies of the matrix as no cache holds.
graph, µs   the same from a CUDA graph, where launching costs nothing; "-" where the call cannot be captured.
ceiling     max(bytes / copy bandwidth, multiply-adds / bf16 matmul rate), both measured in the same run; the share is
            ceiling / time, of the graph where there is one. Bytes: codes, codebook, scales, x and y, each moved once.
dense, µs   what dense bf16 takes for the same (a copy, `F.linear`, `dyᵀ x`), timed the same way.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from random_models import SHAPES, clustered_layer, random_weight
from timing import graphed, is_cuda, seconds
from torch import nn

from cluscomp_peft import ClusteredLinear, ops
from cluscomp_peft.ops import reference

BITS = (4.0, 3.0, 2.0)
TOKENS = (1, 16, 512)
# A number in bf16 is off by 2^-9 of itself at most: the weight, y, and each element of dL/dW as in a dense layer.
TOLERANCE = {"decode": 4e-3, "linear": 1e-2, "codebook_grad": 4e-3}
_CACHE = 256 << 20  # bytes that no cache of a device holds
_MAX_COPIES = 256
COLUMNS = ("matrix", "bits", "op", "tokens", "error", "µs", "graph, µs", "share", "dense, µs")


def kernels(limits: dict, options: argparse.Namespace) -> dict:
    """The rows of the table, and what is wrong."""
    print("".join(f"{name:>14}" for name in COLUMNS))
    rows = []
    for in_features, out_features in sorted(set(SHAPES["Llama-3-8B"].scaled(options.scale).matrices())):
        for bits in BITS:
            for row in measure_matrix(in_features, out_features, bits, limits, options):
                rows.append(row)
                print("".join(_cell(row[name]) for name in COLUMNS), flush=True)
    wrong = [
        f"{row['op']} of {row['matrix']} at {row['bits']:g} bits, {row['tokens']} tokens: error {row['error']:.2g}"
        for row in rows
        if not row["error"] <= TOLERANCE[row["op"]]
    ]
    return {"rows": rows, "wrong": wrong}


def measure_matrix(in_features: int, out_features: int, bits: float, limits: dict, options: Any) -> list[dict]:
    device = options.device
    with torch.device("meta"):
        shape = nn.Linear(in_features, out_features, bias=False)
    layer = clustered_layer(shape, bits, device, f"{out_features} x {in_features}")
    layers = [layer, *(_copy(layer) for _ in range(_copies(layer.stored_bytes(), device) - 1))]
    dense = [
        random_weight((out_features, in_features), device)
        for _ in range(_copies(2 * in_features * out_features, device))
    ]
    kept, weights = layer.stored_bytes(), in_features * out_features
    facts = {"matrix": f"{out_features}x{in_features}", "bits": bits, **layer.spec.to_dict()}

    def row(op: str, tokens: int, error: float, job: Callable, plain: Callable, moved: int, flops: int) -> dict:
        call, graph = _time(job, layers, options)
        dense_call, dense_graph = _time(plain, dense, options)
        ceiling = max(moved / limits["bytes"], flops / limits["bf16"])
        return {
            **facts,
            "op": op,
            "tokens": tokens,
            "error": error,
            "µs": call * 1e6,
            "graph, µs": None if graph is None else graph * 1e6,
            "ceiling, µs": ceiling * 1e6,
            "share": ceiling / (graph or call),
            "dense, µs": (dense_graph if graph is not None and dense_graph is not None else dense_call) * 1e6,
        }

    def decode(layer: ClusteredLinear) -> torch.Tensor:
        return layer.decode(torch.bfloat16)

    expected = reference.decode(*_parts(layer), None, out_features, torch.float32)
    rows = [row("decode", 0, _error(decode(layer), expected), decode, torch.clone, kept + 2 * weights, 0)]
    for tokens in TOKENS:
        x = random_weight((tokens, in_features), device) / 0.02
        moved, flops = kept + 2 * tokens * (in_features + out_features), 2 * tokens * weights

        def linear(layer: ClusteredLinear, x: torch.Tensor = x) -> torch.Tensor:
            return layer(x)

        with torch.no_grad():
            wanted = x.float() @ expected.t()
            error = _error(linear(layer), wanted)
            rows.append(row("linear", tokens, error, linear, partial(F.linear, x), moved, flops))
    grad = random_weight((tokens, out_features), device)

    def codebook_grad(layer: ClusteredLinear) -> tuple[torch.Tensor, ...]:
        return ops.codebook_grad(x, grad, *_parts(layer))

    wanted = reference.codebook_grad(x.double(), grad.double(), *_parts(layer), None)
    error = max(_error(a, b) for a, b in zip(codebook_grad(layer), wanted, strict=True) if b.numel())
    moved += 4 * sum(value.numel() for value in wanted)
    rows.append(row("codebook_grad", tokens, error, codebook_grad, lambda weight: grad.t() @ x, moved, flops))
    return rows


def _parts(layer: ClusteredLinear) -> tuple:
    return layer.codes, layer.codebook, layer.scale_in, layer.scale_out


def _copy(layer: ClusteredLinear) -> ClusteredLinear:
    parts = [None if part is None else part.detach().clone() for part in _parts(layer)]
    return ClusteredLinear.from_parts(*parts, None, layer.out_features)


def _copies(size: int, device: str) -> int:
    return min(_MAX_COPIES, -(-_CACHE // size)) if is_cuda(device) else 1


@torch.no_grad()
def _time(job: Callable, matrices: list, options: Any) -> tuple[float, float | None]:
    """Seconds of a call, going round the matrices, and of one without launching."""

    def all_of_them() -> None:
        for matrix in matrices:
            job(matrix)

    call = seconds(all_of_them, options.device, options.repeat)
    graph = graphed(all_of_them, options.device, options.repeat)
    return call / len(matrices), None if graph is None else graph / len(matrices)


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    difference = found.to(expected.dtype) - expected
    return float(difference.norm() / expected.norm())


def _cell(value: Any) -> str:
    return f"{'-':>14}" if value is None else f"{value:>14}" if isinstance(value, (str, int)) else f"{value:>14.3g}"
