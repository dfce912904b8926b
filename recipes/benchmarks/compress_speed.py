"""How long does clustering a model take, what does it hold, and is the estimate on the way true?

    python recipes/benchmarks/compress_speed.py                    # the shape of Llama-3.2-1B at 3 bits

Matrices are random bf16, made one by one and dropped once clustered, as many at once as there are threads; settings
come from `--bits` as in `cluscomp compress`, each number of bits in a process of its own. The estimate is the time so
far / share of the weights done, taken after a tenth, a quarter and half of the weights, over the time that it took in
the end.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

import torch
from harness import Results, Row, answer, arguments, child, settings_of, table
from random_models import Shape, add_shape, shape_of
from timing import read_status
from tqdm import tqdm

from cluscomp_peft.compress.policy import Policy

SHAPE = Shape(hidden=2048, intermediate=8192, layers=16, heads=32, kv_heads=8, vocab=128256)


def main() -> None:
    parser = arguments(__doc__, "compress_speed")
    add_shape(parser, SHAPE)
    parser.add_argument("--bits", type=float, nargs="+", default=[3.0])
    parser.add_argument("--quality", default="default")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    if answer(options, lambda job: measure(job["bits"], options)):
        return
    settings = settings_of(options)
    del settings["bits"]
    results = Results(options.results, settings, options.fresh)
    rows = results.complete([{"bits": bits} for bits in options.bits], lambda job: child(__file__, job))
    columns = {
        "bits": "{bits:g}",
        "weights": lambda row: f"{row['weights'] / 1e6:.0f} M",
        "matrices": "{matrices}",
        "minutes": "{minutes:.1f}",
        "true bits": "{true_bits:.3f}",
        "relative error": "{relative_error:.4f}",
        "peak, MB": lambda row: f"{row['peak_bytes'] / 1e6:.0f}",
        "estimate / truth": lambda row: ", ".join(
            f"{value:.2f} at {float(share):.0%}" for share, value in row["estimate / truth"].items()
        ),
    }
    print(table(rows, columns))


def measure(bits: float, options: argparse.Namespace) -> Row:
    """Clusters every matrix once."""
    shape = shape_of(options)
    sizes = shape.matrices() * shape.layers
    total = sum(in_features * out_features for in_features, out_features in sizes)
    cluster(min(sizes), 0, bits, options.quality)  # compiled before anything is timed
    before, started = read_status("VmRSS"), time.perf_counter()
    done, stored, square, norm = 0, 0.0, 0.0, 0.0
    marks: dict[float, float | None] = {0.1: None, 0.25: None, 0.5: None}
    with ThreadPoolExecutor(options.threads) as pool, tqdm(total=total, unit="weight", unit_scale=True) as bar:
        jobs, waiting = set(), list(enumerate(sizes))
        while waiting or jobs:
            while waiting and len(jobs) < options.threads:
                number, size = waiting.pop(0)
                jobs.add(pool.submit(cluster, size, number, bits, options.quality))
            finished, jobs = wait(jobs, return_when=FIRST_COMPLETED)
            for job in finished:
                weights, true_bits, error, energy = job.result()
                done, stored, square, norm = (
                    done + weights,
                    stored + weights * true_bits,
                    square + error,
                    norm + energy,
                )
                bar.update(weights)
                for share in marks:
                    if marks[share] is None and done >= share * total:
                        marks[share] = (time.perf_counter() - started) * total / done
    seconds = time.perf_counter() - started
    return {
        "weights": total,
        "matrices": len(sizes),
        "minutes": seconds / 60,
        "true_bits": stored / total,
        "relative_error": (square / norm) ** 0.5,
        "peak_bytes": read_status("VmHWM") - before,
        "estimate / truth": {str(share): estimate / seconds for share, estimate in marks.items() if estimate},
    }


@torch.no_grad()
def cluster(size: tuple[int, int], number: int, bits: float, quality: str) -> tuple[int, float, float, float]:
    """Weights, true bits, squared error and squared norm of one random matrix, (in, out)."""
    in_features, out_features = size
    generator = torch.Generator().manual_seed(number)
    weight = torch.randn(out_features, in_features, generator=generator).mul_(0.02).bfloat16()
    policy = Policy(bits=bits, quality=quality)
    layer = policy.cluster("matrix", weight, policy.spec_for("matrix", out_features, in_features), threads=1)
    error = float((layer.decode(torch.float32) - weight).square().sum())
    return weight.numel(), layer.true_bits, error, float(weight.float().square().sum())


if __name__ == "__main__":
    main()
