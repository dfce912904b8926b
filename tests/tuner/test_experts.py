"""Adapters on the experts of a mixture: trained by default, where tokens went, saved, loaded and merged exactly."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cluscomp_peft import ClusCompConfig, ClusCompQuantizationConfig
from cluscomp_peft.experts import fused_stacks
from cluscomp_peft.linear import ClusteredLinear
from cluscomp_peft.tuner.layer import ClusCompLayer
from tests.conftest import logits_of, train_briefly
from tests.grids import grid
from tests.mixtures import tiny_mixture

SETTINGS = dict(group_size=2, num_clusters=16)
FAMILIES = ("mixtral", "llama4", "gpt_oss")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of dense and compressed mixtures, by family."""
    made: dict[str, tuple[str, str]] = {}

    def make(family: str) -> tuple[str, str]:
        if family not in made:
            dense, compressed = (str(tmp_path_factory.mktemp(family)) for _ in range(2))
            tiny_mixture(family).save_pretrained(dense)
            config = ClusCompQuantizationConfig(**SETTINGS)
            AutoModelForCausalLM.from_pretrained(dense, quantization_config=config).save_pretrained(compressed)
            made[family] = (dense, compressed)
        return made[family]

    return make


def load(folder: str):
    return AutoModelForCausalLM.from_pretrained(folder)


def adapted(model) -> list[str]:
    return [
        name for name, module in model.named_modules() if isinstance(module, ClusCompLayer) and ".experts." in name
    ]


@grid(family=list(FAMILIES), base=["compressed", "born", "dense"])
def test_an_adapter_trains_experts_and_merges_exactly(family, base, folders, tmp_path, tokens):
    dense, compressed = folders(family)
    folder = compressed if base == "compressed" else dense
    settings = {
        "compressed": {},
        "born": {**SETTINGS, "codebook_dtype": "float16"},
        "dense": {**SETTINGS, "base": base},
    }
    settings = settings[base]
    start = logits_of(load(compressed if base == "born" else folder), tokens)
    model = get_peft_model(load(folder), ClusCompConfig(**settings, num_blocks=1))
    assert len(adapted(model)) == 16
    assert torch.allclose(logits_of(model, tokens), start, atol=1e-5)
    losses = train_briefly(model, tokens, steps=6, lr=1e-3)
    assert losses[-1] < losses[0]
    trained = logits_of(model, tokens)
    with model.disable_adapter():
        assert torch.allclose(logits_of(model, tokens), start, atol=1e-5)

    model.save_pretrained(tmp_path / "adapter")
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(".experts." in key and key.endswith("cluscomp_delta.codebook") for key in keys) == 16
    again = PeftModel.from_pretrained(load(folder), tmp_path / "adapter")
    assert torch.equal(logits_of(again, tokens), trained)
    again.merge_adapter()
    assert torch.equal(logits_of(again, tokens), trained)
    again.unmerge_adapter()
    assert torch.equal(logits_of(again, tokens), trained)

    merged = again.merge_and_unload()
    if base == "compressed":
        assert torch.equal(logits_of(merged, tokens), trained)
        layers = [module for module in merged.modules() if isinstance(module, ClusteredLinear)]
        assert {layer.spec.num_blocks for layer in layers} == {1}  # the bits of the base
        merged.save_pretrained(tmp_path / "merged")
        assert torch.equal(logits_of(load(tmp_path / "merged"), tokens), trained)
    else:
        assert len(fused_stacks(merged)) == 4 and merged.state_dict().keys() == load(dense).state_dict().keys()
        assert torch.allclose(logits_of(merged, tokens), trained, atol=1e-5)
        merged.save_pretrained(tmp_path / "merged")
        assert torch.equal(logits_of(load(tmp_path / "merged"), tokens), logits_of(merged, tokens))


def test_only_experts_with_tokens_get_a_gradient(folders, tokens):
    model = get_peft_model(load(folders("mixtral")[1]), ClusCompConfig())
    model(input_ids=tokens[:1, :1], labels=tokens[:1, :1]).logits.sum().backward()
    deltas = {
        name: parameter
        for name, parameter in model.named_parameters()
        if ".experts." in name and name.endswith("cluscomp_delta.default.codebook")
    }
    used = {name for name, parameter in deltas.items() if parameter.grad is not None}
    assert len(deltas) == 16 and len(used) == 8  # 2 of 4 experts, 2 matrices, 2 layers
    assert all(bool(deltas[name].grad.any()) for name in used)


def test_experts_are_named_by_their_parameter_as_elsewhere_in_peft(folders, tmp_path, tokens):
    for folder, settings in zip(folders("mixtral"), (SETTINGS, {}), strict=True):
        config = ClusCompConfig(target_parameters=["mlp.experts.down_proj"], **settings)
        model = get_peft_model(load(folder), config)
        layers = [name for name, module in model.named_modules() if isinstance(module, ClusCompLayer)]
        assert layers == [
            f"base_model.model.model.layers.{block}.mlp.experts.{expert}.down_proj"
            for block in range(2)
            for expert in range(4)
        ]
        assert len(fused_stacks(model)) == (2 if settings else 0)  # gate_up_proj stays as it was
        train_briefly(model, tokens)
        model.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(load(folder), tmp_path / "adapter")
        assert torch.equal(logits_of(again, tokens), logits_of(model, tokens))
    both = ClusCompConfig(target_parameters=["down_proj"], target_modules=["q_proj"])
    model = get_peft_model(load(folders("mixtral")[1]), both)
    assert len([module for module in model.modules() if isinstance(module, ClusCompLayer)]) == 10
    with pytest.raises(ValueError, match=r"'mlp\.gate\.weight', which is no parameter of experts.*down_proj, gate_up"):
        get_peft_model(load(folders("mixtral")[1]), ClusCompConfig(target_parameters=["mlp.gate.weight"]))
    with pytest.raises(ValueError, match="not to the regular expression"):
        ClusCompConfig(target_parameters=["down_proj"], target_modules=".*q_proj")


def test_a_refused_adapter_leaves_experts_in_their_parameter(folders, tokens):
    model = load(folders("mixtral")[0])
    expected, keys = logits_of(model, tokens), model.state_dict().keys()
    with pytest.raises(ValueError, match="num_blocks=99"):
        get_peft_model(model, ClusCompConfig(**SETTINGS, num_blocks=99))
    assert model.state_dict().keys() == keys and len(fused_stacks(model)) == 4
    assert torch.equal(logits_of(model, tokens), expected)


def test_transformers_own_loading(folders, tmp_path, tokens):
    model = load(folders("gpt_oss")[1])
    model.add_adapter(ClusCompConfig())
    train_briefly(model, tokens)
    trained = logits_of(model, tokens)
    model.save_pretrained(tmp_path / "adapter")
    other = load(folders("gpt_oss")[1])
    other.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits_of(other, tokens), trained)


def test_checkpointing_of_activations(folders, tokens):
    gradients = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(load(folders("mixtral")[1]), ClusCompConfig(init_weights=False))
        if checkpoint:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        model(input_ids=tokens, labels=tokens).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 60
    assert all(torch.equal(value, gradients[1][name]) for name, value in gradients[0].items())
