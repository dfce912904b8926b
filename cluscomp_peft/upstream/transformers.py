"""transformers: its registry of checkpoint formats, what its loader asks of a quantizer, and what its models say of
themselves by attributes that are not documented.

The models of transformers take seconds to import, and torch one, so nothing here imports them before it is called.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers.core_model_loading import ConversionOps

__all__ = [
    "FORMATS",
    "QUANTIZER_METHODS",
    "TRAINER_METHODS",
    "ConversionOps",
    "build_from_config",
    "causal_class_name",
    "convert",
    "forget_adapters",
    "is_loaded",
    "keep_columns",
    "kept_in_fp32",
    "mark_loaded",
    "quantizer_of",
    "register_format",
    "renaming_of",
    "sources_of",
    "tensor_parallel_size",
    "tie_other_names",
    "tie_weights_again",
    "tied_weights",
    "tokens_are_counted",
]

# The module that has the registry of formats. We register when it has been imported; if the registry moves, that comes
# too late or never, and from_pretrained does not know the format.
FORMATS = "transformers.quantizers.auto"

QUANTIZER_METHODS = {
    "validate_environment": "from_pretrained calls it with `device_map` before it reads a weight; if it does not, "
    "weights that are to be clustered on the fly may be offloaded.",
    "param_element_size": "device_map='auto' asks it for the bytes per number of each parameter; if it does not, a "
    "model clustered on the fly is split by the sizes of its dense weights.",
    "adjust_max_memory": "device_map='auto' asks it for the room on each device; if it does not, K-means has none.",
    "param_needs_quantization": "the loader asks it by name for each parameter of the model; if it does not, nothing "
    "is clustered on the fly.",
    "get_quantize_ops": "the loader calls the `convert` of what it returns with {key: tensor or [tensor]}, `model`, "
    "`missing_keys`, and takes what that returns in place of the tensor; if it does not, nothing is clustered.",
    "get_state_dict_and_metadata": "save_pretrained asks it before config.json is written, and saves the state dict "
    "that it returns; if it does not, config.json says how matrices were stored before merging.",
    "_process_model_before_weight_loading": "from_pretrained calls it on the model without weights, with "
    "`checkpoint_files`; if it does not, a compressed checkpoint is loaded into dense layers.",
    "_process_model_after_weight_loading": "from_pretrained calls it when weights are in and offloaded layers have "
    "their hooks; if it does not, incomplete and damaged checkpoints pass.",
    "is_qat_trainable": "Trainer asks it of a model's quantizer before it refuses a model without an adapter; if it "
    "does not, the refusal does not say which adapter to make.",
    "_dequantize": "model.dequantize(dtype) calls it and returns what it returns.",
}
"""Methods of `HfQuantizer` that a quantizer overrides, and what is relied on of their call."""

TRAINER_METHODS = {
    "_set_signature_columns_if_needed": "Trainer calls it before it drops columns of a data set that the model does "
    "not take; if it does not, what a cached teacher says of a row never reaches the loss."
}
"""Methods of `Trainer` that a trainer overrides, and what is relied on of their call."""


def __getattr__(name: str) -> Any:
    """`ConversionOps`, the class of what `get_quantize_ops` returns, from `transformers.core_model_loading`.

    If the loader wants another class, nothing is clustered on the fly.
    """
    if name != "ConversionOps":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from transformers.core_model_loading import ConversionOps

    return ConversionOps


def register_format(method: str, config: type, quantizer: type) -> None:
    """Makes from_pretrained know checkpoints by the `quant_method` of their config.json: by
    `register_quantization_config` and `register_quantizer`, if `AUTO_QUANTIZATION_CONFIG_MAPPING` does not have it.

    If the registry works otherwise, compressed checkpoints are not loaded.
    """
    from transformers.quantizers.auto import (
        AUTO_QUANTIZATION_CONFIG_MAPPING,
        register_quantization_config,
        register_quantizer,
    )

    if method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(method)(config)
        register_quantizer(method)(quantizer)


def mark_loaded(parameter: Any) -> None:
    """Says that a parameter, or what stands in its place, has its numbers: `parameter._is_hf_initialized`.

    If transformers notes it elsewhere, it fills clustered layers with random numbers after clustering them.
    """
    parameter._is_hf_initialized = True


def is_loaded(parameter: torch.Tensor) -> bool:
    """Whether the loader found numbers for a parameter: `parameter._is_hf_initialized`.

    If transformers notes it elsewhere, complete checkpoints are refused as incomplete.
    """
    return getattr(parameter, "_is_hf_initialized", False)


def kept_in_fp32(model: nn.Module, dtype: torch.dtype) -> set[str]:
    """Parts of names of the modules that stay in fp32 in a model of another dtype: `_keep_in_fp32_modules_strict` in
    all 16-bit dtypes, `_keep_in_fp32_modules` in fp16.

    If transformers lists them elsewhere, T5 in fp16 gives the last layer of an MLP an input of the wrong dtype.
    """
    import torch

    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or []) if dtype.itemsize == 2 else set()
    if dtype == torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or [])
    return kept


def tensor_parallel_size(config: Any) -> int:
    """Into how many pieces from_pretrained is about to cut layers: `config.distributed_config.tp_size`, 1 for none.

    If it is noted elsewhere, a model with `tp_plan` loads, and fails in its first forward pass.
    """
    distributed = getattr(config, "distributed_config", None)
    return getattr(distributed, "tp_size", None) or 1  # one that came with config.json is a dict, and past


def build_from_config(model_class: Any, config: Any) -> Any:
    """A model of a class in the dtype that its config names: `model_class._from_config`. Its weights are whatever its
    memory holds: `no_init_weights` leaves out drawing them, which on the meta device takes longer than all the rest.
    The config stays as it is: some classes change the one that they are given.

    If they are called otherwise, no model can be compressed or inspected.
    """
    from transformers.initialization import no_init_weights

    with no_init_weights():
        return model_class._from_config(copy.deepcopy(config))


def causal_class_name(model_type: str) -> str | None:
    """The class of the causal language model of a type: `MODEL_FOR_CAUSAL_LM_MAPPING_NAMES`, None if there is none.

    If it is called otherwise, models whose config.json names no class cannot be compressed.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)


