"""The ops as torch knows them: `torch.ops.cluscomp.{decode, linear, codebook_grad, round_to}`.

Every op has one schema of flat tensors, a fake that tells shapes and dtypes alone (for `torch.compile` and `meta`
tensors), and autograd where it has a gradient. Its body runs the backend of the tensors' device (`backends`). Another
device gets a faster kernel by `LINEAR.register_kernel("xpu")`, which takes the arguments of the schema and keeps the
contract of `backends`.

Autograd of `linear` keeps x, the packed codes, the codebook and the scales; the weight is decoded again in backward,
so no dense weight outlives a call.

The ops check nothing: call the functions of `functional`.
"""

from __future__ import annotations

from typing import Any

import torch

from . import backends
from .gradients import gradients_of_linear
from .packed_weight import PackedWeight

__all__ = ["CODEBOOK_GRAD", "DECODE", "LINEAR", "ROUND_TO"]


@torch.library.custom_op("cluscomp::decode", mutates_args=())
def DECODE(
    codes: torch.Tensor,
    codebook: torch.Tensor,
    scale_in: torch.Tensor | None,
    scale_out: torch.Tensor | None,
    residual: torch.Tensor | None,
    out_features: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    weight = PackedWeight(codes, codebook, out_features, scale_in, scale_out, residual)
    return backends.backend_of(codes).decode(weight, dtype)


@DECODE.register_fake
def _(codes, codebook, scale_in, scale_out, residual, out_features, dtype):
    return codes.new_empty(out_features, codes.shape[0], dtype=dtype)


@torch.library.custom_op("cluscomp::codebook_grad", mutates_args=())
def CODEBOOK_GRAD(
    x: torch.Tensor,
    grad_output: torch.Tensor,
    codes: torch.Tensor,
    codebook: torch.Tensor,
    scale_in: torch.Tensor | None,
    scale_out: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weight = PackedWeight(codes, codebook, grad_output.shape[1], scale_in, scale_out, residual)
    return backends.backend_of(x).codebook_grad(x, grad_output, weight)


@CODEBOOK_GRAD.register_fake
def _(x, grad_output, codes, codebook, scale_in, scale_out, residual):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        codebook.new_empty(codebook.shape, dtype=dtype),
        codebook.new_empty(0 if scale_in is None else x.shape[1], dtype=dtype),
        codebook.new_empty(0 if scale_out is None else grad_output.shape[1], dtype=dtype),
    )


@torch.library.custom_op("cluscomp::linear", mutates_args=())
def LINEAR(
    x: torch.Tensor,
    codes: torch.Tensor,
    codebook: torch.Tensor,
    scale_in: torch.Tensor | None,
    scale_out: torch.Tensor | None,
    residual: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_features: int,
) -> torch.Tensor:
    weight = PackedWeight(codes, codebook, out_features, scale_in, scale_out, residual)
    return backends.backend_of(x).linear(x, weight, bias)


@LINEAR.register_fake
def _(x, codes, codebook, scale_in, scale_out, residual, bias, out_features):
    return x.new_empty(*x.shape[:-1], out_features)


def _setup_linear(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    x, codes, codebook, scale_in, scale_out, residual, bias, _ = inputs
    ctx.save_for_backward(x, codes, codebook, scale_in, scale_out, residual)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _decode(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    return DECODE(*weight.tensors, weight.out_features, dtype)


def _codebook_grad(x: torch.Tensor, grad_output: torch.Tensor, weight: PackedWeight) -> tuple[torch.Tensor, ...]:
    return CODEBOOK_GRAD(x, grad_output, *weight.tensors)


def _backward_linear(ctx: Any, grad_output: torch.Tensor) -> tuple:
    return gradients_of_linear(_decode, _codebook_grad, ctx, grad_output)


LINEAR.register_autograd(_backward_linear, setup_context=_setup_linear)


# An op of its own, because a compiler that sees a cast down and up again leaves both out, and with them the promise
# that a merged codebook holds what the forward pass used.
@torch.library.custom_op("cluscomp::round_to", mutates_args=())
def ROUND_TO(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return values.to(dtype).to(values.dtype, copy=True)


@ROUND_TO.register_fake
def _(values, dtype):
    return torch.empty_like(values)


def _backward_round(ctx: Any, grad_output: torch.Tensor) -> tuple:
    return grad_output, None


ROUND_TO.register_autograd(_backward_round)
