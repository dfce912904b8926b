"""Tokens a second of a Llama-3-8B of random weights, as it is served. A part of suite.py.

    eager       a forward pass for each token with a growing cache, nothing compiled: Python and its launches show
    graph       one forward pass with a cache of fixed size, captured as a CUDA graph and replayed for each token: what
                the kernels alone take. The tokens are those of the same passes call by call.
    generate    `model.generate(cache_implementation="static")`, for which transformers compiles the model (on CUDA)
    prefill     seconds of a prompt of 2048 tokens

Greedy, after a prompt of 128 tokens, batch 1 and 16.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from random_models import SHAPES, available, bits_of, build, name_of, prepare, random_tokens
from report import Report
from timing import capture, forget_peak, is_cuda, peaks, seconds, synchronize
from transformers import DynamicCache, StaticCache

METHODS = ["dense", "cluscomp-4", "cluscomp-3", "cluscomp-2", "nf4"]
BATCHES = (1, 16)
PROMPT, NEW_TOKENS, LONG_PROMPT = 128, 64, 2048
ADAPTED = "cluscomp-4"  # also with an adapter that is not merged
COMPILED = ("dense", "cluscomp-4")  # compiling takes a minute each


def generation(report: Report, options: argparse.Namespace) -> None:
    """A row for every method, and for some of them one that is compiled."""
    methods = available(options.methods or METHODS)
    for method in methods:
        report.run(name_of(method), lambda method=method: measure(method, options), _line)
        forget_peak(options.device)
    if ADAPTED in methods:
        report.run(f"{name_of(ADAPTED)} + adapter", lambda: measure(ADAPTED, options, adapter=True), _line)
        forget_peak(options.device)
    for method in [method for method in methods if method in COMPILED]:
        report.run(f"{name_of(method)} generate", lambda method=method: compiled(method, options), _line)
        forget_peak(options.device)
    compare(report)


@torch.no_grad()
def measure(method: str, options: argparse.Namespace, adapter: bool = False) -> dict:
    """Tokens a second at every batch size, call by call and from a graph."""
    device, shape = options.device, SHAPES["Llama-3-8B"].scaled(options.scale)
    forget_peak(device)
    model: Any = build(shape, method, device)
    if adapter:
        model = prepare(model, method, checkpointing=False)[0].eval()
    row: dict[str, Any] = {"method": f"{method} + adapter" if adapter else method, "bits": bits_of(method)}
    prompt = random_tokens(shape, 1, max(16, round(LONG_PROMPT * options.scale)), device)
    row["prefill, s"] = seconds(lambda: model(input_ids=prompt, use_cache=False, logits_to_keep=1), device, 3)
    for batch in BATCHES:
        row[f"eager {batch}"] = batch * NEW_TOKENS / eager(model, random_tokens(shape, batch, PROMPT, device), device)
        if is_cuda(device):
            took, same = graph(model, random_tokens(shape, batch, PROMPT, device))
            row[f"graph {batch}"] = batch * NEW_TOKENS / took
            # Random models have no favourite token: another order of cuBLAS's sums, and they write something else.
            row[f"same tokens {batch}"] = same
    return {**row, **peaks(device)}


def eager(model: Any, tokens: torch.Tensor, device: str) -> float:
    """Seconds of the new tokens, call by call."""
    cache = DynamicCache(config=model.config)
    for step in range(NEW_TOKENS + 2):
        if step == 2:  # the prompt and the first token compile
            synchronize(device)
            started = time.perf_counter()
        output = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        tokens = output.logits[:, -1:].argmax(-1)
    synchronize(device)
    return time.perf_counter() - started


class Decoder:
    """Writes token after token into tensors that stay where they are."""

    def __init__(self, model: Any, prompt: torch.Tensor) -> None:
        self.model, self.prompt = model, prompt
        length = prompt.shape[1] + NEW_TOKENS + 8
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        self.places = torch.arange(length, device=prompt.device)
        self.position = torch.zeros(1, 1, dtype=torch.long, device=prompt.device)
        self.token = torch.zeros(len(prompt), 1, dtype=torch.long, device=prompt.device)

    def start(self) -> None:
        """Reads the prompt, and forgets what was there."""
        self.cache.reset()
        self.position.fill_(self.prompt.shape[1])
        output = self.model(input_ids=self.prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.token.copy_(output.logits[:, -1:].argmax(-1))

    def step(self) -> None:
        """The next token. The mask is made here, of tensors alone: a graph must see where it is in the text."""
        seen = (self.places <= self.position).view(1, 1, 1, -1).expand(len(self.prompt), -1, -1, -1)
        output = self.model(
            input_ids=self.token,
            attention_mask=seen,
            position_ids=self.position.expand(len(self.prompt), -1),
            past_key_values=self.cache,
            use_cache=True,
        )
        self.token.copy_(output.logits[:, -1:].argmax(-1))
        self.position.add_(1)

    def write(self, steps: int, step: Any) -> torch.Tensor:
        """The tokens of so many steps, [batch, steps]."""
        self.start()
        written = []
        for _ in range(steps):
            step()
            written.append(self.token.clone())
        return torch.cat(written, 1)


def graph(model: Any, prompt: torch.Tensor) -> tuple[float, bool]:
    """Seconds of the new tokens from a CUDA graph, and whether they are those of the same passes call by call."""
    decoder = Decoder(model, prompt)
    expected = decoder.write(8, decoder.step)
    captured, _ = capture(decoder.step)
    same = torch.equal(decoder.write(8, captured.replay), expected)
    decoder.start()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(NEW_TOKENS):
        captured.replay()
    torch.cuda.synchronize()
    return time.perf_counter() - started, same


def compiled(method: str, options: argparse.Namespace) -> dict:
    """Tokens a second of `generate` with a static cache, and seconds until it is compiled."""
    device, shape = options.device, SHAPES["Llama-3-8B"].scaled(options.scale)
    model = build(shape, method, device)
    settings = {"do_sample": False, "cache_implementation": "static", "min_new_tokens": NEW_TOKENS}
    prompt = random_tokens(shape, 1, PROMPT, device)
    started = time.perf_counter()
    for times in range(3):
        synchronize(device)
        began = time.perf_counter()
        model.generate(prompt, max_new_tokens=NEW_TOKENS, **settings)
        synchronize(device)
        if times == 1:
            ready = time.perf_counter() - started
    speed = NEW_TOKENS / (time.perf_counter() - began)
    return {"method": method, "bits": bits_of(method), "generate 1": speed, "compiled in, s": ready}


def compare(report: Report) -> None:
    """Every number as a multiple of dense."""
    rows = {row["method"]: row for row in report.rows if "prefill, s" in row}
    dense = rows.get("dense")
    if dense is None:
        return
    ratios = {
        method: {key: row[key] / dense[key] for key in row if key.startswith(("prefill", "eager", "graph"))}
        for method, row in rows.items()
        if method != "dense" and "error" not in row
    }
    report.note(relative_to_dense=ratios)
    for method, ratio in ratios.items():
        print(
            f"{method} / dense: " + ", ".join(f"{key.removesuffix(', s')} {value:.2f}" for key, value in ratio.items())
        )


def _line(row: dict) -> str:
    speeds = [f"{key} {row[key]:.4g}/s" for key in row if key.startswith(("eager", "graph", "generate"))]
    return ", ".join([*speeds, *(f"{key} {row[key]:.3g}" for key in row if key.endswith(", s"))])
