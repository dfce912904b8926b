"""What the tuner layers share, which PEFT puts in the place of linear layers.

    ClusCompLinear        base_layer: ClusteredLinear      clustered_layer.py
    ClusCompDenseLinear   base_layer: nn.Linear, Conv1D    dense_layer.py

What an adapter of a layer trains is a small module under its name, `cluscomp_delta`, fp32, in units:

    codebook [m · n, g], scale_in [in], scale_out [out]       ΔC = codebook · unit,   δ = scale · unit

m codebooks of n centroids lie end to end, so that FSDP2, which deals out rows, gives every process as many.

The units are powers of two near RMS(codebook) · delta_scale, so one learning rate fits every layer, and multiplying by
them is exact. They are numbers of the model like the deltas, `cluscomp_units.NAME.values` [2], which mean nothing
without them: whoever copies a state dict copies both. Files hold absolute deltas and units of 1; what becomes of them
in a layer is told in `loading.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

import torch
from accelerate import PartialState
from torch import nn
from torch.distributed.tensor import DTensor

from ..codes import ClusterSpec
from ..deltas import Delta, in_absolute_units, refine
from ..lazy_weight import LazyWeight
from ..offloading import stored
from ..ops import Numbers
from ..placement import is_whole
from ..upstream.accelerate import hook_of, offload_hook
from .config import ClusCompConfig
from .loading import Loading, LoadingLayer, digest_bytes

__all__ = ["ClusCompLayer", "NewAdapter"]

# One unit of a scale's delta is this share of the unit of a centroid's, both relative to their size.
_SCALE_SHARE = 0.25
_RANDOM_STD = 0.2  # of the deltas, in RMS, with init_weights=False


class DeltaWeights(nn.Module):
    """The trainable numbers of one adapter in one layer, in units."""

    def __init__(self, spec: ClusterSpec, in_features: int, out_features: int, device: torch.device) -> None:
        super().__init__()

        def zeros(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(size, dtype=torch.float32, device=device))

        self._shape = (spec.num_blocks, spec.num_clusters, spec.group_size)
        self.codebook = zeros(spec.num_blocks * spec.num_clusters, spec.group_size)
        self.register_parameter("scale_in", zeros(in_features) if spec.scale_in else None)
        self.register_parameter("scale_out", zeros(out_features) if spec.scale_out else None)

    def forward(self, units: torch.Tensor) -> Delta:
        """Codebook [m, n, g] and scales in absolute units, fp32.

        A call like that of any module: offloading and ZeRO-3 fetch parameters by hooks on it.
        """
        return in_absolute_units(self.numbers(units), self._shape[1])

    def numbers(self, units: torch.Tensor) -> Numbers:
        """The numbers as they are. No call of the module, so not for one whose numbers a hook has to fetch."""
        return Numbers(self.codebook, self.scale_in, self.scale_out, units)


class DeltaUnits(nn.Module):
    """What one unit of an adapter's numbers in one layer stands for: `values` [2], of its codebook and of its scales.

    Frozen, fp32, powers of two, which any floating dtype holds. A module of its own, because PEFT trains every
    parameter of [`DeltaWeights`]; it too is called, because offloading and ZeRO-3 fetch parameters by hooks on calls.
    """

    weighs_nothing = True  # it stands for no weights: `count_parameters` passes over it

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.values = _frozen(torch.ones(2, dtype=torch.float32, device=device))

    def forward(self) -> torch.Tensor:
        return self.values


class NewAdapter(NamedTuple):
    """What a layer is told of an adapter that it gets.

    trained_blocks: Blocks of the model that it trains. saved: Its config as it was read, if its numbers are to be
    loaded; None starts a new adapter. spec: How the base of a saved one was stored, by default as this layer's is.
    """

    name: str
    config: ClusCompConfig
    trained_blocks: int = 1
    saved: ClusCompConfig | None = None
    spec: ClusterSpec | None = None


class ClusCompLayer(LoadingLayer):
    """What both kinds of layers share: the adapters and their units. Merging and loading are in the classes above."""

    adapter_layer_names = ("cluscomp_delta",)
    other_param_names = ("cluscomp_code_digest", "cluscomp_units")

    base_layer: nn.Module
    # Whether the model was dense before, so that the adapter file has to carry the codes.
    dense_born: bool = True
    # Whether ZeRO-3 had partitioned the dense weight when the layer was made.
    was_partitioned: bool = False
    # Where the layer stands in the model, for errors.
    layer_name: str = ""

    def __init__(self, base_layer: nn.Module, in_features: int, out_features: int, device: torch.device) -> None:
        self.base_layer = base_layer
        self.in_features, self.out_features = in_features, out_features
        self.cluscomp_delta = nn.ModuleDict({})
        self.cluscomp_units = nn.ModuleDict({})
        self._delta_scales: dict[str, float] = {}
        # As last read where they were whole, for when ZeRO-3 has partitioned them.
        self._units_seen: dict[str, tuple[float, float]] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.loading: dict[str, Loading] = {}
        # Parameters and no buffers: accelerate shards whatever is in a state dict. Without PEFT's prefix, because they
        # are not trained.
        self.cluscomp_code_digest = nn.ParameterDict({})
        self._home = device
        self._kept: dict[str, torch.Tensor] = {}

    # -- adapters

    def codebook_fingerprint(self) -> str | None:
        """Digest of the base's codebook and scales, without merged adapters. A dense base has neither: "". None if
        they are elsewhere and were never here.
        """
        return ""

    def note_base(self, adapter_name: str) -> None:
        """Remembers what saving needs of the base, before an engine spreads it over processes.

        Its digests; under ZeRO-3, in the main process's host memory, also the tensors of [`carried`]: DeepSpeed
        gathers only what is trained.
        """
        self.note_digests(adapter_name)
        if self.was_partitioned and not self._kept and PartialState().is_local_main_process:
            self._kept = {key: tensor.detach().cpu() for key, tensor in self.carried().items()}

    def kept(self, key: str) -> torch.Tensor | None:
        """The copy of a tensor of [`carried`] that [`note_base`] made; None if it made none."""
        return self._kept.get(key)

    def update_layer(self, adapter: NewAdapter) -> None:
        """Adds an adapter."""
        adapter_name, config, base = adapter.name, adapter.config, adapter.spec or self.base_spec()
        train_in, train_out = config.scales_of(base)
        blocks = config.blocks_of(base, self.in_features, self.out_features)
        spec = ClusterSpec(base.group_size, base.num_clusters, blocks, train_in, train_out)
        delta = DeltaWeights(spec, self.in_features, self.out_features, self._home)
        numbers = delta.codebook.numel()
        self._delta_scales[adapter_name] = config.unit_scale(
            adapter.trained_blocks, self.in_features, self.out_features, numbers
        )
        self.cluscomp_units[adapter_name] = DeltaUnits(self._home)
        self._units_seen[adapter_name] = (1.0, 1.0)
        if adapter.saved is None:
            rms = self.base_rms()
            units = self.training_units(adapter_name, rms)
            self.set_units(adapter_name, units)
            for key, parameter in delta.named_parameters() if not config.init_weights else ():
                size = rms if key == "codebook" else 1.0
                nn.init.normal_(parameter, std=_RANDOM_STD * size / units[key != "codebook"])
        self.cluscomp_delta[adapter_name] = delta
        # The digest of the codes that the adapter belongs to; zeros until it is known, and then saved with the deltas.
        self.cluscomp_code_digest[adapter_name] = _frozen(torch.zeros(16, dtype=torch.uint8))
        if adapter.saved is None:
            self.note_digests(adapter_name)
        else:
            self.expect(adapter_name, adapter.saved)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.loading.pop(adapter_name, None)
        self._delta_scales.pop(adapter_name, None)
        self._units_seen.pop(adapter_name, None)

    def units_of(self, adapter_name: str, values: torch.Tensor | None = None) -> tuple[float, float]:
        """What one unit of an adapter's codebook stands for, and of its scales; a collective under FSDP2.

        Args:
            adapter_name (`str`): Of an adapter of this layer.
            values (`torch.Tensor`, *optional*): [2], the units where they have been read or gathered already.
        """
        values = stored(self.cluscomp_units[adapter_name], "values") if values is None else values
        assert values is not None
        if isinstance(values, DTensor):
            values = values.full_tensor()
        if is_whole(values) and values.numel() == 2:
            unit, scale_unit = values.tolist()
            self._units_seen[adapter_name] = (unit, scale_unit)
        return self._units_seen[adapter_name]

    def training_units(self, adapter_name: str, rms: float) -> tuple[float, float]:
        """The units that suit an optimiser on a base of this root mean square (see [`base_rms`])."""
        scale = self._delta_scales[adapter_name]
        return _power_of_two(rms * scale), _power_of_two(_SCALE_SHARE * scale)

    def set_units(self, adapter_name: str, units: tuple[float, float]) -> None:
        """Says what one unit of an adapter's codebook stands for, and of its scales; its numbers stay as they are."""
        values = self.cluscomp_units[adapter_name].values
        with torch.no_grad():
            values.copy_(torch.tensor(units))
        self._units_seen[adapter_name] = units

    def deltas(self, adapter_names: list[str]) -> list[Delta]:
        """The deltas of the adapters that this layer has among these, in absolute units, differentiable."""
        found = []
        for name in adapter_names:
            if name not in self.cluscomp_delta:
                continue
            found.append(self.cluscomp_delta[name](self.cluscomp_units[name]()))
        return found

    def running_deltas(self, adapter_names: list[str]) -> Sequence[Delta | Numbers]:
        """[`deltas`] for a forward pass. A single adapter's numbers are handed on in units, which saves a pass over
        them, unless a hook has to bring them first."""
        names = [name for name in adapter_names if name in self.cluscomp_delta]
        if len(names) == 1:
            delta, units = self.cluscomp_delta[names[0]], self.cluscomp_units[names[0]]
            hooks = [part._forward_pre_hooks or part._forward_hooks or hook_of(part) for part in (delta, units)]
            if not any(hooks):
                return [delta.numbers(units.values)]
        return self.deltas(names)

    def set_deltas(self, adapter_name: str, total: Delta) -> None:
        """Overwrites an adapter's numbers with `total`, given in absolute units."""
        delta, units = self.cluscomp_delta[adapter_name], self.units_of(adapter_name)
        with torch.no_grad():
            for key, value in total._asdict().items():
                parameter = getattr(delta, key)
                if parameter is not None:
                    value = torch.zeros_like(parameter) if value is None else value
                    if key == "codebook":
                        value = refine(value, parameter.shape[0] // value.shape[1])
                    parameter.copy_(value.reshape(parameter.shape) / units[key != "codebook"])

    def _base_device(self) -> torch.device:
        """Where the base is; while its tensors are still to be loaded, where the dense layer was."""
        device = next(self.base_layer.parameters()).device
        return self._home if self.awaits_any() or device.type == "meta" else device

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # Device only: PEFT would also cast to the dtype of the base, and bf16 deltas lose small steps.
        device = device or self._base_device()
        if device.type == "meta":
            return
        for modules in (self.cluscomp_delta, self.cluscomp_units):
            if adapter_name in modules and not _has_meta(modules[adapter_name]):
                modules[adapter_name].to(device)
        if self.awaits_any() and not _has_meta(self.base_layer):
            self.base_layer.to(device)

    def note_digests(self, adapter_name: str) -> None:
        """Stores the digest of this layer's codes beside the adapter that is made for them."""
        found = self.fingerprint()
        if found is not None:
            self.cluscomp_code_digest[adapter_name] = _frozen(digest_bytes(found))
        self.codebook_fingerprint()  # remembered, for when the codebook is spread over processes

    def train(self, mode: bool = True):
        """Also brings adapters that are still in absolute units to those that suit an optimiser, before it moves them.

        Raises:
            RuntimeError: If a trainable adapter is offloaded.
        """
        for name, delta in self.cluscomp_delta.items() if mode else ():
            if offload_hook(delta) is not None and any(value.requires_grad for value in delta.parameters()):
                raise RuntimeError(
                    f"adapter {name!r} was offloaded with the model, so that an optimiser cannot reach its numbers. "
                    "Dispatch or offload the model first, and create or load the adapter then."
                )
        for name, loading in list(self.loading.items()) if mode and not torch.compiler.is_compiling() else ():
            if loading.absolute and any(value.requires_grad for value in self.cluscomp_delta[name].parameters()):
                self.bring_to_units(name)
        return super().train(mode)

    # -- forward

    @property
    def weight(self) -> torch.Tensor:
        """The weight of the base, for model code that asks for its dtype or device. It is without adapters, so while
        some are active, computing with it instead of calling the layer raises an error."""
        if torch.compiler.is_compiling() or self._runs_as_base():
            return self.base_layer.weight
        base = self.base_layer.weight
        return LazyWeight(tuple(base.shape), base.dtype, base.device, self._refuse_weight)

    def _refuse_weight(self) -> NoReturn:
        raise RuntimeError(
            f"the model computes with the weight of {self.layer_name or 'a layer'} ({self.out_features} x "
            f"{self.in_features}) instead of calling the layer, so an adapter there has no effect and gets no "
            "gradient. Leave the layer out with exclude_modules, or merge the adapter first."
        )

    def _runs_as_base(self) -> bool:
        """Whether the base layer alone gives the output now."""
        if self.disable_adapters:
            self.unmerge(warn=False)
            return True
        return self.merged or not any(name in self.cluscomp_delta for name in self.active_adapters)


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _power_of_two(value: float) -> float:
    return 2.0 ** round(math.log2(value))


def _has_meta(module: nn.Module) -> bool:
    return any(parameter.device.type == "meta" for parameter in module.parameters())
