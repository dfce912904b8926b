"""An adapter's numbers are added to codebook and scales, and their gradients made, in one launch each.

See `reference.effective` for the formula and `kernels/effective.cu` for the kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ...packed_weight import Numbers, PackedWeight
from . import nvrtc
from .failures import attempt
from .plans import DTYPES, arguments, function, pointer

__all__ = ["effective", "effective_backward"]

_Found = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]

_EFFECTIVE = arguments(
    "codebook scale_in scale_out numbers numbers_in numbers_out units result result_in result_out",
    "size block finer inputs outputs",
)
_EFFECTIVE_BACKWARD = arguments("grad grad_in grad_out scale_in scale_out units", "size inputs outputs")


def effective(weight: PackedWeight, numbers: Numbers) -> PackedWeight | None:
    """As `reference.effective`, on the current device; None if the kernel does not take the case."""
    codebook, scale_in, scale_out = weight.codebook, weight.scale_in, weight.scale_out
    if not _alike(torch.float32, *numbers) or not _alike(codebook.dtype, codebook, scale_in, scale_out):
        return None
    return attempt("effective", (codebook.device, codebook.dtype), lambda: _effective(weight, numbers))


def _effective(weight: PackedWeight, numbers: Numbers) -> PackedWeight | None:
    codes, codebook, out_features, scale_in, scale_out, _ = weight
    plan = _plan(codebook.device.index, codebook.dtype)
    present, clusters, group_size = codebook.shape
    size, block = numbers.codebook.numel(), clusters * group_size
    result = codebook.new_empty(size // block, clusters, group_size)
    result_in, result_out = (
        scale if change is None else torch.empty_like(change, dtype=codebook.dtype)
        for scale, change in ((scale_in, numbers.scale_in), (scale_out, numbers.scale_out))
    )
    inputs, outputs = (0 if part is None else len(part) for part in (numbers.scale_in, numbers.scale_out))
    plan.forward(
        (-(-(size + inputs + outputs) // 256), 1), 256, 0,
        codebook.data_ptr(), pointer(scale_in), pointer(scale_out), *(pointer(part) for part in numbers),
        result.data_ptr(), pointer(result_in), pointer(result_out),
        size, block, size // block // present, inputs, outputs,
    )  # fmt: skip
    return PackedWeight(codes, result, out_features, result_in, result_out)


def effective_backward(
    grads: Sequence[torch.Tensor],
    scale_in: torch.Tensor | None,
    scale_out: torch.Tensor | None,
    units: torch.Tensor,
    dtypes: Sequence[torch.dtype | None],
    codebook_dtype: torch.dtype,
) -> _Found | None:
    """As `reference.effective_backward`, on the current device and in place; None, with nothing written, if the kernel
    does not take the case."""
    numbers_alike = set(dtypes) <= {torch.float32, None} and _alike(torch.float32, *grads, units)
    if not numbers_alike or not _alike(codebook_dtype, scale_in, scale_out):
        return None
    case = (units.device, codebook_dtype)
    return attempt("effective_backward", case, lambda: _backward(grads, scale_in, scale_out, units, dtypes, case[1]))


def _backward(
    grads: Sequence[torch.Tensor],
    scale_in: torch.Tensor | None,
    scale_out: torch.Tensor | None,
    units: torch.Tensor,
    dtypes: Sequence[torch.dtype | None],
    codebook_dtype: torch.dtype,
) -> _Found:
    plan = _plan(units.device.index, codebook_dtype)
    size = grads[0].numel()
    inputs, outputs = (0 if dtype is None else len(grad) for grad, dtype in zip(grads[1:], dtypes[1:], strict=True))
    plan.backward(
        (-(-(size + inputs + outputs) // 256), 1), 256, 0,
        *(grad.data_ptr() for grad in grads), pointer(scale_in), pointer(scale_out), units.data_ptr(),
        size, inputs, outputs,
    )  # fmt: skip
    return grads[0], *(None if dtype is None else grad for grad, dtype in zip(grads[1:], dtypes[1:], strict=True))  # type: ignore[return-value]


class _Plan(NamedTuple):
    forward: nvrtc.Function
    backward: nvrtc.Function


@functools.cache
def _plan(device: int, dtype: torch.dtype) -> _Plan:
    macros = {"DTYPE": DTYPES[dtype]}
    return _Plan(
        function("effective", "effective", macros, _EFFECTIVE, device, 0),
        function("effective", "effective_backward", macros, _EFFECTIVE_BACKWARD, device, 0),
    )


def _alike(dtype: torch.dtype, *tensors: torch.Tensor | None) -> bool:
    """Whether all are contiguous and of a dtype that the kernels read."""
    given = [tensor for tensor in tensors if tensor is not None]
    return dtype in DTYPES and all(tensor.dtype == dtype and tensor.is_contiguous() for tensor in given)
