"""What does finetuning gain? Full, LoRA, DoRA, QLoRA, and ClusComp on compressed bases, rates swept for each.

    python recipes/benchmarks/finetune_quality.py MODEL --train gsm8k_train.jsonl --valid gsm8k_valid.jsonl \\
        --pretraining tinystories.jsonl --results finetune_quality_tinystories-656k-gsm8k
    python recipes/benchmarks/finetune_quality.py MODEL --train dolly.jsonl --hold_out 100 --pretraining …

    full            every weight of the dense model                    full linears    its linear layers alone
    lora, dora      rank 16 on the dense model                         qlora           rank 16 on bitsandbytes NF4
    lora BITS       rank 16 on the compressed model of the first of --bits, decoded
    cluscomp BITS rRANK   ClusCompConfig(rank=RANK) on the compressed model of at most BITS true bits

MODEL is compressed with the defaults of `cluscomp compress --calibration PRETRAINING`, once for each number of bits.
Every run sees the same windows of tokens in the same order for a seed: AdamW without weight decay, cosine after 5 % of
warm-up, gradients clipped at 1, fp32, loss on all tokens. The rate is chosen on the first seed: from half, one and
two times a first guess on, each method goes up or down by factors of two until its best rate lies between two others.
The other seeds run at that rate, and the table has means over the seeds and the standard deviation. ClusComp's rates
are those of `delta_scale=256`, for models of all sizes.

    share       gain of the method / gain of `full linears`, gain = dense loss before − loss after
    forgetting  loss on the pre-training text's last 50 documents (of fewer, the last tenth) after finetuning,
                minus the dense model's before
    peak        memory of the run's process above what it had with its imports

Each run is a process and a row of the results; "summary" there has what the table shows.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
import time
from functools import partial
from typing import Any

import torch
from harness import (
    Results,
    Row,
    answer,
    arguments,
    child,
    cosine,
    settings_of,
    shuffled,
    split_text,
    table,
    write_text,
)
from peft import LoraConfig, get_peft_model
from random_models import nf4_layer
from timing import forget_process_peak, read_status
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import cluscomp_peft
from cluscomp_peft.compress.budget.targets import dense_linears
from cluscomp_peft.compress.calibration.text import read_documents, token_windows
from cluscomp_peft.compress.checkpoint import compress_checkpoint
from cluscomp_peft.hf.evaluate import true_bits

RANK = 16
NAMES = ("method", "rate", "seed", "environment")  # of a run, beside its numbers


def main() -> None:
    parser = arguments(__doc__, None)
    parser.add_argument("model", help="folder of a dense checkpoint")
    parser.add_argument("--train", required=True, help="to finetune on")
    parser.add_argument("--valid", help="to measure the loss on; without it the last --hold_out documents of --train")
    parser.add_argument("--hold_out", type=int, default=100)
    parser.add_argument("--pretraining", required=True, help="text to calibrate on; its end is held out")
    parser.add_argument("--bits", type=float, nargs="+", default=[4.3, 3.1, 2.6])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64], help="of ClusComp")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each")
    parser.add_argument("--only", nargs="+", help="methods to run, by their first word")
    parser.add_argument("--bases", help="folder of the compressed models, to keep them; by default a temporary one")
    options = parser.parse_args()
    if answer(options, partial(run, options=options)):
        return
    with tempfile.TemporaryDirectory() as folder:
        options.bases = options.bases or folder
        Benchmark(options).table()


class Benchmark:
    """The runs of one model on one task, and what they add up to."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        settings = settings_of(options, "steps", "batch", "seqlen", "hold_out", "train")
        self.results = Results(options.results, settings, options.fresh)
        if options.fresh:
            # The rates of an older sweep would say where this one ends.
            self.results.forget(lambda row: row["method"] in self.methods())

    def methods(self) -> list[str]:
        found = ["full", "full linears", "lora", "dora", "qlora", f"lora {self.options.bits[0]:g}"]
        for bits in self.options.bits:
            found += [f"cluscomp {bits:g} r{rank}" for rank in self.options.ranks]
        return [method for method in found if not self.options.only or method.split()[0] in self.options.only]

    def table(self) -> None:
        compress_all(self.options)
        jobs = [job_of(method, first_rate(method) * factor) for method in self.methods() for factor in (0.5, 1, 2)]
        while jobs:
            self.complete(jobs)
            jobs = [job_of(method, rate) for method in self.methods() for rate in self.neighbours(method)]
        best = {method: self.best_rate(method) for method in self.methods()}
        self.complete([job_of(method, best[method], seed) for seed in range(1, self.options.seeds) for method in best])
        self.report(best)

    def complete(self, jobs: list[Row]) -> None:
        def one(job: Row) -> Row:
            return child(
                __file__, job, "--bases", self.options.bases, environment={"OMP_NUM_THREADS": "1"}
            )  # one thread each

        self.results.complete(jobs, one, self.options.jobs)
        if self.results.failed:
            raise SystemExit(f"{len(self.results.failed)} runs failed; the same call tries them again.")

    def loss(self, method: str, rate: float) -> float | None:
        """Of the first seed, where it ran; infinite where it diverged."""
        row = self.results.find(job_of(method, rate))
        return None if row is None else row["loss"] if math.isfinite(row["loss"]) else math.inf

    def best_rate(self, method: str) -> float:
        rates = [first_rate(method) * 2.0**power for power in range(-12, 13)]
        losses = {rate: loss for rate in rates if (loss := self.loss(method, rate)) is not None}
        return min(losses, key=lambda rate: losses[rate])

    def neighbours(self, method: str) -> list[float]:
        """The rates next to the best one that have not run."""
        best = self.best_rate(method)
        return [rate for rate in (best / 2, best * 2) if self.loss(method, rate) is None]

    def report(self, best: dict[str, float]) -> None:
        rows: dict[str, Row] = {}
        for method, rate in best.items():
            seeds = [self.results.find(job_of(method, rate, seed)) for seed in range(self.options.seeds)]
            runs = [run for run in seeds if run is not None]
            row = {key: statistics.mean(run[key] for run in runs) for key in runs[0] if key not in NAMES}
            row["spread"] = statistics.stdev(run["loss"] for run in runs) if len(runs) > 1 else 0.0
            rows[method] = {"method": method, "rate": rate, **row}
        reference = rows.get("full linears")
        for row in rows.values():
            gain = row["before"] - row["loss"]
            row["share"] = gain / (reference["before"] - reference["loss"]) if reference else None
        self.results.note(summary=list(rows.values()))
        columns = {
            "method": "{method}",
            "rate": "{rate:g}",
            "base bits": "{bits:.2f}",
            "merged bits": "{merged_bits:.2f}",
            "loss": "{loss:.4f}",
            "±": "{spread:.4f}",
            "share": "{share:.1%}",
            "trained": "{trained:,.0f}",
            "adapter, KB": lambda row: f"{row['adapter_bytes'] / 1e3:,.0f}",
            "forgetting": "{forgetting:.2f}",
            "step, s": "{step:.2f}",
            "peak, MB": "{peak_mb:.0f}",
        }
        print(table(rows.values(), columns))