def tied_weights(model: nn.Module) -> dict[str, str]:
    """Names of parameters that are, or will be, one with another, to the name of that: `model.all_tied_weights_keys`.

    If it is called otherwise, tied embeddings are clustered as if they were a layer of their own, and calibration
    does not find the weights that a checkpoint stores once.
    """
    return getattr(model, "all_tied_weights_keys", None) or {}


def tie_other_names(model: nn.Module, weights: Collection[str], names: Sequence[str]) -> None:
    """Says that in place of weights that are tied to others, parameters of other names are tied, one by one.

    A model keeps what is tied in `all_tied_weights_keys`, which its loader reads, and each model inside of it in
    `_tied_weights_keys`, from which `get_expanded_tied_weights_keys` makes the former anew and by which
    `save_pretrained` chooses among names of a tensor. If they are kept elsewhere, a model with a clustered embedding
    is not loaded or not saved.

    Args:
        model: Of transformers; dense or clustered.
        weights: Names of the weights that are tied to others, such as "lm_head.weight".
        names: What stands in the place of "weight", such as "codes".
    """
    from transformers import PreTrainedModel

    def renamed(tied: dict[str, str], prefix: str) -> dict[str, str]:
        found = {}
        for target, source in tied.items():
            if f"{prefix}{target}" in weights:
                owners = target.removesuffix("weight"), source.removesuffix("weight")
                found.update({owners[0] + name: owners[1] + name for name in names})
            else:
                found[target] = source
        return found

    for path, part in model.named_modules():
        if isinstance(part, PreTrainedModel):
            prefix = f"{path}." if path else ""
            if part._tied_weights_keys:
                own = part.get_expanded_tied_weights_keys() or part._tied_weights_keys
                part._tied_weights_keys = renamed(own, prefix)
            part.all_tied_weights_keys = renamed(part.all_tied_weights_keys, prefix)


