"""The command with --embeddings: calibrated, within a size, from files that hold the tied weight twice."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cluscomp_peft import ClusCompQuantizationConfig
from cluscomp_peft.cli import main
from cluscomp_peft.compress.budget.embeddings import head_owner, vocabularies
from cluscomp_peft.compress.checkpoint import compress_checkpoint
from cluscomp_peft.compress.policy import EMBEDDING_BITS
from cluscomp_peft.compress.stream import pipeline
from cluscomp_peft.hf.evaluate import evaluate
from tests.conftest import WORDS, logits_of, tiny_llama
from tests.grids import grid, quick


@pytest.fixture(scope="module", params=["tied", "untied"])
def dense(request, tmp_path_factory, tokenizer) -> str:
    folder = str(tmp_path_factory.mktemp(request.param))
    tiny_llama(tie_word_embeddings=request.param == "tied").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    order = torch.randint(0, 93, (600,), generator=torch.Generator().manual_seed(0))
    path.write_text(" ".join(f"w{index}" for index in order.tolist()))
    return str(path)


def compress(dense: str, target, **settings) -> dict:
    config = ClusCompQuantizationConfig(
        **{key: settings.pop(key) for key in ("bits", "embeddings", "exclude_modules") if key in settings}
    )
    return compress_checkpoint(dense, str(target), config, **settings)


@grid(dense=quick(["tied", "untied"], "tied"), indirect=True)
def test_calibrated_blocks_begin_with_the_embeddings_as_they_will_be(dense, text, tmp_path, monkeypatch):
    inputs = {}

    class Noted(pipeline.CalibratedBlocks):
        def __init__(self, *args):
            super().__init__(*args)
            first, *_, held_out = self.calibration.batches
            inputs.update(tokens=first, held_out=held_out, dense=self.dense[0][0], compressed=self.compressed[0][0])

    monkeypatch.setattr(pipeline, "CalibratedBlocks", Noted)
    settings = dict(bits=5, embeddings=5, calibration=text, samples=8, seqlen=32, epochs=1)
    summary = compress(dense, tmp_path / "out", **settings)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = AutoModelForCausalLM.from_pretrained(dense)
    with torch.no_grad():
        assert torch.equal(before.get_input_embeddings()(inputs["tokens"]), inputs["dense"])
        assert torch.allclose(model.get_input_embeddings()(inputs["tokens"]), inputs["compressed"], atol=1e-6)
    assert summary["embedding_bits"] <= 5
    for name, one in (("dense", before), ("compressed", model)):
        found = evaluate(one, list(inputs["held_out"].split(1))).loss
        assert summary["losses"][name] == pytest.approx(found, abs=1e-4)


@grid(dense=quick(["tied", "untied"], "tied"), indirect=True)
def test_the_head_is_clustered_for_what_it_is_given(dense, text, tmp_path, tokens):
    settings = dict(bits=8, embeddings=3, samples=8, seqlen=32, epochs=0)
    expected = logits_of(AutoModelForCausalLM.from_pretrained(dense), tokens)
    errors = {}
    for calibration in (text, "none"):
        compress(dense, tmp_path / str(len(errors)), calibration=calibration, **settings)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / str(len(errors)))
        before = AutoModelForCausalLM.from_pretrained(dense)
        with torch.no_grad():
            given = before.base_model(tokens).last_hidden_state
            errors[calibration] = float((model.lm_head(given) - before.lm_head(given)).norm() / expected.norm())
    assert errors[text] < 0.97 * errors["none"]
    report = json.loads((tmp_path / "0" / "cluscomp_report.json").read_text())
    owner = "lm_head" if "untied" in dense else "model.embed_tokens"
    output_error = report["matrices"][owner]["output_error"]
    assert output_error["feedback"] < output_error["clustered"]


@grid(dense=quick(["tied", "untied"], "tied"), indirect=True)
def test_an_interrupted_run_goes_on(dense, text, tmp_path, monkeypatch):
    settings = dict(bits=5, embeddings=5, calibration=text, samples=8, seqlen=32, epochs=1)
    compress(dense, tmp_path / "whole", **settings)
    made = pipeline.CalibratedBlocks.compress

    def interrupted(self, index, *args):
        if index == 1:
            raise OSError("unplugged")
        return made(self, index, *args)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="unplugged"):
        patch.setattr(pipeline.CalibratedBlocks, "compress", interrupted)
        compress(dense, tmp_path / "again", **settings)
    compress(dense, tmp_path / "again", **settings)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("embeddings", [None, 4])
def test_a_size_counts_them(tmp_path, tokenizer, embeddings):
    tiny_llama(tie_word_embeddings=True, hidden_size=64, intermediate_size=160).save_pretrained(tmp_path / "dense")
    size = 160_000
    summary = compress(str(tmp_path / "dense"), tmp_path / "out", size=size, embeddings=embeddings, calibration="none")
    written = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert 0.8 * size < written <= size
    assert (summary["embedding_bits"] is None) == (embeddings is None)


def test_a_tied_weight_that_is_stored_twice(tmp_path, tokens):
    folder = tmp_path / "dense"
    tiny_llama(tie_word_embeddings=True).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    compress(str(folder), tmp_path / "out", bits=5, embeddings=5, calibration="none")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.codes is model.model.embed_tokens.codes
    tensors["lm_head.weight"] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"two different weights model.embed_tokens.weight and lm_head.weight"):
        compress(str(folder), tmp_path / "other", bits=5, embeddings=5, calibration="none")


def test_a_file_without_the_embedding_is_incomplete(tmp_path):
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "dense")
    compress(str(tmp_path / "dense"), tmp_path / "out", bits=5, embeddings=5, calibration="none")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    kept = {key: value for key, value in tensors.items() if "embed_tokens.codebook" not in key}
    save_file(kept, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"incomplete, it lacks model.embed_tokens.codebook"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_command(tmp_path, tokens, capsys):
    tiny_llama().save_pretrained(tmp_path / "dense")
    arguments = ["compress", str(tmp_path / "dense"), str(tmp_path / "out"), "--calibration", "none", "--embeddings"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "embeddings at " in said and "embeddings clustered: model.embed_tokens, lm_head" in said
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["embeddings"] == EMBEDDING_BITS and config["version"] == 2
    assert main([*arguments, "9"]) == 1
    assert "embeddings must be between 1 and 8" in capsys.readouterr().err


def test_which_weights_a_model_has():
    tied, untied = tiny_llama(tie_word_embeddings=True), tiny_llama()
    apart = [("model.embed_tokens", ()), ("lm_head", ())]
    assert [(entry.name, entry.tied) for entry in vocabularies(tied)] == [("model.embed_tokens", ("lm_head",))]
    assert [(entry.name, entry.tied) for entry in vocabularies(untied)] == apart
    assert head_owner(tied) == "model.embed_tokens" and head_owner(untied) == "lm_head"
    assert head_owner(tied.model) is None
    assert tied.get_input_embeddings().weight.shape[0] == len(WORDS)


def test_an_embedding_that_computes_something_else_is_refused():
    model = tiny_llama(tie_word_embeddings=True)

    class Other(torch.nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight

    model.lm_head = Other(model.model.embed_tokens.weight)
    with pytest.raises(ValueError, match="cannot be clustered: lm_head, a Other, holds its weight"):
        vocabularies(model)
