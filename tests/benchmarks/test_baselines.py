"""The baselines of recipes/benchmarks/baselines.py: errors and sizes that can be worked out by hand.

And that train_reference_model.py, which makes a model to measure them on, writes one that loads.
"""

from __future__ import annotations

import copy
import importlib
import itertools
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from cluscomp_peft.compress.budget.targets import dense_linears
from cluscomp_peft.compress.calibration.text import token_windows
from cluscomp_peft.dense import weight_of
from cluscomp_peft.hf.evaluate import evaluate
from tests.conftest import WORDS, logits_of, tiny_llama

BENCHMARKS = Path(__file__).resolve().parents[2] / "recipes" / "benchmarks"


@pytest.fixture
def baselines(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("baselines")


@pytest.fixture
def windows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, len(WORDS), (1, length), generator=generator) for length in (40, 64, 7)]


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: weight_of(layer).detach().float().clone() for name, layer in dense_linears(model)}


def error(model, dense, power: float = 2.0) -> float:
    before, after = weights_of(dense), weights_of(model)
    return sum(float((after[name] - before[name]).abs().pow(power).sum()) for name in before)


# -- round to nearest


def test_a_bit_more_halves_the_error_of_rounding(baselines):
    dense = tiny_llama()
    errors = [
        error(baselines.round_to_nearest(copy.deepcopy(dense), bits, 32)[0], dense) ** 0.5 for bits in range(3, 8)
    ]
    for coarse, fine in itertools.pairwise(errors):
        assert 0.42 < fine / coarse < 0.55


@pytest.mark.parametrize("zero", ["fp16", "packed"])
def test_rounding_is_off_by_half_a_step_at_most_and_bits_count_a_short_last_block(baselines, zero):
    dense = tiny_llama()
    model, bits = baselines.round_to_nearest(copy.deepcopy(dense), 3, 32, zero)
    stored = weights = 0
    before, after = weights_of(dense), weights_of(model)
    for name, old in before.items():
        # 52 inputs are a block of 32 and one of 20.
        for part, new in zip(old.split(32, 1), after[name].split(32, 1), strict=True):
            low, high = part.amin(1), part.amax(1)
            if zero == "packed":
                low, high = low.clamp(max=0), high.clamp(min=0)
            # Scale and minimum are fp16, which moves the ends a little; an integer zero by up to half a step.
            limit = (high - low) / 7 * (0.5 if zero == "fp16" else 1.0) + 2e-3 * (high - low)
            assert ((part - new).abs() <= limit[:, None]).all()
            assert max(len(row.unique()) for row in new) <= 8
            stored += len(old) * (16 + (16 if zero == "fp16" else 3))
        stored, weights = stored + 3 * old.numel(), weights + old.numel()
    assert bits == pytest.approx(stored / weights, rel=1e-3)


def test_only_the_linear_layers_of_the_blocks_change_and_the_dtype_stays(baselines):
    dense = tiny_llama(torch.bfloat16)
    model, _ = baselines.round_to_nearest(copy.deepcopy(dense), 4, 32)
    changed = {name for name, old in dense.state_dict().items() if not torch.equal(old, model.state_dict()[name])}
    assert changed == {f"{name}.weight" for name, _ in dense_linears(dense)}
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())


def test_a_constant_block_and_one_of_zeros_come_back_as_they_are(baselines):
    dense = tiny_llama()
    layer = dense.model.layers[0].self_attn.q_proj
    layer.weight.data[0], layer.weight.data[1] = 0.0, 0.5
    for zero in baselines.ZEROS:
        model, _ = baselines.round_to_nearest(copy.deepcopy(dense), 2, 32, zero)
        assert torch.allclose(model.model.layers[0].self_attn.q_proj.weight[:2], layer.weight[:2], rtol=1e-3)


def test_an_unknown_zero_is_refused_by_name(baselines):
    with pytest.raises(ValueError, match=r"zero='int'.*fp16, packed"):
        baselines.round_to_nearest(tiny_llama(), 4, 32, "int")


# -- the libraries


def test_nf4_is_the_nearest_of_sixteen_values_times_the_largest_of_64(baselines):
    functional = pytest.importorskip("bitsandbytes.functional")
    dense = tiny_llama(intermediate_size=64)
    model, bits = baselines.nf4(copy.deepcopy(dense))
    table = functional.get_4bit_type("nf4", device="cpu")
    for name, old in weights_of(dense).items():
        blocks = old.reshape(-1, 64)
        largest = blocks.abs().amax(1, keepdim=True)
        expected = table[(blocks / largest)[..., None].sub(table).abs().argmin(-1)] * largest
        assert torch.allclose(weights_of(model)[name].reshape(-1, 64), expected, atol=1e-5)
    assert bits == 4.5


def test_nf4_counts_doubly_quantised_scales_as_they_are_stored(baselines):
    pytest.importorskip("bitsandbytes")
    dense = tiny_llama(hidden_size=512, intermediate_size=1024, num_hidden_layers=1)
    assert baselines.nf4(copy.deepcopy(dense), double=True)[1] == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-3)


