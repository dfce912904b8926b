"""A run on the meta device, where tensors have shapes and no bytes, and the ledger of tensors that come and go there.

Two things are put in by hand: fused attention, of which torch knows no shapes-only form, and what ops of this package
hold while they run, which no dispatcher sees.
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

TILE_BYTES = {"cuda": 1 << 22, "cpu": 1 << 23}  # of an op, beside the decoded weight and its table of sums


class Mark(NamedTuple):
    """A moment of a dry run: bytes that live, and the most since the mark before."""

    name: str
    live: int
    peak: int


class Ledger(TorchDispatchMode):
    """Counts the bytes of tensors that ops make, until they are gone; tensors from elsewhere count nothing."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.live = self.hidden = 0
        self.marks: list[Mark] = []
        self._device, self._peak, self._closed = device, 0, False
        self._due: str | None = None
        self._known: dict[int, weakref.ref] = {}

    def mark(self, name: str, later: bool = False) -> None:
        """Notes a moment: now, or `later`, when whoever called has let go of what it gave."""
        self._settle()
        self._due = name
        if not later:
            self._settle()

    def _settle(self) -> None:
        if self._due is not None:
            self.marks.append(Mark(self._due, self.live, self._peak))
            self._peak, self._due = self.live, None

    def close(self) -> None:
        """What is gone after this stays counted."""
        self._closed = True

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        self._settle()
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            # Models ask whether all is as usual (no padding, no packing): it is. Numbers, of positions, are small.
            return args[0].dtype == torch.bool
        self._see((args, kwargs), own=False)
        result = func(*args, **kwargs)
        self._see(result, own=True)
        self._peak = max(self._peak, self.live + _scratch(func, args, self._device))
        return result

    def _see(self, tree: Any, own: bool) -> None:
        for tensor in tree_leaves(tree):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in self._known:
                    size = storage.nbytes() if own else 0
                    self._known[id(storage)] = weakref.ref(storage, partial(self._forget, id(storage), size))
                    self.live += size

    def _forget(self, key: int, size: int, _: Any) -> None:
        del self._known[key]
        if not self._closed:
            self.live -= size


def _scratch(func: Any, args: tuple, device: str) -> int:
    """Bytes that an op of this package holds while it runs, and that no dispatcher sees."""
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
    """Shapes of fused attention, and what it keeps."""

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
    """Puts [`_Attention`] in the place of torch's: on the meta device torch chooses the one with all scores."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            named = [kwargs[name] for name in ("query", "key", "value") if name in kwargs]
            return _Attention.apply(*[*args, *named][:3])
        return func(*args, **kwargs)
