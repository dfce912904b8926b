"""`ClusCompModel`: PEFT's tuner. It finds the layers, checks everything that can be wrong before it touches one, puts
the tuner layers in place, and says what an adapter file holds.

    plan      match names, validate settings, weights, saved file and fingerprint (planning.py, saving.py), cluster
              dense layers (clustering.py); nothing is changed, errors end here
    replace   compressed layer → ClusCompLinear; dense layer and its codes → ClusCompLinear or ClusCompDenseLinear
    save      see saving.py
"""

from __future__ import annotations

import copy
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from torch import nn

from ..codes import ClusterSpec
from ..compress.budget.called import computed_with, handed_to_kernels
from ..compress.budget.coverage import coverage_line
from ..compress.budget.targets import default_targets
from ..layout import expand
from ..linear import ClusteredLinear, sum_deltas
from ..offloading import execution_device, put_back
from ..placement import is_partitioned
from .clustered_layer import ClusCompLinear
from .clustering import Codes, cluster_layers, empty_layer
from .config import ClusCompConfig
from .dense_layer import ClusCompDenseLinear
from .layer import ClusCompLayer
from .merging import all_or_nothing, check_merging, take_back, tuner_layers
from .planning import check_layers, spec_of
from .saving import check_saved, describe_and_complete, settle_loaded