@pytest.mark.parametrize("axis", [0, 1])
def test_hqq_has_a_smaller_error_than_rounding_in_the_norm_that_it_minimises(baselines, axis):
    pytest.importorskip("hqq")
    dense = tiny_llama(hidden_size=64, intermediate_size=128)
    model, bits = baselines.hqq(copy.deepcopy(dense), 3, 64, axis)
    rounded, expected = baselines.round_to_nearest(copy.deepcopy(dense), 3, 64)
    assert bits == expected == 3.5
    assert error(model, dense, 0.7) < error(rounded, dense, 0.7)


# -- GPTQ


@pytest.mark.parametrize("zero", ["fp16", "packed"])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_of_uncorrelated_inputs_is_rounding(baselines, act_order, zero):
    dense = tiny_llama()
    expected = weights_of(baselines.round_to_nearest(copy.deepcopy(dense), 3, 32, zero)[0])
    for name, weight in weights_of(dense).items():
        hessian = torch.diag(1 + torch.arange(weight.shape[1]))
        assert torch.equal(baselines.gptq_matrix(weight, hessian, 3, 32, act_order, 0.01, zero), expected[name])


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_of_a_matrix_has_a_smaller_output_error_than_rounding(baselines, bits, act_order):
    weight = torch.randn(24, 80)
    x = torch.randn(500, 80) @ (torch.eye(80) + 0.3 * torch.randn(80, 80))
    x[:, 7] = 0  # an input that never speaks
    hessian = x.t() @ x
    result = baselines.gptq_matrix(weight, hessian, bits, 32, act_order)
    rounded = baselines.gptq_matrix(weight, torch.eye(80), bits, 32)
    errors = [float(((new - weight) @ x.t()).square().sum()) for new in (result, rounded)]
    assert errors[0] < 0.8 * errors[1]
    assert max(len(row.unique()) for part in result.split(32, 1) for row in part) <= 2**bits + 1


def test_gptq_of_a_model_is_nearer_to_it_than_rounding_at_equal_bits(baselines, windows):
    dense = tiny_llama()
    model, bits = baselines.gptq(copy.deepcopy(dense), 4, 32, windows)
    rounded, expected = baselines.round_to_nearest(copy.deepcopy(dense), 4, 32, zero="packed")
    assert bits == expected

    def distance(other) -> float:
        return sum(float((logits_of(other, window) - logits_of(dense, window)).square().sum()) for window in windows)

    assert distance(model) < distance(rounded)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_hessian_is_that_of_the_inputs_that_a_layer_gets_in_the_finished_model(
    baselines, windows, monkeypatch, family
):
    model = tiny_llama()
    if family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=len(WORDS), n_embd=32, n_layer=2, n_head=4, n_positions=64))
    used = []

    def spy(weight, hessian, *settings, original=baselines.gptq_matrix):
        used.append((tuple(weight.shape), hessian.clone()))
        return original(weight, hessian, *settings)

    monkeypatch.setattr(baselines, "gptq_matrix", spy)
    baselines.gptq(model.eval(), 3, 32, windows)
    seen = {}
    for _, layer in dense_linears(model):

        def hook(layer, args):
            x = args[0].detach().flatten(0, -2)
            seen[layer] = seen.get(layer, 0) + (x.t() @ x).double()

        layer.register_forward_pre_hook(hook)
    for window in windows:
        logits_of(model, window)
    assert len(used) == len(seen) == len(list(dense_linears(model)))
    for shape, hessian in used:
        assert any(
            shape == tuple(weight_of(layer).shape) and torch.allclose(hessian, expected, rtol=1e-4, atol=1e-4)
            for layer, expected in seen.items()
        )


# -- a model to measure on


def test_a_reference_model_is_trained_saved_and_described(baselines, tmp_path, monkeypatch, capsys):
    text = " ".join(f"{i % 7} crows and {i % 5} owls\n" for i in range(400))
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "valid.txt").write_text(text[:600])
    flags = "--size 4m --vocab 280 --seqlen 16 --batch 4 --steps 4 --minutes 1 --device cpu"
    paths = ["--text", f"{tmp_path}/text.txt", "--valid", f"{tmp_path}/valid.txt", "--output_dir", f"{tmp_path}/model"]
    monkeypatch.setattr("sys.argv", ["train_reference_model.py", *flags.split(), *paths])
    importlib.import_module("train_reference_model").main()
    assert "4 steps, 256 tokens" in capsys.readouterr().out
    described = json.loads((tmp_path / "model" / "reference.json").read_text())
    assert described["settings"]["text"] == ["text.txt"] and str(tmp_path) not in json.dumps(described)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    windows = token_windows([text[:600]], tokenizer, 16)
    assert evaluate(model, windows).loss == pytest.approx(described["valid_loss"], abs=1e-4)
    assert tokenizer.decode(tokenizer("6 crows, é").input_ids) == "6 crows, é"
