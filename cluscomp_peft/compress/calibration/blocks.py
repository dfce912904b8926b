"""A model of which one block at a time is in memory.

    tokens ─► stem ─► block 0 ─► block 1 ─► … ─► tail ─► logits
              └──────── the model's own forward ───────┘

Stem and tail are not taken apart: the model's own `forward` runs with its blocks muted, each noting the arguments it
is called with and handing its input on; for the tail every block answers with what the tail shall see. So position
embeddings, masks of sliding windows, embedding scales and softcaps are whatever the model makes of them, for any
`transformers` causal language model whose blocks stand in one `nn.ModuleList`; nothing is keyed on family names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...dense import is_dense_linear, weight_of
from ...upstream.transformers import tied_weights
from ..stream.source import DenseCheckpoint
from .errors import CannotCalibrate

__all__ = ["BlockModel", "find_blocks"]

_MOST_PARTS = 4  # of the tuples that blocks return


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """Name and list of the blocks: the outermost `nn.ModuleList` that holds most of the linear weights, if any.

    Of a model that sees or hears too, only what continues text is looked at: a tower for images may hold more.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    inside = {id(module) for module in decoder.modules()}
    best: tuple[int, str, nn.ModuleList] | None = None
    for name, module in [entry for entry in lists if id(entry[1]) in inside] or lists:
        held = sum(weight_of(layer).numel() for layer in module.modules() if is_dense_linear(layer))
        if held and (best is None or held > best[0]):
            best = (held, name, module)
    return None if best is None else best[1:]


