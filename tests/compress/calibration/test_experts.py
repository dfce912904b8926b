"""Calibration of experts: each by the tokens that reach it, or by those of all where they are too few."""

from __future__ import annotations

import json
import random

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from cluscomp_peft import ClusCompQuantizationConfig
from cluscomp_peft.compress.architecture import empty_model
from cluscomp_peft.compress.budget.sensitivity import measure_sensitivity
from cluscomp_peft.compress.calibration.blocks import BlockModel
from cluscomp_peft.compress.calibration.inputs import BlockInputs, Moments, Rows
from cluscomp_peft.compress.checkpoint import compress_checkpoint
from cluscomp_peft.compress.stream.source import DenseCheckpoint
from cluscomp_peft.experts import unfuse
from cluscomp_peft.upstream.transformers import renaming_of
from tests.conftest import WORDS, logits_of
from tests.grids import grid, quick
from tests.mixtures import FAMILIES, tiny_mixture


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = random.Random(0)
    path.write_text(" ".join(words.choice(WORDS[3:]) for _ in range(600)))
    return str(path)


def block_model(folder, family: str) -> tuple[BlockModel, nn.Module]:
    """A saved mixture block by block, and the whole of it, taken apart."""
    whole = tiny_mixture(family)
    whole.save_pretrained(folder)
    model = empty_model(whole.config, str(folder))
    source = DenseCheckpoint(str(folder), model.base_model_prefix, renaming_of(model), model)
    unfuse(model)
    unfuse(whole)
    return BlockModel(model, source, torch.float32, torch.device("cpu")), whole


def seen_by(whole: nn.Module, names: list[str], tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """The inputs of layers in a pass of the whole model, rows of zeros left out."""
    seen: dict[str, torch.Tensor] = {}

    def note(name, x):
        seen[name] = x[(x != 0).any(1)]

    handles = [
        whole.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: note(name, args[0].detach()))
        for name in names
    ]
    logits_of(whole, tokens)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", ["mixtral", "llama4"])
def test_an_expert_is_watched_with_the_tokens_that_reach_it(family, tmp_path, tokens):
    blocks, whole = block_model(tmp_path, family)
    holder = "mlp" if family == "mixtral" else "feed_forward"
    with torch.no_grad(), blocks.loaded(0):
        names = [name for name, module in blocks.model.named_modules() if isinstance(module, nn.Linear)]
        names = [name for name in names if name.startswith("model.layers.0.")]
        layers = {name: blocks.model.get_submodule(name) for name in names}
        hidden = blocks.stem(tokens)
        inputs = BlockInputs(blocks, 0, layers, [hidden], 1)
        list(inputs.outputs())
        experts = [[f"model.layers.0.{holder}.experts.{index}.{key}" for index in range(4)]
                   for key in ("gate_up_proj", "down_proj")]  # fmt: skip
        assert [group for group in inputs.groups if group[0] in inputs.owners] == experts
        for group in experts:
            rows = inputs.experts(group, hidden)
            expected = seen_by(whole, group, tokens)
            for name, seen in expected.items():
                if len(seen):
                    assert torch.allclose(rows[name].values, seen, atol=1e-6)
                    assert len(rows[name].tokens) == len(seen) == len(set(rows[name].tokens.tolist()))
        # A token's input is that of the module of the experts (Llama 4 scales it by its routing).
        module, given = whole.get_submodule(f"model.layers.0.{holder}.experts"), []
        handle = module.register_forward_pre_hook(lambda _, args: given.append(args[0].detach()))
        logits_of(whole, tokens)
        handle.remove()
        for name, row in inputs.experts(experts[0], hidden).items():
            source = given[0] if family == "mixtral" else given[0].view(4, -1, 32)[int(name.split(".")[-2])]
            assert torch.allclose(row.values, source[row.tokens], atol=1e-6)


