"""Which layers of a model are clustered unless the user says otherwise: the linear layers inside its blocks.

Layers are found by what they are and where they stand, never by a model family's names. What would be skipped silently
is refused by name: transformers keeps the experts of a mixture in 3-D parameters, 90 % of such a model's weights, and
a tool that looks for linear layers alone would leave them dense and call the model compressed. Here a model comes
with its experts taken apart into linear layers (`experts.py`), and parameters that could not be are refused.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList
from transformers.pytorch_utils import Conv1D

from ...dense import is_dense_linear, weight_shape
from ...expert_weights import layer_name
from ...experts import expert_modules, fused_stacks, stacks_apart
from ...linear import ClusteredLinear
from ...placement import shape_of
from ...upstream.transformers import tied_weights
from .called import computed_with

__all__ = [
    "HEAD",
    "LinearWeight",
    "default_targets",
    "dense_linears",
    "linear_weights",
    "refuse_fused_experts",
    "refuse_linears_of_their_own",
    "refuse_some_experts",
]

HEAD = "output head"  # the reason of a layer that turns what the blocks made into logits
_EXPERTS, _OUTSIDE = "fused experts", "outside the blocks"
_ROUTES = "routes tokens to experts"


@dataclass(frozen=True)
class LinearWeight:
    """A weight that multiplies: of a linear layer, or a stack of matrices in one 3-D parameter.

    Args:
        name (`str`): Of the layer; of the parameter if it is 3-D.
        module (`nn.Module`): That holds it.
        weights (`int`): Numbers in it.
        reason (`str`, *optional*): Why it is not clustered unless the user says otherwise; None if it is.
        layer (`bool`): It is that of a linear layer.
    """

    name: str
    module: nn.Module
    weights: int
    reason: str | None
    layer: bool = True


def linear_weights(model: nn.Module) -> list[LinearWeight]:
    """Every linear weight of a model, dense or clustered, in its order; one that layers share counts once."""
    blocks = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    owners: dict[int, int] = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners[id(weight)] = owners.get(id(weight), 0) + 1
    # Models whose parameters are on the meta device, or not loaded yet, say by name what will be one weight.
    tied = tied_weights(model)
    sources = set(tied.values())
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    heads = {id(output), id(getattr(output, "base_layer", output))}
    computed = computed_with(model)
    routers = _routers(model)
    stacks = {stack.name for stack in fused_stacks(model)}
    found: list[LinearWeight] = []
    seen: set[int | str] = set()
    for name, module in model.named_modules():
        if isinstance(module, ClusteredLinear):
            reason = HEAD if id(module) in heads else None
            found.append(LinearWeight(name, module, module.in_features * module.out_features, reason))
        elif isinstance(module, (nn.Linear, Conv1D)):
            weight = module._parameters.get("weight")
            key = f"{name}.weight"
            same: set[int | str] = {id(weight), tied.get(key, key)}
            size = 0 if weight is not None and same & seen else module.weight.numel()
            seen |= same
            reason = None
            if id(module) in heads:
                reason = HEAD
            elif weight is None:
                reason = "its weight is computed, by pruning or a parametrisation"
            elif not is_dense_linear(module):
                reason = f"{type(module).__name__} computes something else than nn.Linear"
            elif owners[id(weight)] != 1 or key in tied or key in sources:
                reason = "shares its weight with another module"
            elif name.removesuffix(".base_layer") in computed:
                reason = computed[name.removesuffix(".base_layer")]
            elif name.removesuffix(".base_layer") in routers:
                reason = _ROUTES
            elif blocks and not name.startswith(blocks):
                reason = _OUTSIDE
            found.append(LinearWeight(name, module, size, reason))
        else:
            found += _stacked(name, module, stacks)
    # A model without linear layers in lists of blocks has them elsewhere.
    if not any(weight.reason is None for weight in found):
        found = [replace(weight, reason=None) if weight.reason == _OUTSIDE else weight for weight in found]
    return found


def dense_linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of the dense linear layers to cluster, in the order of the model.

    Those inside lists of blocks (`nn.ModuleList`), which leaves out output heads, poolers and projections of
    embeddings; every one in a model without such lists. Layers whose weight is shared with another module, is
    computed (by pruning or a parametrisation), or is computed with instead of being called, are left out as well.
    """
    for weight in linear_weights(model):
        if weight.reason is None and not isinstance(weight.module, ClusteredLinear):
            yield weight.name, weight.module


