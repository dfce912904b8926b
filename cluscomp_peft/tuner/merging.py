"""Merging adapters into their base and unmerging them, in one layer and in a whole model: all of it or nothing.

    base_layer.codebook     codebook' = round(codebook + ΣΔC)        what the layer computes with while merged
    unmerged_codebook       codebook                                 a buffer of the tuner layer, in no state dict

What merging replaces is kept in buffers, so that it is moved, cast, copied and pickled with the layer. A state dict
has the unmerged numbers beside the deltas, whether adapters are merged or not, so it means the same to every model.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..offloading import store_all, stored
from ..placement import is_sharded
from ..upstream.peft import adapters_to_merge, onloaded

__all__ = [
    "MergingLayer",
    "all_or_nothing",
    "check_merging",
    "is_merged",
    "is_unloaded",
    "refuse_non_finite",
    "set_merged",
    "tuner_layers",
]

_KEPT = "unmerged_"


class MergingLayer(BaseTunerLayer):
    """How a tuner layer writes its adapters into the base layer and restores it, to the last bit."""

    base_layer: nn.Module
    cluscomp_delta: nn.ModuleDict
    merged_adapters: list[str]

    def check_arrival(self, adapter_names: list[str]) -> None:
        """Raises an error if numbers of one of the adapters are still to be loaded."""
        raise NotImplementedError

    def merged_values(self, adapter_names: list[str]) -> dict[str, torch.Tensor | None]:
        """What merging these adapters, and no others, stores: name of a parameter of the base layer to its value."""
        raise NotImplementedError

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merges adapters (by default the active ones) into the base layer; an error leaves the layer as it was.

        Args:
            safe_merge (`bool`): Check the result for NaN and infinities first and leave the base alone if there are.
            adapter_names (`list[str]`, *optional*): Which adapters.

        Raises:
            RuntimeError: If the base is spread over processes.
            ValueError: If `safe_merge` finds NaN or infinite values.
        """
        self._refuse_spread()
        names = [name for name in adapters_to_merge(self, adapter_names) if name in self.cluscomp_delta]
        if not names:
            return
        # From the unmerged base, so that merging one adapter after another rounds once, as running both does.
        names = list(self.merged_adapters) + names
        values = self._checked_values(names, safe_merge)
        if not self.merged:
            for name in values:
                self.register_buffer(_KEPT + name, stored(self.base_layer, name), persistent=False)
        self._replace(values, names)

    def unmerge(self, warn: bool = True) -> None:
        """Restores the base layer as it was before merging, bit for bit, where the merged one is and in its dtype.

        Raises:
            RuntimeError: If the base is spread over processes.
        """
        if not self.merged:
            if warn:
                warnings.warn("Already unmerged, nothing to do.", stacklevel=2)
            return
        self._refuse_spread()
        names = self._replaced_names()
        self._replace({name: self.base_tensor(name) for name in names}, [])
        self.forget_unmerged()

    def forget_unmerged(self) -> None:
        """Lets go of what merging replaced."""
        for name in self._replaced_names():
            del self._buffers[_KEPT + name]
            self._non_persistent_buffers_set.discard(_KEPT + name)

    def check_merging(self, adapter_names: list[str] | None) -> None:
        """Raises a ValueError if merging adapters (by default the active ones) would store NaN or infinite values."""
        wanted = self.active_adapters if adapter_names is None else adapter_names
        fresh = [name for name in wanted if name in self.cluscomp_delta and name not in self.merged_adapters]
        if fresh:
            self._checked_values(list(self.merged_adapters) + fresh, safe_merge=True)

    def base_tensor(self, name: str) -> torch.Tensor | None:
        """A parameter of the base layer, as it is without merged adapters."""
        present = stored(self.base_layer, name)
        if not self.merged or name not in self._replaced_names():
            return present
        kept = self._buffers[_KEPT + name]
        if kept is None or present is None or present.is_meta:
            return kept
        # The same object where nothing has changed: a weight may be tied to another by it.
        return kept.to(present.device, present.dtype)

    def state_dict(self, *args: Any, prefix: str = "", keep_vars: bool = False, **kwargs: Any) -> dict[str, Any]:
        """With the base as it is without merged adapters, whose deltas are in it too."""
        state = super().state_dict(*args, prefix=prefix, keep_vars=keep_vars, **kwargs)  # type: ignore[misc]
        for name in self._replaced_names() if self.merged else ():
            value, key = self.base_tensor(name), f"{prefix}base_layer.{name}"
            if value is None:
                del state[key]
            else:
                state[key] = value if keep_vars else value.detach()
        return state

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        # Numbers of an unmerged base are about to be copied into the base layer.
        if any(f"{prefix}base_layer.{name}" in state_dict for name in self._replaced_names()):
            self.unmerge(warn=False)
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]

    def _replaced_names(self) -> list[str]:
        """Names of the parameters of the base layer that merging replaced."""
        return [name.removeprefix(_KEPT) for name in self._buffers if name.startswith(_KEPT)]

    def _checked_values(self, adapter_names: list[str], safe_merge: bool) -> dict[str, torch.Tensor | None]:
        self.check_arrival(adapter_names)
        with torch.no_grad():
            values = self.merged_values(adapter_names)
        if safe_merge:
            refuse_non_finite(values.values(), adapter_names)
        return values

    def _replace(self, values: Mapping[str, torch.Tensor | None], merged_adapters: list[str]) -> None:
        """Replaces parameters of the base layer and the list of adapters that are merged into them; all or nothing."""
        before, numbers = self.merged_adapters, {name: stored(self.base_layer, name) for name in values}
        try:
            store_all(self.base_layer, values)
            self.merged_adapters = merged_adapters
        except BaseException:
            store_all(self.base_layer, numbers)
            self.merged_adapters = before
            raise

    def _refuse_spread(self) -> None:
        if any(is_sharded(value) for value in self.base_layer.parameters()):
            raise RuntimeError(
                "the model is spread over processes (FSDP2 or ZeRO-3) and cannot be merged there; save the adapter, "
                "load it on the base in one process, and merge that."
            )


