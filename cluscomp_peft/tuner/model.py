"""`ClusCompModel`: PEFT's tuner. It finds the layers of an adapter, checks everything that can be wrong before it
touches one, and puts the tuner layers in place.

    plan      match names (targets.py), validate settings, weights, saved file and fingerprint (planning.py,
              saving.py), cluster dense layers (clustering.py); nothing is changed, errors end here
    replace   compressed layer → ClusCompLinear; dense layer and its codes → ClusCompLinear or ClusCompDenseLinear
    load      checks in saving.py and adapter_file.py; how tensors arrive in loading.py
    save      saving.py
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from ..codes import ClusterSpec
from ..deltas import sum_deltas
from ..experts import fuse, unfuse
from ..layout import expand
from ..linear import ClusteredLinear
from ..offloading import execution_device, restore_hooks
from ..placement import is_partitioned
from ..upstream.peft import hide_device_map, show_device_map
from ..upstream.transformers import forget_adapters, quantizer_of
from .announcement import announce
from .arrival import Arrival
from .clustered_layer import ClusCompLinear
from .clustering import Codes, Importance, cluster_layers, empty_layer, find_importance
from .config import ClusCompConfig, config_of_sum
from .dense_layer import ClusCompDenseLinear
from .layer import ClusCompLayer, NewAdapter
from .loading import adapted_layers, prepare_tensors
from .merging import all_or_nothing, check_merging, is_merged, is_unloaded, set_merged, tuner_layers
from .planning import check_layers, check_task, spec_of
from .saving import check_saved, code_digests, complete_tensors, read_facts
from .targets import matched_layers, resolve_targets
from .units import count_blocks

__all__ = ["ClusCompModel"]


@dataclass
class Injection:
    """What the tuner knows while it puts the layers of one adapter in place.

    saved: The adapter's config as it was read, if its numbers are to be loaded. is_sum: Its numbers will be the sum of
    those of other adapters. specs: How the bases of a saved one were stored, by layer. made: What dense layers were
    clustered to, by layer. replaced: Parent, name and layer of each one that a tuner layer has taken the place of;
    they are let go when all is done, so that an error or Ctrl-C in the middle can be undone.
    """

    saved: ClusCompConfig | None = None
    is_sum: bool = False
    trained_blocks: int = 1
    specs: dict[str, ClusterSpec] = field(default_factory=dict)
    importance: Importance = field(default_factory=lambda: Importance({}))
    made: dict[str, Any] = field(default_factory=dict)
    replaced: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list)


class ClusCompModel(BaseTuner):
    """Creates a ClusComp model from a pretrained one.

    Args:
        model (`torch.nn.Module`): The model to adapt, compressed or dense.
        peft_config ([`ClusCompConfig`]): The configuration.
        adapter_name (`str`): Name of the adapter.
        low_cpu_mem_usage (`bool`): Create adapter weights on the meta device, to be loaded.

    Raises:
        ValueError: If the adapter does not fit the model; the model is then left as it was.
    """

    prefix: str = "cluscomp_"
    tuner_layer_cls = ClusCompLayer
    target_module_mapping: dict[str, list[str]] = {}

    # -- plan

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, is_sum: bool = False, **kwargs: Any
    ) -> None:
        # By the prefix of the tuner object PEFT finds what is trained and cast. By that of the class, loaders find all
        # tensors of an adapter: units and digests as well, which must be neither trained nor cast.
        self.prefix = "cluscomp_delta"
        config = self.peft_config[adapter_name]
        injection = self._injection = Injection(config if config.is_saved else None, is_sum)
        # PeftModel.from_pretrained removes the hooks of offloaded layers. When the weights are in, it would dispatch
        # the model again, by another map and with the deltas offloaded too.
        if restore_hooks(getattr(quantizer_of(model), "hooks", [])):
            hide_device_map(self)  # until the weights are in
        try:
            if config.is_saved:  # a further adapter that is made from the model's config starts anew
                self.peft_config[adapter_name] = config.without_facts()
            unfuse(model)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            for parent, name, layer in reversed(injection.replaced):
                setattr(parent, name, layer)
            for _, layer in list(adapted_layers(model, adapter_name)):
                layer.delete_adapter(adapter_name)
            self.peft_config.pop(adapter_name, None)
            # transformers' model.add_adapter() raises its flag before the adapter exists.
            if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
                forget_adapters(model)
            raise
        finally:
            self._injection = Injection()
            fuse(model)  # experts without an adapter
        if injection.saved is not None:
            layers = [layer for _, layer in adapted_layers(model, adapter_name)]
            Arrival(adapter_name, injection.saved).expected_by(layers)
        else:
            replaced = [layer for *_, layer in injection.replaced]
            announce(model, config, self.targeted_module_names, replaced, injection.importance)

    def _prepare_adapter_config(self, peft_config: ClusCompConfig, model_config: dict) -> ClusCompConfig:
        """Resolves the targets and checks them all; see the module docstring."""
        peft_config.check()
        check_task(self.model, peft_config)
        resolve_targets(self.model, peft_config)
        layers = matched_layers(self.model, peft_config)
        injection = self._injection
        injection.trained_blocks = count_blocks(layers)
        check_layers(self.model, peft_config, layers, is_new=injection.saved is None, is_sum=injection.is_sum)
        if injection.saved is None:
            injection.importance = find_importance(self.model, layers, peft_config)
            injection.made = cluster_layers(layers, peft_config, injection.importance.moments)
        else:
            prefix = getattr(self.model, "base_model_prefix", "")
            injection.specs = expand(injection.saved.layout, layers, prefix)
            check_saved(injection.saved, layers, injection.specs)
        return peft_config

    # -- replace

    def _create_and_replace(
        self,
        peft_config: ClusCompConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        injection = self._injection
        spec = injection.specs.get(current_key)
        adapter = NewAdapter(adapter_name, peft_config, injection.trained_blocks, injection.saved, spec)
        if isinstance(target, ClusCompLayer):
            target.update_layer(adapter)
        else:
            layer = self._new_layer(adapter, target, current_key)
            self._replace_module(parent, target_name, layer, target)

    def _new_layer(self, adapter: NewAdapter, target: nn.Module, name: str) -> ClusCompLayer:
        if isinstance(target, ClusteredLinear):
            clustered = ClusCompLinear(target, adapter, execution_device(target))
            clustered.layer_name = name
            return clustered
        config, weight, made = adapter.config, target.weight, self._injection.made.pop(name, None)
        spec = adapter.spec or spec_of(name, target, config)
        layer: ClusCompLayer
        if config.base == "dense":
            made = made or Codes(spec, None)
            layer = ClusCompDenseLinear(target, adapter._replace(spec=None), weight.device, *made)
        else:
            # Codes may come with the file. Built apart from init_empty_weights' patched registration.
            made = made or empty_layer(target, spec, config.policy.codebook_dtype_for(weight))
            layer = ClusCompLinear(made, adapter, weight.device, dense_dtype=weight.dtype)
        layer.was_partitioned, layer.layer_name = is_partitioned(weight), name
        if adapter.saved is None:
            layer.note_base(adapter.name)
        return layer

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own would read child.weight.
        if not (isinstance(child, ClusCompDenseLinear) and child.merged):  # that cannot be undone
            self._injection.replaced.append((parent, child_name, child))
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """fp32 by default; with `autocast_adapter_dtype=False` deltas take the dtype of the base, as TRL asks for
        under DeepSpeed ZeRO-3."""
        # PEFT's last step after loading weights, and also after creating empty layers for them.
        layers = [layer for _, layer in adapted_layers(self.model, adapter_name)]
        if not any(layer.awaits(adapter_name) for layer in layers):
            show_device_map(self)
            for layer in layers:
                if layer.dense_born:
                    layer.note_base(adapter_name)
        if autocast_adapter_dtype:
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
            return
        for layer in layers:
            dtype = layer.base_layer.bias.dtype if layer.base_layer.bias is not None else None
            if isinstance(layer, ClusCompDenseLinear):
                dtype = layer.base_layer.weight.dtype
            elif layer.dense_dtype is not None:
                dtype = layer.dense_dtype
            for parameter in layer.cluscomp_delta[adapter_name].parameters():
                parameter.data = parameter.data.to(dtype or getattr(self.model, "dtype", torch.float32))

    # -- merge

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As PEFT's; an error in any layer, or an interrupt, leaves all layers as they were."""
        if is_merged(self.model, adapter_names or self.active_adapters):
            return
        with all_or_nothing(self.model):
            super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """As PEFT's. With `safe_merge` every layer is checked before the first is written.

        An error or an interrupt leaves all layers as they were. A dense base is the exception, because keeping its
        weights would take their memory twice: layers that are merged by then are plain ones, and the next call merges
        the others.
        """
        if is_unloaded(self.model):
            return self.model
        if merge and safe_merge:
            check_merging(self.model, adapter_names)
        merged = {layer: list(layer.merged_adapters) for layer in tuner_layers(self.model)}
        injection = self._injection = Injection()
        try:
            model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        except BaseException:
            for parent, name, layer in reversed(injection.replaced):
                setattr(parent, name, layer)
            for layer in tuner_layers(self.model):
                set_merged(layer, merged[layer])
            raise
        finally:
            self._injection = Injection()
        fuse(model)
        return model

    # -- several adapters

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT enters this around every forward pass; without a refusal it would ignore `adapter_names` silently."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names (several adapters in one batch) is not supported by ClusComp; run a batch for each "
                "adapter, with set_adapter() between them."
            )
        yield

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "linear",
    ) -> None:
        """Adds an adapter whose deltas are the weighted sum of those of others; with codes shared, the sum is exact.

        Args:
            adapters (`list[str]`): Names of the adapters to combine.
            weights (`list[float]`): A weight for each.
            adapter_name (`str`): Name of the new adapter; nothing happens if there is one already.
            combination_type (`str`): "linear", the only kind that means something for codebooks.

        Raises:
            ValueError: If an adapter is missing or the numbers do not match.
        """
        if adapter_name in self.peft_config:
            return
        if combination_type != "linear":
            raise ValueError(f"combination_type must be 'linear', got {combination_type!r}.")
        if not adapters or len(adapters) != len(weights):
            raise ValueError(
                f"give one weight for each adapter, got {len(adapters)} adapters, {len(weights)} weights."
            )
        absent = [name for name in adapters if name not in self.peft_config]
        if absent:
            raise ValueError(f"Adapter {absent[0]} does not exist; there are {', '.join(self.peft_config)}.")
        layers = {
            name: layer
            for name, layer in self.model.named_modules()
            if isinstance(layer, ClusCompLayer) and any(adapter in layer.cluscomp_delta for adapter in adapters)
        }
        configs = [self.peft_config[name] for name in adapters]
        whole = [name for name in adapters if _trains_whole(self.peft_config[name])]
        if whole:
            raise ValueError(
                f"adapter {whole[0]!r} trains modules or tokens whole (modules_to_save, trainable_token_indices), of "
                "which there is no sum; merge the adapters one after another instead."
            )
        self.peft_config[adapter_name] = config_of_sum(configs, set(layers))
        self.inject_adapter(self.model, adapter_name, is_sum=True)
        for layer in layers.values():
            present = [(name, weight) for name, weight in zip(adapters, weights, strict=True)]
            present = [(name, weight) for name, weight in present if name in layer.cluscomp_delta]
            with torch.no_grad():
                deltas = layer.deltas([name for name, _ in present])
                layer.set_deltas(
                    adapter_name, sum_deltas(deltas, [weight for _, weight in present], layer.in_features)
                )

    # -- save and load

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: ClusCompConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        """The adapter's tensors. PEFT writes the config next, which is told here what they belong to."""
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        digests = code_digests(model, adapter_name)
        tensors = complete_tensors(model, config, adapter_name, selected, state_dict, digests)
        config.note_facts(read_facts(model, adapter_name, digests))
        return tensors

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: ClusCompConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Keys of the file to keys of the model; codes that other adapters use already are compared, not replaced."""
        state_dict = {_present_name(key): value for key, value in state_dict.items()}
        mapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        prepare_tensors(model, adapter_name, mapped)
        return mapped


def _present_name(key: str) -> str:
    """The key of a file as it is called now: in older files the key of a digest lacks the method's prefix."""
    return key.removesuffix("code_digest") + "cluscomp_code_digest" if key.endswith(".code_digest") else key


def _trains_whole(config: ClusCompConfig) -> bool:
    return bool(config.modules_to_save or config.trainable_token_indices)
