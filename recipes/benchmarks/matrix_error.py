"""Relative error of real weight matrices, without any data: ClusComp against round-to-nearest and NF4.

    python recipes/benchmarks/matrix_error.py MATRICES.safetensors [--conv1d] [--bits 2 3 4]

For every 2-D tensor [out, in] of the file (`--conv1d`: [in, out], as GPT-2 stores them): ‖W − Ŵ‖ / ‖W‖, and how far
the largest weight lies from the mean, in standard deviations: few such weights are what breaks quantisers. NF4 and RTN
take a scale (RTN also a minimum) for 64 weights, half a bit; ClusComp's bits are true bits. Writes
results/matrix_error.json.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
from collections.abc import Callable

import torch
from baselines import nf4, round_to_nearest
from memory import write_results
from safetensors.torch import load_file
from torch import nn

from cluscomp_peft.compress.policy import Policy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="safetensors")
    parser.add_argument("--conv1d", action="store_true", help="tensors are [in, out]")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    options = parser.parse_args()
    table = []
    for name, tensor in sorted(load_file(options.file).items()):
        if tensor.ndim != 2:
            continue
        weight = (tensor.t() if options.conv1d else tensor).float().contiguous()
        row = {"matrix": name, "sigmas": float((weight - weight.mean()).abs().max() / weight.std())}
        for bits in options.bits:
            row[f"ClusComp {bits}"] = clustered(weight, bits)
            row[f"RTN {bits}.5"] = baseline(weight, lambda model, bits=bits: round_to_nearest(model, bits))
        row["NF4 4.5"] = baseline(weight, nf4)
        table.append(row)
    write_results("matrix_error", {"settings": {"file": os.path.basename(options.file)}, "rows": table})
    methods = [key for key in table[0] if key not in ("matrix", "sigmas")]
    worst = max(table, key=lambda row: row["sigmas"])
    print(f"| | {' | '.join(methods)} |\n|---|{'---:|' * len(methods)}")
    medians = " | ".join(f"{statistics.median(row[key] for row in table):.4f}" for key in methods)
    print(f"| median of {len(table)} matrices | {medians} |")
    print(f"| {worst['matrix']} ({worst['sigmas']:.0f} σ) | {' | '.join(f'{worst[key]:.4f}' for key in methods)} |")


def clustered(weight: torch.Tensor, bits: float) -> float:
    outputs, inputs = weight.shape
    policy = Policy(bits=bits)
    rest = weight - policy.cluster("matrix", weight, policy.spec_for("matrix", outputs, inputs)).decode(torch.float32)
    return float(rest.norm() / weight.norm())


def baseline(weight: torch.Tensor, method: Callable) -> float:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight
    model, _ = method(copy.deepcopy(nn.Sequential(nn.ModuleList([layer]))))
    return float((model[0][0].weight.detach() - weight).norm() / weight.norm())


if __name__ == "__main__":
    main()
