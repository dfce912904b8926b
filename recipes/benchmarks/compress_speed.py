"""Clusters every matrix of a random Llama: minutes, peak memory, and whether the estimate on the way was true.

    python recipes/benchmarks/compress_speed.py                    # the shape of Llama-3.2-1B at 3 bits

Matrices are random bf16, made one by one and dropped once clustered, as many at once as there are threads; settings
come from `--bits` as in `cluscomp compress`. The estimate is time so far / share of the weights done, taken after a
tenth, a quarter and half of the weights, over the time that it took in the end. Writes results/compress_speed.json.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

import torch
from memory import read_status, write_results
from tqdm import tqdm

from cluscomp_peft.compress.policy import Policy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=float, default=3.0)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=8192)
    parser.add_argument("--kv", type=int, default=512, help="outputs of k_proj and v_proj")
    parser.add_argument("--quality", default="default")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    hidden, wide, kv = options.hidden, options.intermediate, options.kv
    layer = [(hidden, hidden)] * 2 + [(kv, hidden)] * 2 + [(wide, hidden)] * 2 + [(hidden, wide)]
    shapes = layer * options.layers
    total = sum(out_features * in_features for out_features, in_features in shapes)

    cluster(shapes[2], 0, options)  # compiled before anything is timed
    before, started = read_status("VmRSS"), time.perf_counter()
    done, stored, square, norm = 0, 0.0, 0.0, 0.0
    marks = {0.1: None, 0.25: None, 0.5: None}
    with ThreadPoolExecutor(options.threads) as pool, tqdm(total=total, unit="weight", unit_scale=True) as bar:
        jobs, waiting = set(), list(enumerate(shapes))
        while waiting or jobs:
            while waiting and len(jobs) < options.threads:
                number, shape = waiting.pop(0)
                jobs.add(pool.submit(cluster, shape, number, options))
            finished, jobs = wait(jobs, return_when=FIRST_COMPLETED)
            for job in finished:
                weights, bits, error, energy = job.result()
                done, stored, square, norm = done + weights, stored + weights * bits, square + error, norm + energy
                bar.update(weights)
                for share in marks:
                    if marks[share] is None and done >= share * total:
                        marks[share] = (time.perf_counter() - started) * total / done
    seconds = time.perf_counter() - started
    row = {
        "weights": total,
        "matrices": len(shapes),
        "minutes": seconds / 60,
        "true_bits": stored / total,
        "relative_error": (square / norm) ** 0.5,
        "peak_bytes": read_status("VmHWM") - before,
        "estimate / truth": {share: estimate / seconds for share, estimate in marks.items() if estimate},
    }
    print("| weights | matrices | minutes | true bits | relative error | peak, MB | estimate / truth |")
    print("|---:|---:|---:|---:|---:|---:|---|")
    estimates = ", ".join(f"{value:.2f} at {share:.0%}" for share, value in row["estimate / truth"].items())
    print(
        f"| {total / 1e6:.0f} M | {len(shapes)} | {row['minutes']:.1f} | {row['true_bits']:.3f} "
        f"| {row['relative_error']:.4f} | {row['peak_bytes'] / 1e6:.0f} | {estimates} |"
    )
    write_results("compress_speed", {"settings": vars(options), "row": row})


@torch.no_grad()
def cluster(shape: tuple[int, int], number: int, options: argparse.Namespace) -> tuple[int, float, float, float]:
    """Weights, true bits, squared error and squared norm of one random matrix."""
    out_features, in_features = shape
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(number)).mul_(0.02).bfloat16()
    policy = Policy(bits=options.bits, quality=options.quality)
    layer = policy.cluster("matrix", weight, policy.spec_for("matrix", out_features, in_features), threads=1)
    error = float((layer.decode(torch.float32) - weight).square().sum())
    return weight.numel(), layer.true_bits, error, float(weight.float().square().sum())


if __name__ == "__main__":
    main()
