"""What an adapter goes through from the config of a saved one until its layers are like those of any other.

    config with a fingerprint        its facts and the file beside it are held against the model; nothing is changed
        │                            (saving.py, adapter_file.py)
        ▼
    awaited, in absolute units       layers are empty: numbers NaN, units 1, as in the file; each has a [`Loading`]
        │
        ├─ PEFT's load_adapter       its hook, [`prepare_tensors`], checks the tensors and brings them to units: done
        │
        └─ any other loader          transformers' load_adapter, load_state_dict, accelerate, DCP, by hand: nobody
           │                         calls this package. The first pass, merge or save looks whether they are there
           ▼
        absolute units               computes the same; `train()` brings them to the units that suit an optimiser

All of it is kept in the layers, because tuner and config do not last: transformers throws the tuner away, and one
config may serve several adapters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .. import ops
from ..clustered_weight import BASE_TENSORS
from ..codes import ClusterSpec, num_groups
from ..offloading import stored
from ..placement import is_whole, shape_of
from ..upstream.peft import FILE_PREFIX
from .arrival import Arrival
from .config import ClusCompConfig
from .merging import MergingLayer
from .units import root_mean_square

__all__ = ["Loading", "LoadingLayer", "adapted_layers", "digest_bytes", "prepare_tensors", "units_key"]


@dataclass
class Loading:
    """How far one adapter of one layer is.

    saved: Its config as it was read. awaited: Its numbers have not been seen yet. absolute: They are in units of 1.
    arrival: What the config promises of all layers together.
    """

    saved: ClusCompConfig
    awaited: bool = True
    absolute: bool = True
    arrival: Arrival | None = None


class LoadingLayer(MergingLayer):
    """What a tuner layer does about adapters whose numbers come from a file."""

    in_features: int
    out_features: int
    dense_born: bool
    layer_name: str
    cluscomp_units: nn.ModuleDict
    cluscomp_code_digest: nn.ParameterDict
    # By adapter. PEFT's hook and deleting the adapter remove the entry; other loaders leave it, done.
    loading: dict[str, Loading]

    # -- of the base, by its kind

    def base_spec(self) -> ClusterSpec:
        """How the codes of this layer's base are stored."""
        raise NotImplementedError

    def fingerprint(self) -> str | None:
        """Digest of the codes of this layer's base; None if they are elsewhere and were never here."""
        raise NotImplementedError

    def codebook_fingerprint(self) -> str | None:
        """Digest of the base's codebook and scales; None if they are elsewhere and were never here."""
        raise NotImplementedError

    def base_rms(self) -> float:
        """Root mean square of the codebook, or on a dense base of the weight: units are relative to it."""
        raise NotImplementedError

    def carried(self) -> dict[str, torch.Tensor]:
        """The tensors of this layer's base that an adapter file holds, by their key inside the layer. Empty on a
        compressed model, whose checkpoint has them."""
        raise NotImplementedError

    # -- of an adapter's units

    def units_of(self, adapter_name: str, values: torch.Tensor | None = None) -> tuple[float, float]:
        """What one unit of an adapter's codebook stands for, and of its scales."""
        raise NotImplementedError

    def training_units(self, adapter_name: str, rms: float) -> tuple[float, float]:
        """The units that suit an optimiser on a base of this root mean square."""
        raise NotImplementedError

    def set_units(self, adapter_name: str, units: tuple[float, float]) -> None:
        """Changes the units and leaves the numbers."""
        raise NotImplementedError

    # -- loading

    def expect(self, adapter_name: str, saved: ClusCompConfig) -> None:
        """Leaves a new adapter without numbers: NaN, so that it cannot pass for one that was loaded."""
        for parameter in self.cluscomp_delta[adapter_name].parameters():
            parameter.data.fill_(math.nan)
        self.loading[adapter_name] = Loading(saved)

    def awaits_any(self) -> bool:
        """Whether the numbers of any adapter have not been seen yet."""
        return any(loading.awaited for loading in self.loading.values())

    def awaits(self, adapter_name: str) -> bool:
        """Whether the adapter's numbers have not been seen yet."""
        return adapter_name in self.loading and self.loading[adapter_name].awaited

    def check_arrival(self, adapter_names: Sequence[str]) -> None:
        """Looks whether numbers that were awaited are there, and are those of this base; costs nothing afterwards.

        Raises:
            RuntimeError: If they are absent, or the first pass is a compiled one.
            ValueError: If they belong to other codes, their codes name centroids that there are not, or they are not
                finite.
        """
        if not self.loading:
            return
        awaited = [name for name in adapter_names if self.awaits(name)]
        if not awaited:
            return
        if torch.compiler.is_compiling():
            raise RuntimeError("run one forward pass before torch.compile: a loaded adapter is checked in the first.")
        for name in awaited:
            self._refuse_absent(name)
            arrival = self.loading[name].arrival
            if arrival is not None:
                arrival.check()
            self.check_digest(name, self.cluscomp_code_digest[name])
            for key, tensor in self.carried().items():
                if key.endswith("codes") and is_whole(tensor):
                    self.refuse_stray_codes(tensor)
            self._freeze(name)
            self.loading[name].awaited = False

    def bring_to_units(self, adapter_name: str) -> None:
        """Changes numbers in absolute units to those that suit an optimiser, in place; the layer computes the same."""
        self.check_arrival([adapter_name])
        if self.units_of(adapter_name) == (1.0, 1.0):  # else units came with the numbers
            units = self.training_units(adapter_name, self.base_rms())
            with torch.no_grad():
                for key, parameter in self.cluscomp_delta[adapter_name].named_parameters():
                    parameter.div_(units[key != "codebook"])
            self.set_units(adapter_name, units)
        self.loading[adapter_name].absolute = False

    def check_digest(self, adapter_name: str, saved: torch.Tensor) -> None:
        """Holds the digest that came with an adapter's numbers against the codes of this layer.

        Raises:
            ValueError: If they are not the same codes.
        """
        if not bool(saved.any()):  # a file that was not written by this package's hooks
            return
        found = bytes(saved.cpu().tolist()).hex()
        present = self.fingerprint()
        if present not in (None, found):
            raise ValueError(
                f"adapter {adapter_name!r} belongs to another base: it was made for codes with fingerprint {found}, "
                f"but a layer of this model has {present}. Load the base that the adapter was trained on."
            )

    def refuse_stray_codes(self, codes: torch.Tensor) -> None:
        """Raises a ValueError if codes [in, width] that came with an adapter name centroids that there are not."""
        spec = self.base_spec()
        if ops.has_stray_codes(codes, spec.num_clusters, num_groups(self.out_features, spec.group_size)):
            raise ValueError(
                f"the adapter brings codes of a {self.out_features} x {self.in_features} matrix that name centroids "
                f"beyond the {spec.num_clusters} of its codebook: its file is damaged, or was made to be. Copy or "
                "download the adapter again."
            )

    def _freeze(self, adapter_name: str) -> None:
        """transformers' loader makes whatever it sets trainable: codebooks of a dense-born base, and units."""
        for key in self.carried():
            self.get_parameter(key).requires_grad_(False)  # type: ignore[attr-defined]
        self.cluscomp_units[adapter_name].requires_grad_(False)

    def _refuse_absent(self, adapter_name: str) -> None:
        delta = self.cluscomp_delta[adapter_name]
        values = {f"cluscomp_delta.{key}": value for key, value in delta.named_parameters()}
        for key in self.base_layer._parameters:
            value = stored(self.base_layer, key)
            if value is not None and value.is_floating_point():
                values[f"base_layer.{key}"] = value
        units = stored(self.cluscomp_units[adapter_name], "values")
        if units is not None:
            values["cluscomp_units.values"] = units
        for key, value in values.items():
            if value.device.type == "meta" or (value is not units and bool(value.isnan().all())):
                raise RuntimeError(
                    f"adapter {adapter_name!r} was made from the config of a saved adapter, but its weights were not "
                    "loaded. Load it with PeftModel.from_pretrained or model.load_adapter; to start a new adapter "
                    "with the same settings, use dataclasses.replace(config, fingerprint=None)."
                )
            if not bool(value.isfinite().all()):
                raise ValueError(
                    f"adapter {adapter_name!r} came with NaN or infinite numbers in {self.layer_name}.{key}: it is "
                    "damaged, or its training diverged. Copy or download it again, or take an earlier checkpoint."
                )

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        for name in self.cluscomp_delta:
            deltas, units = f"{prefix}cluscomp_delta.{name}.codebook", f"{prefix}cluscomp_units.{name}.values"
            if deltas in state_dict and units not in state_dict:
                args[-1].append(  # torch raises what it finds in the last argument
                    f"{deltas} comes without {units}, which says what its numbers mean: the state dict was made by an "
                    "older cluscomp_peft, or is not complete. Load an adapter's own file with "
                    "PeftModel.from_pretrained or model.load_adapter."
                )
        super()._load_from_state_dict(state_dict, prefix, *args)


