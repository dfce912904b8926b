"""Quality of finetuning: full finetuning, LoRA, DoRA, QLoRA, and ClusComp on compressed bases, rates swept for each.

    python recipes/benchmarks/finetune_quality.py MODEL --train gsm8k_train.jsonl --valid gsm8k_valid.jsonl \\
        --pretraining tinystories.jsonl --name tinystories-656k-gsm8k
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

Each run is a process; what is known already (results/finetune_quality_NAME.json) is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from memory import read_status, write_results
from peft import LoraConfig, get_peft_model
from random_models import nf4_layer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import cluscomp_peft
from cluscomp_peft.compress.budget.targets import dense_linears
from cluscomp_peft.compress.calibration.text import read_documents, token_windows
from cluscomp_peft.compress.checkpoint import compress_checkpoint
from cluscomp_peft.hf.evaluate import true_bits

HERE = os.path.dirname(os.path.abspath(__file__))
RANK = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    parser.add_argument("--name", required=True, help="of the results")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--bases", help="folder of the compressed models, to keep them; by default a temporary one")
    options = parser.parse_args()
    if options.run is not None:
        print(json.dumps(run(json.loads(options.run), options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        options.bases = options.bases or folder
        Benchmark(options).table()


class Benchmark:
    """The runs of one model on one task, and what they add up to."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.settings = {key: getattr(options, key) for key in ("steps", "batch", "seqlen", "hold_out")}
        self.settings["train"] = os.path.basename(options.train)
        self.path = f"finetune_quality_{options.name}"
        self.runs: dict[str, dict[str, Any]] = {}
        known = os.path.join(HERE, "results", f"{self.path}.json")
        if os.path.exists(known):
            with open(known, encoding="utf-8") as file:
                content = json.load(file)
            if content["settings"] == self.settings:
                self.runs = content["runs"]

    def methods(self) -> list[str]:
        found = ["full", "full linears", "lora", "dora", "qlora", f"lora {self.options.bits[0]:g}"]
        for bits in self.options.bits:
            found += [f"cluscomp {bits:g} r{rank}" for rank in self.options.ranks]
        return [method for method in found if not self.options.only or method.split()[0] in self.options.only]

    def table(self) -> None:
        compress_all(self.options)
        jobs = [(method, first_rate(method) * factor, 0) for method in self.methods() for factor in (0.5, 1, 2)]
        while jobs:
            self.complete(jobs)
            jobs = [(method, rate, 0) for method in self.methods() for rate in self.neighbours(method)]
        best = {method: self.best_rate(method) for method in self.methods()}
        self.complete([(method, best[method], seed) for seed in range(1, self.options.seeds) for method in best])
        self.report(best)

    def complete(self, jobs: list[tuple[str, float, int]]) -> None:
        """Runs what is not known yet, and writes every result as it comes."""
        jobs = [job for job in jobs if key_of(*job) not in self.runs]

        def one(job: tuple[str, float, int]) -> tuple[str, subprocess.CompletedProcess]:
            row = dict(zip(("method", "rate", "seed"), job, strict=True))
            command = [sys.executable, __file__, *sys.argv[1:], "--bases", self.options.bases]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            command += ["--run", json.dumps(row)]
            return key_of(*job), subprocess.run(command, capture_output=True, text=True, env=environment)

        with ThreadPoolExecutor(self.options.jobs) as pool:
            for key, result in pool.map(one, jobs):
                if result.returncode:
                    raise SystemExit(f"{key}: {result.stderr.strip().splitlines()[-1]}")
                self.runs[key] = json.loads(result.stdout.strip().splitlines()[-1])
                print(key, json.dumps(self.runs[key]), file=sys.stderr, flush=True)
                write_results(self.path, {"settings": self.settings, "runs": self.runs})

    def best_rate(self, method: str) -> float:
        return min(self.rates(method), key=lambda rate: self.runs[key_of(method, rate, 0)]["loss"])

    def rates(self, method: str) -> list[float]:
        """Those that the first seed ran at."""
        rates = [first_rate(method) * 2.0**power for power in range(-12, 13)]
        return [rate for rate in rates if key_of(method, rate, 0) in self.runs]

    def neighbours(self, method: str) -> list[float]:
        """The rates next to the best one that have not run."""
        best = self.best_rate(method)
        return [rate for rate in (best / 2, best * 2) if key_of(method, rate, 0) not in self.runs]

    def report(self, best: dict[str, float]) -> None:
        rows = {}
        for method, rate in best.items():
            seeds = [self.runs[key_of(method, rate, seed)] for seed in range(self.options.seeds)]
            row = {key: statistics.mean(run[key] for run in seeds) for key in seeds[0]}
            row["spread"] = statistics.stdev(run["loss"] for run in seeds) if len(seeds) > 1 else 0.0
            rows[method] = {**row, "rate": rate}
        reference = rows.get("full linears")
        for row in rows.values():
            gain = row["before"] - row["loss"]
            row["share"] = gain / (reference["before"] - reference["loss"]) if reference else math.nan
        write_results(self.path, {"settings": self.settings, "runs": self.runs, "rows": rows})
        print(
            "| method | rate | base bits | merged bits | loss | ± | share | trained | adapter, KB | forgetting "
            "| step, s | peak, MB |\n|---|" + "---:|" * 11
        )
        for method, row in rows.items():
            print(
                f"| {method} | {row['rate']:g} | {row['bits']:.2f} | "
                f"{row['merged_bits']:.2f} | {row['loss']:.4f} | {row['spread']:.4f} | {100 * row['share']:.1f} % | "
                f"{row['trained']:,.0f} | {row['adapter_bytes'] / 1e3:,.0f} | {row['forgetting']:.2f} | "
                f"{row['step']:.2f} | {row['peak_mb']:.0f} |"
            )


