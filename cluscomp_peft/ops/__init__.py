"""The ops of the method, registered as `torch.ops.cluscomp.{decode, linear, codebook_grad}`.

Every op has one schema, a shape-only fake (for `torch.compile` and `meta` tensors), autograd, and a pure-torch
reference that runs on every device. A faster backend is another kernel of the same op:

    from cluscomp_peft import ops
    @ops.LINEAR.register_kernel("cuda")
    def linear_cuda(x, codes, codebook, scale_in, scale_out, residual, bias, out_features): ...

Autograd of `linear` keeps x, the packed codes, the codebook and the scales; the weight is decoded again in backward,
so no dense weight outlives a call. The functions [`decode`] and [`linear`] check their arguments and follow autocast;
call those, not the ops.

A code has b = ceil(log2 n) bits, so where n < 2^b a damaged or hostile file can hold codes that name no centroid. On
every backend such a code reads as code n - 1, and its gradient goes to entry n - 1: no kernel leaves the codebook's
memory, and all compute the same. [`has_stray_codes`] finds them, and what loads a file refuses them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..codes import code_bits
from . import direct
from .backends import cpu, reference
from .checks import check, check_gradient
from .direct import Numbers, backward_of_linear, owned

__all__ = [
    "CODEBOOK_GRAD",
    "DECODE",
    "LINEAR",
    "ROUND_TO",
    "Numbers",
    "adapted_linear",
    "codebook_grad",
    "decode",
    "has_stray_codes",
    "linear",
    "round_to",
]


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
    return reference.decode(codes, codebook, scale_in, scale_out, residual, out_features, dtype)


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
    # Backward may run inside the user's autocast region; the fp32 sums must stay fp32.
    with torch.autocast(x.device.type, enabled=False):
        return reference.codebook_grad(x, grad_output, codes, codebook, scale_in, scale_out, residual)


@CODEBOOK_GRAD.register_fake
def _(x, grad_output, codes, codebook, scale_in, scale_out, residual):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        codebook.new_empty(codebook.shape, dtype=dtype),
        codebook.new_empty(0 if scale_in is None else x.shape[1], dtype=dtype),
        codebook.new_empty(0 if scale_out is None else grad_output.shape[1], dtype=dtype),
    )


@functools.partial(torch.library.custom_op, "cluscomp::linear", mutates_args=())
@owned
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
    return reference.linear(x, codes, codebook, scale_in, scale_out, residual, bias, out_features)


@LINEAR.register_fake
def _(x, codes, codebook, scale_in, scale_out, residual, bias, out_features):
    return x.new_empty(*x.shape[:-1], out_features)


def _linear_setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    x, codes, codebook, scale_in, scale_out, residual, bias, _ = inputs
    ctx.save_for_backward(x, codes, codebook, scale_in, scale_out, residual)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx: Any, grad_output: torch.Tensor) -> tuple:
    return backward_of_linear(DECODE, CODEBOOK_GRAD, ctx, grad_output)


LINEAR.register_autograd(_linear_backward, setup_context=_linear_setup_context)


def _on_cuda(name: str) -> Callable[..., Any]:
    def kernel(*args: Any) -> Any:
        from .backends import cuda  # by the first call on a device, because it imports Triton

        return getattr(cuda, name)(*args)

    return kernel


DECODE.register_kernel("cpu")(cpu.decode)
LINEAR.register_kernel("cpu")(owned(cpu.linear))
CODEBOOK_GRAD.register_kernel("cpu")(cpu.codebook_grad)
DECODE.register_kernel("cuda")(_on_cuda("decode"))
LINEAR.register_kernel("cuda")(owned(_on_cuda("linear")))
CODEBOOK_GRAD.register_kernel("cuda")(_on_cuda("codebook_grad"))


# An op of its own, because a compiler that sees a cast down and up again leaves both out, and with them the promise
# that a merged codebook holds what the forward pass used.
@torch.library.custom_op("cluscomp::round_to", mutates_args=())
def ROUND_TO(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return values.to(dtype).to(values.dtype, copy=True)


@ROUND_TO.register_fake
def _(values, dtype):
    return torch.empty_like(values)


def _round_backward(ctx: Any, grad_output: torch.Tensor) -> tuple:
    return grad_output, None


ROUND_TO.register_autograd(_round_backward)


def round_to(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Values rounded to what `dtype` can hold, in their own dtype; the gradient passes unchanged."""
    return values if dtype == values.dtype else ROUND_TO(values, dtype)


