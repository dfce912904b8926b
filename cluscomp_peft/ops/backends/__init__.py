"""The backends of the ops, and what all of them promise.

    reference    plain torch, every device                  the definition: see its docstring for the formulas
    cpu          loops compiled by numba and LLVM           tensors on the CPU
    cuda         Triton, and CUDA C++ compiled by NVRTC     tensors on a CUDA device

The contract. `tests/ops/test_backends.py` holds every backend to it.

1. Arguments     `checks.py` has seen them: one device, shapes that belong together, uint8 codes. A backend takes every
                 floating dtype, all strides and every number of tokens, 0 included; scales, residual and bias may each
                 be absent. It writes to none of them and keeps none after the call.
2. Stray codes   A code has b = ceil(log2 n) bits, so where n < 2^b a damaged or hostile file can hold codes that name
                 no centroid. Such a code reads as n - 1, and its gradient goes to centroid n - 1. No kernel reads or
                 writes memory outside of its arguments, whatever the codes are.
3. Exactness     decode: the reference's weight, bit for bit; computed in fp32 (fp64 for an fp64 result), rounded once.
                 linear: `F.linear` with the weight of decode, bit for bit. With few tokens (up to 16 on the CPU, 64 on
                 CUDA) a backend may add up in another order, and may round x or the weight or neither: its error stays
                 within that of rounding each of them once and summing in fp32.
                 codebook_grad: the reference's gradients within rounding. All sums are fp32 (fp64 for an fp64 x), also
                 inside an autocast region.
4. Merging       `linear` gives the same bits whatever dtype codebook and scales are in, if their numbers are the same.
                 So a merged layer computes what the unmerged one did.
5. Determinism   The same call gives the same bits on a device with a number of threads, in every process. decode, and
                 linear with few tokens, do not depend on the number of threads either.
6. Ownership     Results are contiguous and nobody else's memory: no views, so the caller may change them in place.
7. Failures      A backend that is missing, cannot be compiled or cannot be launched leaves its work to a slower one,
                 and at last to the reference, with one warning for each kernel that says what to do; without a warning
                 if an optional dependency is just not installed. A cache of compiled code that cannot be read or
                 written only costs time. Running out of memory is no such failure: it is raised.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from ..packed_weight import Numbers, PackedWeight
from . import cpu, reference

__all__ = ["Backend", "Gradients", "backend_of"]

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # of codebook, scale_in and scale_out


class Backend(NamedTuple):
    """The functions of a backend; those of `reference` say what they take and give."""

    decode: Callable[[PackedWeight, torch.dtype], torch.Tensor]
    linear: Callable[[torch.Tensor, PackedWeight, torch.Tensor | None], torch.Tensor]
    codebook_grad: Callable[[torch.Tensor, torch.Tensor, PackedWeight], Gradients]
    effective: Callable[[PackedWeight, Numbers], PackedWeight]
    effective_backward: Callable[..., tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]]


_REFERENCE = Backend(
    reference.decode,
    reference.linear,
    reference.codebook_grad,
    reference.effective,
    reference.effective_backward,
)
_CPU = _REFERENCE._replace(decode=cpu.decode, linear=cpu.linear, codebook_grad=cpu.codebook_grad)


@functools.cache
def _cuda() -> Backend:
    from . import cuda  # when it is first needed, because it imports Triton

    return Backend(cuda.decode, cuda.linear, cuda.codebook_grad, cuda.effective, cuda.effective_backward)


def backend_of(tensor: torch.Tensor) -> Backend:
    """The backend for tensors on the device of this one."""
    return _CPU if tensor.is_cpu else _cuda() if tensor.is_cuda else _REFERENCE