def test_only_tokens_that_both_blocks_send_to_an_expert_are_compared():
    torch.manual_seed(0)
    before, after = torch.randn(9, 5), torch.randn(9, 5)
    dense, compressed = torch.tensor([0, 2, 3, 8]), torch.tensor([2, 4, 8])
    moments = Moments()
    moments.add_rows(Rows(before[dense], dense), Rows(after[compressed], compressed))
    moments.add_rows(None, Rows(after[:2], torch.arange(2)))
    hessian, drift = moments.means()
    rows = torch.cat([after[compressed], after[:2]])
    assert torch.allclose(hessian, rows.t() @ rows / 5, atol=1e-6)
    both = torch.tensor([2, 8])
    assert torch.allclose(drift, (before[both] - after[both]).t() @ after[both] / 5, atol=1e-6)
    moments.add_rows(Rows(before[:3], None), Rows(after[:3], None))  # which tokens they are is not known
    assert moments.means()[1] is None


def test_an_expert_costs_what_its_share_of_the_tokens_costs(tmp_path, tokens):
    blocks, whole = block_model(tmp_path, "mixtral")
    found = measure_sensitivity(blocks, [tokens])
    name = "model.layers.1.mlp.experts.2.down_proj"
    layer, kept = whole.get_submodule(name), {}

    def note(_, args, output):
        kept["x"] = args[0].detach()
        output.retain_grad()
        kept["y"] = output

    layer.register_forward_hook(note)
    for parameter in whole.parameters():
        parameter.requires_grad_(True)
    logits = whole(tokens).logits[:, :-1].flatten(0, 1)
    nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum").backward()
    slopes, inputs = kept["y"].grad.square().mean(0), kept["x"].square().mean(0)
    share = len(kept["x"]) / tokens.numel()
    expected = 0.5 * share * float(slopes @ layer.weight.detach().square() @ inputs)
    assert 0 < share < 1 and found[name] == pytest.approx(expected, rel=1e-3)


@grid(family=quick(list(FAMILIES), "mixtral", "gpt_oss"))
def test_calibration_brings_outputs_nearer(family, tmp_path, text, tokenizer, tokens):
    dense = tiny_mixture(family)
    dense.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    expected, errors = logits_of(dense, tokens), {}
    settings = dict(samples=8, seqlen=32, epochs=1)
    for name, calibration in (("plain", {"calibration": "none"}), ("fitted", {"calibration": text, **settings})):
        config = ClusCompQuantizationConfig(bits=5)
        report = compress_checkpoint(str(tmp_path / "dense"), str(tmp_path / name), config, **calibration)
        assert report["true_bits"] <= 5
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        errors[name] = float((logits_of(model, tokens) - expected).square().sum())
    assert errors["fitted"] < errors["plain"]
    matrices = json.loads((tmp_path / "fitted" / "cluscomp_report.json").read_text())["matrices"]
    experts = {name: entry for name, entry in matrices.items() if "tokens" in entry}
    pooled = [name for name, entry in experts.items() if entry.get("pooled")]
    assert len(experts) >= 8 and report.get("pooled", []) == pooled
    assert all(experts[name]["tokens"] < 0.25 * experts[name]["shape"][1] for name in pooled)


def test_experts_that_no_token_reaches_are_listed_and_take_the_moments_of_all(tmp_path, text, tokenizer, tokens):
    dense = tiny_mixture("gpt_oss")
    for layer in dense.model.layers:  # a router that knows two experts
        layer.mlp.router.bias.data = torch.tensor([50.0, -50.0, 50.0, -50.0])
    dense.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    report = compress_checkpoint(
        str(tmp_path / "dense"), str(tmp_path / "out"), ClusCompQuantizationConfig(group_size=2, num_clusters=16),
        calibration=text, samples=8, seqlen=32, epochs=1,
    )  # fmt: skip
    assert report["pooled"] == [
        f"model.layers.{layer}.mlp.experts.{expert}.{key}"
        for layer in range(2)
        for key in ("gate_up_proj", "down_proj")
        for expert in (1, 3)
    ]
    matrices = json.loads((tmp_path / "out" / "cluscomp_report.json").read_text())["matrices"]
    assert {matrices[name]["tokens"] for name in report["pooled"]} == {0}
    assert all(matrices[name]["output_error"]["feedback"] < 0.5 for name in report["pooled"])
