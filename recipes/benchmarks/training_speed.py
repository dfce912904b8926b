"""What do a training step and one token take, in seconds and memory, against dense bf16 and QLoRA? On any device.

    python recipes/benchmarks/training_speed.py                                                  # CPU; minutes
    python recipes/benchmarks/training_speed.py --device cuda --checkpointing off on --results training_speed_cuda
    python recipes/benchmarks/training_speed.py --hidden 64 --layers 1 --length 16 --results -   # for a try

The model is a random Llama of 170 M parameters (see random_models.py for what the methods are: dense bf16 trained
whole, NF4 + LoRA r 16, random codes at 4, 3 and 2 true bits); a step is forward, backward and AdamW on one sequence.

step        seconds. All methods are in one process and take turns; the median of the rounds. Ratios are taken within
            rounds, then their median: what else the machine does hits both alike.
peak        bytes of two steps, model included, each method in a process of its own. CPU: how far the most memory the
            process ever held (VmHWM) lies above what it held after imports and a step of one block on 64 tokens, which
            compiles what is compiled at first use. CUDA: max_memory_allocated.
live        the same with freed memory going back to the system at once (MALLOC_MMAP_THRESHOLD_=65536). glibc keeps
            hundreds of MB of it by default, and how many is an accident; this is what the job itself holds.
forecast    what `cluscomp_peft.plan` says of `live` (CUDA: of `peak`), without running; see `forecast_training`.
token       seconds of a forward pass of one token with a cache of 16, as in generation; the models as they are served,
            without adapters, taking turns. `linears`: the linear layers of the blocks alone, one after another.
            bitsandbytes fetches its kernel for CPUs with AVX512 from the hub by the package `kernels`, and says so
            where it cannot; NF4 then decodes the weight for every token.

The targets on a CPU stand below the table. The rows of the results are what was measured; "summary" there has what the
table shows, and "targets" what stands below it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Any

import torch
from harness import Results, Row, answer, arguments, child, interleaved, ratio, settings_of, table
from random_models import (
    Shape,
    add_shape,
    available,
    bits_of,
    build,
    forecast_training,
    name_of,
    prepare,
    random_tokens,
    shape_of,
    small,
    train_step,
)
from timing import forget_peak, is_cuda, peaks, read_status, return_memory
from transformers import DynamicCache

from cluscomp_peft import ClusCompConfig, ClusteredLinear

SHAPE = Shape(hidden=1024, intermediate=2816, layers=12, heads=16, kv_heads=16, vocab=8192)
METHODS = ["dense", "nf4", "cluscomp-4", "cluscomp-3", "cluscomp-2"]
PREFIX = 16  # tokens in the cache when a token is timed
# (figure of a row, what it is to stay under, of which other method)
TARGETS = (
    ("step", 1.15, "nf4"),
    ("step", 1.10, "dense"),
    ("peak", 1.00, "nf4"),
    ("live", 1.00, "nf4"),
    ("token", 0.80, "dense"),
)
FORECAST_ERROR = 0.10


def main() -> None:
    parser = arguments(__doc__, "training_speed")
    add_shape(parser, SHAPE)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="METHOD", help="dense, nf4, cluscomp-BITS")
    parser.add_argument("--rank", type=int, default=ClusCompConfig.rank, help="of ClusComp")
    parser.add_argument("--checkpointing", nargs="+", choices=("off", "on"), default=["off"], help="of gradients")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of every method")
    parser.add_argument("--token-rounds", type=int, default=30, help="timed tokens of every method")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if answer(options, lambda job: {"bytes": measure_peak(job["method"], job["checkpointing"], options)}):
        return
    options.methods = available(options.methods)
    settings = settings_of(options)
    del settings["methods"], settings["checkpointing"]  # rows say them
    results = Results(options.results, settings, options.fresh)
    rows = [row for mode in options.checkpointing for row in measure_steps(mode == "on", results, options)]
    (tokens,) = results.complete(
        [{"figure": "token", "methods": options.methods}], lambda _: {"times": time_tokens(options)}
    )
    for figure, times in tokens["times"].items():
        for start in range(0, len(rows), len(options.methods)):
            add_ratios(rows[start : start + len(options.methods)], figure, times)
    verdicts = judge(rows)
    print(as_table(rows))
    print_verdicts(verdicts)
    results.note(summary=rows, targets=verdicts)


# -- memory


def measure_steps(checkpointing: bool, results: Results, options: argparse.Namespace) -> list[Row]:
    """A row of the table for every method: memory of a step, measured and foretold, and its time."""
    figures = ["peak"] if is_cuda(options.device) else ["peak", "live"]
    jobs = [
        {"figure": figure, "method": method, "checkpointing": checkpointing}
        for method in options.methods
        for figure in figures
    ]
    found = results.complete(jobs, child_peak)
    if results.failed:
        raise SystemExit(f"{len(results.failed)} measurements of memory failed; the same call tries them again.")
    used = {(row["method"], row["figure"]): row["bytes"] for row in found}
    rows = [
        {
            "method": method,
            "name": name_of(method) + ", checkpoints" * checkpointing,
            "checkpointing": checkpointing,
            "peak": used[method, "peak"],
            "live": used.get((method, "live")),
            "forecast": forecast_training(
                shape_of(options),
                method,
                options.length,
                device=options.device,
                checkpointing=checkpointing,
                batch=options.batch,
                rank=options.rank,
            ),
        }
        for method in options.methods
    ]
    (steps,) = results.complete(
        [{"figure": "step", "methods": options.methods, "checkpointing": checkpointing}],
        lambda _: {"times": time_steps(checkpointing, options)},
    )
    return add_ratios(rows, "step", steps["times"])


def child_peak(job: Row) -> Row:
    """Bytes of the peak that a process of its own measures; of "live" it gives memory back to the system as soon as
    it is freed, where that takes asking for (a CPU under glibc).
    """
    return child(__file__, job, environment={"MALLOC_MMAP_THRESHOLD_": "65536"} if job["figure"] == "live" else None)


def measure_peak(method: str, checkpointing: bool, options: argparse.Namespace) -> int | None:
    """Bytes of two training steps; None where the system does not tell."""
    for shape, length in ((small(shape_of(options)), 64), (shape_of(options), options.length)):
        before = start_peak(options.device)
        model, optimizer = prepare(build(shape, method, options.device), method, checkpointing, rank=options.rank)
        return_memory()  # what making random weights left behind
        tokens = random_tokens(shape, options.batch, length, options.device)
        for _ in range(2):
            train_step(model, optimizer, tokens)
        del model, optimizer
    if is_cuda(options.device):
        return peaks(options.device)["peak"]
    return None if before is None else read_status("VmHWM") - before


def start_peak(device: str) -> int | None:
    """Resident bytes before a job, freed memory given back to the system; None where the system does not tell."""
    if is_cuda(device):
        forget_peak(device)
        return None
    return_memory()
    return read_status("VmRSS") if sys.platform == "linux" else None


# -- time


def time_steps(checkpointing: bool, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of a training step of every method in every round."""
    shape = shape_of(options)
    tokens = random_tokens(shape, options.batch, options.length, options.device)
    jobs = {}
    for method in options.methods:
        model = build(shape, method, options.device)
        model, optimizer = prepare(model, method, checkpointing, rank=options.rank)
        jobs[method] = lambda model=model, optimizer=optimizer: train_step(model, optimizer, tokens)
    return interleaved(jobs, options.device, options.rounds)


