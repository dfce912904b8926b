"""How fast is K-means on a CPU? This package's engine against faiss (IndexFlatL2) and scikit-learn, same points.

    python recipes/benchmarks/kmeans_speed.py                                           # everything, about an hour
    python recipes/benchmarks/kmeans_speed.py --rows 4:4096 --scale 0.02 --results -    # a quick look

The yardstick is what users run today: 20 exact Lloyd iterations from random points. For each row of d, N and n,

    faiss       seconds of a search of a sample for the nearest of n centroids, × N / sample × 20
    sklearn     seconds of one iteration on a sample (several iterations less one), × N / sample × 20
    ours        seconds of a whole call that ends at or below the yardstick's objective, and the iterations it takes
    objective   ours after 20 iterations / yardstick's after 20
    excess      summed distance to the centroids that our `assign` finds / to those that faiss finds, − 1

Timings of one row are interleaved, `--repeat` times, and medians are compared. faiss itself would take hours to get to
the yardstick's objective, so that comes from exact assignments of our own from the same start (pruned up to d = 6,
brute force above, or near with `--near-reference`, which the table then says); objectives are kept in
results/kmeans_reference.json.

Points are groups of d consecutive outputs of a random bf16 weight matrix with what LLM weights have: rows and channels
of different scale (log-normal), a few channels 8 times larger, some entries of heavy tails (Student t).

Targets, one thread: ≥ 130 × faiss at d = 4, ≥ 45 × at d = 6, ≥ 30 × at d = 8 and ≥ 10 × at d = 16 with n = 65500, and
≥ 10 × at d = 4 with n = 4096; objective after 20 iterations ≥ 15 % below the yardstick at d = 4 and not above it at
any d; excess ≤ 1e-6 for d ≤ 6 and ≤ 0.3 % above; two threads ≥ 1.7 × one; compilation < 20 s at the first use ever
and < 2 s at the first of a process.

Needs faiss-cpu and scikit-learn.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import faiss
import numpy as np
import torch
from harness import Results, Row, arguments, interleaved, ratio, settings_of, table
from safetensors.torch import load_file
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from cluscomp_peft.clustering import cells, cpu
from cluscomp_peft.codes import group

CHANNELS = 4096
ROWS = (
    (2, 4_000_000, 256),
    (3, 2_000_000, 4096),
    (4, 2_000_000, 4096),
    # The rest: a matrix [11008, 4096], the largest of a Llama of 7 B parameters, at its usual group sizes.
    (4, CHANNELS * 2752, 65500),
    (6, CHANNELS * 1835, 65500),
    (8, CHANNELS * 1376, 65500),
    (16, CHANNELS * 688, 65500),
)
ITERATIONS = 20
TWO_THREADS = ((4, 4096), (4, 65500))
PAIRS = 2e9  # distances of one iteration beyond which scikit-learn is left out: it would take hours
COMPILE = """
import time, torch
from cluscomp_peft.clustering import kmeans
points, seconds = torch.randn(20000, 4, generator=torch.Generator().manual_seed(0)), []
for _ in range(2):
    start = time.perf_counter()
    info = kmeans(points, 512, iterations=3)[2]
    seconds.append(time.perf_counter() - start)
