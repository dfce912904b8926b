"""The CPU backend: the formulas of `reference` in compiled loops that read packed codes.

    decode          tile by tile of channels × outputs; nothing but the weight is written to memory
    linear          few tokens: from the codes, y[o] = s_out[o] · Σ_i s_in[i] · x[i] · C[code(i, o // g), o % g],
                    summed in fp32; the weight is never written to memory, which would take most of one token's time;
                    for x in bf16 and g of 3 or 4, C is rounded to bf16 where the machine gathers such rows at once
                    more tokens: decode, then F.linear
    codebook_grad   dL/dW tile by tile as the reference; for x and dy in bf16 in bf16 too where the machine has matrix
                    units for it, which rounds each element of dL/dW as training the dense layer does; every sum over
                    them in fp32

                      channels [start, stop)
    x [tokens, in] ───┐
                      ├─► tile of dL/dWᵀ [channels, out] ──► thread 0: its channels ──► gradient table 0 ─┐
    dy [tokens, out] ─┘        a few MB                  └─► thread 1: its channels ──► gradient table 1 ─┴─► Σ

The number of threads changes results in `codebook_grad` alone, and there only the order of sums.

The reference does the work without numba or with a broken one, for small matrices, for fp64 and for what else the
kernels do not take: a weight in fp16 with scales, a residual in fp16 or with strides (decode).

    __init__       the ops                      kernels      numba: what a task computes
    arguments      the weight for kernels       simd         LLVM: their inner loops
    threads        runs them                    loops, ir    LLVM: loops made for one g and b
    compilation    whether there are any
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from typing import Any

import torch

from ...packed_weight import PackedWeight
from .. import reference
from .arguments import FLOATS, arguments_for
from .compilation import compiled, with_kernels
from .threads import run

__all__ = ["MAX_FEW_TOKENS", "codebook_grad", "decode", "linear", "product_dtype"]

MAX_FEW_TOKENS = 16
_FEWEST_TOKENS = 4  # whose sums are kept in registers
_SMALL = 1 << 14  # weights below which the reference is as fast
_TASK_OUTPUTS = 256  # of a decoding task; a run of input channels of them fits into the second-level cache
_FEW_TASK_OUTPUTS = 128  # with ROWS input channels it fits into the first-level cache
_TILE_BYTES = 4 << 20  # of dL/dW
_PARTIAL_BYTES = 64 << 20  # of all gradient tables of the threads together
_MAPPED_BYTES, _HUGE_PAGES, _PAGE = 32 << 20, 14, mmap.PAGESIZE  # glibc's largest threshold for mmap; MADV_HUGEPAGE


@functools.cache
def _multiplies_bf16() -> bool:
    """Whether the machine has matrix units for bf16 (AMX). Without, a bf16 product takes longer than an fp32 one (on a
    Xeon with AVX512-BF16 1.7 times as long), and rounds what need not be rounded."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return supported is not None and bool(supported())


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which numbers of `dtype` are multiplied fastest without losing digits."""
    return torch.float32 if dtype == torch.bfloat16 and not _multiplies_bf16() else dtype


@functools.cache
def _advise() -> Any:
    """`madvise` on Linux, None elsewhere."""
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    return function


def _empty_weight(out_features: int, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory for a weight. What malloc takes from the system and gives back every time comes in small pages, whose
    faults take longer than decoding: ask for large ones."""
    weight = torch.empty(out_features, in_features, dtype=dtype)
    if weight.nbytes >= _MAPPED_BYTES and (advise := _advise()) is not None:
        start, stop = -(-weight.data_ptr() // _PAGE) * _PAGE, (weight.data_ptr() + weight.nbytes) // _PAGE * _PAGE
        advise(start, stop - start, _HUGE_PAGES)  # advice: without huge pages nothing happens
    return weight


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _float(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def _takes(weight: PackedWeight, *dtypes: torch.dtype) -> bool:
    """Whether the kernels take a weight, and tensors of these dtypes."""
    large = weight.in_features * weight.out_features >= _SMALL
    return large and weight.codebook.dtype in FLOATS and all(dtype in FLOATS for dtype in dtypes) and bool(compiled())


def _with_contiguous_codes(weight: PackedWeight) -> PackedWeight:
    return weight if weight.codes.is_contiguous() else weight._replace(codes=weight.codes.contiguous())


@with_kernels
def decode(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """The weight [out, in] in `dtype`."""
    plain, residual = weight.is_plain, weight.residual
    known = plain or dtype != torch.float16
    if residual is not None:
        known = known and residual.is_contiguous() and residual.dtype in (torch.float32, torch.bfloat16)
    if not (known and _takes(weight, dtype)):
        return reference.decode(weight, dtype)
    kernels, weight = compiled(), _with_contiguous_codes(weight)
    matrix = arguments_for(weight, dtype if plain else torch.float32)
    decoded = _empty_weight(weight.out_features, weight.in_features, dtype)
    scale_in, scale_out = _float(weight.scale_in), _float(weight.scale_out)
    most_chunks, tasks = matrix.split(_TASK_OUTPUTS)
    item = dtype.itemsize if plain else 4
    channels = kernels.RUN_BYTES // dtype.itemsize
    scratch = channels * ((most_chunks * 8 * matrix.group_size + kernels.SLACK) * item + (0 if plain else 9 * 4))
    fields = {
        "most_chunks": most_chunks,
        "scale_in": _address(scale_in),
        "scale_out": _address(scale_out),
        "residual": _address(residual),
        "residual_item": 0 if residual is None else residual.element_size(),
        "weight": decoded.data_ptr(),
        "item": dtype.itemsize,
    }
    run("decode", tasks, scratch, matrix, fields)
    return decoded


@with_kernels
def linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """`x Wᵀ + bias` in the dtype of x."""
    tokens = x.numel() // max(1, x.shape[-1])
    if 0 < tokens <= MAX_FEW_TOKENS and weight.residual is None and _takes(weight, x.dtype):
        return _linear_few(x, weight, bias)
    return reference.dense_linear(x, decode(weight, x.dtype), bias)


def _linear_few(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    kernels, weight = compiled(), _with_contiguous_codes(weight)
    out_features, scale_in, scale_out = weight.out_features, weight.scale_in, weight.scale_out
    flat = x.reshape(-1, weight.in_features)
    flat = (flat.float() if scale_in is None else flat * scale_in.float()).contiguous()
    tokens = len(flat)
    bf16 = x.dtype == torch.bfloat16 and tokens <= _FEWEST_TOKENS and kernels.takes_bf16(weight.group_size)
    if not weight.is_scaled and not bf16:
        weight = weight._replace(codebook=weight.codebook.to(x.dtype))  # to which `decode` rounds the weight
    matrix = arguments_for(weight, torch.bfloat16 if bf16 else torch.float32)
    y = torch.empty(*x.shape[:-1], out_features, dtype=torch.float32)
    fields = {"x": flat.data_ptr(), "tokens": tokens, "y": y.data_ptr(), "y_step": out_features * 4}
    if tokens <= _FEWEST_TOKENS:
        # Tasks of equal length, and several for each thread, so that one which starts late does fewer.
        tasks = min(matrix.chunks, 4 * torch.get_num_threads())
        loop, lanes, _ = kernels.token_loop(matrix.bits, matrix.lanes, tokens, bf16)
        fields |= {"loop": loop, "lanes": lanes}
        run("fewest", tasks, -(-matrix.chunks // tasks) * 32 * lanes * tokens, matrix, fields)
    else:
        most_chunks, tasks = matrix.split(_FEW_TASK_OUTPUTS)
        scratch = (kernels.ROWS + tokens) * (most_chunks * 8 * matrix.group_size + kernels.SLACK) * 4
        run("few", tasks, scratch, matrix, {**fields, "most_chunks": most_chunks})
    # Every call into torch costs as much as some thousand codes.
    if scale_out is not None:
        y = torch.mul(y, scale_out.float(), out=y if bias is not None else y.new_empty(y.shape, dtype=x.dtype))
    if bias is not None:
        y += bias.to(x.dtype).float()
    return y.to(x.dtype)


@with_kernels
def codebook_grad(
    x: torch.Tensor, grad_output: torch.Tensor, weight: PackedWeight
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of codebook [m, n, g], scale_in [in] and scale_out [out] (empty without scales), fp32 or fp64."""
    if not (len(x) and _takes(weight, x.dtype, grad_output.dtype)):
        return reference.codebook_grad(x, grad_output, weight)
    # Backward may run inside the user's autocast region.
    with torch.autocast("cpu", enabled=False):
        return _codebook_grad(x, grad_output, weight)


def _codebook_grad(
    x: torch.Tensor, grad_output: torch.Tensor, weight: PackedWeight
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    kernels, weight = compiled(), _with_contiguous_codes(weight)
    in_features, out_features, clusters = weight.in_features, weight.out_features, weight.num_clusters
    matrix = arguments_for(weight, torch.float32)
    # fp16 has no room for the elements of dL/dW of a scaled loss.
    half = x.dtype == grad_output.dtype == torch.bfloat16 and _multiplies_bf16()
    dtype = torch.bfloat16 if half else torch.float32
    grad_output = grad_output.to(dtype)
    scale_in, scale_out = _float(weight.scale_in), _float(weight.scale_out)
    residual = weight.residual if weight.is_scaled else None

    tasks = max(1, min(torch.get_num_threads(), _PARTIAL_BYTES // matrix.table_bytes))
    tables = torch.zeros(tasks, *matrix.table_shape)
    grad_in = torch.zeros(0 if scale_in is None else in_features)
    grad_out = torch.zeros(tasks, 0 if scale_out is None else out_features)
    rows = max(1, min(in_features, _TILE_BYTES // (out_features * dtype.itemsize)))
    tile = torch.empty(rows, out_features, dtype=dtype)
    scratch = 2 * (matrix.chunks * 8 * matrix.group_size + kernels.SLACK) * 4
    for start in range(0, in_features, rows):
        stop = min(start + rows, in_features)
        torch.mm(x[:, start:stop].to(dtype).t(), grad_output, out=tile[: stop - start])
        part = None if residual is None else residual[:, start:stop].t().float().contiguous()
        fields = {
            "scale_in": _address(scale_in),
            "scale_out": _address(scale_out),
            "residual": _address(part),
            "grad": tile.data_ptr(),
            "grad_item": dtype.itemsize,
            "start": start,
            "stop": stop,
            "grad_table": tables.data_ptr(),
            "grad_table_bytes": tables.stride(0) * 4,
            "grad_in": grad_in.data_ptr(),
            "grad_out": grad_out.data_ptr(),
        }
        run("scatter", tasks, scratch, matrix, fields)
    table = tables.sum(0)[..., : matrix.group_size]
    grad_codebook = table[:, :clusters].contiguous()
    if clusters < table.shape[1]:
        grad_codebook[:, -1] += table[:, clusters:].sum(1)  # what stray codes collected
    return grad_codebook, grad_in, grad_out.sum(0)
