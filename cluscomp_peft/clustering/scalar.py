"""K-means of single numbers (d = 1), where sorting turns clusters into ranges and prefix sums make their errors cheap.

With prefix sums of w, w v and w v² over the sorted distinct values, any range [i, j) costs

    cost(i, j) = Σ w v² − (Σ w v)² / Σ w        about its weighted mean, in constant time

small   The global optimum by dynamic programming, F_k(j) = min_i F_{k−1}(i) + cost(i, j) (Ckmeans.1d.dp, Wang & Song
        2011). The best i grows with j and with k, so a layer is found by divide and conquer: at most M log M steps for
        M distinct values.
large   Lloyd's algorithm on the boundaries between centroids: an iteration takes n log M steps. It starts with the
        optimum of clusters that begin at some of the values only, 32 n of them, as dense as p^(1/3) (Panter & Dite
        1951), for alone it ends at a worse one nearby. Before each iteration, pairs of neighbouring centroids that
        cost little to merge are merged, and the freed centroid splits a cluster that gains more; moving the centroid
        of an empty cluster costs nothing.

Values are taken relative to their median and sums begin there, so that outliers do not cost the other values digits in
fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .engines import can_compile, give_up
from .lloyd import iterate

__all__ = ["lloyd_scalar"]

_MOST_STEPS = 3e7  # of dynamic programming: a tenth of a second, or three seconds where numba is missing
_PLACES, _FEWEST_PLACES = 32, 4  # for each cluster, where not all are tried
_BINS = 4096
_LIGHT = 1e-15  # values with a smaller share of the weight vanish in the rounding of sums
_TINY = 1e-300  # instead of 0 in a denominator


def lloyd_scalar(
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
    """Clusters fp32 vectors [N, 1] on any device; see `cluscomp_peft.clustering.kmeans`.

    Nothing here is random, and all but the search for codes is work of one thread: `seed` and `threads` change
    nothing. Where the global optimum is found, which counts as one iteration, `start` does not matter either.

    Returns:
        centroids [n, 1] fp32, codes [N] int64, the objective, and the iterations done. Centroids ascend; those that an
        exact result leaves unused are 0 at the end. With `iterations=0` a given start is returned as it is.
    """
    values, mass = _fold(vectors, weights)
    heavy = mass > _LIGHT * mass.sum()
    count, done = int(heavy.sum()), 0
    given = None if start is None else start[:, 0].cpu().numpy().astype(np.float64)
    optimal = False
    if given is not None and iterations == 0:
        centroids = given.astype(np.float32)
    elif num_clusters >= count:
        # Values of negligible weight get the centroids that the others leave.
        chosen = np.sort(values[np.argsort(~heavy, kind="stable")[:num_clusters]])
        centroids = np.zeros(num_clusters, np.float32)
        centroids[: len(chosen)] = chosen
    else:
        line = _Line(values[heavy], mass[heavy])
        optimal = iterations > 0 and line.is_small(num_clusters)
        if optimal:
            centroids, done = line.centroids(line.optimum(num_clusters, np.arange(count + 1))), 1
        else:
            start = line.start(num_clusters) if given is None else np.sort(given) - line.origin
            centroids, done = line.lloyd(start, iterations, tolerance, progress)

    order = np.argsort(centroids, kind="stable")
    bounds = _midpoints(centroids[order])
    served = centroids[order][np.searchsorted(bounds, values)].astype(np.float64)
    objective = float(mass @ (values - served) ** 2)
    if optimal and progress is not None:
        progress(done, objective)
    codes = torch.bucketize(vectors[:, 0], torch.from_numpy(bounds).to(vectors.device))
    codes = torch.from_numpy(order).to(vectors.device)[codes]
    return torch.from_numpy(centroids[:, None]).to(vectors.device), codes, objective, done


def _fold(vectors: torch.Tensor, weights: torch.Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """The distinct values, ascending, and the total weight of each, fp64."""
    values = vectors[:, 0].cpu().numpy()
    order = None if weights is None else np.argsort(values)
    values = np.sort(values) if order is None else values[order]
    heads = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
    if weights is None or order is None:
        mass = np.diff(heads, append=len(values)).astype(np.float64)
    else:
        mass = np.add.reduceat(weights.cpu().numpy()[order].astype(np.float64), heads)
    return values[heads], mass


def _midpoints(centroids: np.ndarray) -> np.ndarray:
    """Bounds between ascending fp32 centroids, rounded down to fp32: the fp32 values above a bound stay the same."""
    exact = (centroids[1:].astype(np.float64) + centroids[:-1]) / 2
    bounds = exact.astype(np.float32)
    return np.where(bounds > exact, np.nextafter(bounds, np.float32(-np.inf)), bounds)


class _Line:
    """Ascending distinct values with weights above 0, and the prefix sums of both; `edges` [n + 1] cut them."""

    def __init__(self, values: np.ndarray, mass: np.ndarray) -> None:
        middle = _place(np.cumsum(mass), mass.sum() / 2)
        self.origin = float(values[middle])
        self.values = values.astype(np.float64) - self.origin
        first = mass * self.values
        self.mass, self.first, self.second = (_prefix(terms, middle) for terms in (mass, first, first * self.values))

    def _means(self, edges: np.ndarray) -> np.ndarray:
        """Weighted mean of each range, none empty; one that rounding moved out of its range is moved back."""
        means = np.diff(self.first[edges]) / np.diff(self.mass[edges])
        return np.clip(means, self.values[edges[:-1]], self.values[edges[1:] - 1])

    def centroids(self, edges: np.ndarray) -> np.ndarray:
        return self._round(self._means(edges))

    def _round(self, places: np.ndarray) -> np.ndarray:
        return (places + self.origin).astype(np.float32)

    # The optimum

    def optimum(self, clusters: int, places: np.ndarray) -> np.ndarray:
        """Edges of the clusters [clusters + 1] of the least error, of all that begin at one of `places`, which ascend
        from 0 to the number of values."""
        if can_compile("cpu"):
            try:
                from .ranges import fill_layer

                return self._optimum(clusters, places, fill_layer)
            except Exception as error:
                give_up("cpu", error)
        return self._optimum(clusters, places, _fill_layer)

    def _optimum(self, clusters: int, places: np.ndarray, fill: Callable[..., None]) -> np.ndarray:
        """By `fill`, which does what [`ranges.fill_layer`] does."""
        mass, first, second = (sums[places] for sums in (self.mass, self.first, self.second))
        total = len(places) - 1
        # cuts[k, j]: where the last of k + 1 clusters of the first j ranges begins; what no solution uses stays 0
        cuts = np.zeros((clusters, total + 1), np.int64)
        best = np.zeros(total + 1)
        ends = slice(1, total - clusters + 2)
        best[ends] = second[ends] - second[0] - (first[ends] - first[0]) ** 2 / (mass[ends] - mass[0])
        for k in range(1, clusters):
            lowest, highest = (k + 1 if k < clusters - 1 else total), total - clusters + k + 1
            known = np.full(highest - lowest + 2, k, np.int64)
            fill(best - second, mass, first, second, cuts[k - 1], lowest, known, cuts[k], best)
        edges = np.full(clusters + 1, total)
        for k in range(clusters - 1, -1, -1):
            edges[k] = cuts[k, edges[k + 1]]
        return places[edges]

    def is_small(self, clusters: int) -> bool:
        """Whether a cluster may begin at any value without too much work."""
        return clusters * len(self.values) * np.log2(len(self.values)) <= _MOST_STEPS

    # Lloyd

    def start(self, clusters: int) -> np.ndarray:
        """Centroids to begin with: the best of clusters that begin at places in proportion to p^(1/3), as many as can
        be tried; where those are few, such places themselves."""
        budget = _MOST_STEPS / clusters
        most = budget / np.log2(max(2.0, budget))
        if most < _FEWEST_PLACES * clusters:
            return self.values[self._ranks(clusters)]
        ranks = self._ranks(int(min(most, _PLACES * clusters)))
        return self._means(self.optimum(clusters, np.unique(np.concatenate([[0], ranks, [len(self.values)]]))))

    def lloyd(
        self,
        places: np.ndarray,
        iterations: int,
        tolerance: float,
        progress: Callable[[int, float], None] | None,
    ) -> tuple[np.ndarray, int]:
        edges = self._edges(places)

        def step(_: int) -> float:
            nonlocal places, edges
            places = self._improve(places, edges)
            edges = self._edges(places)
            return self._error(places, edges)

        done = iterate(step, iterations, tolerance, progress)
        return self._round(places), done

    def _edges(self, places: np.ndarray) -> np.ndarray:
        inner = np.searchsorted(self.values, (places[1:] + places[:-1]) / 2, side="right")
        return np.concatenate([[0], inner, [len(self.values)]])

    def _error(self, places: np.ndarray, edges: np.ndarray) -> float:
        mass, first, second = (np.diff(sums[edges]) for sums in (self.mass, self.first, self.second))
        mean = first / np.maximum(mass, _TINY)
        return float((np.maximum(second - mean * first, 0) + mass * (mean - places) ** 2).sum())

    def _improve(self, places: np.ndarray, edges: np.ndarray) -> np.ndarray:
        """The mean of each cluster, after centroids have moved to where they help more."""
        filled = np.flatnonzero(np.diff(edges))
        a, b = edges[filled], edges[filled + 1]
        mass, mean = self.mass[b] - self.mass[a], self._means(np.append(a, len(self.values)))

        # A cluster may be split at its mean, or its value farthest from that, the first or last, may get out.
        cuts = np.stack([np.searchsorted(self.values, mean, side="right"), a + 1, b - 1])
        cuts = np.minimum(np.maximum(cuts, a), b)
        left, right = self.mass[cuts] - self.mass[a], self.mass[b] - self.mass[cuts]
        shift = (self.first[cuts] - self.first[a]) - left * mean
        product = left * right
        gains = np.divide(shift**2 * mass, product, out=np.zeros_like(product), where=product > 0)
        cuts, gains = cuts[gains.argmax(0), np.arange(len(mean))], gains.max(0)

        # Pairs of neighbours that are cheaper to merge than those beside them: no cluster is in two.
        price = mass[:-1] * mass[1:] / (mass[:-1] + mass[1:]) * np.diff(mean) ** 2
        padded = np.concatenate([[np.inf], price, [np.inf]])
        pairs = np.flatnonzero((price < padded[:-2]) & (price <= padded[2:]))
        pairs = pairs[np.argsort(price[pairs], kind="stable")]

        empty = len(places) - len(filled)
        splits = np.argsort(-gains, kind="stable")[: empty + len(pairs)]
        splits = splits[gains[splits] > 0]

        def moves() -> int:
            count = min(len(pairs), max(0, len(splits) - empty))
            return int((gains[splits[empty : empty + count]] > 2 * price[pairs[:count]]).sum())

        splits = splits[: empty + moves()]
        pairs = pairs[~np.isin(pairs, splits) & ~np.isin(pairs + 1, splits)]
        pairs = pairs[: moves()]
        splits = splits[: empty + len(pairs)]

        bounds = np.sort(np.concatenate([np.delete(a, pairs + 1), cuts[splits], [len(self.values)]]))
        unused = np.delete(places, filled)[: len(places) + 1 - len(bounds)]
        return np.sort(np.concatenate([self._means(bounds), unused]))

    def _ranks(self, clusters: int) -> np.ndarray:
        """Which values [clusters] lie at equal steps of the cumulated p^(1/3), from bins of equal weight."""
        count, total = len(self.values), self.mass[-1] - self.mass[0]
        tail = 0.5 ** np.arange(1, 64)  # finer towards the ends, where a single value may lie far out
        shares = np.concatenate([np.linspace(0, 1, max(_BINS, 2 * clusters)), tail, 1 - tail])
        edges = np.unique(_place(self.mass, self.mass[0] + shares * total))
        edges = np.union1d(edges, [0, count])
        sizes = np.diff(edges)
        width = np.diff(self.values[np.minimum(edges, count - 1)])
        pull = np.diff(self.mass[edges]) ** (1 / 3) * width ** (2 / 3)
        # No bin gets more centroids than it has values; the rest goes to the other bins.
        due, full = np.zeros(len(sizes)), np.zeros(len(sizes), bool)
        while True:
            rest = pull[~full].sum()
            if rest > 0:
                due[~full] = pull[~full] * (clusters - sizes[full].sum()) / rest
            over = ~full & (due > sizes)
            if not over.any():
                break
            full |= over
            due[over] = sizes[over]
        passed = np.concatenate([[0], np.cumsum(due)])
        steps = (np.arange(clusters) + 0.5) * passed[-1] / clusters
        rank = np.interp(steps, passed, edges)
        return np.minimum(rank.astype(np.int64), count - 1)


def _fill_layer(base, mass, first, second, least, lowest, known, cuts, best) -> None:  # type: ignore[no-untyped-def]
    """As [`ranges.fill_layer`], to the same numbers: all ends at once that lie between two that are known."""
    count = len(known) - 1
    step = 1 << (count.bit_length() - 1)
    while step:
        at = np.arange(step, count + 1, 2 * step)
        end = at + lowest - 1
        low = np.maximum(known[at - step], least[end])
        right = at + step
        high = np.where(right <= count, known[np.minimum(right, count)], end - 1)
        # Rounding may cross them where two choices are equally good.
        high = np.maximum(low, np.minimum(high, end - 1))
        lengths = high - low + 1
        heads = np.cumsum(lengths) - lengths
        i = np.arange(lengths.sum()) + np.repeat(low - heads, lengths)
        value = np.repeat(first[end], lengths) - first[i]
        value *= value
        value /= np.repeat(mass[end], lengths) - mass[i]
        np.subtract(base[i], value, out=value)
        error = np.minimum.reduceat(value, heads)
        hits = np.flatnonzero(value == np.repeat(error, lengths))
        known[at] = cuts[end] = i[hits[np.searchsorted(hits, heads)]]
        best[end] = np.maximum(error + second[end], 0)
        step >>= 1


def _place(sums: np.ndarray, wanted: Any) -> Any:
    """The first place at which ascending sums reach each wanted one; the last place if rounding put it beyond all."""
    return np.minimum(np.searchsorted(sums, wanted), len(sums) - 1)


def _prefix(terms: np.ndarray, middle: int) -> np.ndarray:
    """Sums from `middle` on, negative before it: [M + 1], 0 at `middle`."""
    return np.concatenate([-np.cumsum(terms[:middle][::-1])[::-1], [0.0], np.cumsum(terms[middle:])])
