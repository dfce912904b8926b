"""K-means of single numbers: the optimum, exactness of codes, odd values, and the iterations for many values."""

import importlib
import itertools
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluscomp_peft.clustering import engines
from cluscomp_peft.clustering.scalar import lloyd_scalar

scalar = importlib.import_module("cluscomp_peft.clustering.scalar")

pure = settings(deadline=None, max_examples=60, derandomize=True)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
# Whole numbers repeat, numbers near 1 differ in their last digits, and others lie anywhere.
numbers = st.one_of(st.integers(-5, 5).map(float), st.floats(0.875, 1.125, width=32), finite)


def normal(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def run(values, clusters, weights=None, start=None, iterations=25, tolerance=1e-4, progress=None):
    values = torch.as_tensor(values, dtype=torch.float32)[:, None]
    weights = None if weights is None else torch.as_tensor(weights, dtype=torch.float32)
    return lloyd_scalar(values, clusters, weights, start, iterations, tolerance, 0, 1, progress)


def cost(values, centroids, codes, weights=None) -> float:
    distances = (torch.as_tensor(values).double() - centroids[:, 0].double()[codes]).square()
    return float((distances if weights is None else distances * torch.as_tensor(weights).double()).sum())


def plain_lloyd(values, weights, centroids, iterations=50) -> float:
    """Lloyd's algorithm as it is written in books, fp64."""
    values, centroids = values.double(), centroids.double()
    weights = torch.ones_like(values) if weights is None else weights.double()
    for _ in range(iterations + 1):
        distances, codes = (values[:, None] - centroids).square().min(1)
        mass = torch.zeros_like(centroids).index_add(0, codes, weights)
        sums = torch.zeros_like(centroids).index_add(0, codes, weights * values)
        centroids = torch.where(mass > 0, sums / mass, centroids)
    return float(distances @ weights)


def assert_nearest(values, centroids, codes):
    """No centroid is nearer than the one that codes name, in fp64."""
    distances = (torch.as_tensor(values, dtype=torch.float32).double()[:, None] - centroids[:, 0].double()).abs()
    chosen = distances.gather(1, codes[:, None])[:, 0]
    assert (chosen <= distances.min(1).values * (1 + 1e-15)).all()


def brute_force(values, weights, clusters) -> float:
    """The least error of any cut of the sorted values into ranges."""
    order = np.argsort(values)
    values, weights = np.asarray(values, np.float32).astype(float)[order], np.asarray(weights, float)[order]
    least = np.inf
    for cut in itertools.combinations(range(1, len(values)), min(clusters, len(values)) - 1):
        error = 0.0
        for part in itertools.pairwise([0, *cut, len(values)]):
            v, w = values[slice(*part)], weights[slice(*part)]
            centred = v - v[0]
            error += float(w @ (centred - w @ centred / w.sum()) ** 2)
        least = min(least, error)
    return least


def rounding(values, weights) -> float:
    """What fp32 centroids and fp64 sums may add to an error."""
    values, weights = np.asarray(values, np.float32).astype(float), np.asarray(weights, float)
    centred = values - np.median(values)
    return float(weights @ (values * 2.0**-24) ** 2 + 1e-13 * weights @ centred**2 + weights.sum() * 1e-89)


@pure
@given(st.lists(st.tuples(numbers, st.sampled_from([1, 1, 2, 5, 100])), min_size=2, max_size=9), st.integers(2, 5))
def test_few_values_reach_the_optimum(pairs, clusters):
    values, weights = (list(part) for part in zip(*pairs, strict=True))
    for own in (None, weights):
        share = [1] * len(values) if own is None else own
        centroids, codes, objective, _ = run(values, clusters, own)
        least = brute_force(values, share, clusters)
        assert objective <= least * (1 + 1e-9) + rounding(values, share)
        # (the optimum of fp32 centroids is not below that of any centroids)
        assert objective >= least * (1 - 1e-9) - rounding(values, share)
        assert objective == pytest.approx(cost(np.float32(values), centroids, codes, share), rel=1e-9)


@pure
@given(st.integers(2, 40), st.integers(41, 300), st.integers(0, 2**31 - 1), st.booleans())
def test_the_optimum_is_not_above_lloyd_from_random_starts(clusters, count, seed, weighted):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=generator) ** 3
    weights = torch.rand(count, generator=generator) if weighted else None
    _, _, objective, done = run(values, clusters, weights)
    start = values[torch.randperm(count, generator=generator)[:clusters]]
    assert done == 1
    assert objective <= plain_lloyd(values, weights, start) * (1 + 1e-6)


