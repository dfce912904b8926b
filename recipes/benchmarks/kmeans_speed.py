"""Speed of K-means on the CPU: this package's engine against faiss (IndexFlatL2) and scikit-learn, same points.

    python recipes/benchmarks/kmeans_speed.py                                # everything, about an hour
    python recipes/benchmarks/kmeans_speed.py --rows 4:4096 --scale 0.02     # a quick look, not written

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

Needs faiss-cpu and scikit-learn. Writes results/kmeans_speed.json; rows that are not run again keep their numbers.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import faiss
import llvmlite.binding
import numpy as np
import torch
from memory import write_results
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
    names = [f"{d}:{n}" for d, _, n in ROWS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=names, default=names, metavar="d:n", help=" ".join(names))
    parser.add_argument("--scale", type=float, default=1.0, help="shrinks N and n; nothing is written then")
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
    _cluster(torch.randn(20000, 8), 512, 3, options.threads)  # compiled before anything is timed

    kinds = ["gaussian" if options.gaussian else "weights", *([options.file] if options.file else [])]
    table = []
    with threadpool_limits(options.threads):
        for kind in kinds:
            for dim, total, clusters in ROWS:
                if f"{dim}:{clusters}" not in options.rows:
                    continue
                row = measure(kind, dim, int(total * options.scale), max(16, int(clusters * options.scale)), options)
                if (dim, clusters) in TWO_THREADS and kind == kinds[0]:
                    row["two threads"] = two_threads(kind, row, options.repeat)
                table.append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
                _save(options, table, None)
    compilation = None if options.no_compile else compile_seconds()
    _save(options, table, compilation)
    print(markdown(table))
    for row in table:
        if "two threads" in row:
            print(f"\ntwo threads, d = {row['d']}, n = {row['n']}: {row['two threads']:.2f} × one")
    if compilation is not None:
        print(
            f"\ncompilation: {compilation['first']:.1f} s, later {compilation['later']:.1f} s", compilation["engine"]
        )


def measure(kind: str, dim: int, total: int, clusters: int, options: argparse.Namespace) -> dict:
    """One row: all engines on the same points."""
    points = make_points(kind, dim, total)
    # What there is of a file decides how much of the row's size is left.
    clusters, total = max(2, clusters * len(points) // total), len(points)
    threads = options.threads
    generator = torch.Generator().manual_seed(0)
    start = points[torch.randperm(total, generator=generator)[:clusters]]
    yardstick, exact = reference(kind, points, start, options)

    objectives: list[float] = [_cluster(points, clusters, 0, threads)[2]]
    centroids, _, final, _ = _cluster(
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
    times: dict[str, list[float]] = {"faiss": [], "sklearn": [], "ours": []}
    for repeat in range(options.repeat):
        times["faiss"].append(_seconds(lambda: index.search(queries.numpy(), 1)) * total / count * ITERATIONS)
        if iterations is not None:
            times["ours"].append(_seconds(lambda: _cluster(points, clusters, iterations, threads)))
        if clusters * len(few) <= PAIRS and (repeat == 0 or clusters <= 4096):
            spent = [_seconds(lambda i=i: _sklearn(few, clusters, i)) for i in (1, more)]
            times["sklearn"].append((spent[1] - spent[0]) / (more - 1) * total / len(few) * ITERATIONS)
    seconds = {engine: statistics.median(spent) if spent else None for engine, spent in times.items()}

    codes = cpu.assign(points, centroids, threads=threads)[0][sample]
    best = torch.from_numpy(index.search(queries.numpy(), 1)[1][:, 0])
    return {
        "points": os.path.basename(kind),
        "d": dim,
        "N": total,
        "n": clusters,
        "faiss": seconds["faiss"],
        "sklearn": seconds["sklearn"],
        "ours": seconds["ours"],
        "ratio": seconds["faiss"] / seconds["ours"] if seconds["ours"] else None,
        "iterations": iterations,
        "objective": final / yardstick,
        "exact yardstick": exact,
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


def reference(kind: str, points: torch.Tensor, start: torch.Tensor, options: argparse.Namespace) -> tuple[float, bool]:
    """The yardstick's objective, after 20 updates, each followed by an assignment, and whether these were exact."""
    (total, dim), clusters = points.shape, len(start)
    key = f"{os.path.basename(kind)} d={dim} N={total} n={clusters}"
    known = _load("kmeans_reference").get("objectives", {})
    near = options.near_reference and dim > 6
    if not options.reference:
        if key in known:
            return known[key], True
        key += " near" if near else ""
        if key in known:
            return known[key], False
    threads = os.cpu_count() or 1
    if near:
        objective = cpu.lloyd_cells(points, len(start), None, start, ITERATIONS, 0.0, 0, threads, None)[2]
    else:
        objective = exact_lloyd(points, start, threads)
    if options.scale == 1:
        settings = {"iterations": ITERATIONS, "start": "random points"}
        write_results("kmeans_reference", {"settings": settings, "objectives": {**known, key: objective}})
    return objective, not near


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


