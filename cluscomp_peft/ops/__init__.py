"""The ops of the method: a weight is decoded, multiplied and trained straight from its codes and codebook.

    functional       what the package calls: decode, linear, adapted_linear, codebook_grad, has_stray_codes, round_to
    rows             decode_rows, for embeddings
    checks             their arguments
    packed_weight      `PackedWeight` and an adapter's `Numbers`, which they take
    schema           the ops of torch.library: schemas, fakes, autograd
    direct           the same calls past torch's dispatcher, where nobody else has to see them
    gradients        the way back through `linear`, for both
    backends         the reference, the CPU's and CUDA's kernels; its docstring is the contract of all

Compute with [`decode`] and [`linear`]; the ops (`torch.ops.cluscomp`) check nothing.
"""

from __future__ import annotations

from .functional import adapted_linear, codebook_grad, decode, has_stray_codes, linear, round_to
from .packed_weight import Numbers, PackedWeight
from .rows import decode_rows

__all__ = [
    "Numbers",
    "PackedWeight",
    "adapted_linear",
    "codebook_grad",
    "decode",
    "decode_rows",
    "has_stray_codes",
    "linear",
    "round_to",
]
