"""K-means: one entry point, [`kmeans`], over interchangeable engines.

    scalar    d = 1: dynamic programming, or Lloyd on sorted values                                any device
    cpu       d ≤ 16, n ≤ 65,536: sorted vectors, pruned assignment, numba                        CPU
    cuda      fused assignment in Triton                                                          CUDA
    torch     plain Lloyd, against which the others are tested; used without numba or Triton    any device

Engines share one signature, (vectors [N, d] fp32, num_clusters, weights [N] or None, start centroids [n, d] or None,
iterations, tolerance, seed, threads, progress) → (centroids, codes, objective, iterations done). Without
a start, all but "torch" choose a density start themselves.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .engines import COMPILED, can_compile, give_up, installed
from .start import density_start

__all__ = ["QUALITIES", "KMeansInfo", "kmeans"]

# Iterations at most, and the share of the objective that one must gain for another to follow. From the twentieth on
# they gain 1 to 2 % in all; with many clusters, where one takes long, as much from the eighth on.
QUALITIES = {"fast": (3, 1e-2), "default": (20, 1e-3), "best": (60, 1e-4)}
_MANY, _MANY_CLUSTERS = 8192, (8, 2e-3)
ENGINES = ("scalar", "cpu", "cuda", "torch")
_INITS = ("density", "random")
_PLAIN_PAIRS = 1 << 22  # scores below which plain torch is done before numba is imported
_MAX_DIM, _MAX_CLUSTERS = 16, 1 << 16  # of the cpu engine


@dataclass(frozen=True)
class KMeansInfo:
    """What a run did: weighted sum of squared distances, iterations, engine, seconds, and which centroids no vector
    uses, [n] bool (more centroids than distinct vectors)."""

    objective: float
    iterations: int
    engine: str
    seconds: float
    unused: torch.Tensor = field(repr=False, compare=False)


def kmeans(
    vectors: torch.Tensor,
    num_clusters: int,
    *,
    weights: torch.Tensor | None = None,
    quality: str = "default",
    iterations: int | None = None,
    tolerance: float | None = None,
    seed: int = 0,
    init: str | torch.Tensor = "density",
    engine: str = "auto",
    threads: int | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, KMeansInfo]:
    """Clusters vectors so that the weighted squared distance to their centroid is small.

    Args:
        vectors (`torch.Tensor`): [N, d], fp32, fp16 or bf16, on any device; all work is done there.
        num_clusters (`int`): n, 2 … N. If there are no more than n distinct vectors, the error is 0, and the centroids
            that no vector uses are 0 and marked in `KMeansInfo.unused`.
        weights (`torch.Tensor`, *optional*): [N], how much the error of each vector counts; at least 0, not all 0.
        quality (`str`): "fast", "default" or "best": sets `iterations` and `tolerance` where they are not given.
        iterations (`int`, *optional*): At most so many Lloyd iterations.
        tolerance (`float`, *optional*): Stop when an iteration lowers the objective by less than this share.
        seed (`int`): Same seed, engine and machine give the same bytes, with any number of threads.
        init (`str` or `torch.Tensor`): "density" spreads the first centroids with the density of least error,
            "random" takes distinct random vectors; a tensor [n, d] is used as it is.
        engine (`str`): "scalar", "cpu", "cuda", "torch", or "auto" for the fastest one that can do it.
        threads (`int`, *optional*): Threads of the cpu engine; PyTorch's number by default.
        progress (`Callable`, *optional*): Called with (iteration, objective).

    Returns:
        codebook [n, d] fp32, codes [N] int64, and a [`KMeansInfo`].

    Raises:
        ValueError: If shapes or numbers do not fit, a value is NaN or infinite, or the engine cannot do it.
    """
    vectors, weights, start = _checked(vectors, num_clusters, weights, init)
    if quality not in QUALITIES:
        raise ValueError(f"quality must be one of {', '.join(QUALITIES)}, got {quality!r}.")
    preset = _MANY_CLUSTERS if quality == "default" and num_clusters > _MANY else QUALITIES[quality]
    iterations = preset[0] if iterations is None else iterations
    tolerance = preset[1] if tolerance is None else tolerance
    if iterations < 0:
        raise ValueError(f"iterations must not be negative, got {iterations}.")
    threads = torch.get_num_threads() if threads is None else threads
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}.")
    chosen = engine == "auto"  # then another engine may replace one that fails
    engine = _choose_engine(engine, vectors, num_clusters)

    started = time.perf_counter()
    exact = _lossless(vectors, num_clusters)
    if exact is not None:
        codebook, codes, objective, done = *exact, 0.0, 0
    else:
        if start is None and init == "random":
            generator = torch.Generator().manual_seed(seed)
            start = vectors[torch.randperm(len(vectors), generator=generator)[:num_clusters].to(vectors.device)]
        raised: list[BaseException] = []

        def told(done: int, objective: float) -> None:
            try:
                if progress is not None:
                    progress(done, objective)
            except BaseException as error:
                raised.append(error)
                raise

        given = (vectors, num_clusters, weights, start, iterations, tolerance, seed, threads, told)
        try:
            codebook, codes, objective, done = _run(engine, *given)
        except Exception as error:
            # A slower engine is no cure for a lack of memory, nor for an exception raised by `progress`.
            ended = raised or isinstance(error, (MemoryError, torch.OutOfMemoryError))
            if ended or not chosen or engine not in COMPILED:
                raise
            give_up(engine, error)
            engine = "torch"
            codebook, codes, objective, done = _run(engine, *given)
    unused = torch.bincount(codes, minlength=num_clusters) == 0
    return codebook, codes, KMeansInfo(objective, done, engine, time.perf_counter() - started, unused)


def _checked(
    vectors: torch.Tensor, num_clusters: int, weights: torch.Tensor | None, init: str | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Vectors, weights and start centroids in fp32, or a ValueError."""
    if vectors.ndim != 2 or not vectors.is_floating_point() or not len(vectors) or not vectors.shape[1]:
        raise ValueError(
            f"vectors must be a floating-point tensor [N, d] with N, d > 0, got {vectors.dtype} "
            f"{tuple(vectors.shape)}."
        )
    total, dim = vectors.shape
    if not 2 <= num_clusters <= total:
        raise ValueError(
            f"num_clusters must be between 2 and the {total} vectors to be clustered, got {num_clusters}."
        )
    vectors = vectors.detach().float().contiguous()
    if not torch.isfinite(vectors).all():
        raise ValueError("vectors contain NaN or infinite values; they cannot be clustered.")
    if weights is not None:
        weights = weights.detach().to(vectors.device, torch.float32)
        if weights.shape != (total,):
            raise ValueError(f"weights must have shape ({total},), got {tuple(weights.shape)}.")
        if not torch.isfinite(weights).all() or bool((weights < 0).any()) or not bool((weights > 0).any()):
            raise ValueError("weights must be finite, not negative, and not all 0.")
        weights = weights.contiguous()
    if isinstance(init, str):
        if init not in _INITS:
            raise ValueError(f"init must be one of {', '.join(_INITS)} or a tensor of centroids, got {init!r}.")
        return vectors, weights, None
    start = init.detach().to(vectors.device, torch.float32).contiguous()
    if start.shape != (num_clusters, dim) or not torch.isfinite(start).all():
        raise ValueError(
            f"init must hold ({num_clusters}, {dim}) finite values, got a tensor of shape {tuple(start.shape)}"
            f"{'' if torch.isfinite(start).all() else ' with NaN or infinite values'}."
        )
    return vectors, weights, start


