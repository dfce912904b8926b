"""Dense linear layers: which modules are some, and their weight as [out, in]."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .placement import shape_of

__all__ = ["LINEAR_CLASSES", "is_dense_linear", "weight_of", "weight_shape"]


# Subclasses of nn.Linear whose own `forward` computes x Wᵀ + b all the same.
LINEAR_CLASSES = ("transformers.models.falcon.modeling_falcon.FalconLinear",)


def is_dense_linear(module: nn.Module) -> bool:
    """Whether the module is a layer that can be clustered: an `nn.Linear`, a `Conv1D`, or one of `LINEAR_CLASSES`.

    Any other subclass of `nn.Linear` may mean something else by its weight: bitsandbytes' `Linear4bit` packs it.
    """
    kind = type(module)
    if kind in (nn.Linear, Conv1D):
        return True
    # Further parameters or buffers (the scales of an fp8 weight, say) change what the weight means.
    bare = module._parameters.keys() == {"weight", "bias"} and not module._buffers
    return f"{kind.__module__}.{kind.__qualname__}" in LINEAR_CLASSES and bare


def weight_of(module: nn.Module) -> torch.Tensor:
    """The weight of a dense linear layer as [out, in], a view."""
    return module.weight.t() if isinstance(module, Conv1D) else module.weight


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a dense linear layer, also while its weight is partitioned."""
    rows, columns = shape_of(module.weight)
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)