__all__ = ["ClusCompModel"]


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

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # Of this tuner, by which PEFT's own code finds what is trained and has the adapter's dtype: units and digests,
        # which loaders know by the method's prefix, are neither.
        self.prefix = "cluscomp_delta"
        self._made: dict[str, Any] = {}
        # Dense layers are let go when all is done, so that an error or Ctrl-C in the middle can be undone.
        self._replaced: list[tuple[nn.Module, str, nn.Module]] = []
        # PeftModel.from_pretrained took the hooks of offloaded layers off, and would dispatch the model anew when the
        # weights are in, to another map and with the deltas offloaded too.
        if put_back(getattr(getattr(model, "hf_quantizer", None), "hooks", [])):
            self.hf_device_map = None  # hides the model's own until the weights are in
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            for parent, name, layer in reversed(self._replaced):
                setattr(parent, name, layer)
            for module in model.modules():
                if isinstance(module, ClusCompLayer) and adapter_name in module.cluscomp_delta:
                    module.delete_adapter(adapter_name)
            self.peft_config.pop(adapter_name, None)
            # transformers' model.add_adapter() raises its flag before the adapter exists.
            if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
                model.__dict__.pop("_hf_peft_config_loaded", None)
            raise
        finally:
            self._made, self._replaced = {}, []
        if not self.peft_config[adapter_name].expects_weights and os.environ.get("LOCAL_RANK", "0") == "0":
            names = {name.removesuffix(".base_layer") for name in self.targeted_module_names}
            reasons = {**computed_with(model), **handed_to_kernels(model)}
            print(coverage_line(model, names, reasons=reasons, done="adapted", rest="not adapted"), file=sys.stderr)

    def _prepare_adapter_config(self, peft_config: ClusCompConfig, model_config: dict) -> ClusCompConfig:
        """Resolves the targets and checks them all; see the module docstring."""
        peft_config.check()
        targets = peft_config.target_modules
        if targets is None or (isinstance(targets, str) and targets.lower() == "all-linear"):
            peft_config.target_modules = self._default_targets(peft_config)
        layers = self._matched(peft_config)
        peft_config.note_layers(layers)
        check_layers(self.model, peft_config, layers)
        if peft_config.expects_weights:
            check_saved(peft_config, layers, self._saved_specs(peft_config, layers))
        else:
            self._made = cluster_layers(layers, peft_config)
        return peft_config

    def _default_targets(self, config: ClusCompConfig) -> set[str]:
        """Every clustered layer; on a dense model every linear layer but heads; none that is not called. Layers filter
        applied here, because PEFT does not apply it to full names."""
        model = self.model
        layers = {name for name, module in model.named_modules() if isinstance(module, ClusCompLayer)}
        layers |= {
            name
            for name, module in model.named_modules()
            if isinstance(module, ClusteredLinear) and name.removesuffix(".base_layer") not in layers
        }
        if not layers:
            layers = set(default_targets(model))
        layers -= computed_with(model).keys() | handed_to_kernels(model).keys()
        if not layers:
            raise ValueError(f"{type(model).__name__} has no linear layer to adapt; name some in target_modules.")
        if config.layers_to_transform is not None:
            probe = copy.copy(config)
            probe.exclude_modules = None
            chosen = set()
            for name in layers:
                probe.target_modules = {name.rpartition(".")[2]}
                if check_target_module_exists(probe, name):
                    chosen.add(name)
            if not chosen:
                raise ValueError(
                    f"no linear layer has an index in layers_to_transform={config.layers_to_transform!r} "
                    f"(layers_pattern={config.layers_pattern!r})."
                )
            layers = chosen
        return layers

    def _matched(self, config: ClusCompConfig) -> dict[str, nn.Module]:
        """The layers that PEFT will hand to `_create_and_replace`, in its order."""
        matched: dict[str, nn.Module] = {}
        inside: list[str] = []
        for name, module in self.model.named_modules():
            if name and not name.startswith(tuple(inside)) and self._check_target_module_exists(config, name):
                matched[name] = module
            if isinstance(module, BaseTunerLayer):
                inside.append(f"{name}.")
        return matched

    def _saved_specs(self, config: ClusCompConfig, names: Any) -> dict[str, ClusterSpec]:
        return expand(config.layout, names, getattr(self.model, "base_model_prefix", ""))

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
        saved = self._saved_specs(peft_config, [current_key]).get(current_key) if peft_config.expects_weights else None
        if isinstance(target, ClusCompLayer):
            target.update_layer(adapter_name, peft_config, saved)
        else:
            self._replace_module(
                parent, target_name, self._new_layer(peft_config, adapter_name, target, current_key, saved), target
            )

    def _new_layer(
        self,
        config: ClusCompConfig,
        adapter_name: str,
        target: nn.Module,
        name: str,
        saved: ClusterSpec | None,
    ) -> ClusCompLayer:
        if isinstance(target, ClusteredLinear):
            clustered = ClusCompLinear(target, adapter_name, config, execution_device(target), spec=saved)
            clustered.layer_name = name
            return clustered
        weight, made = target.weight, self._made.pop(name, None)
        spec = saved or spec_of(name, target, config)
        layer: ClusCompLayer
        if config.base == "dense":
            layer = ClusCompDenseLinear(target, adapter_name, config, weight.device, *(made or Codes(spec, None)))
        else:
            # Codes may come with the file. Built apart from init_empty_weights' patched registration.
            made = made or empty_layer(target, spec, config.policy.codebook_dtype_for(target.weight))
            layer = ClusCompLinear(made, adapter_name, config, weight.device, dense_dtype=weight.dtype, spec=saved)
        layer.was_partitioned, layer.layer_name = is_partitioned(weight), name
        if not config.expects_weights:
            layer.note_base(adapter_name)
        return layer

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own would read child.weight.
        if not (isinstance(child, ClusCompDenseLinear) and child.merged):  # that cannot be taken back
            self._replaced.append((parent, child_name, child))
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """fp32 by default; with `autocast_adapter_dtype=False` deltas take the dtype of the base, as TRL asks for
        under DeepSpeed ZeRO-3."""
        # PEFT's last step after loading weights, and also after creating empty layers for them.
        if not self.peft_config[adapter_name].expects_weights:
            self.__dict__.pop("hf_device_map", None)
            for layer in self.model.modules():
                if isinstance(layer, ClusCompLayer) and layer.dense_born and adapter_name in layer.cluscomp_delta:
                    layer.note_base(adapter_name)
        if autocast_adapter_dtype:
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
            return
        for layer in self.model.modules():
            if isinstance(layer, ClusCompLayer) and adapter_name in layer.cluscomp_delta:
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
        with all_or_nothing(self.model):
            super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """As PEFT's; with `safe_merge` every layer is checked before the first is written. What interrupts it leaves
        all layers as they were, but for a dense base, where keeping the weights would take their memory twice: those
        that are merged already are plain layers then, and the next call does the others.
        """
        if merge and safe_merge:
            check_merging(self.model, adapter_names)
        merged = {layer: list(layer.merged_adapters) for layer in tuner_layers(self.model)}
        self._replaced = []
        try:
            return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        except BaseException:
            for parent, name, layer in reversed(self._replaced):
                setattr(parent, name, layer)
            for layer in tuner_layers(self.model):
                take_back(layer, merged[layer])
            raise
        finally:
            self._replaced = []

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
        config = copy.copy(configs[0])
        config.settle()
        config.target_modules, config.init_weights = set(layers), True
        blocks, flags = [other.num_blocks for other in configs], [other.train_scales for other in configs]
        if None not in blocks:
            config.num_blocks, config._caps_blocks = math.lcm(*blocks), True
            config.train_scales = True if True in flags else None if None in flags else False
        elif len({(other.rank, other.num_blocks, other.train_scales) for other in configs}) > 1:
            raise ValueError(
                f"adapters of different capacity cannot be added up: rank {[other.rank for other in configs]}, "
                f"num_blocks {blocks}, train_scales {flags}. Give all of them the same rank, or all num_blocks."
            )
        self.peft_config[adapter_name] = config
        self.inject_adapter(self.model, adapter_name)
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
        """The adapter's tensors; the config learns here, just before PEFT writes it, what they belong to."""
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return describe_and_complete(model, config, adapter_name, selected, state_dict)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: ClusCompConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Keys of the file to keys of the model; codes that other adapters use already are compared, not replaced."""
        state_dict = {_present_name(key): value for key, value in state_dict.items()}
        mapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        settle_loaded(model, adapter_name, mapped)
        # From here on the config is that of a living adapter: a further one made from it starts fresh.
        config.settle()
        return mapped


def _present_name(key: str) -> str:
    """The key of a file as it is called now; transformers' loader knows ours by the prefix, which digests had not."""
    return key.removesuffix("code_digest") + "cluscomp_code_digest" if key.endswith(".code_digest") else key


def _trains_whole(config: ClusCompConfig) -> bool:
    return bool(config.modules_to_save or config.trainable_token_indices)
