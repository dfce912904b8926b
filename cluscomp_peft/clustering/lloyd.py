"""Weighted Lloyd K-means in plain torch: exact, seeded, on any device. The engine that others are measured against.

Minimises Σ_j w_j · |v_j − c(code_j)|². An assignment step scores `|c|² − 2 v·c` for a chunk of vectors against all
centroids (one matmul); an update step takes weighted means in fp64. Both can only lower the objective, up to the
rounding of fp32 scores, which matters for vectors far from 0. A centroid that lost all its vectors moves onto the
vector with the largest error, which lowers the objective too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["assign", "iterate", "lloyd"]

_SCORES = 1 << 24  # scores of one chunk of vectors: 64 MiB
_WIDER = 8  # so many times as many on a GPU, which would finish 64 MiB before the next chunk is launched


def lloyd(
    vectors: torch.Tensor,
    num_clusters: int,
    weights: torch.Tensor | None,
    start: torch.Tensor,
    iterations: int,
    tolerance: float,
    seed: int,
    threads: int,
    progress: Callable[[int, float], None] | None,
) -> tuple[torch.Tensor, torch.Tensor, float, int]:
    """Runs Lloyd's algorithm on `vectors` [N, d], fp32, from the centroids `start` [n, d].

    Returns:
        centroids [n, d], codes [N] int64, the objective, and the iterations done.
    """
    centroids = start
    codes, distances = assign(vectors, centroids)

    def step(_: int) -> float:
        nonlocal centroids, codes, distances
        centroids = _update(vectors, centroids, codes, distances, weights)
        codes, distances = assign(vectors, centroids)
        return _objective(distances, weights)

    done = iterate(step, iterations, tolerance, progress)
    return centroids, codes, _objective(distances, weights), done


def iterate(
    step: Callable[[int], float], iterations: int, tolerance: float, progress: Callable[[int, float], None] | None
) -> int:
    """Calls step(1), step(2), … → objective until one gains less than a share of `tolerance`; returns how many."""
    previous, done = None, 0
    for done in range(1, iterations + 1):
        objective = step(done)
        if progress is not None:
            progress(done, objective)
        if previous is not None and previous - objective <= tolerance * previous:
            break
        previous = objective
    return done


def assign(vectors: torch.Tensor, centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest centroid of each vector [N] int64 and the squared distance to it [N] fp32."""
    norms = (centroids * centroids).sum(1)
    codes = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
    distances = torch.empty(len(vectors), dtype=torch.float32, device=vectors.device)
    scores = _SCORES if vectors.device.type == "cpu" else _WIDER * _SCORES
    chunk = max(1, scores // len(centroids))
    for start in range(0, len(vectors), chunk):
        part = vectors[start : start + chunk]
        codes[start : start + chunk] = torch.addmm(norms, part, centroids.t(), alpha=-2).argmin(1)
        # Scores lack |v|², and adding it loses digits: the distance is computed from the difference.
        difference = part - centroids[codes[start : start + chunk]]
        distances[start : start + chunk] = (difference * difference).sum(1)
    return codes, distances


def _update(
    vectors: torch.Tensor,
    centroids: torch.Tensor,
    codes: torch.Tensor,
    distances: torch.Tensor,
    weights: torch.Tensor | None,
) -> torch.Tensor:
    clusters, dim = centroids.shape
    sums = torch.zeros(clusters, dim, dtype=torch.float64, device=vectors.device)
    mass = torch.zeros(clusters, dtype=torch.float64, device=vectors.device)
    chunk = max(1, _SCORES // dim)
    for start in range(0, len(vectors), chunk):
        stop = start + chunk
        part = vectors[start:stop].double()
        share = torch.ones(len(part), dtype=torch.float64, device=part.device)
        if weights is not None:
            share = weights[start:stop].double()
            part = part * share[:, None]
        sums.index_add_(0, codes[start:stop], part)
        mass.index_add_(0, codes[start:stop], share)
    means = torch.where(mass[:, None] > 0, sums / mass[:, None], centroids.double()).float()
    empty = torch.nonzero(torch.bincount(codes, minlength=clusters) == 0)[:, 0]
    if len(empty):
        cost = distances if weights is None else distances * weights
        worst = torch.topk(cost, min(len(empty), len(cost))).indices
        means[empty[: len(worst)]] = vectors[worst]
    return means


def _objective(distances: torch.Tensor, weights: torch.Tensor | None) -> float:
    distances = distances.double()
    return float((distances if weights is None else distances * weights.double()).sum())
