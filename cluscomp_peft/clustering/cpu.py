"""The CPU engine: Lloyd's algorithm that searches for each vector from the centroid it had before.

    start      Vectors picked by their density (`start`); a tree over them finds the nearest for each vector. Where
               centroids are many, or vectors few, that takes long or leaves twice the error: there a tree of small
               clusterings cuts the vectors into cells, and each cell gets centroids by the same law.
    iterate    Vectors are sorted by centroid, centroids move to the weighted means, and vectors to the nearest
               centroid. That search is exact for d ≤ 4; above, it compares with lists of near centroids.
    finish     For d ≤ 6 the last assignment is exact.

The steps are compiled (`cells`, `assignment`, `scan`). The work is cut into the same sums whichever thread does it, so
the bytes of the result do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import numpy as np
import torch

from . import assignment, cells
from .lloyd import iterate
from .sorted_vectors import CHUNK, SortedVectors, even_ranges, fans, mix
from .start import density_start

__all__ = ["assign", "lloyd_cells"]

_PICKED, _EACH = 8192, 16  # centroids at most, and vectors for each at least, of a start from picked vectors
_LOCAL = 10  # iterations inside a leaf: ten of them take less time than one over all centroids, and save three
_EXACT_ITERATIONS = 4  # up to this dimension pruning makes exact iterations cheaper than lists
_EXACT_RESULT = 6  # up to this dimension the last assignment is exact
_RESORT = (1, 3, 8, 20, 50)  # iterations after which the vectors themselves are sorted by code again
_LIST = 256  # centroids of a list at most
_FEW = 4  # vectors per centroid up to which lists are not worth it
_CONVERGED = 1e-3  # the wide passes at the end stop when one lowers the objective by a smaller share


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
        if start is None and num_clusters <= _PICKED and len(vectors) >= _EACH * num_clusters:
            start = density_start(vectors, num_clusters, weights, seed, partial(assign, threads=threads))
        job.start_by_tree(num_clusters, seed) if start is None else job.start_from(start, seed)
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

    Exact up to d = 6. Above, vectors move along lists of near centroids until few still move; on weights the sum of
    the distances is then less than 0.5 % above the exact one (`recipes/benchmarks/kmeans_speed.py` measures it).
    """
    with _Clustering(vectors, None, threads) as job:
        job.start_from(centroids, seed)
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

    def start_by_tree(self, clusters: int, seed: int) -> None:
        """Clusters each cell of a tree: writes centroids and blocks, and gives vectors the nearest of their cell."""
        nodes = [(0, self.total, clusters)]
        for level, fan in enumerate(fans(clusters, self.dim)):
            nodes, _ = self.split(nodes, fan, seed, level)
        shares = [share for _, _, share in nodes]
        self.bounds = np.concatenate([[0], np.cumsum(shares)]).astype(np.int64)
        self.c = np.zeros((clusters, self.dim), np.float32)

        def cluster_leaf(leaf: int) -> None:
            a, b, share = nodes[leaf]
            places, w = self.c[self.bounds[leaf] : self.bounds[leaf + 1]], self.weights_of(a, b)
            if share == b - a:
                places[:] = self.x[a:b]
            else:
                cells.split_cell(self.x[a:b], w, places, b - a, _LOCAL, mix(seed, 97, leaf))
            error = np.zeros(share)
            cells.scan_cells(self.x[a:b], w, places, self.bounds[leaf], self.code[a:b], self.dist[a:b], error)

        self.each(cluster_leaf, [(leaf,) for leaf in range(len(nodes))])
        self.resort()

    def start_from(self, centroids: torch.Tensor, seed: int) -> None:
        """Starts from given centroids [n, d]: a tree over them makes the blocks; each vector descends to a leaf."""
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
            # Each moves onto the vector with the largest error of one of the centroids with the largest errors.
            donors = np.argsort(-self.error, kind="stable")[: len(empty)]
            donors = donors[self.error[donors] > 0]
            self.c[empty[: len(donors)]] = self.x[worst[donors]]

    def _measure_blocks(self) -> None:
        """Computes the bounding boxes of the blocks, and the rows for `collect`, from the present centroids."""
        blocks = len(self.bounds) - 1
        self.low, self.high = np.empty((self.dim, blocks), np.float32), np.empty((self.dim, blocks), np.float32)
        cells.bound_blocks(self.c, self.bounds, self.low, self.high)
        self.origin = self.c.mean(0, dtype=np.float64).astype(np.float32)
        self.rows = np.empty((len(self.c), self.dim + 1), np.float32)
        assignment.rows_for_collect(self.c, self.origin, self.rows)

    def assign(self, factor: float, slack: float = 0.0) -> None:
        """An assignment by bounds; with `slack` > 0 it also writes the lists that `assign_listed` uses."""
        clusters = len(self.c)
        self.lists = np.empty((clusters, _LIST if slack > 0 else 0), np.uint16)
        self.lengths = np.zeros(clusters, np.int32)
        self._measure_blocks()
        self.each(
            lambda a, b: assignment.assign(
                self.x, self.order, self.starts, self.c, self.origin, self.rows, self.reach, self.bounds, self.low,
                self.high, factor, slack, a, b, self.code, self.dist, self.lists, self.lengths,
            ),
            even_ranges(len(self.bounds) - 1, 16 * self.threads),
        )  # fmt: skip
        self.sort(len(self.c))

    def assign_listed(self, wide: bool) -> None:
        """An assignment by lists; a wide one also searches the lists of the listed centroids, and writes new lists."""
        lists, lengths = (
            (np.empty_like(self.lists), np.zeros_like(self.lengths)) if wide else (self.lists, self.lengths)
        )
        self.each(
            lambda a, b: assignment.assign_listed(
                self.x, self.order, self.starts, self.c, self.lists, self.lengths, wide, _slack(self.dim), a, b,
                self.code, self.dist, lists, lengths,
            ),
            even_ranges(len(self.c), 16 * self.threads),
        )  # fmt: skip
        self.lists, self.lengths = lists, lengths
        self.sort(len(self.c))

    def objective(self) -> float:
        """The objective of the last assignment, from its distances."""
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
        """The last assignment, to the present centroids, which do not move any more."""
        exact = self.dim <= _EXACT_RESULT
        if not exact and self.total <= _FEW * len(self.c):
            # Lists are made from the vectors of a centroid. Where it has few, vectors are compared with all centroids.
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
            if previous - objective <= _CONVERGED * objective:
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
        del self.order, self.lists, self.dist  # the memory is needed for the codes
        places = np.empty_like(self.c)
        places[slice(None) if self.names is None else self.names] = self.c
        return torch.from_numpy(places / self.scale), self.codes(), sum(errors) / float(self.scale) ** 2, done


def _first_factor(dim: int) -> float:
    """How far from its home the nearest centroid of a vector is looked for when lists are first written, in units of
    the vector's distance to its home. Wide passes find the nearest centroids beyond."""
    return max(1.25, 1.85 - 0.05 * dim)


def _slack(dim: int) -> float:
    """A list holds the centroids within 1 + slack times the least squared distance of some vector of the home. In more
    dimensions distances differ less: at d = 16, 0.2 takes 0.7 of the time of 0.3, and the objective is 0.01 % higher.
    """
    return 0.3 if dim <= 12 else 0.2
