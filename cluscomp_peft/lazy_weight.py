"""The `weight` of layers that have none: it answers what it is at no cost, and is decoded when something computes.

Model code asks a layer for its weight's dtype or device (T5), or computes with the weight instead of calling the layer
(Mamba). The first must not decode a matrix, and must hear the dtype of the model, not that of a codebook; the second
must get the right numbers or an error, never a weight without its adapters. `nn.TransformerEncoder`, whose fast path
reads weights and calls no layer, leaves that path where it finds a tensor that wants to see its calls.

    layer.weight.dtype, .device, .shape        nothing happens
    x @ layer.weight                           what `make` returns, or raises, takes its place
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

__all__ = ["LazyWeight"]


class LazyWeight(torch.Tensor):
    """A tensor without memory that stands for one which `make()` returns.

    Args:
        shape, dtype, device: What it answers.
        make (`Callable`): Called by whatever needs numbers; gives them in that shape and dtype, or raises.
    """

    _make: Callable[[], torch.Tensor]

    @staticmethod
    def __new__(
        cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, make: Callable[[], torch.Tensor]
    ) -> LazyWeight:
        weight = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        weight._make = make
        return weight

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        # Without one of its own a subclass passes for a tensor that fast paths may read.
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        args, kwargs = tree_map_only(LazyWeight, lambda weight: weight._make(), (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, **kwargs: Any) -> str:  # torch's own would decode
        return f"LazyWeight(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"
