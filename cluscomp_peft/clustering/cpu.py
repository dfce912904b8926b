"""The CPU engine: Lloyd's algorithm whose vectors remember where they were served.

    start      a tree of small clusterings places centroids in proportion to SSE^(d / (d + 2)) of each cell, the share
               that minimises the total error at high rate (Zador 1982; Panter & Dite 1951 for d = 1); random vectors,
               the usual start, crowd where the data are dense and lose 7 to 20 % at d = 4
    iterate    vectors sorted by centroid → weighted means → nearest centroid, exact for d ≤ 4, from lists above
    finish     for d ≤ 6 the last assignment is exact

The steps are compiled (`cells`, `nearest`, `scan`). Every vector, centroid and sum has one owner, whichever
thread works on it, so the bytes of the result do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch

from . import cells, nearest
from .lloyd import iterate
from .sorted_vectors import CHUNK, SortedVectors, even_ranges, fans, mix

__all__ = ["assign", "lloyd_cells"]

_LOCAL = 10  # iterations inside a leaf, against few centroids: ten cost less than one of the whole, and save three
_EXACT_ITERATIONS = 4  # up to this dimension pruning makes exact iterations cheaper than lists
_EXACT_RESULT = 6
_RESORT = (1, 3, 8, 20, 50)
_LIST = 256
_FEW = 4  # vectors for each centroid
_SETTLED = 1e-3  # wide passes at the end stop when one lowers the objective by less


def lloyd_cells(
    vectors: torch.Tensor,
    num_clusters: int,
    weights: torch.Tensor | None,
    start: torch.Tensor | None,
    iterations: int,
    tolerance: float,
    seed: int,
    threads: int,
    progress: Callable[[int, float], None] | None,
) -> tuple[torch.Tensor, torch.Tensor, float, int]:
    """Clusters fp32 vectors [N, d] on the CPU, d up to 16, n up to 65,536; see `cluscomp_peft.clustering.kmeans`.

    Args:
        start (`torch.Tensor`, *optional*): [n, d], first centroids; density start without.

    Returns:
        centroids [n, d] fp32, codes [N] int64, the objective, and the iterations done.
    """
    with _Clustering(vectors, weights, threads) as job:
        job.plant(num_clusters, seed) if start is None else job.adopt(start, seed)
        exact = job.dim <= _EXACT_ITERATIONS

        def step(iteration: int) -> float:
            job.update()
            if exact:
                job.assign(2.0)
            elif iteration == 1:
                job.assign(_first_factor(job.dim), _slack(job.dim))
            else:
                job.assign_listed(wide=iteration % 4 == 2)
            if iteration in _RESORT:
                job.resort()
            return job.objective()

        done = iterate(step, iterations, tolerance, progress)
        if not (exact and done):
            job.finish()
        return job.result(done)


def assign(
    vectors: torch.Tensor, centroids: torch.Tensor, seed: int = 0, threads: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest of the centroids [n, d] for each vector [N, d]: codes [N] int64 and squared distances [N] fp32.

    Exact up to d = 6. Above, vectors descend along lists of neighbours until few move; what that loses was below
    0.3 % of the summed distance on weights (`recipes/benchmarks/kmeans_speed.py` measures it).
    """
    with _Clustering(vectors, None, threads) as job:
        job.adopt(centroids, seed)
        job.finish()
        return job.codes(), job.distances()


