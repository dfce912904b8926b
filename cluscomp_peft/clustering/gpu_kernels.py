"""The Triton kernels of the CUDA engine; `gpu` launches them and says what they are for."""

# mypy: disable-error-code="assignment, call-overload"
# Tuples of tensors, one for each dimension, grow in the kernels.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

triton: Any = None
tl: Any = None
try:
    import triton  # type: ignore[no-redef]
    import triton.language as tl  # type: ignore[no-redef]
except ImportError:  # `gpu.available` says so
    pass

__all__ = ["MAX_SPELLED", "find_nearest", "keep_nearer", "launch_shape", "sum_members", "triton"]

MAX_SPELLED = 11  # largest dimension whose loops are unrolled; above, `tl.dot` is used


def _jit(*unspecialised: str) -> Callable:
    """Compiles a kernel. Arguments named here are sizes that differ between matrices: for each of them Triton would
    compile anew when it is 1 or a multiple of 16 and was not before."""
    return (lambda function: function) if triton is None else triton.jit(do_not_specialize=list(unspecialised))


def launch_shape(dim: int) -> tuple[int, int]:
    """Vectors of one program of `find_nearest`, and the registers that a thread may use: the fewest that spill nothing
    on sm_90.

    Rows are held in registers, once for every lane. 128 registers let 16 warps share a multiprocessor, 168 let 12,
    255 let 8.
    """
    if dim > MAX_SPELLED:
        return 32, 255
    return (64 if dim <= 2 else 32), 128 if dim <= 5 else 168 if dim <= 8 else 255


@_jit()
def _near(low, high, stride, first, own_low, own_high, bound, DIM: tl.constexpr, TILE: tl.constexpr):
    """A mask: bit i is set if the squared gap between box first + i and the chunk's own box is at most `bound`."""
    box = tl.arange(0, TILE)
    gaps = tl.zeros([TILE], tl.float32)
    for k in tl.static_range(DIM):
        above = tl.load(low + k * stride + first + box) - own_high[k]
        below = own_low[k] - tl.load(high + k * stride + first + box)
        gap = tl.maximum(tl.maximum(above, below), 0.0)
        gaps += gap * gap
    # Both sides are sums of at most 16 squares of rounded differences, off by less than 3e-6 of themselves.
    kept = (gaps * 0.99999 <= bound).to(tl.int64)
    return tl.sum(kept << box.to(tl.int64), 0)


