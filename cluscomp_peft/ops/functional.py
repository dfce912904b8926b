"""The functions that the package calls: they check arguments, follow autocast and choose the way to a backend."""

from __future__ import annotations

import torch

from ..codes import code_bits
from . import direct
from .checks import check, check_gradient
from .packed_weight import Numbers, PackedWeight
from .schema import CODEBOOK_GRAD, DECODE, LINEAR, ROUND_TO

__all__ = ["adapted_linear", "codebook_grad", "decode", "has_stray_codes", "linear", "round_to"]


def decode(weight: PackedWeight, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The dense weight. Not differentiable; train through [`linear`].

    Args:
        weight ([`PackedWeight`]): Codes, codebook and scales.
        dtype (`torch.dtype`, *optional*): Of the result; the codebook's by default.

    Returns:
        `torch.Tensor`: [out, in], contiguous, `s_out · (residual + decoded) · s_in` rounded once from fp32.

    Raises:
        TypeError: If the codes are not uint8, or something else is not floating point.
        ValueError: If tensors are on several devices, or shapes do not belong together.
    """
    check(weight)
    dtype = dtype or weight.codebook.dtype
    if not dtype.is_floating_point:
        raise TypeError(f"a weight is decoded to a floating-point dtype, got {dtype}.")
    with torch.no_grad():
        return DECODE(*weight.tensors, weight.out_features, dtype)


def linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x Wᵀ + bias` with W as [`decode`] gives it, in the dtype of x (under autocast: in autocast's).

    Differentiable in x, codebook, scales, residual and bias. Bit for bit `torch.nn.functional.linear` with the decoded
    weight; a few tokens (on CUDA up to 64, of a large matrix on the CPU up to 16) are summed in another order: see
    `backends`.

    Args:
        x (`torch.Tensor`): [..., in], floating point.
        weight ([`PackedWeight`]): Codes, codebook and scales.
        bias (`torch.Tensor`, *optional*): [out].

    Raises:
        TypeError: If the codes are not uint8, or something else is not floating point.
        ValueError: If tensors are on several devices, or shapes do not belong together.
    """
    check(weight, x, bias)
    device = "cpu" if x.is_cpu else x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    if direct.applies(x, *weight.tensors, bias):
        return direct.linear(x, weight, bias)
    return LINEAR(x, *weight.tensors, bias, weight.out_features)


def adapted_linear(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, numbers: Numbers
) -> torch.Tensor | None:
    """[`linear`] with an adapter's numbers added to the weight, in one step; None where that is not possible.

    It is not where a compiler, a dispatch mode, a tensor subclass or a functional transform has to see each op, the
    weight is trained itself or fp64, or the adapter's codebooks are no multiple of the weight's. The weight has no
    residual.
    """
    codes, codebook, _, scale_in, scale_out, _ = weight
    if not direct.applies(x, codes, codebook, scale_in, scale_out, bias, *numbers):
        return None
    frozen = not (
        codebook.requires_grad
        or (scale_in is not None and scale_in.requires_grad)
        or (scale_out is not None and scale_out.requires_grad)
    )
    blocks, left = divmod(len(numbers.codebook), codebook.shape[1])
    if not frozen or left or blocks % len(codebook) or x.dtype == torch.float64 or codebook.dtype == torch.float64:
        return None
    check(weight, x, bias)
    device = "cpu" if x.is_cpu else x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    return direct.adapted(x, weight, bias, numbers)


def codebook_grad(
    x: torch.Tensor, grad_output: torch.Tensor, weight: PackedWeight
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of codebook and scales for x [tokens, in] and dL/dy [tokens, out].

    Returns:
        Gradients of codebook [m, n, g], scale_in [in] and scale_out [out] (the last two empty where there is no
        scale), fp32, or fp64 for an fp64 x.

    Raises:
        TypeError: If the codes are not uint8, or something else is not floating point.
        ValueError: If tensors are on several devices, or shapes do not belong together.
    """
    check_gradient(x, grad_output, weight)
    check(weight, x)
    return CODEBOOK_GRAD(x, grad_output, *weight.tensors)


def has_stray_codes(codes: torch.Tensor, num_clusters: int, groups: int) -> bool:
    """Whether codes [in, width] name centroids that a codebook of `num_clusters` does not have.

    Asked of one token of ones in a layer with a weight for each group: 1 where its code is too large, 0 elsewhere.

    Raises:
        TypeError, ValueError: As [`linear`] does.
    """
    entries = 2 ** code_bits(num_clusters)
    if num_clusters == entries:
        return False
    marks = torch.zeros(1, entries, 1, device=codes.device)
    marks[:, num_clusters:] = 1
    with torch.no_grad():
        found = linear(torch.ones(1, codes.shape[0], device=codes.device), PackedWeight(codes, marks, groups))
    return bool(found.any())


def round_to(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Values rounded to what `dtype` can hold, in their own dtype; the gradient passes unchanged."""
    return values if dtype == values.dtype else ROUND_TO(values, dtype)
