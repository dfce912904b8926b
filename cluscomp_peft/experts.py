"""Experts of a mixture, which transformers keeps stacked in 3-D parameters, taken apart into linear layers and back.

    fused     experts.gate_up_proj [E, out, in]                        what the model's code was written for
    apart     experts.0.gate_up_proj, …, experts.{E-1}.gate_up_proj    a layer for each expert

Apart, an expert's matrix is a layer like any other: it is clustered, calibrated, stored, adapted and merged by the
same code, under names that mixtures had before version 5. What runs the experts stays the family's own code:

- Classes with `use_experts_implementation` say how a matrix lies, which gate and which biases there are, and let an
  implementation of the products be registered. Ours, [`forward_apart`], sorts tokens by expert and calls the layers.
- Others find an [`ExpertWeights`] where the parameter was, which computes products by the layers.

Either way an expert without tokens is not touched, and no more than one matrix is decoded at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .dense import is_dense_linear
from .expert_weights import Expert, ExpertWeights, layer_name
from .offloading import hooks_of
from .placement import is_sharded, shape_of
from .upstream.transformers import is_loaded, mark_loaded
from .upstream.transformers_experts import (
    apply_gate,
    follow_implementation,
    has_implementations,
    norm_of_experts,
    register_experts,
    use_implementation,
)

__all__ = [
    "ExpertStack",
    "expert_modules",
    "fuse",
    "fused_stacks",
    "stacks_apart",
    "unfuse",
    "unfuse_stack",
]

_IMPLEMENTATION = "cluscomp"


@dataclass(frozen=True)
class ExpertStack:
    """Matrices of all experts in one 3-D parameter.

    Args:
        owner (`str`): Name of the module that has the parameter.
        key (`str`): Of the parameter in it.
        module (`nn.Module`): That module.
        transposed (`bool`, *optional*): Whether a matrix lies as [in, out]; None if nothing says so, and then the
            parameter cannot be taken apart.
    """

    owner: str
    key: str
    module: nn.Module
    transposed: bool | None

    @property
    def name(self) -> str:
        """Of the parameter."""
        return f"{self.owner}.{self.key}" if self.owner else self.key

    @property
    def shape(self) -> torch.Size:
        """[E, out, in], or [E, in, out] where it is transposed."""
        return shape_of(self.module._parameters[self.key])  # type: ignore[arg-type]


def fused_stacks(model: nn.Module) -> list[ExpertStack]:
    """The 3-D parameters of a model that hold a matrix for each of several experts, in its order.

    They are told by the class that has them, or by a name or a first dimension that says experts; without a config
    nothing says that a 3-D parameter is something else.
    """
    counts = _counts_of(model.config) if hasattr(model, "config") else None
    found = []
    for owner, module in model.named_modules():
        for key, parameter in module._parameters.items():
            shape = torch.Size(()) if parameter is None else shape_of(parameter)
            if len(shape) != 3 or shape[0] < 2 or key == "codebook":
                continue
            named = "expert" in f"{owner}.{key}.{type(module).__name__}".lower()
            if named or has_implementations(module) or counts is None or shape[0] in counts:
                found.append(ExpertStack(owner, key, module, _transposed(module, key)))
    return found


def expert_modules(model: nn.Module) -> dict[str, int]:
    """Names of the modules that hold experts, fused or apart, to how many."""
    found = {stack.owner: stack.shape[0] for stack in fused_stacks(model)}
    for name, module in model.named_modules():
        count = sum(isinstance(child, Expert) for child in module.children())
        if count:
            found[name] = count
    return found


def stacks_apart(model: nn.Module) -> list[tuple[str, ExpertWeights]]:
    """(name of the parameter, what stands in its place) of every stack that is taken apart."""
    return [
        (f"{owner}.{key}" if owner else key, weights)
        for owner, module in model.named_modules()
        for key, weights in module.__dict__.items()
        if isinstance(weights, ExpertWeights)
    ]


def unfuse(model: nn.Module, skip: Collection[str] = ()) -> list[ExpertStack]:
    """Takes every stack of experts of a model apart, where it says how a matrix lies and its numbers are at hand.

    Dense layers share the memory of the parameter.

    Args:
        model (`nn.Module`): Changed in place, on any device.
        skip: Names of parameters to leave as they are.

    Returns:
        The stacks that were taken apart.
    """
    stacks, done = fused_stacks(model), []
    offloaded = {id(module) for module, _ in hooks_of(model)} if stacks else set()
    for stack in stacks:
        parameter = stack.module._parameters[stack.key]
        away = id(stack.module) in offloaded or is_sharded(parameter)  # type: ignore[arg-type]
        if stack.transposed is not None and stack.name not in skip and not away:
            unfuse_stack(stack)
            done.append(stack)
    return done


def unfuse_stack(stack: ExpertStack) -> None:
    """Takes one stack apart."""
    module, key, transposed = stack.module, stack.key, bool(stack.transposed)
    parameter = module._parameters.pop(key)
    assert parameter is not None
    for index, matrix in enumerate(parameter.detach()):
        weight = nn.Parameter(matrix.t() if transposed else matrix, requires_grad=parameter.requires_grad)
        if is_loaded(parameter):
            mark_loaded(weight)
        with torch.device("meta"):
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer._parameters["weight"] = weight
        expert = module._modules.setdefault(str(index), Expert())
        assert expert is not None
        # In one order, whichever parameter a loader brings first: up before down.
        expert._modules = dict(sorted({**expert._modules, key: layer}.items(), reverse=True))
        expert.train(module.training)
    module.__dict__[key] = ExpertWeights(module, key, transposed)
    if has_implementations(module):
        register_experts(_IMPLEMENTATION, forward_apart)
        use_implementation(module, _IMPLEMENTATION)


def fuse(model: nn.Module, kept: Callable[[str], bool] = lambda name: False) -> None:
    """Puts experts whose layers are all dense back into one parameter.

    Args:
        model (`nn.Module`): Changed in place.
        kept: Says of the name of a layer whether it is to stay, which keeps those of its stack apart.
    """
    for name, weights in stacks_apart(model):
        layers = weights.layers
        names = [layer_name(name, index) for index in range(len(layers))]
        if all(map(is_dense_linear, layers)) and not any(map(kept, names)):
            _fuse(weights)


def _fuse(weights: ExpertWeights) -> None:
    module, key, layers, transposed = weights.module, weights.key, weights.layers, weights.transposed
    parts = [layer._parameters["weight"] for layer in layers]
    frozen = not any(part.requires_grad for part in parts)  # type: ignore[union-attr]
    whole = _joined([part.detach().t() if transposed else part.detach() for part in parts])  # type: ignore[union-attr]
    loaded = all(is_loaded(part) for part in parts)  # type: ignore[arg-type]
    del module.__dict__[key], parts
    for name, expert in list(module._modules.items()):
        if isinstance(expert, Expert):
            expert._modules.pop(key, None)
            if not expert._modules:
                del module._modules[name]
    parameter = nn.Parameter(whole, requires_grad=not frozen)
    if loaded:
        mark_loaded(parameter)
    module._parameters[key] = parameter
    if has_implementations(module) and not any(isinstance(item, ExpertWeights) for item in module.__dict__.values()):
        follow_implementation(module)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """[E, rows, columns]; without a copy where the parts lie one after another in memory, as unfusing left them."""
    first, step = parts[0], parts[0].numel()
    if first.is_meta:
        return torch.empty(len(parts), *first.shape, dtype=first.dtype, device="meta")
    if first.is_contiguous() and all(
        part.is_contiguous()
        and part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and part.storage_offset() == first.storage_offset() + index * step
        for index, part in enumerate(parts)
    ):
        return first.as_strided((len(parts), *first.shape), (step, *first.stride()))
    return torch.stack(parts)


def forward_apart(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts of a module with implementations, for tokens [tokens, hidden] that each go to k of them.

    Args:
        hidden_states (`torch.Tensor`): [tokens, hidden].
        top_k_index (`torch.Tensor`): [tokens, k], the experts of each token; one beyond the last is no expert.
        top_k_weights (`torch.Tensor`): [tokens, k], what their outputs count.

    Returns:
        `torch.Tensor`: [tokens, hidden], in the dtype of the input.
    """
    tokens, k = top_k_index.shape
    experts = {name: expert for name, expert in self._modules.items() if isinstance(expert, Expert)}
    order = torch.argsort(top_k_index.reshape(-1), stable=True)
    rows = hidden_states[order // k]
    counts = _tokens_of_experts(top_k_index, len(experts))
    parts = []
    for (name, expert), part in zip(experts.items(), rows[: sum(counts)].split(counts), strict=True):
        if len(part):
            parts.append(_run_expert(self, int(name), expert, part))
    width = parts[0].shape[-1] if parts else hidden_states.shape[-1]
    result = (parts[0] if parts else hidden_states).new_zeros(tokens * k, width)
    if parts:
        used = order[: sum(counts)]
        outputs = torch.cat(parts) * top_k_weights.reshape(-1)[used, None]
        result = result.to(outputs.dtype).index_copy(0, used, outputs)
    return result.view(tokens, k, width).sum(1).to(hidden_states.dtype)


def _tokens_of_experts(top_k_index: torch.Tensor, experts: int) -> list[int]:
    """How many rows each expert gets; without numbers (a plan on the meta device) as many as every other."""
    if top_k_index.is_meta:
        rows = top_k_index.numel()
        return [rows * (index + 1) // experts - rows * index // experts for index in range(experts)]
    return torch.bincount(top_k_index.reshape(-1), minlength=experts)[:experts].tolist()


def _run_expert(module: Any, index: int, expert: nn.Module, x: torch.Tensor) -> torch.Tensor:
    up = "gate_up_proj" if module.has_gate else "up_proj"

    def project(key: str, x: torch.Tensor) -> torch.Tensor:
        layer = expert._modules.get(key)  # None: left dense, in the parameter
        weight = None if layer is not None else getattr(module, key)[index]
        if layer is not None:
            y = layer(x)
        else:
            y = x @ weight if module.is_transposed else F.linear(x, weight)
        return y + getattr(module, f"{key}_bias")[index] if module.has_bias else y

    x = project(up, x)
    x = project("down_proj", apply_gate(module, x) if module.has_gate else module.act_fn(x))
    norm = norm_of_experts(module)
    return x if norm is None else norm(x)


def _counts_of(config: Any) -> set[int]:
    """The numbers of experts that a config names, in itself or in the configs inside it."""
    counts: set[int] = set()
    for key, value in vars(config).items() if config is not None else ():
        if key.endswith("experts") and type(value) is int:
            counts.add(value)
        elif key.endswith("_config") and hasattr(value, "__dict__"):
            counts |= _counts_of(value)
    return counts


def _transposed(module: Any, key: str) -> bool | None:
    """Whether a matrix of a stack lies as [in, out]: by what its class says, or else by shapes.

    Of a gated pair, `gate_up_proj` has twice as many outputs as `down_proj` has inputs; a lone stack says how many
    inputs and outputs it has. Nothing else tells.
    """
    if has_implementations(module):
        up = "gate_up_proj" if module.has_gate else "up_proj"
        return module.is_transposed if key in (up, "down_proj") else None
    shapes = {name: tuple(shape_of(value)[1:]) for name, value in module._parameters.items() if value is not None}
    up, down = shapes.get("gate_up_proj"), shapes.get("down_proj")  # type: ignore[assignment]
    if key in ("gate_up_proj", "down_proj") and up and down:
        lying = {False: (2 * down[1], down[0]), True: (down[1], 2 * down[0])}
        return next((transposed for transposed, shape in lying.items() if up == shape), None)
    sizes = (getattr(module, "output_size", None), getattr(module, "input_size", None))
    return False if key == "weight" and shapes["weight"] == sizes else None
