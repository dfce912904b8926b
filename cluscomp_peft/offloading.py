"""Layers whose numbers accelerate keeps elsewhere: in host memory, on disk, or in the checkpoint itself.

`device_map` and `accelerate.cpu_offload` leave a layer's parameters on the meta device and give it a hook, which puts
them in place before each call of the layer and takes them away after it:

    resident     layer.codes [in, width], uint8                        calls, decoding, merging, fingerprints
    offloaded    layer.codes on meta ◄── hook.weights_map["codes"]     calls; everything else asks here

Whoever needs a number outside of a call reads it with [`stored`] and changes it with [`store`].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from .upstream.accelerate import bring_to, hook_of, keep_weight, kept_weights, offload_hook, take_away

__all__ = [
    "execution_device",
    "hooks_of",
    "offload_on_error",
    "restore_hooks",
    "store",
    "store_all",
    "stored",
]


def stored(module: nn.Module, name: str) -> torch.Tensor | None:
    """A parameter of a module, wherever it is: an offloaded one is read, and lies on the execution device.

    Args:
        module (`torch.nn.Module`): Usually a layer; its own parameters, not those of its children.
        name (`str`): Such as "codes".

    Returns:
        `torch.Tensor` or None: None if there is no such parameter; on meta if it is still to be loaded.
    """
    value = module._parameters.get(name)
    hook = None if value is None or value.device.type != "meta" else offload_hook(module)
    if hook is None or name not in kept_weights(hook):
        return value
    return kept_weights(hook)[name].to(bring_to(hook))


def store(module: nn.Module, name: str, value: torch.Tensor | None) -> None:
    """Replaces a parameter of a module; None removes it. It is frozen unless `value` is a trainable Parameter.

    Of an offloaded parameter, the stored value is replaced too, and is in host memory from then on: the next call of
    the module would fetch the old one otherwise. Files are never written. The value goes straight into `_parameters`:
    PEFT builds layers under accelerate's `init_empty_weights` (`low_cpu_mem_usage`), which patches registration and
    would move it to the meta device.
    """
    if value is not None and not isinstance(value, nn.Parameter):
        value = nn.Parameter(value, requires_grad=False)
    hook = offload_hook(module)
    # Where a hook has fetched the parameters (PEFT merges so), whoever called it also offloads the new ones.
    away = hook is not None and any(own is not None and own.is_meta for own in module._parameters.values())
    if hook is not None and away and value is not None and not value.is_meta:
        keep_weight(hook, name, value.detach().cpu())
        value = nn.Parameter(value.detach().to("meta"), requires_grad=value.requires_grad)
    module._parameters[name] = value


def store_all(module: nn.Module, values: Mapping[str, torch.Tensor | None]) -> None:
    """[`store`] of several parameters; an error or an interrupt between them leaves all as they were."""
    before = {name: stored(module, name) for name in values}
    try:
        for name, value in values.items():
            store(module, name, value)
    except BaseException:
        for name, value in before.items():
            store(module, name, value)
        raise


@contextmanager
def offload_on_error(module: nn.Module) -> Iterator[None]:
    """Offloads a module's parameters again if its call ends in an exception.

    accelerate's hook only does so where a call returns. Gradient checkpointing computes each block a second time and
    leaves its last layer by an exception: without this, that layer of every block would stay in memory.
    """
    try:
        yield
    except BaseException:
        hook = offload_hook(module)
        if hook is not None:
            take_away(module, hook)
        raise


def execution_device(module: nn.Module) -> torch.device:
    """The device on which the module computes; for an offloaded one, to which its parameters are fetched."""
    hook = offload_hook(module)
    if hook is None:
        return next(module.parameters()).device
    return bring_to(hook)


def hooks_of(model: nn.Module) -> list[tuple[nn.Module, ModelHook]]:
    """Every module of a model that has a hook, with it; empty if none of its weights is offloaded."""
    if all(offload_hook(module) is None for module in model.modules()):
        return []
    hooks = [(module, hook_of(module)) for module in model.modules()]
    return [(module, hook) for module, hook in hooks if hook is not None]


def restore_hooks(hooks: list[tuple[nn.Module, ModelHook]]) -> bool:
    """Attaches the hooks of [`hooks_of`] again where they were removed; True if any were."""
    lost = [(module, hook) for module, hook in hooks if hook_of(module) is None]
    for module, hook in lost:
        add_hook_to_module(module, hook)
    return bool(lost)
