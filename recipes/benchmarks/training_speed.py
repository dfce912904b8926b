"""Seconds and memory of a training step, and of one token, against dense bf16 and QLoRA, on whatever device.

    python recipes/benchmarks/training_speed.py                                       # CPU; minutes
    python recipes/benchmarks/training_speed.py --device cuda --checkpointing off on
    python recipes/benchmarks/training_speed.py --hidden 64 --layers 1 --length 16    # for a try; numbers mean nothing

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

The targets on a CPU stand below the table. Writes results/training_speed.json.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
from typing import Any

import torch
from memory import read_status, write_results
from random_models import (
    Shape,
    available,
    bits_of,
    build,
    forecast_training,
    name_of,
    prepare,
    random_tokens,
    small,
    train_step,
)
from timing import forget_peak, interleaved, is_cuda, peaks, ratio
from transformers import DynamicCache

from cluscomp_peft import ClusCompConfig, ClusteredLinear

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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2816)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="METHOD", help="dense, nf4, cluscomp-BITS")
    parser.add_argument("--rank", type=int, default=ClusCompConfig.rank, help="of ClusComp")
    parser.add_argument("--checkpointing", nargs="+", choices=("off", "on"), default=["off"], help="of gradients")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of every method")
    parser.add_argument("--token-rounds", type=int, default=30, help="timed tokens of every method")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", default="training_speed", help="name of the file under results/; - for none")
    parser.add_argument("--job", help="used by the script itself: the method whose peak to measure")
    options = parser.parse_args()
    if options.job is not None:
        print(json.dumps(measure_peak(options.job, options.checkpointing[0] == "on", options)))
        return
    options.methods = available(options.methods)
    rows = []
    for checkpointing in options.checkpointing:
        on = checkpointing == "on"
        found = [
            {
                "method": method,
                "checkpointing": on,
                "peak": child_peak(method, checkpointing, options),
                "live": child_peak(method, checkpointing, options, exact=True),
                "forecast": forecast_training(
                    shape_of(options),
                    method,
                    options.length,
                    device=options.device,
                    checkpointing=on,
                    batch=options.batch,
                    rank=options.rank,
                ),
            }
            for method in options.methods
        ]
        rows += add_ratios(found, "step", time_steps(on, options))
    for figure, times in time_tokens(options).items():
        for start in range(0, len(rows), len(options.methods)):
            add_ratios(rows[start : start + len(options.methods)], figure, times)
    for row in rows:
        row["name"] = name_of(row["method"])
    print_table(rows)
    verdicts = judge(rows)
    print_verdicts(verdicts)
    if options.results != "-":
        write_results(options.results, {"settings": vars(options), "rows": rows, "targets": verdicts})


def shape_of(options: argparse.Namespace) -> Shape:
    return Shape(options.hidden, options.intermediate, options.layers, options.heads, options.kv_heads, options.vocab)


# -- memory


def child_peak(method: str, checkpointing: str, options: argparse.Namespace, exact: bool = False) -> int | None:
    """The peak that a process of its own measures; it gets this process's flags. `exact`: it gives memory back to the
    system as soon as it is freed, where that takes asking for (a CPU under glibc).
    """
    if exact and is_cuda(options.device):
        return None
    command = [sys.executable, __file__, *sys.argv[1:], "--checkpointing", checkpointing, "--job", method]
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536"} if exact else {}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings})
    if done.returncode != 0:
        raise SystemExit(f"measuring the memory of {method} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure_peak(method: str, checkpointing: bool, options: argparse.Namespace) -> int | None:
    """Bytes of two training steps; None where the system does not tell."""
    for shape, length in ((small(shape_of(options)), 64), (shape_of(options), options.length)):
        before = start_peak(options.device)
        model, optimizer = prepare(build(shape, method, options.device), method, checkpointing, rank=options.rank)
        give_back(options.device)  # what making random weights left behind
        tokens = random_tokens(shape, options.batch, length, options.device)
        for _ in range(2):
            train_step(model, optimizer, tokens)
        del model, optimizer
    if is_cuda(options.device):
        return peaks(options.device)["peak"]
    return None if before is None else read_status("VmHWM") - before


def start_peak(device: str) -> int | None:
    """Resident bytes before a job, with what was freed given back to the system."""
    if is_cuda(device):
        forget_peak(device)
        return None
    if sys.platform != "linux":
        return None
    give_back(device)
    return read_status("VmRSS")


def give_back(device: str) -> None:
    """Returns freed memory to the system."""
    gc.collect()
    if not is_cuda(device) and sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


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


def add_ratios(rows: list[dict], figure: str, times: dict[str, list[float]]) -> list[dict]:
    """Adds the median of a figure and its ratios to the other methods, both over rounds."""
    for row in rows:
        own = times[row["method"]]
        row[figure] = statistics.median(own)
        for other in ("dense", "nf4"):
            if other in times:
                row[f"{figure} / {other}"] = ratio(own, times[other])
    return rows


def print_table(rows: list[dict]) -> None:
    columns = (
        ("step, s", "step", 1),
        ("/ NF4", "step / nf4", 1),
        ("/ dense", "step / dense", 1),
        ("peak, MB", "peak", 1e-6),
        ("live", "live", 1e-6),
        ("forecast", "forecast", 1e-6),
        ("token, ms", "token", 1e3),
        ("/ dense", "token / dense", 1),
        ("/ NF4", "token / nf4", 1),
        ("linears, ms", "linears", 1e3),
        ("/ dense", "linears / dense", 1),
    )
    print(f"{'':<26}" + "".join(f"{title:>13}" for title, _, _ in columns))
    for row in rows:
        name = row["name"] + (", checkpoints" if row["checkpointing"] else "")
        print(f"{name:<26}" + "".join(_cell(row.get(key), factor) for _, key, factor in columns))


def judge(rows: list[dict]) -> list[dict]:
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
        verdict.update(method=row["method"], checkpointing=row["checkpointing"])
        verdict["met"] = verdict["value"] <= verdict["limit"]
    return verdicts


def print_verdicts(verdicts: list[dict]) -> None:
    print()
    for verdict in verdicts:
        name = name_of(verdict["method"]) + (", checkpoints" if verdict["checkpointing"] else "")
        result = "met" if verdict["met"] else "missed"
        print(f"{name:<28}{verdict['target']:<26}{verdict['value']:>7.2f}  target {verdict['limit']:.2f}  {result}")


def _cell(value: float | None, factor: float) -> str:
    return f"{'-':>13}" if value is None else f"{value * factor:>13.3g}" if factor == 1 else f"{value * factor:>13.1f}"


if __name__ == "__main__":
    main()