@torch.no_grad()
def time_tokens(options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Seconds of one token of every method in every round: of whole models, and of their blocks' linear layers."""
    forget_peak(options.device)  # what the training steps held
    shape = shape_of(options)
    models = {method: build(shape, method, options.device) for method in options.methods}
    token = random_tokens(shape, 1, 1, options.device)
    wholes = {method: next_token(model, token, shape, options) for method, model in models.items()}
    linears = {method: all_linears(model) for method, model in models.items()}
    return {
        "token": interleaved(wholes, options.device, options.token_rounds),
        "linears": interleaved(linears, options.device, options.token_rounds),
    }


def next_token(model: Any, token: torch.Tensor, shape: Shape, options: argparse.Namespace) -> Any:
    """A job that runs `token` through the model after a prefix, which stays as long as it is."""
    cache = DynamicCache(config=model.config)
    model(input_ids=random_tokens(shape, 1, PREFIX, options.device), past_key_values=cache, use_cache=True)

    @torch.no_grad()
    def job() -> None:
        model(input_ids=token, past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return job


def all_linears(model: Any) -> Any:
    """A job that runs one token through every linear layer of the blocks, each with an input of its own width."""
    layers = [
        module
        for name, module in model.named_modules()
        if ".layers." in name and isinstance(module, (torch.nn.Linear, ClusteredLinear))
    ]
    inputs = {
        layer.in_features: torch.randn(1, layer.in_features, dtype=torch.bfloat16, device=model.device)
        for layer in layers
    }

    @torch.no_grad()
    def job() -> None:
        for layer in layers:
            layer(inputs[layer.in_features])

    return job


# -- what came out


def add_ratios(rows: list[Row], figure: str, times: dict[str, list[float]]) -> list[Row]:
    """Adds the median of a figure and its ratios to the other methods, both over rounds."""
    for row in rows:
        own = times[row["method"]]
        row[figure] = statistics.median(own)
        for other in ("dense", "nf4"):
            if other in times:
                row[f"{figure} / {other}"] = ratio(own, times[other])
    return rows


def as_table(rows: list[Row]) -> str:
    def scaled(key: str, factor: float) -> Any:
        return lambda row: "" if row.get(key) is None else f"{row[key] * factor:.1f}"

    columns = {
        "": "{name}",
        "step, s": "{step:.3g}",
        "step / NF4": "{step / nf4:.2f}",
        "step / dense": "{step / dense:.2f}",
        "peak, MB": scaled("peak", 1e-6),
        "live, MB": scaled("live", 1e-6),
        "forecast, MB": scaled("forecast", 1e-6),
        "token, ms": scaled("token", 1e3),
        "token / dense": "{token / dense:.2f}",
        "token / NF4": "{token / nf4:.2f}",
        "linears, ms": scaled("linears", 1e3),
        "linears / dense": "{linears / dense:.2f}",
    }
    return table(rows, columns)


def judge(rows: list[Row]) -> list[Row]:
    """Holds every clustered row against the targets."""
    verdicts = []
    for row in rows:
        if bits_of(row["method"]) is None:
            continue
        same = {other["method"]: other for other in rows if other["checkpointing"] == row["checkpointing"]}
        for figure, limit, other in TARGETS:
            if other not in same or row[figure] is None or same[other][figure] is None:
                continue
            value = row.get(f"{figure} / {other}", row[figure] / same[other][figure])
            verdicts.append({"row": row, "target": f"{figure} / {name_of(other)}", "limit": limit, "value": value})
        measured = row["peak"] if row["live"] is None else row["live"]
        if row["forecast"] is not None and measured is not None:
            value = abs(row["forecast"] / measured - 1)
            verdicts.append({"row": row, "target": "forecast, error", "limit": FORECAST_ERROR, "value": value})
    for verdict in verdicts:
        row = verdict.pop("row")
        verdict.update({key: row[key] for key in ("method", "name", "checkpointing")})
        verdict["met"] = verdict["value"] <= verdict["limit"]
    return verdicts


def print_verdicts(verdicts: list[Row]) -> None:
    print()
    for verdict in verdicts:
        result = f"target {verdict['limit']:.2f}  {'met' if verdict['met'] else 'missed'}"
        print(f"{verdict['name']:<28}{verdict['target']:<26}{verdict['value']:>7.2f}  {result}")


if __name__ == "__main__":
    main()
