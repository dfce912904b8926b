"""vLLM's plug-in: `vllm serve DIR` for a checkpoint whose `quant_method` is "cluscomp".

vLLM calls [`register`] in each of its processes, by the entry point `vllm.general_plugins`. Its models merge layers
that read the same input; each part keeps its codebook, and the parts are computed one after another:

    qkv_proj                     one linear layer of vLLM                  y = [x Wqᵀ │ x Wkᵀ │ x Wvᵀ]
      codes      ─ q │ k │ v     flat, uint8                               W of each part straight from its codes,
      codebook   ─ q │ k │ v     flat                                      by the ops that transformers' layers use
      scale_in, scale_out        flat, where a part has them

So a server computes what transformers does with the same tensors, up to the kernels of attention and norms.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from .. import ops
from ..codes import ClusterSpec, combine_fingerprints, fingerprint, num_groups
from ..layout import expand

__all__ = ["ClusCompConfigOfVllm", "ClusteredLinearMethod", "register"]

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_METHOD = "cluscomp"
_AS_DENSE = "serve what `cluscomp export DIR OUT --to dense` makes of it."
# What vLLM calls the parts of a merged layer when it loads them; other layers have numbers.
_QKV = {"q": 0, "k": 1, "v": 2}


def register() -> None:
    """Makes vLLM know the checkpoint format; calling it again changes nothing."""
    register_quantization_config(_METHOD)(ClusCompConfigOfVllm)


class ClusCompConfigOfVllm(QuantizationConfig):
    """The `quantization_config` of a checkpoint, as vLLM wants it.

    Args:
        layout (`dict`): Name patterns of the clustered matrices and how each is stored; see `cluscomp_peft.layout`.
        codebook_dtype (`torch.dtype`): Of codebooks and scales.
        fingerprint (`str`, *optional*): Digest of all codes, in the order of transformers' model.
    """

    def __init__(
        self, layout: dict[str, dict[str, Any]], codebook_dtype: torch.dtype, fingerprint: str | None = None
    ) -> None:
        super().__init__()
        self.layout, self.codebook_dtype, self.fingerprint = layout, codebook_dtype, fingerprint
        self._awaited: set[str] = set()  # clustered matrices of the model in this process
        self._digests: dict[str, str] = {}
        self._model_config: Any = None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ClusCompConfigOfVllm:
        """The config of a checkpoint that can be served.

        Raises:
            ValueError: If embeddings or experts are clustered, or the format is newer than this package.
        """
        # Its models do not tell an embedding its name, so it could not be refused there.
        if config.get("embeddings") is not None:
            raise ValueError(
                "the embeddings of this checkpoint are clustered, and vLLM pads vocabularies, which codes cannot be; "
                f"compress the model without --embeddings, or {_AS_DENSE}"
            )
        if config.get("version") != 1:
            raise ValueError(
                f"this checkpoint has version {config.get('version')!r} of the ClusComp format, but this "
                "cluscomp_peft serves version 1; upgrade cluscomp_peft, or compress the model again."
            )
        experts = [name for name in config["layout"] if "experts" in name.split(".")]
        if experts:
            raise ValueError(
                f"the experts of this checkpoint are clustered ({experts[0]}), which the vLLM plug-in does not serve; "
                f"compress the model with experts left dense (exclude_modules), or {_AS_DENSE}"
            )
        return cls(config["layout"], _DTYPES[config["codebook_dtype"]], config.get("fingerprint"))

    def get_name(self) -> str:
        return _METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return list(_DTYPES.values())

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # all is in config.json

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.layout = hf_to_vllm_mapper.apply_dict(self.layout)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of a layer; for layers that are dense the one of dense layers.

        Raises:
            ValueError: If the layer is clustered and of a kind that is not served, or clustered in part.
        """
        if isinstance(layer, LinearBase):
            specs = self._parts(prefix)
            if not specs:
                return UnquantizedLinearMethod()
            self._awaited |= specs.keys()
            running = get_current_vllm_config_or_none()
            self._model_config = self._model_config if running is None else running.model_config.hf_config
            return ClusteredLinearMethod(prefix, specs, self)
        if isinstance(layer, VocabParallelEmbedding) and self._specs([prefix]):
            raise ValueError(
                f"{prefix} is clustered, and vLLM pads vocabularies, which codes cannot be; compress the model with "
                f"its output head left dense, as it is by default, or {_AS_DENSE}"
            )
        if isinstance(layer, RoutedExperts) and any(name.startswith(f"{prefix}.") for name in self._inside(prefix)):
            raise ValueError(
                f"the experts of {prefix} are clustered, which the vLLM plug-in does not serve; {_AS_DENSE}"
            )
        return None

    def note(self, name: str, digest: str) -> None:
        """Takes the digest of the codes of a matrix; with the last of them, all are held against config.json.

        Raises:
            ValueError: If the codes are not those of the checkpoint.
        """
        self._digests[name] = digest
        if self._digests.keys() != self._awaited:
            return
        order = self._order()
        found = combine_fingerprints(self._digests[name] for name in order) if order else self.fingerprint
        self._digests.clear()
        if self.fingerprint not in (None, found):
            raise ValueError(
                f"the codes of this checkpoint are not the ones it was saved with (fingerprint {found}, config.json "
                f"says {self.fingerprint}): a file is damaged or belongs to another model. Download or compress it "
                "again."
            )

    def _order(self) -> list[str]:
        """The matrices in the order of transformers' model; empty where this process has only some of them, or vLLM
        calls them otherwise."""
        config = copy.deepcopy(self._model_config)
        if config is None:
            return []
        vars(config).pop("quantization_config", None)
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
        except ValueError:  # no causal language model
            return []
        names = expand(self.layout, (name for name, _ in model.named_modules()), model.base_model_prefix)
        return list(names) if names.keys() == self._digests.keys() else []

    def _parts(self, prefix: str) -> dict[str, ClusterSpec]:
        """Name and spec of what is merged into a layer, in vLLM's order; empty if it is dense."""
        parent, _, leaf = prefix.rpartition(".")
        names = [f"{parent}.{part}" if parent else part for part in self.packed_modules_mapping.get(leaf, [leaf])]
        specs = self._specs(names)
        absent = [name for name in names if name not in specs]
        if specs and absent:
            raise ValueError(
                f"vLLM merges {', '.join(names)} into {prefix}, but {', '.join(absent)} stayed dense; compress all of "
                "them, or none."
            )
        return {name: specs[name] for name in names} if specs else {}

    def _specs(self, names: list[str]) -> dict[str, ClusterSpec]:
        return expand(self.layout, names, prefix="model")

    def _inside(self, prefix: str) -> list[str]:
        """Names of clustered layers, those of patterns with the numbers that `prefix` has."""
        numbers = [part for part in prefix.split(".") if part.isdigit()]
        found = []
        for pattern in self.layout:
            name = pattern
            for number in numbers:
                name = name.replace("*", number, 1)
            found.append(name)
        return found


