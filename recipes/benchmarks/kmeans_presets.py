"""What the presets of K-means cost and give: time and objective over 20 iterations from random vectors, same engine.

    python recipes/benchmarks/kmeans_presets.py

Points are those of kmeans_speed.py: random bf16 weights with outlier channels, and Gaussian. All runs
of a row are interleaved, medians of `--repeat`. Targets: `default` reaches the objective of the 20 iterations in at
most half their time. Writes results/kmeans_presets.json.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from kmeans_speed import make_points
from memory import write_results

from cluscomp_peft import kmeans
from cluscomp_peft.clustering import QUALITIES

ROWS = ((2, 2_000_000, 1024), (4, 2_000_000, 4096), (4, 4_000_000, 32768), (6, 2_000_000, 16384))
ROWS += ((8, 1_000_000, 8192), (16, 500_000, 8192))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="shrinks N and n; nothing is written then")
    options = parser.parse_args()
    runs = {"random, 20": {"init": "random", "iterations": 20, "tolerance": 0.0}}
    runs |= {name: {"quality": name} for name in QUALITIES}
    table = []
    print("| points | d | N | n | " + " | ".join(f"{name}: time, objective, its" for name in runs) + " |")
    print("|---|" + "---:|" * (3 + len(runs)))
    for kind in ("weights", "gaussian"):
        for dim, total, clusters in ROWS:
            total, clusters = int(total * options.scale), int(clusters * options.scale)
            points = make_points(kind, dim, total)
            kmeans(points[:50_000], 1000, iterations=2)  # compiled and read from the cache
            infos = {name: [] for name in runs}
            for _ in range(options.repeat):
                for name, settings in runs.items():
                    infos[name].append(kmeans(points, clusters, engine="cpu", **settings)[2])
            seconds = {name: statistics.median(info.seconds for info in found) for name, found in infos.items()}
            row = {"points": kind, "d": dim, "N": total, "n": clusters, "runs": {}}
            for name, found in infos.items():
                row["runs"][name] = {
                    "seconds": seconds[name],
                    "time": seconds[name] / seconds["random, 20"],
                    "objective": found[0].objective / infos["random, 20"][0].objective,
                    "iterations": found[0].iterations,
                }
            table.append(row)
            cells = [f"{run['time']:.2f}, {run['objective']:.4f}, {run['iterations']}" for run in row["runs"].values()]
            print(f"| {kind} | {dim} | {total:,} | {clusters:,} | " + " | ".join(cells) + " |", flush=True)
    if options.scale == 1:
        settings = {"repeat": options.repeat, "threads": torch.get_num_threads()}
        write_results("kmeans_presets", {"settings": settings, "rows": table})


if __name__ == "__main__":
    main()
