"""Recovery: the loss is the formula, a cached teacher is a teacher, and the recipe wins back what compression lost."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from transformers import AutoModelForCausalLM, TrainingArguments

from cluscomp_peft import ClusCompConfig, ClusCompQuantizationConfig
from cluscomp_peft.compress.recovery import (
    CachedTeacher,
    RecoveryTrainer,
    cache_teacher_logits,
    collate,
    recovery_losses,
)
from cluscomp_peft.hf.evaluate import true_bits
from tests.conftest import CHECKPOINTING, WORDS, logits_of, tiny_llama

RECIPE = str(Path(__file__).resolve().parents[2] / "recipes" / "recover.py")


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """What the dense model says, so that there is something to recover on."""
    torch.manual_seed(1)
    start = torch.randint(3, len(WORDS), (24, 1))
    said = tiny_llama().generate(
        start, attention_mask=torch.ones_like(start), max_length=24, do_sample=True, eos_token_id=None
    )
    return [{"input_ids": row} for row in said]


@pytest.fixture(scope="module")
def rough_dir(tmp_path_factory, dense_dir, tokenizer) -> str:
    """The dense model at 2 bits and a codebook."""
    folder = str(tmp_path_factory.mktemp("rough"))
    config = ClusCompQuantizationConfig(group_size=2, num_clusters=16, scales=False)
    AutoModelForCausalLM.from_pretrained(dense_dir, quantization_config=config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def adapted(folder: str, **changes):
    torch.manual_seed(0)
    return get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), ClusCompConfig(task_type="CAUSAL_LM", **changes)
    )


def trainer_for(folder, model, rows, *, teacher=None, kl_weight=1.0, temperature=1.0, **settings) -> RecoveryTrainer:
    defaults = {
        "max_steps": 1,
        "learning_rate": 1e-4,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 5,
        "weight_decay": 0.0,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return RecoveryTrainer(
        model,
        TrainingArguments(output_dir=str(folder / "trainer"), **{**defaults, **settings}),
        train_dataset=rows,
        eval_dataset=rows,
        teacher=teacher,
        kl_weight=kl_weight,
        temperature=temperature,
    )


def trained(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


# -- the loss


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_chunks_equal_the_formula(temperature):
    student, teacher = torch.randn(2, 3, 7, 11, dtype=torch.float64).mul(3).unbind(0)
    labels = torch.randint(0, 11, (3, 7))
    labels[0, 3:] = -100
    p, log_p = (teacher / temperature).softmax(-1), (teacher / temperature).log_softmax(-1)

    def direct(logits):
        divergence = (p * (log_p - (logits / temperature).log_softmax(-1))).sum(-1)[labels != -100].sum()
        next_token = F.cross_entropy(logits[labels != -100], labels[labels != -100], reduction="sum")
        return torch.stack([temperature**2 * divergence, next_token])

    def with_gradient(function):
        logits = student.clone().requires_grad_()
        losses = function(logits)
        (0.7 * losses[0] + 0.3 * losses[1]).backward()
        return losses, logits.grad

    expected = with_gradient(direct)
    for chunk in (None, 1, 4, 21, 100):
        found = with_gradient(
            lambda logits, chunk=chunk: recovery_losses(
                logits, labels, [teacher], temperature=temperature, chunk_tokens=chunk
            )
        )
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_top_k_and_the_rest_are_the_divergence_of_fewer_outcomes():
    student, teacher = torch.randn(2, 5, 11, dtype=torch.float64).mul(3).unbind(0)
    labels, p, q = torch.arange(5), teacher.softmax(-1), student.softmax(-1)
    last = 0.0
    for k in (1, 4, 10, 11):
        values, tokens = p.topk(k)
        rest = (1 - values.sum(-1, keepdim=True)).clamp(min=0)
        found = recovery_losses(student, labels, [tokens, torch.cat([values, rest], -1).log()])[0]
        q_top = q.gather(-1, tokens)
        expected = (values * (values / q_top).log()).sum(-1)
        if k < 11:
            expected += (rest * (rest / (1 - q_top.sum(-1, keepdim=True))).log()).squeeze(-1)
        torch.testing.assert_close(found, expected.sum())
        assert found >= last
        last = found
    torch.testing.assert_close(last, recovery_losses(student, labels, [teacher])[0])


def test_memory_is_not_tokens_times_vocabulary():
    """What autograd keeps between the passes: the logits, and nothing else as large."""
    logits = torch.randn(512, 1000).bfloat16().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        recovery_losses(logits, torch.zeros(512, dtype=torch.int64), [torch.randn(512, 1000)], chunk_tokens=16)
    assert max(kept, default=0) <= 16 * 1000
    assert recovery_losses(logits, torch.zeros(512, dtype=torch.int64)).dtype == torch.float32


# -- the trainer


def test_loss_is_the_mean_over_tokens_however_batches_are_cut(tmp_path, dense_dir, rough_dir, rows):
    teacher = AutoModelForCausalLM.from_pretrained(dense_dir)
    ragged = [{"input_ids": row["input_ids"][: 6 + 3 * i]} for i, row in enumerate(rows[:6])]
    ragged[0]["labels"] = ragged[0]["input_ids"].clone()
    ragged[0]["labels"][:4] = -100
    student = adapted(rough_dir)
    sums = torch.zeros(2)
    tokens = 0
    for row in ragged:
        labels = row.get("labels", row["input_ids"])[1:]
        logits = [logits_of(model, row["input_ids"][None])[0, :-1] for model in (student, teacher)]
        sums += recovery_losses(logits[0], labels, logits[1:])
        tokens += int((labels != -100).sum())
    kl, next_token = (sums / tokens).tolist()

    results = []
    for size, steps in ((6, 1), (2, 3), (1, 6)):
        trainer = trainer_for(
            tmp_path,
            adapted(rough_dir),
            ragged,
            teacher=teacher,
            kl_weight=0.8,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        )
        metrics = trainer.evaluate()
        assert metrics["eval_kl"] == pytest.approx(kl, rel=1e-4)
        assert metrics["eval_next_token_loss"] == pytest.approx(next_token, rel=1e-4)
        trainer.train()
        log = next(entry for entry in trainer.state.log_history if "loss" in entry)
        assert log["loss"] == pytest.approx(0.8 * kl + 0.2 * next_token, rel=1e-3)
        assert log["kl"] == pytest.approx(kl, rel=1e-4)
        results.append((log["grad_norm"], trained(trainer.model)))
    for norm, parameters in results[1:]:
        assert norm == pytest.approx(results[0][0], rel=1e-3)
        torch.testing.assert_close(parameters, results[0][1], rtol=0, atol=2e-6)


@pytest.mark.parametrize("how", [{"bf16": True}, {CHECKPOINTING: True}])
def test_autocast_and_gradient_checkpointing(tmp_path, dense_dir, rough_dir, rows, how):
    teacher = AutoModelForCausalLM.from_pretrained(dense_dir)
    norms = []
    for settings in ({}, how):
        trainer = trainer_for(tmp_path, adapted(rough_dir), rows, teacher=teacher, **settings)
        trainer.train()
        norms.append(next(entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry))
    assert norms[1] == pytest.approx(norms[0], rel=0.1 if "bf16" in how else 1e-5)


def test_recovery_lowers_the_divergence_and_merging_keeps_it(tmp_path, dense_dir, rough_dir, rows, tokens):
    model = adapted(rough_dir, train_scales=False)
    bits = true_bits(model)
    teacher = AutoModelForCausalLM.from_pretrained(dense_dir)
    trainer = trainer_for(tmp_path, model, rows, teacher=teacher, max_steps=40, per_device_train_batch_size=8)
    before = trainer.evaluate()["eval_kl"]
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_kl"] < 0.6 * before
    assert not any(parameter.requires_grad and parameter.grad is not None for parameter in teacher.parameters())
    expected = logits_of(model, tokens)
    merged = model.merge_and_unload(safe_merge=True)
    assert true_bits(merged) == bits
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), tokens), expected)


# -- the cached teacher


def test_a_cache_of_the_whole_vocabulary_is_the_teacher(tmp_path, dense_dir, rough_dir, rows):
    teacher = AutoModelForCausalLM.from_pretrained(dense_dir)
    ragged = [{"input_ids": row["input_ids"][: 24 - i]} for i, row in enumerate(rows[:10])]
    metrics = []
    for temperature in (1.0, 2.0):
        path = str(tmp_path / f"cache{temperature}")
        cache_teacher_logits(teacher, ragged, path, top_k=len(WORDS), temperature=temperature)
        cached = CachedTeacher(ragged, path)
        for data, live in ((ragged, teacher), (cached, None)):
            trainer = trainer_for(tmp_path, adapted(rough_dir), data, teacher=live, temperature=temperature)
            metrics.append(trainer.evaluate())
            trainer.train()
        assert metrics[-1]["eval_kl"] == pytest.approx(metrics[-2]["eval_kl"], rel=2e-3)
        assert metrics[-1]["eval_next_token_loss"] == metrics[-2]["eval_next_token_loss"]
    assert metrics[0]["eval_kl"] != pytest.approx(metrics[2]["eval_kl"], rel=5e-3)


def test_a_cache_goes_on_where_it_was_and_knows_what_it_is_of(tmp_path, dense_dir, rows):
    teacher, path = AutoModelForCausalLM.from_pretrained(dense_dir), tmp_path / "cache"
    cache_teacher_logits(teacher, rows, str(path), top_k=8)
    shards = sorted(path.iterdir())
    assert len(shards) == 6
    contents = [shard.read_bytes() for shard in shards]
    shards[3].unlink()
    with pytest.raises(ValueError, match=r"teacher-000003.safetensors is missing or damaged"):
        CachedTeacher(rows, str(path))
    times = [shard.stat().st_mtime_ns for shard in shards[:3]]
    cache_teacher_logits(teacher, rows, str(path), top_k=8)
    assert [shard.read_bytes() for shard in sorted(path.iterdir())] == contents
    assert [shard.stat().st_mtime_ns for shard in shards[:3]] == times
    row = CachedTeacher(rows, str(path))[21]
    assert row["teacher_tokens"].shape == (24, 8) and row["teacher_log_probs"].shape == (24, 9)
    assert torch.equal(
        row["teacher_tokens"][:, 0], logits_of(teacher, rows[21]["input_ids"][None])[0].argmax(-1).int()
    )

    with pytest.raises(ValueError, match="other tokens"):
        CachedTeacher(rows[::-1], str(path))
    with pytest.raises(ValueError, match="other top_k: 8, not 9"):
        cache_teacher_logits(teacher, rows, str(path), top_k=9)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(1.01)
    with pytest.raises(ValueError, match="other teacher"):
        cache_teacher_logits(teacher, rows, str(path), top_k=8)
    shards[0].write_bytes(contents[0][:100])
    with pytest.raises(ValueError, match="missing or damaged"):
        CachedTeacher(rows, str(path))


# -- errors


def test_errors_name_the_value_and_the_cure(tmp_path, dense_dir, rough_dir, rows):
    teacher = AutoModelForCausalLM.from_pretrained(dense_dir)
    for value in (-0.1, 1.5):
        with pytest.raises(ValueError, match=f"kl_weight must be between 0 and 1, got {value}"):
            trainer_for(tmp_path, adapted(rough_dir), rows, teacher=teacher, kl_weight=value)
    with pytest.raises(ValueError, match=r"temperature must be between .* got 0"):
        trainer_for(tmp_path, adapted(rough_dir), rows, teacher=teacher, temperature=0)
    with pytest.raises(ValueError, match="vocabulary of 96 tokens and the teacher one of 100"):
        trainer_for(tmp_path, adapted(rough_dir), rows, teacher=tiny_llama(vocab_size=100))
    with pytest.raises(ValueError, match="no teacher: give one"):
        trainer_for(tmp_path, adapted(rough_dir), rows).train()
    with pytest.raises(ValueError, match="top_k must be between 1 and 96, got 97"):
        cache_teacher_logits(teacher, rows, str(tmp_path / "cache"), top_k=97)
    cache_teacher_logits(teacher, rows, str(tmp_path / "cache"), top_k=4, temperature=2)
    with pytest.raises(ValueError, match=r"cached at temperature 2.0, not 1.0"):
        trainer_for(tmp_path, adapted(rough_dir), CachedTeacher(rows, str(tmp_path / "cache")))
    trainer = trainer_for(tmp_path, adapted(rough_dir), rows, kl_weight=0)
    assert "eval_kl" not in trainer.evaluate()


def test_collate_pads_on_the_right():
    batch = collate([{"input_ids": [3, 4, 5]}, {"input_ids": torch.tensor([6, 7]), "labels": [-100, 7]}])
    assert batch["input_ids"].tolist() == [[3, 4, 5], [6, 7, 0]]
    assert batch["labels"].tolist() == [[3, 4, 5], [-100, 7, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


# -- the recipe


@pytest.fixture
def recipe(monkeypatch, tmp_path, dense_dir, rough_dir, rows, tokenizer, capsys):
    data = tmp_path / "text.jsonl"
    data.write_text("".join(json.dumps({"text": tokenizer.decode(row["input_ids"])}) + "\n" for row in rows))

    def run(out, *arguments: str) -> str:
        defaults = ["--model", rough_dir, "--teacher", dense_dir, "--data", str(data), "--output_dir", str(out)]
        defaults += ["--seqlen", "24", "--steps", "8", "--learning_rate", "1e-4", "--evaluations", "4"]
        monkeypatch.setattr(sys, "argv", [RECIPE, *defaults, *arguments])
        capsys.readouterr()
        runpy.run_path(RECIPE, run_name="__main__")
        return capsys.readouterr().out

    return run


def files(folder) -> dict[str, bytes]:
    notes = ("cluscomp_report.json", "report.html", "README.md")
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name not in notes}


def test_recipe_writes_a_checkpoint_and_resumes(tmp_path, rough_dir, recipe, monkeypatch):
    printed = recipe(tmp_path / "whole")
    lines = [line.split() for line in printed.splitlines() if line.startswith(("before", "after"))]
    (_, bits, kl, _), (_, bits_after, kl_after, loss_after) = lines
    assert bits == bits_after and float(kl_after) < float(kl)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert f"{true_bits(model):.3f}" == bits
    notes = json.loads((tmp_path / "whole" / "cluscomp_report.json").read_text())["summary"]["recovery"]
    assert notes["after"]["next_token_loss"] == pytest.approx(float(loss_after), abs=1e-4)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

    step = RecoveryTrainer.training_step

    def stop(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(RecoveryTrainer, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            recipe(tmp_path / "halves")
    assert not (tmp_path / "halves").exists()
    with pytest.raises(ValueError, match="holds an interrupted run; go on with --resume"):
        recipe(tmp_path / "halves")
    with pytest.raises(ValueError, match=r"had --kl_weight 1.0, not 0.5"):
        recipe(tmp_path / "halves", "--resume", "--kl_weight", "0.5")
    recipe(tmp_path / "halves", "--resume")
    assert files(tmp_path / "halves") == files(tmp_path / "whole")
    with pytest.raises(ValueError, match="whole exists already"):
        recipe(tmp_path / "whole")


def test_recipe_with_a_cached_teacher(tmp_path, recipe):
    cache = str(tmp_path / "cache")
    recipe(tmp_path / "out", "--cache_teacher", cache, "--top_k", "90")
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"train", "held_out"}
    assert (tmp_path / "out" / "model.safetensors").is_file()
    with pytest.raises(ValueError, match="other top_k"):
        recipe(tmp_path / "other", "--cache_teacher", cache, "--top_k", "8")
    with pytest.raises(ValueError, match="did not fall"):
        recipe(tmp_path / "other", "--learning_rate", "0")
    assert not (tmp_path / "other").exists() and not (tmp_path / ".other.recovery").exists()


def test_recipe_errors(tmp_path, dense_dir, recipe):
    for arguments, message in (
        (["--holdout", "1"], "--holdout must be between 0 and 1"),
        (["--seqlen", "65"], "--seqlen 65 is more than the 64 positions"),
        (["--model", dense_dir], "is not compressed"),
        (["--kl_weight", "2"], "kl_weight must be between"),
        (["--steps", "0"], "--steps must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe(tmp_path / "out", *arguments)
        assert not (tmp_path / "out").exists() and not (tmp_path / ".out.recovery").exists()