def refuse_non_finite(values: Iterable[torch.Tensor | None], adapter_names: list[str]) -> None:
    """Raises a ValueError if what merging would store has NaN or infinite values."""
    if not all(bool(torch.isfinite(value).all()) for value in values if value is not None):
        raise ValueError(
            f"NaNs detected in the merged weights. The adapter {', '.join(adapter_names)} seems to be broken; nothing "
            "was merged."
        )


def check_merging(model: nn.Module, adapter_names: list[str] | None) -> None:
    """Raises a ValueError if merging adapters would store NaN or infinite values anywhere in a model."""
    for layer in tuner_layers(model):
        with onloaded(layer):
            if isinstance(layer, MergingLayer):
                layer.check_merging(adapter_names)
            elif not layer.merged:  # PEFT's own, which trains tokens
                layer.merge(safe_merge=True, adapter_names=adapter_names)
                layer.unmerge()


def is_merged(model: nn.Module, adapter_names: list[str]) -> bool:
    """Whether adapters are merged into every layer that has them; warns if so, as nothing is left to merge."""
    layers = tuner_layers(model)
    open_names = (
        name
        for layer in layers
        for name in adapter_names
        if name in getattr(layer, "cluscomp_delta", adapter_names) and name not in layer.merged_adapters
    )
    if not layers or next(open_names, None) is not None:
        return False
    # The first words are PEFT's own, which its callers look for.
    warnings.warn(
        f"All adapters are already merged, nothing to do: {', '.join(adapter_names)}. What is merged is not added a "
        "second time; unmerge_adapter() takes it out.",
        stacklevel=3,
    )
    return True


def is_unloaded(model: nn.Module) -> bool:
    """Whether a model has no layer of an adapter any more; warns if so, as nothing is left to merge or to unload."""
    if tuner_layers(model):
        return False
    warnings.warn(
        "there is no adapter left to merge or to take out: merge_and_unload() or unload() was called before. The "
        "model that it gave is returned again.",
        stacklevel=4,
    )
    return True


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """If merging inside of this ends in an exception, every layer of the model is as it was before."""
    before = [(layer, list(layer.merged_adapters)) for layer in tuner_layers(model)]
    try:
        yield
    except BaseException:
        for layer, names in before:
            set_merged(layer, names)
        raise


def set_merged(module: nn.Module, merged_adapters: list[str]) -> None:
    """Makes these the adapters that are merged into the tuner layers of a module, whichever are merged now."""
    for layer in tuner_layers(module):
        if list(layer.merged_adapters) != merged_adapters:
            layer.unmerge()
            if merged_adapters:
                layer.merge(adapter_names=merged_adapters)


def tuner_layers(model: nn.Module) -> list[BaseTunerLayer]:
    """The layers of a model that adapters are merged into."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
