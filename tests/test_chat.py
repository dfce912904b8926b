"""`cluscomp chat`: what it prints is what `generate` gives, turn after turn."""

from __future__ import annotations

import io

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluscomp_peft.cli import main
from tests.conftest import config_for, train_briefly

TEMPLATE = (
    "{% for message in messages %}{{ {'user': 'w1', 'system': 'w2', 'assistant': 'w3'}[message['role']] }} "
    "{{ message['content'] }} {% endfor %}{% if add_generation_prompt %}w3{% endif %}"
)
GREEDY = ["--temperature", "0", "--max-new-tokens", "6"]


@pytest.fixture
def talking_dir(tmp_path, compressed_dir) -> str:
    """The compressed model, with a chat template."""
    folder = str(tmp_path / "talking")
    AutoModelForCausalLM.from_pretrained(compressed_dir).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(compressed_dir)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def continuation(model, folder: str, text: str) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    made = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)
    return tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_one_prompt_is_answered(talking_dir, capfd):
    assert main(["chat", talking_dir, "--prompt", "w7 w8", *GREEDY]) == 0
    out, _ = capfd.readouterr()
    expected = continuation(AutoModelForCausalLM.from_pretrained(talking_dir), talking_dir, "w1 w7 w8 w3")
    assert out.strip() == expected and len(expected.split()) > 2


def test_turns_follow_each_other_until_they_are_cleared(talking_dir, monkeypatch, capfd):
    monkeypatch.setattr("sys.stdin", io.StringIO("w7 w8\nw9\n/clear\nw9\n/exit\nw10\n"))
    assert main(["chat", talking_dir, "--system", "w20", *GREEDY]) == 0
    answers = [line.strip() for line in capfd.readouterr().out.splitlines()]
    model = AutoModelForCausalLM.from_pretrained(talking_dir)
    first = continuation(model, talking_dir, "w2 w20 w1 w7 w8 w3")
    second = continuation(model, talking_dir, f"w2 w20 w1 w7 w8 w3 {first} w1 w9 w3")
    third = continuation(model, talking_dir, "w2 w20 w1 w9 w3")
    assert answers == [first, second, third]


def test_a_folder_of_an_adapter_is_talked_to_on_its_base(tmp_path, talking_dir, tokens, capfd):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(talking_dir), config_for("compressed"))
    train_briefly(model, tokens, lr=0.05)
    model.save_pretrained(tmp_path / "adapter")
    assert main(["chat", str(tmp_path / "adapter"), "--prompt", "w7", *GREEDY]) == 0
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(talking_dir), tmp_path / "adapter")
    expected = continuation(adapted.eval(), talking_dir, "w1 w7 w3")
    assert capfd.readouterr().out.strip() == expected
    assert expected != continuation(AutoModelForCausalLM.from_pretrained(talking_dir), talking_dir, "w1 w7 w3")


def test_without_a_template_it_continues_and_says_so(compressed_dir, capfd):
    assert main(["chat", compressed_dir, "--prompt", "w7 w8", *GREEDY]) == 0
    out, err = capfd.readouterr()
    expected = continuation(AutoModelForCausalLM.from_pretrained(compressed_dir), compressed_dir, "w7 w8")
    assert out.strip() == expected
    assert f"{compressed_dir} has no chat template: it continues each line instead of answering." in err


def test_a_seed_gives_the_same_answer(compressed_dir, capfd):
    answers = []
    for seed in (1, 1, 2):
        torch.rand(3)
        arguments = ["--temperature", "5", "--max-new-tokens", "12", "--seed", str(seed)]
        assert main(["chat", compressed_dir, "--prompt", "w7", *arguments]) == 0
        answers.append(capfd.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0."),
        (["--temperature", "-1"], "--temperature must be between 0 and 100, got -1.0."),
        (["--system", "w2"], "--system needs a chat template, and this tokenizer has none; leave it out."),
        (["--prompt", "w7 " * 64], "the conversation has 64 tokens and the model takes 64; /clear makes it forget."),
    ],
)
def test_what_cannot_be_answered(flags, message, compressed_dir, capfd):
    assert main(["chat", compressed_dir, "--prompt", "w7", *flags]) == 1
    assert capfd.readouterr().err.splitlines()[-1] == f"cluscomp chat: {message}"
