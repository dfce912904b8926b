"""First centroids placed by density, which saves Lloyd iterations and, above all, bad local minima.

Random vectors place centroids with density p where the vectors have density p; the squared error, with weights w, is
least with (w p)^(d / (d + 2)) (Zador 1982; Panter & Dite 1951 for d = 1). So a random start has too many centroids in
the middle of the distribution, the more so the smaller d is, and too few where weights are large; Lloyd's algorithm
does not move them that far. A codebook of random vectors measures the density: a vector's squared distance e to the
nearest of them is about p^(−2 / d). So vectors that are picked in proportion to

    (w e)^(d / (d + 2)),      for p · (w p^(−2 / d))^(d / (d + 2)) = (w p)^(d / (d + 2)),

have the density that is wanted.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .lloyd import assign

__all__ = ["density_shares", "density_start"]

# (vectors, centroids) → nearest centroid [N] int64, squared distance to it [N] fp32
Search = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

_MEASURING = 2  # random vectors that measure the density, for each centroid
_CANDIDATES = (16, 64)  # for each centroid at least, and as long as there are few
_MANY = 1 << 18  # candidates from which the least number is enough
_EVEN = 1 / 32  # of the picks goes to all vectors alike, so that equal vectors, whose distance is 0, get a centroid


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
        search (`Callable`): `lloyd.assign` or what an engine has instead.

    Returns:
        [n, d] fp32.
    """
    generator = torch.Generator().manual_seed(seed)
    dim = vectors.shape[1]
    places = _candidates(len(vectors), num_clusters, weights, generator)
    candidates = vectors[places.to(vectors.device)].float()
    # Scores keep their digits only near 0.
    centred = candidates - candidates.double().mean(0).float()
    measuring = torch.randperm(len(places), generator=generator)
    measuring = measuring[: max(1, min(_MEASURING * num_clusters, len(places) // 2))].to(centred.device)
    error = search(centred, centred[measuring].contiguous())[1].double().clamp_min(0)
    if weights is not None:
        error = error * weights[places.to(weights.device)]
    rates = error.cpu() ** (dim / (dim + 2))
    rates = (1 - _EVEN) * rates / rates.sum().clamp_min(1e-300) + _EVEN / len(rates)
    return candidates[_systematic_sample(rates, num_clusters, generator).to(candidates.device)]


def _candidates(
    total: int, num_clusters: int, weights: torch.Tensor | None, generator: torch.Generator
) -> torch.Tensor:
    """Places of the vectors to pick from, ascending: a random part, of those with a weight above 0 if they suffice."""
    pool = None
    if weights is not None:
        pool = weights.cpu().nonzero()[:, 0]
        pool = None if len(pool) < num_clusters or len(pool) == total else pool
    size = total if pool is None else len(pool)
    wanted = max(_CANDIDATES[0] * num_clusters, min(_CANDIDATES[1] * num_clusters, _MANY))
    if 2 * wanted < size:
        places = torch.randint(size, (wanted,), generator=generator).unique()
    else:
        places = torch.arange(size)
    return places if pool is None else pool[places]


def _systematic_sample(rates: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` different places, each with a probability in proportion to its rate, [rates] fp64 > 0, but at most 1."""
    shares = rates * (count / rates.sum())
    while bool((shares > 1).any()):
        full = shares >= 1
        rest = torch.where(full, 0.0, rates)
        shares = torch.where(full, 1.0, rest * ((count - int(full.sum())) / rest.sum().clamp_min(1e-300)))
    marks = torch.arange(count) + torch.rand(1, generator=generator, dtype=torch.float64)
    found = torch.searchsorted(shares.cumsum(0), marks, right=True)
    # No interval of at most 1 holds two marks, but for rounding.
    numbers = torch.arange(count)
    found = (found - numbers).cummax(0).values + numbers
    return torch.minimum(found, numbers + len(rates) - count)


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
