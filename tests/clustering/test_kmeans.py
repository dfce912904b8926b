"""K-means: determinism, descent, weights, repair of empty clusters, and what is refused."""

import importlib
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluscomp_peft.clustering import kmeans
from cluscomp_peft.clustering.lloyd import assign
from tests.grids import grid

# The package exports the function under the module's name, so an attribute path would not reach the module.
lloyd_module = importlib.import_module("cluscomp_peft.clustering.lloyd")

ENGINES = ["torch", "cpu"]
every_engine = pytest.mark.parametrize("engine", ENGINES)
pure = settings(deadline=None, max_examples=30, derandomize=True)


def normal(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def uniform(size: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)) * 5


def cost(vectors, codebook, codes, weights=None) -> float:
    distances = (vectors.double() - codebook.double()[codes]).square().sum(1)
    return float((distances if weights is None else distances * weights.double()).sum())


@every_engine
@pytest.mark.parametrize("weighted", [False, True])
def test_a_seed_gives_the_same_bytes(weighted, engine):
    vectors, weights = normal(500, 3), uniform(500) if weighted else None
    state = torch.get_rng_state()
    first = kmeans(vectors, 20, engine=engine, weights=weights, seed=7)
    torch.manual_seed(123)
    again = kmeans(vectors, 20, engine=engine, weights=weights, seed=7)
    torch.manual_seed(0)
    other = kmeans(vectors, 20, engine=engine, weights=weights, seed=8)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert first[2].objective == again[2].objective
    assert not torch.equal(first[0], other[0])
    assert torch.equal(torch.get_rng_state(), state)


@every_engine
@pytest.mark.parametrize("weighted", [False, True])
def test_the_result_is_described(weighted, engine):
    vectors, weights = normal(400, 4), uniform(400) if weighted else None
    before = vectors.clone()
    codebook, codes, info = kmeans(vectors, 16, engine=engine, weights=weights)
    assert torch.equal(vectors, before)
    assert codebook.shape == (16, 4) and codebook.dtype == torch.float32
    assert codes.shape == (400,) and codes.dtype == torch.int64
    assert 0 <= int(codes.min()) and int(codes.max()) < 16
    assert info.objective == pytest.approx(cost(vectors, codebook, codes, weights), rel=1e-5)
    assert info.engine == engine and 1 <= info.iterations <= 25 and info.seconds > 0
    assert not info.unused.any() and info.unused.shape == (16,)


@every_engine
@grid(dim=[2, 3, 5, 9], init=["density", "random"], weighted=[False, True])
def test_the_objective_only_falls(weighted, dim, init, engine):
    vectors, weights = normal(600, dim, seed=dim), uniform(600) if weighted else None
    seen = []
    settings = dict(weights=weights, tolerance=0, seed=dim, init=init, engine=engine)
    info = kmeans(vectors, 40, iterations=30, progress=lambda *a: seen.append(a), **settings)[2]
    iterations, objectives = zip(*seen, strict=True)
    assert iterations == tuple(range(1, info.iterations + 1))
    assert info.objective <= objectives[-1] * (1 + 1e-6)
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(objectives))
    assert (
        info.objective
        <= (0.99 if init == "random" else 1) * kmeans(vectors, 40, iterations=0, **settings)[2].objective
    )


@every_engine
def test_a_random_start_is_made_of_distinct_vectors(engine):
    vectors = normal(50, 2)
    codebook, codes, info = kmeans(vectors, 20, iterations=0, init="random", engine=engine)
    chosen = (codebook[:, None] == vectors).all(2)
    assert (chosen.sum(1) == 1).all() and chosen.any(0).sum() == 20
    assert torch.equal(codes, torch.cdist(vectors.double(), codebook.double()).argmin(1))
    assert info.iterations == 0


@every_engine
def test_iterations_and_tolerance_end_the_run(engine):
    vectors = normal(600, 3)
    assert kmeans(vectors, 40, engine=engine, iterations=3, tolerance=0)[2].iterations == 3
    assert kmeans(vectors, 40, engine=engine, iterations=50, tolerance=0.5)[2].iterations == 2
    strict = kmeans(vectors, 40, engine=engine, iterations=500, tolerance=0)[2]
    assert 5 < strict.iterations < 500
    assert strict.objective < kmeans(vectors, 40, engine=engine, tolerance=0.5)[2].objective


