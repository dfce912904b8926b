"""A matrix as the compiled kernels of the CPU backend take it: packed codes, and the codebook as a table of theirs."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch

from ....codes import code_bits, num_groups
from ....failures import in_words

__all__ = ["FLOATS", "Packed", "compiled", "packed_for", "places", "with_kernels"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_WIDE = 16  # numbers that a vector instruction moves
_OVERREAD = 16  # bytes that a word of codes, and elements that a table, may be read beyond its end
_KEPT_SHAPES, _KEPT_BYTES = 16, 2 << 20  # of which a thread keeps tables, and the largest that it keeps


def compiled() -> Any:
    """The compiled functions, made by those who use them; None without numba, and after one could not be made."""
    return None if _failed else _kernels()


@functools.cache
def _kernels() -> Any:
    try:
        if importlib.util.find_spec("numba") is None:
            return None
        from . import kernels
    except MemoryError:
        raise
    except Exception as error:
        _give_up(error)
        return None
    return _Kernels(kernels)


class KernelsFailed(Exception):
    """A function could not be compiled; from now on there are none."""


class _Kernels:
    """A module of functions that compile kernels. Whatever goes wrong there (a broken numba, a machine that LLVM does
    not know), the reference can do the work."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if callable(value) and not isinstance(value, type):
            value = self._guarded(value)
        setattr(self, name, value)
        return value

    def _guarded(self, function: Any) -> Any:
        def call(*args: Any) -> Any:
            try:
                return function(*args)
            except MemoryError:
                raise
            except Exception as error:
                _give_up(error)
                raise KernelsFailed from error

        return call


_failed: list[str] = []


def _give_up(error: Exception) -> None:
    if not _failed:
        why, cure = in_words(error, "Reinstall numba and llvmlite")
        warnings.warn(
            f"the CPU kernels cannot be compiled ({why}); plain torch does their work, several times slower. {cure}, "
            "or remove numba to be spared this message.",
            stacklevel=2,
        )
    _failed.append(str(error))


def with_kernels(function: Callable) -> Callable:
    """Calls a function that uses [`compiled`] once more, without kernels, if making them fails."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        try:
            return function(*args)
        except KernelsFailed:
            return function(*args)

    return call


@functools.cache
def places() -> dict[str, int]:
    """Field of a kernel's arguments to its place."""
    return {name: place for place, name in enumerate(compiled().FIELDS._fields)}


@functools.cache
def _filler(address: int) -> Any:
    return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 5)(address)


class Packed:
    """Codes and codebook as kernels take them: the fields of their shape, and room for what is copied."""

    def __init__(
        self, codes: torch.Size, codebook: torch.Size, out_features: int, stored: torch.dtype, dtype: torch.dtype
    ) -> None:
        self.codebooks, clusters, self.group = codebook
        self.in_features, width = codes
        self.bits = code_bits(clusters)
        self.blocks = -(-num_groups(out_features, self.group) // 8)
        self.lanes = 1 << (self.group - 1).bit_length()
        beyond = self.bits + _OVERREAD  # the last block of eight may only begin inside the row
        self._safe = max(0, self.in_features - -(-beyond // width))
        self._tail_bytes = (self.in_features - self._safe) * width
        tail = torch.zeros(self._tail_bytes + beyond, dtype=torch.uint8)
        # A row for every code there can be: damaged ones, and the bits behind the last code of a row, must not reach
        # foreign memory. They read the last centroid.
        rows = self.codebooks << self.bits
        self.table_shape = (self.codebooks, 1 << self.bits, self.lanes)
        flat = torch.full((rows * self.lanes + _OVERREAD,), torch.nan, dtype=dtype)
        table = flat[: rows * self.lanes].view(self.table_shape)[..., : self.group]
        self._centroids, self._last = table[:, :clusters], table[:, clusters - 1 : clusters]
        self._beyond = table[:, clusters:] if clusters < 1 << self.bits else None
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
        self._table_loop = self._chosen_loop(clusters, stored, dtype)

    def load(self, codes: torch.Tensor, codebook: torch.Tensor) -> None:
        """Takes over a matrix of this shape for the next calls of kernels, while the caller keeps its codes."""
        self._place = codes.data_ptr()
        fields = self._fields
        ctypes.memmove(fields["tail"], self._place + self._safe * fields["width"], self._tail_bytes)
        if self._table_loop is None or not codebook.is_contiguous():
            self._centroids.copy_(codebook)
        else:
            function, rows = self._table_loop
            function(codebook.data_ptr(), self.codebooks, rows, fields["table"], fields["table_bytes"])
        if self._beyond is not None:
            self._beyond.copy_(self._last)

    def _chosen_loop(self, clusters: int, stored: torch.dtype, dtype: torch.dtype) -> tuple[Any, int] | None:
        """The compiled loop that makes a table of codebooks of a dtype, and the rows it moves, if there is one."""
        if stored not in FLOATS or dtype not in FLOATS[:2]:
            return None
        rows, row, lanes = clusters, self.group, self.lanes
        if lanes == row and rows * row % _WIDE == 0 and rows * row > _WIDE:
            rows, row, lanes = rows * row // _WIDE, _WIDE, _WIDE  # no padding: as well rows of another length
        name = str(stored).removeprefix("torch.")
        return _filler(compiled().table_loop(row, lanes, name, dtype == torch.bfloat16)[0]), rows

    def arguments(self, kernel: str) -> Any:
        """The array of a kernel's fields: those of the matrix filled in, whoever calls fills in the same others."""
        if kernel not in self._arguments:
            self._arguments[kernel] = (ctypes.c_int64 * len(places()))()
            for key, value in self._fields.items():
                self._arguments[kernel][places()[key]] = value
        values, index = self._arguments[kernel], places()
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
        self.shapes: dict[tuple, Packed] = {}


_KEPT = _Kept()


def packed_for(codes: torch.Tensor, codebook: torch.Tensor, out_features: int, dtype: torch.dtype) -> Packed:
    """Contiguous codes and a codebook for a kernel, the table in `dtype`; for this thread and until its next call."""
    key = (codes.shape, codebook.shape, out_features, codebook.dtype, dtype)
    kept = _KEPT.shapes
    packed = kept.get(key)
    if packed is None:
        packed = Packed(*key)
        if packed.table_bytes <= _KEPT_BYTES:
            if len(kept) >= _KEPT_SHAPES:
                del kept[next(iter(kept))]
            kept[key] = packed
    packed.load(codes, codebook)
    return packed