def decode(
    codes: torch.Tensor,
    codebook: torch.Tensor,
    scale_in: torch.Tensor | None = None,
    scale_out: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    out_features: int,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The weight that codes and codebook stand for. Not differentiable; train through [`linear`].

    Args:
        codes (`torch.Tensor`): [in, ceil(ceil(out / g) · b / 8)], uint8, packed by `cluscomp_peft.codes.pack`.
        codebook (`torch.Tensor`): [m, n, g], floating point; input channel i uses codebook `i * m // in`.
        scale_in (`torch.Tensor`, *optional*): [in].
        scale_out (`torch.Tensor`, *optional*): [out].
        residual (`torch.Tensor`, *optional*): [out, in], a dense weight that the decoded one is added to.
        out_features (`int`): out, which the codes alone do not tell when g does not divide it.
        dtype (`torch.dtype`, *optional*): Of the result; the codebook's by default.

    Returns:
        `torch.Tensor`: [out, in], contiguous, `s_out · (residual + decoded) · s_in` rounded once from fp32.

    Raises:
        TypeError: If the codes are not uint8, or something else is not floating point.
        ValueError: If tensors are on several devices, or shapes do not belong together.
    """
    check(None, codes, codebook, scale_in, scale_out, residual, None, out_features)
    dtype = dtype or codebook.dtype
    if not dtype.is_floating_point:
        raise TypeError(f"a weight is decoded to a floating-point dtype, got {dtype}.")
    with torch.no_grad():
        return DECODE(codes, codebook, scale_in, scale_out, residual, out_features, dtype)


def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    codebook: torch.Tensor,
    scale_in: torch.Tensor | None = None,
    scale_out: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    out_features: int,
) -> torch.Tensor:
    """`x Wᵀ + bias` with W as [`decode`] gives it, in the dtype of x (under autocast: in autocast's).

    Differentiable in x, codebook, scales, residual and bias. Bit for bit `torch.nn.functional.linear` with the decoded
    weight; a few tokens (on CUDA up to 64, of a large matrix on the CPU up to 16) are summed in another order: see
    `backends`.

    Args:
        x (`torch.Tensor`): [..., in], floating point. The other arguments are those of [`decode`].
        bias (`torch.Tensor`, *optional*): [out].

    Raises:
        TypeError: If the codes are not uint8, or something else is not floating point.
        ValueError: If tensors are on several devices, or shapes do not belong together.
    """
    check(x, codes, codebook, scale_in, scale_out, residual, bias, out_features)
    device = "cpu" if x.is_cpu else x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    call = direct.linear if direct.applies(x, codes, codebook, scale_in, scale_out, residual, bias) else LINEAR
    return call(x, codes, codebook, scale_in, scale_out, residual, bias, out_features)


def adapted_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    codebook: torch.Tensor,
    scale_in: torch.Tensor | None,
    scale_out: torch.Tensor | None,
    bias: torch.Tensor | None,
    numbers: Numbers,
    *,
    out_features: int,
) -> torch.Tensor | None:
    """[`linear`] with an adapter's trained numbers, in one step; None where the steps must be taken one by one.

    That is where a compiler, a mode, a subclass or a transform looks on, the base is trained itself, or the adapter's
    codebooks are no multiple of the layer's.
    """
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
    check(x, codes, codebook, scale_in, scale_out, None, bias, out_features)
    device = "cpu" if x.is_cpu else x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    return direct.adapted(x, codes, codebook, scale_in, scale_out, bias, numbers, out_features)


def codebook_grad(
    x: torch.Tensor,
    grad_output: torch.Tensor,
    codes: torch.Tensor,
    codebook: torch.Tensor,
    scale_in: torch.Tensor | None = None,
    scale_out: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of codebook and scales for x [tokens, in] and dL/dy [tokens, out].

    Returns:
        Gradients of codebook [m, n, g], scale_in [in] and scale_out [out] (the last two empty where there is no
        scale), fp32, or fp64 for an fp64 x.
    """
    check_gradient(x, grad_output, codes)
    check(x, codes, codebook, scale_in, scale_out, residual, None, grad_output.shape[1])
    return CODEBOOK_GRAD(x, grad_output, codes, codebook, scale_in, scale_out, residual)


def has_stray_codes(codes: torch.Tensor, num_clusters: int, groups: int) -> bool:
    """Whether codes [in, width] name centroids that a codebook of `num_clusters` does not have.

    Takes as long as one token, because that is what it is: a layer of the groups whose weights are 1 where a code is
    too large and 0 elsewhere.

    Raises:
        TypeError, ValueError: As [`linear`] does.
    """
    entries = 2 ** code_bits(num_clusters)
    if num_clusters == entries:
        return False
    marks = torch.zeros(1, entries, 1, device=codes.device)
    marks[:, num_clusters:] = 1
    with torch.no_grad():
        found = linear(torch.ones(1, codes.shape[0], device=codes.device), codes, marks, out_features=groups)
    return bool(found.any())
