"""`cluscomp export --to dense`: what is equal to the clustered model, adapters merged on the way, refusals."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
)

from cluscomp_peft.cli import main
from cluscomp_peft.compress.stream import joined
from cluscomp_peft.export import dense as dense_module
from tests.conftest import WORDS, config_for, logits_of, tiny_llama, train_briefly
from tests.grids import grid


def export(*arguments: str | Path) -> int:
    return main(["export", *map(str, arguments), "--to", "dense"])


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.fixture
def refused(capsys):
    """Runs an export that must fail; returns what it prints."""

    def run(*arguments) -> str:
        capsys.readouterr()
        assert export(*arguments) == 1
        err = capsys.readouterr().err
        assert "Traceback" not in err
        return err

    return run


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
def test_logits_are_those_of_the_clustered_model(compressed_dir, tokens, tmp_path, capsys, dtype):
    out = tmp_path / "out"
    assert export(compressed_dir, out, "--dtype", dtype) == 0
    assert "14 matrices decoded to" in capsys.readouterr().out
    clustered, dense = load(compressed_dir, dtype=dtype), load(out)
    assert not hasattr(dense.config, "quantization_config") and dense.dtype == clustered.dtype
    assert torch.equal(logits_of(dense, tokens), logits_of(clustered, tokens))
    assert AutoTokenizer.from_pretrained(out)("w1 w2")["input_ids"] == [4, 5]


def test_tokenizer_chat_template_and_generation_settings_go_along(compressed_dir, tokenizer, tmp_path):
    model, source, out = load(compressed_dir), tmp_path / "source", tmp_path / "out"
    model.generation_config.update(do_sample=True, temperature=0.5)
    model.save_pretrained(source)
    tokenizer.chat_template, before = "{{ messages }}", tokenizer.chat_template
    tokenizer.save_pretrained(source)
    tokenizer.chat_template = before
    assert export(source, out) == 0
    assert AutoTokenizer.from_pretrained(out).chat_template == "{{ messages }}"
    assert load(out).generation_config.temperature == 0.5


TINY = dict(vocab_size=len(WORDS))
CLASSES = {
    "tied Llama": lambda: tiny_llama(tie_word_embeddings=True, attention_bias=True),
    "Conv1D": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **TINY)),
    "renamed head": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, **TINY)
    ),
    "no language model": lambda: BertForSequenceClassification(
        BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, **TINY)
    ),
}


@pytest.mark.parametrize("name", CLASSES)
def test_weights_of_any_class_are_those_that_dequantize_gives(name, tmp_path):
    dense, made, out = (tmp_path / part for part in ("dense", "made", "out"))
    CLASSES[name]().save_pretrained(dense)
    assert main(["compress", str(dense), str(made), "--bits", "6"]) == 0
    assert export(made, out) == 0
    kind = AutoModelForSequenceClassification if name == "no language model" else AutoModelForCausalLM
    expected = kind.from_pretrained(made).dequantize().state_dict()
    found = kind.from_pretrained(out).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) and found[key].dtype == value.dtype for key, value in expected.items())
    # The same names in the file as in that of the dense model.
    assert load_file(out / "model.safetensors").keys() == load_file(dense / "model.safetensors").keys()


@pytest.fixture
def adapted(compressed_dir, dense_dir, tokens, tmp_path):
    """A function that trains and saves an adapter: (folder of its base, folder of the adapter, its logits)."""

    def make(kind: str, **changes):
        base = compressed_dir if kind == "compressed" else dense_dir
        model = get_peft_model(load(base), config_for(kind, **changes))
        train_briefly(model, tokens)
        model.save_pretrained(tmp_path / "adapter")
        return base, tmp_path / "adapter", logits_of(model, tokens)

    return make


EXTRAS = {
    "deltas": {},
    "blocks": dict(num_blocks=3, train_scales=True),
    "tokens": dict(trainable_token_indices={"embed_tokens": [5, 6, 90]}),
    "whole modules": dict(modules_to_save=["lm_head", "norm"]),
}


@grid(extra=list(EXTRAS), kind=["compressed", "born", "dense"])
def test_an_adapter_is_merged_on_the_way(adapted, tokens, tmp_path, kind, extra):
    base, adapter, expected = adapted(kind, **EXTRAS[extra])
    assert export(base, tmp_path / "out", "--adapter", adapter) == 0
    assert torch.equal(logits_of(load(tmp_path / "out"), tokens), expected)


def test_trained_biases_are_merged(tokens, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_llama(attention_bias=True).save_pretrained(base)
    model = get_peft_model(load(base), config_for("born", bias="cluscomp_only"))
    train_briefly(model, tokens)
    model.save_pretrained(adapter)
    assert export(base, tmp_path / "out", "--adapter", adapter) == 0
    assert torch.equal(logits_of(load(tmp_path / "out"), tokens), logits_of(model, tokens))


def test_an_adapter_alone_names_its_base_and_brings_its_tokenizer(adapted, tokenizer, tokens, tmp_path):
    _, adapter, expected = adapted("compressed")
    before, tokenizer.chat_template = tokenizer.chat_template, "{{ 'tuned' }}"
    tokenizer.save_pretrained(adapter)
    tokenizer.chat_template = before
    assert export(adapter, tmp_path / "out") == 0
    assert torch.equal(logits_of(load(tmp_path / "out"), tokens), expected)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ 'tuned' }}"


def test_an_adapter_on_a_merged_base_is_added_to_what_is_there_with_a_warning(
    adapted, compressed_dir, tokens, tmp_path
):
    _, adapter, _ = adapted("compressed")
    merged = PeftModel.from_pretrained(load(compressed_dir), adapter).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    with pytest.warns(UserWarning, match="but other codebooks"):
        twice = PeftModel.from_pretrained(load(tmp_path / "merged"), adapter)
    with pytest.warns(UserWarning, match="but other codebooks"):
        assert export(tmp_path / "merged", tmp_path / "out", "--adapter", adapter) == 0
    assert torch.equal(logits_of(load(tmp_path / "out"), tokens), logits_of(twice, tokens))


@pytest.fixture
def interrupted(monkeypatch, compressed_dir, tmp_path, capsys):
    """An export that ended after its first shard, and a list of the shards that are written from now on."""
    monkeypatch.setattr(joined, "_MOST", 0)
    written, save = [], dense_module.save_tensors

    def save_one(path, tensors):
        if written:
            raise OSError(5, "the disk is broken")
        written.append(os.path.basename(path))
        save(path, tensors)

    monkeypatch.setattr(dense_module, "save_tensors", save_one)
    assert export(compressed_dir, tmp_path / "out") == 1
    assert "The 1 finished shards stay" in capsys.readouterr().err and not (tmp_path / "out").exists()
    written.clear()
    monkeypatch.setattr(
        dense_module,
        "save_tensors",
        lambda path, tensors: (written.append(os.path.basename(path)), save(path, tensors)),
    )
    return written


def test_an_export_that_ended_early_goes_on_a_block_at_a_time(interrupted, compressed_dir, tokens, tmp_path):
    assert export(compressed_dir, tmp_path / "out") == 0
    assert interrupted == ["model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"]
    with open(tmp_path / "out" / "model.safetensors.index.json") as file:
        places = json.load(file)["weight_map"]
    blocks = [
        {key.split(".")[2] for key, name in places.items() if name == file and "layers" in key}
        for file in sorted(set(places.values()))
    ]
    assert blocks == [{"0"}, {"1"}, set()]
    assert torch.equal(logits_of(load(tmp_path / "out"), tokens), logits_of(load(compressed_dir), tokens))
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_another_dtype_does_not_go_on_where_the_first_ended(interrupted, compressed_dir, tmp_path, refused):
    assert "another dtype" in refused(compressed_dir, tmp_path / "out", "--dtype", "bfloat16")
    assert export(compressed_dir, tmp_path / "out", "--dtype", "bfloat16", "--overwrite") == 0
    assert len(interrupted) == 3


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(dense_dir, compressed_dir, tmp_path, refused, tokens):
    out = tmp_path / "out"
    assert "is dense already" in refused(dense_dir, out)
    lora = get_peft_model(load(dense_dir), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    assert "adapter of the method LORA" in refused(dense_dir, out, "--adapter", tmp_path / "lora")
    on_dense = get_peft_model(load(dense_dir), config_for("dense"))
    on_dense.save_pretrained(tmp_path / "adapter")
    assert "but the model is compressed" in refused(compressed_dir, out, "--adapter", tmp_path / "adapter")
    made = tmp_path / "made"
    assert main(["compress", dense_dir, str(made), "--group-size", "3", "--num-clusters", "12", "--seed", "7"]) == 0
    other = get_peft_model(load(made), config_for("compressed"))
    other.save_pretrained(tmp_path / "other")
    assert "belongs to another base" in refused(compressed_dir, out, "--adapter", tmp_path / "other")
    assert "is the model itself" in refused(compressed_dir, compressed_dir)
    out.mkdir()
    (out / "config.json").write_text("{}")
    assert "exists already" in refused(compressed_dir, out)
    assert {entry.name for entry in tmp_path.iterdir()} == {"lora", "adapter", "made", "other", "out"}


def test_tied_heads_that_were_saved_whole_are_refused_with_a_cure(tokens, tmp_path, refused):
    base = tmp_path / "base"
    tiny_llama(tie_word_embeddings=True).save_pretrained(base)
    model = get_peft_model(load(base), config_for("born", modules_to_save=["lm_head"]))
    model.save_pretrained(tmp_path / "adapter")
    assert "merge_and_unload" in refused(base, tmp_path / "out", "--adapter", tmp_path / "adapter")


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("codes", lambda value: value.bitwise_xor(1), "not the ones it was saved with"),
        ("codes", lambda value: torch.full_like(value, 255), "names centroids beyond"),
        ("codebook", lambda value: torch.full_like(value, float("nan")), "NaN or infinite"),
        ("codebook", lambda value: value[:, :-1].clone(), "do not belong together"),
        ("codes", None, "lacks"),
    ],
)
def test_damage_is_found(compressed_dir, tmp_path, refused, part, change, message):
    source, key = tmp_path / "source", f"model.layers.1.mlp.up_proj.{part}"
    load(compressed_dir).save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    if change is None:
        del tensors[key]
    else:
        tensors[key] = change(tensors[key])
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert message in refused(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
