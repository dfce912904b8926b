"""Loss at true bits: ClusComp's three levels against round-to-nearest, NF4, HQQ and GPTQ, on one model.

    python recipes/benchmarks/compression_quality.py MODEL --text text.jsonl --hold_out 50 --name tinystories-656k
    python recipes/benchmarks/compression_quality.py MODEL --text train.txt.xz --valid valid.txt.xz --name reference-4m

    data-free     K-means of the weights, (g, n) chosen for each matrix by itself
    calibrated    + sensitivities, allocation, error feedback, reconstruction        `cluscomp compress --calibration`
    recovered     + codebooks trained end to end against the dense model             `recipes/recover.py`
                    with kl_weight 0.9 also on the text, which may bring the loss below that of the dense model

Every row runs in a process of its own, which is what its time and peak memory belong to; the process loads the dense
model, calibrates on the same sequences, and measures the loss on text that no method sees. True bits count every byte
that a matrix stores: codes, codebooks, scales, zero points. HQQ needs the package `hqq`; GPTQ is this repository's own
(`baselines.py`), because no library of it installs beside current versions.

Writes results/compression_quality_NAME.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from baselines import gptq, hqq, nf4, round_to_nearest
from memory import write_results
from transformers import AutoModelForCausalLM, AutoTokenizer

import cluscomp_peft
from cluscomp_peft.compress.calibration.text import read_documents, token_windows
from cluscomp_peft.compress.checkpoint import compress_checkpoint
from cluscomp_peft.hf.evaluate import evaluate, true_bits

HERE = os.path.dirname(os.path.abspath(__file__))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a dense checkpoint")
    parser.add_argument("--text", required=True, help="to calibrate and recover on")
    parser.add_argument("--valid", help="to measure the loss on; without it the last documents of --text")
    parser.add_argument("--hold_out", type=int, default=50, help="documents of --text to measure the loss on")
    parser.add_argument("--bits", type=float, nargs="+", default=[4.3, 3.1, 2.6, 2.0])
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=100_000, help="to measure the loss on, at most")
    parser.add_argument("--recover", type=int, default=400, help="steps of recovery, 0 for none")
    parser.add_argument("--name", required=True, help="of the results")
    parser.add_argument("--only", nargs="+", help='such as rtn "calibrated 2.0": what to run; other rows are kept')
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row is not None:
        print(json.dumps(measure(json.loads(options.row), options)))
        return

    rows: list[dict[str, Any]] = [{"method": "dense"}]
    rows += [{"method": "rtn", "bits": bits} for bits in (4, 3, 2)]
    rows += [{"method": "nf4", "double": double} for double in (False, True)]
    rows += [{"method": "hqq", "bits": bits} for bits in (4, 3, 2)]
    rows += [{"method": "gptq", "bits": bits} for bits in (4, 3, 2)]
    rows += [{"method": level, "bits": bits} for level in ("data-free", "calibrated") for bits in options.bits]
    weights = (1.0, 0.9) if options.recover else ()
    rows += [{"method": "recovered", "bits": bits, "kl_weight": kl} for kl in weights for bits in options.bits]
    if options.only:
        rows = [
            row for row in rows if {row["method"], f"{row['method']} {row.get('bits')}"} & {*options.only, "dense"}
        ]
    table = [
        old for old in _load(options.name) if options.only and not any(row.items() <= old.items() for row in rows)
    ]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "CLUSCOMP_QUALITY_FOLDER": folder}
        for row in rows:
            command = [sys.executable, __file__, *sys.argv[1:], "--row", json.dumps(row)]
            result = subprocess.run(command, capture_output=True, text=True, env=environment)
            if result.returncode:
                print(f"{row}: {result.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                continue
            table.append({**row, **json.loads(result.stdout.strip().splitlines()[-1])})
            print(json.dumps(table[-1]), file=sys.stderr, flush=True)
    dense = next(row["loss"] for row in table if row["method"] == "dense")
    for row in table:
        row["above dense"] = row["loss"] - dense
    settings = {key: getattr(options, key) for key in ("seqlen", "samples", "hold_out", "recover")}
    write_results(f"compression_quality_{options.name}", {"settings": settings, "rows": table})
    print("| method | true bits | loss | above dense | seconds | peak memory, MB |\n|---|" + "---:|" * 5)
    for row in sorted(table, key=lambda row: -row["true_bits"]):
        setting = "".join(f" {row[key]}" for key in ("bits",) if key in row) + (" double" if row.get("double") else "")
        setting += f", kl_weight {row['kl_weight']}" if "kl_weight" in row else ""
        print(
            f"| {row['method']}{setting} | {row['true_bits']:.3f} | {row['loss']:.4f} | {row['above dense']:.4f} "
            f"| {row['seconds']:.0f} | {row['peak_mb']:.0f} |"
        )


def measure(row: dict[str, Any], options: argparse.Namespace) -> dict[str, float]:
    """Loss, true bits, seconds and peak memory of one method."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    documents = read_documents(options.text, tokenizer)
    if options.valid is None:
        documents, held_out = documents[: -options.hold_out], documents[-options.hold_out :]
    else:
        held_out = read_documents(options.valid, tokenizer)
    test = token_windows(held_out, tokenizer, options.seqlen, max_tokens=options.tokens)
    started = time.perf_counter()
    model, bits = _compressed(row, options, tokenizer, documents)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"true_bits": bits, "loss": evaluate(model, test).loss, "seconds": seconds, "peak_mb": peak}


