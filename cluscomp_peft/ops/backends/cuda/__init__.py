"""The CUDA backend: which kernel does what.

    decode          Triton's kernel.
    linear          Few tokens, which is generation: weights are decoded tile by tile and used on the spot, so the
                    packed codes are all that is read. Where the codebook fits into shared memory, CUDA C++ for up to
                    64 tokens (`table.py`); else Triton's kernel for up to `FUSED_TOKENS`, with the weights of
                    `decode`, bit for bit. Products are added in another order than cuBLAS's. More tokens, or a
                    residual, which must be read anyway: `decode` into a scratch weight, then `F.linear`.
    codebook_grad   Where the codebook fits into shared memory, strips of G = dyᵀ x by cuBLAS, added up by `table.py`.
                    Else Triton's kernel adds a tile of G at a time, straight from tensor cores, to the table of sums,
                    so that a step needs no scratch but the table.
    effective       An adapter's numbers, in one launch of CUDA C++ (`adapters.py`).

A kernel that cannot be compiled or launched is replaced by the next in this order: CUDA C++, Triton, the reference
(`failures.py`). The reference also serves fp64, devices older than `OLDEST` or AMD's, and empty tensors.

All are deterministic: what is summed by atomics is summed in integers. With N = in · ⌈out/g⌉ vectors,

    |Σ over (i, o) with one code and one place in the group of s_in[i] · s_out[o] · G[o, i]|
        ≤ √N · ‖diag(s_out) G diag(s_in)‖_F ≤ √N · ‖dy diag(s_out)‖_F · ‖x diag(s_in)‖_F = bound

(Cauchy-Schwarz, twice), so Triton's kernel scales each term by 2^61 / bound to an integer, and their sums fit into 64
bits; for the kernel of `table.py` see `kernels/scatter.cu`. A bound that is not finite makes the codebook's gradient
NaN or infinite, which loss scaling looks for.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence

import torch

from ...packed_weight import Numbers, PackedWeight
from .. import reference
from . import adapters, table, triton_kernels, triton_tuning
from .failures import attempt
from .triton_kernels import INTERPRETED, triton
from .triton_tuning import OLDEST, Device

__all__ = ["available", "codebook_grad", "decode", "effective", "effective_backward", "linear"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LARGEST = 2**31  # offsets into the table are 32-bit
_FINISH_BLOCK = 512


def available(device: torch.device) -> bool:
    """Whether the kernels run there: on a CUDA device from `OLDEST` on, or anywhere if TRITON_INTERPRET=1 was set."""
    if triton is None:
        return False
    if INTERPRETED:
        return True
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return _device(device).capability >= OLDEST and _works(device)


def decode(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """The weight [out, in] in `dtype`."""
    if _serves(weight, dtype):
        decoded = attempt("decode", _case(weight, dtype), lambda: _decode(_contiguous(weight), dtype))
        if decoded is not None:
            return decoded
    return reference.decode(weight, dtype)


def _decode(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    layout = _Layout(weight)
    tile = triton_tuning.decode_tile(layout.padded)
    grid = (_cdiv(layout.in_features, tile.channels), _cdiv(layout.groups, tile.groups))
    with torch.cuda.device_of(weight.codes):  # Triton launches on the current device
        decoded = torch.empty(layout.out_features, layout.in_features, dtype=dtype, device=weight.device)
        triton_kernels.decode[grid](
            weight.codes, _padded_table(weight.codebook, dtype if weight.is_plain else None), weight.scale_in,
            weight.scale_out, weight.residual, decoded, layout.in_features, layout.out_features, layout.groups,
            layout.width, layout.clusters, *_strides(weight.residual), layout.group_size, layout.padded, layout.bits,
            layout.span, layout.blocks, tile.channels, tile.groups, num_warps=tile.warps,
        )  # fmt: skip
    return decoded


def linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """`x Wᵀ + bias` in the dtype of x."""
    tokens = math.prod(x.shape[:-1])
    few = 0 < tokens <= table.MAX_TOKENS and weight.residual is None
    if few and _serves(weight, x.dtype, bias):
        flat = x.reshape(tokens, x.shape[-1]).contiguous()
        y = _linear_few(flat, _contiguous(weight), None if bias is None else bias.contiguous())
        if y is not None:  # that nothing else refers to, so what has x's shape need not be a view
            return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], weight.out_features))
    return reference.dense_linear(x, decode(weight, x.dtype), bias)


def _linear_few(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor | None:
    """y [tokens, out] for x [tokens, in], all contiguous; None where decoding the weight is less work."""
    if not INTERPRETED:
        with torch.cuda.device_of(x):
            if (y := table.linear(x, weight, bias)) is not None:
                return y
    if x.shape[0] > triton_tuning.FUSED_TOKENS:
        return None
    return attempt("fused_linear", (_case(weight, x.dtype), len(x) == 1), lambda: _fused_linear(x, weight, bias))


def _fused_linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """y [tokens, out] for x [tokens, in], up to 16 tokens."""
    tokens, in_features = x.shape
    layout = _Layout(weight)
    tile = triton_tuning.fused_tile(layout.padded, layout.groups, in_features, tokens, _device(x.device))
    splits = _cdiv(in_features, tile.share)
    # A table of numbers of another width is read in another layout, which adds up in another order; a merged layer
    # must not: so scales always meet fp32, and without them x decides.
    width = torch.float32 if weight.is_scaled else x.dtype
    with torch.cuda.device_of(x):
        y = torch.empty(tokens, layout.out_features, dtype=x.dtype, device=x.device)
        partial = y if splits == 1 else torch.empty(splits, tokens, layout.out_features, device=x.device)
        triton_kernels.fused_linear[_cdiv(layout.groups, tile.groups), splits](
            x, weight.codes, _padded_table(weight.codebook, width), weight.scale_in, weight.scale_out,
            bias if splits == 1 else None, partial, tokens, in_features, layout.out_features, layout.groups,
            layout.width, layout.clusters, tile.share, layout.group_size, layout.padded, layout.bits, layout.span,
            layout.blocks, tile.channels, tile.groups, tile.tokens, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if splits > 1:
            size = tokens * layout.out_features
            triton_kernels.finish[_cdiv(size, _FINISH_BLOCK),](
                partial, bias, y, size, layout.out_features, splits, _FINISH_BLOCK, num_warps=4
            )
    return y


def codebook_grad(
    x: torch.Tensor, grad_output: torch.Tensor, weight: PackedWeight
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of codebook [m, n, g], scale_in [in] and scale_out [out] (empty without scales), fp32 or fp64."""
    if x.numel() > 0 and grad_output.numel() > 0 and _serves(weight, torch.float32, x, grad_output):
        grads = _codebook_grad(x, grad_output, _contiguous(weight))
        if grads is not None:
            return grads
    return reference.codebook_grad(x, grad_output, weight)