@pure
@given(st.lists(numbers, min_size=2, max_size=60), st.integers(2, 12), st.booleans(), st.booleans())
def test_codes_name_the_nearest_centroid(values, clusters, optimal, given_start):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scalar, "_MOST_STEPS", 1e8 if optimal else 0)
        start = torch.tensor(values)[: min(clusters, len(values)), None] if given_start else None
        clusters = clusters if start is None else len(start)
        for iterations in (0, 3):
            centroids, codes, objective, _ = run(values, clusters, start=start, iterations=iterations)
            assert centroids.shape == (clusters, 1) and centroids.dtype == torch.float32
            assert codes.shape == (len(values),) and codes.dtype == torch.int64
            assert centroids.isfinite().all()
            assert_nearest(values, centroids, codes)
            expected = cost(torch.tensor(values, dtype=torch.float32), centroids, codes)
            assert objective == pytest.approx(expected, rel=1e-9)


@pure
@given(st.lists(numbers, min_size=2, max_size=20), st.integers(0, 5))
def test_a_centroid_for_every_distinct_value_loses_nothing(values, more):
    values = torch.tensor(values * 3, dtype=torch.float32)
    distinct = values.unique()
    centroids, codes, objective, done = run(values, len(distinct) + more)
    assert torch.equal(centroids[codes, 0], values) and objective == 0 and done == 0
    assert torch.equal(centroids[: len(distinct), 0], distinct) and not centroids[len(distinct) :].any()


def test_constants_are_exact():
    centroids, codes, objective, _ = run(torch.full((50,), 0.1), 2)
    assert objective == 0 and (centroids[codes, 0] == torch.tensor(0.1)).all()


@pytest.mark.parametrize("optimal", [True, False])
def test_huge_outliers_get_centroids_of_their_own(optimal, monkeypatch):
    monkeypatch.setattr(scalar, "_MOST_STEPS", 1e8 if optimal else 0)
    values = normal(3000)
    bulk = run(values, 14)[2]
    values[:2] = torch.tensor([-1e4, 1e4])
    centroids, codes, objective, _ = run(values, 16)
    assert (centroids[codes[:2], 0] == values[:2]).all()
    assert objective < bulk * (1 + 1e-4 if optimal else 1.1)
    assert_nearest(values, centroids, codes)


@pytest.mark.parametrize("optimal", [True, False])
@pytest.mark.parametrize("scale", [2.0**-140, 2.0**-120, 2.0**120])
def test_denormal_and_huge_values_are_clustered(scale, optimal, monkeypatch):
    monkeypatch.setattr(scalar, "_MOST_STEPS", 1e8 if optimal else 0)
    values = torch.randint(-200, 200, (500,), generator=torch.Generator().manual_seed(0)).float()
    plain, scaled = run(values, 20), run(values * scale, 20)
    assert scaled[2] == pytest.approx(plain[2] * scale**2, rel=1e-2 if scale < 2.0**-130 else 1e-6)
    assert_nearest(values * scale, *scaled[:2])


@pytest.mark.parametrize("offset", [1e3, -1e5])
def test_values_far_from_zero_keep_their_digits(offset):
    values = (normal(2000) + offset).double()
    least = run(values.float().double() - offset, 16)[2]
    assert run(values, 16)[2] <= least * (1 + 1e-4) + rounding(values, np.ones(2000))


@pytest.mark.parametrize("optimal", [True, False])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_same_bytes_twice(weighted, optimal, monkeypatch):
    monkeypatch.setattr(scalar, "_MOST_STEPS", 1e8 if optimal else 0)
    values, weights = normal(5000).bfloat16().float(), normal(5000, 1).abs() if weighted else None
    before = values.clone()
    first, again = run(values, 24, weights), run(values, 24, weights)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1]) and first[2:] == again[2:]
    assert torch.equal(values, before)
    assert (first[0].diff(dim=0) > 0).all()


