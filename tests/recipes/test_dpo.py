"""`recipes/dpo.py`: preferences move the adapter away from the base, which is the reference."""

from __future__ import annotations

import json
import math

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import WORDS, flags, logits_of

PROMPTS = [" ".join(WORDS[3 + (i * 7 + j) % 93] for j in range(5)) for i in range(16)]
SMALL = {
    "max_steps": 8,
    "per_device_train_batch_size": 4,
    "max_length": 32,
    "learning_rate": 2e-4,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}


@pytest.fixture
def recipe(run_recipe):
    return lambda *arguments: run_recipe("dpo.py", *arguments)


def write(path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def pairs(tmp_path) -> str:
    return write(
        tmp_path / "pairs.jsonl",
        [{"prompt": prompt, "chosen": " w5 w6 w7", "rejected": " w60 w61"} for prompt in PROMPTS],
    )


def test_margins_grow_from_the_base_which_is_the_reference(tmp_path, dense_dir, pairs, recipe, tokens):
    out = tmp_path / "out"
    common = flags(model_name_or_path=dense_dir, dataset_name=pairs, output_dir=out, bits=6, num_blocks=2, **SMALL)
    log = [entry for entry in recipe(*common, "--merge") if "rewards/margins" in entry]
    assert len(log) == 8
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert log[0]["rewards/margins"] == pytest.approx(0, abs=1e-3)
    assert log[-1]["rewards/margins"] > 0.05
    assert log[-1]["loss"] < log[0]["loss"]

    base = AutoModelForCausalLM.from_pretrained(out / "base")
    before = logits_of(base, tokens)
    model = PeftModel.from_pretrained(base, str(out))
    after = logits_of(model, tokens)
    assert not torch.equal(after, before)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, tokens), before)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(out / "merged"), tokens), after)
    assert AutoTokenizer.from_pretrained(out / "merged")("w1 w2")["input_ids"] == [4, 5]


def test_conversations_get_a_template(tmp_path, compressed_dir, recipe):
    def turn(role: str, text: str) -> list[dict]:
        return [{"role": role, "content": text}]

    rows = [
        {"prompt": turn("user", text), "chosen": turn("assistant", "w5"), "rejected": turn("assistant", "w60")}
        for text in PROMPTS
    ]
    data, out = write(tmp_path / "chat.jsonl", rows), tmp_path / "out"
    settings = {**SMALL, "max_steps": 1}
    log = recipe(*flags(model_name_or_path=compressed_dir, dataset_name=data, output_dir=out, **settings))
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    rendered = AutoTokenizer.from_pretrained(out).apply_chat_template(
        [*rows[0]["prompt"], *rows[0]["chosen"]], tokenize=False
    )
    assert rendered == f"user: {PROMPTS[0]}\nassistant: w5<eos>\n"


def test_texts_without_preferences_are_refused_before_anything_is_made(tmp_path, dense_dir, recipe):
    data, out = write(tmp_path / "texts.jsonl", [{"text": prompt} for prompt in PROMPTS]), tmp_path / "out"
    with pytest.raises(ValueError, match=r"has the columns text; DPO needs prompt, chosen, rejected\. Rename"):
        recipe(*flags(model_name_or_path=dense_dir, dataset_name=data, output_dir=out, **SMALL))
    assert not out.exists()
