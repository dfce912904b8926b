"""How long does it take to cluster a model of 70B parameters on a device? A part of suite.py.

1. Checks, one for each d: assignment and update of the CUDA engine against plain torch on the device.
2. Matrices: one of each shape of a block of Llama-2-70B for each number of bits, random weights with rows and channels
   of different scale, clustered as `cluscomp compress` would do without data (`Policy.cluster`, default quality). Each
   counts as often as a model of 80 blocks has it; the sum is what all 560 take.
3. Steps, one for each d: of the assignment, pruned and not, and of the update, at 8192 x 28672 and 65,500 centroids.

"FMA" is 2·d·N·n / seconds of the step without pruning, as a share of the limit measured in the same run. The search
for the minimum counts for nothing there: of the instructions compiled for sm_90, 42 % are such multiply-adds at d = 4,
62 % at d = 16. "bytes" is what the pruned step cannot avoid to move (vectors, order, codes, distances), as a share of
the limit.

1 and 3 need the CUDA engine: a CUDA device, or TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import functools
import importlib

import torch
from random_models import SHAPES
from report import Report
from timing import forget_peak, is_cuda, measure_limits, peaks, seconds, timed

from cluscomp_peft.clustering import gpu, gpu_kernels
from cluscomp_peft.codes import group
from cluscomp_peft.compress.policy import Policy

# The package has a function of the same name.
reference = importlib.import_module("cluscomp_peft.clustering.lloyd")

MODEL = "Llama-2-70B"
LARGEST = (8192, 28672)  # (in, out) of the matrix whose steps are looked into
CLUSTERS = 65500
_CHECKED = 99_991  # vectors of a check


def kmeans(report: Report, options: argparse.Namespace) -> None:
    """Checks, matrices with the sum over the model, steps."""
    device, shape = options.device, SHAPES[MODEL].scaled(options.scale)
    fast = gpu.available(torch.device(device).type)
    for dim in options.dims if fast else ():
        report.run(f"check d = {dim}", lambda dim=dim: check(dim, options))
    sizes = shape.matrices()
    for bits in options.bits:
        for size in sorted(set(sizes)):
            report.run(f"{size[1]}x{size[0]} {bits:g} bits", lambda size=size, bits=bits: cluster(size, bits, options))
            forget_peak(device)
    totals = {}
    for bits in options.bits:
        times = {
            tuple(row["matrix"]): row["seconds"] for row in report.rows if row.get("bits") == bits and "seconds" in row
        }
        if all(size in times for size in sizes):
            totals[f"{bits:g}"] = shape.layers * sum(times[size] for size in sizes)
            count = shape.layers * len(sizes)
            print(f"all {count} matrices of {MODEL} at {bits:g} bits: {totals[f'{bits:g}'] / 60:.1f} minutes")
    report.note(seconds_of_all=totals)
    if fast and options.dims:
        report.note(limits=measure_limits(device, options.repeat))
        for dim in options.dims:
            limits = report.content["limits"]
            report.run(f"steps d = {dim}", lambda dim=dim, limits=limits: measure_steps(dim, limits, options))
            forget_peak(device)


def cluster(size: tuple[int, int], bits: float, options: argparse.Namespace) -> dict:
    """A matrix as a compression without data clusters it."""
    in_features, out_features = size
    name, policy = f"{out_features} x {in_features}", Policy(bits=bits, quality=options.quality)
    spec = policy.spec_for(name, out_features, in_features)
    weight = make_weight(in_features, out_features, options.device)
    if is_cuda(options.device):
        # What the first matrix of a model compiles, the others do not.
        Policy(bits=bits, quality="fast").cluster(name, weight[:, : in_features // 8], spec)
    forget_peak(options.device)
    took = timed(lambda: policy.cluster(name, weight, spec), options.device)
    return {"matrix": list(size), "bits": bits, **spec.to_dict(), "seconds": took, **peaks(options.device)}


def check(dim: int, options: argparse.Namespace) -> dict[str, float]:
    """Kernels against plain torch, on less than 100,000 vectors: excess of distances, error of means."""
    vectors = make_vectors(dim, options)[:_CHECKED]
    clusters = max(2, min(1999, len(vectors) // 8))
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
        raise AssertionError(f"the kernels disagree with torch: {report}")
    return report


def measure_steps(dim: int, limits: dict, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of the parts of an iteration, in the state after two."""
    vectors = make_vectors(dim, options)
    total = len(vectors)
    clusters = min(CLUSTERS, total // 8)
    start = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:clusters]
    job = gpu.Clustering(vectors[None], None, vectors[None, start.to(vectors.device)])
    job.locate()
    for _ in range(2):
        job.update()
        job.assign()
    clock = functools.partial(seconds, device=options.device, repeat=options.repeat)
    steps = {
        "pruned, s": clock(job.assign),
        "full, s": clock(lambda: job.assign(prune=False)),
        "update, s": clock(job.update),
    }
    if vectors.shape[1] > gpu_kernels.MAX_SPELLED:
        # Tensor cores on three parts of each number: a candidate, if what it misses is little.
        job.assign()
        exact = float(job.distances.double().sum())
        steps["tf32x3, s"] = clock(lambda: job.assign(precision="tf32x3"))
        job.codes.zero_()
        job.assign(prune=False, precision="tf32x3")
        steps["tf32x3 excess"] = float(job.distances.double().sum()) / exact - 1
    return {
        "N": total,
        "n": clusters,
        **steps,
        "FMA": 2 * dim * total * clusters / steps["full, s"] / limits["flops"],
        # Read twice: vectors, order, codes; once what was found; written: that, codes and distances.
        "bytes": total * (8 * dim + 40) / steps["pruned, s"] / limits["bytes"],
    }


def make_vectors(dim: int, options: argparse.Namespace) -> torch.Tensor:
    """The largest matrix in groups of d: [N, d] fp32."""
    in_features, out_features = (max(16, round(size * options.scale)) for size in LARGEST)
    return group(make_weight(in_features, out_features, options.device), dim).reshape(-1, dim).float()


def make_weight(in_features: int, out_features: int, device: str) -> torch.Tensor:
    """Random bf16 weights [out, in] with rows and channels of different scale."""
    settings = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    weight = torch.randn(out_features, in_features, **settings).mul_(0.02)
    weight *= torch.randn(out_features, 1, **settings).mul(0.2).exp()
    weight *= torch.randn(in_features, **settings).mul(0.2).exp()
    return weight.bfloat16()
