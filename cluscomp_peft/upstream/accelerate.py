"""accelerate's hooks: what is touched of them to read and change the numbers of a layer that is offloaded.

`device_map` and `accelerate.cpu_offload` leave the parameters of a module on the meta device and give the module an
`AlignDevicesHook`. Before each call the hook puts the numbers of its `weights_map` in place; after it, meta tensors.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook
from torch import nn

__all__ = [
    "bring_to",
    "device_map_of",
    "hook_of",
    "keep_weight",
    "kept_weights",
    "offload_hook",
    "state_dict_of_offloaded",
    "take_away",
]


def hook_of(module: nn.Module) -> ModelHook | None:
    """The hook of a module, or None: `module._hf_hook`.

    If accelerate keeps it elsewhere, offloaded layers pass for resident ones, and their meta tensors for numbers.
    """
    return module.__dict__.get("_hf_hook")  # in every call: getattr() takes longer by the time of a small kernel


def offload_hook(module: nn.Module) -> AlignDevicesHook | None:
    """The hook that brings a module's own parameters from elsewhere, or None: an `AlignDevicesHook` with `offload` and
    a `weights_map`, alone or among the `hooks` of a `SequentialHook`.

    If accelerate offloads with another class or other attributes, offloaded layers pass for resident ones.
    """
    hook = hook_of(module)
    if hook is None:
        return None
    for one in hook.hooks if isinstance(hook, SequentialHook) else (hook,):
        if isinstance(one, AlignDevicesHook) and one.offload and one.weights_map is not None:
            return one
    return None


def kept_weights(hook: AlignDevicesHook) -> Mapping[str, torch.Tensor]:
    """The parameters that an offloading hook keeps, by their name inside the module: `hook.weights_map`.

    If its keys are called otherwise, codes and codebooks of offloaded layers are not found: no fingerprints, no
    merging, and loading calls the checkpoint incomplete.
    """
    return hook.weights_map


def keep_weight(hook: AlignDevicesHook, name: str, value: torch.Tensor) -> None:
    """Makes an offloading hook bring another value from the next call on, by a new `hook.weights_map` and an entry of
    `hook.original_devices` if the name is new.

    If the hook reads its weights from somewhere else, a merged layer computes with the weights before merging.
    """
    hook.weights_map = ChainMap({name: value}, hook.weights_map)  # the map itself may be that of files
    hook.original_devices.setdefault(name, torch.device("cpu"))


def take_away(module: nn.Module, hook: AlignDevicesHook) -> None:
    """Puts an offloaded module back on the meta device, as after a call: `hook.post_forward(module, None)`.

    If it does not, a call that ends by an exception (gradient checkpointing ends some so) leaves the layer in memory.
    """
    hook.post_forward(module, None)


def bring_to(hook: AlignDevicesHook) -> torch.device:
    """Where an offloading hook brings the numbers: `hook.execution_device`, the CPU if it is None.

    If it is called otherwise, adapters of offloaded layers are made on the wrong device.
    """
    return torch.device("cpu" if hook.execution_device is None else hook.execution_device)


def device_map_of(model: nn.Module) -> dict[str, Any] | None:
    """Where `dispatch_model` put the parts of a model: `model.hf_device_map`; None for a model it has not dispatched.

    If it is kept elsewhere, a teacher that lies on several devices is moved to one, and a model offloaded by a
    `device_map` is saved by way of a state dict of all its numbers.
    """
    return getattr(model, "hf_device_map", None)


def state_dict_of_offloaded(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of a model, offloaded numbers read back: `get_state_dict_offloaded_model` of
    `accelerate.utils.modeling`.

    If it leaves some out, `save_pretrained` of a model under `cpu_offload` writes an incomplete checkpoint.
    """
    from accelerate.utils.modeling import get_state_dict_offloaded_model

    return get_state_dict_offloaded_model(model)
