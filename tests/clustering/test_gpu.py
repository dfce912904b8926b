"""The CUDA engine: its kernels in Triton's interpreter, compiled without a GPU, and on one; the density start.

The interpreter must be asked for before Triton is imported, so those tests run in a process of their own, which
`tests/test_interpreter.py` starts.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import re
import subprocess
from pathlib import Path

import pytest
import torch

from cluscomp_peft.clustering.start import density_start
from tests.grids import grid, quick
from tests.ops.harness import INTERPRETED, needs_triton

ROOT = Path(__file__).resolve().parents[2]
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own")
direct = pytest.mark.skipif(INTERPRETED, reason="needs no interpreter")
# The package has a function of the same name.
reference = importlib.import_module("cluscomp_peft.clustering.lloyd")


@pytest.fixture
def gpu():
    return importlib.import_module("cluscomp_peft.clustering.gpu")


@pytest.fixture
def kernels():
    return importlib.import_module("cluscomp_peft.clustering.gpu_kernels")


def normal(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def uniform(size: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)) * 5


def odd(kind: str, total: int, dim: int) -> torch.Tensor:
    vectors = normal(total, dim, seed=dim)
    if kind == "duplicates":
        vectors[total // 3 :] = vectors[torch.arange(total - total // 3) % 40]
    elif kind == "far away":
        vectors = vectors * 0.01 + 1000
    elif kind == "outlier":
        vectors[17] = 1e6
    return vectors


def squares(vectors: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    return (vectors[:, None].double() - centroids[None].double()).square().sum(2)


@direct
@needs_triton
@pytest.mark.parametrize(
    "dim, spread, capability",
    [
        (4, True, 80),
        (4, False, 90),
        pytest.param(8, False, 90, marks=pytest.mark.slow),
        pytest.param(11, False, 90, marks=pytest.mark.slow),
        pytest.param(16, True, 90, marks=pytest.mark.slow),
    ],
)
def test_the_assignment_compiles_for_a_gpu_and_spills_nothing(kernels, tmp_path, monkeypatch, dim, spread, capability):
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    rows, registers = kernels.launch_shape(dim)
    constants = dict(DIM=dim, ROWS=rows, TILE=32, PRUNE=True, SPREAD=spread, DOT=dim > 11, PRECISION="ieee")
    types = {"order": "*i64", "codes": "*i32", "found": "*i32", "spread": "*i8"}
    types |= dict.fromkeys(("total", "clusters", "padded"), "i32") | dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        kernels.find_nearest, {name: types.get(name, "*fp32") for name in kernels.find_nearest.arg_names}, constants
    )
    target, options = GPUTarget("cuda", capability, 32), {"num_warps": 4, "maxnreg": registers}
    compiled = compile(source, target=target, options=options)
    assert "fma.rn.f32" in compiled.asm["ptx"]
    used = resources(compiled.asm["cubin"], tmp_path)
    assert used["STACK"] == 0 and used["REG"] <= registers  # what is spilled goes to the stack


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    """What a thread of a compiled kernel takes, by the tool that Triton brings."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton brings no cuobjdump")
    (folder / "kernel.cubin").write_bytes(cubin)
    report = subprocess.run(
        [tool, "-res-usage", folder / "kernel.cubin"], check=True, capture_output=True, text=True
    ).stdout
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|SHARED):(\d+)", report)}


@direct
@needs_triton
def test_sizes_of_matrices_do_not_make_triton_compile_anew(gpu, kernels):
    for kernel, sizes in ((kernels.find_nearest, {"total", "clusters"}), (kernels.keep_nearer, {"total"})):
        assert {parameter.name for parameter in kernel.params if parameter.do_not_specialize} == sizes
    # The third size is a multiple of the boxes of two levels, whatever the matrix.
    assert gpu._TILE**3 % 16 == 0


@direct
def test_the_engine_says_what_it_needs(gpu):
    assert not gpu.available("cpu")
    with pytest.raises(ValueError, match=r"CUDA device, got cpu.*engine='torch'"):
        gpu.lloyd_triton(normal(50, 4), 5, None, None, 1, 0.0, 0, 1, None)


