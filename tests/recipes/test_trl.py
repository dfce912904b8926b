"""TRL's and transformers' trainers on all three kinds of bases: what trains, what stays, what is saved."""

from __future__ import annotations

import importlib.util
import math
import os

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from cluscomp_peft import ClusCompConfig
from tests.conftest import WORDS, config_for, logits_of, train_briefly
from tests.grids import grid, quick

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

KINDS = ["compressed", "born", "dense"]


def words(start: int, count: int) -> str:
    return " ".join(WORDS[3 + (start * 7 + i) % 93] for i in range(count))


TEXT = [{"text": words(i, 12)} for i in range(24)]
PAIRS = [
    {"prompt": words(i, 4), "chosen": " " + words(i + 5, 5), "rejected": " " + words(i + 9, 6)} for i in range(24)
]


def settings(folder, **changes) -> dict:
    return {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        **changes,
    }


@pytest.fixture
def base_for(compressed_dir, dense_dir):
    """Loads the base of a kind of adapter."""
    return lambda kind: AutoModelForCausalLM.from_pretrained(compressed_dir if kind == "compressed" else dense_dir)


@pytest.fixture
def sft(base_for, tokenizer, tmp_path):
    def make(kind: str, config: ClusCompConfig | None = None, folder=None, **changes) -> trl.SFTTrainer:
        return trl.SFTTrainer(
            model=base_for(kind),
            args=trl.SFTConfig(**settings(folder or tmp_path / "run", max_length=32, **changes)),
            train_dataset=datasets.Dataset.from_list(TEXT),
            processing_class=tokenizer,
            peft_config=config or config_for(kind),
        )

    return make


@pytest.fixture
def trained_dir(base_for, tmp_path, tokens):
    """A saved adapter that is trained already, for training to go on from it."""

    def make(kind: str) -> str:
        model = get_peft_model(base_for(kind), config_for(kind))
        train_briefly(model, tokens)
        model.save_pretrained(tmp_path / "trained")
        return str(tmp_path / "trained")

    return make


def losses(trainer, key: str = "loss") -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def snapshot(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed(model, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}


def deltas(model, adapter: str = "default") -> set[str]:
    return {name for name, _ in model.named_parameters() if f".cluscomp_delta.{adapter}." in name}


# -- SFT


@grid(kind=quick(KINDS, "compressed", "dense"))
def test_sft_trains_deltas_and_nothing_else(sft, base_for, kind, tokens, tmp_path):
    trainer = sft(kind)
    model = trainer.model
    before = snapshot(model)
    trainer.train()
    assert len(losses(trainer)) == 3 and all(math.isfinite(loss) for loss in losses(trainer))
    assert len(deltas(model)) == 14 * 3  # codebook and both scales of every matrix
    assert changed(model, before) == deltas(model)
    assert sum(name.endswith("codes") for name in before) == 14

    trainer.save_model(str(tmp_path / "adapter"))
    trained = logits_of(model, tokens)
    reloaded = PeftModel.from_pretrained(base_for(kind), str(tmp_path / "adapter"))
    assert torch.equal(logits_of(reloaded, tokens), trained)
    with model.disable_adapter():
        assert not torch.equal(logits_of(model, tokens), trained)


@grid(kind=quick(KINDS, "born"))
def test_sft_goes_on_from_a_loaded_adapter(base_for, trained_dir, tokenizer, kind, tokens, tmp_path):
    model = PeftModel.from_pretrained(base_for(kind), trained_dir(kind), is_trainable=True)
    start = logits_of(model, tokens)
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**settings(tmp_path / "run", max_steps=1, max_length=32)),
        train_dataset=datasets.Dataset.from_list(TEXT),
        processing_class=tokenizer,
    )
    assert torch.equal(logits_of(model, tokens), start)
    before = snapshot(model)
    trainer.train()
    assert changed(model, before) == deltas(model)


@grid(kind=quick(["compressed", "dense"], "compressed"))
def test_gradient_checkpointing_changes_nothing(sft, kind):
    trainers = [sft(kind, gradient_checkpointing=on, max_steps=2) for on in (False, True)]
    for trainer in trainers:
        trainer.train()
    blocks = [[getattr(module, "gradient_checkpointing", False) for module in t.model.modules()] for t in trainers]
    assert [any(checkpointed) for checkpointed in blocks] == [False, True]
    assert losses(trainers[0]) == losses(trainers[1])
    plain, checkpointed = (snapshot(trainer.model) for trainer in trainers)
    assert all(torch.equal(checkpointed[name], value) for name, value in plain.items())


