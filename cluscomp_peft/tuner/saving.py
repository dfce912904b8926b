"""What an adapter file holds, and what is checked before one is loaded.

    on a compressed base     deltas, in absolute numbers
    on a dense base          deltas and codes
    dense-born               deltas, codes, codebooks and scales: the base itself is part of the adapter

The config that PEFT writes beside the file says how the codes are stored (`layout`) and which codes they are
(`fingerprint`). Both are read off the model when it is saved.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import nn

from ..codes import ClusterSpec, combine_fingerprints
from ..dense import is_dense_linear
from ..layout import summarize
from ..linear import ClusteredLinear
from ..offloading import stored
from ..placement import is_whole, shape_of
from ..upstream.peft import FILE_PREFIX, trains_tokens
from .adapter_file import check_file
from .config import ClusCompConfig, SavedFacts
from .layer import ClusCompLayer
from .loading import adapted_layers, digest_bytes, units_key

__all__ = ["check_saved", "code_digests", "complete_tensors", "read_facts"]


def complete_tensors(
    model: nn.Module,
    config: ClusCompConfig,
    adapter_name: str,
    tensors: dict[str, torch.Tensor],
    state_dict: dict[str, torch.Tensor],
    digests: Mapping[str, str | None],
) -> dict[str, torch.Tensor]:
    """Makes PEFT's selection of an adapter's tensors what the file shall hold.

    Args:
        model: With the adapter; a `PeftModel` or the bare model.
        config: Of the adapter.
        adapter_name: Which adapter.
        tensors: Model key to tensor, in units; changed in place.
        state_dict: Of the model, gathered if it is spread over processes.
        digests: What [`code_digests`] found.

    Returns:
        `tensors`, deltas absolute, with codes and codebooks where the base was dense.

    Raises:
        ValueError: If the config has been changed to one that does not describe the adapter.
        RuntimeError: If a tensor is spread over processes and was not gathered.
    """
    _check_settings(model, config, adapter_name)
    for name, layer in adapted_layers(model, adapter_name):
        digest = digests[name]
        if digest is not None:
            layer.check_arrival([adapter_name])
            tensors[f"{name}.cluscomp_code_digest.{adapter_name}"] = digest_bytes(digest)
        prefix = f"{name}.cluscomp_delta.{adapter_name}."
        if prefix + "codebook" not in tensors:  # a process that does not write
            continue
        found = tensors.get(units_key(name, adapter_name))
        units = layer.units_of(adapter_name, None if found is None or found.is_meta else found)
        tensors[units_key(name, adapter_name)] = torch.ones(2)
        for key in [key for key in tensors if key.startswith(prefix)]:
            leaf = key.removeprefix(prefix)
            if tensors[key].is_meta:  # offloaded with the model
                tensors[key] = stored(layer.cluscomp_delta[adapter_name], leaf)
            tensors[key] = tensors[key] * units[leaf != "codebook"]
        for key, tensor in layer.carried().items():
            path = f"{name}.{key}"
            found = tensor.detach() if is_whole(tensor) else state_dict.get(path, layer.kept(key))
            if found is None:
                raise RuntimeError(
                    f"{path} is spread over processes and not in the state dict that was given; pass "
                    "save_pretrained(state_dict=...) what the engine gathers, as Trainer does."
                )
            tensors[path] = found
    return tensors


def code_digests(model: nn.Module, adapter_name: str) -> dict[str, str | None]:
    """The digest of the codes of each layer that has the adapter, by name; reading all codes takes its time."""
    return {name: layer.fingerprint() for name, layer in adapted_layers(model, adapter_name)}


def read_facts(model: nn.Module, adapter_name: str, digests: Mapping[str, str | None]) -> SavedFacts:
    """Reads off a model what `adapter_config.json` says of the base of one of its adapters.

    Digests of what is spread over processes and never was whole in this one are those that a saved adapter came with.

    Args:
        model: With the adapter; a `PeftModel` or the bare model.
        adapter_name: Which adapter.
        digests: What [`code_digests`] found.
    """
    layers = dict(adapted_layers(model, adapter_name))
    specs = {name.removeprefix(FILE_PREFIX): layer.base_spec() for name, layer in layers.items()}
    came_with = next(
        (layer.loading[adapter_name].saved for layer in layers.values() if adapter_name in layer.loading), None
    )
    codes = combine_fingerprints(digests.values())
    codebooks = combine_fingerprints(layer.codebook_fingerprint() for layer in layers.values())
    if came_with is not None:
        codes = came_with.fingerprint if codes is None else codes
        codebooks = came_with.codebook_fingerprint if codebooks is None else codebooks
    return SavedFacts(
        layout=summarize(specs, [name.removeprefix(FILE_PREFIX) for name, _ in model.named_modules()]),
        fingerprint=codes,
        codebook_fingerprint=codebooks,
        carries_codes=any(layer.dense_born for layer in layers.values()),
    )


def check_saved(config: ClusCompConfig, layers: Mapping[str, nn.Module], specs: Mapping[str, ClusterSpec]) -> None:
    """Holds a saved adapter against the model it is about to be loaded into; nothing is changed.

    Args:
        config: Read from the adapter.
        layers: Name to layer, of every layer it will adapt.
        specs: What the config's layout says of them.

    Raises:
        ValueError: If the adapter belongs to another kind of base or to other codes, or its file is damaged.
    """
    for name, layer in layers.items():
        dense = layer.dense_born if isinstance(layer, ClusCompLayer) else is_dense_linear(layer)
        if config.carries_codes and not dense:
            raise ValueError(
                "this adapter was made on a dense model and carries its own codes, but the model is compressed; "
                "load it on the dense model (merge_and_unload() and compress then, if that is what you want)."
            )
        if not config.carries_codes and dense:
            raise ValueError(
                f"this adapter belongs to a compressed model (fingerprint {config.fingerprint}), but {name} is a "
                "dense layer; load the adapter on the compressed checkpoint that it was trained on."
            )
    fixed = [layer for layer in layers.values() if isinstance(layer, (ClusCompLayer, ClusteredLinear))]
    found = combine_fingerprints(layer.fingerprint() for layer in fixed)
    if len(fixed) == len(layers) and found is not None:
        if found != config.fingerprint:
            raise ValueError(
                f"this adapter belongs to another base: its codes have fingerprint {config.fingerprint}, those of "
                f"this model {found}. Load the base that it was trained on ({config.base_model_name_or_path})."
            )
        codebooks = combine_fingerprints(layer.codebook_fingerprint() for layer in fixed)
        if config.codebook_fingerprint not in (None, codebooks) and config.carries_codes:
            raise ValueError(
                "this adapter carries other codebooks than the adapters that are loaded already; load it on a copy of "
                "the dense model of its own."
            )
        if config.codebook_fingerprint not in (None, codebooks):
            warnings.warn(
                f"the model has the codes of the adapter's base but other codebooks (fingerprint {codebooks}, not "
                f"{config.codebook_fingerprint}): it was merged with an adapter, or cast. The deltas are added to "
                "what is there, so if this adapter is what it was merged with, its training counts twice: use the "
                f"model without the adapter then, or load the base ({config.base_model_name_or_path}).",
                stacklevel=2,
            )
    absent = sorted(layers.keys() - specs.keys()) if config.carries_codes else []
    if absent:
        raise ValueError(
            f"the adapter's config says nothing about the layout of {absent[0]} and {len(absent) - 1} more layers; it "
            "was made for another model, or its adapter_config.json is damaged."
        )
    known = dict(specs)
    for name, layer in layers.items():
        own: ClusterSpec | None = (
            layer.base_spec() if isinstance(layer, ClusCompLayer) else getattr(layer, "spec", None)
        )
        if own is None:
            continue
        spec = known.setdefault(name, own)
        if (own.group_size, own.num_clusters) != (spec.group_size, spec.num_clusters):
            raise ValueError(
                f"this adapter was made for {name} in groups of {spec.group_size} with {spec.num_clusters} clusters, "
                f"but the model has groups of {own.group_size} with {own.num_clusters}; load the base that it was "
                f"trained on ({config.base_model_name_or_path})."
            )
    check_file(config, layers, known)


def _check_settings(model: nn.Module, config: ClusCompConfig, adapter_name: str) -> None:
    """Raises a ValueError if a config is no longer the one that an adapter was made from, and would not load it."""
    config.check()
    for name, layer in adapted_layers(model, adapter_name):
        spec, delta = layer.base_spec(), layer.cluscomp_delta[adapter_name]
        rows = config.blocks_of(spec, layer.in_features, layer.out_features) * spec.num_clusters
        scales = (delta.scale_in is not None, delta.scale_out is not None)
        if shape_of(delta.codebook)[0] != rows or config.scales_of(spec) != scales:
            raise ValueError(
                f"the config of adapter {adapter_name!r} was changed after the adapter was made: rank={config.rank}, "
                f"num_blocks={config.num_blocks}, train_scales={config.train_scales} are not those of {name}. Set "
                "them back before saving."
            )
    wrapped = any(map(trains_tokens, model.modules()))
    if config.trainable_token_indices and not wrapped:
        raise ValueError(
            f"trainable_token_indices={config.trainable_token_indices!r} were set after adapter {adapter_name!r} was "
            "made, so no token was trained. Set them before get_peft_model, or to None before saving."
        )
