"""From one dense layer to a clustered one, and which layers of a model are chosen."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

from cluscomp_peft.codes import ClusterSpec, num_groups, unpack
from cluscomp_peft.compress.budget.targets import dense_linears, refuse_fused_experts
from cluscomp_peft.compress.matrix.cluster import check_finite, cluster_codes, cluster_linear
from cluscomp_peft.linear import ClusteredLinear
from tests.conftest import tiny_llama

IN, OUT = 20, 22
LOSSLESS = IN * num_groups(OUT, 4)


def normal(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def layer_of(weight: torch.Tensor, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
    layer.weight = nn.Parameter(weight.clone())
    return layer


def with_outliers(seed: int = 0) -> torch.Tensor:
    weight = normal(OUT, IN, seed=seed)
    weight[:, 3] *= 50
    weight[:, 11] *= 0.02
    weight[5] *= 30
    return weight


def relative_error(weight: torch.Tensor, layer: ClusteredLinear) -> float:
    return float((layer.decode(torch.float32) - weight).norm() / weight.norm())


@pytest.mark.parametrize("scales", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)]
)
def test_a_centroid_for_every_group_reconstructs_the_weight(scales, dtype, precision):
    weight = with_outliers()
    spec = ClusterSpec(4, LOSSLESS, 1, *scales)
    layer = cluster_linear(layer_of(weight), spec, codebook_dtype=dtype)
    assert layer.spec == spec and layer.codebook.dtype == dtype
    torch.testing.assert_close(layer.decode(torch.float32), weight, rtol=precision, atol=1e-7)


def test_scales_are_the_rms_of_columns_and_then_rows():
    weight = with_outliers()
    spec = ClusterSpec(4, 16, 1, True, True)
    _, _, scale_in, scale_out = cluster_codes(weight, spec)
    assert torch.equal(scale_in, weight.square().mean(0).sqrt().half())
    rest = weight / scale_in.float()
    torch.testing.assert_close(scale_out, rest.square().mean(1).sqrt().half())


def test_scales_pay_off_where_channels_differ():
    weight = normal(OUT, IN) * torch.logspace(-2, 1, IN)

    def error(scales):
        layer = cluster_linear(layer_of(weight), ClusterSpec(2, 64, 1, scales, scales))
        return float(((layer.decode(torch.float32) - weight).norm(dim=0) / weight.norm(dim=0)).mean())

    assert error(True) < 0.7 * error(False)


def test_scaled_channels_count_by_their_size():
    large = torch.arange(48) % 6 == 0
    # Scaled to one size, the distributions differ; only the weight of their columns tells which one matters.
    two_valued = 30 * (normal(64, 48).sign() + 0.2 * normal(64, 48, seed=1))
    weight = torch.where(large, two_valued, normal(64, 48))
    scaled = cluster_linear(layer_of(weight), ClusterSpec(2, 24, 1, True, False))
    flat = cluster_linear(layer_of(weight / weight.square().mean(0).sqrt()), ClusterSpec(2, 24))
    flat.set_parameter("scale_in", weight.square().mean(0).sqrt())
    assert relative_error(weight, scaled) < 0.85 * relative_error(weight, flat)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_empty_rows_and_columns_survive_scaling(dtype):
    weight = normal(OUT, IN)
    weight[:, 2] = 0
    weight[7] = 0
    spec = ClusterSpec(1, IN * OUT, 1, True, True)
    decoded = cluster_linear(layer_of(weight), spec, codebook_dtype=dtype).decode(torch.float32)
    assert not decoded[:, 2].any() and not decoded[7].any()
    torch.testing.assert_close(decoded, weight, rtol=2e-3, atol=1e-6)


def test_a_weight_of_zeros_stays_zero():
    layer = cluster_linear(layer_of(torch.zeros(OUT, IN)), ClusterSpec(4, 8, 1, True, True))
    assert not layer.decode().any()


def test_more_centroids_lower_the_error():
    weight = normal(OUT, IN)
    errors = [relative_error(weight, cluster_linear(layer_of(weight), ClusterSpec(2, n))) for n in (4, 16, 64)]
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2]


def test_parts_are_packed_as_the_spec_says():
    spec = ClusterSpec(4, 12, 1, True, False)
    packed, codebook, scale_in, scale_out = cluster_codes(normal(OUT, IN), spec, codebook_dtype=torch.bfloat16)
    codes = unpack(packed, spec.code_bits, num_groups(OUT, 4))
    assert codes.shape == (IN, 6) and int(codes.max()) < 12
    assert codebook.shape == (1, 12, 4) and scale_in.shape == (IN,) and scale_out is None
    assert codebook.dtype == scale_in.dtype == torch.bfloat16


@pytest.mark.parametrize("scales", [False, True])
def test_importance_lowers_the_weighted_error(scales):
    important = torch.arange(48) % 6 == 0
    importance = torch.where(important, 100.0, 0.1)
    # Another distribution in the important channels: with the same one everywhere the same centroids serve all.
    weight = torch.where(important, normal(64, 48).sign() + 0.2 * normal(64, 48, seed=1), normal(64, 48))
    spec = ClusterSpec(2, 24, 1, scales, scales)

    def errors(importance_given):
        layer = cluster_linear(layer_of(weight), spec, importance=importance_given)
        square = (layer.decode(torch.float32) - weight).square()
        return float((square * importance).sum()), float(square.sum())

    weighted, plain = errors(importance), errors(None)
    assert weighted[0] < 0.7 * plain[0]
    assert weighted[1] > plain[1]


def test_equal_importance_changes_nothing():
    weight = normal(OUT, IN)
    spec = ClusterSpec(2, 16)
    plain = cluster_codes(weight, spec)
    equal = cluster_codes(weight, spec, importance=torch.full((IN,), 4.0))
    assert torch.equal(plain[0], equal[0])
    torch.testing.assert_close(plain[1], equal[1])


def test_channels_that_were_never_excited_still_count():
    weight = normal(64, IN)
    importance = torch.zeros(IN)
    importance[4] = 1
    silent = importance == 0
    # Apart from the excited channel, so that no centroid serves both.
    weight[:, silent] += 20

    def error(weight, importance):
        layer = cluster_linear(layer_of(weight), ClusterSpec(2, 16), importance=importance, quality="best")
        return (layer.decode(torch.float32) - weight).square()

    # Did these channels not count at all, one centroid would be enough for all of them.
    assert error(weight, importance)[:, silent].sum() < 0.2 * weight[:, silent].var() * weight[:, silent].numel()


def test_the_same_seed_gives_the_same_layer():
    weight, spec = normal(OUT, IN), ClusterSpec(2, 16, 1, True, True)
    one, two = (cluster_codes(weight, spec, seed=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0], cluster_codes(weight, spec, seed=4)[0])


def test_progress_and_quality_reach_kmeans():
    fast, best = [], []
    for quality, seen in (("fast", fast), ("best", best)):
        cluster_linear(
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
    half = cluster_codes(weight, ClusterSpec(2, 16, 1, True, True))
    full = cluster_codes(weight.float(), ClusterSpec(2, 16, 1, True, True))
    assert all(torch.equal(a, b) for a, b in zip(half, full, strict=True))


@pytest.mark.parametrize("bias", [False, True])
def test_the_dense_layer_is_left_alone_and_shares_its_bias(bias):
    weight = normal(OUT, IN)
    dense = layer_of(weight, bias)
    layer = cluster_linear(dense, ClusterSpec(4, LOSSLESS, 1, True, True))
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
    layer, linear = cluster_linear(conv, spec), cluster_linear(layer_of(weight), spec)
    assert layer.conv1d and not linear.conv1d
    assert layer.bias is conv.bias
    assert (layer.in_features, layer.out_features) == (IN, OUT)
    for name in ("codes", "codebook", "scale_in", "scale_out"):
        assert torch.equal(getattr(layer, name), getattr(linear, name)), name
    x = normal(5, IN, seed=1)
    torch.testing.assert_close(layer.to_dense(torch.float32)(x), layer(x))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_no_numbers_are_refused_by_name(value):
    weight = normal(OUT, IN)
    weight[3, 4] = weight[5, 6] = value
    message = rf"model\.layers\.3\.fc has 2 NaN or infinite values of {OUT * IN}.*exclude_modules"
    with pytest.raises(ValueError, match=message):
        cluster_linear(layer_of(weight), ClusterSpec(4, 16), name="model.layers.3.fc")
    with pytest.raises(ValueError, match=message):
        check_finite(weight, "model.layers.3.fc")


@pytest.mark.parametrize("scales", [False, True])
def test_values_beyond_float16_are_refused_with_a_cure(scales):
    weight = normal(OUT, IN)
    weight[3, 4] = 1e5
    spec = ClusterSpec(4, LOSSLESS, 1, scales, scales)
    with pytest.raises(ValueError, match=r"layer 3 has values up to 1e\+05.*6\.55e\+04.*bfloat16"):
        cluster_linear(layer_of(weight), spec, name="layer 3")
    for dtype in (torch.bfloat16, torch.float32):
        layer = cluster_linear(layer_of(weight), spec, codebook_dtype=dtype)
        assert relative_error(weight, layer) < 0.01


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.down = Conv1D(4, 6)
        self.norm = nn.LayerNorm(4)


class Model(nn.Module):
    def __init__(self, listed: bool = True):
        super().__init__()
        blocks = [Block(), Block()]
        self.embed = nn.Embedding(9, 4)
        self.project = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(blocks) if listed else nn.Sequential(*blocks)
        self.head = nn.Linear(4, 9)

    def get_output_embeddings(self):
        return self.head


IN_BLOCKS = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]


def names(model: nn.Module) -> list[str]:
    found = list(dense_linears(model))
    assert all(model.get_submodule(name) is module for name, module in found)
    return [name for name, _ in found]


def test_layers_of_the_blocks_are_chosen():
    assert names(Model()) == IN_BLOCKS


def test_without_blocks_all_but_the_head_are_chosen():
    assert names(Model(listed=False)) == ["project", *IN_BLOCKS]
    assert names(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))) == ["0", "2"]
    assert names(nn.ReLU()) == []


def test_lists_without_linear_layers_do_not_hide_the_others():
    model = Model(listed=False)
    model.norms = nn.ModuleList([nn.LayerNorm(4)])
    assert names(model) == ["project", *IN_BLOCKS]


def test_a_name_that_only_begins_like_a_list_is_outside():
    model = Model()
    model.blocks_out = nn.Linear(4, 4)
    assert names(model) == IN_BLOCKS


@pytest.mark.parametrize("owner", ["embedding", "linear"])
def test_tied_weights_are_left_out(owner):
    model = Model()
    if owner == "embedding":
        model.blocks[0].up = nn.Linear(4, 9)
        model.blocks[0].up.weight = model.embed.weight
        assert names(model) == IN_BLOCKS[1:]
    else:
        model.blocks[0].up.weight = model.blocks[1].up.weight
        assert names(model) == ["blocks.0.down", "blocks.1.down"]


def test_a_layer_used_in_two_places_is_named_once():
    model = Model()
    model.blocks[1].up = model.blocks[0].up
    assert names(model) == ["blocks.0.up", "blocks.0.down", "blocks.1.down"]


def test_clustered_and_foreign_layers_are_left_out():
    class Packed(nn.Linear):
        pass

    model = Model()
    model.blocks[0].up = ClusteredLinear(4, 6, ClusterSpec(2, 4))
    model.blocks[1].up = Packed(4, 6)
    assert names(model) == ["blocks.0.down", "blocks.1.down"]


def test_the_layers_of_a_llama_are_chosen():
    modules = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    expected = [f"model.layers.{i}.{module}" for i in range(2) for module in modules]
    assert names(tiny_llama()) == expected
    assert names(tiny_llama(tie_word_embeddings=True)) == expected


def test_the_layers_of_a_gpt2_are_chosen():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    modules = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert names(model) == [f"transformer.h.0.{module}" for module in modules]


def test_models_without_fused_experts_pass():
    model = Model()
    model.conv = nn.Conv1d(4, 4, 3)
    model.query = nn.Parameter(torch.zeros(1, 3, 4))
    model.matrix = nn.Parameter(torch.zeros(3, 4))
    model.register_parameter("nothing", None)
    model.blocks[0].up = ClusteredLinear(4, 6, ClusterSpec(2, 4, num_blocks=3))
    assert refuse_fused_experts(model) is None


def test_fused_experts_are_refused_by_name():
    model = Model()
    model.blocks[1].experts = nn.Module()
    model.blocks[1].experts.gate_up = nn.Parameter(torch.zeros(8, 4, 6))
    with pytest.raises(ValueError, match=r"blocks\.1\.experts\.gate_up \(8, 4, 6\)\. Name the linear.*target_modules"):
        refuse_fused_experts(model)


def test_many_fused_experts_are_counted():
    model = nn.ModuleList(nn.ParameterDict({"w": torch.zeros(2, 3, 4)}) for _ in range(5))
    with pytest.raises(ValueError, match=r"0\.w .*1\.w .*2\.w \(2, 3, 4\) and 2 more"):
        refuse_fused_experts(model)


def test_the_fused_experts_of_a_mixtral_are_refused():
    config = MixtralConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
    )
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts\.\w+ \(4, "):
        refuse_fused_experts(MixtralForCausalLM(config))


def test_layers_with_a_computed_weight_are_left_out():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    prune.l1_unstructured(model[1], "weight", 0.5)
    assert [name for name, _ in dense_linears(model)] == ["0"]
