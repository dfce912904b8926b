"""The checkpoint format: on the fly, pre-clustered, other heads, dtypes, dequantising."""

from __future__ import annotations

import json

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from cluscomp_peft import ClusCompQuantizationConfig, ClusteredLinear
from cluscomp_peft.codes import code_bits
from cluscomp_peft.hf.evaluate import true_bits
from tests.conftest import config_for, logits_of, tiny_llama


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_bits_are_never_exceeded(tmp_path, bits):
    tiny_llama(hidden_size=64, intermediate_size=160).save_pretrained(tmp_path)
    config = ClusCompQuantizationConfig(bits=bits)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    layers = [module for module in model.modules() if isinstance(module, ClusteredLinear)]
    assert len(layers) == 14
    assert all(layer.true_bits <= bits for layer in layers)
    assert true_bits(model) <= bits


def test_true_bits_are_the_bytes_in_the_file(compressed_dir):
    model = AutoModelForCausalLM.from_pretrained(compressed_dir)
    tensors = load_file(f"{compressed_dir}/model.safetensors")
    stored = sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in tensors.items()
        if name.endswith((".codes", ".codebook", ".scale_in", ".scale_out"))
    )
    layers = [module for module in model.modules() if isinstance(module, ClusteredLinear)]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    assert true_bits(model) == 8 * stored / weights
    codes = tensors["model.layers.0.mlp.up_proj.codes"]
    assert codes.dtype == torch.uint8
    assert codes.shape == (32, -(-18 * code_bits(12) // 8))


def test_no_dense_weight_is_in_the_file(compressed_dir):
    names = load_file(f"{compressed_dir}/model.safetensors").keys()
    assert not any("proj.weight" in name for name in names)


def test_the_dense_model_is_close(dense_dir, tokens):
    expected = logits_of(AutoModelForCausalLM.from_pretrained(dense_dir), tokens)
    config = ClusCompQuantizationConfig(group_size=1, num_clusters=256, codebook_dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(dense_dir, quantization_config=config)
    assert (logits_of(model, tokens) - expected).norm() / expected.norm() < 0.05


def test_the_layout_is_short_and_names_what_is_clustered(compressed_dir):
    config = json.load(open(f"{compressed_dir}/config.json"))["quantization_config"]
    assert config["version"] == 1
    assert len(config["layout"]) == 7
    assert "model.layers.*.self_attn.k_proj" in config["layout"]


def test_only_some_layers(dense_dir, tokens, tmp_path):
    config = ClusCompQuantizationConfig(
        group_size=3,
        num_clusters=12,
        target_modules=["mlp.up_proj", "q_proj"],
        exclude_modules=["layers.0.mlp.up_proj"],
    )
    model = AutoModelForCausalLM.from_pretrained(dense_dir, quantization_config=config)
    names = {name for name, module in model.named_modules() if isinstance(module, ClusteredLinear)}
    assert names == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    }
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded, tokens), logits_of(model, tokens))


def test_other_heads_of_the_same_checkpoint(compressed_dir, tokens):
    causal = AutoModelForCausalLM.from_pretrained(compressed_dir)
    body = AutoModel.from_pretrained(compressed_dir)
    with torch.no_grad():
        assert torch.equal(body(tokens).last_hidden_state, causal.model(tokens).last_hidden_state)
    classifier = AutoModelForSequenceClassification.from_pretrained(compressed_dir, num_labels=2)
    assert type(classifier.score) is torch.nn.Linear
    assert isinstance(classifier.model.layers[0].mlp.up_proj, ClusteredLinear)


def test_a_body_saved_alone_loads_under_a_head(compressed_dir, tokens, tmp_path):
    body = AutoModel.from_pretrained(compressed_dir)
    body.save_pretrained(tmp_path)
    causal = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(causal.model(tokens).last_hidden_state, body(tokens).last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_codes_and_codebooks_keep_their_dtype(compressed_dir, dtype):
    model = AutoModelForCausalLM.from_pretrained(compressed_dir, dtype=dtype)
    layer = model.model.layers[0].mlp.up_proj
    assert (layer.codes.dtype, layer.codebook.dtype, layer.scale_in.dtype) == (
        torch.uint8,
        torch.float16,
        torch.float16,
    )
    assert model.model.embed_tokens.weight.dtype == dtype


def test_moving_to_another_dtype_leaves_the_codes_alone(compressed_dir, tokens):
    model = AutoModelForCausalLM.from_pretrained(compressed_dir)
    codes = model.model.layers[0].mlp.up_proj.codes.clone()
    expected = logits_of(model, tokens)
    model.to(torch.bfloat16)
    assert torch.equal(model.model.layers[0].mlp.up_proj.codes, codes)
    assert torch.allclose(logits_of(model, tokens).float(), expected, atol=0.5)


def test_biases_and_conv1d(tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=96, n_positions=32))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "dense")
    tokens = torch.randint(0, 96, (2, 8))
    config = ClusCompQuantizationConfig(group_size=2, num_clusters=60)
    clustered = GPT2LMHeadModel.from_pretrained(tmp_path / "dense", quantization_config=config)
    layer, dense = clustered.transformer.h[0].mlp.c_fc, model.transformer.h[0].mlp.c_fc
    assert torch.equal(layer.bias, dense.bias)
    assert (layer.weight - dense.weight).norm() / dense.weight.norm() < 0.3
    clustered.save_pretrained(tmp_path / "compressed")
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "compressed")
    assert torch.equal(logits_of(loaded, tokens), logits_of(clustered, tokens))


def test_dequantize_gives_a_plain_model(compressed_dir, tokens, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(compressed_dir)
    expected = logits_of(model, tokens)
    plain = model.dequantize()
    assert not any(isinstance(module, ClusteredLinear) for module in plain.modules())
    assert torch.equal(logits_of(plain, tokens), expected)
    plain.save_pretrained(tmp_path)
    assert "quantization_config" not in json.load(open(tmp_path / "config.json"))
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path), tokens), expected)


@pytest.mark.parametrize("way", ["peft", "mixin"])
def test_a_model_with_an_adapter_is_not_dequantized(compressed_dir, tokens, way):
    model = AutoModelForCausalLM.from_pretrained(compressed_dir)
    if way == "peft":
        wrapped = get_peft_model(model, config_for("compressed", init_weights=False))
    else:
        model.add_adapter(config_for("compressed", init_weights=False))
        wrapped = model
    expected = logits_of(wrapped, tokens)
    with pytest.raises(ValueError, match=r"q_proj has an adapter.*merge_and_unload"):
        wrapped.dequantize()
    assert torch.equal(logits_of(wrapped, tokens), expected)
    if way == "peft":
        dense = wrapped.merge_and_unload().dequantize()
        assert not any(isinstance(module, ClusteredLinear) for module in dense.modules())
        assert torch.allclose(logits_of(dense, tokens), expected, atol=1e-4)


def test_sharded_checkpoints(compressed_dir, tokens, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(compressed_dir)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded, tokens), logits_of(model, tokens))


def test_tied_embeddings_stay_tied(tmp_path, tokens):
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "dense")
    config = ClusCompQuantizationConfig(group_size=2, num_clusters=9)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "compressed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "compressed")
    assert torch.equal(logits_of(loaded, tokens), logits_of(model, tokens))


def test_device_map_on_one_device(compressed_dir, tokens):
    expected = logits_of(AutoModelForCausalLM.from_pretrained(compressed_dir), tokens)
    model = AutoModelForCausalLM.from_pretrained(compressed_dir, device_map="cpu")
    assert torch.equal(logits_of(model, tokens), expected)
