"""The tuner layer on codes: `y = base_layer(x, deltas of the active adapters)`, and merging writes the same sum.

The merged layer of codes gives the same bits. A model that was dense becomes dense again when it is unloaded, and then
only with more than a few tokens in a call: see `ClusteredLinear.to_dense`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..clustered_weight import BASE_TENSORS, VALUES
from ..codes import ClusterSpec, value_fingerprint
from ..deltas import apply_deltas
from ..linear import ClusteredLinear
from ..offloading import execution_device
from ..placement import is_whole
from .layer import ClusCompLayer, NewAdapter
from .units import root_mean_square

__all__ = ["ClusCompLinear"]


class ClusCompLinear(ClusCompLayer, nn.Module):
    """An adapter on codes. `dense_dtype` is the dtype of the weight that was clustered, None on a compressed model."""

    base_layer: ClusteredLinear

    def __init__(
        self,
        base_layer: ClusteredLinear,
        adapter: NewAdapter,
        device: torch.device,
        dense_dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        ClusCompLayer.__init__(self, base_layer, base_layer.in_features, base_layer.out_features, device)
        self.dense_dtype = dense_dtype
        self._codebook_digest: str | None = None
        self.dense_born = dense_dtype is not None
        self._active_adapter = adapter.name
        self.update_layer(adapter)

    def update_layer(self, adapter: NewAdapter) -> None:
        if not self.awaits_any():
            self._home = execution_device(self.base_layer)
        super().update_layer(adapter)

    def base_spec(self) -> ClusterSpec:
        codebook, scale_in, scale_out = (self.base_tensor(name) for name in VALUES)
        assert codebook is not None
        return ClusterSpec.of(codebook, scale_in, scale_out)

    def fingerprint(self) -> str | None:
        return self.base_layer.fingerprint()

    def codebook_fingerprint(self) -> str | None:
        parts = [self.base_tensor(name) for name in VALUES]
        if all(part is None or is_whole(part) for part in parts):
            self._codebook_digest = value_fingerprint(parts)
        return self._codebook_digest

    def base_rms(self) -> float:
        codebook = self.base_tensor("codebook")
        assert codebook is not None
        return root_mean_square(codebook)

    def carried(self) -> dict[str, torch.Tensor]:
        parts = {key: self.base_tensor(key) for key in BASE_TENSORS} if self.dense_born else {}
        return {f"base_layer.{key}": tensor for key, tensor in parts.items() if tensor is not None}

    def stored_bytes(self) -> int:
        """Bytes of codes, codebooks and scales once the active adapters are merged."""
        if self.merged or self.disable_adapters:
            return self.base_layer.stored_bytes()
        with torch.no_grad():
            spec = ClusterSpec.of(*self.base_layer.effective(self.deltas(self.active_adapters)))
        return spec.num_bytes(self.in_features, self.out_features, self.base_layer.codebook.element_size())

    def merged_values(self, adapter_names: list[str]) -> dict[str, torch.Tensor | None]:
        codebook, scale_in, scale_out = (self.base_tensor(name) for name in VALUES)
        assert codebook is not None
        values = apply_deltas(codebook, scale_in, scale_out, self.deltas(adapter_names), self.in_features)
        pairs = zip(VALUES, values, strict=True)
        return {name: None if value is None else value.to(codebook.dtype) for name, value in pairs}

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The layer with the active adapters for x [..., in]: [..., out]."""
        if self._runs_as_base():
            return self.base_layer(x, *args, **kwargs)
        self.check_arrival(self.active_adapters)
        # Through the base layer's own call, so that hooks on it (offloading, say) see the input.
        return self.base_layer(x, self.running_deltas(self.active_adapters))

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """What PEFT leaves in place of this layer: the clustered layer, or the dense one if the model was dense."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.base_layer if self.dense_dtype is None else self.base_layer.to_dense(self.dense_dtype)

    def __repr__(self) -> str:
        return "cluscomp." + nn.Module.__repr__(self)
