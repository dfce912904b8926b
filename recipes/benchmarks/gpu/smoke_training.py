"""Steps of smoke.py: are the kernels right, and what is trained, merged and saved there?"""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from random_models import build, random_tokens, train_step
from smoke_base import LENGTHS, METHOD, SMALL, TINY, Steps, check, clustered, deltas, logits
from timing import forget_peak, is_cuda, peaks
from transformers import AutoModelForCausalLM

from cluscomp_peft import ClusCompConfig, ClusCompQuantizationConfig, ops
from cluscomp_peft.ops.backends import reference


def kernels_run(steps: Steps) -> dict:
    """Triton compiles and runs there, and the ops agree with the reference."""
    from cluscomp_peft.ops.backends import cuda

    found = {"available": cuda.available(torch.device(steps.device))}
    check(found["available"] or not is_cuda(steps.device), "the kernels do not run on this device")
    model = build(steps.shape, METHOD, steps.device)
    layer = clustered(model)[-1]
    weight = ops.PackedWeight(layer.codes, layer.codebook, layer.out_features, layer.scale_in, layer.scale_out)
    exact = reference.decode(weight, torch.float32)
    check(torch.equal(layer.decode(torch.bfloat16), exact.bfloat16()), "decode is not the reference's weight")
    for tokens in (16, *LENGTHS):
        x = torch.randn(tokens, layer.in_features, device=steps.device).bfloat16()
        wanted = x.float() @ exact.t()
        with torch.no_grad():
            error = float((layer(x) - wanted).norm() / wanted.norm())
        check(error < 1e-2, f"linear at {tokens} tokens is off by {error:.2g}")
        found[f"error at {tokens}"] = error
    upstream = torch.randn(len(x), layer.out_features, device=steps.device).bfloat16()
    ours = ops.codebook_grad(x, upstream, weight)
    theirs = reference.codebook_grad(x.double(), upstream.double(), weight)
    pairs = [pair for pair in zip(ours, theirs, strict=True) if pair[1].numel()]
    error = max(float((mine - other).norm() / other.norm()) for mine, other in pairs)
    check(error < 4e-3, f"codebook_grad is off by {error:.2g}")
    return {**found, "error of the gradient": error}


def load(steps: Steps) -> dict:
    """The loaded model is the one that was saved."""
    built = build(steps.shape, METHOD, steps.device)
    expected = logits(built, steps.tokens(40))
    forget_peak(steps.device)
    model = steps.load()
    check(len(clustered(model)) == 7 * steps.shape.layers, "not every linear layer is clustered")
    check(all(value.device.type == torch.device(steps.device).type for value in model.parameters()), "left behind")
    check(torch.equal(logits(model, steps.tokens(40)), expected), "logits differ from those of the saved model")
    return {"MB": sum(value.nbytes for value in model.parameters()) / 1e6, **peaks(steps.device)}


def train(steps: Steps) -> dict:
    """Three checkpointed steps in bf16."""
    model, losses = steps.trained()
    check(all(loss == loss and loss < 1e4 for loss in losses), f"losses {losses}")
    check(losses[-1] < losses[0], f"three steps on the same text do not lower the loss: {losses}")
    check(all(bool(value.any()) for value in deltas(model).values()), "a delta did not move")
    return {"losses": [round(loss, 4) for loss in losses], **peaks(steps.device)}


def train_twice(steps: Steps) -> dict:
    """The same run gives the same bytes, with what torch itself does differently from run to run switched off."""
    found = {}
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                (first, losses), (second, others) = steps.trained(), steps.trained()
        finally:
            torch.use_deterministic_algorithms(False)
        pairs = zip(deltas(first).values(), deltas(second).values(), strict=True)
        key = "deterministic" if deterministic else "as it is"
        found[key] = losses == others and all(torch.equal(one, other) for one, other in pairs)
    warned = [str(warning.message)[:80] for warning in caught if "deterministic" in str(warning.message)]
    check(found["deterministic"], f"two runs differ (warnings: {sorted(set(warned))})")
    return found


