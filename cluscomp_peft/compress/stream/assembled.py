"""Matrices of single experts, read from a checkpoint that stores them in other pieces.

A checkpoint of a mixture holds what its authors stored: gate, up and down of each expert by themselves (most), or all
experts in one tensor (Llama 4, gpt-oss). transformers says by its converters what becomes of which tensors; here they
are run for one expert at a time, so that no more than its pieces are in memory.

    …block_sparse_moe.experts.3.w1.weight ┐  stack, concatenate     …mlp.experts.3.gate_up_proj.weight
    …block_sparse_moe.experts.3.w3.weight ┘  (transformers')   ──►  [out, in], a name of no file
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...expert_weights import layer_name
from ...experts import ExpertStack, fused_stacks
from ...upstream.transformers import convert, sources_of

__all__ = ["Assembly", "assemblies_of"]

_NUMBERS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Assembly:
    """How the matrix of one expert is made of a checkpoint's tensors.

    Args:
        parameter (`str`): Of the model, that holds all experts.
        converter (`Any`): transformers' of that parameter; None if it is stored as it is.
        parts (`dict[str, list[str]]`): Keys that it takes for this expert, by the converter's pattern.
        row (`int`, *optional*): The expert's place in tensors of all experts; None if the keys are its own.
        matrix (`tuple[int, int]`): Of the parameter.
        transposed (`bool`): The parameter holds a matrix as [in, out].
        config (`Any`): Of the model.
    """

    parameter: str
    converter: Any
    parts: dict[str, list[str]]
    row: int | None
    matrix: tuple[int, int]
    transposed: bool
    config: Any

    @property
    def keys(self) -> list[str]:
        """Of the checkpoint."""
        return [key for keys in self.parts.values() for key in keys]

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]"""
        return self.matrix[::-1] if self.transposed else self.matrix

    def read(self, source: Callable[[str, int | None], torch.Tensor]) -> torch.Tensor:
        """The weight [out, in], where `source` reads a tensor, or of a tensor [E, …] one row as [1, …]."""
        tensors = {pattern: [source(key, self.row) for key in keys] for pattern, keys in self.parts.items()}
        if self.converter is None:
            (value,) = next(iter(tensors.values()))
        else:
            value = convert(self.converter, self.parameter, tensors, (1, *self.matrix), self.config)
        if tuple(value.shape) != (1, *self.matrix):
            raise ValueError(
                f"an expert of {self.parameter} is made to {list(value.shape)} from {', '.join(self.keys)}, but the "
                f"model wants {[1, *self.matrix]}; config.json belongs to another model."
            )
        return value[0].t() if self.transposed else value[0]


def assemblies_of(
    model: nn.Module, keys: dict[str, tuple[torch.dtype, tuple[int, ...]]]
) -> tuple[dict[str, Assembly], dict[str, str]]:
    """How every expert of a model is read.

    Args:
        model: As its class makes it, experts fused.
        keys: Of the checkpoint, with dtype and shape.

    Returns:
        Name of an expert's weight to its [`Assembly`], and name of a parameter whose experts cannot be read one by
        one to the reason.
    """
    stacks = [stack for stack in fused_stacks(model) if stack.transposed is not None]
    if not stacks:
        return {}, {}
    sources = sources_of(model, keys)
    found: dict[str, Assembly] = {}
    reasons: dict[str, str] = {}
    for stack in stacks:
        converter, parts = sources.get(stack.name, (None, {}))
        reason = _reason(stack, parts, keys)
        if reason is not None:
            reasons[stack.name] = reason
            continue
        experts, *matrix = stack.shape
        for index in range(experts):
            own = {pattern: [names[index]] for pattern, names in parts.items() if len(names) == experts}
            found[f"{layer_name(stack.name, index)}.weight"] = Assembly(
                stack.name,
                converter,
                own or parts,
                None if own else index,
                (matrix[0], matrix[1]),
                bool(stack.transposed),
                model.config,
            )
    return found, reasons


def _reason(
    stack: ExpertStack, parts: dict[str, list[str]], keys: dict[str, tuple[torch.dtype, tuple[int, ...]]]
) -> str | None:
    """Why the experts of a parameter cannot be read one by one; None if they can."""
    names = [name for group in parts.values() for name in group]
    experts = stack.shape[0]
    if not names:
        like = sorted(key for key in keys if key.startswith(stack.name))
        holds = f"it holds {', '.join(like)}, a packed format" if like else "its experts have other names or a format"
        return f"the checkpoint lacks it: {holds} that is not read"
    odd = [name for name in names if keys[name][0] not in _NUMBERS]
    if odd:
        return f"{odd[0]} is {str(keys[odd[0]][0]).removeprefix('torch.')}, which takes scales to be read"
    counts = {len(group) for group in parts.values()}
    if counts == {experts}:
        return None
    if counts == {1} and all(keys[name][1][:1] == (experts,) for name in names):
        return None
    return f"it is made of {len(names)} tensors, not of one or more for each of its {experts} experts"