@interpreted
@grid(dim=quick(range(1, 17), 1, 4, 6, 13))
def test_codes_are_nearest_in_every_dimension(gpu, dim):
    check_nearest(gpu, ("plain", "duplicates", "far away", "outlier")[dim % 4], dim)


def check_nearest(gpu, kind: str, dim: int, device: str = "cpu", total: int = 0, clusters: int = 0) -> None:
    vectors = odd(kind, total or 191, dim).to(device)
    centroids = vectors[: clusters or 7 + 2 * dim] + 0.25 * vectors.std(0).clamp(max=1)
    job = gpu.Clustering(vectors[None], None, centroids[None])
    job.locate()
    same, codes = job.result(0)
    assert torch.equal(same, centroids)
    distances = squares(vectors, centroids)
    least = distances.min(1).values
    found = distances.gather(1, codes[:, None])[:, 0]
    # fp32 scores tell centroids apart to about 1e-6 of the spread of neighbours.
    assert ((found - least) <= 1e-5 * least + 1e-6 * least.median()).all()
    torch.testing.assert_close(job.distances, found.float(), rtol=1e-5, atol=0)
    theirs = reference.assign(vectors - centroids.mean(0), centroids - centroids.mean(0))[1].double()
    if kind != "outlier":  # which spoils the digits of plain scores
        assert float(found.sum()) <= float(theirs.sum()) * (1 + 1e-5)


@interpreted
@grid(dim=quick([2, 13], 2))
def test_pruning_leaves_out_tiles_and_changes_nothing(gpu, kernels, monkeypatch, dim):
    centroids = normal(1100, dim, seed=1)
    vectors = centroids[:4].repeat(32, 1) + 0.02 * normal(128, dim)
    job = gpu.Clustering(vectors[None], None, centroids[None])
    tiles, lowest = [], kernels._lowest
    monkeypatch.setattr(kernels, "_lowest", lambda mask: tiles.append(0) or lowest(mask))
    job.arrange()
    job.assign(prune=False)
    codes, distances, full = job.codes.clone(), job.distances.clone(), len(tiles)
    job.sort()
    tiles.clear()
    job.assign()
    assert len(tiles) < 0.5 * full
    assert torch.equal(job.codes, codes) and torch.equal(job.distances, distances)
    # The bound is loose where codes are old.
    job.codes.copy_(torch.arange(128) * 7)
    job.assign()
    assert torch.equal(job.codes, codes) and torch.equal(job.distances, distances)


@interpreted
@grid(dim=quick([3, 13], 3))
def test_blocks_that_straddle_far_clusters_keep_their_digits(gpu, dim):
    vectors = torch.cat([normal(70, dim) - 1000, normal(70, dim, seed=1) + 1000])
    centroids = torch.cat([normal(40, dim, seed=2) + 1000, normal(40, dim, seed=3) - 1000])
    job = gpu.Clustering(vectors[None], None, centroids[None])
    job.locate()
    least = squares(vectors, centroids).min(1).values.float()
    torch.testing.assert_close(job.distances, least, rtol=1e-4, atol=0)