def prepare_tensors(model: nn.Module, adapter_name: str, tensors: dict[str, torch.Tensor]) -> None:
    """Makes a file's tensors, under the model's keys, what its parameters are about to hold; changed in place.

    Deltas are brought to units. The base tensors of a dense-born adapter are taken as they are by the first adapter of
    a model. A further one shares the codes that are there: its own must be equal, and are dropped.

    Raises:
        ValueError: If they are not equal, the adapter was made for other codes than the model has, codes name
            centroids that there are not, or its tensors are not those that the adapter here has.
    """
    layers = list(adapted_layers(model, adapter_name))
    for name, layer in layers:
        _check_deltas(f"{name}.cluscomp_delta.{adapter_name}.", layer.cluscomp_delta[adapter_name], tensors)
    for name, layer in layers:
        digest = tensors.get(f"{name}.cluscomp_code_digest.{adapter_name}")
        if digest is not None and not (layer.dense_born and layer.awaits(adapter_name)):
            layer.check_digest(adapter_name, digest)
        for key in ("base_layer.codes", "codes"):
            for codes in (tensors.get(f"{path}.{key}") for path in _spellings(name)):
                if codes is not None:
                    layer.refuse_stray_codes(codes)
    for name, layer in layers:
        _bring_deltas_to_units(name, layer, adapter_name, tensors)
        if len(layer.cluscomp_delta) > 1:
            _drop_base_tensors(name, layer, adapter_name, tensors)


