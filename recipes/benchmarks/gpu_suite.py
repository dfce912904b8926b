"""What waits for a GPU: are the kernels right there, how near are they to the device's limits, how long takes a 70B?

    python recipes/benchmarks/gpu_suite.py
    TRITON_INTERPRET=1 python recipes/benchmarks/gpu_suite.py --device cpu --rows 64 --cols 48 --clusters 40 \\
        --output suite.json               # tries the script itself; its numbers mean nothing

1. Checks: the assignment and the update of the CUDA engine against plain torch on the device. Stops if one fails.
2. Limits, measured in the same run: FP32 multiply-adds (a square matmul without TF32), bytes (a large copy).
3. For each d, a matrix [cols, rows] of random weights in groups of d: a step of the assignment, pruned and not, and of
   the update; a whole default `kmeans`; the same for 1/8 of the vectors.

"FMA" is 2·d·N·n / seconds of the step without pruning, as a share of the limit. The search for the minimum counts for
nothing there: of the instructions compiled for sm_90, 42 % are such multiply-adds at d = 4, 62 % at d = 16. "bytes" is
what the pruned step cannot avoid to move (vectors, order, codes, distances), as a share of the limit.

The forecast for the 560 matrices of a Llama of 70B parameters takes a + b·N seconds for a matrix of N vectors, a and b
from the two sizes measured. Writes results/gpu_suite.json.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import time
from collections.abc import Callable

import torch
from memory import write_results

from cluscomp_peft.clustering import gpu, kmeans
from cluscomp_peft.codes import group

reference = importlib.import_module("cluscomp_peft.clustering.lloyd")

LAYERS = 80
SHAPES = ((8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192), (28672, 8192), (28672, 8192), (8192, 28672))
COLUMNS = ("d", "N", "n", "pruned, s", "full, s", "update, s", "FMA", "bytes", "kmeans, s", "1/8, s", "70B, h")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192, help="input channels")
    parser.add_argument("--cols", type=int, default=28672, help="outputs, which are cut into groups")
    parser.add_argument("--clusters", type=int, default=65500)
    parser.add_argument("--dims", type=int, nargs="+", default=[4, 6, 8, 16])
    parser.add_argument("--iterations", type=int, help="of kmeans; its default quality otherwise")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", help="JSON file; results/gpu_suite.json by default")
    options = parser.parse_args()
    if not gpu.available(torch.device(options.device).type):
        raise SystemExit(f"device {options.device!r} cannot run the CUDA engine: it needs Triton and a CUDA device.")
    if options.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit(f"device {options.device!r}: there is no CUDA device here.")
    torch.backends.cuda.matmul.allow_tf32 = False

    checks = {dim: check(dim, options) for dim in options.dims}
    limits = measure_limits(options)
    print(f"{limits['device']}: {limits['flops'] / 1e12:.1f} TFLOP/s, {limits['bytes'] / 1e12:.2f} TB/s\n")
    print("".join(f"{name:>11}" for name in COLUMNS))
    rows = []
    for dim in options.dims:
        rows.append(measure(dim, limits, options))
        print("".join(_cell(rows[-1][name]) for name in COLUMNS), flush=True)
    name = "gpu_suite"
    if options.output is not None:
        name = os.path.splitext(os.path.abspath(options.output))[0]
        os.makedirs(os.path.dirname(name), exist_ok=True)
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    write_results(name, {"settings": settings, "limits": limits, "checks": checks, "rows": rows})


def check(dim: int, options: argparse.Namespace) -> dict[str, float]:
    """Kernels against plain torch, on less than 100,000 vectors: excess of distances, error of means."""
    vectors = make_vectors(dim, options)[:99_991]
    clusters = max(2, min(1999, options.clusters, len(vectors) // 8))
    weights = torch.rand(len(vectors), generator=torch.Generator().manual_seed(1)).to(vectors.device)
    job = gpu.Clustering(vectors[None], weights[None], vectors[None, :clusters])
    job.locate()
    codes, distances = reference.assign(vectors, vectors[:clusters])
    found = job.result(0)[1]
    excess = float(job.distances.double().sum() / distances.double().sum()) - 1
    job.update()
    job.assign(prune=False)
    full = job.distances.clone()
    job.codes.zero_()
    job.assign(prune=True)
    pruned = float((job.distances - full).abs().max() / full.max())
    means = reference._update(vectors, vectors[:clusters], found, distances, weights)
    drift = float((job.result(0)[0] - means).abs().max() / means.abs().max())
    report = {"excess": excess, "pruned": pruned, "means": drift, "same codes": float((found == codes).float().mean())}
    if not (excess < 1e-5 and pruned < 1e-5 and drift < 1e-5):
        raise SystemExit(f"d = {dim}: the kernels disagree with torch: {report}")
    return report


def measure_limits(options: argparse.Namespace) -> dict:
    """FP32 multiply-adds and bytes that the device does in a second."""
    cuda = options.device != "cpu"
    side, count = (8192, 1 << 29) if cuda else (256, 1 << 20)
    matrix = torch.randn(side, side, device=options.device)
    source = torch.zeros(count, device=options.device)
    target = torch.empty_like(source)
    name = torch.cuda.get_device_name(matrix.device) if cuda else "cpu"
    return {
        "device": name,
        "flops": 2 * side**3 / seconds(lambda: matrix @ matrix, options),
        "bytes": 8 * count / seconds(lambda: target.copy_(source), options),
    }


def measure(dim: int, limits: dict, options: argparse.Namespace) -> dict:
    """A line of the table."""
    vectors = make_vectors(dim, options)
    total, clusters = len(vectors), min(options.clusters, len(vectors) - 1)
    steps = measure_steps(vectors, clusters, options)
    few = vectors[: max(clusters + 1, total // 8)]
    whole, part = (seconds(lambda v=v: _cluster(v, clusters, options), options) for v in (vectors, few))
    slope = max(0.0, (whole - part) / max(1, total - len(few)))
    matrices = [inputs * -(-outputs // dim) for outputs, inputs in SHAPES]
    forecast = LAYERS * sum(max(0.0, whole - slope * total) + slope * count for count in matrices)
    return {
        "d": dim,
        "N": total,
        "n": clusters,
        **steps,
        "FMA": 2 * dim * total * clusters / steps["full, s"] / limits["flops"],
        # Read twice: vectors, order, codes; once what was found; written: that, codes and distances.
        "bytes": total * (8 * dim + 40) / steps["pruned, s"] / limits["bytes"],
        "kmeans, s": whole,
        "1/8, s": part,
        "70B, h": forecast / 3600,
    }


def measure_steps(vectors: torch.Tensor, clusters: int, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of the parts of an iteration, in the state after two."""
    start = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))[:clusters]
    job = gpu.Clustering(vectors[None], None, vectors[None, start.to(vectors.device)])
    job.locate()
    for _ in range(2):
        job.update()
        job.assign()
    steps = {
        "pruned, s": seconds(job.assign, options),
        "full, s": seconds(lambda: job.assign(prune=False), options),
        "update, s": seconds(job.update, options),
    }
    if vectors.shape[1] > gpu.MAX_SPELLED:
        # Tensor cores on three parts of each number: a candidate, if what it misses is little.
        job.assign()
        exact = float(job.distances.double().sum())
        steps["tf32x3, s"] = seconds(lambda: job.assign(precision="tf32x3"), options)
        job.codes.zero_()
        job.assign(prune=False, precision="tf32x3")
        steps["tf32x3 excess"] = float(job.distances.double().sum()) / exact - 1
    return steps