class BlockModel:
    """A causal language model on the meta device whose blocks are filled from a checkpoint one at a time.

    Args:
        model (`nn.Module`): Parameters on the meta device, buffers real.
        source ([`DenseCheckpoint`]): Where they come from.
        dtype (`torch.dtype`): Of parameters and activations.
        device (`torch.device`): Where blocks run; activations are given and returned on it.

    Raises:
        CannotCalibrate: If the model has no list of blocks, or blocks that share all their weights.
        ValueError: If the checkpoint lacks a parameter.
    """

    def __init__(self, model: Any, source: DenseCheckpoint, dtype: torch.dtype, device: torch.device) -> None:
        found = find_blocks(model)
        if found is None:
            raise CannotCalibrate(
                f"{type(model).__name__} has no list of blocks with linear layers, so calibration cannot go block by "
                "block"
            )
        self.prefix, self.blocks = found
        self.model, self.source, self.dtype, self.device = model.eval(), source, dtype, device
        self._refuse_shared_blocks()
        self._calls: list[dict[torch.Size, tuple[tuple, dict]]] = [{} for _ in self.blocks]  # by [batch, length]
        self._parts = 0  # of the tuple that blocks return, the first of which is their output; 0: the output itself
        self._outside()

    def __len__(self) -> int:
        return len(self.blocks)

    def name(self, index: int) -> str:
        return f"{self.prefix}.{index}"

    def _refuse_shared_blocks(self) -> None:
        shared = sum(
            not any(self.source.find(f"{self.name(index)}.{name}") for name in block.state_dict())
            for index, block in enumerate(self.blocks)
        )
        if shared:
            raise CannotCalibrate(
                f"{self.source.folder} has no weights of its own for {shared} blocks, which share those of others"
            )

    def _outside(self) -> None:
        """Fills everything that is in no block."""
        inside = f"{self.prefix}."
        for name, module in self.model.named_modules():
            if f"{name}.".startswith(inside):
                continue
            for key, parameter in list(module._parameters.items()):
                if parameter is not None:
                    module._parameters[key] = self._read(f"{name}.{key}" if name else key, parameter)
        self.model.tie_weights()
        for name, buffer in list(self.model.named_buffers()):
            owner = self.model.get_submodule(name.rpartition(".")[0])
            key = self.source.find(name)
            value = buffer if key is None else self.source.read(key)
            owner._buffers[name.rpartition(".")[2]] = value.to(self.device)

    def _read(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        # Of weights that are tied, a checkpoint holds one, under either name.
        tied = tied_weights(self.model)
        names = [name, *(source for target, source in tied.items() if target == name)]
        names += [target for target, source in tied.items() if source == name]
        key = next((key for key in map(self.source.find, names) if key is not None), None)
        if key is None:
            raise ValueError(
                f"{self.source.folder} lacks {name}; it is incomplete, or stores this model under other names: load "
                "it once with from_pretrained and save it with save_pretrained()."
            )
        if self.source.shape(key) != tuple(parameter.shape):
            raise ValueError(
                f"{key} of {self.source.folder} has the shape {self.source.shape(key)}, the model wants "
                f"{tuple(parameter.shape)}; config.json belongs to another model."
            )
        return nn.Parameter(self.source.read(key, self.dtype).to(self.device), requires_grad=False)

    @contextmanager
    def loaded(self, index: int) -> Iterator[nn.Module]:
        """Block `index` with its dense weights; afterwards it is as it was before, whatever was put into it."""
        block = self.blocks[index]
        modules = dict(block.named_modules())
        kept = {name: dict(module._parameters) for name, module in modules.items()}
        try:
            for name, module in modules.items():
                for key, parameter in kept[name].items():
                    if parameter is not None:
                        full = f"{self.name(index)}.{name}.{key}" if name else f"{self.name(index)}.{key}"
                        module._parameters[key] = self._read(full, parameter)
            yield block
        finally:
            for name, module in modules.items():
                if name and block.get_submodule(name) is not module:
                    block.set_submodule(name, module)
                module._parameters.update(kept[name])

    @contextmanager
    def replaced(self, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """While this lasts, layers outside of the blocks have other weights [out, in], by name, and so have those that
        are tied to them."""
        kept = []
        try:
            for name, weight in weights.items():
                layer = self.model.get_submodule(name)
                own, turned = layer._parameters["weight"], isinstance(layer, Conv1D)
                weight = (weight.t() if turned else weight).to(self.device, self.dtype)
                other = nn.Parameter(weight, requires_grad=False)
                for module in self.model.modules():
                    if module._parameters.get("weight") is own:
                        kept.append((module, own))
                        module._parameters["weight"] = other
            yield
        finally:
            for module, own in kept:
                module._parameters["weight"] = own

    def stem(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the first block is given for tokens [batch, length]: [batch, length, hidden].

        Raises:
            CannotCalibrate: If blocks are not called in turn, or with arguments that depend on the text.
        """
        # Blocks return their output, or a tuple with it first; only what the model makes of it tells.
        for self._parts in range(_MOST_PARTS + 1):
            first = self._first_input(tokens)
            if first is not None:
                return first.to(self.dtype)
        raise CannotCalibrate(
            f"{type(self.model).__name__} does something between its blocks, or does not call them in turn, so "
            "calibration cannot go block by block"
        )

    def _first_input(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """What the first block is given; None if the others are not given what the one before them returned."""
        seen: list[torch.Tensor] = []

        def note(index: int, args: tuple, kwargs: dict) -> Any:
            values = args[0] if args else kwargs.pop("hidden_states")
            if index != len(seen) or (seen and values is not seen[0] and not _same(values, seen[0])):
                raise _Unlike
            seen.append(values)
            call = (args[1:], kwargs)
            known = self._calls[index].setdefault(tokens.shape, call)
            if not _equal(known, call):
                raise CannotCalibrate(
                    f"blocks of {type(self.model).__name__} take arguments that depend on the text, which calibration "
                    "block by block cannot give them"
                )
            if index == len(self.blocks) - 1:
                raise _Done
            return self._returned(values)

        try:
            self._muted(tokens, note)
        except _Done:
            return seen[0]
        except _Unlike:
            pass
        except ValueError as error:
            if "to unpack" not in str(error):  # a tuple of another length
                raise
        return None

    def _returned(self, values: torch.Tensor) -> Any:
        """What a block would return: of the rest of its tuple (attention weights, a state) there is nothing."""
        return (values, *[None] * (self._parts - 1)) if self._parts else values

    def logits(self, tokens: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [batch, length, vocabulary] where the last block returns `hidden`; every block has run before."""
        return self._muted(tokens, lambda *_: self._returned(hidden))

    def loss(self, tokens: torch.Tensor, hidden: torch.Tensor) -> float:
        """Next-token loss in nats, summed over the predicted tokens.

        Args:
            tokens (`torch.Tensor`): [batch, length].
            hidden (`torch.Tensor`): [batch, length, hidden] behind the last block, on any device.
        """
        total = 0.0
        for row, values in zip(tokens, hidden, strict=True):  # one at a time: logits are large
            logits = self.logits(row[None], values[None].to(self.device))[0, :-1].float()
            total += float(F.cross_entropy(logits, row[1:].to(logits.device), reduction="sum"))
        return total

    def _muted(self, tokens: torch.Tensor, answer: Callable[[int, tuple, dict], Any]) -> torch.Tensor:
        own = [block.__dict__.get("forward") for block in self.blocks]
        for index, block in enumerate(self.blocks):
            block.forward = lambda *args, index=index, **kwargs: answer(index, args, kwargs)  # type: ignore
        try:
            return self.model(input_ids=tokens.to(self.device), use_cache=False).logits
        finally:
            for block, forward in zip(self.blocks, own, strict=True):
                del block.__dict__["forward"]
                if forward is not None:
                    block.forward = forward  # type: ignore[method-assign]

    def run(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """The output of block `index`, which is loaded, for its input `hidden`."""
        args, kwargs = self._calls[index][hidden.shape[:2]]
        output = self.blocks[index](hidden, *args, **kwargs)
        self._parts = len(output) if isinstance(output, tuple) else 0
        return output[0] if isinstance(output, tuple) else output


class _Done(Exception):
    """Every block has been called."""


class _Unlike(Exception):
    """A block was given something else than what the one before it returned."""


def _same(one: Any, other: torch.Tensor) -> bool:
    return isinstance(one, torch.Tensor) and torch.equal(one, other)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(other, torch.Tensor):
        return _same(one, other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(_equal(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    return True