def first_rate(method: str) -> float:
    return 2e-4 if method.startswith("cluscomp") else 2e-2  # 0.02 suits models as small as these


def job_of(method: str, rate: float, seed: int = 0) -> Row:
    return {"method": method, "rate": rate, "seed": seed}


def compress_all(options: argparse.Namespace) -> None:
    """One compressed model for each number of bits, calibrated on the pre-training text."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    for bits in options.bits:
        target = os.path.join(options.bases, f"{bits:g}")
        if os.path.exists(target):
            continue
        with tempfile.TemporaryDirectory() as folder:
            documents, _ = pretraining_documents(options, tokenizer)
            text = write_text(os.path.join(folder, "calibration.jsonl"), documents)
            compress_checkpoint(
                options.model, target, cluscomp_peft.ClusCompQuantizationConfig(bits=bits), calibration=text
            )


def run(job: Row, options: argparse.Namespace) -> Row:
    """One finetuning; what the table needs of it."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    documents, held_out = split_text(options.train, options.valid, options.hold_out, tokenizer)
    train = full_windows(documents, tokenizer, options.seqlen)
    valid = full_windows(held_out, tokenizer, options.seqlen, max_tokens=20_000)
    _, before_text = pretraining_documents(options, tokenizer)
    pretraining = full_windows(before_text, tokenizer, options.seqlen, max_tokens=20_000)
    start = read_status("VmRSS")
    forget_process_peak()

    set_seed(job["seed"])
    dense = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    before, before_pretraining = loss_of(dense, valid), loss_of(dense, pretraining)
    model, bits = prepared(job["method"], dense, options)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job["rate"], weight_decay=0.0)
    schedule = cosine(optimizer, options.steps)
    order = shuffled(len(train), options.steps * options.batch, job["seed"])
    spent = []
    model.train()
    for step in range(options.steps):
        started = time.perf_counter()
        batch = train[order[step * options.batch : (step + 1) * options.batch]]
        model(input_ids=batch, labels=batch).loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        spent.append(time.perf_counter() - started)
    peak = read_status("VmHWM")
    result = {
        "loss": loss_of(model, valid),
        "before": before,
        "forgetting": loss_of(model, pretraining) - before_pretraining,
        "trained": sum(parameter.numel() for parameter in trained),
        "bits": bits,
        "merged_bits": 32.0 if bits == 32 else 16.0,  # what is not ours merges into a dense weight
        "adapter_bytes": 0,
        "step": statistics.median(spent),
        "peak_mb": (peak - start) / 1e6,
    }
    if job["method"].split()[0] != "full":
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            result["adapter_bytes"] = os.path.getsize(os.path.join(folder, "adapter_model.safetensors"))
    if job["method"].startswith("cluscomp"):
        result["merged_bits"] = true_bits(model.merge_and_unload())
    return result


