"""Calls that go to a backend at once, past torch's dispatcher, where nobody else has to see them.

The way of an op written in Python through the dispatcher, its autograd and its checks costs 40 µs forward and more
backward, for each of the hundreds of layers of a model; a GPU waits for it. So where no compiler, dispatch mode,
tensor subclass or functional transform is at work ([`applies`]), a call without gradients is a call of the backend's
function, and one with gradients is a single node of autograd around it. For a layer with an adapter ([`adapted`]) that
node does three things: it adds the adapter's numbers to codebook and scales, rounds them as merging would, and
multiplies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._C._functorch import maybe_current_level
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import backends
from .gradients import Wanted, gradients, gradients_of_linear
from .packed_weight import Numbers, PackedWeight

__all__ = ["adapted", "applies", "linear"]

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def applies(x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether a call with these tensors, x among them, may go to a backend at once."""
    if not (x.is_cpu or x.is_cuda) or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if _get_current_dispatch_mode() is not None or maybe_current_level() is not None:
        return False
    return type(x) in _PLAIN and all(tensor is None or type(tensor) in _PLAIN for tensor in others)


def linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """The op `linear` for tensors that [`applies`] takes."""
    if torch.is_grad_enabled() and _requires_grad(x, *weight.tensors, bias):
        return _Linear.apply(x, *weight.tensors, bias, weight.out_features)
    return backends.backend_of(x).linear(x, weight, bias)


def adapted(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, numbers: Numbers) -> torch.Tensor:
    """[`linear`] with an adapter, for tensors that [`applies`] takes and a frozen weight without a residual.

    The adapter's codebooks must be a multiple of the weight's.
    """
    codes, codebook, out_features, scale_in, scale_out, _ = weight
    if torch.is_grad_enabled() and _requires_grad(x, codebook, scale_in, scale_out, bias, *numbers):
        return _Adapted.apply(x, codes, codebook, scale_in, scale_out, bias, *numbers, out_features)
    backend = backends.backend_of(x)
    with torch.no_grad():
        weight = backend.effective(weight, numbers)
    return backend.linear(x, weight, bias)


def _requires_grad(*tensors: torch.Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Any, codes: Any, codebook: Any, scale_in: Any, scale_out: Any, residual: Any, bias: Any, out: int
    ) -> torch.Tensor:
        ctx.save_for_backward(x, codes, codebook, scale_in, scale_out, residual)
        ctx.bias_dtype = None if bias is None else bias.dtype
        weight = PackedWeight(codes, codebook, out, scale_in, scale_out, residual)
        return backends.backend_of(x).linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple:
        backend = backends.backend_of(grad_output)
        return gradients_of_linear(backend.decode, backend.codebook_grad, ctx, grad_output)


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Any, codes: Any, codebook: Any, scale_in: Any, scale_out: Any, bias: Any,
        raw: Any, raw_in: Any, raw_out: Any, units: Any, out: int,
    ) -> torch.Tensor:  # fmt: skip
        backend = backends.backend_of(x)
        base = PackedWeight(codes, codebook, out, scale_in, scale_out)
        weight = backend.effective(base, Numbers(raw, raw_in, raw_out, units))
        values = (weight.codebook, weight.scale_in, weight.scale_out)
        ctx.save_for_backward(x, codes, *values, scale_in, scale_out, units)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (raw, raw_in, raw_out)]
        ctx.shape = raw.shape
        return backend.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple:
        x, codes, *values, scale_in, scale_out, units = ctx.saved_tensors
        asked, backend = ctx.needs_input_grad, backends.backend_of(grad_output)
        wanted = Wanted(asked[0], any(asked[6:9]), False, asked[5])
        weight = PackedWeight(codes, values[0], grad_output.shape[-1], *values[1:])
        grad_x, *grads, _, grad_bias = gradients(backend.decode, backend.codebook_grad, x, weight, grad_output, wanted)
        found: tuple[torch.Tensor | None, ...] = (None, None, None)
        if wanted.weight:
            first, *scales = backend.effective_backward(grads, scale_in, scale_out, units, ctx.dtypes, values[0].dtype)
            found = (first.view(ctx.shape), *scales)
        if grad_bias is not None:
            grad_bias = grad_bias.to(ctx.bias_dtype)
        return grad_x, None, None, None, None, grad_bias, *found, None, None
