"""The tuner layers: what PEFT puts in the place of a linear layer.

    ClusCompLinear        base_layer: ClusteredLinear      y = base_layer(x, deltas of the active adapters)
    ClusCompDenseLinear   base_layer: nn.Linear, Conv1D    y = x ((W + Σ ΔC[codes]) · (1 + Σδ))ᵀ + bias

An adapter of a layer is two small modules under its name. `cluscomp_delta` holds what trains, fp32, in units:

    codebook [m, n, g], scale_in [in], scale_out [out]        ΔC = codebook · units[0],   δ = scale · units[1]

`cluscomp_state` holds what is frozen: `units` [2], and on a dense base the packed `codes` that ΔC is laid out by. The
units are powers of two near RMS(codebook) · delta_scale: multiplying by them is exact, and one learning rate fits every
layer. They are stored because they decide what the numbers mean, whatever base the adapter meets later.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D

from .. import ops
from ..codes import ClusterSpec, fingerprint, num_groups, packed_width
from ..linear import ClusteredLinear, Delta, weight_of
from .config import ClusCompConfig

__all__ = ["ClusCompDenseLinear", "ClusCompLayer", "ClusCompLinear"]

# One unit of a scale's delta is this share of the unit of a centroid's, both relative to their size.
_SCALE_SHARE = 0.25
_RANDOM_STD = 0.2  # of the deltas, in RMS, with init_weights=False


class DeltaWeights(nn.Module):
    """The trainable numbers of one adapter in one layer, in units."""

    def __init__(self, spec: ClusterSpec, in_features: int, out_features: int, device: torch.device) -> None:
        super().__init__()

        def zeros(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(size, dtype=torch.float32, device=device))

        self.codebook = zeros(spec.num_blocks, spec.num_clusters, spec.group_size)
        self.register_parameter("scale_in", zeros(in_features) if spec.scale_in else None)
        self.register_parameter("scale_out", zeros(out_features) if spec.scale_out else None)


class AdapterState(nn.Module):
    """The frozen numbers of one adapter in one layer: `units` [2] fp32 and, on a dense base, `codes`."""

    def __init__(self, units: torch.Tensor, codes: torch.Tensor | None) -> None:
        super().__init__()
        self.units = nn.Parameter(units, requires_grad=False)
        self.register_parameter("codes", None if codes is None else nn.Parameter(codes, requires_grad=False))


class ClusCompLayer(BaseTunerLayer):
    """What both kinds of layers share: the adapters, their units, and refusing to run before weights are loaded."""

    adapter_layer_names = ("cluscomp_delta",)
    other_param_names = ("cluscomp_state",)

    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module, in_features: int, out_features: int, device: torch.device) -> None:
        self.base_layer = base_layer
        self.in_features, self.out_features = in_features, out_features
        self.cluscomp_delta = nn.ModuleDict({})
        self.cluscomp_state = nn.ModuleDict({})
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        # What merging replaced, kept so that unmerging restores it bit for bit.
        self._unmerged: dict[str, torch.Tensor | None] | None = None
        self._pending: set[str] = set()
        self._home = device

    # -- adapters

    def base_spec(self) -> ClusterSpec:
        """How the codes of this layer's base are stored."""
        raise NotImplementedError

    def codes_of(self, adapter_name: str) -> torch.Tensor:
        """The packed codes that the adapter's codebook belongs to."""
        raise NotImplementedError

    def _add(
        self, adapter_name: str, config: ClusCompConfig, spec: ClusterSpec, rms: float, codes: torch.Tensor | None
    ) -> None:
        """Creates the adapter for a base stored as `spec`, whose codebook has this RMS."""
        if config.num_blocks > self.in_features:
            raise ValueError(
                f"num_blocks={config.num_blocks} is more than the {self.in_features} input channels of a layer; a "
                "block needs at least one."
            )
        train_in = spec.scale_in if config.train_scales is None else config.train_scales
        train_out = spec.scale_out if config.train_scales is None else config.train_scales
        spec = ClusterSpec(spec.group_size, spec.num_clusters, config.num_blocks, train_in, train_out)
        delta = DeltaWeights(spec, self.in_features, self.out_features, self._home)
        unit = _power_of_two(rms * config.delta_scale)
        units = torch.tensor([unit, _power_of_two(_SCALE_SHARE * config.delta_scale)], device=self._home)
        state = AdapterState(units, codes)
        if config.expects_weights:
            for parameter in [*delta.parameters(), state.units]:
                parameter.data.fill_(math.nan)
            self._pending.add(adapter_name)
        elif not config.init_weights:
            nn.init.normal_(delta.codebook, std=_RANDOM_STD * rms / unit)
            for scale in (delta.scale_in, delta.scale_out):
                if scale is not None:
                    nn.init.normal_(scale, std=_RANDOM_STD / float(units[1]) if units.device.type != "meta" else 1)
        self.cluscomp_delta[adapter_name] = delta
        self.cluscomp_state[adapter_name] = state
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._pending.discard(adapter_name)

    def deltas(self, adapter_names: list[str]) -> list[Delta]:
        """The deltas of those of the adapters that this layer has, in absolute units, differentiable."""
        found = []
        for name in adapter_names:
            if name not in self.cluscomp_delta:
                continue
            delta, units = self.cluscomp_delta[name], self.cluscomp_state[name].units
            scales = [
                None if scale is None else scale.float() * units[1] for scale in (delta.scale_in, delta.scale_out)
            ]
            found.append(Delta(delta.codebook.float() * units[0], *scales))
        return found

    def set_deltas(self, adapter_name: str, total: Delta) -> None:
        """Overwrites an adapter's numbers with `total`, given in absolute units."""
        delta, units = self.cluscomp_delta[adapter_name], self.cluscomp_state[adapter_name].units
        with torch.no_grad():
            delta.codebook.copy_(total.codebook / units[0])
            for scale, value in ((delta.scale_in, total.scale_in), (delta.scale_out, total.scale_out)):
                if scale is not None:
                    scale.copy_(torch.zeros_like(scale) if value is None else value / units[1])

    def _base_device(self) -> torch.device:
        """Where the base is; while its tensors are still to be loaded, where the dense layer was."""
        device = next(self.base_layer.parameters()).device
        return self._home if self._pending or device.type == "meta" else device

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # Device only: PEFT would also cast to the dtype of the base, and bf16 deltas lose small steps.
        device = device or self._base_device()
        if device.type == "meta":
            return
        for module in (self.cluscomp_delta, self.cluscomp_state):
            if adapter_name in module and not _has_meta(module[adapter_name]):
                module[adapter_name].to(device)
        if self._pending and not _has_meta(self.base_layer):
            self.base_layer.to(device)

    def _check_loaded(self, adapter_names: list[str]) -> None:
        """Refuses adapters whose saved weights never arrived; costs nothing once they have."""
        if not self._pending or torch.compiler.is_compiling():
            return
        for name in self._pending.intersection(adapter_names):
            values = [*self.cluscomp_delta[name].parameters(), self.cluscomp_state[name].units]
            values += [value for value in self.base_layer.parameters() if value.is_floating_point()]
            if any(value.device.type == "meta" or bool(value.isnan().any()) for value in values):
                raise RuntimeError(
                    f"adapter {name!r} was made from the config of a saved adapter, but its weights were not loaded. "
                    "Load it with PeftModel.from_pretrained or model.load_adapter; to start a new adapter with the same "
                    "settings, use dataclasses.replace(config, fingerprint=None)."
                )
            self._pending.discard(name)

    # -- merging

    def _merge(self, adapter_names: list[str], safe_merge: bool) -> None:
        """Writes the adapters into the base."""
        raise NotImplementedError

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merges adapters (by default the active ones) into the base layer.

        Args:
            safe_merge (`bool`): Check the result for NaN and infinities first and leave the base alone if there are.
            adapter_names (`list[str]`, *optional*): Which adapters.

        Raises:
            ValueError: If `safe_merge` finds NaN or infinite values.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.cluscomp_delta]
        if not names:
            return
        self._check_loaded(names)
        # From the unmerged base, so that merging one adapter after another rounds once, as running both does.
        already = list(self.merged_adapters)
        self.unmerge(warn=False)
        try:
            self._merge(already + names, safe_merge)
        except ValueError:
            if already:
                self._merge(already, safe_merge=False)
                self.merged_adapters = already
            raise
        self.merged_adapters = already + names

    def _keep(self, parameters: tuple[str, ...]) -> None:
        self._unmerged = {name: self.base_layer._parameters[name] for name in parameters}

    def unmerge(self, warn: bool = True) -> None:
        """Restores the base layer as it was before merging, bit for bit."""
        if not self.merged:
            if warn:
                import warnings

                warnings.warn("Already unmerged, nothing to do.", stacklevel=2)
            return
        assert self._unmerged is not None
        self.base_layer._parameters.update(self._unmerged)
        self._unmerged = None
        self.merged_adapters = []

    def base_tensor(self, name: str) -> torch.Tensor | None:
        """A parameter of the base layer, as it is without merged adapters."""
        if self._unmerged is not None and name in self._unmerged:
            return self._unmerged[name]
        return self.base_layer._parameters.get(name)

    # -- forward

    def _runs_as_base(self, kwargs: dict[str, Any]) -> bool:
        """Whether the base layer alone gives the output now."""
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError(
                "adapter_names (several adapters in one batch) is not supported by ClusComp; run one batch per adapter "
                "with set_adapter()."
            )
        if self.disable_adapters:
            self.unmerge(warn=False)
            return True
        return self.merged or not any(name in self.cluscomp_delta for name in self.active_adapters)


