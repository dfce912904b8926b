"""Calls that go to a backend at once, past torch's dispatcher, where nobody else need know of them.

The way of an op written in Python through the dispatcher, its autograd and its checks costs 40 µs forward and more
backward, for each of the hundreds of layers of a model; a GPU waits for it. So where no compiler, mode, subclass or
transform looks on ([`applies`]), a call without gradients is a call of the backend's function, and one with gradients
is a single node of autograd around it. An adapter's numbers join in that node ([`adapted`]): their sum with the
codebook, its rounding, the layer, and the way back are one step.

    codebook' = round(codebook + unit · numbers)    scale' = round(scale · (1 + scale_unit · numbers))

in the dtype in which the codebook is stored, as merging stores them; the gradient passes through the rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch._C._functorch import maybe_current_level
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .backends import cpu

__all__ = ["Numbers", "adapted", "applies", "backward_of_linear", "gradients", "linear", "owned"]

_PLAIN = (torch.Tensor, torch.nn.Parameter)


class Numbers(NamedTuple):
    """An adapter's trained numbers in one layer, as an optimiser sees them.

    codebook [m · n, g], scale_in [in] and scale_out [out] or None; `units` [2]: what one of the codebook's numbers
    stands for, and one of the scales'.
    """

    codebook: torch.Tensor
    scale_in: torch.Tensor | None
    scale_out: torch.Tensor | None
    units: torch.Tensor


def applies(*tensors: torch.Tensor | None) -> bool:
    """Whether nobody but a backend need know of a call with these tensors, the first of which tells the device."""
    first = tensors[0]
    assert first is not None
    if not (first.is_cpu or first.is_cuda) or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if _get_current_dispatch_mode() is not None or maybe_current_level() is not None:
        return False
    return all(tensor is None or type(tensor) in _PLAIN for tensor in tensors)


def owned(kernel: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A linear kernel whose result is no view, which autograd would refuse to see changed in place: `F.linear` gives
    a view of its product where x has three dimensions, or one, and there is a bias.
    """

    @functools.wraps(kernel)
    def call(*args: Any) -> torch.Tensor:
        y = kernel(*args)
        return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y  # what is viewed has no other owner

    return call


def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    codebook: torch.Tensor,
    scale_in: torch.Tensor | None,
    scale_out: torch.Tensor | None,
    residual: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_features: int,
) -> torch.Tensor:
    """The op `linear` for tensors that [`applies`] takes."""
    tensors = (x, codes, codebook, scale_in, scale_out, residual, bias)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return _Linear.apply(*tensors, out_features)
    return _backend(x).linear(*tensors, out_features)


def adapted(
    x: torch.Tensor,
    codes: torch.Tensor,
    codebook: torch.Tensor,
    scale_in: torch.Tensor | None,
    scale_out: torch.Tensor | None,
    bias: torch.Tensor | None,
    numbers: Numbers,
    out_features: int,
) -> torch.Tensor:
    """[`linear`] with an adapter, for tensors that [`applies`] takes and a frozen base.

    The adapter's codebooks must be a multiple of the layer's.
    """
    given = (x, codes, codebook, scale_in, scale_out, bias, *numbers)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in given):
        return _Adapted.apply(*given, out_features)
    with torch.no_grad():
        values = _effective(codebook, scale_in, scale_out, numbers)
    return _backend(x).linear(x, codes, *values, None, bias, out_features)


def gradients(
    decode: Callable[..., torch.Tensor],
    codebook_grad: Callable[..., tuple[torch.Tensor, ...]],
    saved: tuple[Any, ...],
    grad_output: torch.Tensor,
    wants: tuple[bool, ...],
) -> tuple[torch.Tensor | None, ...]:
    """Of x, of codebook and scales (fp32 or fp64), of the residual (in its dtype) and of the bias (in x's).

    Args:
        decode, codebook_grad: The ops, or a backend's functions.
        saved: x [..., in], codes, codebook, scales and residual of the call.
        grad_output (`torch.Tensor`): dL/dy [..., out].
        wants: Which of x, codebook and scales together, residual, bias need one.
    """
    x, codes, codebook, scale_in, scale_out, residual = saved
    out_features = grad_output.shape[-1]
    grad_x = grad_residual = grad_bias = None
    grads: tuple[torch.Tensor | None, ...] = (None, None, None)
    flat_grad = grad_output.reshape(-1, out_features)
    flat_x = x.reshape(-1, x.shape[-1])
    if wants[0]:
        dtype = cpu.product_dtype(flat_grad.dtype) if x.is_cpu else flat_grad.dtype
        weight = decode(codes, codebook, scale_in, scale_out, residual, out_features, dtype)
        grad_x = _product(flat_grad.to(dtype), weight).to(x.dtype).view(x.shape)
    if wants[1]:
        grads = codebook_grad(flat_x, flat_grad, codes, codebook, scale_in, scale_out, residual)
    if wants[2]:
        grad_residual = (flat_grad.t() @ flat_x).to(residual.dtype)
        if scale_out is not None:
            grad_residual = grad_residual * scale_out[:, None].to(residual.dtype)
        if scale_in is not None:
            grad_residual = grad_residual * scale_in.to(residual.dtype)
    if wants[3]:
        grad_bias = flat_grad.sum(0)
    return grad_x, *grads, grad_residual, grad_bias


