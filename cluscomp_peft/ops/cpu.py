"""The CPU backend of the ops: the maths of `reference`, on packed codes, in compiled loops.

    decode          bit for bit the reference; in tiles of channels × outputs, without codes or weights in between
    linear          few tokens: from the codes, y[o] = s_out[o] · Σ_i s_in[i] · x[i] · C[code(i, o // g), o % g],
                    summed in fp32; the weight is never written to memory, which is what one token's time goes into
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

Without numba, for small matrices, fp64 and whatever else the kernels do not know, the reference does the work.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ..codes import code_bits, num_groups
from . import reference

__all__ = ["MAX_FEW_TOKENS", "codebook_grad", "decode", "linear", "product_dtype"]

MAX_FEW_TOKENS = 16
_FEWEST_TOKENS = 4  # whose sums are kept in registers
_SMALL = 1 << 14  # weights below which the reference is as fast
_TASK_OUTPUTS = 256  # of a decoding task; a run of input channels of them fits into the second-level cache
_FEW_TASK_OUTPUTS = 128  # with ROWS input channels it fits into the first-level cache
_TILE_BYTES = 4 << 20  # of dL/dW
_PARTIAL_BYTES = 64 << 20  # of all gradient tables of the threads together
_OVERREAD = 16  # bytes that a word of codes, and elements that a table, may be read beyond its end
_MAPPED_BYTES, _HUGE_PAGES, _PAGE = 32 << 20, 14, mmap.PAGESIZE  # glibc's largest threshold for mmap; MADV_HUGEPAGE
_KEPT_SHAPES, _KEPT_BYTES = 16, 2 << 20  # of which a thread keeps tables, and the largest that it keeps
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _kernels() -> Any:
    """The compiled functions, imported by those who use them; None without numba."""
    try:
        from . import cpu_kernels
    except ImportError:
        return None
    return cpu_kernels


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


def _run(name: str, tasks: int, scratch_bytes: int, packed: _Packed, fields: dict[str, int]) -> None:
    """Runs the tasks of a kernel on torch's threads; `scratch_bytes` for each of them."""
    kernels = _kernels()
    threads = min(torch.get_num_threads(), tasks)
    scratch = torch.zeros(threads * scratch_bytes + 64, dtype=torch.uint8)
    values, index = packed.arguments(name), _places()
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


@functools.cache
def _places() -> dict[str, int]:
    """Field of a kernel's arguments to its place."""
    return {name: place for place, name in enumerate(_kernels().FIELDS._fields)}


