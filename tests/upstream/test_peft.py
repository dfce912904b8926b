"""Contract tests of what `cluscomp_peft.upstream.peft` touches.

A method that only notes how PEFT calls it stands in for ours: adapters of it are made, saved, loaded and merged.
"""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.config import PeftConfigMixin
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from cluscomp_peft.upstream import peft as room
from cluscomp_peft.upstream.accelerate import device_map_of, hook_of
from tests.conftest import tiny_llama
from tests.upstream.contract import contract

METHOD = "cluscomp_contract"
NAME = METHOD.upper()
QUERIES = [f"model.layers.{index}.self_attn.q_proj" for index in range(2)]


@dataclass
class ProbeConfig(PeftConfig):
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | None = None
    target_parameters: list[str] | None = None
    bias: str = "none"
    noted: list[str] = field(default_factory=list)

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType(NAME)


class ProbeLayer(nn.Module, BaseTunerLayer):
    adapter_layer_names = (f"{METHOD}_delta",)
    other_param_names = (f"{METHOD}_note",)

    def __init__(self, base_layer, adapter_name, calls):
        super().__init__()
        self.base_layer, self.calls = base_layer, calls
        self.cluscomp_contract_delta = nn.ModuleDict({})
        self.cluscomp_contract_note = nn.ParameterDict({})
        self._disable_adapters, self._active_adapter, self.merged_adapters = False, adapter_name, []
        self.add(adapter_name)

    def add(self, adapter_name):
        self.cluscomp_contract_delta[adapter_name] = nn.Linear(2, 2, bias=False)
        self.cluscomp_contract_note[adapter_name] = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.set_adapter(self.active_adapters)

    def forward(self, *args, **kwargs):
        return self.base_layer(*args, **kwargs)

    def merge(self, safe_merge=False, adapter_names=None):
        self.merged_adapters = list(adapter_names or self.active_adapters)

    def unmerge(self):
        self.merged_adapters = []

    def _move_adapter_to_device_of_base_layer(self, adapter_name, device=None):
        on_meta = any(parameter.is_meta for parameter in self.cluscomp_contract_delta.parameters())
        self.calls.append(("_move_adapter_to_device_of_base_layer", adapter_name, on_meta))

    def unload_and_optionally_merge_module(self, merge, safe_merge, adapter_names):
        self.calls.append(("unload_and_optionally_merge_module", merge, safe_merge, adapter_names))
        return self.base_layer


class ProbeModel(BaseTuner):
    prefix = f"{METHOD}_"
    tuner_layer_cls = ProbeLayer
    target_module_mapping: dict = {}
    calls: list = []  # of all probes, because some methods are called on the class
    hides = False

    def note(self, name, *facts):
        ProbeModel.calls.append((name, *facts))

    def inject_adapter(self, model, adapter_name, *args, **kwargs):
        self.note("inject_adapter", [name for name, module in model.named_modules() if hook_of(module)])
        if ProbeModel.hides:
            room.hide_device_map(self)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _prepare_adapter_config(self, peft_config, model_config):
        present = sum(isinstance(module, ProbeLayer) for module in self.model.modules())
        self.note("_prepare_adapter_config", present)
        peft_config.target_modules = {"q_proj"}
        return peft_config

    def _check_target_module_exists(self, peft_config, key):
        chosen = super()._check_target_module_exists(peft_config, key)
        self.note("_check_target_module_exists", key, bool(chosen))
        return chosen

    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, current_key, **kwargs):
        self.note("_create_and_replace", adapter_name, type(target), target_name, current_key, kwargs)
        assert getattr(parent, target_name) is target
        if isinstance(target, ProbeLayer):
            target.add(adapter_name)
        else:
            setattr(parent, target_name, ProbeLayer(target, adapter_name, ProbeModel.calls))

    def _replace_module(self, parent, child_name, new_module, child):
        assert getattr(parent, child_name) is child
        self.note("_replace_module", child_name, type(new_module), type(child))
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name, autocast_adapter_dtype=True):
        deltas = [value.detach() for name, value in self.model.named_parameters() if "_delta" in name]
        filled = [float(value.mean()) for value in deltas if not value.is_meta]
        self.note("_cast_adapter_dtype", adapter_name, filled)
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    def _unload_and_optionally_merge(self, merge=True, progressbar=False, safe_merge=False, adapter_names=None):
        self.note("_unload_and_optionally_merge", merge, safe_merge, adapter_names)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        self.note("_enable_peft_forward_hooks", kwargs.get("adapter_names"))
        yield

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        cls.calls.append(("_get_adapter_state_dict", set(state_dict), set(selected)))
        config.noted = ["written"]
        layer = next(name for name, module in model.named_modules() if isinstance(module, ProbeLayer))
        return {**selected, f"{layer}.{METHOD}_note.{adapter_name}": torch.full([1], 5.0)}

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        mapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        cls.calls.append(("_remap_adapter_state_dict_for_load", config, set(state_dict), set(mapped)))
        return {key: torch.full_like(value, 3) if "_delta" in key else value for key, value in mapped.items()}


