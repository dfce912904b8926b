"""The search for the nearest centroids and sweeps over channels, against brute force and plain torch, for any number
of threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluscomp_peft.clustering import search
from cluscomp_peft.clustering.search import CentroidSearch

exhaustive = settings(deadline=None, max_examples=40, derandomize=True)
# Bisection begins at 257 numbers, the tree at 2,049 centroids, which leave leaves and branches unfilled.
sizes = st.one_of(st.integers(2, 40), st.sampled_from([256, 257, 513, 2048, 2049, 5000]))
dims = st.sampled_from([1, 2, 3, 4, 6, 8, 16, 17])


def centroids_and_vectors(clusters, total, dim, seed, kind):
    generator = torch.Generator().manual_seed(seed)
    centroids = torch.randn(clusters, dim, generator=generator)
    vectors = torch.randn(total, dim, generator=generator)
    if kind == "rounded":  # ties and duplicates
        centroids, vectors = centroids.round(), (2 * vectors).round() / 2
    elif kind == "equal":
        centroids[:] = centroids[0]
    elif kind == "far away":
        vectors = vectors * 1e3
    elif kind == "off centre":
        centroids, vectors = centroids + 100, vectors + 100
    elif kind == "outliers":
        centroids[: clusters // 10] *= 1e3
    return centroids, vectors


def assert_nearest(vectors, centroids, codes):
    assert codes.shape == (len(vectors),) and codes.dtype == torch.int64
    away = torch.cdist(vectors.double(), centroids.double()).square()
    found = away.gather(1, codes[:, None])[:, 0]
    # Rounding of |c|² / 2 − x·c, as large as its terms.
    slack = 1e-5 * (vectors.square().sum(1).max() + centroids.square().sum(1).max()).double()
    assert bool((found <= away.min(1).values + slack).all())


@exhaustive
@given(
    sizes,
    st.integers(1, 200),
    dims,
    st.integers(0, 10**6),
    st.sampled_from(["normal", "rounded", "equal", "far away", "off centre", "outliers"]),
    st.sampled_from([1, 3]),
)
def test_nearest_is_brute_force(clusters, total, dim, seed, kind, threads):
    centroids, vectors = centroids_and_vectors(clusters, total, dim, seed, kind)
    assert_nearest(vectors, centroids, CentroidSearch(centroids, threads)(vectors))


@exhaustive
@given(sizes, dims, st.integers(0, 10**6), st.booleans())
def test_the_tree_finds_the_nearest_from_any_code(clusters, dim, seed, rounded):
    centroids, vectors = centroids_and_vectors(clusters, 100, dim, seed, "rounded" if rounded else "normal")
    known = torch.randint(clusters, (1, 100), generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "_FEW", 0)
        codes, _ = CentroidSearch(centroids, 1).sweep(
            vectors.reshape(1, -1), torch.zeros(1, 1), known, True, 100 * dim
        )
    assert_nearest(vectors, centroids, codes[0])


@pytest.mark.parametrize("clusters", [750, 1500])
@pytest.mark.parametrize("dim", [1, 3])
def test_nearest_of_duplicates_is_the_first(clusters, dim):
    centroids = torch.randn(clusters, dim).repeat(2, 1)
    assert int(CentroidSearch(centroids, 1)(torch.randn(300, dim)).max()) < clusters


def test_nearest_of_nothing():
    for clusters in (10, 5000):
        assert len(CentroidSearch(torch.randn(clusters, 3), 2)(torch.empty(0, 3))) == 0


def a_sweep(clusters, dim, channels, groups, missing, seed):
    """Arguments of a sweep: targets, coupling, known codes; the last `missing` outputs are padding."""
    generator = torch.Generator().manual_seed(seed)
    centroids = torch.randn(clusters, dim, generator=generator)
    targets = torch.randn(channels, groups * dim, generator=generator)
    out = groups * dim - min(missing, dim - 1)
    targets[:, out:] = 0
    coupling = torch.randn(channels, channels, generator=generator) / channels**0.5
    known = torch.randint(clusters, (channels, groups), generator=generator)
    return centroids, targets, coupling, known, out


@exhaustive
@given(
    st.one_of(st.integers(2, 40), st.sampled_from([300, 3000])),
    dims,
    st.integers(1, 30),
    st.sampled_from([1, 3, 63, 64, 65, 200]),
    st.integers(0, 3),
    st.integers(0, 10**6),
    st.booleans(),
)
def test_a_sweep_takes_the_nearest_of_every_channel_and_hands_its_error_on(
    clusters, dim, channels, groups, missing, seed, error_feedback
):
    centroids, targets, coupling, known, out = a_sweep(clusters, dim, channels, groups, missing, seed)
    codes, errors = CentroidSearch(centroids, 1).sweep(targets.clone(), coupling, known, error_feedback, out)
    # The same steps in fp64 along the codes that were found.
    wanted = targets.double()
    for i in range(channels):
        assert_nearest(wanted[i].view(-1, dim).float(), centroids, codes[i])
        pivot = wanted[i] if error_feedback else centroids[known[i]].flatten().double()
        error = pivot - centroids[codes[i]].flatten()
        error[out:] = 0
        torch.testing.assert_close(errors[i].double(), error, rtol=1e-4, atol=1e-4)
        wanted[i + 1 :] += torch.outer(coupling[i, i + 1 :].double(), error)
    again = CentroidSearch(centroids, 3).sweep(targets.clone(), coupling, known, error_feedback, out)
    assert torch.equal(codes, again[0]) and torch.equal(errors, again[1])


@exhaustive
@given(
    st.integers(2, 40),
    dims,
    st.integers(1, 6),
    st.integers(1, 90),
    st.integers(0, 3),
    st.integers(0, 10**6),
    st.booleans(),
    st.booleans(),
)
def test_a_compiled_sweep_is_that_of_torch_to_the_last_tie(
    clusters, dim, channels, groups, missing, seed, error_feedback, tree
):
    # Whole numbers small enough that fp32 rounds nothing, whatever the order of operations; ties abound.
    centroids, targets, coupling, known, out = a_sweep(clusters, dim, channels, groups, missing, seed)
    centroids, targets, coupling = (2 * centroids).round(), (2 * targets).round(), coupling.sign().round()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "_FEW", 0 if tree else 2048)
        compiled = CentroidSearch(centroids, 2).sweep(targets.clone(), coupling, known, error_feedback, out)
        patch.setattr(search, "can_compile", lambda engine: False)
        plain = CentroidSearch(centroids, 2).sweep(targets.clone(), coupling, known, error_feedback, out)
    assert torch.equal(compiled[0], plain[0]) and torch.equal(compiled[1], plain[1])
