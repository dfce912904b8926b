"""What an adapter file holds, and what is checked before one is loaded.

    on a compressed base     deltas, in absolute numbers
    on a dense base          deltas and codes
    dense-born               deltas, codes, codebooks and scales: the base itself is part of the adapter

The config that PEFT writes beside the file says how the codes are stored (`layout`) and which they are
(`fingerprint`). Both are read off the model at the moment of saving, so they cannot go stale.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn

from ..codes import ClusterSpec, combine_fingerprints
from ..layout import summarize
from ..linear import ClusteredLinear, is_dense_linear
from ..offloading import stored
from ..placement import is_whole
from .clustered_layer import BASE_TENSORS
from .config import ClusCompConfig
from .layer import ClusCompLayer, digest_bytes

__all__ = ["check_saved", "describe_and_complete", "settle_loaded"]

_FILE_PREFIX = "base_model.model."


def describe_and_complete(
    model: nn.Module,
    config: ClusCompConfig,
    adapter_name: str,
    tensors: dict[str, torch.Tensor],
    state_dict: dict[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Makes PEFT's selection of an adapter's tensors what the file shall hold, and writes the config's facts.

    Args:
        model: With the adapter; a `PeftModel` or the bare model.
        config: Of the adapter; told what to write beside the file.
        adapter_name: Which adapter.
        tensors: Model key to tensor, in units; changed in place.
        state_dict: Of the model, gathered if it is spread over processes.

    Returns:
        `tensors`, deltas absolute, with codes and codebooks where the base was dense.
    """
    specs: dict[str, ClusterSpec] = {}
    fingerprints, codebooks = [], []
    carries_codes = False
    for name, layer in _layers(model, adapter_name):
        carries_codes |= layer.dense_born
        specs[name.removeprefix(_FILE_PREFIX)] = layer.base_spec()
        digest = layer.fingerprint()
        fingerprints.append(digest)
        codebooks.append(layer.codebook_fingerprint())
        if digest is not None:
            layer.settle([adapter_name])
            tensors[f"{name}.code_digest.{adapter_name}"] = digest_bytes(digest)
        prefix = f"{name}.cluscomp_delta.{adapter_name}."
        for key in [key for key in tensors if key.startswith(prefix)]:
            leaf = key.removeprefix(prefix)
            if tensors[key].is_meta:  # offloaded with the model
                tensors[key] = stored(layer.cluscomp_delta[adapter_name], leaf)
            tensors[key] = tensors[key] * layer.unit_of(adapter_name, leaf)
        if prefix + "codebook" not in tensors:  # a process that does not write
            continue
        for key, tensor in layer.carried().items():
            path = f"{name}.{key}"
            found = tensor.detach() if is_whole(tensor) else state_dict.get(path, layer.kept(key))
            if found is None:
                raise RuntimeError(
                    f"{path} is spread over processes and not in the state dict that was given; pass "
                    "save_pretrained(state_dict=...) what the engine gathers, as Trainer does."
                )
            tensors[path] = found
    facts = {
        "carries_codes": carries_codes,
        "layout": summarize(specs, [name.removeprefix(_FILE_PREFIX) for name, _ in model.named_modules()]),
        "fingerprint": combine_fingerprints(fingerprints),
        "codebook_fingerprint": combine_fingerprints(codebooks),
    }
    config.describe({key: value for key, value in facts.items() if value is not None})
    return tensors


def settle_loaded(model: nn.Module, adapter_name: str, tensors: dict[str, torch.Tensor]) -> None:
    """Brings a file's tensors, under the model's keys, to units; changed in place.

    The base tensors of a dense-born adapter are taken as they are by the first adapter of a model. A further one
    shares the codes that are there: its own must be equal, and are dropped.

    Raises:
        ValueError: If they are not equal, the adapter was made for other codes than the model has, or codes name
            centroids that there are not.
    """
    for name, layer in _layers(model, adapter_name):
        digest = tensors.get(f"{name}.code_digest.{adapter_name}")
        if digest is not None and not (layer.dense_born and layer.awaits(adapter_name)):
            layer.check_fingerprint(adapter_name, digest)
        bare = name.removeprefix(_FILE_PREFIX)
        for key in ("base_layer.codes", "codes"):
            for spelling in (bare, _FILE_PREFIX + bare):
                if f"{spelling}.{key}" in tensors:
                    layer.refuse_stray_codes(tensors[f"{spelling}.{key}"])
    for name, layer in _layers(model, adapter_name):
        bare = name.removeprefix(_FILE_PREFIX)
        spellings = (f"{bare}.base_layer.", f"{_FILE_PREFIX}{bare}.base_layer.")
        if layer.awaits(adapter_name):
            # The base of a dense-born adapter comes with these tensors; its codebook is not in the layer yet.
            codebooks = [tensors[f"{spelling}codebook"] for spelling in spellings if f"{spelling}codebook" in tensors]
            layer.set_units(adapter_name, codebooks[0] if codebooks else None)
        prefix = f"{name}.cluscomp_delta.{adapter_name}."
        for key in [key for key in tensors if key.startswith(prefix)]:
            tensors[key] = tensors[key] / layer.unit_of(adapter_name, key.removeprefix(prefix))
            layer.loaded(adapter_name)
        if len(layer.cluscomp_delta) == 1:
            continue
        for key in BASE_TENSORS:
            present = layer.base_tensor(key)
            for saved in [tensors.pop(f"{spelling}{key}", None) for spelling in spellings]:
                if saved is not None and (present is None or not torch.equal(saved.to(present.device), present)):
                    raise ValueError(
                        f"adapter {adapter_name!r} has another {key} of {bare} than the adapters that are loaded "
                        "already; load it on a copy of the dense model of its own."
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
        if config.codebook_fingerprint not in (None, codebooks):
            warnings.warn(
                "the model has the codes of the adapter's base but other codebooks: one of the two was merged with an "
                "adapter, or cast. The deltas are added to what is there.",
                stacklevel=2,
            )
    absent = sorted(layers.keys() - specs.keys()) if config.carries_codes else []
    if absent:
        raise ValueError(
            f"the adapter's config says nothing about the layout of {absent[0]} and {len(absent) - 1} more layers; it "
            "was made for another model, or its adapter_config.json is damaged."
        )
    if config._source is not None:
        path = os.path.join(config._source, SAFETENSORS_WEIGHTS_NAME)
        if os.path.isfile(path):
            _check_file(path, config, list(layers))


def _layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, ClusCompLayer]]:
    for name, layer in model.named_modules():
        if isinstance(layer, ClusCompLayer) and adapter_name in layer.cluscomp_delta:
            yield name, layer


def _check_file(path: str, config: ClusCompConfig, names: list[str]) -> None:
    """Reads the header of a saved adapter: it must be whole and have tensors for every layer."""
    try:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or cut off ({error}); copy or download the adapter again.") from error
    wanted = ["cluscomp_delta.codebook"]
    if config.carries_codes:
        wanted += ["base_layer.codes", "base_layer.codebook"] if config.base == "clustered" else ["codes"]
    for name in names:
        for key in wanted:
            if not {f"{_FILE_PREFIX}{name}.{key}", f"{name}.{key}"} & keys:
                raise ValueError(
                    f"{path} has no {name}.{key}: it is incomplete or belongs to another model; copy or download the "
                    "adapter again."
                )
