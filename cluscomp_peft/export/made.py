"""The tensors of a dense model that are not in a checkpoint as they are, but are made of what is there.

up_proj.weight              [out, in]        of one clustered layer, or one that an adapter changes
experts.gate_up_proj        [E, out, in]     of all experts of a mixture, which lie there one by one
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..dense import is_dense_linear, weight_shape
from ..embedding import is_dense_embedding
from ..expert_weights import layer_name
from ..experts import ExpertStack

__all__ = ["Layer", "Made", "tensors_made"]


class Layer(NamedTuple):
    """A layer of a dense model: its name, and its weight [out, in]."""

    name: str
    shape: tuple[int, int]


class Made(NamedTuple):
    """A tensor of the dense model that is made instead of read.

    Args:
        name (`str`): Of it in the model.
        layers (`list[Layer]`): Whose weight it is: one, or all experts of a stack.
        transposed (`bool`): It holds a weight as [in, out].
        stacked (`bool`): It is [E, …], the weights of experts.
    """

    name: str
    layers: list[Layer]
    transposed: bool
    stacked: bool

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.layers[0].shape[::-1] if self.transposed else self.layers[0].shape
        return (len(self.layers), *shape) if self.stacked else shape

    def of(self, weights: Iterable[torch.Tensor]) -> torch.Tensor:
        """The tensor, of the weight [out, in] of each layer."""
        parts = [weight.t() if self.transposed else weight for weight in weights]
        return torch.stack(parts) if self.stacked else parts[0].contiguous()


def tensors_made(model: nn.Module, stacks: Iterable[ExpertStack], changed: Sequence[str]) -> list[Made]:
    """The tensors that hold the weights of layers.

    Args:
        model (`nn.Module`): Without weights, its experts taken apart.
        stacks: What was taken apart.
        changed: Names of layers.
    """
    found, experts = [], set()
    for stack in stacks:
        names = [layer_name(stack.name, index) for index in range(len(getattr(stack.module, stack.key)))]
        experts |= {*names}
        if not {*names}.isdisjoint(changed):
            layers = [_layer(model, name) for name in names]
            found.append(Made(stack.name, layers, bool(stack.transposed), stacked=True))
    for name in changed:
        if name not in experts:
            conv1d = isinstance(model.get_submodule(name), Conv1D)
            found.append(Made(f"{name}.weight", [_layer(model, name)], conv1d, stacked=False))
    return found


def _layer(model: nn.Module, name: str) -> Layer:
    module = model.get_submodule(name)
    assert is_dense_linear(module) or is_dense_embedding(module)
    return Layer(name, weight_shape(module))