def _bring_deltas_to_units(
    name: str, layer: LoadingLayer, adapter_name: str, tensors: dict[str, torch.Tensor]
) -> None:
    if layer.awaits(adapter_name):
        # The base of a dense-born adapter comes with these tensors; its codebook is not in the layer yet.
        paths = [f"{path}.base_layer.codebook" for path in _spellings(name)]
        codebooks = [tensors[path] for path in paths if path in tensors]
        rms = root_mean_square(codebooks[0]) if codebooks else layer.base_rms()
        units = layer.training_units(adapter_name, rms)
    else:
        units = layer.units_of(adapter_name)
    prefix = f"{name}.cluscomp_delta.{adapter_name}."
    keys = [key for key in tensors if key.startswith(prefix)]
    if not keys:
        return
    # A file says what its numbers mean; those of older versions are absolute.
    given = tensors.get(units_key(name, adapter_name), torch.ones(2)).tolist()
    tensors[units_key(name, adapter_name)] = torch.tensor(units)
    for key in keys:
        is_scale = key.removeprefix(prefix) != "codebook"
        tensors[key] = tensors[key] * (given[is_scale] / units[is_scale])
    layer.loading.pop(adapter_name, None)


def _drop_base_tensors(name: str, layer: LoadingLayer, adapter_name: str, tensors: dict[str, torch.Tensor]) -> None:
    """Takes base tensors out of a file that are in the layer already, shared with other adapters."""
    for key in BASE_TENSORS:
        present = layer.base_tensor(key)
        for saved in [tensors.pop(f"{path}.base_layer.{key}", None) for path in _spellings(name)]:
            if saved is not None and (present is None or not torch.equal(saved.to(present.device), present)):
                raise ValueError(
                    f"adapter {adapter_name!r} has another {key} of {name.removeprefix(FILE_PREFIX)} than the "
                    "adapters that are loaded already; load it on a copy of the dense model of its own."
                )


def _check_deltas(prefix: str, delta: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Holds the deltas of a file against those of a layer: torch would skip absent ones and copy those that fit."""
    found = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    if not found and dist.is_available() and dist.is_initialized():  # a process that gets its numbers from others
        return
    shapes = {key: tuple(shape_of(parameter)) for key, parameter in delta.named_parameters()}
    for key in [*shapes, *found]:
        given = tuple(found[key].shape) if key in found else None
        if given != shapes.get(key):
            raise ValueError(
                f"{prefix}{key} is {'absent' if given is None else list(given)} in what is being loaded, but "
                f"{'absent' if key not in shapes else list(shapes[key])} in the adapter: it belongs to another one, "
                "made with other settings, or is damaged. Copy or download it again."
            )


def adapted_layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, LoadingLayer]]:
    """The layers that have the adapter, by name."""
    for name, layer in model.named_modules():
        if isinstance(layer, LoadingLayer) and adapter_name in layer.cluscomp_delta:
            yield name, layer


def units_key(name: str, adapter_name: str) -> str:
    """The key of an adapter's units in the state dict of a model."""
    return f"{name}.cluscomp_units.{adapter_name}.values"


def digest_bytes(digest: str) -> torch.Tensor:
    """A digest of 32 hexadecimal digits as [16] uint8, the way files hold it."""
    return torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8)


def _spellings(name: str) -> tuple[str, str]:
    """What a layer may be called in a file: with the prefix of a `PeftModel` and without."""
    bare = name.removeprefix(FILE_PREFIX)
    return bare, FILE_PREFIX + bare
