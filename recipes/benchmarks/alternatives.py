"""What else the bytes of a matrix could buy: exact outliers, or two additive codebooks, at equal true bits.

    python recipes/benchmarks/alternatives.py MATRICES.safetensors [--bits 2 3 4] [--rows 768]

For every 2-D tensor of the file (at most `--matrices`, cut to `--rows` outputs, so that a small matrix is a small one)
the same number of bytes is spent in each way, and the relative error ‖W − Ŵ‖² / ‖W‖² is compared with the first's:

    plain       what the package does: one codebook, (g, n) that promise the least error, with and without scales
    outliers    0.1, 0.5 and 1 % of the weights, those of the largest squared error after clustering, kept exactly as
                a 16-bit value and a 16-bit column, with a row pointer of 32 bits each (CSR); what they cost comes off
                the budget of the codebook
    additive    W ≈ C₁[c₁] + C₂[c₂] with twice the group size (AQLM, arXiv 2401.06118): codes by a beam of 8 over both
                codebooks, codebooks by alternating means, 12 rounds; n is what fits

Writes results/alternatives.json: medians over the matrices.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from typing import Any

import torch
from memory import write_results
from safetensors.torch import load_file

from cluscomp_peft.clustering import kmeans
from cluscomp_peft.codes import ClusterSpec, group, ungroup
from cluscomp_peft.compress.policy import Policy

SHARES = (0.001, 0.005, 0.01)
ROUNDS, BEAM = 12, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="safetensors")
    parser.add_argument("--bits", type=float, nargs="+", default=[2, 3, 4])
    parser.add_argument("--rows", type=int, nargs="+", default=[128, 768], help="outputs of the matrices")
    parser.add_argument("--matrices", type=int, default=4)
    options = parser.parse_args()
    weights = [tensor.float() for _, tensor in sorted(load_file(options.file).items()) if tensor.ndim == 2]
    table = []
    for rows in options.rows:
        for bits in options.bits:
            parts = [weight[:rows, : max(rows, 128)] for weight in weights[: options.matrices]]
            found = [measure(part, bits) for part in parts]
            row: dict[str, Any] = {"outputs": rows, "inputs": parts[0].shape[1], "bits": bits}
            for key in found[0]:
                ratios = [entry[key] / entry["plain"] for entry in found if entry[key] is not None]
                row[key] = statistics.median(ratios) if ratios else None
            row["plain"] = statistics.median(entry["plain"] for entry in found)
            table.append(row)
            print(row, file=sys.stderr, flush=True)
    settings = {"file": os.path.basename(options.file), "matrices": options.matrices}
    write_results("alternatives", {"settings": settings, "rows": table})
    columns = list(table[0])
    print(f"| {' | '.join(columns)} |\n|{'---:|' * len(columns)}")
    for row in table:
        cells = [f"{value:.4g}" if isinstance(value, (int, float)) else "-" for value in row.values()]
        print(f"| {' | '.join(cells)} |")


def measure(weight: torch.Tensor, bits: float) -> dict[str, float | None]:
    """Relative squared error of each way, None where nothing fits the budget."""
    energy = float(weight.square().sum())
    outputs = len(weight)
    result: dict[str, float | None] = {"plain": float(clustered(weight, bits).square().sum()) / energy}
    for share in SHARES:
        kept = round(share * weight.numel())
        cost = (32 * kept + 32 * (outputs + 1)) / weight.numel()
        key = f"outliers {share:.1%}"
        try:
            rest = clustered(weight, bits - cost)
        except ValueError:
            result[key] = None
            continue
        # Those that clustering serves worst are taken out, and the others clustered without them.
        worst = torch.topk(rest.square().flatten(), kept).indices
        without = weight.flatten().index_fill(0, worst, 0).view_as(weight)
        rest = clustered(without, bits - cost).flatten().index_fill(0, worst, 0)
        result[key] = float(rest.square().sum()) / energy
    best = additive(weight, bits)
    result["additive"] = None if best is None else best / energy
    return result


def clustered(weight: torch.Tensor, bits: float) -> torch.Tensor:
    """W − Ŵ at `bits`, the better of with and without scales."""
    outputs, inputs = weight.shape
    best: torch.Tensor | None = None
    for scales in (False, True):
        try:
            policy = Policy(bits=bits, scales=scales)
            spec = policy.spec_for("matrix", outputs, inputs)
        except ValueError:
            continue
        rest = weight - policy.cluster("matrix", weight, spec).decode(torch.float32)
        if best is None or rest.square().sum() < best.square().sum():
            best = rest
    if best is None:
        raise ValueError(f"{bits} bits are too few")
    return best


def additive(weight: torch.Tensor, bits: float) -> float | None:
    """‖W − Ŵ‖² of the best pair of codebooks within `bits`."""
    outputs, inputs = weight.shape
    best: float | None = None
    for size in (2, 3, 4, 6, 8, 12, 16):
        for code_bits in range(3, 11):
            clusters = 2**code_bits
            spent = 2 * ClusterSpec(size, clusters).num_bytes(inputs, outputs)
            vectors = group(weight, size).reshape(-1, size)
            # Only what uses the budget: much smaller pairs cannot win.
            if not 0.85 * bits <= 8 * spent / weight.numel() <= bits or clusters > len(vectors) // 2:
                continue
            approximation = fit_additive(vectors, clusters)
            rest = weight - ungroup(approximation.view(inputs, -1, size), outputs)
            error = float(rest.square().sum())
            best = error if best is None else min(best, error)
    return best


def fit_additive(vectors: torch.Tensor, clusters: int) -> torch.Tensor:
    first, codes, _ = kmeans(vectors, clusters)
    second, codes_2, _ = kmeans(vectors - first[codes], clusters)
    for _ in range(ROUNDS):
        # Beam: the best few of the first codebook by themselves, each with its best partner.
        near = torch.cdist(vectors, first).topk(min(BEAM, clusters), largest=False).indices
        best = torch.full((len(vectors),), torch.inf)
        for k in range(near.shape[1]):
            rest = vectors - first[near[:, k]]
            distance, partner = torch.cdist(rest, second).min(1)
            better = distance < best
            best = torch.where(better, distance, best)
            codes = torch.where(better, near[:, k], codes)
            codes_2 = torch.where(better, partner, codes_2)
        first = _means(vectors - second[codes_2], codes, first)
        second = _means(vectors - first[codes], codes_2, second)
    return first[codes] + second[codes_2]


def _means(values: torch.Tensor, codes: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    sums = torch.zeros_like(old).index_add_(0, codes, values)
    counts = torch.bincount(codes, minlength=len(old))[:, None]
    return torch.where(counts > 0, sums / counts.clamp_min(1), old)


if __name__ == "__main__":
    main()
