"""`cluscomp merge`: base and adapter as one checkpoint, to the last bit."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cluscomp_peft import ClusCompQuantizationConfig
from cluscomp_peft.cli import main
from cluscomp_peft.compress.checkpoint import compress_checkpoint
from cluscomp_peft.hf.evaluate import true_bits
from tests.conftest import config_for, logits_of, tiny_llama, train_briefly
from tests.mixtures import tiny_mixture


@pytest.fixture(scope="module")
def made(tmp_path_factory, dense_dir) -> str:
    folder = str(tmp_path_factory.mktemp("merge") / "made")
    assert main(["compress", dense_dir, folder, "--bits", "6", "--scales", "--calibration", "none"]) == 0
    return folder


def trained(base: str, folder, tokens: torch.Tensor, kind: str = "compressed", **changes) -> PeftModel:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config_for(kind, **changes))
    train_briefly(model, tokens, lr=0.01)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("named", [False, True])
def test_the_result_is_the_adapted_model_at_the_same_codes(tmp_path, made, tokens, capsys, named):
    adapter, out = str(tmp_path / "adapter"), str(tmp_path / "out")
    model = trained(made, adapter, tokens, num_blocks=2)
    expected, bits = logits_of(model, tokens), true_bits(model)
    assert main(["merge", *([made, out, "--adapter", adapter] if named else [adapter, out])]) == 0
    printed = capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(logits_of(merged, tokens), expected)
    assert f"{bits:.3f} true bits per weight (before {true_bits(AutoModelForCausalLM.from_pretrained(made)):.3f})" in (
        printed
    )
    before, after = (load_file(os.path.join(folder, "model.safetensors")) for folder in (made, out))
    codes = [name for name in before if name.endswith(".codes")]
    assert codes and all(torch.equal(before[name], after[name]) for name in codes)
    assert AutoTokenizer.from_pretrained(out)("w1 w2")["input_ids"] == [4, 5]
    assert sorted(os.listdir(tmp_path)) == ["adapter", "out"]


def test_its_card_and_report_are_those_of_the_result(tmp_path, made, dense_dir, tokens):
    adapter, out = str(tmp_path / "adapter"), str(tmp_path / "out")
    trained(made, adapter, tokens)
    assert main(["merge", adapter, out]) == 0
    card = ModelCard.load(os.path.join(out, "README.md"))
    assert card.data.tags == ["cluscomp"] and card.data.base_model is None
    assert "# out\n" in card.content and "merged into it, exactly" in card.content
    assert made not in card.content and dense_dir not in card.content
    with open(os.path.join(out, "cluscomp_report.json")) as file:
        report = json.load(file)
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert report["summary"]["true_bits"] == pytest.approx(true_bits(merged))
    assert report["summary"]["bytes"] == os.path.getsize(os.path.join(out, "model.safetensors"))
    assert report["losses"] == {} and report["summary"]["relative_error"] is None
    assert main(["inspect", out]) == 0


def test_merging_is_offered_as_one_object(tmp_path, made, tokens, capsys):
    trained(made, tmp_path / "adapter", tokens, num_blocks=1, train_scales=False)
    capsys.readouterr()
    assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "out"), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["folder"] == str(tmp_path / "out") and summary["true_bits"] == summary["base_bits"]


def test_on_a_dense_base_it_is_the_dense_export(tmp_path, dense_dir, tokens):
    adapter, out = str(tmp_path / "adapter"), str(tmp_path / "out")
    model = trained(dense_dir, adapter, tokens, kind="dense")
    expected = logits_of(model, tokens)
    assert main(["merge", dense_dir, out, "--adapter", adapter]) == 0
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(out), tokens), expected)
    assert os.path.isfile(os.path.join(out, "README.md"))


def test_a_target_that_exists_stays_unless_it_may_be_replaced(tmp_path, made, tokens, capsys):
    adapter, out = str(tmp_path / "adapter"), str(tmp_path / "out")
    model = trained(made, adapter, tokens)
    os.makedirs(out)
    with open(os.path.join(out, "note"), "w") as file:
        file.write("mine")
    assert main(["merge", adapter, out]) == 1 and "exists already" in capsys.readouterr().err
    assert main(["merge", adapter, out, "--overwrite"]) == 1 and "no model" in capsys.readouterr().err
    assert os.listdir(out) == ["note"]
    os.rename(os.path.join(out, "note"), tmp_path / "note")
    for flags in ([], ["--overwrite"]):
        assert main(["merge", adapter, out, *flags]) == 0
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(out), tokens), logits_of(model, tokens))
    assert sorted(os.listdir(tmp_path)) == ["adapter", "note", "out"]


def test_what_cannot_be_merged_is_refused_by_name(tmp_path, made, compressed_dir, tokens, capsys):
    adapter = str(tmp_path / "adapter")
    trained(made, adapter, tokens)
    lora = get_peft_model(AutoModelForCausalLM.from_pretrained(made), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    out = str(tmp_path / "out")
    for arguments, message in (
        ([made, out], "is no adapter; give the folder of one, or its base with --adapter"),
        ([adapter, out, "--adapter", adapter], "is an adapter itself"),
        ([compressed_dir, out, "--adapter", adapter], "codes"),
        ([str(tmp_path / "lora"), out], "is an adapter of the method LORA"),
    ):
        assert main(["merge", *arguments]) == 1
        assert message in capsys.readouterr().err
        assert not os.path.exists(out)


@pytest.mark.parametrize("what", ["embeddings", "experts"])
def test_clustered_embeddings_and_experts_stay_so(tmp_path, tokens, what):
    model = tiny_mixture("mixtral") if what == "experts" else tiny_llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "dense")
    config = ClusCompQuantizationConfig(bits=6, embeddings=6 if what == "embeddings" else None)
    base, adapter, out = (str(tmp_path / name) for name in ("base", "adapter", "out"))
    compress_checkpoint(str(tmp_path / "dense"), base, config, calibration="none")
    adapted = trained(base, adapter, tokens)
    assert main(["merge", adapter, out]) == 0
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(logits_of(merged, tokens), logits_of(adapted, tokens))
    configs = [AutoConfig.from_pretrained(folder).quantization_config for folder in (base, out)]
    assert configs[0]["fingerprint"] == configs[1]["fingerprint"]
    assert main(["inspect", out]) == 0


def test_a_checkpoint_that_could_not_be_replaced_is_there_again(tmp_path, made, tokens, monkeypatch, capsys):
    adapter, out = str(tmp_path / "adapter"), str(tmp_path / "out")
    trained(made, adapter, tokens)
    shutil.copytree(made, out)
    before, rename = load_file(os.path.join(out, "model.safetensors")), os.rename

    def refusing(source, target):
        if target == out and not str(source).endswith(".old"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("cluscomp_peft.export.merged.os.rename", refusing)
        assert main(["merge", adapter, out, "--overwrite"]) == 1
    after = load_file(os.path.join(out, "model.safetensors"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert sorted(os.listdir(tmp_path)) == ["adapter", "out"]
