"""Error feedback: codes and codebook for the outputs of a layer, against brute force and plain K-means."""

from __future__ import annotations

import pytest
import torch

from cluscomp_peft.clustering import kmeans
from cluscomp_peft.codes import group, ungroup
from cluscomp_peft.compress.matrix.feedback import damp, feedback_factor, refine_codes


def problem(out_features=24, in_features=40, tokens=400, group_size=3, clusters=32, seed=0):
    """Weight, K-means' codes and codebook, and second moments of inputs that go together, as activations do."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator)
    mixing = torch.randn(in_features, in_features, generator=generator)
    x = torch.randn(tokens, in_features, generator=generator) @ mixing + 0.5
    hessian = x.t() @ x / tokens
    vectors = group(weight, group_size)
    weights = hessian.diagonal().repeat_interleave(vectors.shape[1])
    codebook, codes, _ = kmeans(vectors.reshape(-1, group_size), clusters, weights=weights)
    return weight, codes.view(in_features, -1), codebook, hessian


def loss(weight, codes, codebook, hessian):
    rest = weight - ungroup(codebook[codes], weight.shape[0])
    return float(((rest @ hessian) * rest).sum(dtype=torch.float64))


@pytest.mark.parametrize("out_features", [24, 23])  # whole groups, and a padded last one
@pytest.mark.parametrize("group_size", [1, 3, 4])
def test_feedback_lowers_the_error_of_the_outputs(out_features, group_size):
    weight, codes, codebook, hessian = problem(out_features, group_size=group_size, clusters=16)
    before = loss(weight, codes, codebook, damp(hessian))
    refined, centroids = refine_codes(weight, codes, codebook, hessian)
    after = loss(weight, refined, centroids, damp(hessian))
    assert after < 0.65 * before
    assert refined.shape == codes.shape and 0 <= int(refined.min()) and int(refined.max()) < len(codebook)


def test_more_sweeps_never_hurt():
    weight, codes, codebook, hessian = problem()
    losses = []
    for sweeps in (0, 1, 2, 4):
        refined, centroids = refine_codes(weight, codes, codebook, hessian, sweeps=sweeps, solver_steps=30)
        losses.append(loss(weight, refined, centroids, damp(hessian)))
    assert losses == sorted(losses, reverse=True)


def test_uncorrelated_inputs_leave_nothing_to_feed_back():
    # With H = I every channel is on its own, and the nearest centroid is the best code there is.
    weight, codes, codebook, _ = problem()
    refined, _ = refine_codes(weight, codes, codebook, torch.eye(weight.shape[1]), sweeps=0, solver_steps=0)
    expected = torch.cdist(group(weight, 3).reshape(-1, 3), codebook).argmin(1).view_as(codes)
    assert torch.equal(refined, expected)


@pytest.mark.parametrize("out_features", [12, 11])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_codebook_is_the_least_squares_solution_for_its_codes(weighted, out_features):
    weight, codes, codebook, hessian = problem(out_features=out_features, in_features=20, clusters=8)
    counts = torch.logspace(-2, 2, out_features) if weighted else None
    refined, centroids = refine_codes(
        weight, codes, codebook, hessian, output_weight=counts, sweeps=1, solver_steps=200
    )
    damped = damp(hessian).double()
    # ∂L/∂C: the slope of the loss summed over the vectors of each centroid vanishes at the optimum.
    rest = (weight - ungroup(centroids[refined], weight.shape[0])).double()
    rest = rest if counts is None else rest * counts[:, None]
    slope = group(rest @ damped, 3).reshape(-1, 3)
    sums = torch.zeros(len(codebook), 3, dtype=torch.float64).index_add_(0, refined.flatten(), slope)
    scale = group(weight.double() @ damped, 3).abs().sum()
    assert float(sums.abs().max()) < 1e-4 * float(scale)


def test_dead_channels_and_few_tokens_are_survived():
    weight, codes, codebook, hessian = problem(tokens=5)  # rank 5 of 40
    hessian[7], hessian[:, 7] = 0, 0
    refined, centroids = refine_codes(weight, codes, codebook, hessian)
    assert bool(torch.isfinite(centroids).all())
    assert loss(weight, refined, centroids, damp(hessian)) < loss(weight, codes, codebook, damp(hessian))


def test_the_factor_is_the_cholesky_factor_of_the_inverse():
    hessian = damp(problem()[3])
    factor = feedback_factor(hessian).double()
    torch.testing.assert_close(factor.t() @ factor, torch.linalg.inv(hessian.double()), rtol=1e-3, atol=1e-6)


def test_moments_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="not positive"):
        feedback_factor(-torch.eye(4))
