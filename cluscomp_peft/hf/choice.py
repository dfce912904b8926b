"""Which layers of a dense model a config clusters, and how each is stored."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from ..codes import ClusterSpec
from ..compress.budget.allocation import choose_spec
from ..compress.budget.coverage import coverage_line
from ..compress.budget.targets import dense_linears, linear_weights, refuse_fused_experts
from ..linear import weight_of
from .config import ClusCompQuantizationConfig

__all__ = ["choose_specs", "chosen_layers", "coverage_of"]


def chosen_layers(model: nn.Module, config: ClusCompQuantizationConfig) -> dict[str, nn.Module]:
    """Which layers of a dense model to cluster.

    Raises:
        ValueError: If no layer matches, a name in `target_modules` matches none, or experts are fused.
    """
    layers = dict(dense_linears(model))
    if config.target_modules is None:
        refuse_fused_experts(model)
        chosen = list(layers)
    else:
        chosen = [name for name in layers if _matches(name, config.target_modules)]
        for target in config.target_modules:
            if not any(_matches(name, [target]) for name in layers):
                raise ValueError(_unmatched(model, target))
    chosen = [name for name in chosen if not _matches(name, config.exclude_modules or [])]
    if not chosen:
        raise ValueError(f"{type(model).__name__} has no linear layer left to cluster; check exclude_modules.")
    return {name: layers[name] for name in chosen}


def choose_specs(model: nn.Module, config: ClusCompQuantizationConfig) -> dict[str, ClusterSpec]:
    """How each layer of [`chosen_layers`] is stored, whatever the others take.

    Raises:
        ValueError: If a matrix does not fit the settings.
    """
    specs = {}
    for name, layer in chosen_layers(model, config).items():
        out_features, in_features = weight_of(layer).shape
        specs[name] = choose_spec(
            in_features,
            out_features,
            bits=config.bits,
            group_size=config.group_size,
            num_clusters=config.num_clusters,
            scales=config.scales,
            codebook_itemsize=config.dtype.itemsize,
            name=name,
        )
    return specs


def coverage_of(model: nn.Module, config: ClusCompQuantizationConfig, names: Collection[str]) -> str:
    """One line on how much of a dense model is clustered where the layers `names` are, and why the rest is not."""
    excluded = [name for name, _ in dense_linears(model) if _matches(name, config.exclude_modules or [])]
    return coverage_line(model, set(names), excluded=set(excluded))


def _unmatched(model: nn.Module, target: str) -> str:
    """Why an entry of `target_modules` finds no layer to cluster."""
    kept = [weight for weight in linear_weights(model) if weight.reason and _matches(weight.name, [target])]
    if kept:
        names = ", ".join(weight.name for weight in kept[:3]) + (", …" if len(kept) > 3 else "")
        return f"target_modules names {target!r}, but it stays dense ({names}): {kept[0].reason}."
    return f"target_modules names {target!r}, but no linear layer of {type(model).__name__} is or ends with it."


def _matches(name: str, targets: list[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)
