"""A dense model in memory is clustered by what its layers are given on text, where text can be had."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from cluscomp_peft import ClusCompConfig
from tests.conftest import tiny_llama

TARGET = "model.layers.1.mlp.gate_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A dense model of bytes, whose second block is given far more in one of its channels than in the others."""
    path = str(tmp_path_factory.mktemp("bytes"))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(["<eos>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(path)
    model = tiny_llama(vocab_size=len(alphabet) + 1, max_position_embeddings=128)
    model.model.layers[1].post_attention_layernorm.weight.data[8] = 40.0
    model.save_pretrained(path)
    return path


def clustered(folder: str, **settings):
    model = AutoModelForCausalLM.from_pretrained(folder)
    return get_peft_model(model, ClusCompConfig(task_type="CAUSAL_LM", bits=4, num_blocks=1, **settings))


def output_error(folder: str, model) -> float:
    """Of the target, relative, on text."""
    dense = AutoModelForCausalLM.from_pretrained(folder)
    inputs = []
    layer = dense.get_submodule(TARGET)
    layer.register_forward_hook(lambda _, args, out: inputs.append(args[0]))
    with torch.no_grad():
        dense(input_ids=torch.randint(1, 200, (4, 64), generator=torch.Generator().manual_seed(3)))
        stored = model.base_model.model.get_submodule(TARGET).base_layer.decode(torch.float32)
        right, found = layer(inputs[0]), inputs[0] @ stored.T
    return float((found - right).square().sum() / right.square().sum())


def test_weights_of_large_inputs_are_stored_better(folder, capsys):
    aware, told = clustered(folder), capsys.readouterr().err
    assert "weighs errors by the inputs of each layer" in told and "without calibration text" not in told
    blind, told = clustered(folder, calibration="none"), capsys.readouterr().err
    assert "clustered without calibration text" in told
    assert output_error(folder, aware) < 0.7 * output_error(folder, blind)


def test_codes_alone_are_found_by_it_too(folder):
    aware, blind = clustered(folder, base="dense"), clustered(folder, base="dense", calibration="none")
    saved = [get_peft_model_state_dict(model) for model in (aware, blind)]
    (key,) = (key for key in saved[0] if TARGET in key and "codes" in key)
    assert not torch.equal(saved[0][key], saved[1][key])


def test_the_pass_leaves_the_model_as_it_was(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.layers[0].train()
    flags = [module.training for module in model.modules()]
    get_peft_model(model, ClusCompConfig(task_type="CAUSAL_LM", bits=2.5, target_modules=["layers.1.mlp.up_proj"]))
    kept = [module.training for name, module in model.named_modules() if "up_proj" not in name]
    assert any(flags) and any(kept) and not all(kept)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_text_of_ones_own(folder, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("One day a fox met a bear. " * 40)
    assert torch.isfinite(clustered(folder, calibration=str(text))(input_ids=torch.tensor([[5, 6]])).logits).all()
    assert "weighs errors" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"missing\.txt"):
        clustered(folder, calibration=str(tmp_path / "missing.txt"))


def test_what_text_cannot_say_is_said(capsys):
    config = dict(task_type="CAUSAL_LM", bits=2.5)
    get_peft_model(tiny_llama(), ClusCompConfig(**config))
    assert "without calibration text" in (told := capsys.readouterr().err) and "no tokenizer" in told
    with pytest.raises(ValueError, match=r'no tokenizer.*choose calibration="none"'):
        get_peft_model(tiny_llama(), ClusCompConfig(**config, calibration="builtin"))
    with pytest.raises(ValueError, match="calibration must be"):
        ClusCompConfig(calibration=3)