class ClusCompLinear(nn.Module, ClusCompLayer):
    """An adapter on codes. `dense_dtype` is the dtype of the weight that was clustered, None on a compressed model."""

    base_layer: ClusteredLinear

    def __init__(
        self,
        base_layer: ClusteredLinear,
        adapter_name: str,
        config: ClusCompConfig,
        device: torch.device,
        dense_dtype: torch.dtype | None = None,
        spec: ClusterSpec | None = None,
    ) -> None:
        super().__init__()
        ClusCompLayer.__init__(self, base_layer, base_layer.in_features, base_layer.out_features, device)
        self.dense_dtype = dense_dtype
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, spec)

    def update_layer(self, adapter_name: str, config: ClusCompConfig, spec: ClusterSpec | None = None) -> None:
        """Adds an adapter; `spec` is what a saved one was made for, by default what the base is now."""
        codebook = self.base_tensor("codebook")
        assert codebook is not None
        if not self._pending:
            self._home = codebook.device
        rms = 1.0 if codebook.device.type == "meta" else _rms(codebook)
        self._add(adapter_name, config, spec or self.base_spec(), rms, None)

    def base_spec(self) -> ClusterSpec:
        shape, scale_in, scale_out = (self.base_tensor(name) for name in ("codebook", "scale_in", "scale_out"))
        assert shape is not None
        blocks, clusters, group_size = shape.shape
        return ClusterSpec(group_size, clusters, blocks, scale_in is not None, scale_out is not None)

    def codes_of(self, adapter_name: str) -> torch.Tensor:
        return self.base_layer.codes

    def fingerprint(self, adapter_name: str) -> str:
        """Digest of the codes that the adapter belongs to."""
        return self.base_layer.fingerprint()

    def _merge(self, adapter_names: list[str], safe_merge: bool) -> None:
        deltas = self.deltas(adapter_names)
        if safe_merge:
            with torch.no_grad():
                _refuse_non_finite(self.base_layer.effective(deltas), adapter_names)
        self._keep(("codebook", "scale_in", "scale_out"))
        self.base_layer.merge(deltas)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The layer with the active adapters for x [..., in]: [..., out]."""
        if self._runs_as_base(kwargs):
            return self.base_layer(x, *args, **kwargs)
        self._check_loaded(self.active_adapters)
        # Through the base layer's own call, so that hooks on it (offloading, say) see the input.
        return self.base_layer(x, self.deltas(self.active_adapters))

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """What PEFT leaves in place of this layer: the clustered layer, or the dense one if the model was dense."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.base_layer if self.dense_dtype is None else self.base_layer.to_dense(self.dense_dtype)

    def __repr__(self) -> str:
        return "cluscomp." + super().__repr__()