@pytest.fixture(scope="module", autouse=True)
def registered():
    for _ in range(2):  # the second time does nothing
        room.extend_peft_type(NAME)
        room.register_method(METHOD, ProbeConfig, ProbeModel)
    yield
    kind = PeftType(NAME)
    for table in (
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
        PEFT_TYPE_TO_PREFIX_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
    ):
        table.pop(kind, None)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(ProbeModel, "calls", [])


def config(**settings) -> ProbeConfig:
    return ProbeConfig(task_type="CAUSAL_LM", **settings)


def calls(name: str) -> list[tuple]:
    return [facts for called, *facts in ProbeModel.calls if called == name]


def order() -> list[str]:
    return [called for called, *_ in ProbeModel.calls]


def tuner_method(name: str):
    return contract(room, f"TUNER_METHODS.{name}", says=room.TUNER_METHODS[name])


def layer_attribute(name: str):
    return contract(room, f"LAYER_ATTRIBUTES.{name}", says=room.LAYER_ATTRIBUTES[name])


def lora_method(name: str):
    return contract(room, f"LORA_METHODS.{name}", says=room.LORA_METHODS[name])


@pytest.fixture
def adapted() -> PeftModel:
    return get_peft_model(tiny_llama(), config())


@pytest.fixture
def layer(adapted) -> ProbeLayer:
    return adapted.get_submodule(f"{room.FILE_PREFIX}{QUERIES[0]}")


@pytest.fixture
def saved(adapted, tmp_path) -> str:
    adapted.save_pretrained(tmp_path)
    return str(tmp_path)


# -- tables


@contract(room, "extend_peft_type")
def test_the_member_is_one_like_the_others():
    member = PeftType(NAME)
    assert member is PeftType[NAME] is getattr(PeftType, NAME) and member == NAME and hash(member) == hash(NAME)
    assert list(PeftType).count(member) == 1 and NAME in list(PeftType) and member in PeftType
    assert pickle.loads(pickle.dumps(member)) is member and copy.deepcopy(member) is member
    assert json.dumps(member) == f'"{NAME}"' and member.value == member.name == NAME
    assert len({*PeftType}) == len(PeftType) == len(PeftType.__members__)


@contract(room, "register_method")
def test_a_registered_method_is_found_by_its_config(adapted, saved):
    assert isinstance(adapted.base_model, ProbeModel)
    assert isinstance(PeftConfig.from_pretrained(saved), ProbeConfig)
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType(NAME)] == ProbeModel.prefix


# -- tuner


@tuner_method("_prepare_adapter_config")
def test_the_config_is_prepared_before_any_layer_is_replaced(adapted):
    assert calls("_prepare_adapter_config") == [[0]]
    assert adapted.base_model.targeted_module_names == QUERIES  # which only the prepared config names