def _cluster(vectors: torch.Tensor, clusters: int, options: argparse.Namespace) -> None:
    settings = {} if options.iterations is None else {"iterations": options.iterations}
    kmeans(vectors, clusters, engine="cuda", **settings)


def make_vectors(dim: int, options: argparse.Namespace) -> torch.Tensor:
    """Random bf16 weights with rows and channels of different scale, in groups of d: [N, d] fp32."""
    generator = torch.Generator(options.device).manual_seed(0)
    device = {"generator": generator, "device": options.device}
    weight = torch.randn(options.cols, options.rows, **device).mul_(0.02)
    weight *= torch.randn(options.cols, 1, **device).mul(0.2).exp()
    weight *= torch.randn(options.rows, **device).mul(0.2).exp()
    return group(weight.bfloat16(), dim).reshape(-1, dim).float()


def seconds(job: Callable[[], object], options: argparse.Namespace) -> float:
    """Median over repetitions, after a first run that compiles; of that run where there are none."""
    times = []
    for _ in range(1 + options.repeat):
        _wait(options)
        started = time.perf_counter()
        job()
        _wait(options)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:] or times)


def _wait(options: argparse.Namespace) -> None:
    if options.device != "cpu":
        torch.cuda.synchronize(options.device)


def _cell(value: float) -> str:
    return f"{value:>11}" if isinstance(value, int) else f"{value:>11.3g}"


if __name__ == "__main__":
    main()
