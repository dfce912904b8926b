"""What does a layer cost a host beside its kernels? Microseconds of Python and torch in a call, kernels stubbed out.

    python recipes/benchmarks/host_time.py

A clustered 64 x 64 layer on the CPU whose linear, decode and gradient give uninitialised tensors of the right shape.
On a GPU the same code runs ahead of the kernels; where it takes longer than they do, the GPU waits.

    frozen      one token through a frozen layer, without gradients
    adapted     likewise with an unmerged adapter of rank 16 and trained scales
    forward     8 tokens in training
    training    forward and backward
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from harness import Results, Row, arguments, settings_of, table
from peft import get_peft_model
from torch import nn

from cluscomp_peft import ClusCompConfig
from cluscomp_peft.ops import backends


def main() -> None:
    parser = arguments(__doc__, "host_time")
    parser.add_argument("--calls", type=int, default=2000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(options.results, settings_of(options), options.fresh)
    stub()
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    config = ClusCompConfig(target_modules=["0"], group_size=4, num_clusters=16, rank=16, train_scales=True)
    layer = get_peft_model(model, config).base_model.model[0]
    token, x, upstream = torch.randn(1, 64), torch.randn(8, 64, requires_grad=True), torch.randn(8, 64)
    calls: dict[str, Callable[[], object]] = {
        "frozen": lambda: layer.base_layer(token),
        "adapted": lambda: layer(token),
        "forward": lambda: layer(x),
        "training": lambda: layer(x).backward(upstream),
    }

    def measure(job: Row) -> Row:
        with torch.set_grad_enabled(job["call"] in ("forward", "training")):
            return {"microseconds": microseconds(calls[job["call"]], options.calls)}

    rows = results.complete([{"call": name} for name in calls], measure)
    print(table(rows, {"call": "{call}", "µs": "{microseconds:.1f}"}))


def stub() -> None:
    """Kernels that do nothing in the place of the CPU's."""

    def linear(x, weight, bias):
        return x.new_empty(*x.shape[:-1], weight.out_features)

    def decode(weight, dtype):
        return torch.empty(weight.out_features, weight.in_features, dtype=dtype)

    def codebook_grad(x, grad_output, weight):
        sizes = (0 if weight.scale_in is None else x.shape[1], 0 if weight.scale_out is None else grad_output.shape[1])
        return (torch.empty(weight.codebook.shape), *(torch.empty(size) for size in sizes))

    backends._CPU = backends._CPU._replace(linear=linear, decode=decode, codebook_grad=codebook_grad)


def microseconds(job: Callable[[], object], calls: int) -> float:
    """Of a call: the median of ten runs."""
    for _ in range(100):
        job()
    runs = []
    for _ in range(10):
        started = time.perf_counter()
        for _ in range(calls // 10):
            job()
        runs.append((time.perf_counter() - started) / (calls // 10))
    return 1e6 * statistics.median(runs)


if __name__ == "__main__":
    main()