@contract(room, "matches")
def test_each_module_outside_of_tuner_layers_is_asked_for(adapted):
    names = [name for name, _ in tiny_llama().named_modules() if name]
    assert [key for key, _ in calls("_check_target_module_exists")] == names
    ProbeModel.calls.clear()
    adapted.add_adapter("second", config())
    assert [key for key, _ in calls("_check_target_module_exists")] == names
    assert [key for key, chosen in calls("_check_target_module_exists") if chosen] == QUERIES
    assert [name for name in names if room.matches(adapted.peft_config["second"], name)] == QUERIES


@tuner_method("_create_and_replace")
def test_every_match_is_handed_over_with_its_place(adapted):
    adapted.add_adapter("second", config())
    assert calls("_create_and_replace") == [
        [adapter, kind, "q_proj", name, {}]
        for adapter, kind in (("default", nn.Linear), ("second", ProbeLayer))
        for name in QUERIES
    ]


@tuner_method("_cast_adapter_dtype")
def test_casting_is_the_last_step_of_creating_and_of_loading(adapted, saved):
    assert order().count("_cast_adapter_dtype") >= 1 and order()[: order().index("_get_adapter_state_dict")][-1] == (
        "_cast_adapter_dtype"
    )
    ProbeModel.calls.clear()
    PeftModel.from_pretrained(tiny_llama(), saved)
    assert "_remap_adapter_state_dict_for_load" in order() and order()[-1] == "_cast_adapter_dtype"
    name, filled = calls("_cast_adapter_dtype")[-1]
    assert name == "default" and filled.count(3.0) == len(QUERIES)
    assert 3.0 not in calls("_cast_adapter_dtype")[0][1]  # after empty layers are made, too


@tuner_method("_unload_and_optionally_merge")
def test_merging_and_unloading_go_by_one_method(adapted):
    adapted.merge_and_unload(safe_merge=True, adapter_names=["default"])
    assert calls("_unload_and_optionally_merge") == [[True, True, ["default"]]]
    ProbeModel.calls.clear()
    get_peft_model(tiny_llama(), config()).unload()
    assert calls("_unload_and_optionally_merge")[0][0] is False


@layer_attribute("unload_and_optionally_merge_module")
@tuner_method("_replace_module")
def test_the_layer_says_what_takes_its_place(adapted):
    adapted.merge_and_unload(safe_merge=True, adapter_names=["default"])
    assert calls("unload_and_optionally_merge_module") == [[True, True, ["default"]]] * len(QUERIES)
    assert calls("_replace_module") == [["q_proj", nn.Linear, ProbeLayer]] * len(QUERIES)


@tuner_method("_enable_peft_forward_hooks")
def test_a_forward_pass_is_entered_with_its_arguments(adapted, tokens):
    adapted(input_ids=tokens)
    adapted(input_ids=tokens, adapter_names=["default"] * len(tokens))
    assert calls("_enable_peft_forward_hooks") == [[None], [["default"] * len(tokens)]]


@tuner_method("_get_adapter_state_dict")
def test_saving_writes_the_tensors_that_the_tuner_returns_and_then_the_config(adapted, saved):
    ((given, selected),) = calls("_get_adapter_state_dict")
    assert f"{room.FILE_PREFIX}model.norm.weight" in given
    assert selected == {f"{room.FILE_PREFIX}{name}.{METHOD}_delta.default.weight" for name in QUERIES} | {
        f"{room.FILE_PREFIX}{name}.{METHOD}_note.default" for name in QUERIES
    }
    tensors = load_file(f"{saved}/adapter_model.safetensors")
    assert tensors[f"{room.FILE_PREFIX}{QUERIES[0]}.{METHOD}_note"] == 5
    with open(f"{saved}/adapter_config.json") as file:
        assert json.load(file)["noted"] == ["written"]


