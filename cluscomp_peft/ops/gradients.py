"""The way back through `linear`, for the op (`schema`) and for calls past torch's dispatcher (`direct`).

With dy = dL/dy [tokens, out] and W = s_out · V · s_in as in `backends.reference`:

    dL/dx = dy W        dL/dbias = Σ_tokens dy        dL/dresidual = s_out · (dyᵀ x) · s_in

and those of codebook and scales by `codebook_grad`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .backends import cpu
from .packed_weight import PackedWeight

__all__ = ["Wanted", "gradients", "gradients_of_linear"]


class Wanted(NamedTuple):
    """Which gradients are asked for; those of codebook and scales come together."""

    x: bool
    weight: bool
    residual: bool
    bias: bool


def gradients(
    decode: Callable[[PackedWeight, torch.dtype], torch.Tensor],
    codebook_grad: Callable[[torch.Tensor, torch.Tensor, PackedWeight], tuple[torch.Tensor, ...]],
    x: torch.Tensor,
    weight: PackedWeight,
    grad_output: torch.Tensor,
    wanted: Wanted,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of x (in its dtype), codebook, scale_in, scale_out (fp32 or fp64), residual (in its dtype) and bias
    (in that of `grad_output`); None where not wanted.

    Args:
        decode, codebook_grad: The ops, or a backend's functions.
        x (`torch.Tensor`): [..., in].
        grad_output (`torch.Tensor`): dL/dy [..., out].
    """
    grad_x = grad_residual = grad_bias = None
    grads: tuple[torch.Tensor | None, ...] = (None, None, None)
    flat_grad = grad_output.reshape(-1, weight.out_features)
    flat_x = x.reshape(-1, x.shape[-1])
    if wanted.x:
        dtype = cpu.product_dtype(flat_grad.dtype) if x.is_cpu else flat_grad.dtype
        grad_x = _product(flat_grad.to(dtype), decode(weight, dtype)).to(x.dtype).view(x.shape)
    if wanted.weight:
        grads = codebook_grad(flat_x, flat_grad, weight)
    if wanted.residual:
        assert weight.residual is not None
        dtype = weight.residual.dtype
        grad_residual = (flat_grad.t() @ flat_x).to(dtype)
        if weight.scale_out is not None:
            grad_residual = grad_residual * weight.scale_out[:, None].to(dtype)
        if weight.scale_in is not None:
            grad_residual = grad_residual * weight.scale_in.to(dtype)
    if wanted.bias:
        grad_bias = flat_grad.sum(0)
    return grad_x, *grads, grad_residual, grad_bias


def gradients_of_linear(
    decode: Callable[[PackedWeight, torch.dtype], torch.Tensor],
    codebook_grad: Callable[[torch.Tensor, torch.Tensor, PackedWeight], tuple[torch.Tensor, ...]],
    ctx: Any,
    grad_output: torch.Tensor,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of all arguments of the op `linear`, each in the dtype of its argument.

    `ctx` has saved x, codes, codebook, scale_in, scale_out and residual, and has the attribute `bias_dtype`.
    """
    x, codes, codebook, scale_in, scale_out, residual = ctx.saved_tensors
    asked_x, _, *of_codebook, of_residual, of_bias, _ = ctx.needs_input_grad
    wanted = Wanted(asked_x, any(of_codebook), of_residual, of_bias)
    weight = PackedWeight(codes, codebook, grad_output.shape[-1], scale_in, scale_out, residual)
    grad_x, *grads, grad_residual, grad_bias = gradients(decode, codebook_grad, x, weight, grad_output, wanted)
    for place, (asked, tensor) in enumerate(zip(of_codebook, (codebook, scale_in, scale_out), strict=True)):
        grads[place] = grads[place].to(tensor.dtype) if asked else None  # type: ignore[union-attr]
    if grad_bias is not None:
        grad_bias = grad_bias.to(ctx.bias_dtype)
    return grad_x, None, *grads, grad_residual, grad_bias, None


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The product in the dtype of both, even where backward runs inside the user's autocast region."""
    device = left.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return left @ right
    with torch.autocast(device, enabled=False):
        return left @ right
