"""Clustered embeddings in models of transformers: on the fly and from a checkpoint, tied and not, under adapters."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    GemmaConfig,
    GPT2Config,
    T5Config,
)

from cluscomp_peft import ClusCompConfig, ClusCompQuantizationConfig, ClusteredLinear
from cluscomp_peft.cli import main
from cluscomp_peft.compress.checkpoint import compress_checkpoint
from cluscomp_peft.embedding import ClusteredEmbedding
from cluscomp_peft.export.dense import export_dense
from cluscomp_peft.hf.evaluate import evaluate, true_bits
from cluscomp_peft.hf.reading import inspect_checkpoint
from cluscomp_peft.linear import count_parameters
from cluscomp_peft.plan import Settings, plan, render
from tests.conftest import WORDS, logits_of, tiny_llama, train_briefly

COMMON = dict(vocab_size=len(WORDS), pad_token_id=0, bos_token_id=2, eos_token_id=1)
GEMMA = GemmaConfig(
    **COMMON,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=64,
)
MAKE = {
    "tied": lambda: tiny_llama(tie_word_embeddings=True),
    "untied": tiny_llama,
    "gemma": lambda: AutoModelForCausalLM.from_config(GEMMA),
    "gpt2": lambda: AutoModelForCausalLM.from_config(
        GPT2Config(**COMMON, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    ),
}
SETTINGS = dict(bits=5, embeddings=6)


@pytest.fixture(scope="module", params=MAKE)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def dense(kind, tmp_path_factory) -> str:
    torch.manual_seed(0)
    folder = str(tmp_path_factory.mktemp(f"dense-{kind}"))
    MAKE[kind]().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def compressed(kind, dense, tmp_path_factory) -> str:
    """Made by the command's way."""
    folder = str(tmp_path_factory.mktemp(f"compressed-{kind}") / "model")
    compress_checkpoint(dense, folder, ClusCompQuantizationConfig(**SETTINGS), calibration="none")
    return folder