@grid(kind=quick(["compressed", "dense"], "dense"))
def test_bf16_autocast_keeps_deltas_in_fp32(sft, kind):
    trainer, reference = sft(kind, bf16=True, max_steps=2), sft(kind, max_steps=2)
    before = snapshot(trainer.model)
    for run in (trainer, reference):
        run.train()
    assert changed(trainer.model, before) == deltas(trainer.model)
    assert {trainer.model.get_parameter(name).dtype for name in deltas(trainer.model)} == {torch.float32}
    assert losses(trainer) == pytest.approx(losses(reference), rel=0.03)
    assert losses(trainer) != losses(reference)  # autocast was on


@grid(kind=quick(["compressed", "dense"], "compressed"))
def test_a_resumed_run_is_the_uninterrupted_one(sft, kind, tmp_path):
    schedule = dict(max_steps=6, save_strategy="steps", save_steps=3, lr_scheduler_type="cosine")
    whole = sft(kind, **schedule)
    whole.train()
    resumed = sft(kind, folder=tmp_path / "resumed", **schedule)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert len(set(losses(whole))) == 6
    assert [entry["step"] for entry in resumed.state.log_history if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert losses(resumed) == losses(whole)
    expected = snapshot(whole.model)
    assert changed(resumed.model, expected) == set()


@grid(optim=quick(["adamw_8bit", "paged_adamw_8bit"], "paged_adamw_8bit"))
def test_eight_bit_adamw_trains(sft, optim):
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    # bitsandbytes keeps states of fewer than 4096 numbers in fp32; these codebooks have as many.
    config = ClusCompConfig(task_type="CAUSAL_LM", group_size=2, num_clusters=128, num_blocks=16)
    trainer = sft("born", config=config, optim=optim, max_steps=2)
    before = snapshot(trainer.model)
    try:
        trainer.train()
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"bitsandbytes cannot step on this CPU: {error}")
    assert changed(trainer.model, before) == deltas(trainer.model)
    states = [state for state in trainer.optimizer.state.values() if "state1" in state]
    assert {state["state1"].dtype for state in states} == {torch.uint8}
    assert all(math.isfinite(loss) for loss in losses(trainer))


def test_fused_adamw_takes_the_steps_of_the_plain_one(sft, tmp_path):
    runs = [
        sft("compressed", folder=tmp_path / optim, optim=optim, max_steps=3)
        for optim in ("adamw_torch_fused", "adamw_torch")
    ]
    for trainer in runs:
        trainer.train()
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-5)


# -- DPO


def dpo(model, tokenizer, folder, **changes) -> trl.DPOTrainer:
    config = changes.pop("peft_config", None)
    return trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(**settings(folder, max_length=32, **changes)),
        train_dataset=datasets.Dataset.from_list(PAIRS),
        processing_class=tokenizer,
        peft_config=config,
    )


@grid(kind=quick(KINDS, "dense"))
def test_dpo_of_a_fresh_adapter_refers_to_the_base(base_for, tokenizer, kind, tokens, tmp_path):
    trainer = dpo(base_for(kind), tokenizer, tmp_path, peft_config=config_for(kind))
    model = trainer.model
    before, start = snapshot(model), logits_of(model, tokens)
    trainer.train()
    # The policy is the reference before the first step, and only then.
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(losses(trainer)[1] - math.log(2)) > 1e-4
    assert changed(model, before) == deltas(model)
    assert not torch.equal(logits_of(model, tokens), start)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, tokens), start)


@grid(kind=quick(KINDS, "compressed"))
def test_dpo_of_a_continued_adapter_refers_to_where_it_began(base_for, trained_dir, tokenizer, kind, tokens, tmp_path):
    model = PeftModel.from_pretrained(base_for(kind), trained_dir(kind), is_trainable=True)
    start = logits_of(model, tokens)
    trainer = dpo(model, tokenizer, tmp_path)
    model = trainer.model
    # TRL copied the adapter to one named "ref", parameter by parameter.
    assert set(model.peft_config) == {"default", "ref"}
    before = snapshot(model)
    assert len(deltas(model, "ref")) == len(deltas(model)) == 14 * 3
    for name in deltas(model):
        copy = name.replace(".default.", ".ref.")
        assert torch.equal(before[name], before[copy]) and before[name].any()
        assert not model.get_parameter(copy).requires_grad
        assert model.get_parameter(copy).data_ptr() != model.get_parameter(name).data_ptr()

    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(losses(trainer)[1] - math.log(2)) > 1e-4
    assert changed(model, before) == deltas(model)
    assert not torch.equal(logits_of(model, tokens), start)
    model.set_adapter("ref")
    assert torch.equal(logits_of(model, tokens), start)


