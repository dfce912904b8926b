"""What the layers of one block are given: x in the dense block, x̂ in the compressed one, and moments of both.

The dense block runs once, for its output is the target of the block: on the way the inputs of its layers are kept, in
the room that there is. The compressed block has to run once for each group of layers that read the same input, because
what a group is given depends on the groups before it; no run goes on behind the group in question.

The experts of a mixture read different inputs, but none depends on another, so all matrices of a kind are one group
that is watched in one run. Which tokens an expert is given may differ between the two blocks: their inputs are
compared for the tokens that both send there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import nn

from ...expert_weights import Expert
from ...upstream.transformers_experts import has_implementations
from .blocks import BlockModel

__all__ = ["KEPT_BYTES", "BlockInputs", "Moments", "Rows", "watched"]

KEPT_BYTES = 1 << 28  # of inputs of the dense block; what does not fit is computed again
_PANELS, _PANEL = 4, 128  # parts of x̂ᵀ x̂, and channels of one at least


class Rows(NamedTuple):
    """What an expert is given in a batch: values [rows, in] fp32, and tokens [rows] int64, None if it is not known."""

    values: torch.Tensor
    tokens: torch.Tensor | None


class Moments:
    """E[x̂ x̂ᵀ], and E[(x − x̂) x̂ᵀ] as long as both blocks give a layer the same tokens; sums until `means`."""

    def __init__(self) -> None:
        self.hessian: torch.Tensor | None = None
        self.drift: torch.Tensor | None = None
        self.tokens = 0
        self.unlike = False

    def add(self, dense: torch.Tensor, compressed: torch.Tensor) -> None:
        """Inputs [tokens, in] fp32 of the dense and the compressed layer."""
        self._add_hessian(compressed)
        if dense.shape != compressed.shape:
            self.unlike = True
        if not self.unlike:
            self._add_drift(dense, compressed)

    def add_rows(self, dense: Rows | None, compressed: Rows) -> None:
        """Inputs of an expert; tokens that the dense block sends elsewhere count as if it gave them the same."""
        self._add_hessian(compressed.values)
        if compressed.tokens is None or (dense is not None and dense.tokens is None):
            self.unlike = True
        elif dense is not None and dense.tokens is not None and len(dense.tokens) and len(compressed.tokens):
            places = torch.full((int(max(dense.tokens.max(), compressed.tokens.max())) + 1,), -1)
            places[dense.tokens] = torch.arange(len(dense.tokens))
            found = places[compressed.tokens]
            self._add_drift(dense.values[found[found >= 0]], compressed.values[found >= 0])

    def pool(self, other: Moments) -> None:
        """Takes the inputs of another expert as well."""
        if other.hessian is not None:
            self.hessian = other.hessian.clone() if self.hessian is None else self.hessian.add_(other.hessian)
            self.tokens += other.tokens

    def _add_hessian(self, compressed: torch.Tensor) -> None:
        width = compressed.shape[1]
        if self.hessian is None:
            self.hessian = compressed.new_zeros(width, width)
        # Of a symmetric product the part below the diagonal says all.
        step = max(_PANEL, -(-width // _PANELS))
        for start in range(0, width, step):
            part = slice(start, start + step)
            self.hessian[start:, part].addmm_(compressed[:, start:].t(), compressed[:, part])
        self.tokens += len(compressed)

    def _add_drift(self, dense: torch.Tensor, compressed: torch.Tensor) -> None:
        if self.drift is None:
            self.drift = compressed.new_zeros(compressed.shape[1], compressed.shape[1])
        self.drift.addmm_((dense - compressed).t(), compressed)

    def means(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """E[x̂ x̂ᵀ] and E[(x − x̂) x̂ᵀ], [in, in] fp32; None where nothing was seen, or other tokens."""
        if self.hessian is None:
            return None, None
        hessian = (self.hessian.tril() + self.hessian.tril(-1).t()).div_(self.tokens)
        return hessian, None if self.drift is None or self.unlike else self.drift / self.tokens


class BlockInputs:
    """Inputs of the layers of block `index`, which is loaded.

    Args:
        model ([`BlockModel`]): The block has its dense weights.
        index (`int`): Of the block.
        layers: Layer name to dense layer.
        batches: Inputs of the dense block, [batch, length, hidden].
        fitted (`int`): The first so many batches are observed.
    """

    def __init__(
        self,
        model: BlockModel,
        index: int,
        layers: Mapping[str, nn.Module],
        batches: Sequence[torch.Tensor],
        fitted: int,
    ) -> None:
        self.model, self.index, self.layers, self.batches, self.fitted = model, index, layers, batches, fitted
        self.groups: list[list[str]] = []
        self._calls: dict[str, int | None] = {}  # of each layer in a pass; None if it depends on the batch
        self._kept: dict[tuple[str, int], list[torch.Tensor]] = {}
        self._room = KEPT_BYTES
        # The module of the experts that a layer belongs to.
        self.owners = {name: owner for name in layers if (owner := _owner_of_expert(model.model, name)) is not None}

    def outputs(self) -> Iterator[torch.Tensor]:
        """Output of the dense block for each batch; when they are through, the groups are known."""
        groups: dict[Any, list[str]] = {}
        alive: list[torch.Tensor] = []  # so that no address is used twice
        for number, batch in enumerate(self.batches):
            calls = dict.fromkeys(self.layers, 0)

            def note(name: str, x: torch.Tensor, number: int = number, calls: dict[str, int] = calls) -> None:
                calls[name] += 1
                if name in self.owners:
                    groups.setdefault(self._kind(name), [])
                    return
                if number == 0 and calls[name] == 1:
                    alive.append(x)
                    groups.setdefault((x.data_ptr(), tuple(x.shape)), []).append(name)
                if number < self.fitted and any(names[:1] == [name] for names in groups.values()):
                    self._keep((name, number), calls[name], x)

            with watched(self.layers, note):
                output = self.model.run(self.index, batch.to(self.model.device))
            alive.clear()
            for name, count in calls.items():
                if self._calls.setdefault(name, count) != count:
                    self._calls[name] = None
            yield output
        for name in self.owners:
            groups.setdefault(self._kind(name), []).append(name)
        called = {name for names in groups.values() for name in names}
        self.groups = [*groups.values(), *([name] for name in self.layers if name not in called)]

    def _keep(self, place: tuple[str, int], call: int, x: torch.Tensor) -> None:
        if x.nbytes <= self._room and len(self._kept.get(place, ())) == call - 1:
            self._room -= x.nbytes
            self._kept.setdefault(place, []).append(x.detach())
        else:
            self._room += sum(part.nbytes for part in self._kept.pop(place, ()))

    def dense(self, name: str, batch: int) -> torch.Tensor | None:
        """Input [tokens, in] fp32 of a layer of the dense block, which is in place; None if it has none."""
        kept = self._kept.get((name, batch))
        if kept is not None:
            return _joined([x.flatten(0, -2).float() for x in kept])
        return self.now(name, self.batches[batch])

    def now(self, name: str, hidden: torch.Tensor) -> torch.Tensor | None:
        """Input [tokens, in] fp32 of a layer of the block as it is now; None if it has none."""
        seen: list[torch.Tensor] = []
        enough = self._calls.get(name)

        def note(name: str, x: torch.Tensor) -> None:
            seen.append(x.detach().flatten(0, -2).float())
            if len(seen) == enough:
                raise _Enough

        with watched({name: self.layers[name]}, note), suppress(_Enough):
            self.model.run(self.index, hidden.to(self.model.device))
        return _joined(seen) if seen else None

    def experts(self, names: Sequence[str], hidden: torch.Tensor) -> dict[str, Rows]:
        """Inputs of experts of one group in the block as it is now; those that are given nothing are left out."""
        owner = self.model.model.get_submodule(self.owners[names[0]])
        seen: dict[str, torch.Tensor] = {}
        routes: list[torch.Tensor] = []

        def begin(_: nn.Module, args: tuple, kwargs: dict) -> None:
            routes.extend(
                x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and not x.is_floating_point()
            )

        def end(*_: Any) -> None:
            raise _Enough

        handles = [owner.register_forward_pre_hook(begin, with_kwargs=True), owner.register_forward_hook(end)]
        try:
            layers = {name: self.layers[name] for name in names}
            with watched(layers, lambda name, x: seen.update({name: x.detach().float()})), suppress(_Enough):
                self.model.run(self.index, hidden.to(self.model.device))
        finally:
            for handle in handles:
                handle.remove()
        tokens = hidden.shape[:-1].numel()
        found = {}
        for name, x in seen.items():
            if has_implementations(owner):
                expert = int(name.split(".")[-2])
                found[name] = Rows(
                    x, (routes[0].reshape(-1) == expert).nonzero().flatten().cpu() // routes[0].shape[-1]
                )
            elif len(x) == tokens:  # every expert is given all tokens, most of them as zeros
                used = (x != 0).any(1).nonzero().flatten()
                found[name] = Rows(x[used], used.cpu())
            else:
                found[name] = Rows(x, None)
        return {name: rows for name, rows in found.items() if len(rows.values)}

    def _kind(self, name: str) -> tuple[str, str]:
        """What the experts of a group have in common: their module, and which matrix it is."""
        return self.owners[name], name.rpartition(".")[2]

    def forget(self, name: str) -> None:
        """Gives back what is kept of a layer."""
        for place in [place for place in self._kept if place[0] == name]:
            del self._kept[place]


def _owner_of_expert(model: nn.Module, name: str) -> str | None:
    """The name of the module whose expert a layer belongs to; None if it is that of no expert."""
    expert = name.rpartition(".")[0]
    return expert.rpartition(".")[0] if expert and isinstance(model.get_submodule(expert), Expert) else None


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Enough(Exception):
    """Ends a run whose rest is of no use."""


@contextmanager
def watched(layers: Mapping[str, nn.Module], note: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Calls `note` with the name and the input of each of the layers before it runs."""
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
