"""Experts of a mixture, taken apart and clustered: the family's own forward pass, every way to a checkpoint."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, DbrxConfig

from cluscomp_peft import ClusCompQuantizationConfig
from cluscomp_peft.cli import main
from cluscomp_peft.compress.checkpoint import compress_checkpoint
from cluscomp_peft.expert_weights import Expert, ExpertWeights
from cluscomp_peft.experts import fuse, fused_stacks, stacks_apart, unfuse
from cluscomp_peft.hf.reading import inspect_checkpoint
from cluscomp_peft.linear import ClusteredLinear, count_parameters, dense_bits
from tests.conftest import WORDS, logits_of
from tests.grids import grid, quick
from tests.mixtures import FAMILIES, tiny_mixture

# One of each layout: apart in the file, [E, in, out] by torch.bmm, the same with biases and a gate of its own.
LAYOUTS = ("mixtral", "llama4", "gpt_oss")
SETTINGS = dict(group_size=2, num_clusters=16)


def config(**changes) -> ClusCompQuantizationConfig:
    return ClusCompQuantizationConfig(**{**SETTINGS, **changes})


def experts_of(model: nn.Module, kind: type) -> dict[str, nn.Module]:
    inside = [
        f"{name}.{child}."
        for name, module in model.named_modules()
        for child, expert in module.named_children()
        if isinstance(expert, Expert)
    ]
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, kind) and name.startswith(tuple(inside))
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of dense mixtures by family."""
    folders: dict[str, str] = {}

    def make(family: str) -> str:
        if family not in folders:
            folders[family] = str(tmp_path_factory.mktemp(family))
            tiny_mixture(family).save_pretrained(folders[family])
        return folders[family]

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_taken_apart_a_model_computes_the_same_and_comes_back(family, tokens):
    model = tiny_mixture(family)
    before, state = logits_of(model, tokens), {key: value.clone() for key, value in model.state_dict().items()}
    names = [stack.name for stack in fused_stacks(model)]
    addresses = [model.get_parameter(name).data_ptr() for name in names]
    assert [stack.name for stack in unfuse(model)] == names and len(names) >= 2
    assert not fused_stacks(model) and len(experts_of(model, nn.Linear)) == 4 * len(names)
    assert torch.equal(logits_of(model, tokens), before)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits_of(copied, tokens), before)
        for layer in experts_of(model, nn.Linear).values():  # a copy has weights of its own
            layer.weight.data.mul_(2)
        assert torch.equal(logits_of(copied, tokens), before)
        for layer in experts_of(model, nn.Linear).values():
            layer.weight.data.div_(2)
    fuse(model)
    assert [model.get_parameter(name).data_ptr() for name in names] == addresses  # nothing was copied
    assert torch.equal(logits_of(model, tokens), before)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@grid(family=quick(list(FAMILIES), *LAYOUTS))
def test_every_way_to_a_clustered_mixture_is_the_same(family, saved, tmp_path, tokens):
    source = saved(family)
    on_the_fly = AutoModelForCausalLM.from_pretrained(source, quantization_config=config())
    layers = experts_of(on_the_fly, ClusteredLinear)
    stacks = fused_stacks(tiny_mixture(family))
    assert len(layers) == 4 * len(stacks) and not fused_stacks(on_the_fly)
    expected = logits_of(on_the_fly, tokens)

    on_the_fly.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(again, tokens), expected)

    report = compress_checkpoint(source, str(tmp_path / "out"), config(), calibration="none")
    compressed = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits_of(compressed, tokens), expected)
    found = [model.config.quantization_config for model in (on_the_fly, again, compressed)]
    assert len({(one.fingerprint, json.dumps(one.layout, sort_keys=True)) for one in found}) == 1
    compressed.save_pretrained(tmp_path / "resaved")
    resaved = AutoModelForCausalLM.from_pretrained(tmp_path / "resaved")
    assert torch.equal(logits_of(resaved, tokens), expected)

    matrices, totals = inspect_checkpoint(str(tmp_path / "out"))
    assert {matrix.name for matrix in matrices} >= layers.keys()
    assert totals["true_bits"] == pytest.approx(report["true_bits"])
    assert totals["coverage"] == report["coverage"]
    assert totals["weights"] == sum(one.in_features * one.out_features for one in matrices)

    dense = compressed.dequantize()
    assert torch.equal(logits_of(dense, tokens), expected)  # by the family's own code, grouped products and all
    assert dense.state_dict().keys() == tiny_mixture(family).state_dict().keys()


