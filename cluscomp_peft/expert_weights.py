"""What stands where the 3-D parameter of experts was, once they are taken apart into layers (`experts.py`).

w[3]                            the matrix of one expert, as a tensor without memory
F.linear(x, w[3]), x @ w[3]     calls of that expert's layer, clustered, adapted or dense
torch.bmm(x, w)                 the same for all experts, one after another
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .lazy_weight import LazyWeight
from .upstream.transformers import mark_loaded

__all__ = ["Expert", "ExpertWeights", "layer_name"]

_PRODUCTS = (torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__)


class Expert(nn.Module):
    """The layers of one expert, by the names of the parameters that they come from. It is not called itself."""


class ExpertWeights:
    """Stands where a 3-D parameter was, for code that computes with the parameter of one expert, or with all.

    Args:
        module (`nn.Module`): That had the parameter, and has the experts' layers now.
        key (`str`): Of the parameter.
        transposed (`bool`): Whether code expects a matrix as [in, out].
    """

    def __init__(self, module: nn.Module, key: str, transposed: bool) -> None:
        self.module, self.key, self.transposed = module, key, transposed
        mark_loaded(self)  # or transformers fills it with random numbers

    @property
    def layers(self) -> list[nn.Module]:
        """The layer of each expert."""
        experts = (expert for expert in self.module._modules.values() if isinstance(expert, Expert))
        return [expert._modules[self.key] for expert in experts if self.key in expert._modules]  # type: ignore

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.layers), *self[0].shape))

    @property
    def ndim(self) -> int:
        return 3

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].weight.dtype  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        return self.layers[0].weight.device  # type: ignore[return-value]

    def dim(self) -> int:
        return 3

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: Any) -> ExpertMatrix:
        layer = self.module._modules[str(int(index) % len(self.layers))]._modules[self.key]  # type: ignore[union-attr]
        return ExpertMatrix.of(layer, self.transposed)  # type: ignore[arg-type]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """`torch.bmm(x, weights)` and `x @ weights` for x [E, tokens, in], expert by expert."""
        if func in (torch.bmm, torch.Tensor.bmm, *_PRODUCTS) and isinstance(args[1], cls) and args[1].transposed:
            layers = args[1].layers
            return torch.stack([layer(part) for layer, part in zip(layers, args[0].unbind(), strict=True)])
        raise NotImplementedError(
            f"experts in codes are computed with one by one or by torch.bmm, but this model calls {func.__name__}; "
            "leave them dense by naming other layers in target_modules."
        )


class ExpertMatrix(LazyWeight):
    """The matrix of one expert: products with it are calls of its layer, anything else decodes it."""

    _layer: nn.Module
    _transposed: bool

    @staticmethod
    def of(layer: nn.Module, transposed: bool) -> ExpertMatrix:
        weight: torch.Tensor = layer.weight  # type: ignore[assignment]
        shape = tuple(weight.shape)[::-1] if transposed else tuple(weight.shape)

        def make() -> torch.Tensor:
            plain = layer.weight
            plain = plain._make() if isinstance(plain, LazyWeight) else plain
            return plain.t() if transposed else plain  # type: ignore

        matrix = ExpertMatrix(shape, weight.dtype, weight.device, make)
        matrix._layer, matrix._transposed = layer, transposed
        return matrix

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if len(args) > 1 and isinstance(args[1], ExpertMatrix) and not isinstance(args[0], ExpertMatrix):
            matrix, bias = args[1], kwargs.get("bias", args[2] if len(args) > 2 else None)
            if func is F.linear and not matrix._transposed:
                y = matrix._layer(args[0])
                return y if bias is None else y + bias
            if func in _PRODUCTS and matrix._transposed:
                return matrix._layer(args[0])
        if func in (torch.Tensor.t, torch.t, torch.Tensor.T.__get__) and isinstance(args[0], ExpertMatrix):
            return ExpertMatrix.of(args[0]._layer, not args[0]._transposed)
        return super().__torch_function__(func, types, args, kwargs)


def layer_name(name: str, index: int) -> str:
    """Of the layer of one expert, for that of the parameter: experts.gate_up_proj, 3 → experts.3.gate_up_proj."""
    owner, _, key = name.rpartition(".")
    return f"{owner}.{index}.{key}" if owner else f"{index}.{key}"