class _Clustering(SortedVectors):
    """The state of one run; the arrays have the names of `cells`."""

    def __init__(self, vectors: torch.Tensor, weights: torch.Tensor | None, threads: int) -> None:
        super().__init__(vectors, weights, threads)
        self.names: np.ndarray | None = None
        self.lists: np.ndarray | None = None

    def resort(self) -> None:
        self.gather(len(self.c))
        for first in range(0, self.total, CHUNK):
            last = min(first + CHUNK, self.total)
            self.order[first:last] = np.arange(first, last)

    # Starting

    def plant(self, clusters: int, seed: int) -> None:
        """The density start: centroids, blocks, and every vector at the nearest centroid of its leaf."""
        nodes = [(0, self.total, clusters)]
        for level, fan in enumerate(fans(clusters, self.dim)):
            nodes, _ = self.split(nodes, fan, seed, level)
        shares = [share for _, _, share in nodes]
        self.bounds = np.concatenate([[0], np.cumsum(shares)]).astype(np.int64)
        self.c = np.zeros((clusters, self.dim), np.float32)

        def settle(leaf: int) -> None:
            a, b, share = nodes[leaf]
            places, w = self.c[self.bounds[leaf] : self.bounds[leaf + 1]], self.weights_of(a, b)
            if share == b - a:
                places[:] = self.x[a:b]
            else:
                cells.split_cell(self.x[a:b], w, places, b - a, _LOCAL, mix(seed, 97, leaf))
            error = np.zeros(share)
            cells.scan_cells(self.x[a:b], w, places, self.bounds[leaf], self.code[a:b], self.dist[a:b], error)

        self.each(settle, [(leaf,) for leaf in range(len(nodes))])
        self.resort()

    def adopt(self, centroids: torch.Tensor, seed: int) -> None:
        """Given centroids: a tree over them makes blocks, and each vector descends to a leaf."""
        places = centroids.numpy() * self.scale
        with SortedVectors(torch.from_numpy(places), None, 1) as tree:
            nodes, levels = [(0, len(places), len(places))], []
            for level, fan in enumerate(fans(len(places), self.dim)):
                nodes, cuts = tree.split(nodes, fan, seed, level)
                levels.append(cuts)
        self.c, self.names = tree.x, tree.source
        self.bounds = np.array([a for a, _, _ in nodes] + [len(places)], np.int64)
        ranges = [(0, self.total)]
        for centers, offsets in levels:
            self.assign_within(ranges, centers, offsets)
            self.gather(int(offsets[-1]))
            ranges = list(pairwise(self.starts.tolist()))
        self.assign_within(ranges, self.c, self.bounds)
        self.resort()

    # Iterating

    def update(self) -> None:
        clusters = len(self.c)
        self.reach, self.error = np.zeros(clusters, np.float32), np.zeros(clusters)
        worst = np.empty(clusters, np.int64)
        self.each(
            lambda a, b: cells.update_centroids(
                self.x, self.w, self.order, self.starts, self.dist, a, b, self.c, self.reach, self.error, worst
            ),
            even_ranges(clusters, 8 * self.threads),
        )
        empty = np.flatnonzero(np.diff(self.starts) == 0)
        if len(empty):
            # Each goes to the worst served vector of one of the worst served centroids.
            donors = np.argsort(-self.error, kind="stable")[: len(empty)]
            donors = donors[self.error[donors] > 0]
            self.c[empty[: len(donors)]] = self.x[worst[donors]]

    def _bound(self) -> None:
        """Boxes of the blocks, and rows of all centroids, for the places where they are now."""
        blocks = len(self.bounds) - 1
        self.low, self.high = np.empty((self.dim, blocks), np.float32), np.empty((self.dim, blocks), np.float32)
        cells.bound_blocks(self.c, self.bounds, self.low, self.high)
        self.origin = self.c.mean(0, dtype=np.float64).astype(np.float32)
        self.rows = np.empty((len(self.c), self.dim + 1), np.float32)
        nearest.collectable(self.c, self.origin, self.rows)

    def assign(self, factor: float, slack: float = 0.0) -> None:
        """A full assignment; with `slack` it also writes the lists that `assign_listed` goes by."""
        clusters = len(self.c)
        self.lists = np.empty((clusters, _LIST if slack > 0 else 0), np.uint16)
        self.lengths = np.zeros(clusters, np.int32)
        self._bound()
        self.each(
            lambda a, b: nearest.assign(
                self.x, self.order, self.starts, self.c, self.origin, self.rows, self.reach, self.bounds, self.low,
                self.high, factor, slack, a, b, self.code, self.dist, self.lists, self.lengths,
            ),
            even_ranges(len(self.bounds) - 1, 16 * self.threads),
        )  # fmt: skip
        self.sort(len(self.c))

    def assign_listed(self, wide: bool) -> None:
        """An assignment by lists; a wide one also follows the lists of the listed, and renews them."""
        lists, lengths = (
            (np.empty_like(self.lists), np.zeros_like(self.lengths)) if wide else (self.lists, self.lengths)
        )
        self.each(
            lambda a, b: nearest.assign_listed(
                self.x, self.order, self.starts, self.c, self.lists, self.lengths, wide, _slack(self.dim), a, b,
                self.code, self.dist, lists, lengths,
            ),
            even_ranges(len(self.c), 16 * self.threads),
        )  # fmt: skip
        self.lists, self.lengths = lists, lengths
        self.sort(len(self.c))

    def objective(self) -> float:
        """Of the last assignment, from its distances."""
        parts = self.each(
            lambda a, b: (
                float(self.dist[a:b].astype(np.float64) @ self.w[a:b].astype(np.float64))
                if len(self.w)
                else float(self.dist[a:b].sum(dtype=np.float64))
            ),
            [(a, min(a + CHUNK, self.total)) for a in range(0, self.total, CHUNK)],
        )
        return sum(parts) / float(self.scale) ** 2

    def finish(self) -> None:
        """The last assignment, to the centroids as they are."""
        exact = self.dim <= _EXACT_RESULT
        if not exact and self.total <= _FEW * len(self.c):
            # Lists come from the vectors of a home; where there are hardly any, all centroids are looked at.
            self.assign_within([(0, self.total)], self.c, np.array([0, len(self.c)]))
            self.sort(len(self.c))
            return
        if exact or self.lists is None:
            self.reach = np.zeros(len(self.c), np.float32)
            cells.measure_reach(self.order, self.starts, self.dist, self.reach)
            self.assign(*((2.0,) if exact else (_first_factor(self.dim), _slack(self.dim))))
        previous = self.objective()
        while not exact:
            self.assign_listed(wide=True)
            objective = self.objective()
            if previous - objective <= _SETTLED * objective:
                break
            previous = objective

    # Results

    def codes(self) -> torch.Tensor:
        names = np.arange(len(self.c), dtype=np.int32) if self.names is None else self.names
        codes = np.empty(self.total, np.int64)
        self.each(
            lambda a, b: cells.restore_codes(self.source[a:b], self.code[a:b], names, codes),
            even_ranges(self.total, 8 * self.threads),
        )
        return torch.from_numpy(codes)

    def distances(self) -> torch.Tensor:
        distances = np.empty(self.total, np.float32)
        distances[self.source] = self.dist
        return torch.from_numpy((distances / np.float64(self.scale) ** 2).astype(np.float32))

    def result(self, done: int) -> tuple[torch.Tensor, torch.Tensor, float, int]:
        tasks = [(a, min(a + CHUNK, self.total)) for a in range(0, self.total, CHUNK)]
        errors = self.each(
            lambda a, b: cells.exact_objective(self.x[a:b], self.weights_of(a, b), self.c, self.code[a:b]), tasks
        )
        del self.order, self.lists, self.dist  # codes take their place
        places = np.empty_like(self.c)
        places[slice(None) if self.names is None else self.names] = self.c
        return torch.from_numpy(places / self.scale), self.codes(), sum(errors) / float(self.scale) ** 2, done


def _first_factor(dim: int) -> float:
    """How far the first lists look, as a factor of the distance of a vector to its home; wide passes mend the rest."""
    return max(1.25, 1.85 - 0.05 * dim)


def _slack(dim: int) -> float:
    """Lists hold what came within 1 + slack times the least squared distance of some vector of the home. Distances
    vary less in more dimensions: at d = 16, 0.2 takes 0.7 of the time of 0.3 and ends 0.01 % higher."""
    return 0.3 if dim <= 12 else 0.2
