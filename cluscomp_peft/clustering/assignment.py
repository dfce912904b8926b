"""The compiled assignment of the CPU engine: the nearest centroid of each vector, searched from its previous one.

Arrays have the names of `cells`. The *home* of a vector is the centroid that it was assigned to last. There are two
ways to search:

by bounds   If a vector is at distance u from its home, its nearest centroid is within 2u of the home. The centroids
            that near to the homes of a chunk are collected, skipping blocks whose bounding boxes are too far. Then the
            vectors of each home, sorted by u, are compared in chunks with those of the collected centroids that are
            near enough for the chunk. With the factor 2 this is exact; a smaller factor skips unlikely centroids.
by lists    Each home has a list of the centroids that were near to one of its vectors. A narrow pass compares vectors
            with that list only. A wide pass adds the lists of the listed centroids, as searches in neighbour graphs do
            (Dong et al., "Efficient k-nearest neighbor graph construction for generic similarity measures", WWW 2011),
            and writes the lists anew. From d = 7 on bounds exclude hardly any centroid, but lists are short.

All coordinates are taken relative to the home before anything is squared, so fp32 keeps its digits far from 0.
"""

from __future__ import annotations

import numpy as np

from ..jit import njit
from .cells import MARGIN, SLAB, distance, pack, rows_for_scan, scan_chunks
from .scan import collect, lanes, lowest_bit, scan

__all__ = ["assign", "assign_listed", "rows_for_collect"]

_VECTOR_BINS = 16
_CANDIDATE_BINS = 32
_TINY = np.float32(
    1e-36
)  # smaller squared distances count as 0, as vectors are scaled to about 1: bins divide by them
_ROUNDING = np.float32(4e-6)  # relative error of a sum of 17 products in fp32, with room to spare


@njit(nogil=True)
def rows_for_collect(c, origin, rows):
    """Rows of all centroids for `collect`. Norms are lowered by the rounding error, so that no centroid is missed."""
    rows_for_scan(c, origin, rows)
    for k in range(len(c)):
        rows[k, c.shape[1]] *= 1 - _ROUNDING


@njit(nogil=True)
def _nearby(c, origin, rows, home, count, limits, bounds, low, high, packed, bias, hits, masks, ends):
    """Centroids within `limits` (squared distances) of each of the homes [home, home + count), count ≤ lanes.

    Returns one array of centroids: those near to home + t, without itself, are in [ends[t], ends[t + 1]).
    """
    dim, blocks = c.shape[1], len(bounds) - 1
    size = lanes(dim)
    pack(c, home, home + count, origin, packed, bias)
    widest = np.float32(0)
    for t in range(size):
        if t < count:
            widest = max(widest, limits[t])
            bias[t] = limits[t] - bias[t] * (1 - _ROUNDING)
        else:
            bias[t] = -np.inf
    smallest, largest = np.empty(dim, np.float32), np.empty(dim, np.float32)
    for j in range(dim):
        smallest[j] = largest[j] = c[home, j]
        for k in range(home + 1, home + count):
            smallest[j], largest[j] = min(smallest[j], c[k, j]), max(largest[j], c[k, j])
    gaps = np.zeros(blocks, np.float32)
    for j in range(dim):
        a, b = smallest[j], largest[j]
        for q in range(blocks):
            gap = max(max(low[j, q] - b, a - high[j, q]), np.float32(0))
            gaps[q] += gap * gap
    found = 0
    q = 0
    while q < blocks:
        if gaps[q] > widest:
            q += 1
            continue
        first = bounds[q]
        while q < blocks and gaps[q] <= widest:
            q += 1
        more = collect(
            packed.ctypes.data,
            rows.ctypes.data + 4 * first * (dim + 1),
            bounds[q] - first,
            dim,
            bias.ctypes.data,
            hits.ctypes.data + 4 * found,
            masks.ctypes.data + 8 * found,
        )
        for m in range(found, found + more):
            hits[m] += first
        found += more
    ends[: count + 1] = 0
    for m in range(found):
        mask = masks[m]
        while mask != 0:
            ends[lowest_bit(mask) + 1] += 1
            mask &= mask - 1
    for t in range(count):
        ends[t + 1] += ends[t]
    result, position = np.empty(ends[count], np.int32), ends[:count].copy()
    for m in range(found):
        mask = masks[m]
        while mask != 0:
            t = lowest_bit(mask)
            result[position[t]] = hits[m]
            position[t] += 1
            mask &= mask - 1
    return result


