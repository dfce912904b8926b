"""Nearest centroids for a few vectors at a time, the codebook staying the same: what error feedback asks for.

Large codebooks on a CPU are cut into some √n cells of neighbouring centroids; of most cells the triangle inequality
says that they hold nothing nearer than what is known already. Everything else is one product with the codebook.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from .engines import can_compile, give_up

__all__ = ["Nearest"]

_LARGE = 1024  # centroids from which cells pay
_CELLS = 4  # times √n
_PRODUCTS = 1 << 24  # numbers of one product
_PART = 64  # vectors below which a thread of their own does not pay


class Nearest:
    """Callable: codes [N] int64 of vectors [N, d] fp32 among `centroids` [n, d] fp32, exact.

    Args:
        centroids (`torch.Tensor`): [n, d] fp32.
        threads (`int`, *optional*): Of the search on a CPU.
    """

    def __init__(self, centroids: torch.Tensor, threads: int | None = None) -> None:
        self.centroids, self.dim = centroids, centroids.shape[1]
        self._threads = threads or torch.get_num_threads()
        self._cells: tuple[np.ndarray, ...] = ()
        if centroids.device.type == "cpu" and len(centroids) >= _LARGE and can_compile("cpu"):
            self._cells = _cells(centroids)

    def __call__(self, vectors: torch.Tensor) -> torch.Tensor:
        if self._cells and can_compile("cpu"):
            try:
                return self._probe(vectors)
            except MemoryError:
                raise
            except Exception as error:
                give_up("cpu", error)
        rows = max(1, _PRODUCTS // len(self.centroids))
        half, transposed = self._plain
        parts = [torch.addmm(half, part, transposed, alpha=-1).argmin(1) for part in vectors.split(rows)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @functools.cached_property
    def _plain(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.centroids.square().sum(1).mul(0.5), self.centroids.t().contiguous()

    def _probe(self, vectors: torch.Tensor) -> torch.Tensor:
        from .probe import probe_cells

        probe: Any = probe_cells  # what numba makes of it has no signature
        x, codes = vectors.contiguous().numpy(), np.empty(len(vectors), np.int64)
        size = max(_PART, -(-len(x) // self._threads))
        parts = [slice(first, first + size) for first in range(0, len(x), size)]
        if len(parts) <= 1:
            probe(x, *self._cells, codes)
        else:
            with ThreadPoolExecutor(len(parts)) as pool:
                list(pool.map(lambda part: probe(x[part], *self._cells, codes[part]), parts))
        return torch.from_numpy(codes)


def _cells(centroids: torch.Tensor) -> tuple[np.ndarray, ...]:
    """Arguments of `probe_cells`: centers, radii, bounds, places and names."""
    from . import kmeans

    distinct = len(torch.unique(centroids, dim=0))
    cells = max(2, min(round(_CELLS * len(centroids) ** 0.5), distinct // 2))
    centers, codes, _ = kmeans(centroids, cells, quality="fast")
    order = torch.argsort(codes, stable=True)
    counts = torch.bincount(codes, minlength=len(centers))
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    away = (centroids - centers[codes]).square().sum(1).sqrt()
    radii = torch.zeros(len(centers)).scatter_reduce_(0, codes, away, "amax")
    parts = (centers.t().contiguous(), radii, bounds, centroids[order].t().contiguous(), order)
    return tuple(part.numpy() for part in parts)