def pretraining_documents(options: argparse.Namespace, tokenizer: Any) -> tuple[list[str], list[str]]:
    """Those to calibrate on, and those to measure forgetting on."""
    documents = read_documents(options.pretraining, tokenizer)
    if len(documents) > 50:
        return documents[:-50], documents[-50:]
    text = "\n\n".join(documents)
    end = len(text) * 9 // 10
    return [text[:end]], [text[end:]]


def full_windows(documents: list[str], tokenizer: Any, length: int, max_tokens: int | None = None) -> torch.Tensor:
    """Windows [count, length]; what does not fill the last one is left out."""
    windows = token_windows(documents, tokenizer, length, max_tokens=max_tokens)
    return torch.cat([window for window in windows if window.shape[1] == length])


def prepared(method: str, dense: Any, options: argparse.Namespace) -> tuple[Any, float]:
    """The model ready to train, and the true bits of what lies under the adapter."""
    kind, *rest = method.split()
    if kind == "full":
        if rest:
            dense.requires_grad_(False)
            for _, layer in dense_linears(dense):
                layer.requires_grad_(True)
        return dense, 32.0
    if kind == "cluscomp":
        model = AutoModelForCausalLM.from_pretrained(os.path.join(options.bases, rest[0]), dtype=torch.float32)
        rank = int(rest[1].removeprefix("r"))
        bits = true_bits(model)
        # The unit that the rates in results/ are in, so that runs of all versions go on from each other.
        config = cluscomp_peft.ClusCompConfig(task_type="CAUSAL_LM", rank=rank, delta_scale=256.0)
        return get_peft_model(model, config), bits
    bits = 32.0
    if rest:
        model = AutoModelForCausalLM.from_pretrained(os.path.join(options.bases, rest[0]), dtype=torch.float32)
        bits = true_bits(model)
        dense = model.dequantize()
    if kind == "qlora":
        bits = load_in_nf4(dense)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", use_dora=kind == "dora"
    )
    return get_peft_model(dense, config), bits


def load_in_nf4(model: Any) -> float:
    """Replaces the linear layers by bitsandbytes' NF4 ones; returns their true bits."""
    for name, layer in list(dense_linears(model)):
        model.set_submodule(name, nf4_layer(layer.weight.data, torch.float32))
    model.is_loaded_in_4bit = True
    return 4.5  # 4 bits, and 32 for each block of 64


def loss_of(model: Any, windows: torch.Tensor) -> float:
    """Mean loss of the tokens of windows [count, length], in nats."""
    model.eval()
    with torch.no_grad():
        losses = [float(model(input_ids=part, labels=part).loss) * len(part) for part in windows.split(16)]
    model.train()
    return sum(losses) / len(windows)


if __name__ == "__main__":
    main()
