"""The quantizer that `from_pretrained` calls: a compressed checkpoint, or a dense one clustered on the fly.

compressed      the linear layers that the layout names become empty `ClusteredLinear`s before any weight is read, so
                that the dense weights never exist
on the fly      each dense weight is clustered as soon as it is read, by the same call as in `cluscomp compress`, and
                its layer is replaced. As many are clustered at once as there are cores and `TOGETHER` allows; the
                result does not depend on how many

Experts that the model keeps in one parameter are taken apart: at once where they are clustered already, and on the fly
when the loader has put the parameter together.
"""

from __future__ import annotations

import os
import sys
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch
from accelerate.hooks import ModelHook
from torch import nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer

from ..clustered_weight import ClusteredWeight, clustered_weights
from ..codes import ClusterSpec, combine_fingerprints
from ..compress.policy import WITHOUT_TEXT
from ..compress.stream.pipeline import TOGETHER
from ..dense import weight_of
from ..expert_weights import layer_name
from ..experts import ExpertStack, fuse, unfuse, unfuse_stack
from ..layout import summarize, unmatched
from ..linear import ClusteredLinear
from ..offloading import hooks_of
from ..upstream.accelerate import device_map_of, state_dict_of_offloaded
from ..upstream.peft import keep_dtypes
from ..upstream.transformers import ConversionOps, kept_in_fp32, mark_loaded
from .config import ClusCompQuantizationConfig
from .embeddings import forget_embeddings, place_embedding
from .on_load import ClusterOnLoad, arrived, in_thread
from .reading import check_tensors, stored_specs
from .refusals import (
    refuse_adapters,
    refuse_non_finite,
    refuse_offloading,
    refuse_packed,
    refuse_tensor_parallel,
    refuse_training,
)

__all__ = ["ClusCompHfQuantizer"]


