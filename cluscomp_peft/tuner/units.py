"""How much one unit of a trained number stands for, so that one learning rate fits every model.

A step of AdamW moves every trained number by about the learning rate η, whatever its gradient. With a unit of u RMS of
the codebook all weights of a matrix change by η·u of their size, along the gradient's signs, and the layer's output
changes by about as much: measured, 5 % of it at η·u = 0.05, in a model of 0.7 million parameters as in one of 135
million, in every kind of matrix. What differs is how many matrices move at once. Blocks follow one another, and their
changes, all of them downhill, add up in the loss: the same step lowers (or, when it is too long, raises) the loss 13
times faster in 30 blocks than in 2. So the unit is inverse to the number of blocks that are trained.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["count_blocks", "default_delta_scale"]

# RMS of the codebook for one unit, times the number of blocks.
_SCALE = 512.0
_INDEX = re.compile(r"(?:^|.*?\.)\d+(?=\.|$)")


def count_blocks(names: Iterable[str]) -> int:
    """How many blocks follow one another among layers of these names, at least 1.

    A block is what shares a name up to its first index: `model.layers.3` with all experts in it. Layers whose names
    have none count as one block together.
    """
    found = (_INDEX.match(name) for name in names)
    return max(1, len({match.group() if match else "" for match in found}))


def default_delta_scale(blocks: int) -> float:
    """RMS of the codebook that one unit of a centroid's delta stands for, in a model that trains so many blocks."""
    return _SCALE / blocks
