"""Are the ops right on a device, and how near do they come to what it can do? A part of suite.py.

For every matrix of a block of Llama-3-8B and Llama-2-70B and every number of bits, with random codes stored as
`choose_spec` would:

    decode              the weight in bf16
    linear, T tokens    T = 1, 5, 16 (generation), 64, 512, 2048 (prompts, training)
    codebook_grad       512 and 2048 tokens

deviation   ‖y − y_ref‖ / ‖y_ref‖ against the reference on the same device, computed in fp32 (fp64 for
            the gradient, whose sums are long). A row with more than rounding to bf16 explains is "wrong".
call, µs    of a call, launching and Python included; calls go round as many copies of the matrix as no cache holds.
graph, µs   the same from a CUDA graph, where launching costs nothing; "-" where the call cannot be captured.
share       max(bytes / copy bandwidth, multiply-adds / bf16 matmul rate), both measured in the same run, over the
            time, of the graph where there is one. Bytes: codes, codebook, scales, x and y, each moved once.
dense, µs   what dense bf16 takes for the same (a copy, `F.linear`, `dyᵀ x`), timed the same way.

At the end: the sum over the seven matrices of a block, against dense. Before the first row, processes compile in
parallel what the rows need: one core takes minutes for it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cached_property, partial
from multiprocessing import get_context
from typing import Any

import torch
import torch.nn.functional as F
from random_models import SHAPES, clustered_layer, random_weight
from report import Report, one_line
from timing import forget_peak, graphed, is_cuda, measure_limits, seconds, synchronize
from torch import nn

from cluscomp_peft import ClusteredLinear, ops
from cluscomp_peft.ops.backends import reference

MODELS = {"8B": "Llama-3-8B", "70B": "Llama-2-70B"}
TOKENS = (1, 5, 16, 64, 512, 2048)
GRAD_TOKENS = (512, 2048)
# A number in bf16 is off by 2^-9 of itself at most: the weight, y, and each element of dL/dW as in a dense layer.
TOLERANCE = {"decode": 4e-3, "linear": 1e-2, "codebook_grad": 4e-3}
_CACHE = 256 << 20  # bytes that no cache of a device holds
_MAX_COPIES = 256
_LEAST_CALLS = 32  # in a timing on a device, so that waiting for it at the end counts for little
_COMPILERS = 12  # processes, each with a CUDA context of 0.5 GB
COLUMNS = ("deviation", "call, µs", "graph, µs", "share", "dense, µs")


def kernels(report: Report, options: argparse.Namespace) -> None:
    """Rows for every matrix, bits, op and number of tokens; sums for blocks."""
    device = options.device
    matrices = [
        (model, *size)
        for model in options.models
        for size in sorted(set(SHAPES[MODELS[model]].scaled(options.scale).matrices()))
    ]
    if is_cuda(device):
        jobs = [(*matrix[1:], bits, device) for matrix in matrices for bits in options.bits]
        report.run("compile", lambda: compile_all(jobs))
    report.note(limits=measure_limits(device, options.repeat))
    print(f"{'':<40} {''.join(f'{name:>12}' for name in COLUMNS)}")
    for model, in_features, out_features in matrices:
        dense = Dense(in_features, out_features, options)
        for bits in options.bits:
            clustered = Clustered(in_features, out_features, bits, options)
            for op, tokens in _ops():
                name = f"{model} {out_features}x{in_features} {bits:g} bits {op} {tokens or ''}".strip()
                facts = {"model": model, "matrix": [in_features, out_features], "bits": bits}
                job = partial(measure, op, tokens, clustered, dense, report.content["limits"])
                report.run(name, lambda facts=facts, job=job: {**facts, **job()}, show=_line)
            del clustered
            forget_peak(device)
        report.note(blocks=list(blocks(report.rows, options)))
    for model in options.models:
        for bits in options.bits:
            found = [row for row in report.content["blocks"] if (row["model"], row["bits"]) == (model, bits)]
            speeds = (f"{row['op']} {row['tokens'] or ''} {row['speed']:.2f}" for row in found)
            print(f"{model} block at {bits:g} bits, times as fast as dense: {', '.join(speeds)}")


def _ops() -> list[tuple[str, int]]:
    return [
        ("decode", 0),
        *(("linear", tokens) for tokens in TOKENS),
        *(("codebook_grad", tokens) for tokens in GRAD_TOKENS),
    ]


class Clustered:
    """A matrix of random codes, as many copies as no cache holds, and its weight in fp32."""

    def __init__(self, in_features: int, out_features: int, bits: float, options: Any) -> None:
        self.size, self.bits, self.options = (in_features, out_features), bits, options

    @cached_property
    def layers(self) -> list[ClusteredLinear]:
        layer = random_layer(*self.size, self.bits, self.options.device)
        copies = _copies(layer.stored_bytes(), self.options.device)
        return [layer, *(_copy(layer) for _ in range(copies - 1))]

    @cached_property
    def expected(self) -> torch.Tensor:
        return reference.decode(_packed(self.layers[0]), torch.float32)


class Dense:
    """What dense bf16 takes for a matrix; timed once for all bits."""

    def __init__(self, in_features: int, out_features: int, options: Any) -> None:
        self.size, self.options = (in_features, out_features), options
        self._times: dict[tuple[str, int], tuple[float, float | None]] = {}

    @cached_property
    def weights(self) -> list[torch.Tensor]:
        in_features, out_features = self.size
        copies = _copies(2 * in_features * out_features, self.options.device)
        return [random_weight((out_features, in_features), self.options.device) for _ in range(copies)]

    def time(self, op: str, tokens: int, job: Callable) -> tuple[float, float | None]:
        if (op, tokens) not in self._times:
            self._times[op, tokens] = _time(job, self.weights, self.options)
        return self._times[op, tokens]


def measure(op: str, tokens: int, clustered: Clustered, dense: Dense, limits: dict) -> dict:
    """A row: one op of one matrix."""
    (in_features, out_features), options = clustered.size, clustered.options
    layer, expected = clustered.layers[0], clustered.expected
    kept, weights = layer.stored_bytes(), in_features * out_features
    moved, flops = kept + 2 * tokens * (in_features + out_features), 2 * tokens * weights
    x = random_weight((tokens, in_features), options.device) / 0.02 if tokens else None
    job, plain = _calls(op, x, out_features)
    if op == "decode":
        moved += 2 * weights
        wanted: Any = (expected,)
    elif op == "linear":
        wanted = (x.float() @ expected.t(),)
    else:
        grad = plain.keywords["grad"]
        wanted = reference.codebook_grad(x.double(), grad.double(), _packed(layer))
        moved += 4 * sum(value.numel() for value in wanted)
    found = job(layer)
    found = found if isinstance(found, tuple) else (found,)
    deviation = max(_deviation(a, b) for a, b in zip(found, wanted, strict=True) if b.numel())
    del found, wanted
    call, graph = _time(job, clustered.layers, options)
    dense_call, dense_graph = dense.time(op, tokens, plain)
    ceiling = max(moved / limits["bytes"], flops / limits["bf16"])
    row = {
        **layer.spec.to_dict(),
        "op": op,
        "tokens": tokens,
        "deviation": deviation,
        "call, µs": call * 1e6,
        "graph, µs": None if graph is None else graph * 1e6,
        "ceiling, µs": ceiling * 1e6,
        "share": ceiling / (graph or call),
        "dense, µs": (dense_graph if graph is not None and dense_graph is not None else dense_call) * 1e6,
        "dense call, µs": dense_call * 1e6,
    }
    if not deviation <= TOLERANCE[op]:
        row["error"] = f"wrong: deviation {deviation:.2g}"
    return row


def _calls(op: str, x: torch.Tensor | None, out_features: int) -> tuple[Callable, Any]:
    """What is timed on a clustered layer, and its counterpart on a dense weight."""
    if op == "decode":
        return lambda layer: layer.decode(torch.bfloat16), torch.clone
    if op == "linear":
        return torch.no_grad()(lambda layer: layer(x)), partial(F.linear, x)
    grad = random_weight((len(x), out_features), x.device)

    def plain(weight: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        return grad.t() @ x

    return lambda layer: ops.codebook_grad(x, grad, _packed(layer)), partial(plain, grad=grad)


def blocks(rows: list[dict], options: Any) -> Iterator[dict]:
    """Sums over the matrices of a block, of what was measured of all of them."""
    for model in options.models:
        sizes = [list(size) for size in SHAPES[MODELS[model]].scaled(options.scale).matrices()]
        for bits in options.bits:
            for op, tokens in _ops():
                found = [
                    {
                        tuple(row["matrix"]): row[name] or row["call, µs"]
                        for row in rows
                        if _is(row, model, bits, op, tokens)
                    }
                    for name in ("graph, µs", "dense, µs")
                ]
                if all(tuple(size) in found[0] for size in sizes):
                    ours, dense = (sum(times[tuple(size)] for size in sizes) for times in found)
                    facts = {"model": model, "bits": bits, "op": op, "tokens": tokens}
                    yield {**facts, "µs": ours, "dense, µs": dense, "speed": dense / ours}


def _is(row: dict, *facts: Any) -> bool:
    return tuple(row.get(key) for key in ("model", "bits", "op", "tokens")) == facts


def compile_all(jobs: list[tuple]) -> dict:
    """Calls every op of every job once, in processes of their own, so that Triton's cache has what the rows need."""
    errors = []
    workers = min(len(jobs), _COMPILERS, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(compile_one, *job) for job in jobs]):
            if future.exception() is not None:
                errors.append(one_line(future.exception()))
    row: dict[str, Any] = {"jobs": len(jobs), "processes": workers}
    return {**row, "error": f"{len(errors)} of {len(jobs)}: {errors[0]}"} if errors else row