class ClusCompHfQuantizer(HfQuantizer):
    """Registered for `quant_method="cluscomp"`."""

    requires_calibration = False
    quantization_config: ClusCompQuantizationConfig

    def __init__(self, quantization_config: ClusCompQuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._specs: dict[str, ClusterSpec] = {}
        # Parameters of experts to be clustered on the fly, by name.
        self._stacks: dict[str, ExpertStack] = {}
        # Embeddings and heads clustered on the fly wait here until all is loaded.
        self._vocabulary: dict[str, ClusteredLinear] = {}
        self._embeddings: set[str] = set()
        # What clustering on the fly did to each matrix: true_bits, squared_error, squared_norm, seconds.
        self.report: dict[str, dict[str, float]] = {}
        self._progress: tqdm | None = None
        self._jobs: list[tuple[str, nn.Module, Future]] = []
        # transformers logs what a conversion raises and goes on with the next tensor; the first error is kept here,
        # ends the clustering of the others, and is raised when loading is over.
        self.failure: Exception | None = None
        # Of a model with offloaded weights; PEFT takes them off when it loads a saved adapter.
        self.hooks: list[tuple[nn.Module, ModelHook]] = []
        self._model: Callable[[], nn.Module | None] = _no_model

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": _no_model}  # a copy's model is another

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Asked with the map as given and, if that was "auto", with the one inferred; no weight is read before.

        Raises:
            ValueError: If weights that are to be clustered on the fly would be offloaded.
        """
        if not self.pre_quantized:
            refuse_offloading(device_map)

    def param_element_size(self, model: nn.Module, param_name: str, param: torch.Tensor) -> float:
        """Bytes per element for `device_map="auto"`: of a weight clustered on the fly those of what will be stored.
        A compressed checkpoint's own tensors are what they take.
        """
        if not self.param_needs_quantization(model, param_name):
            return param.element_size()
        itemsize = self.quantization_config.dtype.itemsize
        stack = self._stacks.get(param_name)
        if stack is not None:
            out_features, in_features = stack.shape[:0:-1] if stack.transposed else stack.shape[1:]
            specs = [self._specs[layer_name(param_name, index)] for index in range(stack.shape[0])]
        else:
            name = param_name.rpartition(".")[0]
            out_features, in_features = weight_of(model.get_submodule(name)).shape
            specs = [self._specs[name]]
        return sum(spec.num_bytes(in_features, out_features, itemsize) for spec in specs) / param.numel()

    def adjust_max_memory(self, max_memory: dict[Any, Any]) -> dict[Any, Any]:
        """Keeps a tenth free for K-means on the fly; loading what is compressed needs nothing beside it."""
        return max_memory if self.pre_quantized else {device: size * 0.9 for device, size in max_memory.items()}

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        config = self.quantization_config
        refuse_tensor_parallel(model)
        model.add_model_tags("cluscomp")  # of cards that transformers and PEFT write, on `push_to_hub` for one
        if not self.pre_quantized:
            refuse_packed(kwargs.get("checkpoint_files") or [])
            stacks = unfuse(model)
            self._specs = {**config.policy.specs(model), **config.policy.embedding_specs(model)}
            self._embeddings = set(config.policy.embeddings_of(model))
            total = sum(model.get_submodule(name).weight.numel() for name in self._specs)
            self._stacks = {stack.name: stack for stack in stacks if layer_name(stack.name, 0) in self._specs}
            fuse(model)  # the loader knows the parameter
            # disable=None: silent where nobody watches a terminal
            self._progress = tqdm(total=total, desc="Clustering", unit="weight", unit_scale=True, disable=None)
            return model
        unfuse(model)
        self._specs = stored_specs(model, config)
        layers = {name: model.get_submodule(name) for name in self._specs}
        check_tensors(kwargs.get("checkpoint_files") or [], config, layers, self._specs, model.base_model_prefix)
        entries = config.policy.embeddings_of(model)
        for name, spec in self._specs.items():
            dense = layers[name]
            out_features, in_features = weight_of(dense).shape
            clustered = ClusteredLinear(
                in_features,
                out_features,
                spec,
                bias=getattr(dense, "bias", None) is not None,
                codebook_dtype=config.dtype,
                dtype=dense.weight.dtype,
                conv1d=isinstance(dense, Conv1D),
            )
            if name in entries:
                place_embedding(model, entries[name], clustered)
                continue
            if _stays_fp32(model, name, dense.weight.dtype):
                clustered.weight_dtype = torch.float32
            model.set_submodule(name, clustered)
        fuse(model)  # experts that stayed dense
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        config = self.quantization_config
        keep_dtypes(model)
        self._model = weakref.ref(model)
        absent = [
            f"{name}.{key}"
            for name, module in clustered_weights(model)
            for key, parameter in module._parameters.items()
            if self.pre_quantized and key != "bias" and parameter is not None and not arrived(module, key, parameter)
        ]
        if absent:
            shown = ", ".join(absent[:3]) + (f" and {len(absent) - 3} more" if len(absent) > 3 else "")
            raise ValueError(
                f"the compressed checkpoint is incomplete, it lacks {shown}; download or compress it again."
            )
        if not self.pre_quantized:
            self._cluster_embeddings(model)
            if os.environ.get("LOCAL_RANK", "0") == "0":
                print(WITHOUT_TEXT, file=sys.stderr)
            if self._progress is not None:
                self._progress.close()
            self._progress = None  # a model that is copied or pickled does not take it with it
            if self.failure is not None:
                raise self.failure
            self._record(model)
            return model
        refuse_non_finite(clustered_weights(model))
        self.hooks = hooks_of(model)
        for name, module in clustered_weights(model):
            if module.has_stray_codes():
                raise ValueError(
                    f"{name}.codes names centroids beyond the {module.spec.num_clusters} of its codebook: the "
                    "checkpoint is damaged, or was made to be. Download or compress it again."
                )
        names = [name for name, _ in model.named_modules()]
        whole = not unmatched(config.layout, names, getattr(model, "base_model_prefix", ""))
        if config.fingerprint is not None and whole:
            found = model_fingerprint(model)
            if found not in (None, config.fingerprint):
                raise ValueError(
                    f"the codes of this checkpoint are not the ones it was saved with (fingerprint {found}, "
                    f"config.json says {config.fingerprint}): a file is damaged or belongs to another model. Download "
                    "or compress it again."
                )
        return model

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        name, _, key = param_name.rpartition(".")
        clustered = (key == "weight" and name in self._specs) or param_name in self._stacks
        return not self.pre_quantized and clustered

    def get_quantize_ops(self) -> ConversionOps:
        return ClusterOnLoad(self)

    def take_apart(self, name: str) -> ExpertStack | None:
        """Takes a parameter of experts apart, which is loaded; None if it is that of a layer."""
        stack = self._stacks.get(name)
        if stack is not None:
            unfuse_stack(stack)
        return stack

    def submit(self, model: nn.Module, name: str, dense: nn.Module) -> None:
        """Clusters a dense layer beside others; waits for the oldest of them where there are enough."""
        weight = weight_of(dense)
        cores = torch.get_num_threads() if weight.device.type == "cpu" else 1
        together = max(1, min(cores, TOGETHER // max(1, weight.numel())))
        self._collect(model, together - 1)
        self._jobs.append((name, dense, in_thread(self._cluster, name, dense, cores // together)))

    @torch.no_grad()
    def _cluster(self, name: str, dense: nn.Module, threads: int) -> tuple[ClusteredLinear, dict[str, float]]:
        """The clustered layer and its report."""
        config, started = self.quantization_config, time.perf_counter()
        source = weight_of(dense) if name in self._embeddings else dense
        layer = config.policy.cluster(name, source, self._specs[name], threads=threads)
        weight = weight_of(dense).float()
        return layer, {
            "true_bits": layer.true_bits,
            "squared_error": float((layer.decode(torch.float32) - weight).square().sum()),
            "squared_norm": float(weight.square().sum()),
            "seconds": time.perf_counter() - started,
        }

    def _collect(self, model: nn.Module, room: int) -> None:
        """Puts finished layers in place, oldest first, until at most `room` are being clustered."""
        while len(self._jobs) > room:
            name, dense, job = self._jobs.pop(0)
            try:
                layer, self.report[name] = job.result()
            except Exception as error:
                self.failure = self.failure or error
                continue
            for key, parameter in layer._parameters.items():
                if key != "bias" and parameter is not None:
                    mark_loaded(parameter)
            if name in self._embeddings:
                self._vocabulary[name] = layer
            else:
                layer.bias = dense.bias  # it may have been read after the weight
                model.set_submodule(name, layer)
            if self._progress is not None:
                self._progress.update(weight_of(dense).numel())

    def _cluster_embeddings(self, model: nn.Module) -> None:
        """Puts embeddings and heads in place, when all weights are loaded and what is tied is known."""
        entries = self.quantization_config.policy.embeddings_of(model)
        self._specs.update(self.quantization_config.policy.embedding_specs(model))
        self._embeddings = set(entries)
        begun = {*self._vocabulary, *(name for name, *_ in self._jobs)}
        for name in entries.keys() - begun if self.failure is None else ():
            self.submit(model, name, entries[name].module)  # its file had the weight under another name
        self._collect(model, 0)
        for name, entry in entries.items() if self.failure is None else ():
            place_embedding(model, entry, self._vocabulary.pop(name))

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        # save_pretrained() asks before it writes config.json; merging may have changed how matrices are stored.
        self._record(model)
        if device_map_of(model) is not None or not any(parameter.is_meta for parameter in model.parameters()):
            return None, {}
        # transformers reads offloaded weights back only where its device_map offloaded them, not where
        # accelerate.cpu_offload or disk_offload did.
        return state_dict_of_offloaded(model), {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Asked by Trainer, which refuses a model without an adapter next, in words that do not say how to make one.

        Raises:
            ValueError: If the model has no adapter.
        """
        refuse_training(self._model())
        return False

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        refuse_adapters(name for name, _ in clustered_weights(model))
        if isinstance(dtype, str):  # as the config of a model that was saved has it
            dtype = getattr(torch, dtype)
        dtype = dtype or model.dtype  # before the first layer is replaced
        layers = [(name, module) for name, module in model.named_modules() if isinstance(module, ClusteredWeight)]
        for name, module in layers:
            model.set_submodule(name, module.to_dense(dtype))
        fuse(model)
        forget_embeddings(model)
        return model

    def _record(self, model: nn.Module) -> None:
        """Writes what the model holds now into its quantization config."""
        specs = {name.removesuffix(".base_layer"): module.spec for name, module in clustered_weights(model)}
        names = [name.removesuffix(".base_layer") for name, _ in model.named_modules()]
        dtypes = {str(module.codebook.dtype).removeprefix("torch.") for _, module in clustered_weights(model)}
        if len(dtypes) > 1:
            raise ValueError(
                f"the codebooks of this model have several dtypes ({', '.join(sorted(dtypes))}), but a checkpoint has "
                "one; cast the model as a whole with model.to(dtype)."
            )
        if dtypes:
            self.quantization_config.codebook_dtype = dtypes.pop()
        self.quantization_config.layout = summarize(specs, names)
        self.quantization_config.fingerprint = model_fingerprint(model)
        model.config.quantization_config = self.quantization_config


def _no_model() -> None:
    """Of a quantizer whose model is gone, or another's."""
    return None


def _stays_fp32(model: nn.Module, name: str, dtype: torch.dtype) -> bool:
    """Whether transformers keeps this layer's weight in fp32 in a model of another dtype (the last layer of T5's MLP
    in fp16, say), whose code then casts what goes in."""
    return not kept_in_fp32(model, dtype).isdisjoint(name.split("."))


def model_fingerprint(model: nn.Module) -> str | None:
    """Digest of the codes of every clustered layer; None if some are offloaded and were never seen."""
    return combine_fingerprints(module.fingerprint() for _, module in clustered_weights(model))
