"""Memory of `cluscomp compress`, CPU: a model of any size takes little more than its largest matrices.

    python recipes/benchmarks/compress_memory.py                    # a Llama of 2 GB; minutes
    python recipes/benchmarks/compress_memory.py --layers 2         # for a try

The dense checkpoint is random bf16, written shard by shard into a temporary folder. The command runs in a process of
its own; what counts is the most memory that it ever held (VmHWM), imports included. They take the larger part: torch,
transformers with what it finds installed (torch.compile, triton, hqq), and numba with LLVM; PEFT is not imported.
`--hide hqq triton` measures an installation without. Compiled kernels are cached: the first run after an installation,
which compiles them, takes some 90 MB more. Writes results/compress_memory.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

import torch
from memory import write_results
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--bits", type=float, default=2.0)
    parser.add_argument("--quality", default="default")
    parser.add_argument("--hide", nargs="*", default=[], help="packages that count as not installed")
    parser.add_argument("--results", default="compress_memory", help="name of the file under results/; - for none")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        dense, target = os.path.join(folder, "dense"), os.path.join(folder, "compressed")
        size = write_dense(dense, options)
        flags = ["--bits", str(options.bits), "--quality", options.quality]
        started = time.perf_counter()
        hide = "import sys; " + "".join(f"sys.modules[{name!r}] = None; " for name in options.hide)
        run = hide + "from cluscomp_peft.cli import main; sys.exit(main(sys.argv[1:]))"
        peaks = {
            "imports": peak_of(hide + "import cluscomp_peft.compress.checkpoint"),
            "cluscomp compress": peak_of(run, "compress", dense, target, *flags),
        }
        seconds = time.perf_counter() - started
        with open(os.path.join(target, "cluscomp_report.json"), encoding="utf-8") as file:
            summary = json.load(file)["summary"]
        after = sum(entry.stat().st_size for entry in os.scandir(target))
    print(f"{'':<20}{'MB':>8}")
    rows = {"dense model": size, "compressed model": after, **{f"peak, {name}": peak for name, peak in peaks.items()}}
    for name, value in rows.items():
        print(f"{name:<24}{value / 1e6:>8.0f}")
    print(f"{seconds:.0f} s, {summary['true_bits']:.3f} true bits per weight")
    if options.results != "-":
        content = {"settings": vars(options), "rows": rows, "seconds": seconds, "true_bits": summary["true_bits"]}
        write_results(options.results, content)


def write_dense(folder: str, options: argparse.Namespace) -> int:
    """A random checkpoint, a block a shard; returns its bytes."""
    config = LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        dtype=torch.bfloat16,
        architectures=["LlamaForCausalLM"],
    )
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


def peak_of(code: str, *arguments: str) -> int:
    """Bytes of the most memory that a Python process held, read while it runs: the figure of a child that is gone
    (ru_maxrss) would count what this process held when it started the child."""
    child = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.DEVNULL)
    peak = 0
    while child.poll() is None:
        try:
            with open(f"/proc/{child.pid}/status", encoding="ascii") as file:
                lines = [line for line in file if line.startswith("VmHWM")]
            peak = max([peak, *(int(line.split()[1]) * 1024 for line in lines)])
        except OSError:
            break
        time.sleep(0.02)
    if child.wait() != 0:
        raise RuntimeError(f"{' '.join(arguments) or code} failed with status {child.returncode}")
    return peak


if __name__ == "__main__":
    main()
