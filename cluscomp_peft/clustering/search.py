"""Search for the nearest centroids in a fixed codebook, channel after channel, as error feedback needs it.

On a CPU one compiled loop does the whole sweep over the channels (`sweep`); threads share the groups. It compares with
every centroid where they are few, bisects where centroids are single numbers, and otherwise searches a tree:

    build     Centroids are halved along their widest side into leaves of 32 neighbours, each with a bounding box;
              16 leaves form a branch.
    search    The centroids in the leaf of the vector's previous code give a first bound on the distance. Then come the
              leaves whose boxes are nearer than the bound, which shrinks with every nearer centroid.

All three are exact. On other devices, and without numba, one matrix product with the codebook serves each channel.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from .engines import can_compile, give_up

__all__ = ["CentroidSearch"]

_FEW = 2048  # centroids up to which looking at all of them is fastest
_FEW_NUMBERS = 256  # the same for d = 1, where the alternative is bisection
_MOST_DIM = 16  # the largest dimension of a compiled search
_PRODUCTS = 1 << 24  # scores of one matrix product at most
_PART = 64  # groups that a thread gets at least: fewer do not repay its start


class CentroidSearch:
    """Exact search for the nearest of `centroids`; of several at the same distance, the one with the lowest code.

    Args:
        centroids (`torch.Tensor`): [n, d] fp32.
        threads (`int`, *optional*): Threads of the search on a CPU; PyTorch's number by default.
    """

    def __init__(self, centroids: torch.Tensor, threads: int | None = None) -> None:
        self.centroids, self.dim = centroids, centroids.shape[1]
        self._threads = threads or torch.get_num_threads()

    def __call__(self, vectors: torch.Tensor) -> torch.Tensor:
        """Codes [N] int64 of vectors [N, d] fp32."""
        targets = vectors.reshape(1, -1)
        known = torch.zeros(1, len(vectors), dtype=torch.int64, device=vectors.device)
        return self.sweep(targets, torch.zeros(1, 1, device=vectors.device), known, True, targets.shape[1])[0][0]

    def sweep(
        self,
        targets: torch.Tensor,
        coupling: torch.Tensor,
        known: torch.Tensor,
        error_feedback: bool,
        out_features: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gives channel after channel the centroids nearest to its targets, and shifts the targets of the later ones.

        After channel i has its centroids, coupling[i, k] · e_i is added to the targets of each channel k > i. In error
        feedback e_i is the quantisation error: the targets less the new centroids. In coordinate descent it is the
        change: the previous centroids less the new ones.

        Args:
            targets (`torch.Tensor`): [channels, groups · d] fp32; may be overwritten.
            coupling (`torch.Tensor`): [channels, channels] fp32; only the part above the diagonal is read.
            known (`torch.Tensor`): [channels, groups] int64, the previous codes, near which the search
                begins.
            error_feedback (`bool`): Whether e_i is the quantisation error; else it is the change since `known`.
            out_features (`int`): Columns from this one on are padding, and their errors are 0.

        Returns:
            Codes [channels, groups] int64 and errors e [channels, groups · d] fp32.
        """
        compiled = targets.device.type == "cpu" and self.dim <= _MOST_DIM
        if compiled and can_compile("cpu"):
            try:
                return self._compiled(targets, coupling, known, error_feedback, out_features)
            except MemoryError:
                raise
            except Exception as error:
                give_up("cpu", error)
        return self._plain(targets, coupling, known, error_feedback, out_features)

    def _plain(
        self,
        targets: torch.Tensor,
        coupling: torch.Tensor,
        known: torch.Tensor,
        error_feedback: bool,
        out_features: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        codes, errors = torch.empty_like(known), torch.empty_like(targets)
        half, transposed = self._product
        rows = max(1, _PRODUCTS // len(self.centroids))
        for i in range(len(targets)):
            parts = targets[i].view(-1, self.dim).split(rows)
            codes[i] = torch.cat([torch.addmm(half, part, transposed, alpha=-1).argmin(1) for part in parts])
            pivot = targets[i] if error_feedback else self.centroids[known[i]].flatten()
            errors[i] = pivot - self.centroids[codes[i]].flatten()
            errors[i, out_features:] = 0
            targets[i + 1 :] += torch.outer(coupling[i, i + 1 :], errors[i])
        return codes, errors

    @functools.cached_property
    def _product(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.centroids.square().sum(1).mul(0.5), self.centroids.t().contiguous()

    def _compiled(
        self,
        targets: torch.Tensor,
        coupling: torch.Tensor,
        known: torch.Tensor,
        error_feedback: bool,
        out_features: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from .sweep import sweep_groups

        run: Any = sweep_groups  # what numba makes of it has no signature
        groups = known.shape[1]
        codes, errors = torch.empty_like(known), torch.empty_like(targets)
        given = [part.contiguous().numpy() for part in (targets, coupling, known)]
        way, *tables = self._tables

        def work(first: int, last: int) -> None:
            run(way, *given, error_feedback, out_features, *tables, first, last, codes.numpy(), errors.numpy())

        size = max(_PART, -(-groups // (self._threads * _PART)) * _PART)
        parts = [(first, min(first + size, groups)) for first in range(0, groups, size)]
        if len(parts) == 1:
            work(*parts[0])
        elif parts:
            with ThreadPoolExecutor(len(parts)) as pool:
                list(pool.map(lambda part: work(*part), parts))
        return codes, errors

    @functools.cached_property
    def _tables(self) -> tuple[int, np.ndarray, np.ndarray, tuple[np.ndarray, ...]]:
        """What `sweep_groups` takes: the way to search, the centroids relative to an origin, the origin, and tables of
        each way, empty for those not used."""
        from .cells import rows_for_scan
        from .sweep import BISECTION, SCAN, TREE

        given = self.centroids.numpy()
        # The origin is one of the centroids, so that differences of numbers on a grid stay exact.
        origin = given[np.square(given - given.mean(0, dtype=np.float64)).sum(1).argmin()]
        centroids = given - origin
        n, dim = centroids.shape
        rows, values, names = np.zeros((0, dim + 1), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64)
        tree = _tree(centroids[:0])
        if dim == 1 and n > _FEW_NUMBERS:
            way = BISECTION
            values, names = np.unique(centroids[:, 0], return_index=True)
        elif n <= _FEW:
            way, rows = SCAN, np.empty((n, dim + 1), np.float32)
            rows_for_scan(centroids, np.zeros(dim, np.float32), rows)
        else:
            way, tree = TREE, _tree(centroids)
        return way, centroids, origin, (rows, values, names, *tree)


def _tree(centroids: np.ndarray) -> tuple[np.ndarray, ...]:
    """Leaves [L, d, LEAF], the codes of their centroids [L, LEAF], the leaf of each centroid [n], and the lower and
    upper corners of the boxes of leaves [branches, d, FAN] and of branches [d, branches]. Unfilled places of a leaf
    are infinitely far away."""
    from .sweep import FAN, LEAF

    n, dim = centroids.shape
    count = -(-n // LEAF)
    branches = -(-count // FAN)
    order = np.arange(n)
    parts = [(0, count)] if n else []
    while parts:
        a, b = parts.pop()
        own = order[a * LEAF : min(b * LEAF, n)]
        if b - a == 1:
            continue
        middle = (b - a) // 2
        if middle > FAN:
            middle = middle // FAN * FAN
        elif b - a > FAN:
            middle = FAN
        side = int(np.ptp(centroids[own], axis=0).argmax())
        own[:] = own[np.argpartition(centroids[own, side], min(middle * LEAF, len(own) - 1))]
        parts += [(a, a + middle), (a + middle, b)]
    places = np.full((branches * FAN * LEAF, dim), np.inf, np.float32)
    places[:n] = centroids[order]
    names = np.full(len(places), np.iinfo(np.int32).max, np.int32)
    names[:n] = order
    leaf_of = np.empty(n, np.int64)
    leaf_of[order] = np.arange(n) // LEAF
    leaves = places.reshape(-1, LEAF, dim)
    # A box of unfilled places alone is empty, and infinitely far away as well.
    low = leaves.min(1, initial=np.inf)
    high = np.where(np.isinf(leaves), -np.inf, leaves).max(1, initial=-np.inf)
    low, high = low.reshape(-1, FAN, dim), high.reshape(-1, FAN, dim)
    return (
        np.ascontiguousarray(leaves.transpose(0, 2, 1)),
        names.reshape(-1, LEAF),
        leaf_of,
        np.ascontiguousarray(low.transpose(0, 2, 1)),
        np.ascontiguousarray(high.transpose(0, 2, 1)),
        np.ascontiguousarray(low.min(1, initial=np.inf).T),
        np.ascontiguousarray(high.max(1, initial=-np.inf).T),
    )
