"""What a layer with an adapter computes with on CUDA, and the way back, each in one launch: `kernels/effective.cu`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import nvrtc
from .plans import DTYPES, arguments, function, planned, pointer

__all__ = ["effective", "effective_backward"]

_EFFECTIVE = arguments(
    "codebook scale_in scale_out numbers numbers_in numbers_out units result result_in result_out",
    "size block finer inputs outputs",
)
_EFFECTIVE_BACKWARD = arguments("grad grad_in grad_out scale_in scale_out units", "size inputs outputs")


def effective(
    codebook: torch.Tensor,
    scale_in: torch.Tensor | None,
    scale_out: torch.Tensor | None,
    numbers: torch.Tensor,
    numbers_in: torch.Tensor | None,
    numbers_out: torch.Tensor | None,
    units: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None] | None:
    """Codebook and scales with an adapter, as `direct.py` says, in one launch."""
    if not _alike(torch.float32, numbers, numbers_in, numbers_out, units) or not _alike(
        codebook.dtype, codebook, scale_in, scale_out
    ):
        return None
    plan = planned(_plan_effective, codebook.device.index, codebook.dtype)
    if plan is None:
        return None
    present, clusters, group_size = codebook.shape
    size, block = numbers.numel(), clusters * group_size
    result = codebook.new_empty(size // block, clusters, group_size)
    results = [scale if change is None else torch.empty_like(change, dtype=codebook.dtype)
               for scale, change in ((scale_in, numbers_in), (scale_out, numbers_out))]  # fmt: skip
    inputs, outputs = (0 if part is None else len(part) for part in (numbers_in, numbers_out))
    plan[0](
        (-(-(size + inputs + outputs) // 256), 1), 256, 0,
        codebook.data_ptr(), pointer(scale_in), pointer(scale_out), numbers.data_ptr(), pointer(numbers_in),
        pointer(numbers_out), units.data_ptr(), result.data_ptr(), pointer(results[0]), pointer(results[1]),
        size, block, size // block // present, inputs, outputs,
    )  # fmt: skip
    return result, results[0], results[1]


def effective_backward(
    grads: Sequence[torch.Tensor],
    codebook_dtype: torch.dtype,
    scale_in: torch.Tensor | None,
    scale_out: torch.Tensor | None,
    units: torch.Tensor,
    trained: tuple[bool, bool],
) -> bool:
    """Turns gradients of the sum into those of the numbers, in place; False if nothing was done.

    `trained`: whether there are numbers for the scales of inputs, of outputs.
    """
    if not _alike(torch.float32, *grads, units) or not _alike(codebook_dtype, scale_in, scale_out):
        return False
    plan = planned(_plan_effective, units.device.index, codebook_dtype)
    if plan is None:
        return False
    size = grads[0].numel()
    inputs, outputs = (len(grad) if wanted else 0 for grad, wanted in zip(grads[1:], trained, strict=True))
    plan[1](
        (-(-(size + inputs + outputs) // 256), 1), 256, 0,
        *(grad.data_ptr() for grad in grads), pointer(scale_in), pointer(scale_out), units.data_ptr(),
        size, inputs, outputs,
    )  # fmt: skip
    return True


def _plan_effective(device: int, dtype: torch.dtype) -> tuple[nvrtc.Function, nvrtc.Function]:
    macros = {"DTYPE": DTYPES[dtype]}
    return (
        function("effective", "effective", macros, _EFFECTIVE, device, 0),
        function("effective", "effective_backward", macros, _EFFECTIVE_BACKWARD, device, 0),
    )


def _alike(dtype: torch.dtype, *tensors: torch.Tensor | None) -> bool:
    """Whether all are contiguous and of a dtype that the kernels read."""
    given = [tensor for tensor in tensors if tensor is not None]
    return dtype in DTYPES and all(tensor.dtype == dtype and tensor.is_contiguous() for tensor in given)
