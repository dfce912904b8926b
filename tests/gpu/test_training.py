"""Training on a device: adapters move and merge, the same run gives the same bytes, precisions do what they say.

Attention of torch adds up gradients in any order on CUDA unless it is told not to; `deterministic` does that.
"""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from tests.conftest import CHECKPOINTING, checkpoint_activations, config_for, logits_of, train_briefly
from tests.gpu.conftest import LENGTHS
from tests.grids import grid, quick

KINDS = ["compressed", "born", "dense"]


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def deltas(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def checkpointed(model):
    checkpoint_activations(model)
    return model


def gradients(model, tokens: torch.Tensor) -> list[torch.Tensor]:
    chosen = [value for value in model.parameters() if value.requires_grad]
    loss = model.train()(input_ids=tokens, labels=tokens, use_cache=False).loss
    return list(torch.autograd.grad(loss, chosen))


@grid(kind=KINDS, dtype={"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16})
def test_what_is_trained_is_merged_to_the_bit(models, text, kind, dtype, tmp_path):
    model = get_peft_model(models.load(kind, dtype), config_for(kind, num_blocks=2))
    before = {length: logits_of(model, text(length)) for length in LENGTHS}
    losses = train_briefly(model, text(40), lr=5e-4)
    assert losses[-1] < losses[0]
    after = {length: logits_of(model, text(length)) for length in LENGTHS}
    assert not any(torch.equal(before[length], after[length]) for length in LENGTHS)
    model.merge_adapter()
    assert all(torch.equal(logits_of(model, text(length)), after[length]) for length in LENGTHS)
    model.unmerge_adapter()
    assert all(torch.equal(logits_of(model, text(length)), after[length]) for length in LENGTHS)
    with model.disable_adapter():
        assert all(torch.equal(logits_of(model, text(length)), before[length]) for length in LENGTHS)
    merged = model.merge_and_unload()
    # A dense layer's numbers for few tokens are those of cuBLAS, not of the kernels that decode on the way.
    exact = LENGTHS if kind == "compressed" else LENGTHS[-1:]
    assert all(torch.equal(logits_of(merged, text(length)), after[length]) for length in exact)
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=models.device)
    assert loaded.dtype == dtype
    assert all(torch.equal(logits_of(loaded, text(length)), after[length]) for length in exact)


@grid(kind=quick(KINDS, "compressed"))
def test_a_saved_adapter_gives_the_same_logits(models, text, kind, tmp_path):
    model = get_peft_model(models.load(kind), config_for(kind))
    train_briefly(model, text(40))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(models.load(kind), tmp_path)
    assert all(torch.equal(logits_of(loaded, text(length)), logits_of(model, text(length))) for length in LENGTHS)
    elsewhere = PeftModel.from_pretrained(models.load(kind, torch.float32, device_map="cpu"), tmp_path)
    expected = logits_of(model, text(40)).float().cpu()
    assert (logits_of(elsewhere, text(40).cpu()) - expected).norm() < 0.05 * expected.norm()


@grid(kind=quick(KINDS, "born"))
def test_the_same_run_gives_the_same_bytes(models, text, kind, deterministic):
    found = []
    for _ in range(2):
        model = checkpointed(get_peft_model(models.load(kind), config_for(kind)))
        found.append((train_briefly(model, text(40)), deltas(model)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])


@grid(kind=quick(KINDS, "compressed", "dense"))
def test_checkpointing_changes_no_gradient(models, text, kind, deterministic):
    model = get_peft_model(models.load(kind), config_for(kind, init_weights=False))
    plain = gradients(model, text(40))
    again = gradients(checkpointed(model), text(40))
    assert len(plain) >= 14 and all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))
    assert all(bool(gradient.any()) for gradient in plain)


def test_gradients_are_those_of_the_cpu(models, text):
    """In fp32, where nothing but the order of sums differs; TF32 is off by default."""
    there = get_peft_model(models.load(dtype=torch.float32), config_for("compressed"))
    here = get_peft_model(models.load(dtype=torch.float32, device_map="cpu"), config_for("compressed"))
    expected = gradients(here, text(40).cpu())
    for found, wanted in zip(gradients(there, text(40)), expected, strict=True):
        assert (found.cpu() - wanted).norm() <= 1e-3 * wanted.norm()


@grid(kind=quick(KINDS, "dense"))
def test_a_scaler_skips_steps_that_overflow(models, text, kind, device):
    model = get_peft_model(models.load(kind, torch.float16), config_for(kind)).train()
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-3)
    scaler = torch.amp.GradScaler(device, init_scale=256.0)
    before = deltas(model)
    for factor, scale in ((1.0, 256.0), (float("inf"), 128.0), (1.0, 128.0)):
        with torch.autocast(device, dtype=torch.float16):
            loss = model(input_ids=text(40), labels=text(40), use_cache=False).loss
        scaler.scale(loss * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        after = deltas(model)
        moved = [name for name in after if not torch.equal(after[name], before[name])]
        assert len(moved) == (0 if factor > 1 else len(after)) and scaler.get_scale() == scale
        assert all(bool(value.isfinite().all()) for value in after.values())
        before = after


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_autocast_of_a_model_in_fp32(models, text, device, dtype):
    model = get_peft_model(models.load(dtype=torch.float32), config_for("compressed")).train()
    chosen = [value for value in model.parameters() if value.requires_grad]
    with torch.autocast(device, dtype=dtype):
        loss = model(input_ids=text(40), labels=text(40), use_cache=False).loss
    found = torch.autograd.grad(loss, chosen)
    exact = gradients(model, text(40))
    assert all(gradient.dtype == torch.float32 for gradient in found)
    assert all((one - other).norm() < 0.1 * other.norm() for one, other in zip(found, exact, strict=True))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_trainer_of_transformers(models, text, device, precision, tmp_path):
    if precision == "fp16" and device == "cpu":
        pytest.skip("transformers trains in fp16 on a GPU alone")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    model = get_peft_model(models.load(dtype=dtype), config_for("compressed"))
    before = deltas(model)
    rows = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in text(40, 8).cpu()]
    settings = {precision: True, "use_cpu": device == "cpu", CHECKPOINTING: True}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=2,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        **settings,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(0 < loss < 100 for loss in losses)
    after = deltas(model)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    loaded = PeftModel.from_pretrained(models.load(dtype=dtype), tmp_path / "checkpoint-2")
    assert torch.equal(logits_of(loaded, text(40)), logits_of(model, text(40)))


def test_two_adapters_share_codes_and_nothing_else(models, text):
    model = get_peft_model(models.load(), config_for("compressed"))
    train_briefly(model, text(40), lr=5e-4)
    first = logits_of(model, text(40))
    model.add_adapter("other", config_for("compressed"))
    model.set_adapter("other")
    train_briefly(model, text(40, seed=2), lr=5e-4)
    second = logits_of(model, text(40))
    model.set_adapter("default")
    assert torch.equal(logits_of(model, text(40)), first) and not torch.equal(first, second)
    model.base_model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both")
    model.set_adapter("both")
    both = logits_of(model, text(40))
    model.merge_adapter()
    assert torch.equal(logits_of(model, text(40)), both)
    model.unmerge_adapter()
    model.delete_adapter("both")
    model.set_adapter("other")
    assert torch.equal(logits_of(model, text(40)), second)
