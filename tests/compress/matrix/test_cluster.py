"""From one dense weight to a clustered layer."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from cluscomp_peft.clustering import kmeans
from cluscomp_peft.codes import ClusterSpec, group, num_groups, ungroup, unpack
from cluscomp_peft.compress.matrix.cluster import check_finite, cut_into_vectors
from cluscomp_peft.compress.policy import Policy
from cluscomp_peft.linear import ClusteredLinear

IN, OUT = 20, 22
LOSSLESS = IN * num_groups(OUT, 4)


def normal(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def layer_of(weight: torch.Tensor, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
    layer.weight = nn.Parameter(weight.clone())
    return layer


PARTS = ("codes", "codebook", "scale_in", "scale_out")


def cluster(dense, spec, *, codebook_dtype="float16", quality="default", seed=0, name="layer", **given):
    policy = Policy(codebook_dtype=codebook_dtype, quality=quality, seed=seed)
    return policy.cluster(name, dense, spec, **given)


def parts_of(layer: ClusteredLinear) -> list[torch.Tensor]:
    return [part for name in PARTS if (part := getattr(layer, name)) is not None]


def with_outliers(seed: int = 0) -> torch.Tensor:
    weight = normal(OUT, IN, seed=seed)
    weight[:, 3] *= 50
    weight[:, 11] *= 0.02
    weight[5] *= 30
    return weight


def relative_error(weight: torch.Tensor, layer: ClusteredLinear) -> float:
    return float((layer.decode(torch.float32) - weight).norm() / weight.norm())


@pytest.mark.parametrize("scales", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(("dtype", "precision"), [("float32", 1e-6), ("float16", 1e-3), ("bfloat16", 8e-3)])
def test_a_centroid_for_every_group_reconstructs_the_weight(scales, dtype, precision):
    weight = with_outliers()
    spec = ClusterSpec(4, LOSSLESS, 1, *scales)
    layer = cluster(layer_of(weight), spec, codebook_dtype=dtype)
    assert layer.spec == spec and layer.codebook.dtype == getattr(torch, dtype)
    torch.testing.assert_close(layer.decode(torch.float32), weight, rtol=precision, atol=1e-7)


def test_scales_are_the_rms_of_columns_and_then_rows():
    weight = with_outliers()
    spec = ClusterSpec(4, 16, 1, True, True)
    layer = cluster(weight, spec)
    assert torch.equal(layer.scale_in, weight.square().mean(0).sqrt().half())
    rest = weight / layer.scale_in.float()
    torch.testing.assert_close(layer.scale_out.data, rest.square().mean(1).sqrt().half())


def test_scales_pay_off_where_channels_differ():
    weight = normal(OUT, IN) * torch.logspace(-2, 1, IN)

    def error(scales):
        layer = cluster(layer_of(weight), ClusterSpec(2, 64, 1, scales, scales))
        return float(((layer.decode(torch.float32) - weight).norm(dim=0) / weight.norm(dim=0)).mean())

    assert error(True) < 0.7 * error(False)


def test_scaled_channels_count_by_their_size():
    large = torch.arange(48) % 6 == 0
    # Scaled to one size, the distributions differ; only the weight of their columns tells which one matters.
    two_valued = 30 * (normal(64, 48).sign() + 0.2 * normal(64, 48, seed=1))
    weight = torch.where(large, two_valued, normal(64, 48))
    scaled = cluster(layer_of(weight), ClusterSpec(2, 24, 1, True, False))
    flat = cluster(layer_of(weight / weight.square().mean(0).sqrt()), ClusterSpec(2, 24))
    flat.set_parameter("scale_in", weight.square().mean(0).sqrt())
    assert relative_error(weight, scaled) < 0.85 * relative_error(weight, flat)


def test_scaled_outputs_count_by_their_size():
    """A few large outputs carry the error of the weight; centroids have to serve them."""
    weight = normal(64, 48)
    weight[:4] *= 30
    spec = ClusterSpec(2, 16, 1, False, True)
    vectors = cut_into_vectors(weight, spec, torch.float32, None, "layer")
    assert vectors.weights.shape == (len(vectors.vectors),)
    expected = group(vectors.scale_out.square()[:, None], 2).sum(2).expand(48, -1).reshape(-1)
    torch.testing.assert_close(vectors.weights, expected)
    alike, _, _ = kmeans(vectors.vectors, 16)
    codes = torch.cdist(vectors.vectors, alike).argmin(1)
    plain = ungroup(alike[codes].view(48, -1, 2), 64) * vectors.scale_out[:, None]
    error = float((weight - plain).norm() / weight.norm())
    assert relative_error(weight, cluster(weight, spec, codebook_dtype="float32")) < 0.95 * error


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_empty_rows_and_columns_survive_scaling(dtype):
    weight = normal(OUT, IN)
    weight[:, 2] = 0
    weight[7] = 0
    spec = ClusterSpec(1, IN * OUT, 1, True, True)
    decoded = cluster(layer_of(weight), spec, codebook_dtype=dtype).decode(torch.float32)
    assert not decoded[:, 2].any() and not decoded[7].any()
    torch.testing.assert_close(decoded, weight, rtol=2e-3, atol=1e-6)


def test_a_weight_of_zeros_stays_zero():
    layer = cluster(layer_of(torch.zeros(OUT, IN)), ClusterSpec(4, 8, 1, True, True))
    assert not layer.decode().any()


def test_more_centroids_lower_the_error():
    weight = normal(OUT, IN)
    errors = [relative_error(weight, cluster(layer_of(weight), ClusterSpec(2, n))) for n in (4, 16, 64)]
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2]


def test_parts_are_packed_as_the_spec_says():
    spec = ClusterSpec(4, 12, 1, True, False)
    layer = cluster(normal(OUT, IN), spec, codebook_dtype="bfloat16")
    codes = unpack(layer.codes, spec.code_bits, num_groups(OUT, 4))
    assert codes.shape == (IN, 6) and int(codes.max()) < 12
    assert layer.codebook.shape == (1, 12, 4) and layer.scale_in.shape == (IN,) and layer.scale_out is None
    assert layer.codebook.dtype == layer.scale_in.dtype == torch.bfloat16


@pytest.mark.parametrize("scales", [False, True])
def test_importance_lowers_the_weighted_error(scales):
    important = torch.arange(48) % 6 == 0
    importance = torch.where(important, 100.0, 0.1)
    # Another distribution in the important channels: with the same one everywhere the same centroids serve all.
    weight = torch.where(important, normal(64, 48).sign() + 0.2 * normal(64, 48, seed=1), normal(64, 48))
    spec = ClusterSpec(2, 24, 1, scales, scales)

    def errors(importance_given):
        layer = cluster(layer_of(weight), spec, importance=importance_given)
        square = (layer.decode(torch.float32) - weight).square()
        return float((square * importance).sum()), float(square.sum())

    weighted, plain = errors(importance), errors(None)
    assert weighted[0] < 0.7 * plain[0]
    assert weighted[1] > plain[1]


def test_equal_importance_changes_nothing():
    weight = normal(OUT, IN)
    spec = ClusterSpec(2, 16)
    plain = cluster(weight, spec)
    equal = cluster(weight, spec, importance=torch.full((IN,), 4.0))
    assert torch.equal(plain.codes, equal.codes)
    torch.testing.assert_close(plain.codebook, equal.codebook)


def test_channels_that_were_never_excited_still_count():
    weight = normal(64, IN)
    importance = torch.zeros(IN)
    importance[4] = 1
    silent = importance == 0
    # Apart from the excited channel, so that no centroid serves both.
    weight[:, silent] += 20

    def error(weight, importance):
        layer = cluster(layer_of(weight), ClusterSpec(2, 32), importance=importance, quality="best")
        return (layer.decode(torch.float32) - weight).square()

    # Did these channels not count at all, one centroid would be enough for all of them.
    assert error(weight, importance)[:, silent].sum() < 0.5 * weight[:, silent].var() * weight[:, silent].numel()


def test_the_same_seed_gives_the_same_layer():
    weight, spec = normal(OUT, IN), ClusterSpec(2, 16, 1, True, True)
    one, two = (cluster(weight, spec, seed=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(parts_of(one), parts_of(two), strict=True))
    assert not torch.equal(one.codes, cluster(weight, spec, seed=4).codes)


def test_progress_and_quality_reach_kmeans():
    fast, best = [], []
    for quality, seen in (("fast", fast), ("best", best)):
        cluster(
            layer_of(normal(64, 64)),
            ClusterSpec(2, 64),
            quality=quality,
            progress=lambda *a, seen=seen: seen.append(a),
        )
    assert [iteration for iteration, _ in fast] == list(range(1, len(fast) + 1)) and len(fast) <= 3
    assert len(best) > 3 and best[-1][1] < fast[-1][1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_layers_are_clustered_like_their_fp32_copy(dtype):
    weight = normal(OUT, IN).to(dtype)
    half = cluster(weight, ClusterSpec(2, 16, 1, True, True))
    full = cluster(weight.float(), ClusterSpec(2, 16, 1, True, True))
    assert all(torch.equal(a, b) for a, b in zip(parts_of(half), parts_of(full), strict=True))


@pytest.mark.parametrize("bias", [False, True])
def test_the_dense_layer_is_left_alone_and_shares_its_bias(bias):
    weight = normal(OUT, IN)
    dense = layer_of(weight, bias)
    layer = cluster(dense, ClusterSpec(4, LOSSLESS, 1, True, True))
    assert layer.bias is dense.bias and (layer.bias is not None) == bias
    assert torch.equal(dense.weight, weight) and dense.weight.requires_grad
    assert not any(p.requires_grad for name, p in layer.named_parameters() if name != "bias")
    x = normal(5, IN, seed=1)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-2, atol=2e-2)


def test_a_conv1d_is_clustered_as_the_linear_layer_it_is():
    weight = normal(OUT, IN)
    conv = Conv1D(OUT, IN)
    conv.weight = nn.Parameter(weight.t().contiguous())
    spec = ClusterSpec(4, 32, 1, True, True)
    layer, linear = cluster(conv, spec), cluster(layer_of(weight), spec)
    assert layer.conv1d and not linear.conv1d
    assert layer.bias is conv.bias
    assert (layer.in_features, layer.out_features) == (IN, OUT)
    for name in PARTS:
        assert torch.equal(getattr(layer, name), getattr(linear, name)), name
    x = normal(5, IN, seed=1)
    torch.testing.assert_close(layer.to_dense(torch.float32)(x), layer(x))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_no_numbers_are_refused_by_name(value):
    weight = normal(OUT, IN)
    weight[3, 4] = weight[5, 6] = value
    message = rf"model\.layers\.3\.fc has 2 NaN or infinite values of {OUT * IN}.*exclude_modules"
    with pytest.raises(ValueError, match=message):
        cluster(layer_of(weight), ClusterSpec(4, 16), name="model.layers.3.fc")
    with pytest.raises(ValueError, match=message):
        check_finite(weight, "model.layers.3.fc")


@pytest.mark.parametrize("scales", [False, True])
def test_values_beyond_float16_are_refused_with_a_cure(scales):
    weight = normal(OUT, IN)
    weight[3, 4] = 1e5
    spec = ClusterSpec(4, LOSSLESS, 1, scales, scales)
    with pytest.raises(ValueError, match=r"layer 3 has values up to 1e\+05.*6\.55e\+04.*bfloat16"):
        cluster(layer_of(weight), spec, name="layer 3")
    for dtype in ("bfloat16", "float32"):
        layer = cluster(layer_of(weight), spec, codebook_dtype=dtype)
        assert relative_error(weight, layer) < 0.01


def test_another_weight_is_stored_in_place_of_the_layers_own():
    spec = ClusterSpec(4, 32, 1, True, True)
    dense, wanted = layer_of(normal(OUT, IN)), normal(OUT, IN, seed=1)
    layer = cluster(dense, spec, weight=wanted)
    assert layer.bias is dense.bias
    assert all(torch.equal(a, b) for a, b in zip(parts_of(layer), [*parts_of(cluster(wanted, spec))], strict=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_is_the_dtype_of_the_weight(dtype):
    dense = layer_of(normal(OUT, IN)).to(dtype)
    layer = cluster(dense, ClusterSpec(2, 16, 1, True, True), codebook_dtype="auto", weight=normal(OUT, IN, seed=1))
    assert {part.dtype for part in parts_of(layer)} == {torch.uint8, dtype}


def test_a_codebook_for_each_block_is_refused():
    with pytest.raises(ValueError, match="layer: a weight is clustered into one codebook, got num_blocks=2"):
        cluster(normal(OUT, IN), ClusterSpec(2, 16, 2))
