"""The CUDA engine: Lloyd's algorithm on Triton kernels that never write an N × n matrix.

    assign     A program holds a chunk of vectors and reads tiles of 32 centroids. Each slot (vector, column of the
               tile) keeps its least score |c|² − 2 v·c and the tile of that score; the 32 columns are reduced once, at
               the end. Coordinates are relative to a vector of the chunk, so that fp32 keeps its digits far from 0.
               Chunks whose vectors lie too far apart for that go to a second launch, which sums squared differences.
    prune      Vectors are sorted by (code, distance), and centroids by repeated halving along their widest axis. No
               nearer centroid can be in a tile if the gap between its bounding box and that of the chunk exceeds the
               largest distance of a vector of the chunk to its present centroid: such tiles are skipped. The same
               holds for words, which are 32 tiles. On LLM-like weights 0.7 % of the tiles remain at d = 4, 5 % at 6,
               31 % at 8, and nearly all from 12 on (simulated, n = 65,500).
    update     In that order the vectors of a centroid lie side by side. One program per centroid sums them in fp64.

Loops over dimensions are unrolled up to d = 11. Above, `tl.dot` padded to 16 dimensions needs fewer instructions per
score (26 against 32 at d = 16, compiled for sm_90); its precision "ieee" is fp32. A vector moves only to a centroid
whose distance, recomputed from differences, is smaller, so that rounding in the scores cannot raise the objective.
Nothing depends on the order in which programs run: the same seed gives the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import pad

from .gpu_kernels import MAX_SPELLED, find_nearest, keep_nearer, launch_shape, sum_members, triton
from .start import density_start

__all__ = ["MAX_DIM", "Clustering", "available", "lloyd_triton", "lloyd_triton_batched"]

MAX_DIM = 16
_TILE = 32  # centroids of a tile, and tiles of a word: the bits of a mask
_LEAST = 4  # the first codes come from passes over ever more centroids; the coarsest has at least so many,
_FINER = 8  # and each pass has so many times as many as the one before
_MEMBERS = 128  # vectors of a centroid that are summed at once
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def available(device_type: str) -> bool:
    """Whether this engine can work on such a device: a CUDA one, or any if TRITON_INTERPRET=1 was set."""
    return triton is not None and (_INTERPRETED or (device_type == "cuda" and torch.version.cuda is not None))


def lloyd_triton(
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
    """Clusters fp32 vectors [N, d] on a CUDA device, d up to 16; see `cluscomp_peft.clustering.kmeans`.

    Args:
        start (`torch.Tensor`, *optional*): [n, d], first centroids; density start without.
        threads (`int`): Not used.

    Returns:
        centroids [n, d] fp32, codes [N] int64, the objective, and the iterations done.

    Raises:
        ValueError: If this engine cannot run there, or d is above 16.
    """
    weights, start = (None if given is None else given[None] for given in (weights, start))
    centroids, codes, objectives, done = lloyd_triton_batched(
        vectors[None], num_clusters, weights, start, iterations, tolerance, seed, threads, progress
    )
    return centroids[0], codes[0], objectives[0], done[0]


def lloyd_triton_batched(
    vectors: torch.Tensor,
    num_clusters: int,
    weights: torch.Tensor | None,
    start: torch.Tensor | None,
    iterations: int,
    tolerance: float,
    seed: int,
    threads: int,
    progress: Callable[[int, float], None] | None,
) -> tuple[torch.Tensor, torch.Tensor, list[float], list[int]]:
    """Clusters B matrices of one shape in common launches, each as `lloyd_triton` would, to the same bytes.

    Args:
        vectors (`torch.Tensor`): [B, N, d] fp32; weights [B, N] and start [B, n, d] accordingly.
        progress (`Callable`, *optional*): Called with (iteration, sum of the objectives).

    Returns:
        centroids [B, n, d] fp32, codes [B, N] int64, objectives and iterations done of each.
    """
    batch, _, dim = vectors.shape
    if not available(vectors.device.type):
        raise ValueError(
            f"the CUDA engine needs Triton and vectors on a CUDA device, got {vectors.device}"
            f"{'' if triton is not None else ' and no Triton (pip install triton)'}; use engine='torch'."
        )
    if dim > MAX_DIM:
        raise ValueError(f"the CUDA engine takes up to {MAX_DIM} dimensions, got {dim}; use engine='torch'.")
    with torch.cuda.device_of(vectors):  # Triton launches on the current device
        if start is None:
            parts = zip(vectors, [None] * batch if weights is None else weights, strict=True)
            start = torch.stack([density_start(part, num_clusters, share, seed, _assign) for part, share in parts])
        job = Clustering(vectors, weights, start)
        job.locate()
        objectives, done = job.objectives(), [0] * batch
        results: list[Any] = [None if iterations > 0 else job.result(b) for b in range(batch)]
        for iteration in range(1, iterations + 1):
            job.update()
            job.assign()
            for b, objective in enumerate(job.objectives()):
                if results[b] is not None:
                    continue
                converged = iteration > 1 and objectives[b] - objective <= tolerance * objectives[b]
                objectives[b], done[b] = objective, iteration
                if converged or iteration == iterations:
                    results[b] = job.result(b)  # from here on it is computed along with the others, in vain
            if progress is not None:
                progress(iteration, sum(objectives))
            if all(result is not None for result in results):
                break
    return torch.stack([r[0] for r in results]), torch.stack([r[1] for r in results]), objectives, done


def _assign(vectors: torch.Tensor, centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `lloyd.assign`, but without a matrix of scores: writing and reading 1,024 scores per vector takes longer
    than computing them."""
    job = Clustering(vectors[None], None, centroids[None])
    job.locate()
    return job.result(0)[1], job.distances


