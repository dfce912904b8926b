"""Steps of smoke.py: graphs, text, compilers, and weights that are elsewhere until they are called."""

from __future__ import annotations

import tempfile

import torch
from peft import get_peft_model
from smoke_base import Steps, check, clustered, logits
from timing import capture, is_cuda

from cluscomp_peft import ClusCompConfig


def capture_a_layer(steps: Steps) -> dict:
    """A CUDA graph of a layer gives what the call gives, also for inputs that came after the capture."""
    if not is_cuda(steps.device):
        return {"skipped": "no CUDA"}
    model = get_peft_model(steps.load(), ClusCompConfig(task_type="CAUSAL_LM"))
    wrapped = model.base_model.model.model.layers[0].mlp.down_proj
    plain = wrapped.base_layer
    wrong = []
    for name, layer in (("plain", plain), ("with an adapter", wrapped)):
        for tokens in (1, 16, 64, 100):
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
    return {"error of logits": error}