def backward_of_linear(
    decode: Callable[..., torch.Tensor],
    codebook_grad: Callable[..., tuple[torch.Tensor, ...]],
    ctx: Any,
    grad_output: torch.Tensor,
) -> tuple:
    """Gradients of the arguments of `linear`, each in its dtype; `ctx` has them saved, and `bias_dtype`."""
    saved, wants = ctx.saved_tensors, ctx.needs_input_grad
    asked = (wants[0], wants[2] or wants[3] or wants[4], wants[5], wants[6])
    grads = list(gradients(decode, codebook_grad, saved, grad_output, asked))
    for place, of in ((1, 2), (2, 3), (3, 4)):  # codebook and scales
        grads[place] = grads[place].to(saved[of].dtype) if wants[of] else None  # type: ignore[union-attr]
    if grads[5] is not None:
        grads[5] = grads[5].to(ctx.bias_dtype)
    return grads[0], None, *grads[1:], None


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """In their own dtype, even where backward runs inside the user's autocast region."""
    device = left.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return left @ right
    with torch.autocast(left.device.type, enabled=False):
        return left @ right


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Any, codes: Any, codebook: Any, scale_in: Any, scale_out: Any, residual: Any, bias: Any, out: int
    ) -> torch.Tensor:
        ctx.save_for_backward(x, codes, codebook, scale_in, scale_out, residual)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _backend(x).linear(x, codes, codebook, scale_in, scale_out, residual, bias, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple:
        backend = _backend(grad_output)
        return backward_of_linear(backend.decode, backend.codebook_grad, ctx, grad_output)


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Any, codes: Any, codebook: Any, scale_in: Any, scale_out: Any, bias: Any,
        raw: Any, raw_in: Any, raw_out: Any, units: Any, out: int,
    ) -> torch.Tensor:  # fmt: skip
        values = _effective(codebook, scale_in, scale_out, Numbers(raw, raw_in, raw_out, units))
        ctx.save_for_backward(x, codes, *values, scale_in, scale_out, units)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (bias, raw, raw_in, raw_out)]
        ctx.shape = raw.shape
        return _backend(x).linear(x, codes, *values, None, bias, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple:
        x, codes, *values, scale_in, scale_out, units = ctx.saved_tensors
        wants, backend = ctx.needs_input_grad, _backend(grad_output)
        asked = (wants[0], wants[6] or wants[7] or wants[8], False, wants[5])
        saved = (x, codes, *values, None)
        grad_x, *grads, _, grad_bias = gradients(backend.decode, backend.codebook_grad, saved, grad_output, asked)
        bias_dtype, *dtypes = ctx.dtypes
        found: list[torch.Tensor | None] = [None, None, None]
        if asked[1]:
            found = _of_numbers(backend, grads, values[0].dtype, scale_in, scale_out, units, dtypes)
            found[0] = found[0].view(ctx.shape)  # type: ignore[union-attr]
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias_dtype)
        return grad_x, None, None, None, None, grad_bias, *found, None, None


def _of_numbers(
    backend: _Backend,
    grads: list[Any],
    codebook_dtype: torch.dtype,
    scale_in: torch.Tensor | None,
    scale_out: torch.Tensor | None,
    units: torch.Tensor,
    dtypes: list[torch.dtype | None],
) -> list[torch.Tensor | None]:
    """Gradients of an adapter's numbers, of these dtypes or absent, from those of what [`_effective`] makes."""
    trained = (dtypes[1] is not None, dtypes[2] is not None)
    if dtypes[0] == torch.float32 and backend.effective_backward(
        grads, codebook_dtype, scale_in, scale_out, units, trained
    ):
        return [grads[0], *(grad if wanted else None for grad, wanted in zip(grads[1:], trained, strict=True))]
    found: list[torch.Tensor | None] = [(grads[0] * units[0]).to(dtypes[0])]
    for grad, scale, dtype in zip(grads[1:], (scale_in, scale_out), dtypes[1:], strict=True):
        factor = units[1] if scale is None else scale.to(units.dtype) * units[1]
        found.append(None if dtype is None else (grad * factor).to(dtype))
    return found


def _effective(
    codebook: torch.Tensor, scale_in: torch.Tensor | None, scale_out: torch.Tensor | None, numbers: Numbers
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Codebook and scales with the adapter, in the codebook's dtype; see the module docstring."""
    found = _backend(codebook).effective(codebook, scale_in, scale_out, *numbers)
    if found is not None:
        return found
    present, clusters, group_size = codebook.shape
    delta = numbers.codebook.float().view(-1, clusters, group_size) * numbers.units[0]
    base = codebook.float()
    if present not in (1, len(delta)):
        base = base.repeat_interleave(len(delta) // present, 0)

    def rescale(scale: torch.Tensor | None, change: torch.Tensor | None) -> torch.Tensor | None:
        if change is None:
            return scale
        factor = 1 + change.float() * numbers.units[1]
        return (factor if scale is None else scale.float() * factor).to(codebook.dtype)

    values = (base + delta).to(codebook.dtype)
    return values, rescale(scale_in, numbers.scale_in), rescale(scale_out, numbers.scale_out)


class _Backend(NamedTuple):
    linear: Callable[..., torch.Tensor]
    decode: Callable[..., torch.Tensor]
    codebook_grad: Callable[..., tuple[torch.Tensor, ...]]
    effective: Callable[..., tuple | None]  # one launch for what [`_effective`] does, if it takes the case
    effective_backward: Callable[..., bool]


def _backend(tensor: torch.Tensor) -> _Backend:
    return _on_cpu() if tensor.is_cpu else _on_cuda()


@functools.cache
def _on_cpu() -> _Backend:
    return _Backend(owned(cpu.linear), cpu.decode, cpu.codebook_grad, lambda *_: None, lambda *_: False)


@functools.cache
def _on_cuda() -> _Backend:
    from .backends import cuda  # by the first call on a device, because it imports Triton

    return _Backend(owned(cuda.linear), cuda.decode, cuda.codebook_grad, cuda.effective, cuda.effective_backward)
