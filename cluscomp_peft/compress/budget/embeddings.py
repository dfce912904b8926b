"""The vocabulary of a model: its input embedding and its output head, which hold one weight where they are tied.

Found by what the model says of itself, never by names. Learned positions and types of tokens are other embeddings,
small ones, and stay dense; so does a head that is no linear layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ...clustered_weight import ClusteredWeight
from ...dense import is_dense_linear
from ...embedding import is_dense_embedding
from ...upstream.transformers import tied_weights

__all__ = ["Vocabulary", "head_owner", "vocabularies"]


@dataclass(frozen=True)
class Vocabulary:
    """A weight [vocabulary, hidden].

    Args:
        name (`str`): Of the layer under which it is stored.
        module (`nn.Module`): That layer.
        tied (`tuple[str]`): Names of the other layers that have the same weight.
    """

    name: str
    module: nn.Module
    tied: tuple[str, ...]


def vocabularies(model: nn.Module) -> list[Vocabulary]:
    """The weights of a model's input embedding and output head that can be clustered: one, two, or none.

    Args:
        model: Of transformers, dense or with clustered embeddings; its parameters may be on the meta device.

    Raises:
        ValueError: If the input embedding, or a layer that is tied to it, computes something else than rows or
            products of its weight.
    """
    names = {id(module): name for name, module in model.named_modules()}
    tied = tied_weights(model)
    found: dict[str, Vocabulary] = {}
    for what, module in (("input embedding", _asked(model, "input")), ("output head", _asked(model, "output"))):
        if module is None or id(module) not in names:
            continue
        name = names[id(module)]
        source = _owner(tied, name)
        if source in found:
            continue
        others = tuple(
            other
            for other, layer in model.named_modules()
            if other != source and _owner(tied, other) == source and _has_weight(layer)
        )
        layers = {one: model.get_submodule(one) for one in (source, *others)}
        strange = [one for one, layer in layers.items() if not _can_be_clustered(layer)]
        if strange and what == "output head":
            continue
        if strange:
            raise ValueError(
                f"the {what} of {type(model).__name__} cannot be clustered: {strange[0]}, a "
                f"{type(layers[strange[0]]).__name__}, holds its weight and computes something else with it. Leave "
                "out embeddings."
            )
        found[source] = Vocabulary(source, layers[source], others)
    return list(found.values())


def head_owner(model: nn.Module) -> str | None:
    """The layer under whose name the weight of the output head is stored: the head, or the embedding it is tied to."""
    head = _asked(model, "output")
    name = next((name for name, module in model.named_modules() if module is head), None)
    return None if name is None else _owner(tied_weights(model), name)


def _asked(model: nn.Module, which: str) -> nn.Module | None:
    ask = getattr(model, f"get_{which}_embeddings", None)
    try:
        return None if ask is None else ask()
    except NotImplementedError:
        return None


def _owner(tied: dict[str, str], name: str) -> str:
    """The layer under whose name the weight of a layer is stored."""
    for part in ("weight", "codes"):
        if f"{name}.{part}" in tied:
            return tied[f"{name}.{part}"].removesuffix(f".{part}")
    return name


def _has_weight(layer: nn.Module) -> bool:
    return isinstance(layer, ClusteredWeight) or layer._parameters.get("weight") is not None


def _can_be_clustered(layer: nn.Module) -> bool:
    return isinstance(layer, ClusteredWeight) or is_dense_embedding(layer) or is_dense_linear(layer)
