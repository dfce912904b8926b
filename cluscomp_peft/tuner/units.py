"""How much one unit of a trained number stands for, so that one learning rate fits every model.

A step of AdamW moves every trained number by about the learning rate η, whatever its gradient. With units of u RMS of
the codebook all weights of a matrix change by η·u of their size, and what that does depends on two things.

1. How many blocks move at once. The output of a layer changes by about η·u of its size, in a model of 0.7 million
   parameters as in one of 135 million, in every kind of matrix. But blocks follow one another, and their changes, all
   of them downhill, add up in the loss: the same first step lowers it (or, too long, raises it) 13 times faster in 30
   blocks than in 2.
2. How many numbers fit the gradient. A number that N weights share moves them by the sign of the sum of their N
   gradients, which agrees with one of them by 1/√N. Over all weights that adds up to √(numbers) along the gradient;
   widths cancel, and √rank stays, where rank is numbers / (in + out). That is the first step. Over 20 to 250 the cube
   root fits better: directions change, and noise, which does not add up, counts more.

    u = 1600 / blocks / rank^⅓

The same for all matrices of a model: larger where a layer's output moves less, by fan-in and shared weights or by the
activations of the first batch, was no better at rank 8 and worse at rank 64 (TinyStories-656K). Sweeps of the rate
(`recipes/benchmarks/learning_rates.py`) put the best one at 0.9e-4 to 4e-4 for models of 2, 5 and 30 blocks,
widths of 128 to 576, ranks 8 to 64 and batches of 1 to 16 rows; a model of 8 billion parameters has 32 blocks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import torch

__all__ = ["count_blocks", "default_delta_scale", "root_mean_square"]

_SCALE = 1600.0
_POWER = 1 / 3
_INDEX = re.compile(r"(?:^|.*?\.)\d+(?=\.|$)")


def count_blocks(names: Iterable[str]) -> int:
    """How many blocks follow one another among layers of these names, at least 1.

    A block is what shares a name up to its first index: `model.layers.3` with all experts in it. Layers whose names
    have none count as one block together.
    """
    found = (_INDEX.match(name) for name in names)
    return max(1, len({match.group() if match else "" for match in found}))


def default_delta_scale(blocks: int, in_features: int, out_features: int, numbers: int) -> float:
    """RMS of the codebook that one unit of a centroid's delta stands for.

    Args:
        blocks: That are trained in the model; see [`count_blocks`].
        in_features, out_features: Of the matrix.
        numbers: Of its delta codebooks together.
    """
    rank = min(numbers, in_features * out_features) / (in_features + out_features)
    return _SCALE / blocks / rank**_POWER


def root_mean_square(values: torch.Tensor) -> float:
    """Of values in memory; 1 if they are elsewhere, all 0, or not finite."""
    rms = math.nan if values.is_meta else float(values.detach().float().square().mean().sqrt())
    return rms if rms > 0 and math.isfinite(rms) else 1.0
