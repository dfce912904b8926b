"""The compiled loop of `search`: channel after channel gets its nearest centroids, and later targets are shifted.

Groups do not influence each other. So a chunk of groups passes through all channels of a block in a buffer of its own,
which fits the second-level cache, and results do not depend on the number of threads:

    for channel i                               target [g, lanes] in SIMD registers
        codes[i]  ← nearest centroids           among all (few), by bisection (g = 1) or by a tree of boxes (many)
        e         ← pivot − new centroids       [g, lanes]
        target[k] += coupling[i, k] · e         for the channels k > i

All coordinates are relative to one of the centroids near their mean, so that fp32 keeps its digits.
"""

from __future__ import annotations

import numpy as np

from ..jit import njit
from .cells import MARGIN
from .scan import lanes, scan

__all__ = ["BISECTION", "FAN", "LEAF", "SCAN", "TREE", "sweep_groups"]

BISECTION, SCAN, TREE = 0, 1, 2  # ways to search
LEAF = 32  # centroids of a leaf of the tree
FAN = 16  # leaves of a branch


@njit(nogil=True)
def _search_by_bisection(points, count, values, first, found):
    """values [n] ascend and are distinct; first [n] is the lowest code of a centroid with that value."""
    n = len(values)
    for t in range(count):
        x, low, width = points[t], 0, n
        while width > 1:
            half = width // 2
            low = low + half if values[low + half] <= x else low
            width -= half
        # The nearer of the neighbours on either side; of two at the same distance, the one with the lower code.
        best = low
        if low + 1 < n:
            left, right = abs(x - values[low]), abs(values[low + 1] - x)
            if right < left or (right == left and first[low + 1] < first[low]):
                best = low + 1
        found[t] = first[best]


@njit(nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _search_tree(points, size, count, dim, leaves, names, leaf_of, low, high, branch_low, branch_high, known, found):
    """leaves [L, dim, LEAF], unfilled places infinite, and the codes of their centroids, names [L, LEAF]; corners of
    the boxes of leaves, low / high [B, dim, FAN], and of branches, branch_low / branch_high [dim, B]; known [count]:
    the previous codes, in whose leaves the search begins."""
    branches = branch_low.shape[1]
    near = np.empty(LEAF, np.float32)
    gaps, inner = np.empty(branches, np.float32), np.empty(FAN, np.float32)
    for t in range(count):
        home = leaf_of[known[t]]
        best, code = np.float32(np.inf), np.int64(known[t])
        gaps[:] = 0
        for j in range(dim):
            x = points[j * size + t]
            for b in range(branches):
                gap = max(max(branch_low[j, b] - x, x - branch_high[j, b]), np.float32(0))
                gaps[b] += gap * gap
        for b in range(-1, branches):
            if b >= 0:
                if gaps[b] > best * MARGIN:
                    continue
                inner[:] = 0
                for j in range(dim):
                    x = points[j * size + t]
                    for q in range(FAN):
                        gap = max(max(low[b, j, q] - x, x - high[b, j, q]), np.float32(0))
                        inner[q] += gap * gap
            for q in range(FAN if b >= 0 else 1):
                leaf = b * FAN + q if b >= 0 else home
                if b >= 0 and (inner[q] > best * MARGIN or leaf == home):
                    continue
                near[:] = 0
                for j in range(dim):
                    x = points[j * size + t]
                    for p in range(LEAF):
                        step = x - leaves[leaf, j, p]
                        near[p] += step * step
                least = near[0]
                for p in range(1, LEAF):
                    least = min(least, near[p])
                if least <= best:
                    for p in range(LEAF):
                        if near[p] == least and (least < best or names[leaf, p] < code):
                            best, code = least, names[leaf, p]
        found[t] = code


@njit(nogil=True, fastmath={"contract"})
def sweep_groups(
    way, targets, coupling, known, error_feedback, out, centroids, origin, tables, first, last, codes, errors
):
    """Writes codes and errors of the groups [first, last) of one block of channels.

    targets [channels, groups · g] fp32, coupling [channels, channels] fp32, known [channels, groups] int64; centroids
    [n, g] relative to origin [g]; tables: what `search` made for `way`; out: columns from there on are padding, and
    their errors are 0. With error_feedback the pivot of a vector is its target, otherwise the centroid of its known
    code.
    """
    channels, dim = len(targets), centroids.shape[1]
    rows, values, names_of, leaves, names, leaf_of, low, high, branch_low, branch_high = tables
    size = lanes(dim)
    local = np.empty((channels, dim * size), np.float32)
    error = np.empty(dim * size, np.float32)
    best, index, found = np.empty(size, np.float32), np.empty(size, np.int32), np.empty(size, np.int64)
    for start in range(first, last, size):
        count = min(size, last - start)
        for i in range(channels):
            for t in range(size):
                for j in range(dim):
                    column = (start + t) * dim + j
                    local[i, j * size + t] = targets[i, column] - origin[j] if t < count else np.float32(0)
        for i in range(channels):
            if way == BISECTION:
                _search_by_bisection(local[i], count, values, names_of, found)
            elif way == SCAN:
                best[:] = np.inf
                index[:] = 0
                scan(
                    local.ctypes.data + 4 * i * dim * size,
                    rows.ctypes.data,
                    len(rows),
                    dim,
                    best.ctypes.data,
                    index.ctypes.data,
                )
                for t in range(count):
                    found[t] = index[t]
            else:
                _search_tree(
                    local[i], size, count, dim, leaves, names, leaf_of, low, high, branch_low, branch_high,
                    known[i, start : start + count], found,
                )  # fmt: skip
            error[:] = 0
            for t in range(count):
                code = found[t]
                codes[i, start + t] = code
                for j in range(dim):
                    column = (start + t) * dim + j
                    pivot = local[i, j * size + t] if error_feedback else centroids[known[i, start + t], j]
                    value = pivot - centroids[code, j] if column < out else np.float32(0)
                    error[j * size + t] = value
                    errors[i, column] = value
            for k in range(i + 1, channels):
                factor, row = coupling[i, k], local[k]
                for p in range(dim * size):
                    row[p] += factor * error[p]
