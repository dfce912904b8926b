"""The steps of smoke.py: what users do with a model, each from the saved checkpoint on, so that none needs another."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from random_models import Shape, build, prepare, random_tokens, save_checkpoint, train_step
from report import Report
from timing import capture, environment, forget_peak, is_cuda, peaks, quiet, synchronize
from torch import nn
from transformers import AutoModelForCausalLM

from cluscomp_peft import ClusCompConfig, ClusCompQuantizationConfig, ClusteredLinear, ops
from cluscomp_peft.ops import reference

METHOD = "cluscomp-4"
LARGE = Shape(hidden=2048, intermediate=5632, layers=6, heads=16, kv_heads=4, vocab=32000)
SMALL = Shape(hidden=512, intermediate=1024, layers=1, heads=4, kv_heads=2, vocab=256)
TINY = Shape(hidden=64, intermediate=128, layers=2, heads=4, kv_heads=2, vocab=128)
LENGTHS = (1, 5, 40)  # the kernel of few tokens, the same with more than one, and decoding


def run(device: str, folder: str, report: Report, names: list[str] | None) -> None:
    """All steps, or those named."""
    quiet()
    report.note(environment=environment(device))
    steps = Steps(device, Path(folder))
    known = {step.__name__.replace("_", " "): step for step in ALL}
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise SystemExit(f"no such steps: {', '.join(unknown)}; there are {', '.join(known)}.")
    for name, step in known.items():
        if names is None or name in names:
            report.run(name, lambda step=step: step(steps))
            forget_peak(device)


def check(condition: bool, what: str) -> None:
    if not condition:
        raise AssertionError(what)


class Steps:
    """A device, a compressed checkpoint, and what the steps share."""

    def __init__(self, device: str, folder: Path) -> None:
        self.device = device
        self.folder = folder
        self.shape = LARGE if is_cuda(device) else TINY

    @cached_property
    def checkpoint(self) -> str:
        """A clustered random model on disk; an earlier process may have left it."""
        path = self.folder / "model"
        if not (path / "config.json").exists():
            save_checkpoint(build(self.shape, METHOD, self.device), METHOD, path)
        return str(path)

    def load(self, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Any:
        settings = {"device_map": self.device, **settings}
        return AutoModelForCausalLM.from_pretrained(self.checkpoint, dtype=dtype, **settings)

    def tokens(self, length: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
        torch.manual_seed(seed)
        return random_tokens(self.shape, batch, length, self.device)

    def trained(self, steps: int = 3) -> tuple[Any, list[float]]:
        """A model with an adapter after a few checkpointed steps in bf16, and the losses."""
        model, optimizer = prepare(self.load(), METHOD, checkpointing=True)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        losses = [train_step(model, optimizer, self.tokens(96, 2)) for _ in range(steps)]
        return model, [float(loss) for loss in losses]


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    model.eval()
    return model(input_ids=tokens, use_cache=False).logits


def deltas(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def clustered(model: nn.Module) -> list[ClusteredLinear]:
    return [module for module in model.modules() if isinstance(module, ClusteredLinear)]


def kernels_run(steps: Steps) -> dict:
    """Triton compiles and runs there, and the ops agree with the reference."""
    from cluscomp_peft.ops import cuda

    found = {"available": cuda.available(torch.device(steps.device))}
    check(found["available"] or not is_cuda(steps.device), "the kernels do not run on this device")
    model = build(steps.shape, METHOD, steps.device)
    layer = clustered(model)[-1]
    parts = (layer.codes, layer.codebook, layer.scale_in, layer.scale_out)
    exact = reference.decode(*parts, None, layer.out_features, torch.float32)
    check(torch.equal(layer.decode(torch.bfloat16), exact.bfloat16()), "decode is not the reference's weight")
    for tokens in (1, 5, 16, 40):
        x = torch.randn(tokens, layer.in_features, device=steps.device).bfloat16()
        wanted = x.float() @ exact.t()
        with torch.no_grad():
            error = float((layer(x) - wanted).norm() / wanted.norm())
        check(error < 1e-2, f"linear at {tokens} tokens is off by {error:.2g}")
        found[f"error at {tokens}"] = error
    upstream = torch.randn(40, layer.out_features, device=steps.device).bfloat16()
    ours = ops.codebook_grad(x, upstream, *parts)
    theirs = reference.codebook_grad(x.double(), upstream.double(), *parts, None)
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
    with model.disable_adapter():
        base = {length: logits(model, steps.tokens(length)) for length in LENGTHS}
    unmerged = {length: logits(model, steps.tokens(length)) for length in LENGTHS}
    check(not torch.equal(base[40], unmerged[40]), "training changed nothing")
    model.merge_adapter()
    wrong = [length for length in LENGTHS if not torch.equal(logits(model, steps.tokens(length)), unmerged[length])]
    check(not wrong, f"merged logits differ at {wrong} tokens")
    model.unmerge_adapter()
    wrong = [length for length in LENGTHS if not torch.equal(logits(model, steps.tokens(length)), unmerged[length])]
    check(not wrong, f"unmerged logits differ at {wrong} tokens")
    merged = model.merge_and_unload()
    wrong = [length for length in LENGTHS if not torch.equal(logits(merged, steps.tokens(length)), unmerged[length])]
    check(not wrong, f"logits of merge_and_unload differ at {wrong} tokens")
    with tempfile.TemporaryDirectory() as folder:
        merged.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map=steps.device)
    check(torch.equal(logits(again, steps.tokens(40)), unmerged[40]), "the merged model reloads with other logits")
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


def capture_a_layer(steps: Steps) -> dict:
    """A CUDA graph of a layer gives what the call gives, also for inputs that came after the capture."""
    if not is_cuda(steps.device):
        return {"skipped": "no CUDA"}
    model = get_peft_model(steps.load(), ClusCompConfig(task_type="CAUSAL_LM"))
    wrapped = model.base_model.model.model.layers[0].mlp.down_proj
    plain = wrapped.base_layer
    wrong = []
    for name, layer in (("plain", plain), ("with an adapter", wrapped)):
        for tokens in (1, 16, 64):
            x = torch.randn(1, tokens, steps.shape.intermediate, device=steps.device).bfloat16()
            with torch.no_grad():
                graph, y = capture(lambda layer=layer, x=x: layer(x))
                x.copy_(torch.randn_like(x))
                graph.replay()
                if not torch.equal(y, layer(x)):
                    wrong.append(f"{name} at {tokens} tokens")
    check(not wrong, f"graphs give other numbers: {', '.join(wrong)}")
    return {}


def capture_a_training_layer(steps: Steps) -> dict:
    """Forward and backward of a layer in one graph."""
    if not is_cuda(steps.device):
        return {"skipped": "no CUDA"}
    model = get_peft_model(steps.load(), ClusCompConfig(task_type="CAUSAL_LM")).train()
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    x = torch.randn(1, 96, steps.shape.intermediate, device=steps.device).bfloat16()
    chosen = [value for value in layer.parameters() if value.requires_grad]

    def job() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(layer(x).float().square().sum(), chosen)

    graph, found = capture(job)
    graph.replay()
    check(all(torch.equal(one, other) for one, other in zip(found, job(), strict=True)), "other gradients")
    return {}


def generate(steps: Steps) -> dict:
    """Greedy text, with an adapter and merged."""
    model, _ = steps.trained()
    model.eval()
    settings = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    expected = model.generate(steps.tokens(8, 2), **settings)
    check(expected.shape == (2, 24), f"text of shape {tuple(expected.shape)}")
    merged = model.merge_and_unload().generate(steps.tokens(8, 2), **settings)
    check(torch.equal(merged, expected), "the merged model writes another text")
    return {}


def generate_with_a_static_cache(steps: Steps) -> dict:
    """transformers compiles the model and captures graphs for it, on CUDA by itself."""
    model = steps.load().eval()
    settings = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    expected = model.generate(steps.tokens(8), **settings)
    found = model.generate(steps.tokens(8), cache_implementation="static", **settings)
    check(found.shape == expected.shape, f"text of shape {tuple(found.shape)}")
    # Compiled code rounds elsewhere, so a token may differ, and then all after it.
    return {"same tokens": float((found == expected).float().mean())}


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


def offload_to_the_host(steps: Steps) -> dict:
    """Some blocks stay in the memory of the host (without CUDA, on disk) and come when they are called."""
    expected = logits(steps.load(), steps.tokens(40))
    away = "cpu" if is_cuda(steps.device) else "disk"
    here = 0 if is_cuda(steps.device) else "cpu"
    places = {"model.embed_tokens": here, "model.norm": here, "model.rotary_emb": here, "lm_head": here}
    for index in range(steps.shape.layers):
        places[f"model.layers.{index}"] = here if index == 0 else away
    with tempfile.TemporaryDirectory() as folder:
        model = steps.load(device_map=places, offload_folder=folder)
        gone = sum(layer.codes.is_meta for layer in clustered(model))
        check(gone == 7 * (steps.shape.layers - 1), f"{gone} layers are offloaded")
        check(torch.equal(logits(model, steps.tokens(40)), expected), "logits differ")
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


def compile_a_layer(steps: Steps) -> dict:
    """torch.compile of a layer in one piece: the same numbers, forward and backward."""
    torch.compiler.reset()
    model = get_peft_model(steps.load(), ClusCompConfig(task_type="CAUSAL_LM", init_weights=False))
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    compiled = torch.compile(layer, fullgraph=True)
    chosen = [value for value in layer.parameters() if value.requires_grad]
    for tokens in (1, 96):
        x = torch.randn(1, tokens, steps.shape.intermediate, device=steps.device).bfloat16()
        with torch.no_grad():
            check(torch.equal(compiled(x), layer(x)), f"other numbers at {tokens} tokens")
    pairs = [torch.autograd.grad(call(x).float().square().sum(), chosen) for call in (layer, compiled)]
    errors = [float((one - other).norm() / one.norm()) for one, other in zip(*pairs, strict=True)]
    check(max(errors) < 1e-3, f"gradients are off by {max(errors):.2g}")
    return {"error of gradients": max(errors)}


def compile_the_model(steps: Steps) -> dict:
    """torch.compile of a model with an adapter."""
    torch.compiler.reset()
    model, _ = steps.trained()
    tokens = steps.tokens(40)
    expected = logits(model, tokens)
    compiled = torch.compile(model)
    with torch.no_grad():
        found = compiled(input_ids=tokens, use_cache=False).logits
    error = float((found.float() - expected.float()).norm() / expected.float().norm())
    check(error < 3e-2, f"logits are off by {error:.2g}")
    synchronize(steps.device)
    return {"error of logits": error}


ALL: tuple[Callable[[Steps], dict], ...] = (
    kernels_run,
    load,
    train,
    train_twice,
    merge,
    save_and_load_an_adapter,
    two_adapters,
    capture_a_layer,
    capture_a_training_layer,
    generate,
    scale_gradients_in_fp16,
    offload_to_the_host,
    cluster_on_the_device,
    compile_a_layer,
    compile_the_model,
    generate_with_a_static_cache,
)