@contract(room, "FILE_PREFIX", says="Saved adapters are held against layers of other names and refused.")
def test_names_in_files_and_models_have_the_prefix(adapted, saved):
    names = {key.removesuffix(".weight").rpartition(".")[0] for key in load_file(f"{saved}/adapter_model.safetensors")}
    assert names == {f"{room.FILE_PREFIX}{name}" for name in QUERIES}
    assert all(isinstance(adapted.get_submodule(name), ProbeLayer) for name in names)


@tuner_method("_remap_adapter_state_dict_for_load")
def test_loading_takes_the_tensors_that_the_tuner_returns(saved):
    ProbeModel.calls.clear()
    model = PeftModel.from_pretrained(tiny_llama(), saved)
    ((given, before, after),) = calls("_remap_adapter_state_dict_for_load")
    assert given is model.peft_config["default"]
    assert before == set(load_file(f"{saved}/adapter_model.safetensors"))
    assert {f"{room.FILE_PREFIX}{name}.{METHOD}_delta.default.weight" for name in QUERIES} <= after
    deltas = [value for key, value in model.state_dict().items() if "_delta" in key]
    assert len(deltas) == len(QUERIES) and all(bool((delta == 3).all()) for delta in deltas)


# -- layers


@layer_attribute("_disable_adapters")
def test_adapters_are_disabled_by_their_flag(adapted, layer):
    with adapted.disable_adapter():
        assert layer._disable_adapters and layer.disable_adapters
    layer._disable_adapters = True
    assert layer.disable_adapters


@layer_attribute("_active_adapter")
def test_active_adapters_are_those_of_the_attribute(adapted, layer):
    layer._active_adapter = "default"
    assert layer.active_adapters == ["default"]
    adapted.add_adapter("second", config())
    adapted.set_adapter("second")
    assert layer._active_adapter == ["second"]


@layer_attribute("_move_adapter_to_device_of_base_layer")
def test_loading_without_memory_moves_adapters_when_their_tensors_are_in(saved):
    ProbeModel.calls.clear()
    PeftModel.from_pretrained(tiny_llama(), saved, low_cpu_mem_usage=True)
    assert calls("_move_adapter_to_device_of_base_layer") == [["default", False]] * len(QUERIES)
    assert order().index("_move_adapter_to_device_of_base_layer") > order().index("_remap_adapter_state_dict_for_load")


@layer_attribute("adapter_layer_names")
@layer_attribute("other_param_names")
def test_entries_of_named_dicts_are_trained_and_deleted(adapted, layer):
    adapted.add_adapter("second", config())
    adapted.set_adapter("second")
    assert [part.weight.requires_grad for part in layer.cluscomp_contract_delta.values()] == [False, True]
    assert not any(part.requires_grad for part in layer.cluscomp_contract_note.values())
    adapted.delete_adapter("default")
    assert list(layer.cluscomp_contract_delta) == list(layer.cluscomp_contract_note) == ["second"]


