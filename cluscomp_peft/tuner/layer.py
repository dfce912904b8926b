"""What the tuner layers share, which PEFT puts in the place of linear layers.

    ClusCompLinear        base_layer: ClusteredLinear      clustered_layer.py
    ClusCompDenseLinear   base_layer: nn.Linear, Conv1D    dense_layer.py

What an adapter of a layer trains is a small module under its name, `cluscomp_delta`, fp32, in units:

    codebook [m · n, g], scale_in [in], scale_out [out]       ΔC = codebook · unit,   δ = scale · unit

m codebooks of n centroids lie end to end, so that FSDP2, which deals out rows, gives every process as many.

The units are powers of two near RMS(codebook) · delta_scale, so one learning rate fits every layer, and multiplying by
them is exact. They belong to the process, not to the adapter: files hold absolute deltas, which mean the same on
whatever base they meet later. An adapter whose weights are still to come has units of 1, so that file and layer agree
whoever sets the tensors; PEFT's loading hook, or the first `train()`, brings it to units that suit an optimiser.
"""

from __future__ import annotations

import math
import warnings

import torch
from accelerate import PartialState
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from ..codes import ClusterSpec
from ..linear import Delta
from ..offloading import offload_hook, store, stored
from ..placement import is_sharded
from .config import ClusCompConfig

__all__ = ["ClusCompLayer", "digest_bytes", "refuse_non_finite", "root_mean_square"]

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

    def forward(self, unit: float, scale_unit: float) -> tuple[torch.Tensor | None, ...]:
        """Codebook [m, n, g] and scales in absolute units, fp32.

        A call like that of any module: offloading and ZeRO-3 fetch parameters by hooks on it.
        """
        scales = [None if part is None else part.float() * scale_unit for part in (self.scale_in, self.scale_out)]
        return self.codebook.float().view(self._shape) * unit, *scales