def load(folder: str, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def on_the_fly(folder: str, **options):
    return load(folder, quantization_config=ClusCompQuantizationConfig(**SETTINGS), **options)


def is_tied(model) -> bool:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return all(head._parameters[name] is embedding._parameters[name] for name in ("codes", "codebook", "scale_in"))


def test_both_ways_make_the_same_model(kind, dense, compressed, tokens):
    fly, read = on_the_fly(dense), load(compressed)
    for model in (fly, read):
        assert type(model.get_input_embeddings()) is ClusteredEmbedding
        assert type(model.get_output_embeddings()) is ClusteredLinear
        assert is_tied(model) == (kind != "untied")
        assert model.get_input_embeddings().weight.shape == (len(WORDS), 32)
        assert model.dtype == torch.float32
    assert torch.equal(logits_of(fly, tokens), logits_of(read, tokens))


def test_it_is_the_dense_model_with_decoded_embeddings(kind, compressed, tokens):
    model = load(compressed)
    dense = copy.deepcopy(model).dequantize()
    assert isinstance(dense.get_input_embeddings(), nn.Embedding)
    assert (dense.get_output_embeddings().weight is dense.get_input_embeddings().weight) == (kind != "untied")
    assert torch.equal(dense.get_input_embeddings().weight, model.get_input_embeddings().decode(torch.float32))
    difference = (logits_of(dense, tokens) - logits_of(model, tokens)).abs().max()
    assert difference <= (1e-5 if kind == "gpt2" else 0)  # a Conv1D adds its products in another order
    settings = dict(max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(tokens[:1], **settings), dense.generate(tokens[:1], **settings))
    train_briefly(dense.requires_grad_(True), tokens, steps=1)
    assert (dense.get_output_embeddings().weight is dense.get_input_embeddings().weight) == (kind != "untied")


def test_it_is_saved_copied_and_tied_again(kind, dense, tokens, tmp_path):
    model = on_the_fly(dense)
    expected = logits_of(model, tokens)
    model.tie_weights()
    assert torch.equal(logits_of(copy.deepcopy(model), tokens), expected)
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert sum(name.endswith(("wte.codes", "embed_tokens.codes", "lm_head.codes")) for name in names) == (
        2 if kind == "untied" else 1
    )
    assert not any(name.endswith(("wte.weight", "embed_tokens.weight", "lm_head.weight")) for name in names)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == "float32" and config["quantization_config"]["version"] == 2
    again = load(tmp_path)
    assert torch.equal(logits_of(again, tokens), expected) and is_tied(again) == (kind != "untied")
    assert torch.equal(logits_of(again.to(torch.float32), tokens), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision(compressed, tokens, dtype, tmp_path):
    model = load(compressed, dtype=dtype)
    assert model.dtype == dtype and model.get_input_embeddings()(tokens).dtype == dtype
    assert model.get_input_embeddings().codebook.dtype == torch.float16
    expected = logits_of(model, tokens)
    assert expected.dtype == dtype
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(load(tmp_path), tokens), expected)


def test_the_body_alone_and_another_head(kind, compressed, tokens):
    model = load(compressed)
    body = AutoModel.from_pretrained(compressed)
    with torch.no_grad():
        assert torch.equal(body(tokens).last_hidden_state, model.base_model(tokens).last_hidden_state)
    classifier = AutoModelForSequenceClassification.from_pretrained(compressed, num_labels=2)
    assert type(classifier.get_input_embeddings()) is ClusteredEmbedding and type(classifier.score) is nn.Linear


def test_what_is_counted(kind, dense, compressed, tokens, capsys):
    model = load(compressed)
    matrices, totals = inspect_checkpoint(compressed)
    embeddings = [entry for entry in matrices if entry.name.endswith(("wte", "embed_tokens", "lm_head"))]
    assert len(embeddings) == (2 if kind == "untied" else 1) and all(entry.true_bits <= 6 for entry in embeddings)
    assert totals["embedding_bits"] == pytest.approx(embeddings[0].true_bits)
    assert totals["true_bits"] == pytest.approx(true_bits(model)) and totals["true_bits"] <= 5
    assert totals["weights"] == sum(layer.out_features * layer.in_features for layer in matrices) - sum(
        entry.out_features * entry.in_features for entry in embeddings
    )
    tensors = load_file(f"{compressed}/model.safetensors")
    stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    measured = evaluate(model, [tokens[:1]])
    all_weights = sum(parameter.numel() for parameter in load(dense).parameters())
    # scale_in of the embedding is in the model's dtype here and in that of codebooks in the file
    assert measured.all_bits == pytest.approx(8 * (stored + 2 * 32) / all_weights)
    assert count_parameters(model)[1] == all_weights
    assert main(["inspect", compressed]) == 0
    shown = capsys.readouterr().out
    name = embeddings[0].name
    assert f"embeddings clustered: {name}{', ' if kind == 'untied' else ' = '}lm_head" in shown
    assert "norms and other tensors left dense" in shown and "embeddings, norms" not in shown


def test_an_adapter_on_it(compressed, tokens, tmp_path):
    model = get_peft_model(load(compressed), ClusCompConfig(task_type="CAUSAL_LM"))
    assert not any(name.endswith(("lm_head", "embed_tokens", "wte")) for name in model.targeted_module_names)
    train_briefly(model, tokens)
    expected = logits_of(model, tokens)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits_of(PeftModel.from_pretrained(load(compressed), tmp_path / "adapter"), tokens), expected)
    merged = model.merge_and_unload()
    assert torch.equal(logits_of(merged, tokens), expected)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits_of(load(tmp_path / "merged"), tokens), expected)