def _choose_engine(engine: str, vectors: torch.Tensor, num_clusters: int) -> str:
    total, dim = vectors.shape
    device = vectors.device.type
    fits = dim <= _MAX_DIM and num_clusters <= _MAX_CLUSTERS
    if engine == "auto":
        if dim == 1:
            return "scalar"
        if device == "cuda" and fits and torch.version.cuda is not None and can_compile("cuda"):
            return "cuda"
        large = total * num_clusters > _PLAIN_PAIRS
        return "cpu" if device == "cpu" and fits and large and can_compile("cpu") else "torch"
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of auto, {', '.join(ENGINES)}, got {engine!r}.")
    if engine == "scalar" and dim != 1:
        raise ValueError(f"engine='scalar' clusters numbers, got vectors of dimension {dim}.")
    if engine in COMPILED:
        package = COMPILED[engine]
        if not fits:
            raise ValueError(
                f"engine={engine!r} takes up to {_MAX_DIM} dimensions and {_MAX_CLUSTERS} clusters, got {dim} and "
                f"{num_clusters}; use engine='torch'."
            )
        if not installed(package):
            raise ValueError(f"engine={engine!r} needs {package}: pip install {package}, or use engine='torch'.")
    if engine == "cpu" and device != "cpu":
        raise ValueError(f"engine='cpu' takes vectors on the CPU, got {vectors.device}.")
    return engine