@interpreted
@grid(dim=[3, 16], weighted=[False, True])
def test_the_update_equals_torch(gpu, dim, weighted):
    vectors, centroids, weights = normal(250, dim), normal(12, dim, seed=1), None
    codes = torch.randint(0, 10, (250,), generator=torch.Generator().manual_seed(2))  # 10 and 11 serve nothing
    if weighted:
        weights = uniform(250)
        weights[codes == 4] = 0  # and 4 only what does not count
    distances = squares(vectors, centroids).gather(1, codes[:, None])[:, 0].float()
    job = gpu.Clustering(vectors[None], None if weights is None else weights[None], centroids[None])
    job.codes.copy_(codes)
    job.distances.copy_(distances)
    job.update()
    means, kept = job.result(0)
    expected = reference._update(vectors, centroids, codes, distances, weights)
    torch.testing.assert_close(means, expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(kept, codes)
    assert not weighted or torch.equal(means[4], centroids[4])


@interpreted
@pytest.mark.parametrize(
    "dim, clusters, weighted",
    [
        pytest.param(2, 40, False, marks=pytest.mark.slow),
        (5, 17, True),
        pytest.param(13, 11, True, marks=pytest.mark.slow),
    ],
)
def test_runs_follow_lloyd_and_only_descend(gpu, dim, clusters, weighted):
    vectors, weights = normal(127, dim), uniform(127) if weighted else None
    start = density_start(vectors, clusters, weights, 3)
    seen, plain = [], []
    centroids, codes, objective, done = gpu.lloyd_triton(
        vectors, clusters, weights, None, 3, 0.0, 3, 1, lambda *step: seen.append(step)
    )
    distances = squares(vectors, centroids)
    cost = distances.gather(1, codes[:, None])[:, 0]
    assert objective == pytest.approx(float((cost if weights is None else cost * weights.double()).sum()), rel=1e-5)
    assert [iteration for iteration, _ in seen] == list(range(1, done + 1)) and seen[-1][1] == objective
    assert all(after <= before * (1 + 1e-6) for (_, before), (_, after) in itertools.pairwise(seen))
    reference.lloyd(vectors, clusters, weights, start, 3, 0.0, 3, 1, lambda *step: plain.append(step[1]))
    assert [value for _, value in seen] == pytest.approx(plain, rel=1e-4)


@interpreted
@pytest.mark.slow
def test_the_search_of_the_density_start_equals_torch(gpu, monkeypatch):
    vectors = normal(700, 3)
    codes, distances = gpu._assign(vectors, vectors[:70])
    expected = reference.assign(vectors, vectors[:70])
    assert torch.equal(codes, expected[0])
    torch.testing.assert_close(distances, expected[1])
    start = density_start(vectors, 160, None, 1)
    assert torch.equal(density_start(vectors, 160, None, 1, gpu._assign), start)


@interpreted
def test_empty_centroids_are_put_to_use(gpu):
    vectors = normal(128, 2)
    start = torch.cat([vectors[:5], torch.full((15, 2), 1e4)])
    centroids, codes, objective, _ = gpu.lloyd_triton(vectors, 20, None, start, 5, 0.0, 0, 1, None)
    assert len(codes.unique()) == 20 and float(centroids.abs().max()) < 10
    assert objective < 0.5 * float(squares(vectors, vectors[:5]).min(1).values.sum())


@interpreted
def test_a_seed_gives_the_same_bytes_and_a_batch_equals_its_matrices(gpu):
    vectors, weights = normal(2, 63, 3), torch.stack([uniform(63), uniform(63, seed=2)])
    vectors[1] *= 0.01
    settings = (7, 5e-2, 7, 1, None)  # iterations, tolerance: they stop at different times
    many = gpu.lloyd_triton_batched(vectors, 13, weights, None, *settings)
    assert many[0].shape == (2, 13, 3) and many[1].shape == (2, 63) and many[1].dtype == torch.int64
    for b in range(2):
        one = gpu.lloyd_triton(vectors[b], 13, weights[b], None, *settings)
        assert torch.equal(one[0], many[0][b]) and torch.equal(one[1], many[1][b])
        assert one[2:] == (many[2][b], many[3][b])
    assert len(set(many[3])) > 1 and max(many[3]) < 7


@interpreted
def test_limits_are_named(gpu):
    with pytest.raises(ValueError, match=r"up to 16 dimensions, got 17"):
        gpu.lloyd_triton(normal(50, 17), 5, None, None, 1, 0.0, 0, 1, None)
    start = normal(5, 4)
    centroids, codes, _, done = gpu.lloyd_triton(normal(50, 4), 5, None, start, 0, 0.0, 0, 1, None)
    assert torch.equal(centroids, start) and done == 0
    assert torch.equal(codes, squares(normal(50, 4), start).argmin(1))


@interpreted
@pytest.mark.slow
def test_the_benchmark_script_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "recipes" / "benchmarks")
    monkeypatch.syspath_prepend(ROOT / "recipes" / "benchmarks" / "gpu")
    module = importlib.import_module("part_kmeans")
    monkeypatch.setattr(module, "LARGEST", (1600, 4800))
    flags = "--device cpu --scale 0.01 --repeat 0 --bits --dims 4 --part kmeans --output".split()
    suite = importlib.import_module("suite")
    assert suite.run_part(suite.arguments().parse_args([*flags, str(tmp_path / "new")])) == []
    check, steps = json.loads((tmp_path / "new" / "kmeans.json").read_text())["rows"]
    assert check["excess"] < 1e-5 and steps["N"] == 16 * 48 // 4 and steps["full, s"] > 0
    assert "steps d = 4" in capsys.readouterr().out


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dim", [1, 4, 6, 11, 16])
@pytest.mark.parametrize("kind", ["plain", "duplicates", "far away", "outlier"])
def test_codes_are_nearest_on_the_device(gpu, kind, dim):
    check_nearest(gpu, kind, dim, "cuda", 5000, 1500)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dim", [2, 6, 16])