# -- GRPO


def reward(completions: list[str], **kwargs) -> list[float]:
    """Shares of words with an even number, different for about any two completions."""
    numbers = [[int(word[1:]) for word in text.split() if word[1:].isdigit()] for text in completions]
    return [sum(1 - number % 2 + number / 1000 for number in found) / max(len(found), 1) for found in numbers]


@grid(kind=quick(KINDS, "compressed", "born"), begin=["fresh", "continued"])
def test_grpo_trains_on_its_own_generations(base_for, trained_dir, tokenizer, kind, begin, tokens, tmp_path):
    if begin == "fresh":
        model, config = base_for(kind), config_for(kind)
    else:
        model, config = PeftModel.from_pretrained(base_for(kind), trained_dir(kind), is_trainable=True), None
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=trl.GRPOConfig(
            **settings(tmp_path / "run", max_steps=2, num_generations=2, max_completion_length=6, beta=0.1)
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": words(i, 4)} for i in range(8)]),
        processing_class=tokenizer,
        peft_config=config,
    )
    model = trainer.model
    before, start = snapshot(model), logits_of(model, tokens)
    trainer.train()
    assert changed(model, before) == deltas(model)
    assert all(math.isfinite(loss) for loss in losses(trainer)) and len(losses(trainer)) == 2
    assert losses(trainer, "reward_std")[0] > 0
    # The reference is where training began: the base, or a copy of the adapter.
    assert losses(trainer, "kl")[0] == pytest.approx(0, abs=1e-6)
    assert losses(trainer, "kl")[1] > 1e-5
    if begin == "continued":
        model.set_adapter("ref")
        assert torch.equal(logits_of(model, tokens), start)


# -- reward models


def test_a_reward_model_trains_its_head_and_saves_it(compressed_dir, tokenizer, tokens, tmp_path):
    def load():
        return AutoModelForSequenceClassification.from_pretrained(compressed_dir, num_labels=1)

    trainer = trl.RewardTrainer(
        model=load(),
        args=trl.RewardConfig(**settings(tmp_path / "run", max_length=32)),
        train_dataset=datasets.Dataset.from_list([{key: row[key] for key in ("chosen", "rejected")} for row in PAIRS]),
        processing_class=tokenizer,
        peft_config=ClusCompConfig(task_type="SEQ_CLS"),
    )
    model = trainer.model
    before = snapshot(model)
    trainer.train()
    assert len(losses(trainer)) == 3 and all(math.isfinite(loss) for loss in losses(trainer))
    heads = {name for name in before if ".score.modules_to_save.default." in name}
    assert len(heads) == 1
    assert changed(model, before) == deltas(model) | heads

    trainer.save_model(str(tmp_path / "adapter"))
    torch.manual_seed(5)
    base = load()  # with another random head
    fresh = logits_of(base, tokens)
    reloaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert torch.equal(logits_of(reloaded, tokens), logits_of(model, tokens))
    assert not torch.equal(logits_of(reloaded, tokens), fresh)


# -- transformers' own Trainer


def plain_settings(folder) -> dict:
    """[`settings`] for transformers' own trainer, which does not checkpoint unless told to and renames the flag."""
    return {name: value for name, value in settings(folder).items() if name != "gradient_checkpointing"}


@grid(kind=quick(KINDS, "born"))
def test_the_trainer_of_transformers_trains_an_adapter(base_for, kind, tokens, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in tokens.repeat(4, 1).tolist()]
    model = get_peft_model(base_for(kind), config_for(kind))
    before = snapshot(model)
    trainer = Trainer(
        model=model, args=TrainingArguments(**plain_settings(tmp_path)), train_dataset=datasets.Dataset.from_list(rows)
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert changed(model, before) == deltas(model)
    trainer.save_model()
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(os.listdir(tmp_path))


def test_a_compressed_model_without_an_adapter_is_not_trained(base_for, tmp_path):
    with pytest.raises(ValueError, match="is clustered and has no adapter"):
        Trainer(model=base_for("compressed"), args=TrainingArguments(**plain_settings(tmp_path)))