def compile_one(in_features: int, out_features: int, bits: float, device: str) -> None:
    layer = random_layer(in_features, out_features, bits, device)
    for op, tokens in _ops():
        x = random_weight((tokens, in_features), device) if tokens else None
        _calls(op, x, out_features)[0](layer)
    synchronize(device)


def random_layer(in_features: int, out_features: int, bits: float, device: str) -> ClusteredLinear:
    with torch.device("meta"):
        shape = nn.Linear(in_features, out_features, bias=False)
    return clustered_layer(shape, bits, device, f"{out_features} x {in_features}")


def _packed(layer: ClusteredLinear) -> ops.PackedWeight:
    return ops.PackedWeight(layer.codes, layer.codebook, layer.out_features, layer.scale_in, layer.scale_out)


def _copy(layer: ClusteredLinear) -> ClusteredLinear:
    parts = [
        None if part is None else part.detach().clone()
        for part in (layer.codes, layer.codebook, layer.scale_in, layer.scale_out)
    ]
    return ClusteredLinear.from_parts(*parts, None, layer.out_features)


def _copies(size: int, device: str) -> int:
    return min(_MAX_COPIES, -(-_CACHE // size)) if is_cuda(device) else 1


@torch.no_grad()
def _time(job: Callable, matrices: list, options: Any) -> tuple[float, float | None]:
    """Seconds of a call, going round the matrices, and of one without launching."""
    rounds = -(-_LEAST_CALLS // len(matrices)) if is_cuda(options.device) else 1

    def all_of_them() -> None:
        for _ in range(rounds):
            for matrix in matrices:
                job(matrix)

    call = seconds(all_of_them, options.device, options.repeat)
    graph = graphed(all_of_them, options.device, options.repeat)
    calls = rounds * len(matrices)
    return call / calls, None if graph is None else graph / calls


def _deviation(found: torch.Tensor, expected: torch.Tensor) -> float:
    difference = found.to(expected.dtype) - expected
    return float(difference.norm() / expected.norm())


def _line(row: dict) -> str:
    return "".join(f"{'-':>12}" if row[name] is None else f"{row[name]:>12.3g}" for name in COLUMNS)
