"""The CPU backend of the ops: the maths of `reference`, on packed codes, in compiled loops.

    decode          bit for bit the reference; in tiles of channels × outputs, without codes or weights in between
    linear          few tokens: from the codes, y[o] = s_out[o] · Σ_i s_in[i] · x[i] · C[code(i, o // g), o % g],
                    summed in fp32; the weight is never written to memory, which is what one token's time goes into;
                    for x in bf16 and g of 3 or 4, C is rounded to bf16 where the machine gathers such rows at once
                    more tokens: decode, then the very call of nn.Linear
    codebook_grad   dL/dW tile by tile as the reference; for x and dy in bf16 in bf16 too where the machine has matrix
                    units for it, which rounds each element of dL/dW as training the dense layer does; every sum over
                    them in fp32

                      channels [start, stop)
    x [tokens, in] ───┐
                      ├─► tile of dL/dWᵀ [channels, out] ──► thread 0: its channels ──► gradient table 0 ─┐
    dy [tokens, out] ─┘        a few MB                  └─► thread 1: its channels ──► gradient table 1 ─┴─► Σ

Threads are those of torch (`torch.set_num_threads`), whose OpenMP pool also runs the kernels: a second pool would find
the cores taken by threads of the first that spin. Results depend on the number of threads only in `codebook_grad`, and
there only in the order of its sums.

Without numba, or with a broken one, for small matrices, fp64 and whatever else the kernels do not know, the reference
does the work.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .. import reference
from .packed import FLOATS, Packed, compiled, packed_for, places, with_kernels

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
    """The dtype in which gradients of `dtype` are multiplied fastest, nothing lost."""
    return torch.float32 if dtype == torch.bfloat16 and not _multiplies_bf16() else dtype


@functools.cache
def _openmp() -> Any:
    """`GOMP_parallel` of the OpenMP runtime that torch runs on; None where there is none."""
    try:
        function = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).GOMP_parallel
    except (OSError, AttributeError):
        return None
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return function


@functools.cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


@functools.cache
def _function(address: int) -> Any:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)


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


def _run(name: str, tasks: int, scratch_bytes: int, packed: Packed, fields: dict[str, int]) -> None:
    """Runs the tasks of a kernel on torch's threads; `scratch_bytes` for each of them."""
    kernels = compiled()
    threads = min(torch.get_num_threads(), tasks)
    scratch = torch.zeros(threads * scratch_bytes + 64, dtype=torch.uint8)
    values, index = packed.arguments(name), places()
    values[index["tasks"]], values[index["scratch"]] = tasks, scratch.data_ptr()
    values[index["scratch_bytes"]] = scratch_bytes
    for key, value in fields.items():
        values[index[key]] = value
    address, place = kernels.kernel_address(name), ctypes.addressof(values)
    if threads == 1:
        _function(address)(place)
    elif (openmp := _openmp()) is not None:
        openmp(address, place, threads, 0)
    else:
        helpers = [_pool(threads, os.getpid()).submit(_function(address), place) for _ in range(threads - 1)]
        _function(address)(place)
        for helper in helpers:
            helper.result()


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _float(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def _takes(codes: torch.Tensor, out_features: int, *dtypes: torch.dtype) -> bool:
    large = codes.shape[0] * out_features >= _SMALL
    return large and all(dtype in FLOATS for dtype in dtypes) and compiled() is not None


@with_kernels
def decode(
    codes: torch.Tensor,
    codebook: torch.Tensor,
    scale_in: torch.Tensor | None,
    scale_out: torch.Tensor | None,
    residual: torch.Tensor | None,
    out_features: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The weight [out, in] in `dtype`, bit for bit `reference.decode`."""
    plain = scale_in is None and scale_out is None and residual is None
    known = plain or dtype != torch.float16
    if residual is not None:
        known = known and residual.is_contiguous() and residual.dtype in (torch.float32, torch.bfloat16)
    if not (known and _takes(codes, out_features, dtype, codebook.dtype)):
        return reference.decode(codes, codebook, scale_in, scale_out, residual, out_features, dtype)
    kernels, codes = compiled(), codes.contiguous()
    packed = packed_for(codes, codebook, out_features, dtype if plain else torch.float32)
    weight = _empty_weight(out_features, packed.in_features, dtype)
    scale_in, scale_out = _float(scale_in), _float(scale_out)
    per_task, tasks = packed.split(_TASK_OUTPUTS)
    item = dtype.itemsize if plain else 4
    run = kernels.RUN_BYTES // dtype.itemsize
    scratch = run * ((per_task * 8 * packed.group + kernels.SLACK) * item + (0 if plain else 9 * 4))
    fields = {
        "most_blocks": per_task,
        "scale_in": _address(scale_in),
        "scale_out": _address(scale_out),
        "residual": _address(residual),
        "residual_item": 0 if residual is None else residual.element_size(),
        "weight": weight.data_ptr(),
        "item": dtype.itemsize,
    }
    _run("decode", tasks, scratch, packed, fields)
    return weight


@with_kernels
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
    """`x Wᵀ + bias` in the dtype of x."""
    tokens = x.numel() // max(1, x.shape[-1])
    few = 0 < tokens <= MAX_FEW_TOKENS and residual is None
    if few and _takes(codes, out_features, x.dtype, codebook.dtype):
        return _linear_few(x, codes, codebook, scale_in, scale_out, bias, out_features)
    weight = decode(codes, codebook, scale_in, scale_out, residual, out_features, x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _linear_few(
    x: torch.Tensor,
    codes: torch.Tensor,
    codebook: torch.Tensor,
    scale_in: torch.Tensor | None,
    scale_out: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_features: int,
) -> torch.Tensor:
    kernels, codes = compiled(), codes.contiguous()
    flat = x.reshape(-1, codes.shape[0])
    flat = (flat.float() if scale_in is None else flat * scale_in.float()).contiguous()
    tokens = len(flat)
    bf16 = x.dtype == torch.bfloat16 and tokens <= _FEWEST_TOKENS and kernels.takes_bf16(codebook.shape[2])
    if scale_in is None and scale_out is None and not bf16:
        codebook = codebook.to(x.dtype)  # to which `decode` rounds the weight
    packed = packed_for(codes, codebook, out_features, torch.bfloat16 if bf16 else torch.float32)
    y = torch.empty(*x.shape[:-1], out_features, dtype=torch.float32)
    fields = {"x": flat.data_ptr(), "tokens": tokens, "y": y.data_ptr(), "y_step": out_features * 4}
    if tokens <= _FEWEST_TOKENS:
        # Tasks of equal length, enough of them that a thread which starts late is made up for.
        tasks = min(packed.blocks, 4 * torch.get_num_threads())
        loop, lanes, _ = kernels.token_loop(packed.bits, packed.lanes, tokens, bf16)
        fields |= {"loop": loop, "lanes": lanes}
        _run("fewest", tasks, -(-packed.blocks // tasks) * 32 * lanes * tokens, packed, fields)
    else:
        per_task, tasks = packed.split(_FEW_TASK_OUTPUTS)
        scratch = (kernels.ROWS + tokens) * (per_task * 8 * packed.group + kernels.SLACK) * 4
        _run("few", tasks, scratch, packed, {**fields, "most_blocks": per_task})
    # Every call into torch costs as much as some thousand codes.
    if scale_out is not None:
        y = torch.mul(y, scale_out.float(), out=y if bias is not None else y.new_empty(y.shape, dtype=x.dtype))
    if bias is not None:
        y += bias.to(x.dtype).float()
    return y.to(x.dtype)


@with_kernels
def codebook_grad(
    x: torch.Tensor,
    grad_output: torch.Tensor,
    codes: torch.Tensor,
    codebook: torch.Tensor,
    scale_in: torch.Tensor | None,
    scale_out: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of codebook [m, n, g], scale_in [in] and scale_out [out] (empty without scales), fp32 or fp64."""
    known = _takes(codes, grad_output.shape[1], x.dtype, grad_output.dtype, codebook.dtype)
    # Backward may run inside the user's autocast region.
    with torch.autocast("cpu", enabled=False):
        grads = _codebook_grad if known and len(x) else reference.codebook_grad
        return grads(x, grad_output, codes, codebook, scale_in, scale_out, residual)


def _codebook_grad(
    x: torch.Tensor,
    grad_output: torch.Tensor,
    codes: torch.Tensor,
    codebook: torch.Tensor,
    scale_in: torch.Tensor | None,
    scale_out: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out_features = grad_output.shape[1]
    kernels, codes = compiled(), codes.contiguous()
    packed = packed_for(codes, codebook, out_features, torch.float32)
    # fp16 has no room for the elements of dL/dW of a scaled loss.
    half = x.dtype == grad_output.dtype == torch.bfloat16 and _multiplies_bf16()
    dtype = torch.bfloat16 if half else torch.float32
    grad_output = grad_output.to(dtype)
    scale_in, scale_out = _float(scale_in), _float(scale_out)
    if scale_in is None and scale_out is None:
        residual = None

    tasks = max(1, min(torch.get_num_threads(), _PARTIAL_BYTES // packed.table_bytes))
    tables = torch.zeros(tasks, *packed.table_shape)
    grad_in = torch.zeros(0 if scale_in is None else packed.in_features)
    grad_out = torch.zeros(tasks, 0 if scale_out is None else out_features)
    rows = max(1, min(packed.in_features, _TILE_BYTES // (out_features * dtype.itemsize)))
    tile = torch.empty(rows, out_features, dtype=dtype)
    scratch = 2 * (packed.blocks * 8 * packed.group + kernels.SLACK) * 4
    for start in range(0, packed.in_features, rows):
        stop = min(start + rows, packed.in_features)
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
        _run("scatter", tasks, scratch, packed, fields)
    table, clusters = tables.sum(0)[..., : packed.group], codebook.shape[1]
    grad_codebook = table[:, :clusters].contiguous()
    if clusters < table.shape[1]:
        grad_codebook[:, -1] += table[:, clusters:].sum(1)  # what damaged codes collected
    return grad_codebook, grad_in, grad_out.sum(0)
