"""Which layers of a model are clustered unless the user says otherwise."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

from cluscomp_peft.codes import ClusterSpec
from cluscomp_peft.compress.budget.targets import default_targets, dense_linears, refuse_fused_experts
from cluscomp_peft.linear import ClusteredLinear
from tests.conftest import tiny_llama


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
    with pytest.raises(
        ValueError, match=r"blocks\.1\.experts\.gate_up \(8, 4, 6\)\. Either nothing says.*target_modules"
    ):
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


def test_the_layers_that_are_taken_by_default():
    assert list(default_targets(Model())) == IN_BLOCKS
    model = Model()
    model.blocks[1].experts = nn.Module()
    model.blocks[1].experts.gate_up = nn.Parameter(torch.zeros(8, 4, 6))
    with pytest.raises(ValueError, match="fused experts"):
        default_targets(model)
