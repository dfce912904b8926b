"""Which layers of a model an adapter is for: those that its config names, or by default every one that it can help."""

from __future__ import annotations

import copy

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..compress.budget import targets as dense_targets
from ..compress.budget.called import computed_with, handed_to_kernels
from ..linear import ClusteredLinear
from ..upstream.peft import matches
from .config import ClusCompConfig
from .layer import ClusCompLayer

__all__ = ["default_targets", "matched_layers"]


def default_targets(model: nn.Module, config: ClusCompConfig) -> set[str]:
    """Names of every clustered layer, or on a dense model of every linear layer but heads, that the model calls.

    Filtered by the config's `layers_to_transform`, which PEFT does not apply to full names.

    Raises:
        ValueError: If there is none.
    """
    layers = {name for name, module in model.named_modules() if isinstance(module, ClusCompLayer)}
    layers |= {
        name
        for name, module in model.named_modules()
        if isinstance(module, ClusteredLinear) and name.removesuffix(".base_layer") not in layers
    }
    if not layers:
        layers = set(dense_targets.default_targets(model))
    layers -= computed_with(model).keys() | handed_to_kernels(model).keys()
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear layer to adapt; name some in target_modules.")
    return layers if config.layers_to_transform is None else _chosen_by_index(layers, config)


def matched_layers(model: nn.Module, config: ClusCompConfig) -> dict[str, nn.Module]:
    """The layers by name that PEFT will hand to the tuner one by one, in its order."""
    matched: dict[str, nn.Module] = {}
    inside: list[str] = []
    for name, module in model.named_modules():
        if name and not name.startswith(tuple(inside)) and matches(config, name):
            matched[name] = module
        if isinstance(module, BaseTunerLayer):
            inside.append(f"{name}.")
    return matched


def _chosen_by_index(layers: set[str], config: ClusCompConfig) -> set[str]:
    probe = copy.copy(config)
    probe.exclude_modules = None
    chosen = set()
    for name in layers:
        probe.target_modules = [name.rpartition(".")[2]]
        if matches(probe, name):
            chosen.add(name)
    if not chosen:
        raise ValueError(
            f"no linear layer has an index in layers_to_transform={config.layers_to_transform!r} "
            f"(layers_pattern={config.layers_pattern!r})."
        )
    return chosen
