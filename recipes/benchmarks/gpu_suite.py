"""What waits for a GPU: are the kernels right there, how near are they to the device's limits, how long takes a 70B?

    python recipes/benchmarks/gpu_suite.py
    python recipes/benchmarks/gpu_suite.py --parts kernels training --output suite.json
    python recipes/benchmarks/gpu_suite.py --device cpu --scale 0.01 --parts kernels training generation large \\
        --output suite.json               # tries the script itself; its numbers mean nothing
    TRITON_INTERPRET=1 python recipes/benchmarks/gpu_suite.py --device cpu --parts kmeans --rows 64 --cols 48 \\
        --clusters 40 --output suite.json                                                          # likewise

The parts, all of them by default, each written to results/gpu_suite.json as soon as it is done:

    kmeans        below
    kernels       decode, linear, codebook_grad: errors, and time against the device's limits      gpu_kernels.py
    training      steps of an 8B, against NF4 + LoRA and dense                                     gpu_training.py
    generation    tokens a second of an 8B, likewise                                               gpu_training.py
    large         steps of a 70B at 2 bits in 24 GiB and at 4 bits in 48 GiB                       gpu_training.py

Limits are measured in the same run: multiply-adds in FP32 and bf16 (square matmuls), bytes (a large copy).

K-means.
1. Checks: the assignment and the update of the CUDA engine against plain torch on the device. Stops if one fails.
2. For each d, a matrix [cols, rows] of random weights in groups of d: a step of the assignment, pruned and not, and of
   the update; a whole default `kmeans`; the same for 1/8 of the vectors.

"FMA" is 2·d·N·n / seconds of the step without pruning, as a share of the limit. The search for the minimum counts for
nothing there: of the instructions compiled for sm_90, 42 % are such multiply-adds at d = 4, 62 % at d = 16. "bytes" is
what the pruned step cannot avoid to move (vectors, order, codes, distances), as a share of the limit.

The forecast for the 560 matrices of a Llama of 70B parameters takes a + b·N seconds for a matrix of N vectors, a and b
from the two sizes measured.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import os

import gpu_kernels
import gpu_training
import timing
import torch
from memory import write_results

from cluscomp_peft.clustering import gpu, kmeans
from cluscomp_peft.codes import group

reference = importlib.import_module("cluscomp_peft.clustering.lloyd")

PARTS = ("kmeans", "kernels", "training", "generation", "large")
LAYERS = 80
SHAPES = ((8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192), (28672, 8192), (28672, 8192), (8192, 28672))
COLUMNS = ("d", "N", "n", "pruned, s", "full, s", "update, s", "FMA", "bytes", "kmeans, s", "1/8, s", "70B, h")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rows", type=int, default=8192, help="kmeans: input channels")
    parser.add_argument("--cols", type=int, default=28672, help="kmeans: outputs, which are cut into groups")
    parser.add_argument("--clusters", type=int, default=65500, help="kmeans")
    parser.add_argument("--dims", type=int, nargs="+", default=[4, 6, 8, 16], help="kmeans")
    parser.add_argument("--iterations", type=int, help="of kmeans; its default quality otherwise")
    parser.add_argument("--scale", type=float, default=1.0, help="of widths and depths in the other parts")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", help="JSON file; results/gpu_suite.json by default")
    options = parser.parse_args()
    if timing.is_cuda(options.device) and not torch.cuda.is_available():
        raise SystemExit(f"device {options.device!r}: there is no CUDA device here.")
    if "kmeans" in options.parts and not gpu.available(torch.device(options.device).type):
        raise SystemExit(
            f"device {options.device!r} cannot run the CUDA engine: it needs Triton and a CUDA device. Choose other "
            "--parts, or TRITON_INTERPRET=1 on a CPU."
        )
    name = "gpu_suite"
    if options.output is not None:
        name = os.path.splitext(os.path.abspath(options.output))[0]
        os.makedirs(os.path.dirname(name), exist_ok=True)
    settings = {key: value for key, value in vars(options).items() if key != "output"}

    limits = timing.measure_limits(options.device, options.repeat)
    rates = f"{limits['flops'] / 1e12:.1f} TFLOP/s in FP32, {limits['bf16'] / 1e12:.1f} in bf16"
    print(f"{limits['device']}: {rates}, {limits['bytes'] / 1e12:.2f} TB/s\n")
    results: dict = {"settings": settings, "limits": limits}
    parts = {
        "kmeans": lambda: results.update(measure_kmeans(limits, options)),
        "kernels": lambda: results.update(kernels=gpu_kernels.kernels(limits, options)),
        "training": lambda: results.update(training=gpu_training.training(options)),
        "generation": lambda: results.update(generation=gpu_training.generation(options)),
        "large": lambda: results.update(large=gpu_training.large(options)),
    }
    for part in PARTS:
        if part in options.parts:
            parts[part]()
            timing.forget_peak(options.device)
            write_results(name, results)
            print()
    wrong = results.get("kernels", {}).get("wrong")
    if wrong:
        raise SystemExit("the ops disagree with the reference:\n" + "\n".join(wrong))


def measure_kmeans(limits: dict, options: argparse.Namespace) -> dict:
    """The checks and the table of K-means."""
    checks = {dim: check(dim, options) for dim in options.dims}
    print("".join(f"{name:>11}" for name in COLUMNS))
    rows = []
    for dim in options.dims:
        rows.append(measure(dim, limits, options))
        print("".join(_cell(rows[-1][name]) for name in COLUMNS), flush=True)
    return {"checks": checks, "rows": rows}


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


def measure(dim: int, limits: dict, options: argparse.Namespace) -> dict:
    """A line of the table."""
    vectors = make_vectors(dim, options)
    total, clusters = len(vectors), min(options.clusters, len(vectors) - 1)
    steps = measure_steps(vectors, clusters, options)
    few = vectors[: max(clusters + 1, total // 8)]
    clock = functools.partial(timing.seconds, device=options.device, repeat=options.repeat)
    whole, part = (clock(lambda v=v: _cluster(v, clusters, options)) for v in (vectors, few))
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
    clock = functools.partial(timing.seconds, device=options.device, repeat=options.repeat)
    steps = {
        "pruned, s": clock(job.assign),
        "full, s": clock(lambda: job.assign(prune=False)),
        "update, s": clock(job.update),
    }
    if vectors.shape[1] > gpu.MAX_SPELLED:
        # Tensor cores on three parts of each number: a candidate, if what it misses is little.
        job.assign()
        exact = float(job.distances.double().sum())
        steps["tf32x3, s"] = clock(lambda: job.assign(precision="tf32x3"))
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


def _cell(value: float) -> str:
    return f"{value:>11}" if isinstance(value, int) else f"{value:>11.3g}"


if __name__ == "__main__":
    main()
