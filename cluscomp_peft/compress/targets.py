"""Which layers of a model are clustered unless the user says otherwise: the linear layers inside its blocks.

Layers are found by what they are and where they stand, never by a model family's names. What would be skipped silently
is refused by name: since version 5 transformers fuses the experts of a mixture into 3-D parameters, 90 % of such a
model's weights, and a tool that looks for linear layers alone would leave them dense and call the model compressed.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..linear import is_dense_linear

__all__ = ["dense_linears", "refuse_fused_experts", "refuse_linears_of_their_own"]


def dense_linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of the dense linear layers to cluster, in the order of the model.

    Those inside lists of blocks (`nn.ModuleList`), which leaves out output heads, poolers and projections of
    embeddings; every one in a model without such lists. Layers whose weight is shared with another module, or is
    computed (by pruning or a parametrisation), are left out as well.
    """
    blocks = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    owners: dict[int, int] = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners[id(weight)] = owners.get(id(weight), 0) + 1
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if is_dense_linear(module) and owners.get(id(module._parameters.get("weight"))) == 1
    ]
    inside = [(name, module) for name, module in layers if name.startswith(blocks)]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    yield from inside or [(name, module) for name, module in layers if module is not head]


def refuse_fused_experts(model: nn.Module) -> None:
    """Raises a ValueError that names fused 3-D expert parameters, if the model has any."""
    fused = [
        f"{name}.{key} {tuple(parameter.shape)}"
        for name, module in model.named_modules()
        if not isinstance(module, _ConvNd)
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim == 3 and parameter.shape[0] > 1 and key != "codebook"
    ]
    if fused:
        shown = ", ".join(fused[:3]) + (f" and {len(fused) - 3} more" if len(fused) > 3 else "")
        raise ValueError(
            f"the model has fused experts, which cannot be clustered yet: {shown}. Name the linear layers to cluster "
            "in target_modules (attention, shared experts) to leave the fused experts dense."
        )


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