def default_targets(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that are clustered, or adapted, where the user names none: name to layer.

    Raises:
        ValueError: If the model has fused experts, which would stay dense without a word.
    """
    refuse_fused_experts(model)
    return dict(dense_linears(model))


def refuse_fused_experts(model: nn.Module) -> None:
    """Raises a ValueError that names fused 3-D expert parameters, if the model has any."""
    fused = [
        f"{weight.name} {tuple(shape_of(weight.module.get_parameter(weight.name.rpartition('.')[2])))}"
        for weight in linear_weights(model)
        if weight.reason == _EXPERTS
    ]
    if fused:
        shown = ", ".join(fused[:3]) + (f" and {len(fused) - 3} more" if len(fused) > 3 else "")
        raise ValueError(
            f"the model has fused experts that cannot be taken apart: {shown}. Either nothing says how a matrix lies "
            "in them, or they are offloaded or spread over processes. Name the linear layers to cluster in "
            "target_modules (attention, shared experts) to leave the fused experts dense."
        )


def refuse_some_experts(model: nn.Module, chosen: Collection[str]) -> None:
    """Raises a ValueError if only some of the experts that transformers keeps in one parameter are to be clustered."""
    for name, weights in stacks_apart(model):
        layers = [layer_name(name, index) for index in range(len(weights))]
        left = [layer for layer in layers if layer not in chosen]
        if left and len(left) < len(layers):
            raise ValueError(
                f"{left[0]} would stay dense and other experts of {name} not, but transformers keeps them in one "
                "parameter; name all of them or none."
            )


def _stacked(name: str, module: nn.Module, stacks: set[str]) -> list[LinearWeight]:
    """Matrices that are stacked in one parameter of three dimensions, or those of experts in two (DBRX): experts that
    are not taken apart, or gates of several heads."""
    if isinstance(module, (_ConvNd, ParametrizationList)):
        return []
    found = []
    for key, parameter in module._parameters.items():
        shape = torch.Size(()) if parameter is None else shape_of(parameter)
        full = f"{name}.{key}" if name else key
        if len(shape) == 2 and "experts" in name.split(".") and "bias" not in key and min(shape) > 1:
            found.append(LinearWeight(full, module, math.prod(shape), _EXPERTS, layer=False))
        if len(shape) != 3 or shape[0] < 2 or key == "codebook":
            continue
        reason = _EXPERTS if full in stacks else "a 3-D parameter of no linear layer"
        found.append(LinearWeight(full, module, math.prod(shape), reason, layer=False))
    return found


def _routers(model: nn.Module) -> set[str]:
    """Names of the layers beside experts that say which of them a token goes to, or how much a shared one counts."""
    found = set()
    for holder, experts in expert_modules(model).items():
        beside = holder.rpartition(".")[0]
        for name, module in model.get_submodule(beside).named_modules():
            full = f"{beside}.{name}" if beside else name
            called_so = "router" in name or "gate" in name
            if called_so and is_dense_linear(module) and not full.startswith(f"{holder}."):
                if weight_shape(module)[0] in (1, experts):
                    found.add(full.removesuffix(".base_layer"))
    return found


def refuse_linears_of_their_own(model: nn.Module) -> None:
    """Raises a ValueError that names the class, if all linear layers inside the model's blocks are of subclasses of
    `nn.Linear`, which may compute something else from their weight and are never clustered."""
    blocks = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    inside = [module for name, module in model.named_modules() if name.startswith(blocks)]
    others = sorted({type(module).__name__ for module in inside if isinstance(module, nn.Linear)} - {"Linear"})
    if others and not any(is_dense_linear(module) for module in inside):
        raise ValueError(
            f"the blocks of {type(model).__name__} are made of {', '.join(others)}, which computes something else "
            "from its weight than nn.Linear, so it cannot be clustered."
        )
