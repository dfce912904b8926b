"""The tuner layer that keeps the dense weight: codes only say which weights move together.

    y = x W'ᵀ + bias,    W' = s_out · (W + ΔC[codes]) · s_in,    s = 1 + Σδ

The op makes W' in its forward and backward pass and keeps it in neither. Merging stores W' rounded once to the dtype
of W, and the merged layer then computes, to the last bit, what the unmerged one did in that dtype. Two cases agree up
to rounding only: a Conv1D, because its own product runs over a transposed weight; and an autocast to another 16-bit
dtype, which rounds the merged weight a second time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .. import ops
from ..clustered_weight import CodesDigest
from ..codes import ClusterSpec
from ..deltas import Delta, sum_deltas
from ..dense import weight_of, weight_shape
from ..placement import gathered
from .layer import ClusCompLayer, NewAdapter
from .units import root_mean_square

__all__ = ["ClusCompDenseLinear", "adapted_weight"]


def adapted_weight(dense: torch.Tensor, codes: torch.Tensor, deltas: Sequence[Delta]) -> ops.PackedWeight:
    """A dense weight [out, in] with ΔC and the scales 1 + Σδ of `deltas` on its codes, as the ops take it."""
    out_features, in_features = dense.shape
    delta = sum_deltas(deltas, in_features=in_features)
    scale_in, scale_out = (None if change is None else 1 + change for change in (delta.scale_in, delta.scale_out))
    return ops.PackedWeight(codes, delta.codebook, out_features, scale_in, scale_out, dense)


class ClusCompDenseLinear(ClusCompLayer, nn.Module):
    """An adapter on a dense weight: `W' = (W + ΔC[codes]) · (1 + δ)`. The frozen `codes` are shared by all
    adapters.
    """

    base_layer: nn.Linear | Conv1D

    def __init__(
        self,
        base_layer: nn.Linear | Conv1D,
        adapter: NewAdapter,
        device: torch.device,
        spec: ClusterSpec,
        codes: torch.Tensor | None,
    ) -> None:
        nn.Module.__init__(self)
        out_features, in_features = weight_shape(base_layer)
        ClusCompLayer.__init__(self, base_layer, in_features, out_features, device)
        if codes is None:  # to be loaded
            codes = torch.zeros(in_features, spec.code_bytes(out_features), dtype=torch.uint8, device=device)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self._digest = CodesDigest()
        # A dense weight takes scales for nothing, so they train unless the config says no.
        self._spec = ClusterSpec(spec.group_size, spec.num_clusters, 1, True, True)
        self._active_adapter = adapter.name
        self.update_layer(adapter)

    def base_spec(self) -> ClusterSpec:
        return self._spec

    def fingerprint(self) -> str | None:
        return self._digest.of(self.codes, self.out_features, self._spec)

    def base_rms(self) -> float:
        weight = self.base_tensor("weight")
        assert weight is not None
        with gathered(weight):
            return root_mean_square(weight)

    def carried(self) -> dict[str, torch.Tensor]:
        return {"codes": self.codes}

    def stored_bytes(self) -> int:
        """Bytes of the dense weight, which merging does not change."""
        return self.in_features * self.out_features * self.base_layer.weight.element_size()

    def _adapted(self, dense: torch.Tensor, adapter_names: list[str]) -> ops.PackedWeight:
        """The dense weight [out, in] with the deltas of the given adapters, as the ops take it."""
        return adapted_weight(dense, self.codes, self.deltas(adapter_names))

    def merged_values(self, adapter_names: list[str]) -> dict[str, torch.Tensor | None]:
        weight = self.base_tensor("weight")
        assert weight is not None
        is_conv1d = isinstance(self.base_layer, Conv1D)
        merged = ops.decode(self._adapted(weight.t() if is_conv1d else weight, adapter_names), weight.dtype)
        merged = merged.t().contiguous() if is_conv1d else merged
        return {"weight": nn.Parameter(merged, requires_grad=self.base_layer.weight.requires_grad)}

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The layer with the active adapters for x [..., in]: [..., out]."""
        if self._runs_as_base():
            return self.base_layer(x, *args, **kwargs)
        self.check_arrival(self.active_adapters)
        return ops.linear(x, self._adapted(weight_of(self.base_layer), self.active_adapters), self.base_layer.bias)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """What PEFT leaves in place of this layer: the dense layer."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            self.forget_unmerged()  # or the model's weights would be in memory twice
        return self.base_layer

    def __repr__(self) -> str:
        return "cluscomp." + nn.Module.__repr__(self)
