"""A weight as the compiled kernels of the CPU backend read it: packed codes, and the codebook as a padded table.

    codes   read where they are; the last rows from a copy (the tail), because kernels read words that reach beyond
            the end of a row
    table   [m, 2^b, lanes]: the codebook in fp32 or bf16, rows padded from g to a power of two, and a row for every
            code that b bits can hold; those that name no centroid hold the last one

Making these takes longer than multiplying a small matrix with one token. So each thread keeps them for the last shapes
that it saw, and a call copies the numbers of its weight in.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from typing import Any

import torch

from ...packed_weight import PackedWeight
from .compilation import compiled

__all__ = ["FLOATS", "MatrixArguments", "arguments_for", "field_places"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_WIDE = 16  # numbers that a vector instruction moves
_OVERREAD = 16  # bytes that a word of codes, and elements that a table row, may be read beyond its end
_KEPT_SHAPES, _KEPT_BYTES = 16, 2 << 20  # shapes that a thread keeps, and the largest table that it keeps


@functools.cache
def field_places() -> dict[str, int]:
    """Name of a field of the kernels' arguments to its place among them."""
    return {name: place for place, name in enumerate(compiled().FIELDS._fields)}


class MatrixArguments:
    """The fields of the kernels' arguments that describe a weight, and the memory that they point to.

    Made for a shape; [`load`] fills in a weight of that shape.

    Args:
        weight ([`PackedWeight`]): Gives the shape, and the dtype of the codebooks that will be loaded.
        dtype (`torch.dtype`): Of the table, fp32 or bf16; for `decode` also fp16.
    """

    def __init__(self, weight: PackedWeight, dtype: torch.dtype) -> None:
        self.in_features, self.group_size, self.bits = weight.in_features, weight.group_size, weight.code_bits
        self.num_blocks, clusters, row_bytes = weight.num_blocks, weight.num_clusters, weight.row_bytes
        self.chunks = -(-weight.num_groups // 8)
        self.lanes = 1 << (self.group_size - 1).bit_length()
        # A kernel reads whole chunks and the words around them, so many bytes from the last chunk of a row on.
        beyond = self.bits + _OVERREAD
        self._safe = max(0, self.in_features - -(-beyond // row_bytes))
        self._tail_bytes = (self.in_features - self._safe) * row_bytes
        tail = torch.zeros(self._tail_bytes + beyond, dtype=torch.uint8)
        # A row for every code there can be: stray codes, and the bits behind the last code of a row, must not reach
        # memory outside.
        rows = self.num_blocks << self.bits
        self.table_shape = (self.num_blocks, 1 << self.bits, self.lanes)
        flat = torch.full((rows * self.lanes + _OVERREAD,), torch.nan, dtype=dtype)
        table = flat[: rows * self.lanes].view(self.table_shape)[..., : self.group_size]
        self._centroids, self._last = table[:, :clusters], table[:, clusters - 1 : clusters]
        self._stray = table[:, clusters:] if clusters < 1 << self.bits else None
        self.table_bytes = flat.nbytes
        self._codes = 0  # their address
        self._of_kernels: dict[str, Any] = {}
        self._fields = {
            "tail": tail.data_ptr(),
            "safe": self._safe,
            "width": row_bytes,
            "bits": self.bits,
            "chunks": self.chunks,
            "group": self.group_size,
            "in_features": self.in_features,
            "out_features": weight.out_features,
            "num_blocks": self.num_blocks,
            "table": flat.data_ptr(),
            "row_bytes": self.lanes * dtype.itemsize,
            "table_bytes": (self.lanes << self.bits) * dtype.itemsize,
        }
        self._kept = (tail, flat)  # which the fields point into
        self._table_loop = self._choose_loop(clusters, weight.codebook.dtype, dtype)

    def load(self, codes: torch.Tensor, codebook: torch.Tensor) -> None:
        """Fills in a weight for the next calls of kernels; the caller keeps the codes in memory for so long."""
        self._codes = codes.data_ptr()
        fields = self._fields
        ctypes.memmove(fields["tail"], self._codes + self._safe * fields["width"], self._tail_bytes)
        if self._table_loop is None or not codebook.is_contiguous():
            self._centroids.copy_(codebook)
        else:
            function, rows = self._table_loop
            function(codebook.data_ptr(), self.num_blocks, rows, fields["table"], fields["table_bytes"])
        if self._stray is not None:
            self._stray.copy_(self._last)

    def _choose_loop(self, clusters: int, stored: torch.dtype, dtype: torch.dtype) -> tuple[Any, int] | None:
        """The compiled loop that makes a table from codebooks of the dtype `stored`, and the rows that it is to move;
        None if torch has to do it."""
        if stored not in FLOATS or dtype not in FLOATS[:2]:
            return None
        rows, row, lanes = clusters, self.group_size, self.lanes
        if lanes == row and rows * row % _WIDE == 0 and rows * row > _WIDE:
            rows, row, lanes = rows * row // _WIDE, _WIDE, _WIDE  # no padding, so rows may be cut anywhere
        name = str(stored).removeprefix("torch.")
        return _table_function(compiled().table_loop(row, lanes, name, dtype == torch.bfloat16)[0]), rows

    def fields_of(self, kernel: str) -> Any:
        """The array of a kernel's arguments, int64, with the fields of this weight filled in.

        It is the same array in every call for a kernel. Its other fields are the caller's to fill in.
        """
        places = field_places()
        if kernel not in self._of_kernels:
            self._of_kernels[kernel] = (ctypes.c_int64 * len(places))()
            for key, value in self._fields.items():
                self._of_kernels[kernel][places[key]] = value
        values = self._of_kernels[kernel]
        values[places["claimed"]] = values[places["workers"]] = 0
        values[places["codes"]] = self._codes
        return values

    def split(self, outputs: int) -> tuple[int, int]:
        """The most chunks of a task of about `outputs` outputs, and the number of tasks."""
        chunks = max(1, outputs // (8 * self.group_size))
        return chunks, -(-self.chunks // chunks)


@functools.cache
def _table_function(address: int) -> Any:
    return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 5)(address)


class _Kept(threading.local):
    """What each thread keeps."""

    def __init__(self) -> None:
        self.shapes: dict[tuple, MatrixArguments] = {}


_KEPT = _Kept()


def arguments_for(weight: PackedWeight, dtype: torch.dtype) -> MatrixArguments:
    """A weight with contiguous codes for kernels that read a table in `dtype`: for this thread, until its next call
    with a weight of this shape."""
    codes, codebook, out_features, *_ = weight
    key = (codes.shape, codebook.shape, out_features, codebook.dtype, dtype)
    kept = _KEPT.shapes
    found = kept.get(key)
    if found is None:
        found = MatrixArguments(weight, dtype)
        if found.table_bytes <= _KEPT_BYTES:
            if len(kept) >= _KEPT_SHAPES:
                del kept[next(iter(kept))]
            kept[key] = found
    found.load(codes, codebook)
    return found
