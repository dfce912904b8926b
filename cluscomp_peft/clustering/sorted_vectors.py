"""The vectors of the CPU engine, sorted by code, and the tree that cuts them into cells.

The work is cut into the same sums whichever thread does it, so the bytes of the result do not depend on the number of
threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, Self

import numpy as np
import torch

from . import cells
from .start import density_shares

__all__ = ["CHUNK", "SortedVectors", "even_ranges", "fans", "mix"]

_FAN = 64  # cells into which one node is split at most
_SAMPLE = 256  # vectors for each centroid of a split
CHUNK = 1 << 18  # vectors of one task; fixed, because the rounding of sums depends on it


class SortedVectors:
    """Vectors with their codes and weights; the arrays have the names of `cells`."""

    def __init__(self, vectors: torch.Tensor, weights: torch.Tensor | None, threads: int) -> None:
        x = vectors.numpy()
        # A power of two changes no digit, and keeps squares of tiny or huge vectors inside fp32.
        exponent = int(np.frexp(max(float(x.max()), -float(x.min())))[1])
        self.scale = np.float32(1) if abs(exponent) < 20 else np.float32(2.0) ** -np.clip(exponent, -126, 126)
        # These belong to the caller and are only read. `gather` fills x and w from them each time, so that there are
        # never more than two copies of the vectors.
        self.given = x if self.scale == 1 else x * self.scale
        self.given_weights = np.empty(0, np.float32) if weights is None else weights.numpy()
        self.x, self.w = self.given, self.given_weights
        self.total, self.dim = x.shape
        self.source = np.arange(self.total, dtype=np.int32)
        self.code = np.zeros(self.total, np.uint16)  # of at most 65,536 centroids
        self.dist = np.zeros(self.total, np.float32)
        self.order = np.empty(self.total, np.int32)
        self.threads = threads
        self.pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def each(self, step: Callable, tasks: Iterable[tuple]) -> list:
        """step(*task) for every task, on all threads; results in order."""
        if self.pool is None:
            return [step(*task) for task in tasks]
        return list(self.pool.map(lambda task: step(*task), tasks))

    # Sorting

    def _positions(self, clusters: int) -> tuple[list[tuple[int, int]], np.ndarray, np.ndarray]:
        """Ranges of vectors, the place in `order` of the first vector of each code in each range, and `starts`."""
        ranges = even_ranges(self.total, self.threads)
        counts = np.zeros((len(ranges), clusters), np.int64)
        self.each(cells.count_codes, [(self.code[a:b], counts[r]) for r, (a, b) in enumerate(ranges)])
        starts = np.zeros(clusters + 1, np.int64)
        np.cumsum(counts.sum(0), out=starts[1:])
        return ranges, starts[:-1] + np.cumsum(counts, 0) - counts, starts

    def sort(self, clusters: int) -> None:
        """Writes `order` and `starts` for the present codes."""
        ranges, position, self.starts = self._positions(clusters)
        self.each(cells.rank_codes, [(self.code[a:b], a, position[r], self.order) for r, (a, b) in enumerate(ranges)])

    def gather(self, clusters: int) -> None:
        """Moves the vectors themselves so that those of one code lie together and codes ascend."""
        self.sort(clusters)
        if self.x is self.given:
            self.x, self.w = np.empty_like(self.given), np.empty_like(self.given_weights)
        ranges = even_ranges(self.total, 8 * self.threads)
        for values in (self.source, self.code, self.dist):
            spare = self.x.reshape(-1).view(values.dtype)[: self.total]  # x is written anew below
            self.each(cells.gather_values, [(values, self.order[a:b], spare[a:b]) for a, b in ranges])
            values[:] = spare
        self.each(cells.gather_vectors, [(self.given, self.source[a:b], self.x[a:b]) for a, b in ranges])
        if len(self.w):
            self.each(cells.gather_values, [(self.given_weights, self.source[a:b], self.w[a:b]) for a, b in ranges])

    def assign_within(
        self, ranges: list[tuple[int, int]], centers: np.ndarray, offsets: np.ndarray
    ) -> list[np.ndarray]:
        """Writes the codes of the vectors of each range r, nearest among centers[offsets[r] : offsets[r + 1]].

        Returns the weighted squared error of each of these centers, one array fp64 for each range.
        """
        tasks, owners = [], []
        for r, (a, b) in enumerate(ranges):
            own = centers[offsets[r] : offsets[r + 1]]
            for first in range(a, b, CHUNK):
                last = min(first + CHUNK, b)
                error = np.zeros(len(own))
                owners.append((r, error))
                own_part = [part[first:last] for part in (self.x, self.code, self.dist)]
                tasks.append((own_part[0], self.weights_of(first, last), own, offsets[r], *own_part[1:], error))
        self.each(cells.scan_cells, tasks)
        totals = [np.zeros(offsets[r + 1] - offsets[r]) for r in range(len(ranges))]
        for r, error in owners:
            totals[r] += error
        return totals

    def split(
        self, nodes: list[tuple[int, int, int]], fan: int, seed: int, level: int
    ) -> tuple[list[tuple[int, int, int]], tuple[np.ndarray, np.ndarray]]:
        """Splits nodes (first, last, number of centroids) into at most `fan` cells each, and gathers the vectors by
        cell.

        Returns the cells that are not empty, as nodes for the next level, and (their centers, offsets by node).
        """
        parts = [max(1, min(fan, share // _leaf(self.dim) if level else fan, b - a)) for a, b, share in nodes]
        offsets = np.concatenate([[0], np.cumsum(parts)]).astype(np.int64)
        centers = np.zeros((offsets[-1], self.dim), np.float32)

        def split(node: int) -> None:
            a, b, _ = nodes[node]
            own = centers[offsets[node] : offsets[node + 1]]
            cells.split_cell(self.x[a:b], self.weights_of(a, b), own, _SAMPLE * len(own), 8, mix(seed, level, node))

        self.each(split, [(node,) for node in range(len(nodes))])
        errors = self.assign_within([(a, b) for a, b, _ in nodes], centers, offsets)
        self.gather(int(offsets[-1]))
        counts = np.diff(self.starts)
        cuts: list[tuple[int, int, int]] = []
        for node, (_, _, share) in enumerate(nodes):
            own = slice(offsets[node], offsets[node + 1])
            shares = density_shares(torch.from_numpy(errors[node]), torch.from_numpy(counts[own]), share, self.dim)
            cuts += zip(self.starts[:-1][own].tolist(), self.starts[1:][own].tolist(), shares.tolist(), strict=True)
        filled = counts > 0
        kept = np.concatenate([[0], np.cumsum(filled)])[offsets]
        return [cut for cut in cuts if cut[0] < cut[1]], (centers[filled], kept)

    def weights_of(self, first: int, last: int) -> np.ndarray:
        return self.w[first:last] if len(self.w) else self.w


def _leaf(dim: int) -> int:
    """Centroids of a leaf of the tree and of a block. Larger leaves give a better start, but bounding boxes of larger
    blocks exclude fewer centroids."""
    return 32 if dim <= 12 else 128


def even_ranges(total: int, parts: int) -> list[tuple[int, int]]:
    """[0, total) cut into `parts` ranges of nearly equal length, or into `total` ranges if that is fewer."""
    edges = np.linspace(0, total, max(1, min(parts, total)) + 1).astype(np.int64).tolist()
    return list(pairwise(edges))


def mix(*numbers: int) -> int:
    """One seed of 63 bits from several numbers."""
    value = 0
    for number in numbers:
        value = (value * 6364136223846793005 + number + 1442695040888963407) % (1 << 63)
    return value


def fans(clusters: int, dim: int) -> list[int]:
    """Into how many cells a node of each level of the tree is split."""
    leaves = clusters // _leaf(dim)
    if leaves <= 1:
        return []
    return [leaves] if leaves <= _FAN else [int(np.ceil(leaves**0.5))] * 2
