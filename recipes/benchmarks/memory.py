"""What do loading, a forward pass and training steps hold? CPU: a compressed model against NF4 + LoRA, and dense.

    python recipes/benchmarks/memory.py

Every measurement is a process of its own: it imports everything, notes its resident memory, does the job, and reports
how far the peak rose above that. The model is a random Llama of 300 M parameters in bf16; its codes are random too,
which changes nothing about memory.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from functools import partial

import torch
from harness import Results, Row, answer, arguments, child, settings_of, table
from random_models import Shape, build, prepare, random_tokens, save_checkpoint, small, train_step
from timing import read_status, return_memory
from transformers import AutoModelForCausalLM, LlamaForCausalLM

SHAPE = Shape(hidden=1024, intermediate=2816, layers=18, heads=16, kv_heads=16, vocab=32000)
JOBS = ("load compressed", "serve compressed", "serve dense", "train compressed", "train nf4 lora", "train dense")


def main() -> None:
    parser = arguments(__doc__, "memory")
    parser.add_argument("--bits", type=float, default=4.0)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if answer(options, partial(measure, options=options)):
        return
    results = Results(options.results, settings_of(options, "bits", "seqlen", "batch"), options.fresh)
    with tempfile.TemporaryDirectory() as folder:

        def in_process(job: Row) -> Row:
            for kind in ("dense", "compressed"):
                if not os.path.exists(os.path.join(folder, kind)):
                    child(__file__, {"write": kind}, "--folder", folder)
            return child(__file__, job, "--folder", folder)

        rows = results.complete([{"job": job} for job in JOBS], in_process)
    columns = {
        "job": "{job}",
        "files, MB": lambda row: f"{row['files'] / 1e6:.0f}",
        "peak, MB": lambda row: f"{row['peak'] / 1e6:.0f}",
        "peak / files": lambda row: f"{row['peak'] / row['files']:.2f}",
    }
    print(table(rows, columns))


def measure(job: Row, options: argparse.Namespace) -> Row:
    """Does one job in this process and reports bytes: weight files, and the peak above what imports take. A job
    "write" makes the checkpoint that the others read.
    """
    if "write" in job:
        write_checkpoint(os.path.join(options.folder, job["write"]), job["write"], options.bits)
        return {}
    import bitsandbytes  # noqa: F401  (imported by every job, so that all start equal)
    from transformers import BitsAndBytesConfig

    action, _, kind = job["job"].partition(" ")
    path = os.path.join(options.folder, "compressed" if kind == "compressed" else "dense")
    _warm_up()
    before = read_status("VmRSS")
    settings = {}
    if kind == "nf4 lora":
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **settings)
    if action == "serve":
        # Loading alone maps the file; running the model touches every byte of it.
        with torch.no_grad():
            model(input_ids=random_tokens(SHAPE, 1, 16, "cpu"))
    elif action == "train":
        method = {"nf4 lora": "nf4", "compressed": f"cluscomp-{options.bits}", "dense": "dense"}[kind]
        model, optimizer = prepare(model, method, checkpointing=False)
        tokens = random_tokens(SHAPE, options.batch, options.seqlen, "cpu")
        for _ in range(2):
            train_step(model, optimizer, tokens)
    files = sum(os.path.getsize(os.path.join(path, name)) for name in os.listdir(path) if "safetensors" in name)
    return {"files": files, "peak": read_status("VmHWM") - before}


def write_checkpoint(folder: str, kind: str, bits: float) -> None:
    """A dense checkpoint of random weights, or a compressed one of random codes in the shape of `bits`."""
    if kind == "dense":
        build(SHAPE, "dense", "cpu").save_pretrained(folder)
    else:
        method = f"cluscomp-{bits}"
        save_checkpoint(build(SHAPE, method, "cpu"), method, folder)


def _warm_up() -> None:
    """A tiny dense and a small clustered model of the same dtype are trained a step, so that the pages of libraries
    and what they compile at first use (tens of MB, and not the same from run to run) count for nobody."""
    shape = Shape(hidden=64, intermediate=64, layers=1, heads=16, kv_heads=16, vocab=SHAPE.vocab)
    train_step(LlamaForCausalLM(shape.config()).bfloat16(), None, random_tokens(shape, 1, 16, "cpu"))
    # One block of the shape of the jobs, because kernels are compiled for how matrices are stored.
    shape = small(SHAPE)
    model = build(shape, "cluscomp-4", "cpu")
    for length in (16, 64):
        with torch.no_grad():
            model(input_ids=random_tokens(shape, 1, length, "cpu"))
    model, optimizer = prepare(model, "cluscomp-4", checkpointing=False)
    train_step(model, optimizer, random_tokens(shape, 1, 64, "cpu"))
    del model, optimizer
    return_memory()  # memory of its own that the job could use again would make the job look smaller


if __name__ == "__main__":
    main()
