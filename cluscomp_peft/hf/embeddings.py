"""Clustered embeddings and heads, put into a model of transformers and taken out of it again.

before loading     the layers that the layout names, and those tied to them, become empty clustered ones; what was tied
                   by `weight` is tied by codes, codebook and scales, so that the loader ties them as it always does
on the fly         the dense weight is loaded and tied, then clustered; the layers are replaced when all is loaded,
                   because only then it is known what is tied
dequantize         dense layers come back, and are tied by `weight`
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from accelerate.hooks import add_hook_to_module
from torch import nn

from ..clustered_weight import BASE_TENSORS
from ..compress.budget.embeddings import Vocabulary
from ..embedding import clustered_layer, tied_layer
from ..linear import ClusteredLinear
from ..upstream.accelerate import hook_of
from ..upstream.transformers import tie_other_names, tie_weights_again

__all__ = ["forget_embeddings", "place_embedding"]


def place_embedding(model: nn.Module, entry: Vocabulary, made: ClusteredLinear) -> None:
    """Puts a clustered embedding or head in the place of a dense one, and of every layer that is tied to it.

    Args:
        model: Of transformers, with the dense layers that `entry` names.
        entry ([`Vocabulary`]): Which layers.
        made ([`ClusteredLinear`]): Their weight in codes, or empty; not to be used any more.
    """
    if entry.tied:
        parts = [name for name in BASE_TENSORS if made._parameters[name] is not None]
        tie_other_names(model, {f"{name}.weight" for name in entry.tied}, parts)
    first = clustered_layer(entry.module, made)
    for name in (entry.name, *entry.tied):
        dense = model.get_submodule(name)
        layer = first if name == entry.name else tied_layer(dense, first)
        model.set_submodule(name, layer)
        hook = hook_of(dense)
        if hook is not None:  # of a model on several devices, which has them before its quantizer is asked again
            add_hook_to_module(layer, hook)
    model.resize_token_embeddings = MethodType(_refuse_resizing, model)


def forget_embeddings(model: nn.Module) -> None:
    """Makes a model that is dense again what it was: its weights are tied, and it can be resized."""
    if model.__dict__.pop("resize_token_embeddings", None) is not None:
        tie_weights_again(model)


def _refuse_resizing(
    model: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
) -> nn.Module:
    """In place of transformers' own, which would take apart what shares its tensors."""
    embedding = model.get_input_embeddings()
    rows, multiple = embedding.weight.shape[0], pad_to_multiple_of or 1
    wanted = -(-(new_num_tokens or rows) // multiple) * multiple
    if wanted != rows:
        raise ValueError(
            f"the embedding of {rows} tokens cannot be resized to {wanted}: it is clustered. Resize the dense model "
            "and compress that, or compress without --embeddings; model.dequantize() makes this one dense."
        )
    return embedding