@pytest.mark.parametrize("clusters", [16, 40, 300])
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "atoms"])
def test_iterations_come_near_the_optimum(kind, clusters, monkeypatch):
    values = normal(4000)
    if kind == "heavy tails":
        values = values / normal(4000, 1).abs()
    elif kind == "atoms":
        values[::2] = values[::2].mul(4).round()
    least = run(values, clusters)[2]
    monkeypatch.setattr(scalar, "_MOST_STEPS", 0)
    seen = []
    centroids, codes, objective, done = run(
        values, clusters, iterations=100, tolerance=0, progress=lambda *a: seen.append(a)
    )
    assert least * (1 - 1e-6) <= objective <= 1.25 * least
    assert [i for i, _ in seen] == list(range(1, done + 1)) and 2 < done < 100
    assert all(after <= before * (1 + 1e-9) for (_, before), (_, after) in itertools.pairwise(seen))
    assert objective == pytest.approx(seen[-1][1], rel=1e-4)
    assert_nearest(values, centroids, codes)


@pytest.mark.parametrize(("clusters", "spread"), [(16, 0.0), (64, 0.0), (64, 2.0), (150, 1.0)])
def test_many_values_come_within_two_per_cent_of_the_optimum(clusters, spread, monkeypatch):
    values, weights = normal(9000) * (0.3 * normal(9000, 1)).exp(), (spread * normal(9000, 2)).exp()
    monkeypatch.setattr(scalar, "_MOST_STEPS", 1e9)
    least = run(values, clusters, weights)
    assert least[3] == 1
    monkeypatch.setattr(scalar, "_MOST_STEPS", 16 * clusters * clusters * np.log2(16 * clusters))
    near = run(values, clusters, weights)
    assert least[2] * (1 - 1e-9) <= near[2] <= 1.02 * least[2]
    assert near[3] > 1


@pytest.mark.slow
@pytest.mark.parametrize("clusters", [16, 256])
@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_a_matrix_of_a_real_model_comes_within_half_a_per_cent_of_the_optimum(clusters, spread, monkeypatch):
    count = 192 * 576
    values, weights = normal(count) * (0.3 * normal(count, 1)).exp(), (spread * normal(count, 2)).exp()
    results = {}
    for steps in (1e10, 3e7, 0):
        monkeypatch.setattr(scalar, "_MOST_STEPS", steps)
        results[steps] = run(values, clusters, weights, iterations=20, tolerance=1e-3)[2]
    near, alone = results[3e7] / results[1e10] - 1, results[0] / results[1e10] - 1
    print(f"{clusters} centroids, weights e^{spread:g}N: {near:.2%} above the optimum, Lloyd alone {alone:.2%}")
    assert -1e-9 < near < 0.005 and near <= alone


@pytest.mark.parametrize("weighted", [False, True])
def test_the_compiled_program_and_that_of_numpy_give_the_same_bytes(weighted, monkeypatch):
    pytest.importorskip("numba")
    values, weights = normal(700).mul(8).round(), normal(700, 1).abs() if weighted else None  # many choices tie
    compiled = run(values, 13, weights)
    monkeypatch.setattr(scalar, "can_compile", lambda engine: False)
    plain = run(values, 13, weights)
    assert torch.equal(compiled[0], plain[0]) and torch.equal(compiled[1], plain[1]) and compiled[2:] == plain[2:]


def test_a_broken_compiler_leaves_the_program_to_numpy(monkeypatch):
    expected = run(normal(200), 9)
    monkeypatch.setitem(sys.modules, "cluscomp_peft.clustering.ranges", None)
    monkeypatch.setattr(engines, "_broken", set())
    with pytest.warns(UserWarning, match="cannot use its compiled engine 'cpu'"):
        found = run(normal(200), 9)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_a_start_is_taken_and_repaired(monkeypatch):
    monkeypatch.setattr(scalar, "_MOST_STEPS", 0)
    values = normal(2000)
    good = run(values, 30, iterations=100, tolerance=0)
    # All but one centroid begin empty.
    poor = run(values, 30, start=torch.full((30, 1), 50.0), iterations=100, tolerance=0)
    assert len(poor[1].unique()) == 30
    assert poor[2] < 1.1 * good[2]
    same = run(values, 30, start=good[0], iterations=100, tolerance=0)
    assert same[2] <= good[2] * (1 + 1e-6) and same[3] <= 3