def first_rate(method: str) -> float:
    return 2e-4 if method.startswith("cluscomp") else 2e-2  # 0.02 suits models as small as these


def key_of(method: str, rate: float, seed: int) -> str:
    return f"{method}, rate {rate:g}, seed {seed}"


def compress_all(options: argparse.Namespace) -> None:
    """One compressed model for each number of bits, calibrated on the pre-training text."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    for bits in options.bits:
        target = os.path.join(options.bases, f"{bits:g}")
        if os.path.exists(target):
            continue
        with tempfile.TemporaryDirectory() as folder:
            text = os.path.join(folder, "calibration.jsonl")
            with open(text, "w", encoding="utf-8") as file:
                for document in pretraining_documents(options, tokenizer)[0]:
                    file.write(json.dumps({"text": document}) + "\n")
            compress_checkpoint(
                options.model, target, cluscomp_peft.ClusCompQuantizationConfig(bits=bits), calibration=text
            )


def run(job: dict[str, Any], options: argparse.Namespace) -> dict[str, float]:
    """One finetuning; what the table needs of it."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    documents = read_documents(options.train, tokenizer)
    if options.valid is None:
        documents, held_out = documents[: -options.hold_out], documents[-options.hold_out :]
    else:
        held_out = read_documents(options.valid, tokenizer)
    train = full_windows(documents, tokenizer, options.seqlen)
    valid = full_windows(held_out, tokenizer, options.seqlen, max_tokens=20_000)
    _, before_text = pretraining_documents(options, tokenizer)
    pretraining = full_windows(before_text, tokenizer, options.seqlen, max_tokens=20_000)
    start = read_status("VmRSS")
    _forget_peak()

    set_seed(job["seed"])
    dense = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    before, before_pretraining = loss_of(dense, valid), loss_of(dense, pretraining)
    model, bits = prepared(job["method"], dense, options)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job["rate"], weight_decay=0.0)
    warm_up = max(1, round(0.05 * options.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / options.steps)),
    )
    generator = torch.Generator().manual_seed(job["seed"])
    rounds = 1 + options.steps * options.batch // len(train)
    order = torch.cat([torch.randperm(len(train), generator=generator) for _ in range(rounds)])
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


def _forget_peak() -> None:
    with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
        file.write("5")


if __name__ == "__main__":
    main()