def _run(
    engine: str,
    vectors: torch.Tensor,
    num_clusters: int,
    weights: torch.Tensor | None,
    start: torch.Tensor | None,
    iterations: int,
    tolerance: float,
    seed: int,
    threads: int,
    progress: Callable[[int, float], None],
) -> tuple[torch.Tensor, torch.Tensor, float, int]:
    """Runs an engine on vectors and weights scaled so that their squares stay within fp32. "scalar" computes in fp64
    and needs no scaling."""
    lengths, shares = (0, 0) if engine == "scalar" else (_exponent(vectors), _exponent(weights))
    unit = 2.0 ** (2 * lengths + shares)  # the factor by which the objective of the scaled problem is too small
    vectors, weights, start = _scaled(vectors, lengths), _scaled(weights, shares), _scaled(start, lengths)
    if start is None and engine == "torch":
        start = density_start(vectors, num_clusters, weights, seed)
    codebook, codes, objective, done = _engine(engine)(
        vectors, num_clusters, weights, start, iterations, tolerance, seed, threads,
        lambda step, error: progress(step, error * unit),
    )  # fmt: skip
    return _scaled(codebook, -lengths), codes, objective * unit, done


def _engine(engine: str) -> Callable:
    """The engine's function; numba and Triton are imported only by those who use them."""
    if engine == "scalar":
        from .scalar import lloyd_scalar

        return lloyd_scalar
    if engine == "cpu":
        from .cpu import lloyd_cells

        return lloyd_cells
    if engine == "cuda":
        from .gpu import lloyd_triton

        return lloyd_triton
    from .lloyd import lloyd

    return lloyd


def _exponent(values: torch.Tensor | None) -> int:
    """The exponent of the power of two by which values are divided: 0, unless sums of their squares, or products with
    weights, could leave the range of fp32."""
    if values is None:
        return 0
    exponent = int(torch.frexp(values.abs().max())[1])
    return 0 if abs(exponent) < 20 else max(-126, min(126, exponent))


def _scaled(values: Any, exponent: int) -> Any:
    """values / 2^exponent, which changes no digit; None stays None."""
    return values if values is None or exponent == 0 else values * 2.0**-exponent


def _lossless(vectors: torch.Tensor, num_clusters: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Codebook and codes without error, if there are no more distinct vectors than centroids."""
    if num_clusters == len(vectors):
        return vectors.clone(), torch.arange(len(vectors), device=vectors.device)
    # Equal vectors have equal hashes. So more than n distinct hashes of a sample prove more than n distinct vectors,
    # which is nearly always the case and quickly seen.
    step = max(1, len(vectors) // (2 * num_clusters))
    bits = (vectors[::step] + 0.0).view(torch.int32).long()
    factors = torch.tensor([(2 * j + 1) * 0x9E3779B97F4A7C15 % (1 << 62) for j in range(1, bits.shape[1] + 1)])
    if len(torch.unique((bits * factors.to(bits.device)).sum(1))) > num_clusters:
        return None
    distinct, codes = torch.unique(vectors + 0.0, dim=0, return_inverse=True)
    if len(distinct) > num_clusters:
        return None
    codebook = vectors.new_zeros(num_clusters, vectors.shape[1])
    codebook[: len(distinct)] = distinct
    return codebook, codes
