"""Training steps at full size, on random weights. Two parts of suite.py.

    training    the shape of Llama-3-8B, one sequence of 1024 tokens, gradient checkpointing, AdamW: codes at 4, 3 and
                2 bits against LoRA r 16 on bf16 and on NF4 (if bitsandbytes is installed) and dense bf16, forward and
                backward alone
    large       the shape of Llama-2-70B: 2 bits where torch may take 24 GiB, 4 bits where it may take 48 GiB (the
                context of CUDA, some 0.5 GiB, is not counted)

A plain loop in torch: no TRL, no data sets. `peak` is max_memory_allocated with the model, `reserved` what the
allocator took from the device, `forecast` what `cluscomp_peft.plan` says of the peak. `busy` is the time of the
kernels in a step, from torch's profiler: what is missing to the step's seconds, the device waits for Python.
OUTPUT/profiles.txt has the kernels of every method.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from random_models import (
    SHAPES,
    Shape,
    available,
    bits_of,
    build,
    forecast_training,
    name_of,
    prepare,
    random_tokens,
    train_step,
)
from report import Report, one_line
from timing import forget_peak, is_cuda, peaks, synchronize, timed
from torch.profiler import ProfilerActivity, profile

STEPS = 5
METHODS = ["lora", "cluscomp-4", "cluscomp-2", "nf4", "cluscomp-3", "dense"]
LARGE = (("cluscomp-2", 24), ("cluscomp-4", 48))  # GiB
GIB = 1 << 30


def training(report: Report, options: argparse.Namespace) -> None:
    """Rows of training steps at 8B."""
    shape = SHAPES["Llama-3-8B"].scaled(options.scale)
    for method in available(options.methods or METHODS):
        report.run(trained_name(method), lambda method=method: train(shape, method, options), line)
        forget_peak(options.device)
    compare(report)


def large(report: Report, options: argparse.Namespace) -> None:
    """Rows of training steps at 70B where memory is short."""
    shape = SHAPES["Llama-2-70B"].scaled(options.scale)
    for method, gib in LARGE:
        report.run(
            f"70B {name_of(method)} in {gib} GiB", lambda m=method, gib=gib: limited(shape, m, gib, options), line
        )
        forget_peak(options.device)


def trained_name(method: str) -> str:
    return "dense bf16, no optimizer" if method == "dense" else name_of(method)


def limited(shape: Shape, method: str, gib: int, options: argparse.Namespace) -> dict:
    """As [`train`], where torch may take so much of the device."""
    if is_cuda(options.device):
        total = torch.cuda.get_device_properties(options.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / total))
    try:
        return {"limit": gib * GIB, **train(shape, method, options)}
    finally:
        if is_cuda(options.device):
            torch.cuda.set_per_process_memory_fraction(1.0)


def train(shape: Shape, method: str, options: argparse.Namespace) -> dict:
    """A few steps; the first counts for memory but not for time."""
    device = options.device
    forget_peak(device)
    started = time.perf_counter()
    model = build(shape, method, device)
    synchronize(device)
    built = time.perf_counter() - started
    model, optimizer = prepare(model, method, checkpointing=True)
    if method == "dense":
        optimizer = None
    synchronize(device)
    prepared = time.perf_counter() - started - built
    building = peaks(device)
    forget_peak(device)
    length = min(options.length, max(16, round(options.length * options.scale)))
    tokens = random_tokens(shape, options.batch, length, device)
    times = [timed(lambda: train_step(model, optimizer, tokens), device) for _ in range(STEPS)]
    step = statistics.median(times[1:])
    used = peaks(device)
    return {
        "method": method,
        "bits": bits_of(method),
        "seconds": step,
        "first step": times[0],
        "tokens per second": tokens.numel() / step,
        **used,
        "forecast": forecast_training(shape, method, length, device=device, checkpointing=True, batch=options.batch),
        "trained": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "built in": built,
        "prepared in": prepared,
        "peak of building": building["peak"],
        "busy": busy(model, optimizer, tokens, method, options),
    }


def busy(model: Any, optimizer: Any, tokens: torch.Tensor, method: str, options: argparse.Namespace) -> float | None:
    """Seconds that the device's kernels take in a step; None where the profiler cannot see them."""
    if not is_cuda(options.device):
        return None
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            train_step(model, optimizer, tokens)
            torch.cuda.synchronize()
        averages = found.key_averages()
        with open(Path(options.output) / "profiles.txt", "a", encoding="utf-8") as file:
            table = averages.table(sort_by="self_device_time_total", row_limit=25, max_name_column_width=60)
            file.write(f"{options.part}, {method}\n{table}\n")
        return sum(row.self_device_time_total for row in averages) / 1e6
    except Exception as error:  # the row is worth having without it
        print(f"no profile: {one_line(error)}")
        return None


def compare(report: Report) -> None:
    """Steps and memory of codes as multiples of the others'."""
    rows = {row["method"]: row for row in report.rows if "seconds" in row and "error" not in row}
    ratios = {
        f"{method} / {other}": {
            key: rows[method][key] / rows[other][key] for key in ("seconds", "peak") if rows[other][key]
        }
        for other in ("nf4", "lora", "dense")
        for method in rows
        if other in rows and method.startswith("cluscomp")
    }
    report.note(ratios=ratios)
    for name, ratio in ratios.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.2f}" for key, value in ratio.items()))


def line(row: dict) -> str:
    memory = [f"{name} {row[name] / GIB:.2f}" for name in ("peak", "reserved", "forecast", "limit") if row.get(name)]
    spent = f"{row['seconds']:.3f} s a step" + (f", busy {row['busy']:.3f}" if row["busy"] else "")
    return f"{spent}, {row['tokens per second']:.0f} tokens/s" + (f", GiB: {', '.join(memory)}" if memory else "")
