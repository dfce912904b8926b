"""The compiled steps of the CPU engine: splitting, sorting, means. Plain functions on numpy arrays, without state.

Names, here and in `assignment`:

    x [N, d] fp32, w [N] fp32 (empty: no weights)     vectors and weights, sorted so that neighbours lie together
    code [N] uint16, dist [N] fp32                    centroid of each vector and the squared distance to it
    order [N] int32, starts [n + 1] int64             vectors of centroid k: order[starts[k] : starts[k + 1]]
    c [n, d] fp32                                     centroids; a *block* is a run of neighbours
    bounds [blocks + 1] int64, low / high [d, blocks] starts of blocks, and their bounding boxes
"""

from __future__ import annotations

import numpy as np

from ..jit import njit
from .scan import lanes, scan

__all__ = [
    "MARGIN",
    "SLAB",
    "bound_blocks",
    "count_codes",
    "distance",
    "exact_objective",
    "gather_values",
    "gather_vectors",
    "measure_reach",
    "pack",
    "rank_codes",
    "restore_codes",
    "rows_for_scan",
    "scan_cells",
    "scan_chunks",
    "split_cell",
    "update_centroids",
]

SLAB = 4096  # vectors handled at once, so that their buffers stay in the cache
MARGIN = np.float32(1 + 1e-5)  # widens bounds by their rounding in fp32, so that no centroid within them is missed