@contract(room, "adapters_to_merge")
@layer_attribute("merged_adapters")
def test_merged_adapters_are_left_out(layer):
    assert not layer.merged and room.adapters_to_merge(layer, None) == ["default"]
    assert room.adapters_to_merge(layer, ["default", "other"]) == ["default", "other"]
    layer.merged_adapters = ["default"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert layer.merged and room.adapters_to_merge(layer, None) == []
        assert room.adapters_to_merge(layer, ["default", "other"]) == ["other"]


@contract(room, "onloaded")
def test_the_numbers_of_an_offloaded_base_are_in_place_inside(adapted, layer):
    cpu_offload(adapted, execution_device=torch.device("cpu"))
    assert layer.base_layer.weight.is_meta
    with room.onloaded(layer):
        assert not layer.base_layer.weight.is_meta
    assert layer.base_layer.weight.is_meta


# -- choosing


@contract(room, "matches")
@pytest.mark.parametrize(
    "targets, layers, chosen",
    [
        ({"q_proj"}, None, [0, 1]),
        ({"q_proj"}, [1], [1]),
        ({"q_proj"}, 0, [0]),
        ({*QUERIES}, [1], [0, 1]),  # full names, whose indices are not looked at
        ({"v_proj"}, None, []),
        (r".*\.1\..*q_proj", None, [1]),
    ],
)
def test_ends_of_names_and_indices_choose_layers(targets, layers, chosen):
    found = ProbeConfig(target_modules=targets, layers_to_transform=layers)
    assert [index for index, name in enumerate(QUERIES) if room.matches(found, name)] == chosen


@contract(room, "is_saved_whole")
@contract(room, "original_of")
@pytest.mark.parametrize("ending", ["lm_head", "head", "model.layers.0.mlp.up_proj", "up_proj"])
def test_modules_saved_whole_are_those_whose_names_end_so(ending):
    plain = tiny_llama()
    chosen = [name for name, _ in plain.named_modules() if room.is_saved_whole(config(modules_to_save=[ending]), name)]
    model = get_peft_model(tiny_llama(), config(modules_to_save=[ending])).base_model.model
    wrapped = [name for name, module in model.named_modules() if room.original_of(module) is not None]
    assert chosen and wrapped == chosen
    original = room.original_of(model.get_submodule(chosen[0]))
    assert torch.equal(original.weight, plain.get_submodule(chosen[0]).weight)
    assert not room.is_saved_whole(config(), "lm_head")


@contract(room, "trains_tokens")
def test_what_trains_tokens_is_around_the_embedding():
    settings = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), settings).base_model.model
    assert [name for name, module in model.named_modules() if room.trains_tokens(module)] == ["model.embed_tokens"]


@contract(room, "has_tuner_layers")
def test_layers_of_adapters_are_of_one_class(adapted):
    assert room.has_tuner_layers(adapted) and not room.has_tuner_layers(tiny_llama())
    assert room.has_tuner_layers(get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])))


# -- LoRA and preparation for layers of ours


class OwnLayer(nn.Module):
    """No linear layer of torch's."""

    in_features = out_features = 32

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32))

    def forward(self, x):
        return x * self.weight


class LoraOwnLayer(LoraLinear):
    called: list = []

    def update_layer(self, adapter_name, r, lora_alpha, config, **kwargs):
        self.called.append(("update_layer", adapter_name, config))
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def resolve_lora_variant(self, *, config, **kwargs):
        self.called.append(("resolve_lora_variant", config))
        return super().resolve_lora_variant(config=config, **kwargs)

    def _get_in_out_features(self, module):
        self.called.append(("_get_in_out_features", module))
        return module.in_features, module.out_features


@pytest.fixture
def taught(monkeypatch):
    """LoRA that has been taught the class above, and nothing else."""
    for name in ("_create_new_module", "_prepare_adapter_config"):
        method = getattr(LoraModel, name)
        method = getattr(method, "__wrapped__", method)
        monkeypatch.setattr(LoraModel, name, staticmethod(method) if name == "_create_new_module" else method)
    names = {"model.layers.0.self_attn.o_proj"}
    for _ in range(2):  # the second time does nothing
        room.teach_lora(OwnLayer, LoraOwnLayer, lambda model: names)
    monkeypatch.setattr(LoraOwnLayer, "called", [])
    model = tiny_llama()
    model.model.layers[0].self_attn.o_proj = OwnLayer()
    return model