@every_engine
@pytest.mark.parametrize("weighted", [False, True])
def test_a_converged_run_is_a_fixed_point(weighted, engine):
    vectors, weights = normal(400, 3), uniform(400) if weighted else None
    codebook, codes, _ = kmeans(vectors, 12, engine=engine, weights=weights, iterations=500, tolerance=0)
    share = torch.ones(400, 1) if weights is None else weights[:, None]
    for cluster in range(12):
        mine = codes == cluster
        mean = (vectors[mine] * share[mine]).sum(0) / share[mine].sum()
        torch.testing.assert_close(codebook[cluster], mean, rtol=1e-3, atol=1e-3)


@pure
@given(st.integers(2, 30), st.integers(1, 6), st.integers(0, 2**31 - 1), st.booleans(), st.sampled_from(ENGINES))
def test_codes_name_the_nearest_centroid(clusters, dim, seed, weighted, engine):
    vectors = normal(80, dim, seed=seed)
    weights = uniform(80, seed) if weighted else None
    codebook, codes, _ = kmeans(vectors, clusters, weights=weights, iterations=4, engine=engine)
    distances = torch.cdist(vectors.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist")
    chosen = distances.gather(1, codes[:, None])[:, 0]
    torch.testing.assert_close(chosen, distances.min(1).values, rtol=1e-4, atol=1e-4)
    assert (codes == distances.argmin(1)).double().mean() > 0.98


ranges = st.one_of(st.integers(-100, -30), st.integers(30, 90))


@pure
@given(
    st.sampled_from([*ENGINES, "scalar"]),
    st.integers(0, 2**31 - 1),
    st.integers(2, 60),
    st.sampled_from([0.3, 3, 12]),
    st.tuples(ranges, ranges),
    st.tuples(ranges, ranges),
)
def test_vectors_and_weights_of_any_size(engine, seed, clusters, spread, first, second):
    dim = 1 if engine == "scalar" else 3
    vectors, weights = normal(150, dim, seed=seed), (spread * normal(150, seed=seed + 1)).exp()
    results = []
    for size, share in (first, second):
        large, heavy = vectors * 2.0**size, weights * 2.0**share
        codebook, codes, info = kmeans(large, clusters, weights=heavy, engine=engine, iterations=4)
        assert codebook.isfinite().all()
        assert info.objective == pytest.approx(cost(large, codebook, codes, heavy), rel=1e-3)
        results.append((codebook * 2.0**-size, codes, info.objective * 2.0 ** (-2 * size - share)))
    if engine != "scalar":  # whose fp64 needs no common measure
        assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert results[0][2] == pytest.approx(results[1][2], rel=1e-2)


@every_engine
@pytest.mark.parametrize("size, share", [(126, 0), (0, 126), (-140, 0), (0, -140), (100, 126), (-140, -140)])
def test_the_ends_of_fp32_are_clustered(engine, size, share):
    whole = torch.randint(-3, 4, (200, 2), generator=torch.Generator().manual_seed(0)).double()
    weights = torch.arange(1, 201).double() % 4 + 0.5
    given = ((whole / 3 * 2.0**size).float(), (weights / 4 * 2.0**share).float())
    seen = []
    codebook, codes, info = kmeans(
        given[0], 20, weights=given[1], engine=engine, progress=lambda *step: seen.append(step)
    )
    plain = kmeans((whole / 3).float(), 20, weights=(weights / 4).float(), engine=engine)[2]
    assert codebook.isfinite().all() and len(codes.unique()) == 20
    assert info.objective == pytest.approx(cost(given[0], codebook, codes, given[1]), rel=1e-3)
    assert seen[-1][1] == pytest.approx(info.objective, rel=1e-2)
    assert info.objective == pytest.approx(plain.objective * 2.0 ** (2 * size + share), rel=0.2)


def test_assign_is_brute_force():
    vectors, centroids = normal(300, 4), normal(25, 4, seed=1)
    codes, distances = assign(vectors, centroids)
    expected = torch.cdist(vectors.double(), centroids.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert torch.equal(codes, expected.argmin(1))
    torch.testing.assert_close(distances.double(), expected.min(1).values ** 2, rtol=1e-5, atol=1e-6)


def test_chunks_change_nothing(monkeypatch):
    vectors, weights = normal(300, 3), uniform(300)
    whole = kmeans(vectors, 10, weights=weights, iterations=6, tolerance=0, engine="torch", init="random")
    monkeypatch.setattr(lloyd_module, "_SCORES", 70)
    parts = kmeans(vectors, 10, weights=weights, iterations=6, tolerance=0, engine="torch", init="random")
    assert torch.equal(parts[1], whole[1])
    torch.testing.assert_close(parts[0], whole[0])


@every_engine
def test_a_heavy_vector_is_served_well(engine):
    vectors = normal(300, 3)
    heavy = int(vectors.norm(dim=1).argmax())
    weights = torch.ones(300)
    weights[heavy] = 1e6

    def error(weights):
        codebook, codes, _ = kmeans(vectors, 5, engine=engine, weights=weights, tolerance=0)
        return float((vectors[heavy] - codebook[codes[heavy]]).norm())

    assert error(None) > 0.5
    assert error(weights) < 1e-2


@every_engine
def test_weights_lower_the_weighted_error(engine):
    vectors = normal(1000, 2)
    weights = torch.where(vectors[:, 0] > 0, 100.0, 1.0)
    weighted = kmeans(vectors, 16, engine=engine, weights=weights)
    plain = kmeans(vectors, 16, engine=engine)
    assert cost(vectors, *weighted[:2], weights) < 0.8 * cost(vectors, *plain[:2], weights)
    assert cost(vectors, *plain[:2]) < cost(vectors, *weighted[:2])


@every_engine
def test_integer_weights_are_duplicated_vectors(engine):
    vectors = normal(200, 3)
    counts = torch.randint(1, 6, (200,), generator=torch.Generator().manual_seed(2))
    start = vectors[:8].clone()
    settings = dict(init=start, iterations=15, tolerance=0.0, engine=engine)
    weighted = kmeans(vectors, 8, weights=counts.float(), **settings)
    duplicated = kmeans(vectors.repeat_interleave(counts, 0), 8, **settings)
    assert weighted[2].objective == pytest.approx(duplicated[2].objective, rel=1e-4)
    torch.testing.assert_close(weighted[0], duplicated[0], rtol=1e-3, atol=1e-3)


@every_engine
def test_the_scale_of_the_weights_does_not_matter(engine):
    vectors, weights = normal(300, 3), uniform(300)
    one, two = (
        kmeans(vectors, 10, engine=engine, weights=weights),
        kmeans(vectors, 10, engine=engine, weights=weights * 1024),
    )
    assert torch.equal(one[1], two[1])
    assert two[2].objective == pytest.approx(1024 * one[2].objective)


@every_engine
def test_vectors_of_no_weight_do_not_count(engine):
    vectors = normal(200, 3)
    weights = torch.ones(200)
    weights[150:] = 0
    vectors[150:] += 100
    codebook, codes, info = kmeans(vectors, 10, engine=engine, weights=weights, iterations=60, tolerance=0)
    assert info.objective == pytest.approx(cost(vectors[:150], codebook, codes[:150]), rel=1e-5)
    assert info.objective < 1.5 * kmeans(vectors[:150], 10, engine=engine, iterations=60, tolerance=0)[2].objective
    assert codebook.isfinite().all()


@every_engine
def test_a_cluster_without_weight_stays_where_it_is(engine):
    weights = torch.ones(200)
    weights[100:] = 0
    vectors = normal(200, 3)
    vectors[100:] += 100
    start = vectors[::20].clone()
    far = start[:, 0] > 50
    moved = kmeans(vectors, 10, weights=weights, init=start, iterations=1, engine=engine)[0]
    assert 0 < far.sum() < 10
    assert torch.equal(moved[far], start[far])
    assert moved.isfinite().all() and not (moved[~far] == start[~far]).all()


@every_engine
@pytest.mark.parametrize("seed", range(5))
def test_empty_clusters_are_moved_where_they_help(seed, engine):
    # Nearly every start lies on the repeated vector, so that nearly every cluster starts empty.
    vectors = torch.cat([torch.full((193, 2), 0.5), 100 * normal(7, 2)])
    codebook, codes, info = kmeans(vectors, 8, engine=engine, seed=seed)
    assert info.objective == 0
    assert torch.equal(codebook[codes], vectors)
    assert len(codes.unique()) == 8


@every_engine
def test_more_clusters_than_distinct_vectors_lose_nothing(engine):
    vectors = normal(5, 2).repeat(20, 1)
    codebook, codes, info = kmeans(vectors, 30, engine=engine)
    assert codebook.shape == (30, 2) and codebook.isfinite().all()
    assert torch.equal(codebook[codes], vectors) and info.objective == 0
    assert info.unused.sum() == 25 and not info.unused[codes].any()


@every_engine
@pytest.mark.parametrize("weighted", [False, True])
def test_a_cluster_for_every_vector_loses_nothing(weighted, engine):
    vectors = normal(30, 3)
    codebook, codes, info = kmeans(vectors, 30, engine=engine, weights=uniform(30) if weighted else None)
    assert torch.equal(codebook[codes], vectors)
    assert len(codes.unique()) == 30 and info.objective == 0
    assert codebook.data_ptr() != vectors.data_ptr()


@every_engine
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_clustered_in_fp32(dtype, engine):
    vectors = normal(400, 3).to(dtype)
    half, full = kmeans(vectors, 16, engine=engine), kmeans(vectors.float(), 16, engine=engine)
    assert half[0].dtype == torch.float32
    assert torch.equal(half[0], full[0]) and torch.equal(half[1], full[1])


def test_vectors_of_a_graph_and_of_any_layout_are_taken():
    vectors = normal(3, 400).t().requires_grad_()
    codebook, codes, _ = kmeans(vectors, 16, weights=uniform(400).half())
    assert not codebook.requires_grad
    expected = kmeans(vectors.detach().contiguous(), 16, weights=uniform(400).half().float())
    assert torch.equal(codebook, expected[0]) and torch.equal(codes, expected[1])


@pytest.mark.parametrize(
    ("vectors", "arguments", "message"),
    [
        (torch.zeros(8), {}, "floating-point tensor"),
        (torch.zeros(2, 2, 2), {}, "floating-point tensor"),
        (torch.zeros(8, 2, dtype=torch.int64), {}, "floating-point tensor.*int64"),
        (torch.zeros(0, 2), {}, "N, d > 0"),
        (torch.zeros(8, 0), {}, "N, d > 0"),
        (torch.zeros(8, 2), dict(num_clusters=1), "between 2 and the 8 vectors.*got 1"),
        (torch.zeros(8, 2), dict(num_clusters=9), "between 2 and the 8 vectors.*got 9"),
        (torch.zeros(8, 2), dict(iterations=-1), "iterations must not be negative"),
        (
            torch.zeros(8, 2),
            dict(init="best"),
            "init must be one of density, random or a tensor of centroids, got 'best'",
        ),
        (
            torch.zeros(8, 2),
            dict(engine="abacus"),
            "engine must be one of auto, scalar, cpu, cuda, torch, got 'abacus'",
        ),
        (torch.zeros(8, 2), dict(engine="scalar"), "engine='scalar' clusters numbers, got vectors of dimension 2"),
        (torch.zeros(8, 17), dict(engine="cpu"), "up to 16 dimensions and 65536 clusters, got 17"),
        (torch.zeros(8, 2), dict(init=torch.zeros(3, 2)), r"init must hold \(4, 2\) finite values"),
        (torch.zeros(8, 2), dict(init=torch.full((4, 2), float("nan"))), "init must hold .* with NaN"),
        (torch.zeros(8, 2), dict(quality="superb"), "quality must be one of fast, default, best, got 'superb'"),
        (torch.zeros(8, 2), dict(threads=0), "threads must be at least 1, got 0"),
        (torch.full((8, 2), float("nan")), {}, "NaN or infinite"),
        (torch.full((8, 2), float("inf")), {}, "NaN or infinite"),
        (torch.zeros(8, 2), dict(weights=torch.ones(7)), r"weights must have shape \(8,\)"),
        (torch.zeros(8, 2), dict(weights=torch.ones(8, 1)), r"weights must have shape \(8,\)"),
        (torch.zeros(8, 2), dict(weights=torch.zeros(8)), "not all 0"),
        (torch.zeros(8, 2), dict(weights=-torch.eye(8)[0]), "not negative"),
        (torch.zeros(8, 2), dict(weights=torch.full((8,), float("nan"))), "finite"),
        (torch.zeros(8, 2), dict(weights=torch.full((8,), float("inf"))), "finite"),
    ],
)
def test_what_cannot_be_clustered_is_refused(vectors, arguments, message):
    with pytest.raises(ValueError, match=message):
        kmeans(vectors, **{"num_clusters": 4, **arguments})
