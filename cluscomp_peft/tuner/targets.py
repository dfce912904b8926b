"""Which layers of a model an adapter is for: those that its config names, or by default every one that it can help."""

from __future__ import annotations

import copy
from collections.abc import Iterable

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..compress.budget import targets as dense_targets
from ..compress.budget.called import computed_with, handed_to_kernels
from ..expert_weights import layer_name
from ..experts import stacks_apart
from ..linear import ClusteredLinear
from ..upstream.peft import matches
from .config import ClusCompConfig
from .layer import ClusCompLayer

__all__ = ["default_targets", "expert_targets", "matched_layers", "resolve_targets"]


def resolve_targets(model: nn.Module, config: ClusCompConfig) -> None:
    """Writes the names of layers into `config.target_modules` where it has None, "all-linear", or parameters of
    experts beside it."""
    targets = config.target_modules
    if targets is None or (isinstance(targets, str) and targets.lower() == "all-linear"):
        only_experts = targets is None and config.target_parameters
        config.target_modules = set() if only_experts else default_targets(model, config)  # type: ignore[assignment]
    if config.target_parameters:
        experts = expert_targets(model, config.target_parameters)
        config.target_modules = {*config.target_modules, *experts}  # type: ignore[assignment,misc]
        config.target_parameters = None  # PEFT would look for the parameters


def default_targets(model: nn.Module, config: ClusCompConfig) -> set[str]:
    """Names of every clustered layer, or on a dense model of every linear layer, that the model calls, heads left out.

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
    layers -= {weight.name for weight in dense_targets.linear_weights(model) if weight.reason == dense_targets.HEAD}
    if not layers:
        layers = set(dense_targets.default_targets(model))
    layers -= computed_with(model).keys() | handed_to_kernels(model).keys()
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear layer to adapt; name some in target_modules.")
    return layers if config.layers_to_transform is None else _chosen_by_index(layers, config)


def expert_targets(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Names of the layers of all experts in parameters that are called, or end, like one of `names`.

    Raises:
        ValueError: If a name is that of no such parameter.
    """
    stacks = dict(stacks_apart(model))
    found = set()
    for wanted in names:
        matched = [name for name in stacks if name == wanted or name.endswith(f".{wanted}")]
        if not matched:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in stacks})) or "none"
            raise ValueError(
                f"target_parameters names {wanted!r}, which is no parameter of experts that can be taken apart "
                f"(there are: {known}). Linear layers are named in target_modules; train other modules whole through "
                "modules_to_save."
            )
        found |= {layer_name(name, index) for name in matched for index in range(len(stacks[name]))}
    return found


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