def test_an_untied_head_may_be_a_target(tmp_path, tokens):
    tiny_llama().save_pretrained(tmp_path)
    config = ClusCompConfig(task_type="CAUSAL_LM", target_modules=["lm_head"])
    model = get_peft_model(on_the_fly(str(tmp_path)), config)
    train_briefly(model, tokens)
    expected = logits_of(model, tokens)
    assert torch.equal(logits_of(model.merge_and_unload(), tokens), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(target_modules=["embed_tokens"]), "names model.embed_tokens, a clustered embedding.*take no adapter"),
        (dict(target_modules=["lm_head"]), "names lm_head, a clustered embedding or a head that shares its codes"),
        (dict(modules_to_save=["lm_head"]), "names lm_head, which is clustered.*without --embeddings"),
        (dict(modules_to_save=["embed_tokens"]), "names model.embed_tokens, which is clustered.*dequantize"),
        (dict(trainable_token_indices=[3]), "trains rows of model.embed_tokens, which is.*without --embeddings"),
    ],
)
def test_what_takes_no_adapter(tmp_path_factory, settings, message, tokens):
    folder = tmp_path_factory.mktemp("tied")
    MAKE["tied"]().save_pretrained(folder)
    model = on_the_fly(str(folder))
    expected = logits_of(model, tokens)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, ClusCompConfig(**settings))
    assert torch.equal(logits_of(model, tokens), expected)


def test_a_vocabulary_of_another_size_is_refused(compressed, tokens):
    model = load(compressed)
    assert model.resize_token_embeddings(len(WORDS)) is model.get_input_embeddings()
    assert model.resize_token_embeddings(pad_to_multiple_of=8) is model.get_input_embeddings()
    for one in (model, copy.deepcopy(model)):
        with pytest.raises(ValueError, match="embedding of 96 tokens cannot be resized to 98: it is clustered"):
            one.resize_token_embeddings(len(WORDS) + 2)
    with pytest.raises(ValueError, match="cannot be resized to 128"):
        model.resize_token_embeddings(pad_to_multiple_of=64)
    assert logits_of(model, tokens).shape[-1] == len(WORDS)
    dense = model.dequantize()
    dense.resize_token_embeddings(len(WORDS) + 2)
    assert logits_of(dense, tokens).shape[-1] == len(WORDS) + 2


def test_encoder_and_decoder_share_one_vocabulary(tmp_path, tokens):
    config = T5Config(
        vocab_size=len(WORDS), d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    dense = AutoModelForSeq2SeqLM.from_config(config)
    dense.save_pretrained(tmp_path / "dense")
    compress_checkpoint(
        str(tmp_path / "dense"), str(tmp_path / "out"), ClusCompQuantizationConfig(**SETTINGS), calibration="none"
    )
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    layers = [model.shared, model.encoder.embed_tokens, model.decoder.embed_tokens, model.lm_head]
    layers = layers if config.tie_word_embeddings else layers[:3]
    assert len({id(layer.codes) for layer in layers}) == 1
    with torch.no_grad():
        expected = model(input_ids=tokens, decoder_input_ids=tokens).logits
        assert torch.equal(model.dequantize()(input_ids=tokens, decoder_input_ids=tokens).logits, expected)


def test_it_is_exported_as_the_dense_model(kind, compressed, tokens, tmp_path):
    export_dense(compressed, str(tmp_path / "dense"))
    expected = load(compressed).dequantize()
    exported = load(str(tmp_path / "dense"))
    assert type(exported.get_input_embeddings()) is type(expected.get_input_embeddings())
    assert torch.equal(logits_of(exported, tokens), logits_of(expected, tokens))


def test_it_can_be_planned_for(compressed):
    found = plan(compressed, Settings(device="cpu"))
    assert render(found)


@pytest.mark.parametrize("excluded", [["embed_tokens"], ["lm_head"]])
def test_excluded_embeddings_stay_dense(tmp_path, excluded):
    MAKE["tied"]().save_pretrained(tmp_path)
    config = ClusCompQuantizationConfig(**SETTINGS, exclude_modules=excluded)
    model = load(str(tmp_path), quantization_config=config)
    assert type(model.get_input_embeddings()) is nn.Embedding
    assert model.lm_head.weight is model.get_input_embeddings().weight