class ClusCompDenseLinear(nn.Module, ClusCompLayer):
    """An adapter on a dense weight: `W' = (W + ΔC[codes]) · (1 + δ)`; every adapter has its own frozen codes."""

    base_layer: nn.Linear | Conv1D

    def __init__(
        self,
        base_layer: nn.Linear | Conv1D,
        adapter_name: str,
        config: ClusCompConfig,
        device: torch.device,
        spec: ClusterSpec,
        codes: torch.Tensor | None,
        rms: float,
    ) -> None:
        super().__init__()
        out_features, in_features = weight_of(base_layer).shape
        ClusCompLayer.__init__(self, base_layer, in_features, out_features, device)
        self._specs: dict[str, ClusterSpec] = {}
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, spec, codes, rms)

    def update_layer(
        self, adapter_name: str, config: ClusCompConfig, spec: ClusterSpec, codes: torch.Tensor | None, rms: float
    ) -> None:
        """Adds an adapter for codes of the weight stored as `spec`; None: zeros, to be loaded."""
        if codes is None:
            width = packed_width(num_groups(self.out_features, spec.group_size), spec.code_bits)
            codes = torch.zeros(self.in_features, width, dtype=torch.uint8, device=self._home)
        # A dense weight takes scales for nothing, so they train unless the config says no.
        self._specs[adapter_name] = spec = ClusterSpec(spec.group_size, spec.num_clusters, 1, True, True)
        self._add(adapter_name, config, spec, rms, codes)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._specs.pop(adapter_name, None)

    def base_spec(self) -> ClusterSpec:
        return next(iter(self._specs.values()))

    def spec_of(self, adapter_name: str) -> ClusterSpec:
        """How the adapter's codes are stored."""
        return self._specs[adapter_name]

    def codes_of(self, adapter_name: str) -> torch.Tensor:
        return self.cluscomp_state[adapter_name].codes

    def fingerprint(self, adapter_name: str) -> str:
        """Digest of the codes that the adapter belongs to."""
        return fingerprint(self.codes_of(adapter_name), self.out_features, self._specs[adapter_name])

    def _merge(self, adapter_names: list[str], safe_merge: bool) -> None:
        weight = self.base_layer.weight
        deltas = self.deltas(adapter_names)
        scale_in, scale_out = _total_scales(deltas)
        with torch.no_grad():
            merged = weight_of(self.base_layer)
            for name, delta in zip(adapter_names[:-1], deltas[:-1], strict=True):
                merged = ops.decode(
                    self.codes_of(name), delta.codebook, None, None, merged, out_features=self.out_features
                )
            merged = ops.decode(
                self.codes_of(adapter_names[-1]),
                deltas[-1].codebook,
                scale_in,
                scale_out,
                merged,
                out_features=self.out_features,
                dtype=weight.dtype,
            )
        if safe_merge:
            _refuse_non_finite((merged,), adapter_names)
        self._keep(("weight",))
        merged = merged.t().contiguous() if isinstance(self.base_layer, Conv1D) else merged
        self.base_layer._parameters["weight"] = nn.Parameter(merged, requires_grad=weight.requires_grad)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The layer with the active adapters for x [..., in]: [..., out]."""
        if self._runs_as_base(kwargs):
            return self.base_layer(x, *args, **kwargs)
        names = [name for name in self.active_adapters if name in self.cluscomp_delta]
        self._check_loaded(names)
        deltas = self.deltas(names)
        scale_in, scale_out = _total_scales(deltas)
        residual, bias = weight_of(self.base_layer), self.base_layer.bias
        result = None
        for name, delta in zip(names, deltas, strict=True):
            part = ops.linear(
                x,
                self.codes_of(name),
                delta.codebook,
                scale_in,
                scale_out,
                residual if result is None else None,
                bias if result is None else None,
                out_features=self.out_features,
            )
            result = part if result is None else result + part
        assert result is not None
        return result

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """What PEFT leaves in place of this layer: the dense layer."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.base_layer

    def __repr__(self) -> str:
        return "cluscomp." + super().__repr__()


def _total_scales(deltas: list[Delta]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """1 + Σδ of both kinds of scales, None where no adapter has any."""
    totals: list[torch.Tensor | None] = []
    for changes in ([delta.scale_in for delta in deltas], [delta.scale_out for delta in deltas]):
        present = [change for change in changes if change is not None]
        totals.append(1 + sum(present[1:], start=present[0]) if present else None)
    return totals[0], totals[1]


def _power_of_two(value: float) -> float:
    return 2.0 ** round(math.log2(value))


def _rms(codebook: torch.Tensor) -> float:
    """RMS of a codebook; 1 for a matrix of zeros, or one that is still to be loaded."""
    rms = float(codebook.detach().float().square().mean().sqrt())
    return rms if rms > 0 and math.isfinite(rms) else 1.0


def _has_meta(module: nn.Module) -> bool:
    return any(parameter.device.type == "meta" for parameter in module.parameters())


def _refuse_non_finite(values: tuple[torch.Tensor | None, ...], adapter_names: list[str]) -> None:
    if not all(bool(torch.isfinite(value).all()) for value in values if value is not None):
        raise ValueError(
            f"NaNs detected in the merged weights. The adapter {', '.join(adapter_names)} seems to be broken; nothing "
            "was merged."
        )
