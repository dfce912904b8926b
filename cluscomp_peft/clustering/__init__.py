"""K-means: one entry point, [`kmeans`], over interchangeable engines.

An engine takes fp32 vectors [N, d], start centroids [n, d], optional weights [N], the iterations and the tolerance,
and returns centroids, codes, objective and the iterations done (see `lloyd.lloyd`, the plain one).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .lloyd import lloyd

__all__ = ["KMeansInfo", "kmeans"]

_ENGINES = {"torch": lloyd}
_INITS = ("random",)


@dataclass(frozen=True)
class KMeansInfo:
    """What a run did: weighted sum of squared distances, iterations, engine, seconds."""

    objective: float
    iterations: int
    engine: str
    seconds: float


def kmeans(
    vectors: torch.Tensor,
    num_clusters: int,
    *,
    weights: torch.Tensor | None = None,
    iterations: int = 25,
    tolerance: float = 1e-4,
    seed: int = 0,
    init: str = "random",
    engine: str = "auto",
    progress: Callable[[int, float], None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, KMeansInfo]:
    """Clusters vectors so that the weighted squared distance to their centroid is small.

    Args:
        vectors (`torch.Tensor`): [N, d], fp32, fp16 or bf16, on any device; all work is done there.
        num_clusters (`int`): n, 2 … N. With n = N every vector is its own centroid and nothing is lost.
        weights (`torch.Tensor`, *optional*): [N], how much the error of each vector counts; at least 0, not all 0.
        iterations (`int`): At most so many Lloyd iterations.
        tolerance (`float`): Stop when an iteration lowers the objective by less than this share.
        seed (`int`): Same seed, engine and machine give the same bytes.
        init (`str`): "random": distinct random vectors are the first centroids.
        engine (`str`): "torch", or "auto" for the fastest one there is.
        progress (`Callable`, *optional*): Called with (iteration, objective).

    Returns:
        codebook [n, d] fp32, codes [N] int64, and a [`KMeansInfo`].

    Raises:
        ValueError: If shapes or numbers do not fit, or a value is NaN or infinite.
    """
    if vectors.ndim != 2 or not vectors.is_floating_point() or not len(vectors) or not vectors.shape[1]:
        raise ValueError(
            f"vectors must be a floating-point tensor [N, d] with N, d > 0, got {vectors.dtype} "
            f"{tuple(vectors.shape)}."
        )
    total = len(vectors)
    if not 2 <= num_clusters <= total:
        raise ValueError(
            f"num_clusters must be between 2 and the {total} vectors to be clustered, got {num_clusters}."
        )
    if iterations < 0:
        raise ValueError(f"iterations must not be negative, got {iterations}.")
    if init not in _INITS:
        raise ValueError(f"init must be one of {', '.join(_INITS)}, got {init!r}.")
    if engine != "auto" and engine not in _ENGINES:
        raise ValueError(f"engine must be one of auto, {', '.join(_ENGINES)}, got {engine!r}.")
    engine = "torch" if engine == "auto" else engine
    vectors = vectors.detach().float().contiguous()
    if not torch.isfinite(vectors).all():
        raise ValueError("vectors contain NaN or infinite values; they cannot be clustered.")
    if weights is not None:
        weights = weights.detach().to(vectors.device, torch.float32)
        if weights.shape != (total,):
            raise ValueError(f"weights must have shape ({total},), got {tuple(weights.shape)}.")
        if not torch.isfinite(weights).all() or bool((weights < 0).any()) or not bool((weights > 0).any()):
            raise ValueError("weights must be finite, not negative, and not all 0.")

    started = time.perf_counter()
    if num_clusters == total:
        codes = torch.arange(total, device=vectors.device)
        return vectors.clone(), codes, KMeansInfo(0.0, 0, engine, time.perf_counter() - started)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randperm(total, generator=generator)[:num_clusters].to(vectors.device)
    centroids, codes, objective, done = _ENGINES[engine](
        vectors, vectors[start], weights, iterations, tolerance, progress
    )
    return centroids, codes, KMeansInfo(objective, done, engine, time.perf_counter() - started)