def tie_weights_again(model: nn.Module) -> None:
    """Undoes [`tie_other_names`] for a model that is dense again, and ties its weights: `_tied_weights_keys` of its
    class, and `tie_weights`, which finds anew what is tied.

    If it does not, a model that was dequantised saves its head and its embedding, and trains them apart.
    """
    from transformers import PreTrainedModel

    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.__dict__.pop("_tied_weights_keys", None)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    model.tie_weights(recompute_mapping=False)


def renaming_of(model: Any) -> Callable[[str], str]:
    """What transformers calls a key of a checkpoint when it loads it into `model`: checkpoints keep the names that a
    class had when they were made (GPT-NeoX's head is stored as `embed_out`). From `get_model_conversion_mapping`, the
    `WeightRenaming`s with their `rename_source_key`.

    If they work otherwise, matrices of models of several classes are not found in their checkpoints.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    steps = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]

    def rename(key: str) -> str:
        for step in steps:
            key, _ = step.rename_source_key(key)
        return key

    return rename


def sources_of(model: Any, keys: Iterable[str]) -> dict[str, tuple[Any, dict[str, list[str]]]]:
    """From which tensors of a checkpoint the loader makes each parameter of a model.

    Touches `get_model_conversion_mapping` with its `WeightRenaming`s and `WeightConverter`s, `rename_source_key` and
    `dot_natural_key`. If they work otherwise, experts are not found in their checkpoints.

    Args:
        model: The model as its class makes it.
        keys: Of the checkpoint.

    Returns:
        Name of a parameter to the converter that makes it (None: it is as stored), and the keys that this takes, in
        order, by the converter's pattern that they match.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    by_pattern = {pattern: step for step in converters for pattern in step.source_patterns}
    state = model.state_dict()
    found: dict[str, tuple[Any, dict[str, list[str]]]] = {}
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:
            name, pattern = key, None
        if name in state:
            entry = found.setdefault(name, (None if pattern is None else by_pattern[pattern], {}))
            entry[1].setdefault(pattern or key, []).append(key)
    return found


def convert(
    converter: Any, name: str, parts: Mapping[str, Sequence[torch.Tensor]], shape: Sequence[int], config: Any
) -> torch.Tensor:
    """What a converter of [`sources_of`] makes of tensors by pattern: `WeightConverter.convert`, which asks the model
    for the shape that the parameter `name` shall have.

    If it works otherwise, experts are not read from their checkpoints.
    """
    import torch

    converter = copy.deepcopy(converter)
    for pattern, tensors in parts.items():
        for tensor in tensors:
            converter.add_tensor(name, name, pattern, tensor)
    model = SimpleNamespace(get_parameter=lambda name: torch.empty(tuple(shape), device="meta"))
    made = converter.convert(name, model=model, config=config)
    if set(made) != {name}:
        raise ValueError(f"{name} is not all that is made of its tensors, but {', '.join(sorted(made))}")
    value = made[name]
    return value[0] if isinstance(value, list) else value


def quantizer_of(model: nn.Module) -> Any:
    """The quantizer that loaded a model: `model.hf_quantizer`; None if none did.

    If it is kept elsewhere, adapters of an offloaded model are offloaded too when they are loaded.
    """
    return getattr(model, "hf_quantizer", None)


def forget_adapters(model: nn.Module) -> None:
    """Undoes what `model.add_adapter` notes before the adapter exists: `model._hf_peft_config_loaded`.

    If it is noted elsewhere, a model whose first adapter was refused takes no other.
    """
    attributes: MutableMapping[str, Any] = model.__dict__
    attributes.pop("_hf_peft_config_loaded", None)


def keep_columns(trainer: Any, names: tuple[str, ...]) -> None:
    """Makes a `Trainer` hand on columns of a data set that the model does not take: `trainer._signature_columns`, once
    `_set_signature_columns_if_needed` has filled it.

    If the list is kept elsewhere, a cached teacher never reaches the loss.
    """
    trainer._signature_columns += [name for name in names if name not in trainer._signature_columns]


def tokens_are_counted(trainer: Any) -> None:
    """Makes a `Trainer` hand `compute_loss` the number of tokens of all batches of a step, and leave the division by
    it to that: `trainer.model_accepts_loss_kwargs`.

    If it is called otherwise, accumulated gradients are too large by the number of batches.
    """
    trainer.model_accepts_loss_kwargs = True
