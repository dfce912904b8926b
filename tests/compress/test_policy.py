"""What a user asks for is checked, and every holder of a policy chooses the same layers and the same (g, n)."""

import weakref
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from torch import nn

from cluscomp_peft import ClusCompConfig, ClusCompQuantizationConfig
from cluscomp_peft.clustering import kmeans
from cluscomp_peft.codes import ClusterSpec
from cluscomp_peft.compress.policy import CODEBOOK_DTYPES, Policy
from tests.conftest import tiny_llama

BLOCK = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]


@pytest.mark.parametrize("make", [Policy, ClusCompQuantizationConfig, ClusCompConfig])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(bits=4, group_size=4), "go together, got group_size=4 and num_clusters=None"),
        (dict(bits=4, num_clusters=64), "go together, got group_size=None and num_clusters=64"),
        (dict(group_size=4), "go together"),
        (dict(group_size=4.0, num_clusters=64), "group_size must be a whole number, got 4.0"),
        (dict(group_size=0, num_clusters=64), "group_size must be between 1 and 64, got 0"),
        (dict(group_size=65, num_clusters=64), "group_size must be between 1 and 64, got 65"),
        (dict(group_size=4, num_clusters=1), "num_clusters must be between 2 and 65536, got 1"),
        (dict(group_size=4, num_clusters=65537), "num_clusters must be between 2 and 65536, got 65537"),
        (dict(bits="4"), "bits must be a number, got '4'"),
        (dict(bits=True), "bits must be a number, got True"),
        (dict(bits=0.99), "bits must be between 1 and 8.*got 0.99"),
        (dict(bits=8.01), "bits must be between 1 and 8.*got 8.01"),
        (dict(bits=float("nan")), "bits must be between 1 and 8.*got nan"),
        (dict(codebook_dtype="int8"), "codebook_dtype must be one of .*float16, bfloat16, float32, got 'int8'"),
        (dict(quality="good"), "quality must be one of fast, default, best, got 'good'"),
    ],
)
def test_bad_settings_are_refused(make, settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


@pytest.mark.parametrize("dtype", CODEBOOK_DTYPES)
@pytest.mark.parametrize(
    ("bits", "group_size", "num_clusters"), [(1, None, None), (8, None, None), (None, 4, 64), (2.5, 64, 65536)]
)
def test_good_settings_pass(bits, group_size, num_clusters, dtype):
    policy = Policy(bits, None, group_size, num_clusters, codebook_dtype=dtype, quality="best")
    assert (policy.bits, policy.group_size, policy.num_clusters) == (bits, group_size, num_clusters)


def test_four_bits_where_nothing_is_said():
    assert Policy().bits == 4
    assert Policy(size=10**6).bits is None and Policy(group_size=4, num_clusters=64).bits is None


def test_a_policy_does_not_change():
    with pytest.raises(FrozenInstanceError):
        Policy().bits = 3
    assert replace(Policy(bits=3), seed=2) == Policy(bits=3, seed=2)


def test_the_configs_hold_the_policy_of_their_settings():
    given = dict(bits=3.5, scales=True, quality="best", seed=7)
    quantization = ClusCompQuantizationConfig(**given, target_modules=["mlp"], exclude_modules=["down_proj"])
    assert quantization.policy == Policy(**given, target_modules=("mlp",), exclude_modules=("down_proj",))
    adapter = Policy(**given, codebook_dtype="auto", cap_clusters=True)
    assert ClusCompConfig(**given).policy == adapter
    assert ClusCompConfig(**given, base="dense").policy == replace(adapter, codebook_dtype="float32")


def test_a_checkpoint_has_one_dtype_and_a_layer_in_memory_its_own():
    with pytest.raises(ValueError, match="codebook_dtype must be one of float16, bfloat16, float32, got 'auto'"):
        ClusCompQuantizationConfig(codebook_dtype="auto")
    weight = torch.zeros(2, 2, dtype=torch.bfloat16)
    assert ClusCompQuantizationConfig().policy.codebook_dtype_for(weight) == torch.float16
    assert ClusCompConfig().policy.codebook_dtype_for(weight) == torch.bfloat16


def test_targets_by_the_ends_of_their_names():
    model = tiny_llama()
    assert [*Policy().targets(model)] == [f"model.layers.{index}.{name}" for index in range(2) for name in BLOCK]
    some = Policy(target_modules=("mlp.up_proj", "q_proj"), exclude_modules=("layers.0.self_attn.q_proj",))
    found = some.targets(model)
    assert [*found] == ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    assert all(layer is model.get_submodule(name) for name, layer in found.items())
    line = some.coverage(model, found)
    assert "model.layers.*.self_attn.q_proj" in line and "(in exclude_modules)" in line


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Policy(target_modules=("proj",)), "names 'proj', but no linear layer of LlamaForCausalLM is or ends with it"),
        (Policy(target_modules=("lm_head",)), r"names 'lm_head', but it stays dense \(lm_head\): output head"),
        (Policy(exclude_modules=tuple(BLOCK)), "has no linear layer left to cluster; check exclude_modules"),
    ],
)
def test_targets_that_are_none(policy, message):
    with pytest.raises(ValueError, match=message):
        policy.targets(tiny_llama())


def test_specs_of_all_targets_are_those_of_each():
    model, policy = nn.Sequential(nn.Linear(160, 96), nn.ReLU(), nn.Linear(96, 200)), Policy(bits=2.6)
    specs = policy.specs(model)
    assert specs == {"0": policy.spec_for("0", 96, 160), "2": policy.spec_for("2", 200, 96)}
    wider = replace(policy, codebook_dtype="auto").specs(model)  # fp32 codebooks take twice the bytes
    assert wider == {name: replace(policy, codebook_dtype="float32").specs(model)[name] for name in specs} != specs


def test_a_weight_is_freed_before_kmeans(monkeypatch):
    """K-means is where memory peaks; a copy of the weight beside it would raise the peak."""
    alive = []

    def weight():
        made = torch.randn(24, 16)
        alive.append(weakref.ref(made))
        return made

    def watched(*args, **settings):
        assert alive[0]() is None
        return kmeans(*args, **settings)

    monkeypatch.setattr("cluscomp_peft.compress.policy.kmeans", watched)
    layer = Policy().cluster("layer", weight(), ClusterSpec(2, 8, scale_in=True, scale_out=True), threads=1)
    assert len(alive) == 1 and layer.codes.shape[0] == 16


def test_more_centroids_than_groups_are_refused_or_capped():
    with pytest.raises(ValueError, match="layer: num_clusters=31 is more than the 30 groups"):
        Policy(group_size=4, num_clusters=31).spec_for("layer", 9, 10)
    capped = Policy(group_size=4, num_clusters=31, cap_clusters=True).spec_for("layer", 9, 10)
    assert capped.num_clusters == 30
