"""What adapters add to a layer of codes: deltas of its codebook and scales, summed and applied.

    codebook' = round(codebook + ΔC₁ + ΔC₂ …)         rounded to the dtype in which the codebook is stored
    scale'    = round(scale · (1 + δ₁ + δ₂ …))

Rounding happens in the forward pass too (its gradient passes straight through), so a merged layer computes bit for bit
what the unmerged one did, and it takes the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from . import ops

__all__ = ["Delta", "apply_deltas", "in_absolute_units", "refine", "sum_deltas"]


class Delta(NamedTuple):
    """What an adapter adds to a layer, in absolute units, fp32.

    codebook: [m, n, g] with any m; together with a layer of k codebooks it makes lcm(k, m). `scale_in` [in] and
    `scale_out` [out] are relative, 0 leaves a scale as it is; None changes nothing.
    """

    codebook: torch.Tensor
    scale_in: torch.Tensor | None = None
    scale_out: torch.Tensor | None = None


def in_absolute_units(numbers: ops.Numbers, num_clusters: int) -> Delta:
    """What an adapter's numbers stand for, fp32, differentiable."""
    unit, scale_unit = numbers.units.unbind()
    scales = [None if part is None else part.float() * scale_unit for part in (numbers.scale_in, numbers.scale_out)]
    codebook = numbers.codebook
    return Delta(codebook.float().view(-1, num_clusters, codebook.shape[1]) * unit, *scales)


def sum_deltas(
    deltas: Sequence[Delta], weights: Sequence[float] | None = None, in_features: int | None = None
) -> Delta:
    """The (weighted) sum of deltas; codebooks of different numbers of blocks meet at their least common multiple, or
    where that is more at one for each of the `in_features` channels.
    """
    weights = [1.0] * len(deltas) if weights is None else weights
    blocks = _common_blocks([delta.codebook.shape[0] for delta in deltas], in_features)

    def total(values: list[torch.Tensor | None]) -> torch.Tensor | None:
        terms = [
            value if weight == 1 else value * weight
            for value, weight in zip(values, weights, strict=True)
            if value is not None
        ]
        return sum(terms[1:], start=terms[0]) if terms else None

    codebook = total([refine(delta.codebook, blocks) for delta in deltas])
    assert codebook is not None
    return Delta(codebook, total([delta.scale_in for delta in deltas]), total([delta.scale_out for delta in deltas]))


def apply_deltas(
    codebook: torch.Tensor,
    scale_in: torch.Tensor | None,
    scale_out: torch.Tensor | None,
    deltas: Sequence[Delta],
    in_features: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Sums `deltas` onto codebook [m, n, g] and scales of a layer with `in_features` input channels.

    Results are fp32 (fp64) but hold values of the codebook's dtype. The gradient with respect to the deltas ignores
    that rounding.
    """
    if not deltas:
        return codebook, scale_in, scale_out
    dtype = codebook.dtype
    total = sum_deltas(deltas, in_features=in_features)
    blocks = _common_blocks([codebook.shape[0], total.codebook.shape[0]], in_features)
    values = refine(codebook.to(total.codebook.dtype), blocks) + refine(total.codebook, blocks)

    def rescale(scale: torch.Tensor | None, change: torch.Tensor | None) -> torch.Tensor | None:
        if change is None:
            return scale
        factor = 1 + change
        return ops.round_to(factor if scale is None else scale.to(factor.dtype) * factor, dtype)

    return ops.round_to(values, dtype), rescale(scale_in, total.scale_in), rescale(scale_out, total.scale_out)


def refine(codebook: torch.Tensor, blocks: int) -> torch.Tensor:
    """[m, n, g] to [blocks, n, g], for a multiple of m or one block for each input channel.

    Blocks of input channels nest, because floor(floor(i·km/in) / k) = floor(i·m/in).
    """
    present = codebook.shape[0]
    if blocks % present:
        return codebook[torch.arange(blocks, device=codebook.device) * present // blocks]
    return codebook if blocks == present else codebook.repeat_interleave(blocks // present, 0)


def _common_blocks(counts: list[int], in_features: int | None) -> int:
    """In how many blocks codebooks of these numbers of blocks can be added up."""
    blocks = math.lcm(*counts)
    return blocks if in_features is None or len(set(counts)) == 1 else min(blocks, in_features)
