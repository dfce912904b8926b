"""`recipes/sft.py`: from a dense or compressed model and a text file to an adapter, and to a merged model."""

from __future__ import annotations

import json
import lzma
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluscomp_peft import ClusCompQuantizationConfig
from tests import warm
from tests.conftest import RECIPES, WORDS, flags, logged, logits_of

RECIPE = str(RECIPES / "sft.py")
DOCUMENTS = [" ".join(WORDS[3 + (i * 7 + j) % 93] for j in range(12)) for i in range(16)]
# Flags that keep a run small and on the CPU.
SMALL = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "max_length": 32,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}


@pytest.fixture
def train(tmp_path) -> str:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return str(path)


@pytest.fixture
def recipe(run_recipe):
    return lambda *arguments: run_recipe("sft.py", *arguments)


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}


def adapted(base: str, adapter: str) -> PeftModel:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)


def test_a_dense_model_becomes_base_adapter_and_merged_model(tmp_path, dense_dir, train, tokens):
    out = tmp_path / "out"
    arguments = [
        *flags(model_name_or_path=dense_dir, dataset_name=train, output_dir=out, bits=6, num_blocks=1, **SMALL),
        "--merge",
    ]
    done = subprocess.run(
        [warm.python("torch"), RECIPE, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")},
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    losses = [entry["loss"] for entry in logged(done.stdout) if "loss" in entry]
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)
    assert f"adapter in {out}, base in {out / 'base'} at 5.476 true bits per weight" in done.stdout
    assert f"merged in {out / 'merged'} at 5.476 true bits per weight" in done.stdout

    base = AutoModelForCausalLM.from_pretrained(out / "base")
    config = ClusCompQuantizationConfig(bits=6)
    expected = AutoModelForCausalLM.from_pretrained(dense_dir, quantization_config=config)
    assert torch.equal(logits_of(base, tokens), logits_of(expected, tokens))
    before = logits_of(base, tokens)
    model = adapted(str(out / "base"), str(out))
    after = logits_of(model, tokens)
    assert not torch.equal(after, before)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(out / "merged"), tokens), after)
    for folder in ("base", "merged"):
        assert AutoTokenizer.from_pretrained(out / folder)("w1 w2")["input_ids"] == [4, 5]


def test_a_compressed_model_is_its_own_base(tmp_path, compressed_dir, train, recipe, tokens):
    out, before = tmp_path / "out", files(compressed_dir)
    log = recipe(*flags(model_name_or_path=compressed_dir, dataset_name=train, output_dir=out, num_blocks=2, **SMALL))
    assert sum("loss" in entry for entry in log) == 2
    assert not (out / "base").exists() and not (out / "merged").exists()
    assert files(compressed_dir) == before
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["peft_type"], config["num_blocks"]) == ("CLUSCOMP", 2)
    assert config["base_model_name_or_path"] == compressed_dir
    model = adapted(compressed_dir, str(out))
    trained = logits_of(model, tokens)
    with model.disable_adapter():
        assert not torch.equal(logits_of(model, tokens), trained)


def test_flags_override_the_yaml_config(tmp_path, compressed_dir, train, recipe, tokens):
    out = tmp_path / "out"
    settings = {
        **SMALL,
        "model_name_or_path": compressed_dir,
        "dataset_name": train,
        "dataset_test": train,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "output_dir": str(out),
        "max_steps": 3,
        "num_blocks": 3,
        "target_modules": ["q_proj", "up_proj"],
        "learning_rate": 0.01,
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    log = recipe("--config", str(path), *flags(num_blocks=2, learning_rate=0))
    assert sum("loss" in entry for entry in log) == 3
    assert sum("eval_loss" in entry for entry in log) == 1
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["num_blocks"] == 2
    assert sorted(config["target_modules"]) == ["q_proj", "up_proj"]
    # At a rate of 0 nothing was learnt.
    model = adapted(compressed_dir, str(out))
    trained = logits_of(model, tokens)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, tokens), trained)


def test_conversations_train_a_model_without_a_chat_template(tmp_path, compressed_dir, recipe):
    data, out = tmp_path / "chat.jsonl", tmp_path / "out"
    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": "w5"}] for text in DOCUMENTS]
    data.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    log = recipe(*flags(model_name_or_path=compressed_dir, dataset_name=data, output_dir=out, **SMALL), "--merge")
    assert sum("loss" in entry for entry in log) == 2
    for folder in (out, out / "merged"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        rendered = tokenizer.apply_chat_template(turns[0], tokenize=False)
        assert rendered == f"user: {DOCUMENTS[0]}\nassistant: w5<eos>\n"


@pytest.mark.parametrize("name", ["book.txt", "book.txt.xz"])
def test_plain_text_trains_line_by_line(tmp_path, compressed_dir, recipe, name):
    data, out = tmp_path / name, tmp_path / "out"
    text = "\n".join(DOCUMENTS).encode()
    data.write_bytes(lzma.compress(text) if name.endswith(".xz") else text)
    log = recipe(*flags(model_name_or_path=compressed_dir, dataset_name=data, output_dir=out, **SMALL))
    losses = [entry for entry in log if "loss" in entry]
    assert len(losses) == 2
    assert losses[-1]["num_tokens"] == 2 * 4 * 13  # 12 words and EOS a line
    assert (out / "adapter_model.safetensors").is_file()


def test_prompts_with_completions_train_the_completions(tmp_path, compressed_dir, recipe):
    data, out = tmp_path / "pairs.jsonl.xz", tmp_path / "out"
    rows = [{"prompt": text, "completion": " w5 w6"} for text in DOCUMENTS]
    data.write_bytes(lzma.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    log = recipe(*flags(model_name_or_path=compressed_dir, dataset_name=data, output_dir=out, **SMALL))
    assert sum("loss" in entry for entry in log) == 2
    assert (out / "adapter_model.safetensors").is_file()


def test_a_base_is_made_once_and_never_replaced_by_another(tmp_path, dense_dir, train, recipe):
    out = tmp_path / "out"
    common = flags(model_name_or_path=dense_dir, dataset_name=train, output_dir=out, **SMALL)
    recipe(*common, "--bits", "6")
    before = {path.name: path.stat().st_mtime_ns for path in (out / "base").iterdir()}
    contents = files(out / "base")
    for other in (["--bits", "5"], ["--group_size", "3", "--num_clusters", "12"], ["--bits", "6", "--scales", "true"]):
        with pytest.raises(ValueError, match=r"base was made with (bits=6\.0, not (5\.0|None)|scales=None, not True)"):
            recipe(*common, *other)
    other_model = shutil.copytree(dense_dir, tmp_path / "other")
    with pytest.raises(ValueError, match="base was made with source="):
        recipe(*common, "--bits", "6", "--model_name_or_path", str(other_model))
    recipe(*common, "--bits", "6")
    assert {path.name: path.stat().st_mtime_ns for path in (out / "base").iterdir()} == before
    assert files(out / "base") == contents