class Clustering:
    """Vectors [B, N, d] with optional weights [B, N], centroids [B, n, d], and the code of each vector.

    The B matrices are stored one behind another: vectors [B · N, d], codes [B · N] int32 and squared distances
    [B · N] fp32. `names` [B, n] holds the index that each centroid had when it was given.
    """

    def __init__(self, vectors: torch.Tensor, weights: torch.Tensor | None, centroids: torch.Tensor) -> None:
        self.batch, self.total, self.dim = vectors.shape
        self.clusters = centroids.shape[1]
        self.vectors = vectors.reshape(-1, self.dim).contiguous()
        self.weights = None if weights is None else weights.reshape(-1).contiguous()
        self.centroids = centroids
        device = vectors.device
        self.codes = torch.zeros(self.batch * self.total, dtype=torch.int32, device=device)
        self.distances = torch.zeros(self.batch * self.total, device=device)
        self.order = torch.arange(self.batch * self.total, device=device)
        self.names = torch.arange(self.clusters, device=device).expand(self.batch, -1)
        self.updates = 0

    def locate(self) -> None:
        """First codes: the nearest among few centroids, then among 8 times as many, and so on up to all of them."""
        self.arrange()
        self.codes.zero_()
        stride = 1
        while self.clusters // (stride * _FINER) >= _LEAST:
            stride *= _FINER
        while True:
            self.assign(self.centroids[:, ::stride])
            if stride == 1:
                return
            stride //= _FINER
            self.codes *= _FINER
            self.sort()

    def arrange(self) -> None:
        """Renumbers the centroids so that neighbours in space have neighbouring codes."""
        order = _spatial_order(self.centroids)
        self.centroids = self.centroids.gather(1, order[:, :, None].expand(-1, -1, self.dim))
        self.names = self.names.gather(1, order)
        numbers = order.argsort(1).to(torch.int32)
        for b, codes in enumerate(self.codes.view(self.batch, -1)):
            codes.copy_(numbers[b].index_select(0, codes))

    def sort(self) -> None:
        """order: vectors by (code, distance); starts: where those of each code begin, and the end."""
        firsts = torch.arange(0, self.batch * self.clusters, self.clusters, device=self.codes.device)
        # The upper half of a positive fp32 number, 15 bits, orders it to within 1 %.
        narrow = self.batch * self.clusters <= 1 << 16
        codes = self.codes.view(self.batch, -1) + firsts[:, None].to(torch.int32)
        keys = codes.view(-1).to(torch.int32 if narrow else torch.int64) << 15
        keys, self.order = (keys | (self.distances.view(torch.int32) >> 16)).sort(stable=True)
        codes = torch.arange(self.batch * self.clusters, dtype=keys.dtype, device=keys.device)
        self.starts = pad(torch.searchsorted(keys, codes << 15), (0, 1), value=len(keys))

    def update(self) -> None:
        """Moves centroids to the weighted means of their vectors, and those without vectors to the vectors with the
        largest weighted distances."""
        self.sort()
        self.updates += 1
        count, device = self.batch * self.clusters, self.vectors.device
        sums = torch.empty(count, self.dim, dtype=torch.float64, device=device)
        mass = torch.empty(count, 1, dtype=torch.float64, device=device)
        weights = self.vectors if self.weights is None else self.weights
        weighted, padded = self.weights is not None, triton.next_power_of_2(self.dim)
        sum_members[(count,)](
            self.vectors, weights, self.order, self.starts, sums, mass, self.dim, padded, _MEMBERS, weighted
        )
        old = self.centroids.view(count, self.dim)
        means = torch.where(mass > 0, sums / mass, old.double()).float().view_as(self.centroids)
        empty = (self.starts.diff() == 0).view(self.batch, -1)
        repaired = bool(empty.any())
        if repaired:
            cost = self.distances if self.weights is None else self.distances * self.weights
            vectors = self.vectors.view(self.batch, -1, self.dim)
            for b, costs in enumerate(cost.view(self.batch, -1)):
                places = torch.nonzero(empty[b])[:, 0]
                worst = costs.topk(min(len(places), len(costs))).indices
                means[b, places[: len(worst)]] = vectors[b, worst]
        self.centroids = means
        if repaired or self.updates & (self.updates - 1) == 0:  # centroids move ever less
            self.arrange()

    def assign(self, centroids: torch.Tensor | None = None, prune: bool = True, precision: str = "ieee") -> None:
        """Writes the code of the nearest of `centroids` (by default all) for each vector, and the distance to it."""
        centroids = self.centroids if centroids is None else centroids
        clusters = centroids.shape[1]
        unused = -clusters % _TILE**3
        places = pad(centroids.transpose(1, 2), (0, unused)).contiguous()
        boxes = []
        for bound, corner in ((float("inf"), torch.amin), (-float("inf"), torch.amax)):
            edges = pad(centroids.transpose(1, 2), (0, unused), value=bound)
            for _ in range(2):
                edges = corner(edges.reshape(self.batch, self.dim, -1, _TILE), 3)
                boxes.append(edges.contiguous())
        rows, registers = launch_shape(self.dim)
        options = {} if _INTERPRETED else {"maxnreg": registers}
        grid = (triton.cdiv(self.total, rows), self.batch)
        found = torch.empty_like(self.codes)
        spread = torch.empty(grid, dtype=torch.int8, device=found.device)
        for of_differences in (False, True):
            if of_differences and not bool(spread.any()):
                break
            find_nearest[grid](
                self.vectors, self.order, self.codes, found, spread, places, *boxes, self.total, clusters,
                places.shape[2], self.dim, rows, _TILE, prune, of_differences, self.dim > MAX_SPELLED, precision,
                num_warps=4, **options,
            )  # fmt: skip
        keep_nearer[(triton.cdiv(self.total, 256), self.batch)](
            self.vectors, self.order, self.codes, self.distances, found, places, self.total, places.shape[2],
            self.dim, 256,
        )  # fmt: skip

    def objectives(self) -> list[float]:
        cost = self.distances if self.weights is None else self.distances * self.weights
        return torch.stack([row.sum(dtype=torch.float64) for row in cost.view(self.batch, -1)]).tolist()

    def result(self, b: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Centroids and codes of matrix b, numbered as they were given."""
        centroids = torch.empty_like(self.centroids[b])
        centroids[self.names[b]] = self.centroids[b]
        return centroids, self.names[b].index_select(0, self.codes.view(self.batch, -1)[b])


def _spatial_order(centroids: torch.Tensor) -> torch.Tensor:
    """[B, n]: centroids [B, n, d] such that every aligned run of 32, 64, 128 … is half of a cell, cut in the middle of
    its widest axis."""
    batch, clusters, dim = centroids.shape
    size = max(_TILE, triton.next_power_of_2(clusters))
    points = pad(centroids, (0, 0, 0, size - clusters), value=float("inf"))  # which always comes last
    order = torch.arange(size, device=centroids.device).repeat(batch, 1)
    while size > _TILE:
        points, order = points.view(-1, size, dim), order.view(-1, size)
        spread = torch.where(torch.isinf(points), -float("inf"), points).amax(1) - points.amin(1)
        axis = spread.argmax(1)[:, None, None].expand(-1, size, 1)
        rank = points.gather(2, axis).argsort(dim=1, stable=True)
        points, order = points.gather(1, rank.expand(-1, -1, dim)), order.gather(1, rank[:, :, 0])
        size //= 2
    return order.view(batch, -1)[:, :clusters]