@pytest.mark.slow
def test_workers_make_the_same_bytes(saved, tmp_path):
    for name, workers in (("one", 1), ("two", 2)):
        compress_checkpoint(saved("gpt_oss"), str(tmp_path / name), config(), calibration="none", workers=workers)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert "model.layers.1.mlp.experts.3.gate_up_proj.codes" in one
    assert (
        "model.layers.1.mlp.experts.gate_up_proj_bias" in one and "model.layers.1.mlp.experts.gate_up_proj" not in one
    )


def test_bits_are_counted_over_all_experts(saved, tmp_path):
    source = saved("mixtral")
    report = compress_checkpoint(source, str(tmp_path / "out"), ClusCompQuantizationConfig(bits=6), calibration="none")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    stored, weights = dense_bits(model)
    dense = AutoModelForCausalLM.from_pretrained(source)
    assert 8 * stored / weights == pytest.approx(report["true_bits"]) and 5 < report["true_bits"] <= 6
    assert dense_bits(dense) == (4 * weights, weights)
    assert count_parameters(model)[1] == count_parameters(dense)[1]
    total = sum(value.numel() for key, value in dense.state_dict().items() if "experts" in key)
    assert total == sum(one.in_features * one.out_features for one in experts_of(model, ClusteredLinear).values())
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    parts = [value for key, value in tensors.items() if key.endswith(("codes", "codebook", "scale_in", "scale_out"))]
    assert stored == sum(part.numel() * part.element_size() for part in parts)


def test_an_expert_without_tokens_is_not_touched(saved, tokens):
    model = AutoModelForCausalLM.from_pretrained(saved("mixtral"), quantization_config=config())
    layers, seen = experts_of(model, ClusteredLinear), set()
    for name, layer in layers.items():
        layer.register_forward_hook(lambda module, args, output, name=name: seen.add(name))
    logits_of(model, tokens[:1, :1])
    assert len(seen) == 8 and len(layers) == 16  # 2 of 4 experts, 2 matrices, 2 layers
    logits_of(model, tokens)
    assert len(seen) == 16


def test_experts_that_are_named_otherwise_stay_in_their_parameter(saved, tmp_path, tokens):
    attention = config(target_modules=["q_proj", "o_proj"])
    for model in (
        AutoModelForCausalLM.from_pretrained(saved("mixtral"), quantization_config=attention),
        compressed(saved("mixtral"), tmp_path / "attention", attention),
    ):
        assert not stacks_apart(model) and len(fused_stacks(model)) == 4
        assert model.config.quantization_config.layout.keys() == {
            f"model.layers.*.self_attn.{name}" for name in ("q_proj", "o_proj")
        }
    experts = config(target_modules=["experts.gate_up_proj", "experts.down_proj"])
    for model in (
        AutoModelForCausalLM.from_pretrained(saved("mixtral"), quantization_config=experts),
        compressed(saved("mixtral"), tmp_path / "experts", experts),
    ):
        names = {name for name, module in model.named_modules() if isinstance(module, ClusteredLinear)}
        assert names == experts_of(model, ClusteredLinear).keys() and len(names) == 16
    half = config(exclude_modules=["experts.down_proj"])
    model = compressed(saved("gpt_oss"), tmp_path / "half", half)
    on_the_fly = AutoModelForCausalLM.from_pretrained(saved("gpt_oss"), quantization_config=half)
    assert [stack.key for stack in fused_stacks(model)] == ["down_proj", "down_proj"]
    assert torch.equal(logits_of(model, tokens), logits_of(on_the_fly, tokens))
    with pytest.raises(ValueError, match=r"experts\.2\.down_proj would stay dense.*one parameter"):
        compressed(saved("mixtral"), tmp_path / "some", config(exclude_modules=["experts.2.down_proj"]))


def compressed(source: str, target, quantization: ClusCompQuantizationConfig):
    compress_checkpoint(source, str(target), quantization, calibration="none")
    return AutoModelForCausalLM.from_pretrained(target)


def test_the_command_line_knows_experts(saved, tmp_path, capsys):
    flags = ["--bits", "6", "--calibration", "none"]
    assert main(["compress", saved("qwen2_moe"), str(tmp_path / "out"), *flags]) in (0, None)
    assert "shared_expert_gate 0.2 % (routes tokens to experts)" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "out")]) in (0, None)
    assert "experts.3.gate_up_proj" in capsys.readouterr().out
    for path in (saved("qwen2_moe"), str(tmp_path / "out")):
        assert main(["plan", path, "--gpu-memory", "1GiB"]) in (0, None)
        assert "does not run on the meta device" not in capsys.readouterr().out