print(seconds[0] - seconds[1], info.engine)
"""


def main() -> None:
    names = {f"{d}:{n}": (d, total, n) for d, total, n in ROWS}
    parser = arguments(__doc__, "kmeans_speed")
    parser.add_argument("--rows", nargs="+", choices=names, default=[*names], metavar="d:n", help=" ".join(names))
    parser.add_argument("--scale", type=float, default=1.0, help="shrinks N and n")
    parser.add_argument("--gaussian", action="store_true", help="Gaussian points instead of random weights")
    parser.add_argument("--file", help="safetensors file whose matrices are clustered too; N and n shrink to fit")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--reference", action="store_true", help="computes objectives again that are known")
    parser.add_argument(
        "--near-reference",
        action="store_true",
        help="yardstick by our own assignment above d = 6 (0.3 %% from exact at most, minutes instead of an hour)",
    )
    parser.add_argument("--no-compile", action="store_true", help="compilation is not timed")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    faiss.omp_set_num_threads(options.threads)
    cluster(torch.randn(20000, 8), 512, 3, options.threads)  # compiled before anything is timed

    kinds = ["gaussian" if options.gaussian else "weights", *([options.file] if options.file else [])]
    paths = {os.path.basename(kind): kind for kind in kinds}
    results = Results(options.results, settings_of(options, "threads", "scale"), options.fresh)
    kept = options.scale == 1 and options.results != "-"
    known = Results("kmeans_reference" if kept else "-", {"iterations": ITERATIONS}, options.reference)

    def of(job: Row) -> tuple[str, int, int, int]:
        d, total, n = names[job["row"]]
        return paths[job["points"]], d, int(total * options.scale), max(16, int(n * options.scale))

    jobs = [{"job": "speed", "points": name, "row": row} for name in paths for row in options.rows]
    with threadpool_limits(options.threads):
        rows = results.complete(jobs, lambda job: measure(*of(job), known, options))
        twice = [
            {**job, "job": "two threads"}
            for job in jobs
            if job["points"] == os.path.basename(kinds[0]) and names[job["row"]][::2] in TWO_THREADS
        ]
        faster = results.complete(twice, lambda job: two_threads(*of(job), options.repeat))
    compiled = [] if options.no_compile else results.complete([{"job": "compilation"}], lambda _: compile_seconds())
    columns = {
        "points": "{points}",
        "d": "{d}",
        "N": "{N:,}",
        "n": "{n:,}",
        "faiss, 20 its, s": "{faiss:,.1f}",
        "sklearn, 20 its, s": lambda row: "too slow" if row["sklearn"] is None else f"{row['sklearn']:,.0f}",
        "ours to reach, s": lambda row: "not reached" if row["ours"] is None else f"{row['ours']:.2f}",
        "faiss / ours": "{ratio:.0f}",
        "its": "{iterations}",
        "objective at 20 its / yardstick": lambda row: (
            f"{row['objective']:.4f}{'' if row['exact yardstick'] else ' (near)'}"
        ),
        "assign excess": "{excess:.1e}",
    }
    print(table(rows, columns))
    for row in faster:
        print(f"\ntwo threads, {row['points']} {row['row']}: {row['speed']:.2f} × one")
    for row in compiled:
        print(f"\ncompilation: {row['first']:.1f} s, later {row['later']:.1f} s ({row['engine']})")


def measure(kind: str, dim: int, total: int, clusters: int, known: Results, options: argparse.Namespace) -> Row:
    """One row: all engines on the same points."""
    points = make_points(kind, dim, total)
    # What there is of a file decides how much of the row's size is left.
    clusters, total = max(2, clusters * len(points) // total), len(points)
    threads = options.threads
    generator = torch.Generator().manual_seed(0)
    start = points[torch.randperm(total, generator=generator)[:clusters]]
    yardstick, exact = reference(kind, points, start, known, options)

    objectives: list[float] = [cluster(points, clusters, 0, threads)[2]]
    centroids, _, final, _ = cluster(
        points, clusters, ITERATIONS, threads, lambda _, objective: objectives.append(objective)
    )
    iterations = next((i for i, objective in enumerate(objectives) if objective <= yardstick), None)

    # Small calls are another code path of faiss, and a slow one.
    count = 1 << (19 if clusters <= 4096 else 16)
    sample = torch.randint(total, (count,), generator=generator)
    queries = points[sample].contiguous()
    index = faiss.IndexFlatL2(dim)
    index.add(centroids.numpy())
    few = points[torch.randperm(total, generator=generator)[: max(1 << 16, 2 * clusters)]].contiguous()
    more = 6 if clusters <= 4096 else 2
    jobs: dict[str, Callable[[], object]] = {"faiss": lambda: index.search(queries.numpy(), 1)}
    if iterations is not None:
        jobs["ours"] = partial(cluster, points, clusters, iterations, threads)
    if clusters * len(few) <= PAIRS:
        jobs |= {f"sklearn {steps}": partial(scikit_learn, few, clusters, steps) for steps in (1, more)}
    times = interleaved(jobs, "cpu", options.repeat, warm_up=False)
    faiss_seconds = statistics.median(times["faiss"]) * total / count * ITERATIONS
    ours = statistics.median(times["ours"]) if "ours" in times else None
    sklearn = None
    if "sklearn 1" in times:
        spent = [b - a for a, b in zip(times["sklearn 1"], times[f"sklearn {more}"], strict=True)]
        sklearn = statistics.median(spent) / (more - 1) * total / len(few) * ITERATIONS

    codes = cpu.assign(points, centroids, threads=threads)[0][sample]
    best = torch.from_numpy(index.search(queries.numpy(), 1)[1][:, 0])
    return {
        "d": dim,
        "N": total,
        "n": clusters,
        "faiss": faiss_seconds,
        "sklearn": sklearn,
        "ours": ours,
        "ratio": faiss_seconds / ours if ours else None,
        "iterations": iterations,
        "objective": final / yardstick,
        "exact yardstick": exact,
        "repeat": options.repeat,
        "excess": _error(queries, centroids, codes) / _error(queries, centroids, best) - 1,
    }


def make_points(kind: str, dim: int, total: int) -> torch.Tensor:
    """At most `total` points [N, d], fp32: Gaussian, of random weights, or of the matrices of a file."""
    generator = torch.Generator().manual_seed(dim)
    if kind == "gaussian":
        return torch.randn(total, dim, generator=generator)
    if kind != "weights":
        matrices = [tensor.float() for _, tensor in sorted(load_file(kind).items()) if tensor.ndim == 2]
        return torch.cat([group(matrix, dim).reshape(-1, dim) for matrix in matrices])[:total]
    weight = torch.randn(-(-total // CHANNELS) * dim, CHANNELS, generator=generator)
    odd = torch.rand(weight.shape, generator=generator) < 0.02
    squares = torch.randn(4, int(odd.sum()), generator=generator).square().mean(0)
    weight[odd] /= squares.sqrt()
    weight *= torch.randn(len(weight), 1, generator=generator).mul(0.2).exp()
    scales = torch.randn(CHANNELS, generator=generator).mul(0.2).exp()
    scales[torch.randperm(CHANNELS, generator=generator)[: round(0.002 * CHANNELS)]] *= 8
    weight *= 0.02 * scales
    return group(weight.bfloat16(), dim).reshape(-1, dim)[:total].float()


def reference(
    kind: str, points: torch.Tensor, start: torch.Tensor, known: Results, options: argparse.Namespace
) -> tuple[float, bool]:
    """The yardstick's objective, after 20 updates, each followed by an assignment, and whether these were exact."""
    (total, dim), clusters = points.shape, len(start)
    job = {"points": os.path.basename(kind), "d": dim, "N": total, "n": clusters, "exact": True}
    near = options.near_reference and dim > 6
    if near and (options.reference or known.find(job) is None):
        job["exact"] = False
    threads = os.cpu_count() or 1

    def compute(job: Row) -> Row:
        if job["exact"]:
            return {"objective": exact_lloyd(points, start, threads)}
        found = cpu.lloyd_cells(points, clusters, None, start, ITERATIONS, 0.0, 0, threads, None)
        return {"objective": found[2]}

    (row,) = known.complete([job], compute)
    return row["objective"], row["exact"]