def two_threads(kind: str, row: dict, repeat: int) -> float:
    """How many times faster a whole run is with two threads than with one."""
    points = make_points(kind, row["d"], row["N"])
    times: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(repeat):
        for threads, spent in times.items():
            spent.append(_seconds(lambda threads=threads: _cluster(points, row["n"], ITERATIONS, threads)))
    return statistics.median(times[1]) / statistics.median(times[2])


def compile_seconds() -> dict[str, float | str]:
    """What the first call of a process takes longer than the second: without a cache of compiled code, and with it."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
        command = [sys.executable, "-c", COMPILE]
        outputs = [
            subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.split()
            for _ in range(2)
        ]
    return {"first": float(outputs[0][0]), "later": float(outputs[1][0]), "engine": outputs[0][1]}


def markdown(table: list[dict]) -> str:
    lines = [
        "| points | d | N | n | faiss, 20 its, s | sklearn, 20 its, s | ours to reach, s | faiss / ours | its "
        "| objective at 20 its / yardstick | assign excess |",
        "|---|" + "---:|" * 10,
    ]
    for row in table:
        sklearn = f"{row['sklearn']:,.0f}" if row["sklearn"] is not None else "too slow"
        ours = ("not reached", "", "")
        if row["iterations"] is not None:
            ours = (f"{row['ours']:.2f}", f"{row['ratio']:.0f}", str(row["iterations"]))
        cells = [row["points"], str(row["d"]), f"{row['N']:,}", f"{row['n']:,}", f"{row['faiss']:,.1f}", sklearn]
        cells += [
            *ours,
            f"{row['objective']:.4f}{'' if row['exact yardstick'] else ' (near)'}",
            f"{row['excess']:.1e}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cluster(
    points: torch.Tensor,
    clusters: int,
    iterations: int,
    threads: int,
    progress: Callable[[int, float], None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, float, int]:
    return cpu.lloyd_cells(points, clusters, None, None, iterations, 0.0, 0, threads, progress)


def _sklearn(points: torch.Tensor, clusters: int, iterations: int) -> None:
    start = points[:clusters].numpy()
    KMeans(clusters, init=start, n_init=1, max_iter=iterations, tol=0, algorithm="lloyd").fit(points.numpy())


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _error(points: torch.Tensor, centroids: torch.Tensor, codes: torch.Tensor) -> float:
    return float((points.double() - centroids[codes].double()).square().sum())


def _load(name: str) -> dict:
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results", f"{name}.json")
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def _save(options: argparse.Namespace, table: list[dict], compilation: dict | None) -> None:
    if options.scale != 1:
        return
    known = _load("kmeans_speed")
    settings = {"threads": options.threads, "repeat": options.repeat, "iterations": ITERATIONS}
    rows = known.get("rows", {}) if known.get("settings") == settings else {}
    rows.update({f"{row['points']} d={row['d']} N={row['N']} n={row['n']}": row for row in table})
    libraries = ("faiss-cpu", "scikit-learn", "numba", "numpy")
    content = {
        "settings": settings,
        "rows": rows,
        "compilation": compilation or known.get("compilation"),
        "libraries": {name: importlib.metadata.version(name) for name in libraries},
        "processor": llvmlite.binding.get_host_cpu_name(),
    }
    write_results("kmeans_speed", content)


if __name__ == "__main__":
    main()
