"""First centroids placed by density, which saves most Lloyd iterations.

Random vectors place centroids with density p where the vectors have density p; the mean squared error is least with
p^(d / (d + 2)) (Zador 1982; Panter & Dite 1951 for d = 1). So a random start has too many centroids in the middle of
the distribution, the more so the smaller d is.
Of a cell with N_i vectors in a volume V_i, k_i centroids leave an error of about SSE_i · k_i^(−2 / d), where
SSE_i ~ N_i · V_i^(2 / d) is the error that one centroid leaves; the sum over cells is least for

    k_i ∝ SSE_i^(d / (d + 2))

So a sample is clustered coarsely, all vectors are assigned to the cells, and k_i random vectors of each cell become
centroids.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .lloyd import assign

__all__ = ["density_shares", "density_start"]

# (vectors, centroids) → nearest centroid [N] int64, squared distance to it [N] fp32
Search = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

_PER_CELL = 32  # centroids of a coarse cell, on average
_MAX_CELLS = 1024
_SAMPLE = 256  # vectors of the sample for each cell
_ITERATIONS = 4
_CHUNK = 1 << 24  # vectors centred at once


def density_start(
    vectors: torch.Tensor, num_clusters: int, weights: torch.Tensor | None, seed: int, search: Search = assign
) -> torch.Tensor:
    """Picks distinct vectors, spread with the density that leaves the least squared error.

    Args:
        vectors (`torch.Tensor`): [N, d] fp32, finite.
        num_clusters (`int`): n, 1 … N.
        weights (`torch.Tensor`, *optional*): [N] fp32, at least 0. A vector of weight 0 is only picked if fewer than n
            others exist.
        seed (`int`): Same seed, device and machine give the same bytes.
        search (`Callable`): Finds the coarse cell of every vector; `lloyd.assign` or what an engine has instead.

    Returns:
        [n, d] fp32, the vectors of a cell side by side.
    """
    dim = vectors.shape[1]
    generator = torch.Generator().manual_seed(seed)
    wanted = max(1, min(_MAX_CELLS, num_clusters // _PER_CELL))
    cell, error = _coarse_cells(vectors, wanted, weights, generator, search)
    if weights is not None:
        usable = weights > 0
        if int(usable.sum()) >= num_clusters:
            cell = torch.where(usable, cell, wanted)  # an extra cell, which gets no centroids
            error = error * weights
    cell, order = cell.to(torch.int16).sort(stable=True)
    counts = torch.bincount(cell, minlength=wanted)
    errors = torch.segment_reduce(error[order].double(), "sum", lengths=counts, unsafe=True)[:wanted].cpu()
    first = (counts.cumsum(0) - counts)[:wanted].cpu()
    counts = counts[:wanted].cpu()
    shares = density_shares(errors, counts, num_clusters, dim)
    # Centroid j of a cell is drawn from the j-th of `share` equal parts of its vectors: distinct without a shuffle.
    owner = torch.repeat_interleave(shares)
    rank = torch.arange(num_clusters) - (shares.cumsum(0) - shares)[owner]
    begin = rank * counts[owner] // shares[owner]
    end = (rank + 1) * counts[owner] // shares[owner]
    draw = torch.rand(num_clusters, generator=generator, dtype=torch.float64)
    places = first[owner] + begin + ((end - begin) * draw).long()
    return vectors[order[places.to(vectors.device)]].float()


def _coarse_cells(
    vectors: torch.Tensor, wanted: int, weights: torch.Tensor | None, generator: torch.Generator, search: Search
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cell of each vector [N] and its squared distance to the middle of that cell [N] fp32."""
    total = len(vectors)
    if total <= _SAMPLE * wanted:
        picked = torch.randperm(total, generator=generator)
    else:
        picked = torch.randint(total, (_SAMPLE * wanted,), generator=generator).unique()
        picked = picked[torch.randperm(len(picked), generator=generator)]
    picked = picked.to(vectors.device)
    sample = vectors[picked]
    # Scores keep their digits only near 0.
    middle = sample.double().mean(0).float()
    sample = sample - middle
    share = torch.ones_like(sample[:, 0]) if weights is None else weights[picked]
    centroids = sample[:wanted].clone()
    for _ in range(_ITERATIONS):
        centroids = _means(sample, share, assign(sample, centroids)[0], centroids)
    cell = torch.empty(total, dtype=torch.int64, device=vectors.device)
    error = torch.empty(total, dtype=torch.float32, device=vectors.device)
    for begin in range(0, total, _CHUNK):
        part = slice(begin, begin + _CHUNK)
        cell[part], error[part] = search(vectors[part] - middle, centroids)
    return cell, error


def _means(vectors: torch.Tensor, weights: torch.Tensor, codes: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Weighted means; a cell without weight stays. Sums go by segments: `index_add_` on CUDA has no fixed order."""
    codes, order = codes.sort(stable=True)
    lengths = torch.bincount(codes, minlength=len(centroids))
    share = weights[order].double()[:, None]
    parts = torch.cat([vectors[order].double() * share, share], 1)
    sums = torch.segment_reduce(parts, "sum", lengths=lengths, unsafe=True)
    return torch.where(sums[:, -1:] > 0, sums[:, :-1] / sums[:, -1:], centroids.double()).float()


def density_shares(errors: torch.Tensor, counts: torch.Tensor, wanted: int, dim: int) -> torch.Tensor:
    """Centroids of each cell [cells] int64, proportional to errors^(d / (d + 2)) within 1 … counts (0 if empty).

    `errors` [cells] fp64 and `counts` [cells] int64 are on the CPU; the shares sum to `wanted` ≤ sum of counts.
    """
    rates = errors.clamp(min=0) ** (dim / (dim + 2))
    # A tiny part in proportion to the number of vectors decides where all errors are 0, and distributes what is left
    # when cells have as many centroids as vectors.
    rates = rates / rates.sum().clamp(min=1e-300) + 1e-9 * counts / counts.sum()
    least, most = (counts > 0).double(), counts.double()
    low, high = 0.0, float((most / rates.clamp(min=1e-300)).max())
    for _ in range(120):
        factor = (low + high) / 2
        if float((rates * factor).clamp(least, most).sum()) > wanted:
            high = factor
        else:
            low = factor
    exact = (rates * low).clamp(least, most)
    shares = exact.long()
    # Centroids left over by rounding down go to the cells with the largest remainders.
    remainders = torch.where(shares < counts, exact - shares, -1.0)
    shares[remainders.argsort(descending=True, stable=True)[: wanted - int(shares.sum())]] += 1
    return shares