class Part(NamedTuple):
    """One of the matrices [out, in] of a layer, and where its numbers begin in each of the layer's flat tensors."""

    spec: ClusterSpec
    out_features: int
    in_features: int
    begins: dict[str, int]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of its tensors, as the checkpoint has them."""
        spec = self.spec
        shapes: dict[str, tuple[int, ...]] = {
            "codes": (self.in_features, spec.code_bytes(self.out_features)),
            "codebook": (spec.num_blocks, spec.num_clusters, spec.group_size),
        }
        if spec.scale_in:
            shapes["scale_in"] = (self.in_features,)
        if spec.scale_out:
            shapes["scale_out"] = (self.out_features,)
        return shapes

    def view(self, layer: nn.Module, name: str) -> torch.Tensor | None:
        """Its part of a flat tensor, in its shape; None for a scale that it does not have."""
        shape = self.shapes().get(name)
        if shape is None:
            return None
        begin = self.begins[name]
        flat: torch.Tensor = getattr(layer, name)
        return flat[begin : begin + torch.Size(shape).numel()].view(shape)

    def weight(self, layer: nn.Module) -> ops.PackedWeight:
        codes, codebook = self.view(layer, "codes"), self.view(layer, "codebook")
        assert codes is not None and codebook is not None
        scales = self.view(layer, "scale_in"), self.view(layer, "scale_out")
        return ops.PackedWeight(codes, codebook, self.out_features, *scales)


class ClusteredLinearMethod(LinearMethodBase):
    """How vLLM makes, loads and computes a linear layer whose parts are clustered.

    Args:
        prefix (`str`): Name of the layer.
        specs (`dict[str, ClusterSpec]`): Of its parts, by their names in the checkpoint.
        config ([`ClusCompConfigOfVllm`]): Of the checkpoint.
    """

    def __init__(self, prefix: str, specs: dict[str, ClusterSpec], config: ClusCompConfigOfVllm) -> None:
        self.prefix, self.specs, self.config = prefix, specs, config
        self.parts: list[Part] = []
        self._loaded: set[tuple[str, int]] = set()

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Registers the flat tensors.

        Raises:
            ValueError: If the layer is cut for tensor parallelism, or merged in a way that the checkpoint is not.
        """
        if input_size_per_partition != input_size or sum(output_partition_sizes) != output_size:
            raise ValueError(
                f"{self.prefix} cannot be cut for tensor parallelism: its codes are packed in groups across the cuts. "
                "Leave out --tensor-parallel-size; --pipeline-parallel-size and --data-parallel-size keep layers "
                "whole."
            )
        if len(output_partition_sizes) != len(self.specs):
            raise ValueError(
                f"{self.prefix} has {len(output_partition_sizes)} parts in vLLM, but {len(self.specs)} in the "
                "checkpoint; this architecture is not served."
            )
        sizes: dict[str, int] = {}
        for spec, out_features in zip(self.specs.values(), output_partition_sizes, strict=True):
            part = Part(spec, out_features, input_size, {})
            for name, shape in part.shapes().items():
                part.begins[name] = sizes.get(name, 0)
                sizes[name] = part.begins[name] + torch.Size(shape).numel()
            self.parts.append(part)
        for name, size in sizes.items():
            dtype = torch.uint8 if name == "codes" else self.config.codebook_dtype
            parameter = nn.Parameter(torch.empty(size, dtype=dtype), requires_grad=False)
            parameter.weight_loader = self._loader(layer, name)  # type: ignore[attr-defined]
            layer.register_parameter(name, parameter)

    def _loader(self, layer: nn.Module, name: str) -> Callable[..., None]:
        def load(parameter: nn.Parameter, tensor: torch.Tensor, shard: int | str | None = None) -> None:
            index = _QKV[shard] if isinstance(shard, str) else shard or 0
            expected = self.parts[index].shapes().get(name)
            if expected != tuple(tensor.shape):
                raise ValueError(
                    f"{name} of part {index} of {self.prefix} is {list(tensor.shape)} in the checkpoint, but by its "
                    f"config.json {expected and list(expected)}: the two do not belong together. Download or compress "
                    "it again."
                )
            view = self.parts[index].view(layer, name)
            assert view is not None
            view.data.copy_(tensor)
            self._loaded.add((name, index))

        return load

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Looks whether all is there and usable.

        Raises:
            ValueError: If tensors are missing or not finite, or codes name centroids that there are not, or are not
                those that were saved.
        """
        for index, (name, part) in enumerate(zip(self.specs, self.parts, strict=True)):
            absent = [key for key in part.shapes() if (key, index) not in self._loaded]
            if absent:
                raise ValueError(
                    f"the checkpoint lacks {absent[0]} of part {index} of {self.prefix}; download it again."
                )
            weight = part.weight(layer)
            floats = [value for value in weight[1:] if isinstance(value, torch.Tensor)]
            if not all(bool(value.isfinite().all()) for value in floats):
                raise ValueError(f"{self.prefix} has NaN or infinite values in the checkpoint; download it again.")
            if ops.has_stray_codes(
                weight.codes, part.spec.num_clusters, num_groups(part.out_features, part.spec.group_size)
            ):
                raise ValueError(f"{self.prefix} has codes beyond its codebook; download the checkpoint again.")
            self.config.note(name, fingerprint(weight.codes, part.out_features, part.spec))

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., in] to [..., out], the parts beside each other."""
        if len(self.parts) == 1:
            return ops.linear(x, self.parts[0].weight(layer), bias)
        sizes = [part.out_features for part in self.parts]
        biases = [None] * len(sizes) if bias is None else bias.split(sizes)
        outputs = [ops.linear(x, part.weight(layer), own) for part, own in zip(self.parts, biases, strict=True)]
        return torch.cat(outputs, dim=-1)
