"""`cluscomp compress --eval FILE`: losses of both models, block by block, are those of the whole models."""

from __future__ import annotations

import json
import random

import pytest
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from cluscomp_peft import ClusCompQuantizationConfig
from cluscomp_peft.cli import main
from cluscomp_peft.compress.checkpoint import compress_checkpoint
from cluscomp_peft.compress.stream import evaluated, folder, pipeline
from tests.conftest import WORDS, tiny_llama
from tests.mixtures import tiny_mixture

LENGTH = 64  # positions of the tiny models


def text_file(path, seed: int, count: int):
    """`count` tokens with their end: two windows and a shorter one, where it is 150."""
    draw = random.Random(seed)
    path.write_text(" ".join(WORDS[3 + draw.randrange(93)] for _ in range(count - 1)))
    return str(path)


@pytest.fixture
def texts(tmp_path) -> dict[str, str]:
    return {name: text_file(tmp_path / f"{name}.txt", number, 150) for number, name in enumerate(("fitted", "held"))}


def loss_of(folder: str, text: str, capsys) -> tuple[float, int]:
    capsys.readouterr()
    assert main(["evaluate", folder, "--data", text, "--dtype", "float32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found["loss"], found["tokens"]


def gpt2() -> GPT2LMHeadModel:
    sizes = dict(n_embd=32, n_layer=2, n_head=4, n_positions=LENGTH, pad_token_id=0, bos_token_id=1, eos_token_id=1)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(WORDS), **sizes))
    for name, parameter in model.named_parameters():
        parameter.data.normal_() if name.endswith("bias") else parameter.data.mul_(5)
    return model.eval()


@pytest.mark.parametrize(
    ("make", "flags"),
    [
        (tiny_llama, ["--calibration", "none"]),
        (tiny_llama, ["--calibration", "fitted", "--samples", "3", "--seqlen", "16", "--embeddings", "4"]),
        (gpt2, ["--calibration", "none"]),  # Conv1D, biases, tied embeddings
        (lambda: tiny_llama(num_hidden_layers=1), ["--calibration", "none"]),
    ],
    ids=["alone", "calibrated", "gpt2", "one block"],
)
def test_losses_are_those_of_the_whole_models(tmp_path, tokenizer, texts, capsys, make, flags):
    dense, out = str(tmp_path / "dense"), str(tmp_path / "out")
    make().save_pretrained(dense)
    tokenizer.save_pretrained(dense)
    flags = [texts.get(flag, flag) for flag in flags]
    assert main(["compress", dense, out, "--bits", "2", *flags, "--eval", texts["held"], "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["evaluation"]
    assert found["text"] == "held.txt"
    for name, model in (("dense", dense), ("compressed", out)):
        loss, tokens = loss_of(model, texts["held"], capsys)
        assert found["tokens"] == tokens == 147
        assert found[name] == pytest.approx(loss, rel=1e-5)
    assert found["compressed"] != pytest.approx(found["dense"], rel=2e-4)  # so the two are told apart
    report = json.load(open(tmp_path / "out" / "cluscomp_report.json"))
    assert report["summary"]["evaluation"] == found and report["summary"]["settings"]["eval"] == texts["held"]
    line = f"loss on held.txt (147 tokens): {found['compressed']:.4f} nats per token, dense {found['dense']:.4f}"
    assert line in (tmp_path / "out" / "report.html").read_text()
    assert "on held.txt, the loss is" in " ".join((tmp_path / "out" / "README.md").read_text().split())
    assert not list((tmp_path / "out").glob("*held-out*"))


def test_experts_are_measured_too(tmp_path, tokenizer, texts, capsys):
    model = tiny_mixture("mixtral")
    dense, out = str(tmp_path / "dense"), str(tmp_path / "out")
    model.save_pretrained(dense)
    tokenizer.save_pretrained(dense)
    summary = compress_checkpoint(
        dense, out, ClusCompQuantizationConfig(bits=4), calibration="none", evaluate=texts["held"]
    )
    assert summary["evaluation"]["compressed"] == pytest.approx(loss_of(out, texts["held"], capsys)[0], rel=1e-4)


def test_what_was_measured_is_no_longer_called_unmeasured(tmp_path, dense_dir, texts, capsys):
    target = str(tmp_path / "out")
    assert main(["compress", dense_dir, target, "--calibration", "none", "--eval", texts["held"]]) == 0
    out = capsys.readouterr().out
    assert "loss on held.txt (147 tokens)" in out and "not measured" not in out
    assert "not measured" not in (tmp_path / "out" / "report.html").read_text()


def test_a_run_that_goes_on_measures_once(tmp_path, dense_dir, texts, monkeypatch):
    """Also where the shards were joined before the run was killed, and where the text has become another."""

    def stop(*_):
        raise KeyboardInterrupt

    config, target = ClusCompQuantizationConfig(bits=6), str(tmp_path / "out")

    def compress(text):
        return compress_checkpoint(dense_dir, target, config, calibration="none", evaluate=text)["evaluation"]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("cluscomp_peft.compress.checkpoint.move", stop)
        compress(texts["held"])
    work = folder.work_folder(target)
    first = json.load(open(f"{work}/journal.json"))["content"]["evaluation"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluated, "_Pass", stop)  # not asked for the same text
        patch.setattr("cluscomp_peft.compress.checkpoint.move", stop)
        compress(texts["held"])
    other = compress(texts["fitted"])
    assert other["text"] == "fitted.txt" and other["dense"] != first["dense"]
    again = compress_checkpoint(
        dense_dir, str(tmp_path / "again"), config, calibration="none", evaluate=texts["fitted"]
    )
    assert other["compressed"] == again["evaluation"]["compressed"]


def test_text_that_was_fitted_to_is_refused(tmp_path, dense_dir, texts, capsys):
    same = ["--calibration", texts["fitted"], "--seqlen", "16", "--eval", texts["fitted"]]
    assert main(["compress", dense_dir, str(tmp_path / "out"), *same]) == 1
    assert "is the calibration text" in capsys.readouterr().err


def test_a_model_that_does_not_continue_text_is_refused_before_any_work(
    tmp_path, tokenizer, texts, monkeypatch, capsys
):
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    BertForMaskedLM(BertConfig(vocab_size=len(WORDS), **sizes)).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    monkeypatch.delattr(pipeline, "compress_shard")
    assert main(["compress", str(tmp_path / "dense"), str(tmp_path / "out"), "--eval", texts["held"]]) == 1
    err = capsys.readouterr().err
    assert "--eval" in err and "does not predict next tokens" in err and "leave it out" in err