def _compressed(
    row: dict[str, Any], options: argparse.Namespace, tokenizer: Any, documents: list[str]
) -> tuple[Any, float]:
    method, bits = row["method"], row.get("bits")
    if method in ("data-free", "calibrated", "recovered"):
        folder = os.environ["CLUSCOMP_QUALITY_FOLDER"]
        text = os.path.join(folder, "calibration.jsonl")
        with open(text, "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": document}) + "\n" for document in documents)
        extra: dict[str, Any] = {}
        if method != "data-free":
            extra = {"calibration": text, "samples": options.samples, "seqlen": options.seqlen}
        base = target = os.path.join(folder, f"{'data-free' if method == 'data-free' else 'calibrated'}-{bits}")
        if not os.path.exists(base):
            compress_checkpoint(options.model, base, cluscomp_peft.ClusCompQuantizationConfig(bits=bits), **extra)
        if method == "recovered":
            target = os.path.join(folder, f"recovered-{bits}-{row['kl_weight']}")
            # Judged by a tenth of the text, but by no more than about a hundred windows of it (3 characters a token).
            windows = max(1, sum(map(len, documents)) // (3 * options.seqlen))
            _recover(base, target, text, row["kl_weight"], min(0.1, 100 / windows), options)
        model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
        return model, true_bits(model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    windows = token_windows(documents, tokenizer, options.seqlen, max_tokens=options.samples * options.seqlen)
    ways: dict[str, Callable[[], tuple[Any, float]]] = {
        "dense": lambda: (copy.deepcopy(model), true_bits(model)),
        "rtn": lambda: round_to_nearest(model, bits),
        "nf4": lambda: nf4(model, double=row["double"]),
        "hqq": lambda: hqq(model, bits),
        "gptq": lambda: gptq(model, bits, 64, windows, act_order=True),
    }
    return ways[method]()


def _recover(base: str, target: str, text: str, kl_weight: float, holdout: float, options: argparse.Namespace) -> None:
    command = [sys.executable, os.path.join(HERE, "..", "recover.py"), "--model", base, "--teacher", options.model]
    command += ["--data", text, "--output_dir", target, "--steps", str(options.recover)]
    command += ["--kl_weight", str(kl_weight), "--holdout", str(holdout)]
    subprocess.run([*command, "--seqlen", str(options.seqlen)], check=True, stdout=sys.stderr)


def _load(name: str) -> list[dict[str, Any]]:
    path = os.path.join(HERE, "results", f"compression_quality_{name}.json")
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        return json.load(file)["rows"]


if __name__ == "__main__":
    main()
