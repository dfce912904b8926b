"""Serving on a device: text, graphs, compilers, and weights that are elsewhere until they are called."""

from __future__ import annotations

import accelerate
import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from cluscomp_peft import ClusteredLinear
from cluscomp_peft.cli import main
from tests.conftest import config_for, logits_of, train_briefly
from tests.gpu.conftest import LENGTHS

GREEDY = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False)


@pytest.fixture
def trained(models, text):
    """A model in bf16 with a trained adapter."""
    model = get_peft_model(models.load(), config_for("compressed", num_blocks=2))
    train_briefly(model, text(40), lr=5e-4)
    return model.eval()


def clustered(model: torch.nn.Module) -> list[ClusteredLinear]:
    return [module for module in model.modules() if isinstance(module, ClusteredLinear)]


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    return bool((found.float() - expected.float()).norm() <= tolerance * expected.float().norm())


# -- text


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_merged_and_unmerged_write_the_same(trained, text, settings):
    prompt = text(9)
    mask = torch.ones_like(prompt)
    mask[0, :4] = 0  # padded on the left
    settings = {**GREEDY, **settings, "attention_mask": mask}
    expected = trained.generate(prompt, **settings)
    assert expected.shape == (2, 21)
    assert torch.equal(trained.merge_and_unload().generate(prompt, **settings), expected)


def test_a_static_cache(models, text):
    model = models.load(dtype=torch.float32).eval()
    expected = model.generate(text(9), **GREEDY)
    found = model.generate(text(9), cache_implementation="static", disable_compile=True, **GREEDY)
    assert torch.equal(found, expected)


@pytest.mark.gpu
def test_a_static_cache_that_transformers_compiles(models, text, device):
    if device == "cpu":
        pytest.skip("transformers compiles for a GPU alone")
    model = models.load(dtype=torch.float32).eval()
    expected = model.generate(text(9), **GREEDY)
    assert torch.equal(model.generate(text(9), cache_implementation="static", **GREEDY), expected)


# -- graphs and streams


def captured(job):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        job()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = job()
    return graph, result


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 5, 16, 17, 64, 200])
def test_a_graph_of_a_layer(trained, device, tokens):
    if device == "cpu":
        pytest.skip("graphs are CUDA's")
    wrapped = trained.base_model.model.model.layers[0].mlp.down_proj
    for layer in (wrapped, wrapped.base_layer):
        x = torch.randn(1, tokens, 300, device=device).bfloat16()
        with torch.no_grad():
            graph, y = captured(lambda layer=layer, x=x: layer(x))
            for _ in range(2):
                x.copy_(torch.randn_like(x))
                graph.replay()
                assert torch.equal(y, layer(x))


@pytest.mark.gpu
def test_a_graph_of_a_layers_training(trained, device):
    if device == "cpu":
        pytest.skip("graphs are CUDA's")
    layer = trained.train().base_model.model.model.layers[0].mlp.down_proj
    x = torch.randn(1, 64, 300, device=device).bfloat16()
    chosen = [value for value in layer.parameters() if value.requires_grad]

    def job():
        return torch.autograd.grad(layer(x).float().square().sum(), chosen)

    graph, found = captured(job)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(found, job(), strict=True))


@pytest.mark.gpu
def test_another_stream(trained, text, device):
    if device == "cpu":
        pytest.skip("streams are CUDA's")
    expected = logits_of(trained, text(40))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = logits_of(trained, text(40))
    stream.synchronize()
    assert torch.equal(found, expected)


# -- compilers


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 40])
def test_a_compiled_layer(trained, device, tokens):
    torch.compiler.reset()
    layer = trained.train().base_model.model.model.layers[0].mlp.down_proj
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(1, tokens, 300, device=device).bfloat16()
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
    chosen = [value for value in layer.parameters() if value.requires_grad]
    found, expected = (torch.autograd.grad(call(x).float().square().sum(), chosen) for call in (compiled, layer))
    assert all(close(one, other, 1e-3) for one, other in zip(found, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_model(trained, text, mode):
    torch.compiler.reset()
    expected = logits_of(trained, text(40))
    compiled = torch.compile(trained, mode=mode)
    for _ in range(3):  # graphs are recorded in the second
        assert close(logits_of(compiled, text(40)), expected, 3e-2)


# -- elsewhere


def places(away: str, here: int | str) -> dict[str, int | str]:
    return {
        "model.embed_tokens": here,
        "model.layers.0": here,
        "model.layers.1": away,
        "model.norm": here,
        "model.rotary_emb": here,
        "lm_head": here,
    }


@pytest.fixture
def halves(models, device, tmp_path):
    """A model whose second block is in the host's memory, without CUDA on disk."""
    away, here = ("disk", "cpu") if device == "cpu" else ("cpu", 0)
    model = models.load(device_map=places(away, here), offload_folder=tmp_path)
    assert sum(layer.codes.is_meta for layer in clustered(model)) == 7
    return model


def test_weights_on_the_host(halves, models, text):
    whole = models.load()
    assert all(torch.equal(logits_of(halves, text(length)), logits_of(whole, text(length))) for length in LENGTHS)
    assert torch.equal(halves.generate(text(9), **GREEDY), whole.generate(text(9), **GREEDY))


def test_an_adapter_on_weights_on_the_host(halves, models, text):
    losses = []
    for base in (halves, models.load()):
        model = get_peft_model(base, config_for("compressed"))
        losses.append(train_briefly(model, text(40), lr=5e-4))
        trained = logits_of(model, text(40))
        model.merge_adapter()
        assert torch.equal(logits_of(model, text(40)), trained)
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_accelerates_offloading(models, text, device):
    expected = logits_of(models.load(), text(40))
    model = accelerate.cpu_offload(models.load(device_map="cpu"), execution_device=torch.device(device))
    assert torch.equal(logits_of(model, text(40)), expected)


def test_moving_there_and_back(trained, text, device):
    expected = logits_of(trained, text(40))
    trained.cpu()
    here = logits_of(trained, text(40).cpu())
    assert close(here, expected.cpu(), 5e-2)
    trained.to(device)
    assert torch.equal(logits_of(trained, text(40)), expected)


# -- from the shell


def test_the_command_compresses_there(models, text, device, tmp_path):
    assert not main(["compress", models.dense, str(tmp_path / "out"), "--bits", "5", "--device", device])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map=device)
    assert len(clustered(model)) == 14
    assert close(logits_of(model, text(40)), logits_of(models.load("dense", torch.float32), text(40)), 0.5)
