"""What can be known before a layer is touched: whether a config fits the layers, and how each would be clustered."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..clustered_weight import ClusteredWeight
from ..codes import ClusterSpec
from ..compress.budget.called import computed_with, handed_to_kernels
from ..compress.matrix.cluster import check_finite, check_range
from ..dense import is_dense_linear, weight_of, weight_shape
from ..linear import ClusteredLinear
from ..placement import is_whole
from ..upstream.accelerate import offload_hook
from ..upstream.peft import is_saved_whole
from .clustered_layer import ClusCompLinear
from .config import ClusCompConfig
from .dense_layer import ClusCompDenseLinear
from .layer import ClusCompLayer

__all__ = ["check_layers", "check_task", "check_weight", "spec_of"]

# Tasks whose labels are no tokens, and the class of transformers that has a head for them.
_HEADS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


def check_task(model: nn.Module, config: ClusCompConfig) -> None:
    """Raises a ValueError if the model has no head for the task of a config, which its loss would only say later."""
    task, kind = str(getattr(config.task_type, "value", config.task_type)), type(model).__name__
    find_head = getattr(model, "get_output_embeddings", lambda: None)
    if task in _HEADS and find_head() is not None:
        raise ValueError(
            f"task_type={task!r} is for models with a head for it, but {kind} predicts tokens; load the model by "
            f'{_HEADS[task]}, or give task_type="CAUSAL_LM".'
        )
    if task in ("CAUSAL_LM", "SEQ_2_SEQ_LM") and not hasattr(model, "prepare_inputs_for_generation"):
        raise ValueError(
            f"task_type={task!r} is for models that predict tokens, but {kind} does not; give the task that it has a "
            f"head for ({', '.join(_HEADS)}, FEATURE_EXTRACTION), or leave task_type out."
        )


_DENSE_EMBEDDINGS = "compress the model without --embeddings, or call model.dequantize() for a dense one."


def check_layers(
    model: nn.Module,
    config: ClusCompConfig,
    layers: Mapping[str, nn.Module],
    *,
    is_new: bool = True,
    is_sum: bool = False,
) -> None:
    """Holds a config against the layers that it is about to be applied to; nothing is changed.

    Args:
        model: The whole model.
        config: Of the adapter.
        layers: Name to layer, of those that it names.
        is_new: Whether numbers and, of dense layers, codes are made now; those of a saved adapter are to be loaded.
        is_sum: Whether it is to hold a sum of adapters, which has a codebook for each channel at most.

    Raises:
        ValueError: If a layer is of the wrong kind, has unusable weights, or does not fit the settings.
    """
    capped = []
    dense = [name for name, module in layers.items() if is_dense_linear(module)]
    clustered = [name for name, module in layers.items() if isinstance(module, ClusteredLinear)]
    if dense and clustered:
        raise ValueError(
            f"target_modules names dense layers ({dense[0]}) beside clustered ones ({clustered[0]}); an adapter "
            "is on one kind of base. Train a dense layer of a compressed model whole, through modules_to_save."
        )
    _refuse_not_called(model, layers, is_new)
    for name, module in model.named_modules():
        if isinstance(module, ClusteredWeight) and is_saved_whole(config, name):
            cure = _DENSE_EMBEDDINGS if _is_vocabulary(module) else "leave it to target_modules."
            raise ValueError(
                f"modules_to_save names {name}, which is clustered and has no weight to train whole; {cure}"
            )
        if isinstance(module, ClusteredWeight) and _is_vocabulary(module) and config.trainable_token_indices:
            raise ValueError(
                f"trainable_token_indices={config.trainable_token_indices!r} trains rows of {name}, which is "
                f"clustered and has none; {_DENSE_EMBEDDINGS}"
            )
        # What hooks bring and take away again would be trained in a copy that is thrown away.
        away = offload_hook(module) is not None
        own_bias = config.bias == "all" or (config.bias == "cluscomp_only" and name in layers)
        if away and (is_saved_whole(config, name) or (own_bias and getattr(module, "bias", None) is not None)):
            raise ValueError(
                f"{name} is offloaded, so that it cannot be trained whole; keep it in memory in device_map, or leave "
                f"it out of modules_to_save={config.modules_to_save} and bias={config.bias!r}."
            )
        if away and config.trainable_token_indices and isinstance(module, nn.Embedding):
            raise ValueError(
                f"{name} is offloaded, so that tokens of it cannot be trained; keep it in memory in device_map, or "
                f"leave out trainable_token_indices={config.trainable_token_indices!r}."
            )
    for name, module in layers.items():
        if isinstance(module, ClusCompLayer):
            if isinstance(module, ClusCompDenseLinear) != (config.base == "dense"):
                raise ValueError(
                    f"all adapters of a model share one kind of base: {name} is adapted on another one than "
                    f"base={config.base!r}."
                )
            if config.clusters and module.dense_born and is_new:
                _check_same_codes(name, module, config)
        elif isinstance(module, ClusteredWeight) and _is_vocabulary(module):
            raise ValueError(
                f"target_modules names {name}, a clustered embedding or a head that shares its codes, which take no "
                "adapter; leave it out of target_modules."
            )
        elif isinstance(module, ClusteredLinear):
            if config.base == "dense":
                raise ValueError(
                    f"base='dense' needs dense weights, but {name} is clustered; leave base at 'clustered', or "
                    "call model.dequantize() first."
                )
        elif is_dense_linear(module):
            if offload_hook(module) is not None:
                raise ValueError(
                    f"{name} is dense and offloaded; its weight must be in memory to be clustered. Compress the model "
                    "with `cluscomp compress` and load the result with the same device_map."
                )
            weight = weight_of(module)
            if isinstance(weight, DTensor):
                raise ValueError(
                    f"{name} is dense and spread over processes by FSDP2; its weight must be whole to be clustered. "
                    "Make the adapter before the model is sharded, as Trainer does."
                )
            if is_new:
                if is_whole(weight):
                    check_weight(name, module, config)
                spec = spec_of(name, module, config)
                if config.num_clusters is not None and spec.num_clusters < config.num_clusters:
                    capped.append(name)
        else:
            raise ValueError(
                f"Target module {module} is not supported. ClusComp adapts `torch.nn.Linear`, "
                f"`transformers.pytorch_utils.Conv1D` and clustered layers; {name} is a {type(module).__name__}."
            )
        in_features = weight_shape(module)[1] if is_dense_linear(module) else module.in_features
        if is_new and not is_sum and config.num_blocks is not None and config.num_blocks > in_features:
            raise ValueError(
                f"num_blocks={config.num_blocks} is more than the {in_features} input channels of {name}; a block "
                "needs at least one."
            )
    if clustered and config.clusters:
        warnings.warn("bits, group_size and num_clusters are ignored: the model is compressed already.", stacklevel=2)
    if capped:
        warnings.warn(
            f"num_clusters={config.num_clusters} is more than the groups of {capped[0]} and {len(capped) - 1} "
            "more layers; they are clustered without loss and take more bits than dense. For a small model give "
            "bits.",
            stacklevel=2,
        )


def _is_vocabulary(layer: ClusteredWeight) -> bool:
    """Whether it is an embedding, or a head that has no codes of its own."""
    return layer.is_tied or not isinstance(layer, ClusteredLinear)


def check_weight(name: str, module: nn.Module, config: ClusCompConfig) -> None:
    """Holds the numbers of a dense layer, which must be whole, against what codebooks can hold.

    Raises:
        ValueError: If there are NaN or infinite values, or values that the codebook's dtype cannot hold.
    """
    check_finite(weight_of(module), name)
    if config.base == "clustered":
        check_range(weight_of(module), config.policy.codebook_dtype_for(weight_of(module)), name)


def spec_of(name: str, dense: nn.Module, config: ClusCompConfig) -> ClusterSpec:
    """How a dense layer is clustered for an adapter; on a dense base only the codes are kept."""
    spec = config.policy.spec_for(name, *weight_shape(dense), config.policy.codebook_dtype_for(weight_of(dense)))
    return spec if config.base == "clustered" else ClusterSpec(spec.group_size, spec.num_clusters)


def _refuse_not_called(model: nn.Module, layers: Mapping[str, nn.Module], is_new: bool) -> None:
    """Raises a ValueError for layers that the model computes with by itself; a saved adapter may have some that only
    a kernel takes in training."""
    reasons = computed_with(model)
    if is_new:
        reasons = {**reasons, **handed_to_kernels(model)}
    named = [name for name in layers if name in reasons]
    if named:
        raise ValueError(
            f"target_modules names {named[0]}{f' and {len(named) - 1} more' if named[1:] else ''}, where an adapter "
            f"has no effect: {reasons[named[0]]}. Leave the layer out of target_modules, or name it in "
            "exclude_modules."
        )


def _check_same_codes(name: str, layer: ClusCompLayer, config: ClusCompConfig) -> None:
    spec = layer.base_spec()
    dtype = layer.base_layer.codebook.dtype if isinstance(layer, ClusCompLinear) else torch.float32
    wanted = config.policy.spec_for(name, layer.out_features, layer.in_features, dtype)
    if (wanted.group_size, wanted.num_clusters) != (spec.group_size, spec.num_clusters):
        raise ValueError(
            f"adapters share the codes of their base: {name} is clustered with group_size={spec.group_size}, "
            f"num_clusters={spec.num_clusters}, not with {wanted.group_size} and {wanted.num_clusters}. Leave the "
            "settings out, or use a second copy of the dense model."
        )
