"""What does `cluscomp compress` hold at its peak, CPU? For any model little more than its largest matrices.

    python recipes/benchmarks/compress_memory.py                                  # a Llama of 2 GB; minutes
    python recipes/benchmarks/compress_memory.py --layers 2 --results -           # for a try

The dense checkpoint is random bf16, written shard by shard into a temporary folder. The command runs in a process of
its own; what counts is the most memory that it ever held (VmHWM), imports included. They take the larger part: torch,
transformers with what it finds installed (torch.compile, triton, hqq), and numba with LLVM; PEFT is not imported.
`--hide hqq triton` measures an installation without. Compiled kernels are cached: the first run after an installation,
which compiles them, takes some 90 MB more.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time

import torch
from harness import Results, Row, arguments, settings_of, table
from random_models import Shape, add_shape, shape_of
from safetensors.torch import save_file
from timing import peak_of
from transformers import LlamaForCausalLM

SHAPE = Shape(hidden=2048, intermediate=5632, layers=18, heads=32, kv_heads=8, vocab=32000)


def main() -> None:
    parser = arguments(__doc__, "compress_memory")
    add_shape(parser, SHAPE)
    parser.add_argument("--bits", type=float, default=2.0)
    parser.add_argument("--quality", default="default")
    parser.add_argument("--hide", nargs="*", default=[], help="packages that count as not installed")
    options = parser.parse_args()
    results = Results(options.results, settings_of(options), options.fresh)
    rows = results.complete(
        [{"job": "imports"}, {"job": "cluscomp compress"}], lambda job: measure(job["job"], options)
    )
    megabytes = {
        f"{name}, MB": lambda row, key=key: f"{row[key] / 1e6:.0f}" if key in row else ""
        for name, key in (("peak", "peak"), ("dense files", "dense"), ("compressed files", "compressed"))
    }
    print(table(rows, {"": "{job}", **megabytes, "seconds": "{seconds:.0f}", "true bits": "{true_bits:.3f}"}))


def measure(job: str, options: argparse.Namespace) -> Row:
    """Bytes at the peak of the imports alone, or of a whole compression and what it read and wrote."""
    hide = "import sys; " + "".join(f"sys.modules[{name!r}] = None; " for name in options.hide)
    if job == "imports":
        return {"peak": peak_of(hide + "import cluscomp_peft.compress.checkpoint")}
    with tempfile.TemporaryDirectory() as folder:
        dense, target = os.path.join(folder, "dense"), os.path.join(folder, "compressed")
        size = write_dense(dense, shape_of(options))
        started = time.perf_counter()
        code = hide + "from cluscomp_peft.cli import main; sys.exit(main(sys.argv[1:]))"
        flags = ["--bits", str(options.bits), "--quality", options.quality]
        peak = peak_of(code, "compress", dense, target, *flags)
        seconds = time.perf_counter() - started
        with open(os.path.join(target, "cluscomp_report.json"), encoding="utf-8") as file:
            true_bits = json.load(file)["summary"]["true_bits"]
        after = sum(entry.stat().st_size for entry in os.scandir(target))
    return {"peak": peak, "dense": size, "compressed": after, "seconds": seconds, "true_bits": true_bits}


def write_dense(folder: str, shape: Shape) -> int:
    """A random checkpoint, a block a shard; returns its bytes."""
    config = shape.config()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in model.named_parameters():
        part = name.split(".")[2] if ".layers." in name else name
        shards.setdefault(f"model-{part}.safetensors", {})[name] = parameter.shape
    places, total = {}, 0
    generator = torch.Generator().manual_seed(0)
    for shard, shapes in shards.items():
        tensors = {
            name: torch.randn(shape, generator=generator).mul_(0.02).add_(len(shape) == 1).to(torch.bfloat16)
            for name, shape in shapes.items()
        }
        save_file(tensors, os.path.join(folder, shard), metadata={"format": "pt"})
        places.update(dict.fromkeys(shapes, shard))
        total += sum(tensor.nbytes for tensor in tensors.values())
    with open(os.path.join(folder, "model.safetensors.index.json"), "w", encoding="utf-8") as file:
        json.dump({"metadata": {"total_size": total}, "weight_map": places}, file)
    return total


if __name__ == "__main__":
    main()