def exact_lloyd(points: torch.Tensor, centroids: torch.Tensor, threads: int) -> float:
    for _ in range(ITERATIONS):
        codes, distances = nearest(points, centroids, threads)
        sums = torch.zeros(centroids.shape, dtype=torch.float64)
        for part, own in zip(points.split(1 << 20), codes.split(1 << 20), strict=True):
            sums.index_add_(0, own, part.double())
        counts = torch.bincount(codes, minlength=len(centroids))[:, None]
        centroids = torch.where(counts > 0, sums / counts, centroids.double()).float()
        empty = torch.nonzero(counts[:, 0] == 0)[:, 0]
        centroids[empty] = points[torch.topk(distances, len(empty)).indices]
    return _error(points, centroids, nearest(points, centroids, threads)[0])


def nearest(points: torch.Tensor, centroids: torch.Tensor, threads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and squared distances, exact: pruned where `cpu.assign` promises that, else against all centroids."""
    if points.shape[1] <= 6:
        return cpu.assign(points, centroids, threads=threads)
    x, c = points.numpy(), centroids.numpy()
    codes, distances = np.zeros(len(x), np.int32), np.zeros(len(x), np.float32)

    def scan(first: int) -> None:
        part = slice(first, first + (1 << 17))
        cells.scan_cells(x[part], np.empty(0, np.float32), c, 0, codes[part], distances[part], np.zeros(len(c)))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(scan, range(0, len(x), 1 << 17)))
    return torch.from_numpy(codes).long(), torch.from_numpy(distances)


def two_threads(kind: str, dim: int, total: int, clusters: int, repeat: int) -> Row:
    """How many times faster a whole run is with two threads than with one."""
    points = make_points(kind, dim, total)
    clusters = max(2, clusters * len(points) // total)
    jobs = {str(count): partial(cluster, points, clusters, ITERATIONS, count) for count in (1, 2)}
    times = interleaved(jobs, "cpu", repeat, warm_up=False)
    return {"speed": ratio(times["1"], times["2"]), "repeat": repeat}


def compile_seconds() -> Row:
    """What the first call of a process takes longer than the second: without a cache of compiled code, and with it."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
        command = [sys.executable, "-c", COMPILE]
        outputs = [
            subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.split()
            for _ in range(2)
        ]
    return {"first": float(outputs[0][0]), "later": float(outputs[1][0]), "engine": outputs[0][1]}


def cluster(
    points: torch.Tensor,
    clusters: int,
    iterations: int,
    threads: int,
    progress: Callable[[int, float], None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, float, int]:
    return cpu.lloyd_cells(points, clusters, None, None, iterations, 0.0, 0, threads, progress)


def scikit_learn(points: torch.Tensor, clusters: int, iterations: int) -> None:
    start = points[:clusters].numpy()
    KMeans(clusters, init=start, n_init=1, max_iter=iterations, tol=0, algorithm="lloyd").fit(points.numpy())


def _error(points: torch.Tensor, centroids: torch.Tensor, codes: torch.Tensor) -> float:
    return float((points.double() - centroids[codes].double()).square().sum())


if __name__ == "__main__":
    main()
