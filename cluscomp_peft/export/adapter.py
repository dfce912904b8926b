"""A saved adapter as what it makes of the tensors of its base, one tensor at a time and without a model in memory.

    deltas, on codes        the codebook and scales that merging would store, from the checkpoint's own ([`merge`])
    deltas with codes       the same, from codes and codebooks that the file brings                     ([`weight`])
    deltas, on a weight     (W + ΔC[codes]) · (1 + δ), rounded once                                     ([`weight`])
    trained tokens          rows of an embedding                                                        ([`replaced`])
    everything else         whole tensors: biases, modules that were saved whole                        ([`replaced`])

Numbers are those that `merge_and_unload` stores, because the same functions make them.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping

import torch
from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import nn

from .. import ops
from ..clustered_weight import VALUES
from ..codes import ClusterSpec, combine_fingerprints
from ..deltas import Delta, in_absolute_units
from ..dense import weight_shape
from ..layout import expand
from ..linear import ClusteredLinear
from ..tuner.adapter_file import Entry, entries_of, find_file, layers_of, read_entries
from ..tuner.config import ClusCompConfig
from ..tuner.dense_layer import adapted_weight
from ..tuner.merging import refuse_non_finite
from ..tuner.saving import check_saved
from ..upstream.peft import FILE_PREFIX

__all__ = ["Adapter", "is_adapter", "read_config"]

_TOKENS = ".token_adapter.trainable_tokens_delta"
# Inside a layer: what stands for its weight, or says whose numbers they are.
_OF_LAYERS = ("codes", "code_digest", "cluscomp_code_digest", *(f"base_layer.{name}" for name in ("codes", *VALUES)))


def is_adapter(path: str) -> bool:
    """Whether a folder holds an adapter and no model."""
    found = [os.path.isfile(os.path.join(path, name)) for name in ("adapter_config.json", "config.json")]
    return found == [True, False]


def read_config(path: str) -> ClusCompConfig:
    """The config of a saved adapter; folder or hub id.

    Raises:
        ValueError: If there is none, or it is of another method.
    """
    kind = PeftConfig.from_pretrained(path).peft_type
    name = getattr(kind, "value", kind)
    if name != "CLUSCOMP":
        raise ValueError(
            f"{path} is an adapter of the method {name}, and export merges those of ClusComp alone. Merge it with "
            "PEFT (merge_and_unload, then save_pretrained), and export that folder."
        )
    config = ClusCompConfig.from_pretrained(path)
    if not config.is_saved:
        raise ValueError(f"{path} names no codes in its adapter_config.json: the adapter was never saved by PEFT.")
    return config


class Adapter:
    """A saved adapter, held against the model that it is for.

    Args:
        config ([`ClusCompConfig`]): Read by [`read_config`].
        model (`nn.Module`): The dense model without weights.
        specs: How the base stores each layer that is clustered there; empty for a dense base.

    Attributes:
        layers: Names of the layers that it changes. brings_codes: Its base is the dense model.

    Raises:
        ValueError: If the file is damaged, or belongs to another model.
    """

    def __init__(self, config: ClusCompConfig, model: nn.Module, specs: Mapping[str, ClusterSpec]) -> None:
        self.config, self.brings_codes = config, config.carries_codes
        assert config.source is not None
        path = find_file(config.source, (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME))
        if path is None:
            raise ValueError(f"{config.source.place} has no {SAFETENSORS_WEIGHTS_NAME}; copy the adapter again.")
        self.path = path
        self._entries = read_entries(path)
        modules = dict(model.named_modules())
        named = set(layers_of(self._entries))
        absent = sorted(named - modules.keys())
        self.layers = [name for name in modules if name in named]  # digests are combined in the order of the model
        if absent or not self.layers:
            what = f"numbers for {absent[0]}, which {type(model).__name__} does not have" if absent else "no numbers"
            raise ValueError(f"{path} has {what}: the adapter was made for another model.")
        layers = {name: _as_stored(modules[name], specs.get(name)) for name in self.layers}
        self._specs = expand(config.layout, layers, getattr(model, "base_model_prefix", ""))
        check_saved(config, layers, self._specs)
        self._parts = {name: entries_of(self._entries, name) for name in self.layers}
        self._rest = self._outside_of_layers()

    def state(self) -> list[tuple[str, int, int]]:
        """Name, size and time of change of its file: another state is another adapter."""
        status = os.stat(self.path)
        return [(os.path.basename(self.path), status.st_size, status.st_mtime_ns)]

    def merge(self, name: str, layer: ClusteredLinear) -> None:
        """Merges it into a clustered layer of the checkpoint, in place.

        Raises:
            ValueError: If the codes are not those that it was trained on, or the result is not finite.
        """
        digest = self._parts[name].get("cluscomp_code_digest")
        saved = None if digest is None else digest.read()
        if saved is not None and bool(saved.any()):
            known, found = bytes(saved.tolist()).hex(), layer.fingerprint()
            if known != found:
                raise ValueError(
                    f"this adapter belongs to another base: the codes of {name} have fingerprint {found}, it was made "
                    f"for {known}. Give the checkpoint that it was trained on ({self.config.base_model_name_or_path})."
                )
        layer.merge([self._delta(name, layer.codebook.shape[1])])
        refuse_non_finite([getattr(layer, key) for key in VALUES], [self.path])

    def weight(self, name: str, dense: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What becomes of a dense weight [out, in] that it was made on, in `dtype`."""
        parts, spec = self._parts[name], self._specs[name]
        if self.config.base == "dense":
            weight = dense.to(dtype)
            merged = adapted_weight(weight, parts["codes"].read(), [self._delta(name, spec.num_clusters)])
            result = ops.decode(merged, dtype)
            refuse_non_finite([result], [self.path])
            return result
        base = {key: parts[f"base_layer.{key}"].read() for key in ("codes", *VALUES) if f"base_layer.{key}" in parts}
        layer = ClusteredLinear.from_parts(
            base["codes"], base["codebook"], base.get("scale_in"), base.get("scale_out"), None, dense.shape[0]
        )
        self.merge(name, layer)
        return layer.decode(dtype)

    def replaced(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the model that is not the weight of an adapted layer, by its name in the model."""
        rows = self._rest.get(name.removesuffix(".weight") + _TOKENS)
        whole = self._rest.get(name)
        if whole is not None:
            if whole.shape != tuple(tensor.shape):
                raise ValueError(
                    f"{self.path} holds {name} as {list(whole.shape)}, but the model has {list(tensor.shape)}: tokens "
                    "were added. Merge it with PEFT (merge_and_unload, then save_pretrained), and export that folder."
                )
            return whole.read().to(tensor.dtype)
        if rows is not None:
            indices = torch.tensor(self._tokens(name.removesuffix(".weight")))
            return tensor.index_copy(0, indices, rows.read().to(tensor.dtype))
        return tensor

    def refuse_rest(self, known: Collection[str]) -> None:
        """Raises a ValueError if the file holds a tensor of the model that is not among those, `known`, that the
        checkpoint holds."""
        names = {key: key.removesuffix(_TOKENS) + ".weight" if key.endswith(_TOKENS) else key for key in self._rest}
        lost = [key for key, name in names.items() if name not in known]
        if lost:
            raise ValueError(
                f"{self.path} holds {lost[0]}, for which the checkpoint has no tensor of its own (it is tied to "
                "another one, or new). Merge the adapter with PEFT (merge_and_unload, then save_pretrained), and "
                "export that folder."
            )

    def check_codebooks(self, codebooks: Mapping[str, str]) -> bool:
        """Whether the codebooks and scales by layer, as digests, are those that it was trained on."""
        found = combine_fingerprints(codebooks[name] for name in self.layers)
        return self.config.codebook_fingerprint in (None, found)

    def _delta(self, name: str, num_clusters: int) -> Delta:
        parts = self._parts[name]
        values = {key: parts.get(f"cluscomp_delta.{key}") for key in VALUES}
        codebook, scale_in, scale_out = (None if entry is None else entry.read() for entry in values.values())
        assert codebook is not None
        units = parts["cluscomp_units.values"].read() if "cluscomp_units.values" in parts else torch.ones(2)
        return in_absolute_units(ops.Numbers(codebook, scale_in, scale_out, units.float()), num_clusters)

    def _outside_of_layers(self) -> dict[str, Entry]:
        """What is left of the file, by the name of a tensor of the model."""
        found = {}
        for key, entry in self._entries.items():
            bare = key.removeprefix(FILE_PREFIX)
            owner = next((name for name in self.layers if bare.startswith(f"{name}.")), None)
            leaf = None if owner is None else bare.removeprefix(f"{owner}.")
            if leaf is None or (
                not leaf.startswith(("cluscomp_delta.", "cluscomp_units.")) and leaf not in _OF_LAYERS
            ):
                found[bare.replace(".base_layer.", ".")] = entry
        return found

    def _tokens(self, embedding: str) -> list[int]:
        indices = self.config.trainable_token_indices
        if isinstance(indices, dict):
            indices = next((rows for name, rows in indices.items() if f".{embedding}".endswith(f".{name}")), None)
        if indices is None:
            raise ValueError(
                f"{self.path} trains tokens of {embedding}, which its config does not name; copy it again."
            )
        return indices


def _as_stored(layer: nn.Module, spec: ClusterSpec | None) -> nn.Module:
    """A dense layer as its checkpoint stores it, without numbers."""
    if spec is None:
        return layer
    out_features, in_features = weight_shape(layer)
    return ClusteredLinear(in_features, out_features, spec, device="meta")
