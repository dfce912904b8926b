"""What loss at what true bits? ClusComp's levels against round to nearest, NF4, HQQ and GPTQ, on one model.

    python recipes/benchmarks/compression_quality.py MODEL --text text.jsonl --hold_out 50 \\
        --results compression_quality_tinystories-656k
    python recipes/benchmarks/compression_quality.py MODEL --text train.txt.xz --valid valid.txt.xz c4.jsonl \\
        gsm8k.jsonl --results compression_quality_smollm2-135m

    data-free     K-means of the weights, (g, n) chosen for each matrix by itself       `compress --calibration none`
    in-memory     weighed by the inputs on a little text          `get_peft_model` on a dense model, codebooks in fp16
    default       + sensitivities, allocation, error feedback, reconstruction           `cluscomp compress`
    calibrated    the same on --text instead of the text that comes with the package
    recovered     + codebooks trained end to end against the dense model             `recipes/recover.py`
                    with kl_weight 0.9 also on the text, which may bring the loss below that of the dense model

Every row runs in a process of its own, which is what its time and peak memory belong to; the process loads the dense
model, calibrates on the same sequences, and measures loss and KL from the dense model on texts that no method sees.
True bits count every byte that a matrix stores: codes, codebooks, scales, zero points. HQQ needs the package `hqq`;
GPTQ is this repository's own (`baselines.py`), because no library of it installs beside current versions.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from baselines import gptq, hqq, nf4, round_to_nearest
from harness import HERE, Results, Row, answer, arguments, child, settings_of, split_text, table, write_text
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import cluscomp_peft
from cluscomp_peft.compress.calibration.text import read_documents, token_windows
from cluscomp_peft.compress.checkpoint import compress_checkpoint
from cluscomp_peft.hf.evaluate import evaluate, true_bits


def main() -> None:
    parser = arguments(__doc__, None)
    parser.add_argument("model", help="folder of a dense checkpoint")
    parser.add_argument("--text", required=True, help="to calibrate and recover on")
    parser.add_argument("--valid", nargs="+", help="to measure on; without it the last documents of --text")
    parser.add_argument("--hold_out", type=int, default=50, help="documents of --text to measure the loss on")
    parser.add_argument("--bits", type=float, nargs="+", default=[4.3, 3.1, 2.6, 2.0])
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=100_000, help="of each text to measure on, at most")
    parser.add_argument("--recover", type=int, default=400, help="steps of recovery, 0 for none")
    parser.add_argument("--only", nargs="+", help='such as rtn "calibrated 2.0": what to run, beside the dense model')
    parser.add_argument("--bases", help=argparse.SUPPRESS)  # folder of the compressed models
    options = parser.parse_args()
    if answer(options, partial(measure, options=options)):
        return
    results = Results(options.results, settings_of(options, "seqlen", "samples", "hold_out", "recover"), options.fresh)
    with tempfile.TemporaryDirectory() as folder:
        results.complete(jobs_of(options), lambda job: child(__file__, job, "--bases", folder))
    dense = next((row["losses"] for row in results.rows if row["method"] == "dense"), {})
    above = {
        f"above dense, {name}": lambda row, name=name: f"{row['losses'][name] - dense.get(name, math.nan):.4f}"
        for name in dense
    }
    columns = {
        "method": _name,
        "true bits": "{true_bits:.3f}",
        **above,
        "KL": lambda row: " ".join(f"{value:.4f}" for value in row["kl"].values()),
        "seconds": "{seconds:.0f}",
        "peak memory, MB": "{peak_mb:.0f}",
    }
    print(table(sorted(results.rows, key=lambda row: -row["true_bits"]), columns))


def jobs_of(options: argparse.Namespace) -> list[Row]:
    """One for every row of the table."""
    jobs: list[Row] = [{"method": "dense"}]
    jobs += [{"method": "rtn", "bits": bits} for bits in (4, 3, 2)]
    jobs += [{"method": "nf4", "double": double} for double in (False, True)]
    jobs += [{"method": method, "bits": bits} for method in ("hqq", "gptq") for bits in (4, 3, 2)]
    levels = ("data-free", "in-memory", "default", "calibrated")
    jobs += [{"method": level, "bits": bits} for level in levels for bits in options.bits]
    weights = (1.0, 0.9) if options.recover else ()
    jobs += [{"method": "recovered", "bits": bits, "kl_weight": kl} for kl in weights for bits in options.bits]
    wanted = {"dense", *(options.only or ())}
    return [job for job in jobs if not options.only or {job["method"], f"{job['method']} {job.get('bits')}"} & wanted]


def _name(row: Row) -> str:
    parts = [row["method"], str(row["bits"]) if "bits" in row else "", "double" if row.get("double") else ""]
    weight = f", kl_weight {row['kl_weight']}" if "kl_weight" in row else ""
    return " ".join(part for part in parts if part) + weight


def measure(job: Row, options: argparse.Namespace) -> Row:
    """Losses and KL by text, true bits, seconds and peak memory of one method."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    first, *others = options.valid or [None]
    documents, held_out = split_text(options.text, first, options.hold_out, tokenizer)
    texts = {_label(first or options.text): held_out}
    texts |= {_label(path): read_documents(path, tokenizer) for path in others}
    started = time.perf_counter()
    model, bits = _compressed(job, options, tokenizer, documents)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    teacher = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    found = {}
    for name, text in texts.items():
        windows = token_windows(text, tokenizer, options.seqlen, max_tokens=options.tokens)
        found[name] = evaluate(model, windows, teacher=teacher)
    return {
        "true_bits": bits,
        "losses": {name: result.loss for name, result in found.items()},
        "kl": {name: result.kl for name, result in found.items()},
        "seconds": seconds,
        "peak_mb": peak,
    }