@contract(room, "watch_reading")
def test_a_config_is_told_where_it_was_read(tmp_path, monkeypatch):
    told = []

    class Own(LoraConfig):
        def note_source(self, *source):
            told.append(source)

    reading = PeftConfigMixin.__dict__["from_pretrained"]
    monkeypatch.setattr(PeftConfigMixin, "from_pretrained", classmethod(inspect.unwrap(reading.__func__)))
    for _ in range(2):  # the second time does nothing
        room.watch_reading(Own)
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.LORA, Own)
    LoraConfig(target_modules=["q_proj"]).save_pretrained(tmp_path)
    assert isinstance(PeftConfig.from_pretrained(tmp_path, revision="main"), Own)
    assert told == [(tmp_path, None, {"revision": "main"})]
    tiny_llama().load_adapter(str(tmp_path), adapter_state_dict={})  # transformers reads it the same way
    assert told[1][0] == str(tmp_path)


@contract(room, "teach_lora")
@pytest.mark.parametrize(("targets", "count"), [(["o_proj"], 2), ("all-linear", 14)])
def test_lora_takes_a_layer_that_it_was_taught(taught, targets, count):
    model = get_peft_model(taught, LoraConfig(target_modules=targets)).base_model.model
    found = [module for module in model.modules() if isinstance(module, LoraLinear)]
    assert len(found) == count and sum(type(module) is LoraOwnLayer for module in found) == 1


@lora_method("update_layer")
@lora_method("resolve_lora_variant")
@lora_method("_get_in_out_features")
def test_a_lora_layer_asks_for_variant_and_sizes(taught, recwarn):
    settings = LoraConfig(target_modules=["o_proj"])
    model = get_peft_model(taught, settings).base_model.model
    base = model.model.layers[0].self_attn.o_proj.base_layer
    first, *others = LoraOwnLayer.called
    assert first == ("_get_in_out_features", base)
    assert others == [("update_layer", "default", settings), ("resolve_lora_variant", settings)]
    assert not [entry for entry in recwarn if "Unsupported layer" in str(entry.message)]


@contract(room, "keep_dtypes")
def test_preparation_leaves_numbers_alone_and_enables_gradients(tokens):
    model = tiny_llama(torch.bfloat16)
    room.keep_dtypes(model)
    prepared = prepare_model_for_kbit_training(model)
    assert {parameter.dtype for parameter in prepared.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in prepared.parameters())
    prepared.train()
    assert prepared(tokens).logits.requires_grad  # as its inputs do, for checkpointing
    cast = prepare_model_for_kbit_training(tiny_llama(torch.bfloat16))
    assert {parameter.dtype for parameter in cast.parameters()} == {torch.float32}


# -- offloaded models


@contract(room, "hide_device_map", "show_device_map")
@pytest.mark.parametrize("hides", [False, True])
def test_a_hidden_map_keeps_loading_from_dispatching_anew(saved, dense_dir, tmp_path, monkeypatch, hides):
    monkeypatch.setattr(ProbeModel, "hides", hides)
    places = {"model": "cpu", "lm_head": "disk"}
    base = AutoModelForCausalLM.from_pretrained(dense_dir, device_map=places, offload_folder=tmp_path / "base")
    assert hook_of(base.lm_head) is not None
    monkeypatch.chdir(tmp_path)  # PEFT writes files of offloaded models there
    dispatched = []
    monkeypatch.setattr("peft.peft_model.dispatch_model", lambda *args, **kwargs: dispatched.append(kwargs))
    ProbeModel.calls.clear()
    model = PeftModel.from_pretrained(base, saved, offload_folder=tmp_path / "again", max_memory={"cpu": 10**9})
    assert calls("inject_adapter")[0] == [[]]  # all hooks had been taken off
    assert len(dispatched) == (not hides)
    room.show_device_map(model.base_model)
    assert device_map_of(model) is not None


@contract(room, "show_device_map")
def test_a_tuner_answers_with_the_map_of_its_model(adapted):
    places = {"": "cpu"}
    adapted.base_model.model.hf_device_map = places
    room.hide_device_map(adapted.base_model)
    assert device_map_of(adapted) is None
    room.show_device_map(adapted.base_model)
    assert device_map_of(adapted) is places
    assert device_map_of(SimpleNamespace()) is None