@njit(nogil=True)
def _mark(
    q, count, packed, rows, end, dim, norms, best, slack, home, listed, hits, masks, marks, seen, lists, lengths
):
    """Adds to the home's list the centroids within (1 + slack) times the least squared distance of a vector of chunk
    q."""
    size = lanes(dim)
    for t in range(size):
        p = q * size + t
        marks[t] = best[p] + slack * (best[p] + norms[p]) if p < count else -np.inf
    found = collect(
        packed.ctypes.data + 4 * q * size * dim,
        rows.ctypes.data,
        end,
        dim,
        marks.ctypes.data,
        hits.ctypes.data,
        masks.ctypes.data,
    )
    for m in range(found):
        other = listed[hits[m]]
        if seen[other] != home and lengths[home] < lists.shape[1]:
            seen[other] = home
            lists[home, lengths[home]] = other
            lengths[home] += 1


@njit(nogil=True)
def assign(
    x, order, starts, c, origin, rows, reach, bounds, low, high, factor, slack, first, last, code, dist, lists, lengths
):
    """Nearest centroid of every vector whose home is in the blocks [first, last).

    Centroids farther from the home than `factor` times the distance of the vector are skipped, which is exact for 2.
    Those within (1 + slack) times the least squared distance of some vector are written to the home's list.
    """
    dim, n = x.shape[1], len(c)
    size = lanes(dim)
    square = np.float32(factor * factor) * MARGIN
    sorted_norms = np.empty(SLAB, np.float32)
    shifted, norms = np.empty((SLAB, dim), np.float32), np.empty(SLAB, np.float32)
    slot = np.empty(SLAB, np.int32)
    packed = np.empty((SLAB + size) * dim, np.float32)
    best, index = np.empty(SLAB + size, np.float32), np.empty(SLAB + size, np.int32)
    farthest = np.empty(SLAB // size + 1, np.float32)
    gap, listed = np.empty(n, np.float32), np.empty(n, np.int32)
    near_rows = np.empty((n, dim + 1), np.float32)
    chunk, bias, limits = np.empty(size * dim, np.float32), np.empty(size, np.float32), np.empty(size, np.float32)
    hits, masks, ends = np.empty(n + 1, np.int32), np.empty(n + 1, np.int64), np.empty(size + 1, np.int64)
    vector_end, candidate_end = np.empty(_VECTOR_BINS + 1, np.int32), np.empty(_CANDIDATE_BINS + 1, np.int32)
    seen, marks = np.full(n, -1, np.int32), np.empty(size, np.float32)
    room = lists.shape[1]
    edge = bounds[last]
    home = bounds[first]
    while home < edge:
        group = min(size, edge - home)
        for t in range(group):
            limits[t] = square * reach[home + t] * reach[home + t]
            if starts[home + t] == starts[home + t + 1]:
                limits[t] = -np.inf
        near = _nearby(c, origin, rows, home, group, limits, bounds, low, high, chunk, bias, hits, masks, ends)
        for member in range(group):
            if room:
                lengths[home] = 0
                seen[home] = home
            for begin in range(starts[home], starts[home + 1], SLAB):
                count = min(begin + SLAB, starts[home + 1]) - begin
                largest = np.float32(0)
                for t in range(count):
                    i, norm = order[begin + t], np.float32(0)
                    for j in range(dim):
                        value = x[i, j] - c[home, j]
                        shifted[t, j] = value
                        norm += value * value
                    norms[t] = norm
                    largest = max(largest, norm)
                if largest < _TINY:
                    for t in range(count):
                        code[order[begin + t]], dist[order[begin + t]] = home, 0
                    continue

                # Vectors sorted by distance into bins.
                scale = np.float32(_VECTOR_BINS) / largest
                vector_end[:] = 0
                for t in range(count):
                    vector_end[min(_VECTOR_BINS - 1, int(norms[t] * scale)) + 1] += 1
                for q in range(_VECTOR_BINS):
                    vector_end[q + 1] += vector_end[q]
                chunks = (count + size - 1) // size
                farthest[:chunks] = 0
                for t in range(count):
                    q = min(_VECTOR_BINS - 1, int(norms[t] * scale))
                    p = vector_end[q]
                    vector_end[q] += 1
                    slot[t] = p
                    farthest[p // size] = max(farthest[p // size], norms[t])
                    base = (p // size) * size * dim + p % size
                    for j in range(dim):
                        packed[base + j * size] = shifted[t, j]
                for p in range(count, chunks * size):
                    base = (p // size) * size * dim + p % size
                    for j in range(dim):
                        packed[base + j * size] = 0

                # Candidates sorted by distance into bins.
                limit = square * largest
                scale = np.float32(_CANDIDATE_BINS) / limit
                candidate_end[:] = 0
                for m in range(ends[member], ends[member + 1]):
                    other, norm = near[m], np.float32(0)
                    for j in range(dim):
                        delta = c[other, j] - c[home, j]
                        norm += delta * delta
                    gap[m - ends[member]] = norm
                    if norm <= limit:
                        candidate_end[min(_CANDIDATE_BINS - 1, int(norm * scale)) + 1] += 1
                for q in range(_CANDIDATE_BINS):
                    candidate_end[q + 1] += candidate_end[q]
                for m in range(ends[member], ends[member + 1]):
                    norm = gap[m - ends[member]]
                    if norm <= limit:
                        q = min(_CANDIDATE_BINS - 1, int(norm * scale))
                        p = candidate_end[q]
                        candidate_end[q] += 1
                        other = near[m]
                        listed[p] = other
                        for j in range(dim):
                            near_rows[p, j] = -2 * (c[other, j] - c[home, j])
                        near_rows[p, dim] = norm

                # The score of the home is 0: a vector without a lower score keeps its home.
                best[: chunks * size] = 0
                index[: chunks * size] = -1
                for q in range(chunks):
                    end = candidate_end[min(_CANDIDATE_BINS - 1, int(min(square * farthest[q], limit) * scale))]
                    scan(
                        packed.ctypes.data + 4 * q * size * dim,
                        near_rows.ctypes.data,
                        end,
                        dim,
                        best.ctypes.data + 4 * q * size,
                        index.ctypes.data + 4 * q * size,
                    )
                if room:
                    for t in range(count):
                        sorted_norms[slot[t]] = norms[t]
                    for q in range(chunks):
                        end = candidate_end[min(_CANDIDATE_BINS - 1, int(min(square * farthest[q], limit) * scale))]
                        _mark(
                            q, count, packed, near_rows, end, dim, sorted_norms, best, slack, home, listed, hits,
                            masks, marks, seen, lists, lengths,
                        )  # fmt: skip
                for t in range(count):
                    i, p = order[begin + t], slot[t]
                    if index[p] < 0:
                        code[i], dist[i] = home, norms[t]
                    else:
                        code[i] = listed[index[p]]
                        dist[i] = distance(x, i, c, code[i])
            home += 1


@njit(nogil=True)
def assign_listed(x, order, starts, c, lists, lengths, wide, slack, first, last, code, dist, new_lists, new_lengths):
    """Nearest centroid on the list of the home and, if `wide`, on the lists of the listed centroids, or the home
    itself, for vectors with homes in [first, last). A wide pass writes new lists by the rule of [`assign`]."""
    dim, n = x.shape[1], len(c)
    size = lanes(dim)
    norms = np.empty(SLAB + size, np.float32)
    packed = np.empty((SLAB + size) * dim, np.float32)
    best, index = np.empty(SLAB + size, np.float32), np.empty(SLAB + size, np.int32)
    room = n if wide else lists.shape[1]
    listed, rows = np.empty(room, np.int32), np.empty((room, dim + 1), np.float32)
    marks, hits, masks = np.empty(size, np.float32), np.empty(room + 1, np.int32), np.empty(room + 1, np.int64)
    seen = np.full(n, -1, np.int32)
    marked = np.full(n, -1, np.int32)
    for home in range(first, last):
        if wide:
            new_lengths[home] = 0
        if starts[home] == starts[home + 1]:
            continue
        found = 0
        seen[home] = home
        for m in range(lengths[home]):
            listed[found] = lists[home, m]
            seen[lists[home, m]] = home
            found += 1
        if wide:
            for m in range(lengths[home]):
                other = lists[home, m]
                for k in range(lengths[other]):
                    candidate = lists[other, k]
                    if seen[candidate] != home:
                        seen[candidate] = home
                        listed[found] = candidate
                        found += 1
        for m in range(found):
            other, norm = listed[m], np.float32(0)
            for j in range(dim):
                value = c[other, j] - c[home, j]
                rows[m, j] = -2 * value
                norm += value * value
            rows[m, dim] = norm
        marked[home] = home
        for begin in range(starts[home], starts[home + 1], SLAB):
            count = min(begin + SLAB, starts[home + 1]) - begin
            chunks = (count + size - 1) // size
            for t in range(chunks * size):
                base = (t // size) * size * dim + t % size
                if t < count:
                    i, norm = order[begin + t], np.float32(0)
                    for j in range(dim):
                        value = x[i, j] - c[home, j]
                        packed[base + j * size] = value
                        norm += value * value
                    norms[t] = norm
                else:
                    for j in range(dim):
                        packed[base + j * size] = 0
            best[: chunks * size] = 0
            index[: chunks * size] = -1
            scan_chunks(packed, rows, found, chunks, dim, best, index)
            if wide:
                for q in range(chunks):
                    _mark(
                        q, count, packed, rows, found, dim, norms, best, slack, home, listed, hits, masks, marks,
                        marked, new_lists, new_lengths,
                    )  # fmt: skip
            for t in range(count):
                i = order[begin + t]
                if index[t] < 0:
                    code[i], dist[i] = home, norms[t]
                else:
                    code[i] = listed[index[t]]
                    dist[i] = distance(x, i, c, code[i])