@_jit()
def _lowest(mask):
    """The lowest set bit of a mask as a power of two, and its position, which is the exponent of that power."""
    bit = mask & -mask
    return bit, (bit.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


@_jit("total", "clusters")
def find_nearest(
    vectors, order, codes, found, spread, places, tile_low, word_low, tile_high, word_high, total, clusters, padded,
    DIM: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, PRUNE: tl.constexpr, SPREAD: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes to `found` the nearest centroid by score of each vector, in sorted order."""
    batch = tl.program_id(1).to(tl.int64)
    spread += batch * tl.num_programs(0) + tl.program_id(0)
    if SPREAD:
        if tl.load(spread) == 0:
            return
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.load(order + batch * total + tl.minimum(at, total - 1))
    code = tl.load(codes + row)
    tiles = padded // TILE
    words = tiles // TILE
    places += batch * DIM * padded
    tile_low += batch * DIM * tiles
    tile_high += batch * DIM * tiles
    word_low += batch * DIM * words
    word_high += batch * DIM * words

    own_low, own_high = (), ()
    present = tl.zeros([ROWS], tl.float32)
    off = tl.zeros([ROWS], tl.float32)
    for k in tl.static_range(DIM):
        value = tl.load(vectors + row * DIM + k)
        own_low += (tl.min(value, 0),)
        own_high += (tl.max(value, 0),)
        step = value - tl.load(places + k * padded + code)
        present += step * step
        step = value - tl.sum(value, 0) / ROWS
        off += step * step
    bound = tl.max(present, 0)
    # The origin is the vector nearest to the mean: an outlier can pull the mean away from all other vectors.
    origin = tl.sum(tl.where(tl.arange(0, ROWS) == tl.argmin(off, 0), row, 0), 0)
    moved = ()
    if SPREAD:
        for k in tl.static_range(DIM):
            moved += (tl.load(vectors + row * DIM + k),)
    else:
        middle = ()
        off = tl.zeros([ROWS], tl.float32)
        for k in tl.static_range(DIM):
            value = tl.load(vectors + origin * DIM + k)
            step = (value - tl.load(vectors + row * DIM + k)) * 2
            middle += (value,)
            moved += (step,)
            off += step * step
        # Scores of vectors far from the origin lose the digits that tell neighbours apart. Such chunks are marked for
        # the launch that sums squared differences.
        wide = tl.max(off, 0) > 1024 * bound
        tl.store(spread, wide.to(tl.int8))
        words = tl.where(wide, 0, words)
        if DOT:
            dims = tl.arange(0, 16)
            middle = tl.load(vectors + origin * DIM + dims, mask=dims < DIM, other=0.0)
            moved = tl.load(vectors + row[:, None] * DIM + dims[None, :], mask=(dims < DIM)[None, :], other=0.0)
            moved = (middle[None, :] - moved) * 2
    if not PRUNE:
        bound = bound * 0 + 3e38  # only boxes without centroids, which are infinitely far, are skipped

    lane = tl.arange(0, TILE)
    least = tl.full([ROWS, TILE], float("inf"), tl.float32)
    held = tl.zeros([ROWS, TILE], tl.int32)
    for first_word in range(0, words, TILE):
        near_words = _near(word_low, word_high, tiles // TILE, first_word, own_low, own_high, bound, DIM, TILE)
        while near_words != 0:
            word_bit, word = _lowest(near_words)
            near_words ^= word_bit
            first_tile = (first_word + word) * TILE
            near_tiles = _near(tile_low, tile_high, tiles, first_tile, own_low, own_high, bound, DIM, TILE)
            while near_tiles != 0:
                tile_bit, tile = _lowest(near_tiles)
                near_tiles ^= tile_bit
                tile += first_tile
                place = tile * TILE + lane
                norm = tl.where(place < clusters, 0.0, float("inf"))
                if SPREAD:
                    scores = tl.zeros([ROWS, TILE], tl.float32) + norm[None, :]
                    for k in tl.static_range(DIM):
                        apart = moved[k][:, None] - tl.load(places + k * padded + place)[None, :]
                        scores = tl.fma(apart, apart, scores)
                elif DOT:
                    there = places + dims[:, None] * padded + place[None, :]
                    centroid = tl.load(there, mask=(dims < DIM)[:, None], other=0.0) - middle[:, None]
                    norm += tl.sum(centroid * centroid, 0)
                    scores = norm[None, :] + tl.dot(moved, centroid, input_precision=PRECISION)
                else:
                    columns = ()
                    for k in tl.static_range(DIM):
                        column = tl.load(places + k * padded + place) - middle[k]
                        columns += (column,)
                        norm = tl.fma(column, column, norm)
                    scores = tl.zeros([ROWS, TILE], tl.float32) + norm[None, :]
                    for k in tl.static_range(DIM):
                        scores = tl.fma(moved[k][:, None], columns[k][None, :], scores)
                held = tl.where(scores < least, tile, held)
                least = tl.minimum(scores, least)
    best = tl.min(least, 1)
    number = tl.min(tl.where(least == best[:, None], held * TILE + lane[None, :], clusters - 1), 1)
    tl.store(found + batch * total + at, tl.minimum(number, clusters - 1), mask=at < total)


@_jit("total")
def keep_nearer(vectors, order, codes, distances, found, places, total, padded, DIM: tl.constexpr, ROWS: tl.constexpr):
    """Replaces codes by those found where these are nearer, and writes the squared distances."""
    batch = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = at < total
    row = tl.load(order + batch * total + at, mask=inside, other=0)
    old = tl.load(codes + row, mask=inside, other=0)
    new = tl.load(found + batch * total + at, mask=inside, other=0)
    places += batch * DIM * padded
    there = tl.zeros([ROWS], tl.float32)
    here = tl.zeros([ROWS], tl.float32)
    for k in tl.static_range(DIM):
        value = tl.load(vectors + row * DIM + k, mask=inside, other=0.0)
        step = value - tl.load(places + k * padded + new)
        there += step * step
        step = value - tl.load(places + k * padded + old)
        here += step * step
    tl.store(codes + row, tl.where(there < here, new, old), mask=inside)
    tl.store(distances + row, tl.where(there < here, there, here), mask=inside)


@_jit()
def sum_members(
    vectors, weights, order, starts, sums, mass,
    DIM: tl.constexpr, PADDED: tl.constexpr, MEMBERS: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Writes the weighted sum of the vectors of one code, and the sum of their weights, in fp64."""
    code = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, PADDED)
    total = tl.zeros([MEMBERS, PADDED], tl.float64)
    weight = tl.zeros([MEMBERS], tl.float64)
    last = tl.load(starts + code + 1)
    for first in range(tl.load(starts + code), last, MEMBERS):
        at = first + tl.arange(0, MEMBERS)
        inside = at < last
        row = tl.load(order + at, mask=inside, other=0)
        share = inside.to(tl.float64)
        if WEIGHTED:
            share = tl.load(weights + row, mask=inside, other=0.0).to(tl.float64)
        there = vectors + row[:, None] * DIM + dims[None, :]
        value = tl.load(there, mask=inside[:, None] & (dims < DIM)[None, :], other=0.0)
        total += value.to(tl.float64) * share[:, None]
        weight += share
    tl.store(sums + code * DIM + dims, tl.sum(total, 0), mask=dims < DIM)
    tl.store(mass + code, tl.sum(weight, 0))