def test_a_seed_gives_the_same_bytes_on_the_device(gpu, dim):
    vectors = normal(500_000, dim).cuda()
    runs = [gpu.lloyd_triton(vectors, 3000, None, None, 5, 0.0, 0, 1, None) for _ in range(2)]
    assert all(torch.equal(first, second) for first, second in zip(runs[0][:2], runs[1][:2], strict=True))
    plain = reference.lloyd(vectors, 3000, None, density_start(vectors, 3000, None, 0), 5, 0.0, 0, 1, None)[2]
    assert runs[0][2] == runs[1][2] == pytest.approx(plain, rel=1e-3)


# The density start, which needs no Triton.


@direct
@pytest.mark.parametrize("total, clusters, dim", [(2, 2, 1), (3, 2, 4), (300, 300, 3), (300, 299, 2), (5000, 700, 16)])
@pytest.mark.parametrize("zeros", [None, 0.0, 0.6])
def test_a_start_is_made_of_distinct_vectors(total, clusters, dim, zeros):
    vectors, weights = normal(total, dim) + 1000, None
    if zeros is not None:
        weights = uniform(total) * (uniform(total, seed=2) / 5 >= zeros)
    start = density_start(vectors, clusters, weights, 5)
    assert torch.equal(start, density_start(vectors, clusters, weights, 5))
    found = (start[:, None] == vectors).all(2)
    assert start.dtype == torch.float32 and (found.sum(1) == 1).all() and found.any(0).sum() == clusters
    if weights is not None and int((weights > 0).sum()) >= clusters:
        assert (weights[found.any(0)] > 0).all()


@direct
def test_a_start_copes_with_equal_and_remote_vectors():
    assert density_start(torch.ones(500, 3), 70, None, 0).shape == (70, 3)
    half = torch.cat([torch.zeros(4000, 2), normal(4000, 2) + 50])
    start = density_start(half, 640, None, 0)
    assert 1 <= int((start == 0).all(1).sum()) < 64  # equal vectors need few
    remote = normal(3000, 4)
    remote[5] = 1e6
    assert int((density_start(remote, 320, None, 0) == 1e6).all(1).sum()) <= 1


@direct
@pytest.mark.parametrize("dim, gain", [(2, 0.85), (4, 0.97)])
def test_a_start_is_better_than_random_vectors(dim, gain):
    vectors = normal(60_000, dim)
    costs = [
        float(reference.assign(vectors, start)[1].sum())
        for start in (density_start(vectors, 2000, None, 0), vectors[:2000])
    ]
    assert costs[0] < gain * costs[1]


@direct
@pytest.mark.parametrize("dim, gain", [(2, 0.7), (4, 0.85)])
def test_a_start_is_better_than_random_vectors_where_few_weights_are_large(dim, gain):
    vectors = normal(60_000, dim)
    weights = (2 * normal(60_000, 1, seed=3)[:, 0]).exp()
    costs = [
        float((weights * reference.assign(vectors, start)[1]).sum())
        for start in (density_start(vectors, 1000, weights, 0), vectors[:1000])
    ]
    assert costs[0] < gain * costs[1]


@direct
def test_a_start_follows_the_weights():
    vectors = normal(20_000, 2)
    weights = torch.where(vectors[:, 0] > 0, 100.0, 1.0)
    share = float((density_start(vectors, 3200, weights, 0)[:, 0] > 0).float().mean())
    assert 0.85 < share < 0.93  # 100^(1 / 2) : 1, but for the cells that hold both
