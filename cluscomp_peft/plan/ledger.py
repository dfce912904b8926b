"""Counting memory without taking any: a model runs on the meta device, and a ledger counts the bytes of its tensors.

Tensors on the meta device have shapes and no data. Two things cannot be seen there and are put in by hand: torch's
fused attention, which on that device falls back to one that makes all scores, and the memory that the ops of this
package take inside a call.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["TILE_BYTES", "FusedAttention", "Ledger", "Mark"]

# Of the fp32 tiles that an op of this package works on, beside the decoded weight and the gradient of the codebook.
TILE_BYTES = {"cuda": 1 << 22, "cpu": 1 << 23}


class Mark(NamedTuple):
    """A moment of a dry run: the bytes that are held then, and the most that were held since the mark before it."""

    name: str
    live: int
    peak: int


class Ledger(TorchDispatchMode):
    """Counts the bytes of the tensors that ops make, from then until they are freed.

    Tensors that existed before, such as parameters, count nothing.

    Attributes:
        live (`int`): Bytes that are held now.
        hidden (`int`): Bytes of a block's output, which whoever runs the model writes down here.
        marks (`list[Mark]`): The moments that were marked.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.live = self.hidden = 0
        self.marks: list[Mark] = []
        self._device, self._peak, self._closed = device, 0, False
        self._due: str | None = None
        self._known: dict[int, weakref.ref] = {}

    def mark(self, name: str, later: bool = False) -> None:
        """Marks this moment or, if `later`, the one before the next op. By then the caller of a hook has freed what it
        handed over, which would still count now."""
        self._write_mark()
        self._due = name
        if not later:
            self._write_mark()

    def _write_mark(self) -> None:
        """Writes the mark that is due, if there is one."""
        if self._due is not None:
            self.marks.append(Mark(self._due, self.live, self._peak))
            self._peak, self._due = self.live, None

    def close(self) -> None:
        """From here on `live` stays as it is when tensors are freed."""
        self._closed = True

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        self._write_mark()
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            # The model asks for a value, and there is none. A bool asks whether the mask can be left out (no padding,
            # no packing): True. A number is a position: 0.
            return args[0].dtype == torch.bool
        self._register((args, kwargs), counted=False)
        result = func(*args, **kwargs)
        self._register(result, counted=True)
        self._peak = max(self._peak, self.live + _scratch(func, args, self._device))
        return result

    def _register(self, tree: Any, counted: bool) -> None:
        """Takes in the storages that are new; `counted`: with their bytes, else with none."""
        for tensor in tree_leaves(tree):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in self._known:
                    size = storage.nbytes() if counted else 0
                    self._known[id(storage)] = weakref.ref(storage, partial(self._forget, id(storage), size))
                    self.live += size

    def _forget(self, key: int, size: int, _: Any) -> None:
        del self._known[key]
        if not self._closed:
            self.live -= size


def _scratch(func: Any, args: tuple, device: str) -> int:
    """Bytes that an op of this package takes inside its call; 0 for other ops."""
    if getattr(func, "namespace", "") != "cluscomp":
        return 0
    name = func._schema.name.removeprefix("cluscomp::")
    if name == "linear":
        x, codes, out_features = args[0], args[1], args[-1]
        weights = codes.shape[0] * out_features
        return weights * x.element_size() + min(TILE_BYTES[device], 16 * weights)
    if name == "codebook_grad":
        x, grad_output, _, codebook = args[:4]
        return 12 * codebook.numel() + min(TILE_BYTES[device], 16 * x.shape[1] * grad_output.shape[1])
    return min(TILE_BYTES[device], 16 * args[0].shape[0] * args[5]) if name == "decode" else 0


class _Attention(torch.autograd.Function):
    """Tensors of fused attention's shapes: its output, and what it keeps for backward, which are q, k, v, the output
    and a sum of exponentials for each row."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        batch, heads, length = query.shape[:3]
        output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        sums = query.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors[:3])


class FusedAttention(TorchFunctionMode):
    """Puts [`_Attention`] in the place of torch's attention, which on the meta device makes all scores."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            named = [kwargs[name] for name in ("query", "key", "value") if name in kwargs]
            return _Attention.apply(*[*args, *named][:3])
        return func(*args, **kwargs)
