"""PEFT: how a method from outside is entered into its tables, what its tuners and layers ask of ours, and the rules by
which it chooses layers.

PEFT takes seconds to import, and torch one, so nothing here imports them before it is called.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "FILE_PREFIX",
    "LAYER_ATTRIBUTES",
    "LORA_METHODS",
    "TUNER_METHODS",
    "adapters_to_merge",
    "extend_peft_type",
    "has_tuner_layers",
    "hide_device_map",
    "is_saved_whole",
    "keep_dtypes",
    "matches",
    "onloaded",
    "original_of",
    "register_method",
    "show_device_map",
    "teach_lora",
    "trains_tokens",
    "watch_reading",
]

# What PeftModel puts before the names of a model in the files of adapters. If it changes, saved adapters are held
# against layers of other names and refused.
FILE_PREFIX = "base_model.model."

TUNER_METHODS = {
    "_prepare_adapter_config": "inject_adapter calls it before it replaces a layer, and goes on with the config that "
    "it returns; if it does not, errors are found when layers have been replaced already.",
    "_create_and_replace": "inject_adapter calls it for each match, also for a tuner layer that is there, with the "
    "config, the adapter's name, the layer, its name in its parent, the parent and `current_key`, its full name.",
    "_replace_module": "_unload_and_optionally_merge calls it with the parent, the name in it, what comes in and what "
    "goes; if it does not, an interrupted merge cannot be taken back.",
    "_cast_adapter_dtype": "it is the last step of creating an adapter and of loading its weights; if it is not, "
    "loaded dense-born adapters are saved without the digest of their codes.",
    "_unload_and_optionally_merge": "merge_and_unload and unload call it; if they do not, an error in one layer "
    "leaves a model merged in part.",
    "_enable_peft_forward_hooks": "PeftModel enters it around each forward pass with its arguments; if it does not, "
    "`adapter_names` is ignored without a word.",
    "_get_adapter_state_dict": "save_pretrained calls it with the whole state dict, writes the tensors that it "
    "returns without the adapter's name, and the config after that; if it does not, files hold deltas in units that "
    "nobody knows, and no codes.",
    "_remap_adapter_state_dict_for_load": "loading calls it with the tensors of the file, and loads those that it "
    "returns; if it does not, deltas are taken in the wrong units.",
}
"""Methods of `BaseTuner` that a tuner overrides or calls, and what is relied on of their call."""

LAYER_ATTRIBUTES = {
    "_disable_adapters": "`layer.disable_adapters` reads it, and `enable_adapters` writes it.",
    "_active_adapter": "`layer.active_adapters` reads it, and `set_adapter` writes it.",
    "_move_adapter_to_device_of_base_layer": "loading under low_cpu_mem_usage calls it with the adapter's name when "
    "tensors are in; if it does not, a dense-born base stays on the CPU.",
    "adapter_layer_names": "names of the ModuleDicts whose entries `set_adapter` makes trainable and `delete_adapter` "
    "takes out; if they are found otherwise, nothing is trained.",
    "other_param_names": "names of further dicts that `delete_adapter` takes entries out of; if it does not, an "
    "adapter of the same name gets the digest and units of the one before.",
    "merged_adapters": "`layer.merged` and `check_adapters_to_merge` read it; if they do not, an adapter is merged "
    "twice.",
    "unload_and_optionally_merge_module": "_unload_and_optionally_merge asks it for what takes the layer's place; if "
    "it does not, a dense-born layer stays clustered when it is unloaded.",
}
"""Attributes and methods of `BaseTunerLayer` that a tuner layer sets or overrides, and what reads or calls them."""


LORA_METHODS = {
    "update_layer": "a LoRA layer calls it with the config for every adapter that it gets; if it does not, an "
    "initialisation that reads a dense weight fails in words about tensors.",
    "resolve_lora_variant": "update_layer calls it with `config`; if it does not, DoRA on codes fails in words about "
    "tensors.",
    "_get_in_out_features": "a LoRA layer asks it for the sizes of its base, (in, out); if it does not, it warns of "
    "an unsupported layer.",
}
"""Methods of `lora.Linear` that a LoRA layer on codes overrides, and what is relied on of their call."""


def extend_peft_type(name: str) -> None:
    """Adds a member to the enum `PeftType`, by which PEFT looks up its methods; nothing if it is there already.

    `PeftType` is an enum of `str`; the member goes into every table that the standard library keeps of an enum
    (CPython 3.11 to 3.14). If one of these changes, or PEFT finds methods otherwise, no adapter can be made or loaded.
    """
    from peft.utils import PeftType

    enum: Any = PeftType
    if name in enum.__members__:
        return
    member = str.__new__(enum, name)
    member._name_ = member._value_ = name
    member.__objclass__ = enum
    member._sort_order_ = len(enum.__members__)
    type.__setattr__(enum, name, member)
    enum._member_names_.append(name)
    enum._member_map_[name] = member
    enum._value2member_map_[name] = member
    if hasattr(enum, "_hashable_values_"):  # Python 3.13
        enum._hashable_values_.append(name)


def register_method(method: str, config: type, model: type) -> None:
    """Enters a config and a tuner for the member of `PeftType` called as `method` in capitals: `register_peft_method`,
    where `PEFT_TYPE_TO_TUNER_MAPPING` does not have it yet.

    If the tables work otherwise, no adapter can be made or loaded.
    """
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import PeftType, register_peft_method

    if PeftType(method.upper()) not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=method, config_cls=config, model_cls=model)


def watch_reading(kind: type) -> None:
    """Has `PeftConfig.from_pretrained`, which makes of a file the config of whatever method it names, tell those of a
    class where they were read, by their `note_source(place, subfolder, settings)`: transformers' `load_adapter` reads
    them so.

    If they are read otherwise, the files of adapters that transformers loads are not checked before the model is
    touched.
    """
    from peft.config import PeftConfigMixin

    read = PeftConfigMixin.from_pretrained.__func__
    if hasattr(read, "__wrapped__"):
        return

    @functools.wraps(read)
    def read_and_tell(
        cls: type, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        config = read(cls, pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if isinstance(config, kind):
            config.note_source(pretrained_model_name_or_path, subfolder, kwargs)  # type: ignore[attr-defined]
        return config

    PeftConfigMixin.from_pretrained = classmethod(read_and_tell)


def teach_lora(base: type[nn.Module], layer: Callable[..., nn.Module], names: Callable[[nn.Module], set[str]]) -> None:
    """Has LoRA take layers of a class: `LoraModel._create_new_module(config, adapter_name, target, **kwargs)` makes of
    each target what takes its place, `LoraModel._prepare_adapter_config(config, model_config)` resolves the targets,
    and `_maybe_include_all_linear_layers(config, model)` those of "all-linear", to a set of names.

    If they work otherwise, LoRA refuses clustered layers, as other methods do.

    Args:
        base: Class of the layers.
        layer: Makes a LoRA layer from such a layer, an adapter's name, `config` and what else PEFT passes.
        names: Of the layers of that class in a model.
    """
    from peft.tuners.lora import LoraModel
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers

    create, prepare = LoraModel._create_new_module, LoraModel._prepare_adapter_config
    if hasattr(create, "__wrapped__"):
        return

    @functools.wraps(create)
    def create_or_clustered(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        if isinstance(target, base):
            return layer(target, adapter_name, config=lora_config, **kwargs)
        return create(lora_config, adapter_name, target, **kwargs)

    @functools.wraps(prepare)
    def prepare_with_clustered(self: Any, config: Any, model_config: Any) -> Any:
        targets, found = config.target_modules, names(self.model)
        if found and isinstance(targets, str) and targets.lower() == "all-linear":
            config = _maybe_include_all_linear_layers(config, self.model)
            config.target_modules |= found
        return prepare(self, config, model_config)

    LoraModel._create_new_module = staticmethod(create_or_clustered)
    LoraModel._prepare_adapter_config = prepare_with_clustered


def keep_dtypes(model: Any) -> None:
    """Has `prepare_model_for_kbit_training` leave the numbers of a model as they are, and only make it ready for
    gradients: by `hqq_quantized`, the one of its signs that is an attribute and that nothing else asks for.

    If it goes by another sign, it casts codebooks to fp32, which merging then stores at twice the size.
    """
    model.hqq_quantized = True


def matches(config: Any, name: str) -> bool:
    """Whether a config's `target_modules` and `layers_to_transform` choose a module: `check_target_module_exists`,
    which holds indices against ends of names only, not against full names, and which `inject_adapter` asks for each
    module outside of tuner layers.

    If it reads indices otherwise, default targets are not those that `layers_to_transform` names. If inject_adapter
    asks something else, the layers that are checked before are not those that are replaced.
    """
    from peft.tuners.tuners_utils import check_target_module_exists

    return bool(check_target_module_exists(config, name))


def is_saved_whole(config: Any, name: str) -> bool:
    """Whether a config's `modules_to_save` chooses a module: one whose name ends like an entry of it, as PEFT's
    `_set_trainable` has it.

    If PEFT chooses otherwise, a clustered or offloaded layer is copied and trained whole, and the copy is lost.
    """
    return name.endswith(tuple(config.modules_to_save or ()))


def adapters_to_merge(layer: Any, adapter_names: list[str] | None) -> list[str]:
    """Those of the adapters, by default of the active ones, that are not merged yet: `check_adapters_to_merge`.

    If it returns merged ones too, merging twice adds their deltas twice.
    """
    from peft.tuners.tuners_utils import check_adapters_to_merge

    return check_adapters_to_merge(layer, adapter_names)


def onloaded(layer: Any) -> AbstractContextManager[None]:
    """Inside of this the numbers of an offloaded tuner layer are in place: `onload_layer`.

    If they are not, merging with `safe_merge` finds no numbers to check.
    """
    from peft.tuners.tuners_utils import onload_layer

    return onload_layer(layer)


def has_tuner_layers(model: nn.Module) -> bool:
    """Whether a model has a layer of an adapter, of any method: a `BaseTunerLayer`. False where PEFT is not imported.

    If they are of another class, Trainer takes no clustered model.
    """
    if "peft" not in sys.modules:
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def trains_tokens(module: nn.Module) -> bool:
    """Whether a module is what `trainable_token_indices` puts around an embedding: a `TrainableTokensWrapper`.

    If it is of another class, adapters that train tokens are not saved.
    """
    from peft.utils.other import TrainableTokensWrapper

    return isinstance(module, TrainableTokensWrapper)


def original_of(module: nn.Module | None) -> nn.Module | None:
    """The module inside of what `modules_to_save` puts around it: `wrapper.original_module`; None for all others.

    If it is called otherwise, copies that are trained whole count among the compressed bits.
    """
    return getattr(module, "original_module", None)


def hide_device_map(tuner: Any) -> None:
    """Keeps `PeftModel.load_adapter` from dispatching a model anew, which it does by an `hf_device_map` with "cpu" or
    "disk", after `PeftModel.from_pretrained` has taken all hooks off. The tuner's own attribute hides the model's.

    If loading reads the map elsewhere, the deltas are offloaded with the model, to a map that PEFT infers.
    """
    tuner.hf_device_map = None


def show_device_map(tuner: Any) -> None:
    """Undoes [`hide_device_map`]: the tuner answers with the map of its model again.

    If it does not, what asks for the map of a PeftModel takes an offloaded model for a whole one.
    """
    tuner.__dict__.pop("hf_device_map", None)
