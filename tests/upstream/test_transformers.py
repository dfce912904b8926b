"""Contract tests of what `cluscomp_peft.upstream.transformers` touches.

A quantizer that only notes what it is asked stands in for ours in from_pretrained, save_pretrained and dequantize.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
from dataclasses import dataclass

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from transformers.distributed import DistributedConfig
from transformers.integrations import moe
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from cluscomp_peft.upstream import transformers as room
from cluscomp_peft.upstream import transformers_experts as experts_room
from cluscomp_peft.upstream.accelerate import offload_hook
from tests import warm
from tests.conftest import tiny_llama
from tests.mixtures import tiny_mixture
from tests.upstream.contract import contract

METHOD = "cluscomp_contract"
CHOSEN = "model.layers.1.mlp.up_proj.weight"


@dataclass
class ProbeConfig(QuantizationConfigMixin):
    quant_method: str = METHOD

    def to_dict(self):
        return {"quant_method": METHOD}


class ProbeQuantizer(HfQuantizer):
    """Puts 7 in the place of one weight by a conversion, and notes every call in `calls`."""

    requires_calibration = False
    is_trainable = True

    def __init__(self, config, **kwargs):
        super().__init__(config, **kwargs)
        self.calls: dict[str, list] = {}

    def note(self, name, *facts):
        self.calls.setdefault(name, []).append(facts)

    def is_serializable(self):
        return True

    def validate_environment(self, *args, device_map=None, **kwargs):
        self.note("validate_environment", device_map)

    @property
    def is_qat_trainable(self):
        self.note("is_qat_trainable")
        return False

    def param_element_size(self, model, param_name, param):
        self.note("param_element_size", param_name)
        return param.element_size()

    def adjust_max_memory(self, max_memory):
        self.note("adjust_max_memory", dict(max_memory))
        return max_memory

    def param_needs_quantization(self, model, param_name, **kwargs):
        self.note("param_needs_quantization", param_name)
        return not self.pre_quantized and param_name == CHOSEN

    def get_quantize_ops(self):
        quantizer = self

        class Convert(room.ConversionOps):
            def convert(self, input_dict, model=None, missing_keys=None, **kwargs):
                (key, value), *_ = input_dict.items()
                value = value[0] if isinstance(value, list) else value
                quantizer.note("get_quantize_ops", key, value.clone(), isinstance(missing_keys, set))
                weight = nn.Parameter(torch.full_like(value, 7), requires_grad=False)
                room.mark_loaded(weight)
                model.get_submodule(key.rpartition(".")[0]).weight = weight
                missing_keys.discard(key)
                return {}

        return Convert()

    def get_state_dict_and_metadata(self, model):
        self.note("get_state_dict_and_metadata")
        model.config.quantization_config.noted = True
        return {"only": torch.ones(3)}, {"format": "pt"}

    def _process_model_before_weight_loading(self, model, **kwargs):
        on_meta = all(parameter.is_meta for parameter in model.parameters())
        self.note("_process_model_before_weight_loading", on_meta, kwargs.get("checkpoint_files"))
        return model

    def _process_model_after_weight_loading(self, model, **kwargs):
        arrived = {name: room.is_loaded(parameter) for name, parameter in model.named_parameters()}
        hooked = [name for name, module in model.named_modules() if offload_hook(module) is not None]
        self.note("_process_model_after_weight_loading", arrived, hooked)
        return model

    def _dequantize(self, model, dtype=None):
        self.note("_dequantize", dtype)
        return model


@pytest.fixture(scope="module")
def registered():
    for _ in range(2):  # the second time does nothing
        room.register_format(METHOD, ProbeConfig, ProbeQuantizer)
    yield
    AUTO_QUANTIZATION_CONFIG_MAPPING.pop(METHOD)
    AUTO_QUANTIZER_MAPPING.pop(METHOD)


@pytest.fixture(scope="module")
def loaded(registered, dense_dir):
    """A dense model that was loaded with the probe."""
    return AutoModelForCausalLM.from_pretrained(
        dense_dir, quantization_config=ProbeConfig(), device_map="auto", max_memory={"cpu": 10**9}
    )


def calls(model, name: str) -> list:
    return room.quantizer_of(model).calls.get(name, [])


def asks(name: str):
    return contract(room, f"QUANTIZER_METHODS.{name}", says=room.QUANTIZER_METHODS[name])


@contract(room, "register_format")
def test_a_registered_format_is_known_by_its_config(loaded, registered, dense_dir, tmp_path):
    assert isinstance(room.quantizer_of(loaded), ProbeQuantizer)
    os.symlink(os.path.join(dense_dir, "model.safetensors"), tmp_path / "model.safetensors")
    with open(os.path.join(dense_dir, "config.json")) as file:
        config = {**json.load(file), "quantization_config": {"quant_method": METHOD}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    quantizer = room.quantizer_of(model)
    assert isinstance(quantizer, ProbeQuantizer) and quantizer.pre_quantized
    assert "get_quantize_ops" not in quantizer.calls


@contract(room, "FORMATS")
def test_the_registry_is_imported_before_the_first_model():
    code = (
        "import sys; from transformers import AutoModelForCausalLM\n"
        f"import {room.FORMATS} as formats\n"
        "assert formats.register_quantizer and formats.register_quantization_config\n"
    )
    done = subprocess.run([warm.python("torch"), "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@contract(room, "quantizer_of")
def test_a_model_keeps_its_quantizer(loaded):
    assert isinstance(room.quantizer_of(loaded), ProbeQuantizer)
    assert room.quantizer_of(tiny_llama()) is None


@asks("validate_environment")
def test_the_environment_is_checked_with_the_device_map(loaded):
    assert ("auto",) in calls(loaded, "validate_environment")


@asks("param_element_size")
def test_sizes_of_parameters_are_asked_by_name(loaded):
    assert (CHOSEN,) in calls(loaded, "param_element_size")


@asks("adjust_max_memory")
def test_room_on_devices_is_asked(loaded):
    assert any(memory.get("cpu") for (memory,) in calls(loaded, "adjust_max_memory"))


@asks("param_needs_quantization")
def test_every_parameter_is_asked_for_by_name(loaded):
    asked = {name for (name,) in calls(loaded, "param_needs_quantization")}
    assert {name for name, _ in loaded.named_parameters()} <= asked


@contract(room, "ConversionOps", says=room.QUANTIZER_METHODS["get_quantize_ops"])
@asks("get_quantize_ops")
def test_a_conversion_gets_the_tensor_of_the_file_and_may_put_its_own_in_place(loaded, dense_dir):
    ((key, value, has_missing_keys),) = calls(loaded, "get_quantize_ops")
    stored = load_file(os.path.join(dense_dir, "model.safetensors"))
    assert key == CHOSEN and torch.equal(value, stored[CHOSEN]) and has_missing_keys
    with pytest.raises(AttributeError, match="NoSuchName"):
        _ = room.NoSuchName


@contract(room, "mark_loaded")
def test_a_parameter_marked_as_loaded_is_not_filled_anew(loaded):
    assert bool((loaded.get_parameter(CHOSEN) == 7).all())


@contract(room, "is_loaded")
def test_parameters_that_were_in_the_file_are_marked(loaded, registered, dense_dir, tmp_path):
    ((arrived, _),) = calls(loaded, "_process_model_after_weight_loading")
    assert all(arrived.values())
    tensors = load_file(os.path.join(dense_dir, "model.safetensors"))
    del tensors["model.layers.0.mlp.down_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with open(os.path.join(dense_dir, "config.json")) as file:
        (tmp_path / "config.json").write_text(file.read())
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=ProbeConfig())
    ((arrived, _),) = calls(model, "_process_model_after_weight_loading")
    assert [name for name, there in arrived.items() if not there] == ["model.layers.0.mlp.down_proj.weight"]


@asks("_process_model_before_weight_loading")
def test_a_model_is_prepared_before_its_weights_are_read(loaded, dense_dir):
    ((on_meta, files),) = calls(loaded, "_process_model_before_weight_loading")
    assert on_meta and files == [os.path.join(dense_dir, "model.safetensors")]


@asks("_process_model_after_weight_loading")
def test_a_model_is_checked_when_its_weights_are_in_and_its_hooks_attached(loaded, registered, dense_dir, tmp_path):
    ((_, hooked),) = calls(loaded, "_process_model_after_weight_loading")
    assert hooked == []
    model = AutoModelForCausalLM.from_pretrained(
        dense_dir,
        quantization_config=ProbeConfig(),
        device_map={"model": "cpu", "lm_head": "disk"},
        offload_folder=tmp_path,
    )
    ((_, hooked),) = calls(model, "_process_model_after_weight_loading")
    assert hooked == ["lm_head"]


@asks("get_state_dict_and_metadata")
def test_saving_asks_for_the_state_dict_before_the_config_is_written(registered, dense_dir, tmp_path):
    class Noting(ProbeConfig):
        def to_dict(self):
            return {"quant_method": METHOD, "noted": getattr(self, "noted", False)}

    model = AutoModelForCausalLM.from_pretrained(dense_dir, quantization_config=Noting())
    model.save_pretrained(tmp_path)
    assert list(load_file(tmp_path / "model.safetensors")) == ["only"]
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["noted"]


@asks("is_qat_trainable")
def test_a_trainer_asks_before_it_refuses_a_model_without_an_adapter(registered, dense_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(dense_dir, quantization_config=ProbeConfig())
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True))
    assert calls(model, "is_qat_trainable")


@asks("_dequantize")
def test_dequantize_is_handed_on_with_its_dtype(registered, dense_dir):
    model = AutoModelForCausalLM.from_pretrained(dense_dir, quantization_config=ProbeConfig())
    quantizer = room.quantizer_of(model)
    assert model.dequantize(torch.float16) is model
    assert quantizer.calls["_dequantize"] == [(torch.float16,)]


@contract(room, "kept_in_fp32")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_modules_that_stay_in_fp32_are_listed(tmp_path, dtype):
    config = T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    model = T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    kept = room.kept_in_fp32(model, dtype)
    for name, parameter in model.named_parameters():
        stays = not kept.isdisjoint(name.split("."))
        assert parameter.dtype == (torch.float32 if stays else dtype), name
    assert bool(kept) == (dtype == torch.float16)


@contract(room, "tensor_parallel_size")
def test_the_size_of_tensor_parallelism_is_in_the_config_before_weights_are_read(registered, dense_dir, monkeypatch):
    seen = []

    def note(self, model, **kwargs):
        seen.append(room.tensor_parallel_size(model.config))
        raise KeyboardInterrupt

    plan = DistributedConfig(tp_size=2)
    monkeypatch.setattr(ProbeQuantizer, "_process_model_before_weight_loading", note)
    monkeypatch.setattr(PreTrainedModel, "prepare_distribute_model", lambda *args, **kwargs: (plan, None, None))
    with pytest.raises(KeyboardInterrupt):
        AutoModelForCausalLM.from_pretrained(dense_dir, quantization_config=ProbeConfig(), distributed_config=plan)
    assert seen == [2]
    assert room.tensor_parallel_size(tiny_llama().config) == 1


@contract(room, "build_from_config")
def test_a_model_is_built_in_the_dtype_of_its_config(loaded, monkeypatch):
    config = loaded.config.__class__.from_dict({**loaded.config.to_dict(), "dtype": "bfloat16"})
    before = config.to_dict()
    expected = LlamaForCausalLM(config.__class__.from_dict(before)).model.rotary_emb.inv_freq
    monkeypatch.setattr(torch.Tensor, "normal_", lambda *arguments, **settings: pytest.fail("weights are drawn"))
    with init_empty_weights(include_buffers=False):
        model = room.build_from_config(LlamaForCausalLM, config)
    assert torch.equal(model.model.rotary_emb.inv_freq, expected)
    assert type(model) is LlamaForCausalLM and config.to_dict() == before and model.config is not config
    assert all(value.is_meta and value.dtype == torch.bfloat16 for value in model.parameters())
    assert not any(value.is_meta for value in model.buffers())


@contract(room, "causal_class_name")
def test_types_have_a_causal_class():
    assert room.causal_class_name("llama") == "LlamaForCausalLM"
    assert room.causal_class_name("no_such_type") is None


@contract(room, "tied_weights")
def test_tied_weights_are_listed_by_name_also_on_meta(tiny_llama=tiny_llama):
    assert room.tied_weights(tiny_llama()) == {}
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny_llama(tie_word_embeddings=True).config)
    assert room.tied_weights(model) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert room.tied_weights(nn.Linear(2, 2)) == {}


class TwoParts(nn.Module):
    """Stands for a weight by two parameters of other names."""

    def __init__(self, one: nn.Parameter, two: nn.Parameter):
        super().__init__()
        self.one, self.two = one, two
        self.register_parameter("weight", None)


@contract(room, "tie_other_names", "tie_weights_again")
def test_parameters_of_other_names_are_tied_saved_once_and_tied_by_weight_again(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    embedding, head = model.model.embed_tokens, model.lm_head
    room.tie_other_names(model, {"lm_head.weight"}, ["one", "two"])
    expected = {f"lm_head.{name}": f"model.embed_tokens.{name}" for name in ("one", "two")}
    assert model.all_tied_weights_keys == expected
    kept = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    model.model.embed_tokens = TwoParts(*kept)
    model.lm_head = TwoParts(nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2)))
    assert model.get_expanded_tied_weights_keys(all_submodels=True) == expected
    model.tie_weights(missing_keys={"lm_head.one", "lm_head.two"}, recompute_mapping=False)
    assert model.lm_head.one is kept[0] and model.lm_head.two is kept[1]
    model.tie_weights()
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert {"model.embed_tokens.one", "model.embed_tokens.two"} <= names
    assert not any(name.startswith("lm_head") for name in names)
    model.model.embed_tokens, model.lm_head = embedding, head
    head.weight = nn.Parameter(torch.zeros_like(head.weight))
    room.tie_weights_again(model)
    assert model.lm_head.weight is embedding.weight
    assert model.all_tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "_tied_weights_keys" not in vars(model)


@contract(room, "renaming_of")
def test_stored_names_are_renamed_to_those_of_the_model(tmp_path):
    config = GPTNeoXConfig(
        vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2
    )
    model = GPTNeoXForCausalLM(config)
    model.save_pretrained(tmp_path)
    stored, rename = load_file(tmp_path / "model.safetensors"), room.renaming_of(model)
    assert "embed_out.weight" in stored
    assert {rename(key) for key in stored} == {name for name, _ in model.named_parameters()}


@contract(room, "sources_of", "convert")
def test_experts_are_made_of_what_a_checkpoint_holds(tmp_path):
    for family in ("mixtral", "gpt_oss"):
        model = tiny_mixture(family)
        model.save_pretrained(tmp_path / family)
        stored = load_file(tmp_path / family / "model.safetensors")
        name = "model.layers.1.mlp.experts.gate_up_proj"
        converter, parts = room.sources_of(model, stored)[name]
        whole = model.get_parameter(name)
        if converter is None:
            assert parts == {name: [name]} and family == "gpt_oss"
            continue
        place = "model.layers.1.block_sparse_moe.experts"
        assert list(parts.values()) == [
            [f"{place}.{index}.{key}.weight" for index in range(4)] for key in ("w1", "w3")
        ]
        own = {pattern: [stored[keys[2]]] for pattern, keys in parts.items()}
        made = room.convert(converter, name, own, (1, *whole.shape[1:]), model.config)
        assert torch.equal(made, whole[2:3])


@contract(experts_room, "has_implementations", "apply_gate")
def test_classes_of_experts_say_how_they_compute():
    mixtral, gpt_oss = (tiny_mixture(family).model.layers[0].mlp.experts for family in ("mixtral", "gpt_oss"))
    assert experts_room.has_implementations(mixtral) and not experts_room.has_implementations(
        tiny_llama().model.layers[0].mlp
    )
    assert (mixtral.is_transposed, mixtral.has_gate, mixtral.has_bias) == (False, True, False)
    assert (gpt_oss.is_transposed, gpt_oss.has_gate, gpt_oss.has_bias) == (True, True, True)
    assert not tiny_mixture("nemotron_h").model.layers[1].mixer.experts.has_gate
    x = torch.randn(3, 80)
    assert torch.equal(experts_room.apply_gate(mixtral, x), mixtral.act_fn(x[:, :40]) * x[:, 40:])


@contract(experts_room, "norm_of_experts")
def test_experts_say_whether_their_outputs_are_normed():
    experts = tiny_mixture("mixtral").model.layers[0].mlp.experts
    assert experts_room.norm_of_experts(experts) is None
    source = inspect.getsource(moe)
    if "has_post_expert_norm" in source:  # not in 5.18, which has no such experts
        experts.has_post_expert_norm, experts.post_expert_norm = True, torch.nn.Identity()
        assert experts_room.norm_of_experts(experts) is experts.post_expert_norm
        assert "self.post_expert_norm(proj_out)" in source


@contract(experts_room, "register_experts", "use_implementation", "follow_implementation")
def test_an_implementation_of_experts_is_used_in_one_module(tokens):
    model = tiny_mixture("mixtral")
    first, second = (layer.mlp.experts for layer in model.model.layers)
    calls = []

    def forward(module, hidden_states, top_k_index, top_k_weights):
        calls.append((module, hidden_states.shape, top_k_index.shape, top_k_weights.shape))
        return torch.zeros_like(hidden_states)

    experts_room.register_experts("cluscomp_contract", forward)
    experts_room.use_implementation(first, "cluscomp_contract")
    assert first.config.hidden_size == second.config.hidden_size
    model(tokens)
    assert calls == [(first, (20, 32), (20, 2), (20, 2))]
    experts_room.follow_implementation(first)
    model(tokens)
    assert len(calls) == 1 and first.config is second.config


@contract(experts_room, "as_stored")
def test_a_tensor_of_all_experts_is_stored_in_the_pieces_of_the_checkpoint(tmp_path):
    model = tiny_mixture("mixtral")
    model.save_pretrained(tmp_path)
    file = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    pieces = experts_room.as_stored(model, {name: model.get_parameter(name).detach()})
    assert len(pieces) == 8 and all(torch.equal(file[key], value) for key, value in pieces.items())
    assert len({value.untyped_storage().data_ptr() for value in pieces.values()}) == 8
    gpt_oss = tiny_mixture("gpt_oss")  # stored as it is
    whole = gpt_oss.get_parameter(name).detach()
    assert torch.equal(experts_room.as_stored(gpt_oss, {name: whole})[name], whole)


@contract(room, "forget_adapters")
def test_a_model_whose_adapter_was_refused_takes_another(monkeypatch):
    from peft import LoraConfig

    model = tiny_llama()
    with pytest.raises(ValueError, match="no_such_layer"):
        model.add_adapter(LoraConfig(target_modules=["no_such_layer"]))
    room.forget_adapters(model)
    with pytest.raises(ValueError, match="No adapter loaded"):
        model.active_adapters()
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    assert model.active_adapters() == ["default"]


class Watching(Trainer):
    """Notes the columns and the number of tokens that reach the loss."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        room.tokens_are_counted(self)
        self.seen = []

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        room.keep_columns(self, ("teacher", "labels"))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.seen.append((set(inputs), None if num_items_in_batch is None else int(num_items_in_batch)))
        inputs = {key: inputs[key] for key in ("input_ids", "labels")}
        return model(**inputs).logits.square().sum() / num_items_in_batch


@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> list:
    """What a trainer handed its loss, in one step of two batches of one row with 3 tokens that count in each."""
    rows = [
        {"input_ids": torch.tensor([3, 4, 5, 6]), "labels": torch.tensor([3, 4, 5, 6]), "teacher": torch.zeros(1)}
    ] * 2
    arguments = TrainingArguments(
        str(tmp_path_factory.mktemp("trainer")),
        max_steps=1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
    )
    trainer = Watching(tiny_llama(), arguments, train_dataset=Rows(rows))
    trainer.train()
    assert len(trainer.seen) == 2
    return trainer.seen


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


@contract(
    room,
    "keep_columns",
    "TRAINER_METHODS._set_signature_columns_if_needed",
    says=room.TRAINER_METHODS["_set_signature_columns_if_needed"],
)
def test_columns_that_are_kept_reach_the_loss(watched):
    assert all({"input_ids", "labels", "teacher"} <= columns for columns, _ in watched)


@contract(room, "tokens_are_counted")
def test_the_loss_is_told_how_many_tokens_a_step_has(watched):
    counts = {count for _, count in watched}
    assert len(counts) == 1 and counts <= {6, 8}  # of both batches; the first of a row is predicted by nothing
