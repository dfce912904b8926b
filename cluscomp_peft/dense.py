"""Dense linear layers: which modules are some, and their weight as [out, in]."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from .placement import shape_of

__all__ = ["is_dense_linear", "weight_of", "weight_shape"]


def is_dense_linear(module: nn.Module) -> bool:
    """Whether the module is a layer that can be clustered: `nn.Linear`, `Conv1D`, or Falcon's own linear layer.

    A subclass of `nn.Linear` may mean something else by its weight (bitsandbytes' `Linear4bit` packs it). It counts
    if it holds a weight and a bias alone, and has a `forward` of its own that computes x Wᵀ + b from them.
    """
    if type(module) in (nn.Linear, Conv1D):
        return True
    # Further parameters or buffers (the scales of an fp8 weight, say) change what the weight means.
    bare = isinstance(module, nn.Linear) and module._parameters.keys() == {"weight", "bias"} and not module._buffers
    return bare and _computes_linear(type(module))  # type: ignore[arg-type]


@functools.cache
def _computes_linear(kind: type[nn.Linear]) -> bool:
    """Whether a class's own `forward` computes x Wᵀ + b, found out by calling it with a stand-in for a layer."""
    if "forward" not in vars(kind):  # a class that inherits it differs in something else, its weight perhaps
        return False
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(size, generator=generator, device="cpu") for size in ((3, 5), (3,), (2, 4, 5)))
    for own_bias in (bias, None):
        layer = SimpleNamespace(weight=weight, bias=own_bias, in_features=5, out_features=3, training=False)
        try:
            result = kind.forward(layer, x)  # type: ignore[arg-type]
        except Exception:
            return False
        expected = functional.linear(x, weight, own_bias)
        if not torch.is_tensor(result) or result.shape != expected.shape or not torch.allclose(result, expected):
            return False
    return True


def weight_of(module: nn.Module) -> torch.Tensor:
    """The weight of a dense linear layer as [out, in], a view."""
    return module.weight.t() if isinstance(module, Conv1D) else module.weight


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a dense linear layer, also while its weight is partitioned."""
    rows, columns = shape_of(module.weight)
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)