class _Packed:
    """Codes and codebook as kernels take them: the fields of their shape, and room for what is copied."""

    def __init__(
        self, codes: torch.Size, codebook: torch.Size, out_features: int, codes_dtype: torch.dtype, dtype: torch.dtype
    ) -> None:
        self.codebooks, clusters, self.group = codebook
        self.in_features, width = codes
        self.bits = code_bits(clusters)
        self.blocks = -(-num_groups(out_features, self.group) // 8)
        self.lanes = 1 << (self.group - 1).bit_length()
        beyond = self.bits + _OVERREAD  # the last block of eight may only begin inside the row
        self._safe = max(0, self.in_features - -(-beyond // width))
        tail = torch.zeros((self.in_features - self._safe) * width + beyond, dtype=codes_dtype)
        self._tail = tail[: (self.in_features - self._safe) * width].view(-1, width)
        # A row for every code there can be: damaged codes, and the bits behind the last code of a row, read a NaN
        # instead of foreign memory.
        rows = self.codebooks << self.bits
        self.table_shape = (self.codebooks, 1 << self.bits, self.lanes)
        flat = torch.full((rows * self.lanes + _OVERREAD,), torch.nan, dtype=dtype)
        self._centroids = flat[: rows * self.lanes].view(self.table_shape)[:, :clusters, : self.group]
        self.table_bytes = flat.nbytes
        self._place = 0
        self._arguments: dict[str, Any] = {}
        self._fields = {
            "tail": tail.data_ptr(),
            "safe": self._safe,
            "width": width,
            "bits": self.bits,
            "blocks": self.blocks,
            "group": self.group,
            "in_features": self.in_features,
            "out_features": out_features,
            "codebooks": self.codebooks,
            "table": flat.data_ptr(),
            "row_bytes": self.lanes * dtype.itemsize,
            "table_bytes": (self.lanes << self.bits) * dtype.itemsize,
        }
        self._kept = (tail, flat)  # which the fields point into

    def load(self, codes: torch.Tensor, codebook: torch.Tensor) -> None:
        """Takes over a matrix of this shape for the next calls of kernels, while the caller keeps its codes."""
        self._place = codes.data_ptr()
        self._tail.copy_(codes[self._safe :])
        self._centroids.copy_(codebook)

    def arguments(self, kernel: str) -> Any:
        """The array of a kernel's fields: those of the matrix filled in, whoever calls fills in the same others."""
        if kernel not in self._arguments:
            self._arguments[kernel] = (ctypes.c_int64 * len(_places()))()
            for key, value in self._fields.items():
                self._arguments[kernel][_places()[key]] = value
        values, index = self._arguments[kernel], _places()
        values[index["claimed"]] = values[index["workers"]] = 0
        values[index["codes"]] = self._place
        return values

    def split(self, outputs: int) -> tuple[int, int]:
        """Blocks of a task of about `outputs` outputs, and tasks."""
        wanted = max(1, outputs // (8 * self.group))
        return wanted, -(-self.blocks // wanted)


class _Kept(threading.local):
    """What each thread keeps of the last shapes that it saw: making it anew takes longer than a small matrix and one
    token."""

    def __init__(self) -> None:
        self.shapes: dict[tuple, _Packed] = {}


_KEPT = _Kept()


def _packed(codes: torch.Tensor, codebook: torch.Tensor, out_features: int, dtype: torch.dtype) -> _Packed:
    """Contiguous codes and a codebook for a kernel, the table in `dtype`; for this thread and until its next call."""
    key = (codes.shape, codebook.shape, out_features, codes.dtype, dtype)
    kept = _KEPT.shapes
    packed = kept.get(key)
    if packed is None:
        packed = _Packed(*key)
        if packed.table_bytes <= _KEPT_BYTES:
            if len(kept) >= _KEPT_SHAPES:
                del kept[next(iter(kept))]
            kept[key] = packed
    packed.load(codes, codebook)
    return packed


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _float(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def _takes(codes: torch.Tensor, out_features: int, *dtypes: torch.dtype) -> bool:
    large = codes.shape[0] * out_features >= _SMALL
    return large and all(dtype in _FLOATS for dtype in dtypes) and _kernels() is not None


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
    kernels, codes = _kernels(), codes.contiguous()
    packed = _packed(codes, codebook, out_features, dtype if plain else torch.float32)
    weight = _empty_weight(out_features, packed.in_features, dtype)
    scale_in, scale_out = _float(scale_in), _float(scale_out)
    per_task, tasks = packed.split(_TASK_OUTPUTS)
    item = dtype.itemsize if plain else 4
    run = kernels.RUN_BYTES // dtype.itemsize
    scratch = run * ((per_task * 8 * packed.group + kernels.SLACK) * item + (0 if plain else 9 * 4))
    fields = {
        "blocks_per_task": per_task,
        "scale_in": _address(scale_in),
        "scale_out": _address(scale_out),
        "residual": _address(residual),
        "residual_item": 0 if residual is None else residual.element_size(),
        "weight": weight.data_ptr(),
        "item": dtype.itemsize,
    }
    _run("decode", tasks, scratch, packed, fields)
    return weight


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
    kernels, codes = _kernels(), codes.contiguous()
    if scale_in is None and scale_out is None:
        codebook = codebook.to(x.dtype)  # what `decode` would round to
    packed = _packed(codes, codebook, out_features, torch.float32)
    flat = x.reshape(-1, packed.in_features).float()
    flat = flat.contiguous() if scale_in is None else flat * scale_in.float()
    tokens = len(flat)
    y = torch.empty(tokens, out_features, dtype=torch.float32)
    fields = {"x": flat.data_ptr(), "tokens": tokens, "y": y.data_ptr(), "y_step": y.stride(0) * 4}
    if tokens <= _FEWEST_TOKENS:
        # Tasks of equal length, enough of them that a thread which starts late is made up for.
        per_task = max(1, packed.blocks // (4 * torch.get_num_threads()))
        loop, lanes, _ = kernels.token_loop(packed.bits, packed.lanes, tokens)
        fields |= {"loop": loop, "lanes": lanes, "blocks_per_task": per_task}
        _run("fewest", -(-packed.blocks // per_task), per_task * 32 * lanes * tokens, packed, fields)
    else:
        per_task, tasks = packed.split(_FEW_TASK_OUTPUTS)
        scratch = (kernels.ROWS + tokens) * (per_task * 8 * packed.group + kernels.SLACK) * 4
        _run("few", tasks, scratch, packed, {**fields, "blocks_per_task": per_task})
    if scale_out is not None:
        y *= scale_out.float()
    if bias is not None:
        y += bias.to(x.dtype).float()
    return y.to(x.dtype).view(*x.shape[:-1], out_features)


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
    kernels, codes = _kernels(), codes.contiguous()
    packed = _packed(codes, codebook, out_features, torch.float32)
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
    grad_codebook = tables.sum(0)[:, : codebook.shape[1], : packed.group].contiguous()
    return grad_codebook, grad_in, grad_out.sum(0)