def _label(path: str) -> str:
    """What a table calls a text: its file name up to the first dot."""
    return os.path.basename(path).partition(".")[0]


def _compressed(job: Row, options: argparse.Namespace, tokenizer: Any, documents: list[str]) -> tuple[Any, float]:
    method, bits = job["method"], job.get("bits")
    if method in ("data-free", "default", "calibrated", "recovered"):
        folder = options.bases
        text = write_text(os.path.join(folder, "calibration.jsonl"), documents)
        level = "calibrated" if method == "recovered" else method
        extra: dict[str, Any] = {
            "data-free": {"calibration": "none"},
            "default": {},
            "calibrated": {"calibration": text, "samples": options.samples, "seqlen": options.seqlen},
        }[level]
        base = target = os.path.join(folder, f"{level}-{bits}")
        if not os.path.exists(base):
            compress_checkpoint(options.model, base, cluscomp_peft.ClusCompQuantizationConfig(bits=bits), **extra)
        if method == "recovered":
            target = os.path.join(folder, f"recovered-{bits}-{job['kl_weight']}")
            # Judged by a tenth of the text, but by no more than about a hundred windows of it (3 characters a token).
            windows = max(1, sum(map(len, documents)) // (3 * options.seqlen))
            _recover(base, target, text, job["kl_weight"], min(0.1, 100 / windows), options)
        model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
        return model, true_bits(model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    windows = token_windows(documents, tokenizer, options.seqlen, max_tokens=options.samples * options.seqlen)
    ways: dict[str, Callable[[], tuple[Any, float]]] = {
        "dense": lambda: (copy.deepcopy(model), true_bits(model)),
        "in-memory": lambda: _in_memory(model, bits),
        "rtn": lambda: round_to_nearest(model, bits),
        "nf4": lambda: nf4(model, double=job["double"]),
        "hqq": lambda: hqq(model, bits),
        "gptq": lambda: gptq(model, bits, 64, windows, act_order=True),
    }
    return ways[method]()


def _in_memory(model: Any, bits: float) -> tuple[Any, float]:
    config = cluscomp_peft.ClusCompConfig(task_type="CAUSAL_LM", bits=bits, num_blocks=1, codebook_dtype="float16")
    adapted = get_peft_model(model, config)
    return adapted, true_bits(adapted)


def _recover(base: str, target: str, text: str, kl_weight: float, holdout: float, options: argparse.Namespace) -> None:
    command = [sys.executable, os.path.join(HERE, "..", "recover.py"), "--model", base, "--teacher", options.model]
    command += ["--data", text, "--output_dir", target, "--steps", str(options.recover)]
    command += ["--kl_weight", str(kl_weight), "--holdout", str(holdout)]
    subprocess.run([*command, "--seqlen", str(options.seqlen)], check=True, stdout=sys.stderr)


if __name__ == "__main__":
    main()