def _codebook_grad(
    x: torch.Tensor, grad_output: torch.Tensor, weight: PackedWeight
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """By the first kernel that takes the case and works; None if there is none."""
    if x.dtype != grad_output.dtype:
        x, grad_output = x.float(), grad_output.float()
    x, grad_output = x.contiguous(), grad_output.contiguous()
    if weight.residual is None and not INTERPRETED:
        with torch.cuda.device_of(x):
            if (grads := table.codebook_grad(x, grad_output, weight)) is not None:
                return grads
    return attempt("segment_grad", _case(weight, x.dtype), lambda: _segment_grad(x, grad_output, weight))


def _segment_grad(
    x: torch.Tensor, grad_output: torch.Tensor, weight: PackedWeight
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    codes, codebook, out_features, scale_in, scale_out, residual = weight
    (tokens, in_features), device = x.shape, x.device
    layout = _Layout(weight)
    tile = triton_tuning.grad_tile(tokens, in_features, out_features, x.element_size(), _device(device))
    grid = (_cdiv(in_features, tile.channels), _cdiv(out_features, tile.outputs), _cdiv(tokens, tile.share))
    entries = codebook.numel()
    copies = triton_tuning.copies(entries)
    with torch.cuda.device_of(x):
        quantum = _quantum(x, grad_output, scale_in, scale_out, in_features * layout.groups)
        sums = torch.zeros(copies, entries, dtype=torch.int64, device=device)
        sums_in = torch.empty(0 if scale_in is None else 2 * grid[1] * grid[2], in_features, device=device)
        sums_out = torch.empty(0 if scale_out is None else grid[0] * grid[2], out_features, device=device)
        triton_kernels.segment_grad[grid](
            x, grad_output, codes, codebook, scale_in, scale_out, residual, quantum, sums, sums_in, sums_out,
            tokens, in_features, out_features, layout.width, layout.clusters, *_strides(residual), entries, copies,
            tile.share, layout.group_size, layout.bits, layout.span, layout.blocks,
            tile.channels, tile.outputs, tile.tokens, _PRECISION, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        grad_codebook = (sums.sum(0).double() / quantum.double()).float().view_as(codebook)
        grad_in = sums_in.sum(0) if scale_in is not None else sums_in.view(0)
        grad_out = sums_out.sum(0) if scale_out is not None else sums_out.view(0)
    return grad_codebook, grad_in, grad_out


def effective(weight: PackedWeight, numbers: Numbers) -> PackedWeight:
    """As `reference.effective`, in one launch where `adapters` takes the case."""
    if not INTERPRETED and available(weight.device):
        with torch.cuda.device_of(weight.codes):
            if (found := adapters.effective(weight, numbers)) is not None:
                return found
    return reference.effective(weight, numbers)


def effective_backward(
    grads: Sequence[torch.Tensor],
    scale_in: torch.Tensor | None,
    scale_out: torch.Tensor | None,
    units: torch.Tensor,
    dtypes: Sequence[torch.dtype | None],
    codebook_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """As `reference.effective_backward`, in one launch and in place where `adapters` takes the case."""
    given = (grads, scale_in, scale_out, units, dtypes, codebook_dtype)
    if not INTERPRETED and available(units.device):
        with torch.cuda.device_of(units):
            if (found := adapters.effective_backward(*given)) is not None:
                return found
    return reference.effective_backward(*given)


# Three tensor-core products of TF32 halves for a product of fp32 numbers: 21 bits of each instead of 24, and several
# times the speed of fp32 units. 16-bit inputs are exact in either case.
_PRECISION = "tf32x3"


def _quantum(
    x: torch.Tensor,
    grad_output: torch.Tensor,
    scale_in: torch.Tensor | None,
    scale_out: torch.Tensor | None,
    vectors: int,
) -> torch.Tensor:
    """2^61 / bound of the module docstring, [], fp32, without waiting for the device."""
    bound = torch.full((), math.sqrt(vectors), device=x.device)
    for side, scale in ((x, scale_in), (grad_output, scale_out)):
        norms = torch.linalg.vector_norm(side, dim=0, dtype=torch.float32)
        bound = bound * torch.linalg.vector_norm(norms if scale is None else norms * scale.float())
    return 2.0**61 / bound.clamp(min=2.0**-60)  # where all is 0, any finite number does


class _Layout:
    """The sizes of a weight that every kernel asks for."""

    def __init__(self, weight: PackedWeight) -> None:
        self.blocks, self.clusters, self.group_size = weight.codebook.shape
        self.in_features, self.width = weight.codes.shape
        self.out_features, self.groups, self.bits = weight.out_features, weight.num_groups, weight.code_bits
        # Bytes that a code can touch: it starts at any multiple of bits modulo 8.
        self.span = max((k * self.bits % 8 + self.bits + 7) // 8 for k in range(8))
        self.padded = _padded(self.group_size)


def _padded(group_size: int) -> int:
    return 1 << (group_size - 1).bit_length()


def _padded_table(codebook: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Codebooks end to end, rows padded to a power of two by values that nothing uses: [m n, P]."""
    group_size = codebook.shape[2]
    dtype, padded = dtype or codebook.dtype, _padded(group_size)
    rows = codebook.reshape(-1, group_size)
    if padded == group_size:
        return rows.to(dtype).contiguous()
    table = torch.empty(len(rows), padded, dtype=dtype, device=codebook.device)
    table[:, :group_size] = rows
    return table


def _serves(weight: PackedWeight, dtype: torch.dtype, *others: torch.Tensor | None) -> bool:
    """Whether the kernels take a weight and these tensors, for a result in `dtype`: see the module docstring."""
    codes, codebook, _, scale_in, scale_out, residual = weight
    given = (codebook, scale_in, scale_out, residual, *others)
    if dtype not in _DTYPES or any(tensor is not None and tensor.dtype not in _DTYPES for tensor in given):
        return False
    entries = codebook.shape[0] * codebook.shape[1] * _padded(codebook.shape[2])
    return 0 < entries < _LARGEST and codes.numel() > 0 and available(codes.device)


def _case(weight: PackedWeight, dtype: torch.dtype) -> tuple:
    """What Triton compiles a kernel for, more or less."""
    codes, codebook, _, scale_in, scale_out, residual = weight
    present = (scale_in is not None, scale_out is not None, residual is not None)
    return codes.device, dtype, codebook.dtype, codebook.shape, present


def _contiguous(weight: PackedWeight) -> PackedWeight:
    """With all contiguous but the residual, of which kernels take the strides."""
    codes, codebook, out_features, scale_in, scale_out, residual = weight
    if scale_in is not None:
        scale_in = scale_in.contiguous()
    if scale_out is not None:
        scale_out = scale_out.contiguous()
    return PackedWeight(codes.contiguous(), codebook.contiguous(), out_features, scale_in, scale_out, residual)


def _strides(residual: torch.Tensor | None) -> tuple[int, int]:
    return (0, 0) if residual is None else (residual.stride(0), residual.stride(1))


def _cdiv(total: int, part: int) -> int:
    return -(-total // part)


@functools.cache
def _device(device: torch.device) -> Device:
    if device.type != "cuda":
        return Device((9, 0), 4)  # of the interpreter: few programs
    properties = torch.cuda.get_device_properties(device)
    return Device((properties.major, properties.minor), properties.multi_processor_count)


@functools.cache
def _works(device: torch.device) -> bool:
    """Whether a small kernel compiles and runs there; warns once if not."""
    try:
        with torch.cuda.device_of(given := torch.ones(1, device=device)):
            triton_kernels.finish[1,](given, None, given, 1, 1, 1, 16)
        return bool(given == 1)
    except Exception as error:  # no C compiler, no driver, a device that this Triton does not know: each its own type
        warnings.warn(
            f"Triton cannot run on {device} ({error!r:.300}); clustered layers run on plain torch there, much "
            "slower. Triton needs a C compiler at run time, and a version that knows the device.",
            stacklevel=2,
        )
        return False
