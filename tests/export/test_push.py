"""The way to the hub and back, on a stand-in of it: by transformers, by PEFT, by `cluscomp push`."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
from huggingface_hub import ModelCard
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from cluscomp_peft import ClusCompQuantizationConfig
from cluscomp_peft.cli import main
from cluscomp_peft.compress.checkpoint import compress_checkpoint
from cluscomp_peft.compress.report.card import adapter_card
from tests import warm
from tests.conftest import config_for
from tests.hub import stand_in

JOB = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from cluscomp_peft.cli import main

small, tuned = sys.argv[1:]
base, tokenizer = AutoModelForCausalLM.from_pretrained(small), AutoTokenizer.from_pretrained(small)
tokens = torch.arange(3, 13)[None]
plain = base(input_ids=tokens).logits
base.push_to_hub("someone/by-transformers")
tokenizer.push_to_hub("someone/by-transformers")
adapted = PeftModel.from_pretrained(base, tuned)
changed = adapted(input_ids=tokens).logits
adapted.push_to_hub("someone/by-peft")
assert main(["push", small, "someone/small"]) == 0
assert main(["push", tuned, "someone/tuned", "--base", "someone/small"]) == 0
assert main(["push", small, "someone/small"]) == 0  # once more, onto itself

assert not torch.equal(plain, changed)
for name in ("someone/by-transformers", "someone/small"):
    again = AutoModelForCausalLM.from_pretrained(name)
    assert torch.equal(again(input_ids=tokens).logits, plain)
    assert AutoTokenizer.from_pretrained(name)("w5 w6").input_ids == tokenizer("w5 w6").input_ids
for name in ("someone/by-peft", "someone/tuned"):
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("someone/small"), name)
    assert torch.equal(again(input_ids=tokens).logits, changed)
assert main(["chat", "someone/small", "--adapter", "someone/tuned", "--prompt", "w7", "--max-new-tokens", "3"]) == 0
assert main(["merge", "someone/small", "merged", "--adapter", "someone/tuned"]) == 0
assert main(["push", "merged", "someone/merged", "--json"]) == 0
again = AutoModelForCausalLM.from_pretrained("someone/merged")
assert torch.equal(again(input_ids=tokens).logits, changed)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory, dense_dir) -> tuple[str, str]:
    """A compressed model and an adapter with its card, as the commands leave them."""
    folder = tmp_path_factory.mktemp("pushed")
    small, tuned = str(folder / "small"), str(folder / "tuned")
    compress_checkpoint(dense_dir, small, ClusCompQuantizationConfig(bits=4), calibration="none")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(small), config_for("compressed"))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "codebook" in name:
            parameter.data.normal_()
    model.save_pretrained(tuned)
    (folder / "tuned" / "README.md").write_text(adapter_card("tuned", small, 4.0, {}, "It was trained."))
    (folder / "tuned" / "trainer_state.json").write_text("{}")
    (folder / "tuned" / "checkpoint-1").mkdir()
    return small, tuned


@pytest.mark.slow
def test_what_is_pushed_is_what_is_loaded(tmp_path, folders):
    with stand_in() as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": "hf_of_nobody",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "*",
        }
        words = [warm.python("torch"), "-c", JOB, *folders]
        done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        pushed = hub.repositories
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["repo"] == "someone/merged" and "model.safetensors" in said["files"] and said["bytes"] > 1000

    # What our commands wrote goes along, and the card's code loads by the hub id.
    for name in ("someone/small", "someone/merged"):
        beside = {"config.json", "tokenizer.json", "generation_config.json", "cluscomp_report.json", "report.html"}
        assert beside <= pushed[name].keys(), name
        card = ModelCard(pushed[name]["README.md"].decode())
        assert f'AutoModelForCausalLM.from_pretrained("{name}")' in card.text and f"# {name}\n" in card.text
        assert card.data.tags == ["cluscomp"] and "import cluscomp_peft" in card.text
    assert sorted(pushed["someone/tuned"]) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    card = ModelCard(pushed["someone/tuned"]["README.md"].decode())
    assert 'from_pretrained(model, "someone/tuned")' in card.text and 'from_pretrained("someone/small")' in card.text
    assert (card.data.base_model, card.data.library_name) == ("someone/small", "peft")
    assert json.loads(pushed["someone/tuned"]["adapter_config.json"])["base_model_name_or_path"] == "someone/small"
    everything = b"".join(pushed[name][file] for name in ("someone/small", "someone/tuned") for file in pushed[name])
    assert folders[0].encode() not in everything
    assert json.load(open(f"{folders[1]}/adapter_config.json"))["base_model_name_or_path"] == folders[0]

    # The card that transformers writes by itself is found by the tag; PEFT's has none of any method.
    assert ModelCard(pushed["someone/by-transformers"]["README.md"].decode()).data.tags == ["cluscomp"]
    assert "generation_config.json" in pushed["someone/by-transformers"]


@pytest.mark.parametrize(
    ("which", "more", "message"),
    [
        ("tuned", [], "give its hub id with --base"),
        ("small", ["--base", "someone/other"], "--base is for adapters"),
        ("absent", [], "is no folder"),
        ("empty", [], "has no config.json"),
    ],
)
def test_what_cannot_be_pushed(tmp_path, folders, capsys, which, more, message):
    (tmp_path / "empty").mkdir()
    place = {"small": folders[0], "tuned": folders[1]}.get(which, str(tmp_path / which))
    assert main(["push", place, "someone/x", *more]) == 1
    assert message in capsys.readouterr().err