class ClusCompLayer(BaseTunerLayer):
    """What both kinds of layers share: the adapters, their units, and refusing to run before weights are loaded."""

    adapter_layer_names = ("cluscomp_delta",)
    other_param_names = ("code_digest",)

    base_layer: nn.Module
    # Whether the model was dense before, so that the adapter file has to carry the codes.
    dense_born: bool = True
    # Whether ZeRO-3 had partitioned the dense weight when the layer was made.
    was_partitioned: bool = False

    def __init__(self, base_layer: nn.Module, in_features: int, out_features: int, device: torch.device) -> None:
        self.base_layer = base_layer
        self.in_features, self.out_features = in_features, out_features
        self.cluscomp_delta = nn.ModuleDict({})
        self._delta_scales: dict[str, float] = {}
        self._units: dict[str, tuple[float, float]] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        # What merging replaced, kept so that unmerging restores it bit for bit.
        self._unmerged: dict[str, torch.Tensor | None] | None = None
        # Adapters made for weights that are about to be loaded, and those of them that are still in units of 1.
        self._pending: set[str] = set()
        self._absolute: set[str] = set()
        # Parameters and no buffers: accelerate shards whatever is in a state dict. Without PEFT's prefix, because they
        # are not trained.
        self.code_digest = nn.ParameterDict({})
        self._home = device
        self._kept: dict[str, torch.Tensor] = {}

    # -- adapters

    def base_spec(self) -> ClusterSpec:
        """How the codes of this layer's base are stored."""
        raise NotImplementedError

    def fingerprint(self) -> str | None:
        """Digest of the codes of this layer's base; None if they are elsewhere and were never here."""
        raise NotImplementedError

    def codebook_fingerprint(self) -> str | None:
        """Digest of the base's codebook and scales without merged adapters, of nothing on a dense base; None if they
        are elsewhere and were never here.
        """
        return ""

    def base_rms(self) -> float:
        """What units are relative to, root mean square: the codebook, or on a dense base the weight; 1 without any."""
        raise NotImplementedError

    def carried(self) -> dict[str, torch.Tensor]:
        """What a file holds of this layer's base: the key inside the layer to the tensor. Empty unless dense-born."""
        raise NotImplementedError

    def note_base(self, adapter_name: str) -> None:
        """Takes down what saving needs of the base, which an engine may be about to spread over processes.

        That is its digests, and under ZeRO-3 in the main process's host memory what a file holds of it ([`kept`]):
        DeepSpeed leaves what is not trained out of what it gathers.
        """
        self.sign(adapter_name)
        if self.was_partitioned and not self._kept and PartialState().is_local_main_process:
            self._kept = {key: tensor.detach().cpu() for key, tensor in self.carried().items()}

    def kept(self, key: str) -> torch.Tensor | None:
        """What [`note_base`] kept under this key of [`carried`], None if there is nothing."""
        return self._kept.get(key)

    def _add(self, adapter_name: str, config: ClusCompConfig, spec: ClusterSpec) -> None:
        """Creates the adapter for a base stored as `spec`."""
        train_in, train_out = config.scales_of(spec)
        blocks = config.blocks_of(spec, self.in_features, self.out_features)
        spec = ClusterSpec(spec.group_size, spec.num_clusters, blocks, train_in, train_out)
        delta = DeltaWeights(spec, self.in_features, self.out_features, self._home)
        numbers = delta.codebook.numel()
        self._delta_scales[adapter_name] = config.unit_scale(self.in_features, self.out_features, numbers)
        rms = self.set_units(adapter_name)
        if config.expects_weights:
            for parameter in delta.parameters():
                parameter.data.fill_(math.nan)
            self._units[adapter_name] = (1.0, 1.0)
            self._pending.add(adapter_name)
            self._absolute.add(adapter_name)
        elif not config.init_weights:
            for key, parameter in delta.named_parameters():
                size = rms if key == "codebook" else 1.0
                nn.init.normal_(parameter, std=_RANDOM_STD * size / self.unit_of(adapter_name, key))
        self.cluscomp_delta[adapter_name] = delta
        # The digest of the codes that the adapter belongs to; zeros until it is known, and then saved with the deltas.
        self.code_digest[adapter_name] = _frozen(torch.zeros(16, dtype=torch.uint8))
        if not config.expects_weights:
            self.sign(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._pending.discard(adapter_name)
        self._absolute.discard(adapter_name)
        self._delta_scales.pop(adapter_name, None)
        self._units.pop(adapter_name, None)

    def unit_of(self, adapter_name: str, key: str) -> float:
        """What one unit of an adapter's tensor ("codebook", "scale_in", "scale_out") stands for."""
        return self._units[adapter_name][0 if key == "codebook" else 1]

    def set_units(self, adapter_name: str, values: torch.Tensor | None = None) -> float:
        """Fixes an adapter's units by the RMS of `values`, by default of what the base holds; returns that RMS."""
        rms = self.base_rms() if values is None else root_mean_square(values)
        scale = self._delta_scales[adapter_name]
        self._units[adapter_name] = (_power_of_two(rms * scale), _power_of_two(_SCALE_SHARE * scale))
        return rms

    def deltas(self, adapter_names: list[str]) -> list[Delta]:
        """The deltas of those of the adapters that this layer has, in absolute units, differentiable."""
        found = []
        for name in adapter_names:
            if name not in self.cluscomp_delta:
                continue
            found.append(Delta(*self.cluscomp_delta[name](*self._units[name])))
        return found

    def set_deltas(self, adapter_name: str, total: Delta) -> None:
        """Overwrites an adapter's numbers with `total`, given in absolute units."""
        delta = self.cluscomp_delta[adapter_name]
        with torch.no_grad():
            for key, value in total._asdict().items():
                parameter = getattr(delta, key)
                if parameter is not None:
                    value = torch.zeros_like(parameter) if value is None else value.reshape(parameter.shape)
                    parameter.copy_(value / self.unit_of(adapter_name, key))

    def _base_device(self) -> torch.device:
        """Where the base is; while its tensors are still to be loaded, where the dense layer was."""
        device = next(self.base_layer.parameters()).device
        return self._home if self._pending or device.type == "meta" else device

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # Device only: PEFT would also cast to the dtype of the base, and bf16 deltas lose small steps.
        device = device or self._base_device()
        if device.type == "meta":
            return
        if adapter_name in self.cluscomp_delta and not _has_meta(self.cluscomp_delta[adapter_name]):
            self.cluscomp_delta[adapter_name].to(device)
        if self._pending and not _has_meta(self.base_layer):
            self.base_layer.to(device)

    def settle(self, adapter_names: list[str]) -> None:
        """Makes sure that weights which were to be loaded have arrived; costs nothing once it is known.

        Raises:
            RuntimeError: If they have not, or belong to other codes, or the first pass is a compiled one.
        """
        waiting = self._pending.intersection(adapter_names)
        if not waiting:
            return
        if torch.compiler.is_compiling():
            raise RuntimeError("run one forward pass before torch.compile: a loaded adapter is checked in the first.")
        for name in waiting:
            self._refuse_unloaded(name)
            self.check_fingerprint(name, self.code_digest[name])
            self._pending.discard(name)

    def awaits(self, adapter_name: str) -> bool:
        """Whether the adapter's weights are still to be loaded."""
        return adapter_name in self._pending

    def loaded(self, adapter_name: str) -> None:
        """Notes that PEFT's hook saw the weights and brought them to units."""
        self._pending.discard(adapter_name)
        self._absolute.discard(adapter_name)

    def sign(self, adapter_name: str) -> None:
        """Notes the digest of this layer's codes as those that the adapter belongs to."""
        found = self.fingerprint()
        if found is not None:
            self.code_digest[adapter_name] = _frozen(digest_bytes(found))
        self.codebook_fingerprint()  # remembered, for when the codebook is spread over processes

    def check_fingerprint(self, adapter_name: str, saved: torch.Tensor) -> None:
        """Holds the digest that came with an adapter's weights against the codes of this layer.

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

    def train(self, mode: bool = True):
        """Also brings adapters that were loaded past PEFT's hook to units, in place, before an optimiser moves
        them.

        Raises:
            RuntimeError: If a trainable adapter is offloaded.
        """
        for name, delta in self.cluscomp_delta.items() if mode else ():
            if offload_hook(delta) is not None and any(value.requires_grad for value in delta.parameters()):
                raise RuntimeError(
                    f"adapter {name!r} was offloaded with the model, so that an optimiser cannot reach its numbers. "
                    "Dispatch or offload the model first, and create or load the adapter then."
                )
        if mode and self._absolute and not torch.compiler.is_compiling():
            for name in list(self._absolute):
                if any(parameter.requires_grad for parameter in self.cluscomp_delta[name].parameters()):
                    self.settle([name])
                    self.set_units(name)
                    with torch.no_grad():
                        for key, parameter in self.cluscomp_delta[name].named_parameters():
                            parameter.div_(self.unit_of(name, key))
                    self._absolute.discard(name)
        return super().train(mode)

    def _refuse_unloaded(self, adapter_name: str) -> None:
        values = [*self.cluscomp_delta[adapter_name].parameters()]
        base = [stored(self.base_layer, name) for name in self.base_layer._parameters]
        values += [value for value in base if value is not None and value.is_floating_point()]
        if any(value.device.type == "meta" or bool(value.isnan().any()) for value in values):
            raise RuntimeError(
                f"adapter {adapter_name!r} was made from the config of a saved adapter, but its weights were not "
                "loaded. Load it with PeftModel.from_pretrained or model.load_adapter; to start a new adapter with "
                "the same settings, use dataclasses.replace(config, fingerprint=None)."
            )

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
            RuntimeError: If the base is spread over processes.
            ValueError: If `safe_merge` finds NaN or infinite values.
        """
        if any(is_sharded(value) for value in self.base_layer.parameters()):
            raise RuntimeError(
                "the model is spread over processes (FSDP2 or ZeRO-3) and cannot be merged there; save the adapter, "
                "load it on the base in one process, and merge that."
            )
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.cluscomp_delta]
        if not names:
            return
        self.settle(names)
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
        self._unmerged = {name: stored(self.base_layer, name) for name in parameters}

    def unmerge(self, warn: bool = True) -> None:
        """Restores the base layer as it was before merging, bit for bit."""
        if not self.merged:
            if warn:
                warnings.warn("Already unmerged, nothing to do.", stacklevel=2)
            return
        assert self._unmerged is not None
        for name, value in self._unmerged.items():
            store(self.base_layer, name, value)
        self._unmerged = None
        self.merged_adapters = []

    def base_tensor(self, name: str) -> torch.Tensor | None:
        """A parameter of the base layer, as it is without merged adapters."""
        if self._unmerged is not None and name in self._unmerged:
            return self._unmerged[name]
        return stored(self.base_layer, name)

    # -- forward

    def _runs_as_base(self) -> bool:
        """Whether the base layer alone gives the output now."""
        if self.disable_adapters:
            self.unmerge(warn=False)
            return True
        return self.merged or not any(name in self.cluscomp_delta for name in self.active_adapters)


def digest_bytes(digest: str) -> torch.Tensor:
    """A digest of 32 hexadecimal digits as [16] uint8, the way files hold it."""
    return torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8)


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def root_mean_square(values: torch.Tensor) -> float:
    """Of values in memory that are not all 0; 1 of all others."""
    rms = math.nan if values.is_meta else float(values.detach().float().square().mean().sqrt())
    return rms if rms > 0 and math.isfinite(rms) else 1.0


def _power_of_two(value: float) -> float:
    return 2.0 ** round(math.log2(value))


def _has_meta(module: nn.Module) -> bool:
    return any(parameter.device.type == "meta" for parameter in module.parameters())


def refuse_non_finite(values: tuple[torch.Tensor | None, ...], adapter_names: list[str]) -> None:
    """Raises a ValueError if what merging would store has NaN or infinite values."""
    if not all(bool(torch.isfinite(value).all()) for value in values if value is not None):
        raise ValueError(
            f"NaNs detected in the merged weights. The adapter {', '.join(adapter_names)} seems to be broken; nothing "
            "was merged."
        )
