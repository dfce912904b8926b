"""The PEFT method: which layers it takes, several adapters, dtypes, and what a saved adapter says."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from cluscomp_peft import ClusCompConfig, ClusCompLayer, ClusteredLinear
from cluscomp_peft.codes import ClusterSpec
from cluscomp_peft.hf.evaluate import true_bits
from cluscomp_peft.linear import count_parameters
from tests.conftest import checkpoint_activations, config_for, load, logits_of, tiny_llama, train_briefly
from tests.grids import grid, quick

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
ALL = ATTENTION | {"gate_proj", "up_proj", "down_proj"}


def adapted(model) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, ClusCompLayer)}


def short(names: set[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


@pytest.fixture(params=["compressed", "dense"])
def base(request, dense_dir, compressed_dir):
    folder = compressed_dir if request.param == "compressed" else dense_dir
    return load(folder), request.param


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_by_default_every_layer_of_the_blocks_is_adapted(base, targets):
    model, kind = base
    names = adapted(get_peft_model(model, config_for(kind, target_modules=targets)))
    assert len(names) == 14
    assert short(names) == ALL


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"target_modules": ["q_proj", "o_proj"]}, {"q_proj", "o_proj"}),
        ({"target_modules": r".*layers\.1\.mlp\.(up|down)_proj"}, {"up_proj", "down_proj"}),
        ({"target_modules": "all-linear", "exclude_modules": ["q_proj"]}, ALL - {"q_proj"}),
        ({"exclude_modules": r".*mlp.*"}, ATTENTION),
        ({"target_modules": ["q_proj"], "layers_to_transform": 0}, {"q_proj"}),
        ({"layers_to_transform": [1], "layers_pattern": "layers"}, ALL),
    ],
)
def test_target_modules(base, settings, expected):
    model, kind = base
    names = adapted(get_peft_model(model, config_for(kind, **settings)))
    assert short(names) == expected
    if "layers_to_transform" in settings:
        index = settings["layers_to_transform"]
        index = index if isinstance(index, int) else index[0]
        assert all(f".layers.{index}." in name for name in names)


def test_layers_without_an_adapter_stay_as_they_were(base, tokens):
    model, kind = base
    expected = model.model.layers[1].self_attn.q_proj
    wrapped = get_peft_model(model, config_for(kind, target_modules=["up_proj"]))
    assert wrapped.base_model.model.model.layers[1].self_attn.q_proj is expected


def test_modules_to_save_are_trained_saved_and_loaded(base, tokens, tmp_path):
    model, kind = base
    model = get_peft_model(model, config_for(kind, modules_to_save=["norm", "embed_tokens"]))
    train_briefly(model, tokens)
    expected = logits_of(model, tokens)
    model.save_pretrained(tmp_path)
    fresh = AutoModelForCausalLM.from_pretrained(model.base_model.model.config._name_or_path)
    assert torch.equal(logits_of(PeftModel.from_pretrained(fresh, tmp_path), tokens), expected)


def test_conv1d_layers(tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=96, n_positions=32)).eval()
    tokens = torch.randint(0, 96, (2, 8))
    model.save_pretrained(tmp_path / "base")

    def fresh():
        return GPT2LMHeadModel.from_pretrained(tmp_path / "base")

    expected = logits_of(fresh(), tokens)
    for settings in ({"base": "dense"}, {"num_clusters": 3000}):
        config = ClusCompConfig(**{"task_type": "CAUSAL_LM", "group_size": 2, "num_clusters": 9, **settings})
        wrapped = get_peft_model(fresh(), config)
        assert short(adapted(wrapped)) == {"c_attn", "c_proj", "c_fc"}
        assert torch.allclose(logits_of(wrapped, tokens), expected, atol=1e-5)
        train_briefly(wrapped, tokens)
        trained = logits_of(wrapped, tokens)
        wrapped.save_pretrained(tmp_path / "adapter")
        assert torch.equal(logits_of(PeftModel.from_pretrained(fresh(), tmp_path / "adapter"), tokens), trained)
        merged = wrapped.merge_and_unload()
        assert isinstance(merged.transformer.h[0].mlp.c_fc, Conv1D)
        assert torch.allclose(logits_of(merged, tokens), trained, atol=1e-5)


def test_a_model_that_is_no_transformer():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4, bias=False)

        def forward(self, x):
            return self.second(self.first(x).relu())

    net, x = Net(), torch.randn(3, 6)
    config = ClusCompConfig(group_size=2, num_clusters=5, target_modules=["second"])
    model = get_peft_model(net, config)
    assert isinstance(model.base_model.model.second.base_layer, ClusteredLinear)
    assert isinstance(model.base_model.model.first, nn.Linear)
    model(x).sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    prefix = "base_model.model.second.cluscomp_delta.default."
    assert trained == {f"{prefix}{name}" for name in ("codebook", "scale_in", "scale_out")}


def test_only_the_active_adapter_trains(base):
    model, kind = base
    model = get_peft_model(model, config_for(kind))
    model.add_adapter("other", config_for(kind))

    def trainable():
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    assert trainable() and all(".default." in name for name in trainable())
    model.set_adapter("other")
    assert trainable() and all(".other." in name for name in trainable())
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters() if parameter.requires_grad)


def test_codes_are_stored_once_for_all_adapters(base):
    model, kind = base
    model = get_peft_model(model, config_for(kind))
    codes = [name for name, parameter in model.named_parameters() if name.endswith(".codes")]
    model.add_adapter("other", config_for(kind))
    assert [name for name, parameter in model.named_parameters() if name.endswith(".codes")] == codes
    assert len(codes) == 14


def test_weighted_sums_of_adapters(base, tokens):
    model, kind = base
    model = get_peft_model(model, config_for(kind, init_weights=False, num_blocks=2))
    model.add_adapter("other", config_for(kind, init_weights=False, num_blocks=3, delta_scale=8.0))
    model.base_model.set_adapter(["default", "other"])
    both = logits_of(model, tokens)
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    model.set_adapter("sum")
    assert torch.allclose(logits_of(model, tokens), both, atol=1e-4)
    model.add_weighted_adapter(["default"], [0.0], "nothing")
    model.set_adapter("nothing")
    with model.disable_adapter():
        expected = logits_of(model, tokens)
    assert torch.equal(logits_of(model, tokens), expected)


@pytest.mark.parametrize("base", ["compressed"], indirect=True)
def test_weighted_sums_keep_the_capacity_of_one_rank(base, tokens, tmp_path):
    model, kind = base
    model = get_peft_model(model, config_for(kind, init_weights=False, rank=4))
    model.add_adapter("other", config_for(kind, init_weights=False, rank=4))
    model.base_model.set_adapter(["default", "other"])
    both = logits_of(model, tokens)
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    model.set_adapter("sum")
    assert torch.allclose(logits_of(model, tokens), both, atol=1e-4)
    assert (model.peft_config["sum"].rank, model.peft_config["sum"].num_blocks) == (4, None)


@pytest.mark.parametrize("other", [{"train_scales": False}, {"rank": 2}, {"num_blocks": 1}])
def test_weighted_sums_refuse_different_capacities(compressed_dir, other):
    model = AutoModelForCausalLM.from_pretrained(compressed_dir)
    model = get_peft_model(model, config_for("compressed", rank=3))
    model.add_adapter("other", config_for("compressed", **{"rank": 3, **other}))
    with pytest.raises(ValueError, match="different capacity"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    assert set(model.peft_config) == {"default", "other"}


def test_weighted_sums_refuse_nonsense(base):
    model, kind = base
    model = get_peft_model(model, config_for(kind))
    for arguments in (
        (["default"], [1.0, 2.0], "new", "linear"),
        (["absent"], [1.0], "new", "linear"),
        (["default"], [1.0], "new", "svd"),
        ([], [], "new", "linear"),
    ):
        with pytest.raises(ValueError, match=r"weight|absent|svd"):
            model.add_weighted_adapter(*arguments)
    assert set(model.peft_config) == {"default"}


def test_unload_gives_the_base(base, tokens):
    model, kind = base
    expected = logits_of(model, tokens)
    if kind == "dense":
        model = get_peft_model(model, config_for("dense", init_weights=False))
    else:
        model = get_peft_model(model, config_for("compressed", init_weights=False))
    assert not torch.equal(logits_of(model, tokens), expected)
    restored = model.unload()
    assert torch.equal(logits_of(restored, tokens), expected)
    assert not adapted(restored)


def test_transformers_own_adapter_methods(base, tokens, tmp_path):
    model, kind = base
    expected = logits_of(model, tokens)
    model.add_adapter(config_for(kind, init_weights=False), "first")
    changed = logits_of(model, tokens)
    assert not torch.equal(changed, expected)
    model.save_pretrained(tmp_path)
    model.disable_adapters()
    assert torch.equal(logits_of(model, tokens), expected)
    model.enable_adapters()
    assert torch.equal(logits_of(model, tokens), changed)
    fresh = AutoModelForCausalLM.from_pretrained(model.config._name_or_path)
    fresh.load_adapter(str(tmp_path), adapter_name="again")
    assert torch.equal(logits_of(fresh, tokens), changed)


def test_mixin_adapter_can_be_saved_before_it_ran(base, tokens, tmp_path):
    model, kind = base
    wrapped = get_peft_model(model, config_for(kind, init_weights=False))
    expected = logits_of(wrapped, tokens)
    wrapped.save_pretrained(tmp_path / "one")
    fresh = AutoModelForCausalLM.from_pretrained(wrapped.base_model.model.config._name_or_path)
    fresh.load_adapter(str(tmp_path / "one"))
    fresh.save_pretrained(tmp_path / "two")
    again = AutoModelForCausalLM.from_pretrained(wrapped.base_model.model.config._name_or_path)
    assert torch.equal(logits_of(PeftModel.from_pretrained(again, tmp_path / "two"), tokens), expected)


def test_inject_adapter_in_model(base, tokens):
    model, kind = base
    expected = logits_of(model, tokens)
    injected = inject_adapter_in_model(config_for(kind), model)
    if kind != "born":
        assert torch.equal(logits_of(injected, tokens), expected)
    assert len(adapted(injected)) == 14


def test_the_saved_config_names_the_codes(base, tmp_path):
    model, kind = base
    model = get_peft_model(model, config_for(kind))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "CLUSCOMP"
    assert len(saved["fingerprint"]) == 32
    assert saved["carries_codes"] == (kind == "dense")
    assert all("*" in pattern for pattern in saved["layout"])
    assert len(saved["layout"]) == 7


def test_the_adapter_of_a_compressed_model_holds_deltas_only(compressed_dir, tmp_path):
    from safetensors.torch import load_file

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(compressed_dir), config_for("compressed"))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    about = ("code_digest", "cluscomp_units.values")
    deltas = {name: tensor for name, tensor in tensors.items() if not name.endswith(about)}
    assert {name.rpartition(".")[2] for name in deltas} == {"codebook", "scale_in", "scale_out"}
    assert all(tensor.dtype == torch.float32 for tensor in deltas.values())
    assert sum(tensor.numel() for name, tensor in tensors.items() if name not in deltas) == 14 * (16 + 2)
    assert all(torch.equal(tensor, torch.ones(2)) for name, tensor in tensors.items() if name.endswith(about[1]))


def test_a_config_of_a_loaded_adapter_starts_a_fresh_one(base, tokens, tmp_path):
    model, kind = base
    get_peft_model(model, config_for(kind, init_weights=False)).save_pretrained(tmp_path)
    fresh = AutoModelForCausalLM.from_pretrained(model.config._name_or_path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    loaded.add_adapter("new", loaded.peft_config["default"])
    loaded.set_adapter("new")
    assert torch.isfinite(logits_of(loaded, tokens)).all()


def test_one_config_object_serves_two_models(dense_dir, compressed_dir, tokens):
    config = ClusCompConfig(task_type="CAUSAL_LM")
    for folder in (dense_dir, compressed_dir):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
        assert torch.isfinite(logits_of(model, tokens)).all()


def test_sequence_classification_on_a_causal_checkpoint(compressed_dir, tokens, tmp_path):
    def fresh():
        torch.manual_seed(5)
        return AutoModelForSequenceClassification.from_pretrained(compressed_dir, num_labels=3)

    model = fresh()
    assert type(model.score) is nn.Linear
    model = get_peft_model(model, ClusCompConfig(task_type="SEQ_CLS", init_weights=False))
    nn.init.normal_(model.base_model.model.score.modules_to_save["default"].weight)
    expected = logits_of(model, tokens)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(PeftModel.from_pretrained(fresh(), tmp_path), tokens), expected)


def test_train_scales_adds_scales_where_the_base_has_none(tokens):
    model = tiny_llama()
    config = ClusCompConfig(task_type="CAUSAL_LM", group_size=3, num_clusters=12, scales=False, train_scales=True)
    model = get_peft_model(model, config)
    names = {name.rpartition(".")[2] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names == {"codebook", "scale_in", "scale_out"}
    train_briefly(model, tokens)
    expected = logits_of(model, tokens)
    model.merge_adapter()
    assert torch.equal(logits_of(model, tokens), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapters_follow_the_base_dtype_when_peft_asks(dense_dir, dtype):
    model = AutoModelForCausalLM.from_pretrained(dense_dir, dtype=dtype)
    wrapped = get_peft_model(model, config_for("born"), autocast_adapter_dtype=False)
    deltas = [parameter for name, parameter in wrapped.named_parameters() if "cluscomp_delta" in name]
    assert deltas and all(parameter.dtype == dtype for parameter in deltas)


def test_generation_with_an_adapter(base, tokens):
    model, kind = base
    model = get_peft_model(model, config_for(kind, init_weights=False))
    one = model.generate(input_ids=tokens, max_new_tokens=5, do_sample=False)
    merged = model.merge_and_unload()
    assert torch.equal(merged.generate(input_ids=tokens, max_new_tokens=5, do_sample=False), one)


def test_gradient_checkpointing_gives_the_same_gradients(base, tokens):
    model, kind = base
    model = get_peft_model(model, config_for(kind, init_weights=False))

    def gradients():
        model.zero_grad()
        model.train()
        model(input_ids=tokens, labels=tokens).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    plain = gradients()
    model.enable_input_require_grads()
    checkpoint_activations(model.base_model.model)
    for one, two in zip(plain, gradients(), strict=True):
        assert torch.equal(one, two)


@grid(base=quick(["compressed", "dense"], "compressed"), indirect=True)
def test_compiled_models_train(base, tokens):
    model, kind = base
    model.model.layers = model.model.layers[:1]
    model = get_peft_model(model, config_for(kind, init_weights=False)).train()
    eager = model(input_ids=tokens, labels=tokens).loss
    compiled = torch.compile(model.base_model.model, backend="aot_eager", fullgraph=True)
    loss = compiled(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    assert torch.allclose(loss, eager, rtol=1e-5)
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("settings", [{"num_blocks": 2}, {"num_blocks": 3, "train_scales": True}])
def test_true_bits_with_an_adapter_are_those_after_merging(compressed_dir, settings):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(compressed_dir), config_for("compressed", **settings))
    bits = true_bits(model)
    with model.disable_adapter():
        base_bits = true_bits(model)
    assert base_bits < bits
    assert true_bits(model.merge_and_unload()) == bits


def test_true_bits_do_not_count_copies_of_the_head(compressed_dir):
    model = AutoModelForCausalLM.from_pretrained(compressed_dir)
    bits = true_bits(model)
    model = get_peft_model(model, config_for("compressed", num_blocks=1, modules_to_save=["lm_head"]))
    assert true_bits(model) == bits


@pytest.mark.parametrize("shape", [(1024, 1024), (4096, 11008), (128, 384), (24, 8)])
@pytest.mark.parametrize("rank", [1, 2, 8, 16, 64])
@pytest.mark.parametrize("spec", [ClusterSpec(1, 16), ClusterSpec(2, 256), ClusterSpec(3, 2048), ClusterSpec(4, 9)])
def test_a_rank_trains_no_more_numbers_than_lora_of_it(shape, rank, spec):
    out_features, in_features = shape
    config = ClusCompConfig(rank=rank)
    blocks = config.blocks_of(spec, in_features, out_features)
    numbers = blocks * spec.num_clusters * spec.group_size + sum(shape)
    budget = rank * sum(shape)
    assert 1 <= blocks <= in_features and (blocks == 1 or numbers <= budget)
    # and hardly fewer: the next number of four significant bits would be too many
    more = blocks // 8 + 1
    assert blocks + more > in_features or numbers + more * spec.num_clusters * spec.group_size > budget


def test_parameters_are_counted_as_weights(dense_dir, compressed_dir):
    dense = AutoModelForCausalLM.from_pretrained(dense_dir)
    total = sum(parameter.numel() for parameter in dense.parameters())
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(compressed_dir), config_for("compressed"))
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert count_parameters(model) == (trainable, total + trainable)
    model = get_peft_model(dense, config_for("dense"))
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert count_parameters(model) == (trainable, total + trainable)


def test_a_config_can_be_used_again_after_saving(base, tokens, tmp_path):
    model, kind = base
    config = config_for(kind)
    get_peft_model(model, config).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fingerprint"]
    fresh = AutoModelForCausalLM.from_pretrained(model.config._name_or_path)
    again = get_peft_model(fresh, dataclasses.replace(config, num_blocks=2))
    assert torch.isfinite(logits_of(again, tokens)).all()


def mixin_loaded(base, tmp_path, tokens):
    """A model with an adapter that transformers' own loader set, past PEFT's hooks, and the logits it must give."""
    model, kind = base
    folder = model.config._name_or_path
    wrapped = get_peft_model(model, config_for(kind, init_weights=False))
    expected = logits_of(wrapped, tokens)
    wrapped.save_pretrained(tmp_path)
    fresh = AutoModelForCausalLM.from_pretrained(folder)
    fresh.load_adapter(str(tmp_path), is_trainable=True)
    return fresh, expected


@grid(base=quick(["compressed", "dense"], "compressed"), indirect=True)
def test_a_mixin_loaded_adapter_compiles(base, tmp_path, tokens):
    model, _ = mixin_loaded(base, tmp_path, tokens)
    model.model.layers = model.model.layers[:1]
    expected = logits_of(model, tokens)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        assert torch.allclose(compiled(input_ids=tokens, use_cache=False).logits, expected, atol=1e-5)


def test_a_mixin_loaded_adapter_means_the_same_to_everybody(base, tmp_path, tokens):
    model, expected = mixin_loaded(base, tmp_path, tokens)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert torch.equal(logits_of(model, tokens), expected)
    model.load_state_dict(state)
    assert torch.equal(logits_of(model, tokens), expected)
    model.train()  # now in units for an optimiser
    assert torch.equal(logits_of(model, tokens), expected)
    assert train_briefly(model, tokens)[0] > 0
    assert not torch.equal(logits_of(model, tokens), expected)


def test_inductor_does_not_leave_the_rounding_out():
    from cluscomp_peft import ops

    values = torch.randn(257)
    for dtype in (torch.float16, torch.bfloat16):
        rounded = torch.compile(lambda x, dtype=dtype: ops.round_to(x, dtype) * 1.0, fullgraph=True)(values)
        assert torch.equal(rounded, values.to(dtype).float())
        assert not torch.equal(rounded, values)


def test_a_loaded_adapter_is_in_the_units_of_a_fresh_one(base, tmp_path):
    model, kind = base
    wrapped = get_peft_model(model, config_for(kind, init_weights=False))
    wrapped.save_pretrained(tmp_path)
    fresh = AutoModelForCausalLM.from_pretrained(model.config._name_or_path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path, is_trainable=True)
    for (name, one), two in zip(wrapped.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(one, two), name
