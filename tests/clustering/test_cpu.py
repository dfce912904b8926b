"""The CPU engine: its assignment is brute force up to six dimensions and close to it above, whatever the data."""

import subprocess

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluscomp_peft import kmeans

pytest.importorskip("numba")
from cluscomp_peft.clustering.cpu import assign
from tests import warm
from tests.grids import grid, quick

pure = settings(deadline=None, max_examples=60, derandomize=True)


def gaussian(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def weights_of_a_model(total: int, dim: int, seed: int = 0) -> torch.Tensor:
    """bf16 values with heavy tails and scales that differ, as in the weights of a language model."""
    values = gaussian(total, dim, seed=seed) * (0.3 * gaussian(total, 1, seed=seed + 1)).exp()
    values[::500] *= 8
    return (0.02 * values).bfloat16().float()


def make(kind: str, total: int, dim: int, seed: int) -> torch.Tensor:
    vectors = gaussian(total, dim, seed=seed)
    if kind == "clustered":
        vectors = 0.01 * vectors + 5 * gaussian(7, dim, seed=seed + 1)[torch.arange(total) % 7]
    elif kind == "duplicated":
        vectors = vectors[torch.arange(total) % max(2, total // 3)]
    elif kind == "rounded":
        vectors = vectors.round()
    elif kind == "constant but one":
        vectors = torch.ones(total, dim)
        vectors[0] = 2
    elif kind == "collinear":
        vectors = vectors[:, :1] * torch.arange(1, dim + 1)
    elif kind == "outlier":
        vectors[total // 2] = 1e4
    elif kind == "denormal":
        vectors = vectors * 1e-41
    elif kind == "huge":
        vectors = vectors * 1e25
    elif kind == "far away":
        vectors = vectors + 1000
    return vectors


KINDS = [
    "random",
    "clustered",
    "duplicated",
    "rounded",
    "constant but one",
    "collinear",
    "outlier",
    "denormal",
    "huge",
]


def check_nearest(vectors: torch.Tensor, centroids: torch.Tensor, codes: torch.Tensor) -> None:
    """Every code names a nearest centroid, up to what fp32 can tell of vectors of this size."""
    x, c = vectors.double(), centroids.double()
    distances = torch.cdist(x, c, compute_mode="donot_use_mm_for_euclid_dist")
    chosen, best = distances.gather(1, codes[:, None])[:, 0], distances.min(1).values
    # Coordinates are relative to the home, which is at most this far away.
    assert bool((chosen <= best * (1 + 1e-5) + 1e-9 * x.abs().max()).all()), float((chosen - best).max())


@pure
@given(
    st.sampled_from([*KINDS, "far away"]),
    st.integers(1, 6),
    st.integers(2, 400),
    st.integers(2, 90),
    st.integers(0, 2**20),
)
def test_assignment_is_brute_force(kind, dim, total, clusters, seed):
    vectors = make(kind, total, dim, seed)
    centroids = make(kind, clusters, dim, seed + 2)
    codes, distances = assign(vectors, centroids, seed)
    if kind != "far away":  # fp32 distances of vectors at 1000 know three digits behind the point
        check_nearest(vectors, centroids, codes)
    exact = (vectors.double() - centroids.double()[codes]).square().sum(1)
    scale = float(vectors.double().square().sum(1).max() + centroids.double().square().sum(1).max())
    if kind not in ("denormal", "huge"):  # whose squares are no fp32 numbers
        torch.testing.assert_close(distances.double(), exact, rtol=1e-4, atol=1e-9 * scale)


@pure
@given(
    st.sampled_from(KINDS),
    st.integers(2, 6),
    st.integers(40, 600),
    st.integers(2, 40),
    st.integers(0, 2**20),
    st.booleans(),
)
def test_codes_of_a_clustering_are_brute_force(kind, dim, total, clusters, seed, weighted):
    vectors = make(kind, total, dim, seed)
    weights = torch.rand(total, generator=torch.Generator().manual_seed(seed)) if weighted else None
    codebook, codes, info = kmeans(vectors, clusters, weights=weights, seed=seed, engine="cpu", iterations=5)
    assert codebook.isfinite().all()
    check_nearest(vectors, codebook, codes)
    share = 1 if weights is None else weights.double()
    cost = float(((vectors.double() - codebook.double()[codes]).square().sum(1) * share).sum())
    assert info.objective == pytest.approx(cost, rel=1e-4, abs=1e-12 * float(vectors.double().square().sum()))


@grid(dim=quick([2, 3, 4, 5, 6], 2, 4, 6))
def test_large_assignments_are_brute_force(dim):
    vectors = weights_of_a_model(20_000, dim)
    centroids = vectors[:: 20_000 // 3000].clone()
    check_nearest(vectors, centroids, assign(vectors, centroids)[0])


@grid(dim=quick([7, 8, 11, 16], 8, 11))
def test_near_assignments_lose_less_than_five_per_mille(dim):
    vectors = weights_of_a_model(40_000, dim)
    centroids = vectors[:: 40_000 // 2000].clone()
    best = torch.cdist(vectors.double(), centroids.double()).min(1).values.square().sum()
    lost = float(assign(vectors, centroids)[1].double().sum() / best) - 1
    assert -1e-6 < lost < 5e-3
    codebook, codes, info = kmeans(vectors, 2000, engine="cpu")
    best = torch.cdist(vectors.double(), codebook.double()).min(1).values.square().sum()
    assert -1e-6 < info.objective / float(best) - 1 < 5e-3
    assert int(codes.max()) < 2000


@pytest.mark.parametrize("dim", [7, 16])
def test_few_vectors_for_each_centroid_are_assigned_exactly(dim):
    vectors = weights_of_a_model(3000, dim)
    centroids = vectors[::3].clone() + 0.001
    check_nearest(vectors, centroids, assign(vectors, centroids)[0])


@grid(dim=quick([3, 4, 6, 8, 16], 3, 6, 8), weighted=[False, True])
def test_threads_change_no_byte(dim, weighted):
    vectors = weights_of_a_model(30_000, dim)
    weights = torch.rand(30_000, generator=torch.Generator().manual_seed(3)) if weighted else None
    one, *others = (
        kmeans(vectors, 1500, weights=weights, engine="cpu", threads=threads, iterations=6) for threads in (1, 2, 5)
    )
    for other in others:
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
        assert one[2].objective == other[2].objective


# What the start gains at a number of dimensions.
GAINS = {"2": (2, 0.1), "4": (4, 0.08), "6": (6, 0.02), "8": (8, 0.0), "16": (16, 0.0)}


@grid(start=quick(GAINS, "4", "8"))
def test_the_density_start_beats_twenty_iterations_from_random_vectors(start):
    dim, gain = start
    vectors, clusters = weights_of_a_model(60_000, dim), 2000
    usual = kmeans(vectors, clusters, engine="cpu", init="random", iterations=20, tolerance=0)[2].objective
    ours = kmeans(vectors, clusters, engine="cpu")[2].objective
    assert ours < (1 - gain) * usual


@pytest.mark.parametrize("dim", [2, 5, 10])
def test_the_engine_agrees_with_plain_lloyd(dim):
    vectors = weights_of_a_model(4000, dim)
    start = vectors[::40].clone()
    settings = dict(init=start, iterations=8, tolerance=0.0)
    plain = kmeans(vectors, 100, engine="torch", **settings)
    fast = kmeans(vectors, 100, engine="cpu", **settings)
    assert fast[2].objective == pytest.approx(plain[2].objective, rel=1e-2)


def test_what_is_given_is_not_written():
    vectors, weights = weights_of_a_model(5000, 4), torch.rand(5000)
    start = vectors[:200].clone()
    copies = [tensor.clone() for tensor in (vectors, weights, start)]
    kmeans(vectors, 200, weights=weights, init=start, engine="cpu")
    assert all(torch.equal(a, b) for a, b in zip((vectors, weights, start), copies, strict=True))


def test_large_inputs_take_the_fast_engine_and_small_ones_do_not_import_numba():
    assert kmeans(weights_of_a_model(10_000, 4), 1000)[2].engine == "cpu"
    code = (
        "import sys, torch; from cluscomp_peft import kmeans\n"
        "print(kmeans(torch.randn(500, 4), 20)[2].engine, 'numba' in sys.modules, 'triton' in sys.modules)"
    )
    done = subprocess.run([warm.python("torch"), "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-3:-1] == ["torch", "False"]
    code = (
        "import sys; sys.modules['numba'] = None\n"
        "import importlib.util as u; found = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'numba' else found(name, *a)\n"
        "import torch; from cluscomp_peft import kmeans\n"
        "vectors = torch.randn(10000, 4)\n"
        "print(kmeans(vectors, 1000, iterations=1)[2].engine)\n"
        "try: kmeans(vectors, 1000, engine='cpu')\n"
        "except ValueError as error: print('pip install numba' in str(error))"
    )
    done = subprocess.run([warm.python("torch"), "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-2:] == ["torch", "True"]
