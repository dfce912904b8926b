"""Clustering dense weights while they are loaded: what the loader calls for each, and the threads it is done in."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..expert_weights import layer_name
from ..upstream.accelerate import kept_weights, offload_hook
from ..upstream.transformers import ConversionOps, is_loaded, mark_loaded

if TYPE_CHECKING:
    from .quantizer import ClusCompHfQuantizer

__all__ = ["ClusterOnLoad", "arrived", "in_thread"]


class ClusterOnLoad(ConversionOps):
    """Clusters one dense weight as it comes from the checkpoint and puts the clustered layer in place."""

    def __init__(self, hf_quantizer: ClusCompHfQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        model: nn.Module | None = None,
        full_layer_name: str | None = None,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        assert model is not None
        (key, value), *_ = input_dict.items()
        value = value[0] if isinstance(value, list) else value
        owner, _, leaf = key.rpartition(".")
        if missing_keys is not None:
            missing_keys.discard(key)
        if self.hf_quantizer.failure is None:
            weight = nn.Parameter(value, requires_grad=False)
            mark_loaded(weight)  # or transformers fills it anew
            model.get_submodule(owner)._parameters[leaf] = weight
            names = [owner]
            stack = self.hf_quantizer.take_apart(key)
            if stack is not None:
                names = [layer_name(key, index) for index in range(len(value))]
            del value, weight, input_dict
            for name in names:
                self.hf_quantizer.submit(model, name, model.get_submodule(name))
        return {}


def in_thread(function: Callable, *arguments: Any) -> Future:
    """Runs it in a thread that ends with it: nobody is told when loading is interrupted, who could end a pool."""
    future: Future = Future()

    def work() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name="cluscomp-on-load").start()
    return future


def arrived(module: nn.Module, key: str, parameter: nn.Parameter) -> bool:
    """Whether loading found a parameter: in memory, or for its offloading hook to find."""
    hook = offload_hook(module)
    if hook is not None:
        return key in kept_weights(hook)
    return parameter.is_meta or is_loaded(parameter)