def test_no_iterations_keep_the_start():
    start = torch.tensor([[2.0], [-1.0], [0.5]])
    values = normal(100)
    centroids, codes, objective, done = run(values, 3, start=start, iterations=0)
    assert torch.equal(centroids, start) and done == 0
    assert_nearest(values, centroids, codes)
    assert objective == pytest.approx(cost(values, start, codes))


# Weights with all their digits: where sums of them round is what whole numbers and powers of two never show.
@settings(pure, max_examples=200)
@given(
    st.integers(40, 80), st.integers(2, 39), st.floats(0, 25), st.integers(0, 2**31 - 1), st.integers(-60, 60),
)  # fmt: skip
def test_weights_of_enormous_range(count, clusters, spread, seed, size):
    values, weights = normal(count, seed), (spread * normal(count, seed + 1)).double().exp() * 2.0**size
    weights = weights.clamp(2.0**-149, 3e38).float()
    heavy = weights > 1e-15 * weights.double().sum()
    with pytest.MonkeyPatch.context() as patch:
        results = []
        for steps in (1e8, 1e5, 0):
            patch.setattr(scalar, "_MOST_STEPS", steps)
            results.append(run(values, clusters, weights, iterations=100, tolerance=0))
            centroids, codes, objective, _ = results[-1]
            assert centroids.isfinite().all()
            assert_nearest(values, centroids, codes)
            assert objective == pytest.approx(cost(values, centroids, codes, weights), rel=1e-9)
    least, *near = (result[2] for result in results)
    light = float(weights.double()[~heavy] @ values.double()[~heavy].square())  # not minimised
    assert least <= min(near) * (1 + 1e-9) + 16 * light + rounding(values, weights)


@pytest.mark.parametrize("seed", [2, 5])
def test_many_values_with_weights_of_enormous_range(seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(200_000, generator=generator)
    weights = torch.exp(3 * torch.randn(200_000, generator=generator))
    centroids, codes, objective, _ = run(values, 64, weights)
    assert len(codes.unique()) == 64
    assert objective == pytest.approx(cost(values, centroids, codes, weights), rel=1e-6)


def test_progress_is_told_once_of_the_optimum():
    seen = []
    objective = run(normal(200), 5, progress=lambda *a: seen.append(a))[2]
    assert seen == [(1, objective)]


def test_tolerance_ends_the_run(monkeypatch):
    monkeypatch.setattr(scalar, "_MOST_STEPS", 0)
    assert run(normal(2000), 30, tolerance=0.5)[3] == 2


@pytest.mark.parametrize("optimal", [True, False])
def test_values_of_no_weight_do_not_count(optimal, monkeypatch):
    monkeypatch.setattr(scalar, "_MOST_STEPS", 1e8 if optimal else 0)
    values, weights = normal(300), torch.ones(300)
    weights[200:] = 0
    values[200:] += 100
    some, all_ = run(values[:200], 8), run(values, 8, weights)
    assert torch.equal(some[0], all_[0]) and some[2] == pytest.approx(all_[2])
    assert_nearest(values, *all_[:2])
    # Left over centroids serve them.
    weights[10:] = 0
    centroids, codes, objective, _ = run(values, 20, weights)
    assert objective == 0 and torch.equal(centroids[codes[:10], 0], values[:10])
    # Weights too small to be seen in a sum make nothing infinite.
    weights = torch.where(torch.arange(300) % 2 == 0, 1e20, 1e-20)
    assert run(values, 8, weights)[0].isfinite().all()


def test_integer_weights_are_duplicated_values():
    values = normal(300)
    counts = torch.randint(1, 6, (300,), generator=torch.Generator().manual_seed(2))
    weighted, duplicated = run(values, 12, counts.float()), run(values.repeat_interleave(counts), 12)
    assert torch.equal(weighted[0], duplicated[0])
    assert weighted[2] == pytest.approx(duplicated[2])
