"""Training steps and generation at full size, on random weights. Parts of gpu_suite.py.

    training    the shape of Llama-3-8B, one sequence of 1024 tokens, gradient checkpointing, AdamW: codes at 2 and 4
                bits against NF4 + LoRA r 16 (if bitsandbytes is installed) and dense bf16, forward and backward alone
    generation  the same models as they are served: tokens a second at batch 1 and 16, after a prompt of 128, greedily,
                one forward pass a token with a growing cache, nothing compiled
    large       the shape of Llama-2-70B: 2 bits where torch may take 24 GiB, 4 bits where it may take 48 GiB (the
                context of CUDA, some 0.5 GiB, is not counted), five training steps

A plain loop in torch: no TRL, no data sets. `peak` is max_memory_allocated with the model, `reserved` what the
allocator took from the device, `forecast` what `cluscomp_peft.plan` says of the peak. What runs out of memory says so
in its row, and the rest goes on.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
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
from timing import forget_peak, is_cuda, peaks, synchronize, timed
from transformers import DynamicCache

LENGTH = 1024
STEPS = 5
METHODS = ["cluscomp-2", "cluscomp-4", "nf4", "dense"]
BATCHES = (1, 16)
PROMPT, NEW_TOKENS = 128, 64
LARGE = (("cluscomp-2", 24), ("cluscomp-4", 48))  # GiB
GIB = 1 << 30


def training(options: argparse.Namespace) -> list[dict]:
    """Rows of training steps at 8B."""
    shape = SHAPES["Llama-3-8B"].scaled(options.scale)
    print(f"training, {_describe(shape)}")
    rows = []
    for method in available(METHODS):
        rows.append(_guarded(method, lambda method=method: train(shape, method, options), options))
        _print_training(rows[-1])
    return rows


def generation(options: argparse.Namespace) -> list[dict]:
    """Rows of tokens a second at 8B."""
    shape = SHAPES["Llama-3-8B"].scaled(options.scale)
    print(f"generation, {_describe(shape)}")
    rows = []
    for method in available(METHODS):
        rows.append(_guarded(method, lambda method=method: generate(shape, method, options), options))
        speeds = rows[-1].get("tokens per second", {})
        shown = [f"batch {batch}: {speed:.1f} tokens/s" for batch, speed in speeds.items()]
        print(
            f"{name_of(method).removesuffix(' + LoRA r 16'):<20}{rows[-1].get('error') or ', '.join(shown)}",
            flush=True,
        )
    return rows


def large(options: argparse.Namespace) -> list[dict]:
    """Rows of training steps at 70B where memory is short."""
    shape = SHAPES["Llama-2-70B"].scaled(options.scale)
    print(f"large, {_describe(shape)}")
    rows = []
    for method, allowed in LARGE:
        total = torch.cuda.get_device_properties(options.device).total_memory if is_cuda(options.device) else None
        if total is not None:
            forget_peak(options.device)
            torch.cuda.set_per_process_memory_fraction(min(1.0, allowed * GIB / total))
        try:
            row = _guarded(method, lambda method=method: train(shape, method, options), options)
        finally:
            if total is not None:
                torch.cuda.set_per_process_memory_fraction(1.0)
        row["limit"] = allowed * GIB
        rows.append(row)
        _print_training(row)
    return rows


def train(shape: Shape, method: str, options: argparse.Namespace) -> dict:
    """A few steps; the first counts for memory but not for time."""
    device = options.device
    forget_peak(device)
    started = time.perf_counter()
    model, optimizer = prepare(build(shape, method, device), method, checkpointing=True)
    if method == "dense":
        optimizer = None
    synchronize(device)
    built = time.perf_counter() - started
    building = peaks(device)
    forget_peak(device)
    tokens = random_tokens(shape, 1, min(LENGTH, max(16, round(LENGTH * options.scale))), device)
    times = [timed(lambda: train_step(model, optimizer, tokens), device) for _ in range(STEPS)]
    step = statistics.median(times[1:])
    return {
        "seconds": step,
        "tokens per second": tokens.numel() / step,
        **peaks(device),
        "forecast": forecast_training(shape, method, tokens.shape[1], device=device, checkpointing=True),
        "trained": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "built in": built,
        "peak of building": building["peak"],
    }


@torch.no_grad()
def generate(shape: Shape, method: str, options: argparse.Namespace) -> dict:
    """Tokens a second at every batch size."""
    device = options.device
    forget_peak(device)
    model = build(shape, method, device)
    speeds = {}
    for batch in BATCHES:
        cache = DynamicCache(config=model.config)
        tokens = random_tokens(shape, batch, PROMPT, device)
        for step in range(NEW_TOKENS + 2):
            if step == 2:  # the prompt and the first token compile
                synchronize(device)
                started = time.perf_counter()
            output = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            tokens = output.logits[:, -1:].argmax(-1)
        synchronize(device)
        speeds[batch] = batch * NEW_TOKENS / (time.perf_counter() - started)
    return {"tokens per second": speeds, **peaks(device)}


def _guarded(method: str, job: Callable[[], dict], options: argparse.Namespace) -> dict:
    """The row of a job, or of its running out of memory."""
    row: dict[str, Any] = {"method": method, "bits": bits_of(method)}
    try:
        row.update(job())
    except torch.OutOfMemoryError as error:
        row["error"] = f"out of memory: {str(error).split('. ')[1] if '. ' in str(error) else error}"
        row.update(peaks(options.device))
    forget_peak(options.device)
    return row


def _print_training(row: dict) -> None:
    limit = f" of {row['limit'] / GIB:.0f} GiB" if "limit" in row else ""
    memory = " · ".join(
        f"{name} {row[name] / GIB:.2f} GiB" for name in ("peak", "reserved", "forecast") if row.get(name) is not None
    )
    speed = row.get("error") or f"{row['seconds']:.3f} s a step, {row['tokens per second']:.0f} tokens/s"
    print(f"{name_of(row['method']):<20}{speed} · {memory}{limit}", flush=True)


def _describe(shape: Shape) -> str:
    weights = shape.layers * sum(inputs * outputs for inputs, outputs in shape.matrices())
    return f"{shape.layers} blocks of width {shape.hidden}, {weights / 1e9:.3g} B weights in them"