def merge(steps: Steps) -> dict:
    """Merged logits are the unmerged ones bit for bit, and unmerging restores the base."""
    model, _ = steps.trained()
    expected = {length: logits(model, steps.tokens(length)) for length in LENGTHS}

    def compare(what: str, model: Any) -> None:
        found = {length: logits(model, steps.tokens(length)) for length in LENGTHS}
        wrong = [length for length in LENGTHS if not torch.equal(found[length], expected[length])]
        check(not wrong, f"{what} logits differ at {wrong} tokens")

    with model.disable_adapter():
        check(not torch.equal(logits(model, steps.tokens(40)), expected[40]), "training changed nothing")
    model.merge_adapter()
    compare("merged", model)
    model.unmerge_adapter()
    compare("unmerged", model)
    merged = model.merge_and_unload()
    compare("merge_and_unload's", merged)
    with tempfile.TemporaryDirectory() as folder:
        merged.save_pretrained(folder)
        compare("reloaded", AutoModelForCausalLM.from_pretrained(folder, device_map=steps.device))
    return {}


def save_and_load_an_adapter(steps: Steps) -> dict:
    model, _ = steps.trained()
    expected = logits(model, steps.tokens(40))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(steps.load(), folder)
        check(torch.equal(logits(again, steps.tokens(40)), expected), "the adapter reloads with other logits")
    return {}


def two_adapters(steps: Steps) -> dict:
    """Each keeps its own logits while the other trains."""
    model, _ = steps.trained()
    expected = logits(model, steps.tokens(40))
    model.add_adapter("other", ClusCompConfig(task_type="CAUSAL_LM"))
    model.set_adapter("other")
    model.train()
    chosen = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=1e-3)
    train_step(model, optimizer, steps.tokens(96, 2, seed=1))
    other = logits(model, steps.tokens(40))
    check(not torch.equal(other, expected), "the second adapter changed nothing")
    model.set_adapter("default")
    check(torch.equal(logits(model, steps.tokens(40)), expected), "the first adapter's logits changed")
    model.base_model.merge_adapter(["default", "other"])
    both = logits(model, steps.tokens(40))
    check(not torch.equal(both, expected) and not torch.equal(both, other), "merging both is one of them")
    return {}


def scale_gradients_in_fp16(steps: Steps) -> dict:
    """A GradScaler step moves the deltas; one whose gradients overflow leaves them and lowers the scale."""
    model = get_peft_model(steps.load(torch.float16), ClusCompConfig(task_type="CAUSAL_LM")).train()
    chosen = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=1e-3)
    kind = torch.device(steps.device).type
    scaler = torch.amp.GradScaler(kind, init_scale=256.0)
    before = deltas(model)
    tokens = steps.tokens(96, 2)
    for factor in (1.0, float("inf")):
        with torch.autocast(kind, dtype=torch.float16):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss * factor
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        after = deltas(model)
        moved = any(not torch.equal(before[name], after[name]) for name in before)
        check(moved == (factor == 1.0), f"a step of a loss times {factor} {'moved' if moved else 'did not move'}")
        check(all(bool(value.isfinite().all()) for value in after.values()), "deltas are not finite")
        before = after
    check(scaler.get_scale() == 128.0, f"scale {scaler.get_scale()}")
    return {}


def cluster_on_the_device(steps: Steps) -> dict:
    """A small dense model is compressed there, both ways that need no calibration, and trains."""
    shape = replace(SMALL if is_cuda(steps.device) else TINY, layers=1)
    with tempfile.TemporaryDirectory() as folder:
        build(shape, "dense", steps.device).save_pretrained(folder)
        settings = {"dtype": torch.bfloat16, "device_map": steps.device}
        config = ClusCompQuantizationConfig(bits=4)
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **settings)
        check(len(clustered(model)) == 7, "not every linear layer was clustered")
        for base in ("clustered", "dense"):
            dense = AutoModelForCausalLM.from_pretrained(folder, **settings)
            adapter = ClusCompConfig(task_type="CAUSAL_LM", bits=4, base=base)
            model = get_peft_model(dense, adapter).train()
            chosen = [value for value in model.parameters() if value.requires_grad]
            tokens = random_tokens(shape, 2, 64, steps.device)
            train_step(model, torch.optim.AdamW(chosen, lr=1e-3), tokens)
            expected = logits(model, tokens)
            model.merge_adapter()
            check(torch.equal(logits(model, tokens), expected), f"merged logits differ with base={base!r}")
    return {}