@njit(nogil=True)
def _random_below(state, limit):
    """A number in [0, limit) by splitmix64 (Steele, Lea & Flood 2014)."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    z = state[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return np.int64((z >> np.uint64(11)) % np.uint64(limit))


@njit(nogil=True)
def pack(x, first, last, origin, packed, norms):
    """x[first:last] relative to origin, in chunks for `scan`, the last filled with zeros; returns the chunks."""
    dim = x.shape[1]
    size = lanes(dim)
    count = last - first
    chunks = (count + size - 1) // size
    for t in range(chunks * size):
        base = (t // size) * size * dim + t % size
        norm = np.float32(0)
        if t < count:
            for j in range(dim):
                value = x[first + t, j] - origin[j]
                packed[base + j * size] = value
                norm += value * value
        else:
            for j in range(dim):
                packed[base + j * size] = 0
        norms[t] = norm
    return chunks


@njit(nogil=True)
def rows_for_scan(c, origin, rows):
    """Rows of centroids for `scan`, relative to origin."""
    dim = c.shape[1]
    for k in range(len(c)):
        norm = np.float32(0)
        for j in range(dim):
            value = c[k, j] - origin[j]
            rows[k, j] = -2 * value
            norm += value * value
        rows[k, dim] = norm


@njit(nogil=True)
def scan_chunks(packed, rows, count, chunks, dim, best, index):
    size = lanes(dim)
    for q in range(chunks):
        scan(
            packed.ctypes.data + 4 * q * size * dim,
            rows.ctypes.data,
            count,
            dim,
            best.ctypes.data + 4 * q * size,
            index.ctypes.data + 4 * q * size,
        )


@njit(nogil=True)
def _mean(x):
    dim = x.shape[1]
    total = np.zeros(dim)
    for t in range(len(x)):
        for j in range(dim):
            total[j] += x[t, j]
    origin = np.empty(dim, np.float32)
    for j in range(dim):
        origin[j] = total[j] / max(1, len(x))
    return origin


@njit(nogil=True)
def distance(x, i, c, k):
    """Squared distance, from the difference: score plus norm would lose the digits of a distance much below both."""
    total = np.float32(0)
    for j in range(x.shape[1]):
        delta = x[i, j] - c[k, j]
        total += delta * delta
    return total


@njit(nogil=True)
def split_cell(x, w, c, sample, iterations, seed):
    """Writes centroids c for x: random vectors of a sample of x, then `iterations` of Lloyd on the sample."""
    dim, clusters, total = x.shape[1], len(c), len(x)
    state = np.empty(1, np.uint64)
    state[0] = np.uint64(seed)
    count = min(sample, total)
    step = total // count
    pick = np.empty(count, np.int64)
    for t in range(count):
        pick[t] = (t * total) // count + (_random_below(state, step) if step > 1 else 0)
    for t in range(count):
        u = t + _random_below(state, count - t)
        pick[t], pick[u] = pick[u], pick[t]
    y = np.empty((count, dim), np.float32)
    share = np.ones(count, np.float32)
    for t in range(count):
        for j in range(dim):
            y[t, j] = x[pick[t], j]
        if len(w):
            share[t] = w[pick[t]]
    for k in range(clusters):
        for j in range(dim):
            c[k, j] = y[k % count, j]
    size = lanes(dim)
    room = (count + size - 1) // size * size
    packed, norms = np.empty(room * dim, np.float32), np.empty(room, np.float32)
    best, index = np.empty(room, np.float32), np.empty(room, np.int32)
    rows = np.empty((clusters, dim + 1), np.float32)
    sums, mass = np.empty((clusters, dim)), np.empty(clusters)
    origin = _mean(y)
    chunks = pack(y, 0, count, origin, packed, norms)
    for _ in range(iterations):
        rows_for_scan(c, origin, rows)
        best[:] = np.inf
        index[:] = 0
        scan_chunks(packed, rows, clusters, chunks, dim, best, index)
        sums[:] = 0
        mass[:] = 0
        for t in range(count):
            k = index[t]
            mass[k] += share[t]
            for j in range(dim):
                sums[k, j] += np.float64(share[t]) * (y[t, j] - origin[j])
        for k in range(clusters):
            if mass[k] > 0:
                for j in range(dim):
                    c[k, j] = np.float32(sums[k, j] / mass[k] + origin[j])
            else:
                worst, cost = 0, np.float32(-1)
                for t in range(count):
                    value = (norms[t] + best[t]) * share[t]
                    if value > cost:
                        worst, cost = t, value
                for j in range(dim):
                    c[k, j] = y[worst, j]
                best[worst] = -norms[worst]


@njit(nogil=True)
def scan_cells(x, w, c, offset, code, dist, error):
    """code (offset + nearest of c) and dist of every x; error [len(c)] collects the weighted squared distances."""
    dim, total = x.shape[1], len(x)
    origin = _mean(c)
    rows = np.empty((len(c), dim + 1), np.float32)
    rows_for_scan(c, origin, rows)
    packed, norms = np.empty(SLAB * dim, np.float32), np.empty(SLAB, np.float32)
    best, index = np.empty(SLAB, np.float32), np.empty(SLAB, np.int32)
    for first in range(0, total, SLAB):
        last = min(first + SLAB, total)
        chunks = pack(x, first, last, origin, packed, norms)
        best[:] = np.inf
        index[:] = 0
        scan_chunks(packed, rows, len(c), chunks, dim, best, index)
        for t in range(last - first):
            k = index[t]
            value = distance(x, first + t, c, k)
            code[first + t] = offset + k
            dist[first + t] = value
            error[k] += np.float64(value) * (w[first + t] if len(w) else np.float32(1))


@njit(nogil=True)
def count_codes(code, counts):
    for i in range(len(code)):
        counts[code[i]] += 1


@njit(nogil=True)
def rank_codes(code, first, position, order):
    """A stable counting sort: order[position[code]++] = first, first + 1, …"""
    for i in range(len(code)):
        c = code[i]
        order[position[c]] = first + i
        position[c] += 1


@njit(nogil=True)
def gather_values(old, places, new):
    for i in range(len(places)):
        new[i] = old[places[i]]


@njit(nogil=True)
def gather_vectors(old, places, new):
    for i in range(len(places)):
        for j in range(old.shape[1]):
            new[i, j] = old[places[i], j]


@njit(nogil=True)
def update_centroids(x, w, order, starts, dist, first, last, c, reach, error, worst):
    """Centroids [first, last) move to their weighted mean (fp64). Written for each of them:

    reach   an upper bound on the distance of its vectors to its new place
    error   weighted squared distance of its vectors to its old place
    worst   the vector with the largest part of that error, −1 without vectors
    """
    dim = x.shape[1]
    total = np.empty(dim)
    for k in range(first, last):
        total[:] = 0
        mass, cost, top, far = 0.0, 0.0, np.float32(-1), np.float32(0)
        worst[k] = -1
        for t in range(starts[k], starts[k + 1]):
            i = order[t]
            share = w[i] if len(w) else np.float32(1)
            mass += share
            for j in range(dim):
                total[j] += np.float64(share) * x[i, j]
            value = dist[i] * share
            cost += value
            far = max(far, dist[i])
            if value > top:
                top = value
                worst[k] = i
        moved = 0.0
        if mass > 0:
            for j in range(dim):
                value = np.float32(total[j] / mass)
                moved += (np.float64(value) - c[k, j]) ** 2
                c[k, j] = value
        error[k] = cost
        reach[k] = (np.sqrt(far) + np.float32(np.sqrt(moved))) * MARGIN


@njit(nogil=True)
def measure_reach(order, starts, dist, reach):
    """Writes the reach of centroids that have not moved since `dist` was written."""
    for k in range(len(reach)):
        far = np.float32(0)
        for t in range(starts[k], starts[k + 1]):
            far = max(far, dist[order[t]])
        reach[k] = np.sqrt(far) * MARGIN


@njit(nogil=True)
def bound_blocks(c, bounds, low, high):
    dim = c.shape[1]
    for b in range(len(bounds) - 1):
        for j in range(dim):
            smallest, largest = np.float32(np.inf), np.float32(-np.inf)
            for k in range(bounds[b], bounds[b + 1]):
                value = c[k, j]
                smallest, largest = min(smallest, value), max(largest, value)
            low[j, b], high[j, b] = smallest, largest


@njit(nogil=True)
def restore_codes(source, code, names, codes):
    """Codes in the order of the given vectors, in terms of the given centroids."""
    for i in range(len(code)):
        codes[source[i]] = names[code[i]]


@njit(nogil=True)
def exact_objective(x, w, c, code):
    """Weighted squared distance in fp64."""
    total = 0.0
    for i in range(len(x)):
        distance = 0.0
        for j in range(x.shape[1]):
            distance += (np.float64(x[i, j]) - c[code[i], j]) ** 2
        total += distance * (w[i] if len(w) else np.float32(1))
    return total