def test_a_model_loads_on_several_devices_and_offloaded(saved, tmp_path, tokens):
    expected = logits_of(compressed(saved("gpt_oss"), tmp_path / "out", config()), tokens)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu",
              "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", device_map=places, offload_folder=str(tmp_path / "offloaded")
    )
    assert model.model.layers[0].mlp.experts.get_submodule("0.down_proj").codes.is_meta
    assert torch.equal(logits_of(model, tokens), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, saved, tokens):
    for family in ("mixtral", "llama4", "gpt_oss"):
        model = AutoModelForCausalLM.from_pretrained(saved(family), quantization_config=config(), dtype=dtype)
        assert logits_of(model, tokens).dtype == dtype
        layer = next(iter(experts_of(model, ClusteredLinear).values()))
        weights = next(weights for _, weights in stacks_apart(model))
        assert layer.weight.dtype == weights.dtype == weights[0].dtype == dtype


def test_what_stands_for_the_parameter_answers_like_one():
    model = tiny_mixture("llama4")
    parameter = model.model.layers[0].feed_forward.experts.gate_up_proj
    unfuse(model)
    weights = model.model.layers[0].feed_forward.experts.gate_up_proj
    assert isinstance(weights, ExpertWeights) and weights.shape == parameter.shape and len(weights) == 4
    assert (weights.dtype, weights.device, weights.ndim, weights.dim()) == (parameter.dtype, parameter.device, 3, 3)
    assert weights.size(1) == 32 and weights.size() == parameter.shape
    x = torch.randn(5, 32)
    assert torch.equal(x @ weights[2], x @ parameter[2])
    assert torch.equal(
        nn.functional.linear(x, weights[torch.tensor(2)].t()), nn.functional.linear(x, parameter[2].t())
    )
    assert torch.equal(weights[-1] * 2, parameter[3] * 2)  # decoded
    with pytest.raises(NotImplementedError, match=r"one by one or by torch\.bmm, but this model calls einsum"):
        torch.einsum("abc,ace->abe", torch.randn(4, 5, 32), weights)


def test_experts_in_one_matrix_are_refused_by_name():
    """DBRX keeps the matrices of its experts one below the other, which no shape tells."""
    settings = dict(ffn_hidden_size=48, moe_num_experts=4, moe_top_k=2)
    config = DbrxConfig(
        d_model=32, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=len(WORDS), ffn_config=settings,
        attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=1e4),
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"cannot be taken apart: .*ffn\.experts\.mlp\.w1 \(192, 32\)"):
        ClusCompQuantizationConfig().policy.targets(model)
    chosen = ClusCompQuantizationConfig(target_modules=["Wqkv"]).policy.targets(model)
    assert len(chosen) == 2


def test_packed_sources_are_refused_by_name(saved, tmp_path):
    tensors = load_file(f"{saved('mixtral')}/model.safetensors")
    source = tmp_path / "fp8"
    tiny_mixture("mixtral").save_pretrained(source)
    for key in [key for key in tensors if ".experts." in key]:
        tensors[f"{key}_scale_inv"] = torch.ones(1, 1)
        tensors[key] = tensors[key].to(torch.float8_e4m3fn)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"layers\.0\.mlp\.experts\.gate_up_proj.*w1\.weight is float8_e4m3fn.*scales"
    ):
        compress_checkpoint(str(source), str(tmp_path / "out"), config())
    with pytest.raises(ValueError, match=r"w1\.weight is F8_E4M3 in the checkpoint"):
        AutoModelForCausalLM.from_pretrained(source, quantization_config=config())
    source = tmp_path / "mxfp4"
    model = tiny_mixture("gpt_oss")
    model.save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    for key in [key for key in tensors if key.endswith("_proj") and "experts" in key]:
        packed = tensors.pop(key)
        tensors[f"{key}_blocks"] = torch.zeros(*packed.shape[:2], 2, 16, dtype=torch.uint8)
        tensors[f"{key}_scales"] = torch.zeros(*packed.shape[:2], 2, dtype=torch.uint8)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"down_proj_blocks is U8 in the checkpoint"):
        AutoModelForCausalLM.from_pretrained(source, quantization_config=config())
    with pytest.raises(ValueError, match=r"gate_up_proj of .*lacks it: it holds .*gate_up_proj_blocks.*packed format"):
        compress_checkpoint(str(source), str(tmp_path / "out"), config())
