"""A checkpoint read as the dense model that it stands for, tensor by tensor: decoded, and with an adapter merged.

    model.layers.0.mlp.up_proj.codes, .codebook, .scale_in, .scale_out     what a compressed checkpoint holds
                     └───────────── adapter ─────────────┘
    model.layers.0.mlp.up_proj.weight                                      what is read here

It answers as the [`DenseCheckpoint`] of the dense model does, so whatever reads that can read this: no more than the
tensor that is asked for is ever dense.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from .. import ops
from ..clustered_weight import VALUES
from ..codes import ClusterSpec, combine_fingerprints, num_groups, value_fingerprint
from ..compress.architecture import check_generation_config, empty_model, stored_dtype
from ..compress.stream.headers import check_folder, weight_files
from ..compress.stream.source import PARTS, DenseCheckpoint
from ..dense import is_dense_linear, weight_shape
from ..embedding import is_dense_embedding
from ..hf.config import ClusCompQuantizationConfig
from ..hf.reading import check_tensors, stored_specs
from ..hf.refusals import refuse_non_finite
from ..linear import ClusteredLinear
from ..upstream.transformers import kept_in_fp32, renaming_of
from .adapter import Adapter, is_adapter, read_config

__all__ = ["MergedCheckpoint", "Opened", "open_checkpoint"]


class Layer(NamedTuple):
    """A layer whose weight is made instead of read: its name, [out, in], and whether it is a Conv1D."""

    name: str
    shape: tuple[int, int]
    conv1d: bool


class MergedCheckpoint(DenseCheckpoint):
    """The tensors of the dense model that a checkpoint, and perhaps an adapter on it, stand for.

    Args:
        folder (`str`): Of the checkpoint, compressed or dense.
        model (`nn.Module`): The dense model without weights.
        specs: How each clustered layer is stored; empty for a dense checkpoint.
        dtype (`torch.dtype`): Of floating-point tensors. Modules that transformers keeps in fp32 in a model of this
            dtype stay so here.
        adapter ([`Adapter`], *optional*): Merged on the way.

    Attributes:
        fingerprints: Layer → digest of its codes, of every clustered weight that has been read. codebooks: Layer →
            digest of codebook and scales, before the adapter.

    Raises:
        ValueError: If the files do not hold what the model needs.
    """

    def __init__(
        self,
        folder: str,
        model: nn.Module,
        specs: Mapping[str, ClusterSpec],
        dtype: torch.dtype,
        adapter: Adapter | None = None,
    ) -> None:
        rename = renaming_of(model)
        self.dtype, self.adapter = dtype, adapter
        super().__init__(folder, str(getattr(model, "base_model_prefix", "")), rename)
        self._stored = DenseCheckpoint(folder, self.prefix)  # as it is, with parts
        self.fingerprints: dict[str, str] = {}
        self.codebooks: dict[str, str] = {}
        self._fp32 = kept_in_fp32(model, dtype)
        self._clustered: dict[str, Layer] = {}
        self._adapted: dict[str, Layer] = {}
        for name in specs:
            self._hide_parts(_layer(model, name))
        strays = [key for key in self.shapes if key.endswith(".codes")]
        if strays:
            raise ValueError(
                f"{folder} holds {strays[0]}, which are the codes of no linear layer of {type(model).__name__}; "
                "layers of that kind cannot be exported."
            )
        for key in self._clustered:
            self._files[key] = self._files[f"{key.removesuffix('.weight')}.codes"]
            self._renamed[rename(key)] = key
        self._names: dict[str, str] = {}
        for name in adapter.layers if adapter is not None and adapter.brings_codes else ():
            layer, found = _layer(model, name), self.find(f"{name}.weight")
            if found is None:
                raise ValueError(f"{folder} lacks {name}.weight, which the adapter changes; it is of another model.")
            self._adapted[found] = layer
        if adapter is not None:
            keys = {name: self.find(name) for name, _ in model.named_parameters()}
            self._names = {known: name for name, known in keys.items() if known is not None}
            adapter.refuse_rest(self._names.values())

    def _hide_parts(self, layer: Layer) -> None:
        """Puts the weight of a clustered layer where its parts are."""
        codes = self.find(f"{layer.name}.codes")
        if codes is None:
            raise ValueError(
                f"{self.folder} lacks {layer.name}.codes; it is incomplete, download or compress it again."
            )
        base = codes.removesuffix(".codes")
        key, shape = f"{base}.weight", layer.shape[::-1] if layer.conv1d else layer.shape
        self.shapes = {key if known == codes else known: size for known, size in self.shapes.items()}
        self.shapes[key], self.dtypes[key] = shape, self._dtype_of(key)
        for part in PARTS:
            self.shapes.pop(f"{base}.{part}", None)
        self._clustered[key] = layer

    def read(self, key: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor of the dense model; floating-point ones in `dtype`, by default that of the whole.

        Raises:
            ValueError: If codes or codebooks are damaged, or the adapter was trained on others.
        """
        wanted = dtype or self._dtype_of(key)
        with torch.no_grad():
            if key in self._clustered:
                layer = self._clustered[key]
                weight = self._merged(key, layer).decode(wanted)
                return weight.t().contiguous() if layer.conv1d else weight
            tensor = super().read(key, wanted)
            if self.adapter is None:
                return tensor
            if key in self._adapted:
                layer = self._adapted[key]
                dense = tensor.t() if layer.conv1d else tensor
                weight = self.adapter.weight(layer.name, dense, wanted)
                return weight.t().contiguous() if layer.conv1d else weight
            return self.adapter.replaced(self._names.get(key, key), tensor)

    @property
    def made(self) -> int:
        """How many weights are decoded or merged."""
        return len(self._clustered) + len(self._adapted)

    def state(self) -> list[tuple[str, int, int]]:
        """As of the checkpoint alone, with the adapter's file."""
        return super().state() + ([] if self.adapter is None else self.adapter.state())

    def _merged(self, key: str, where: Layer) -> ClusteredLinear:
        """A clustered layer as it is stored, with the adapter merged."""
        base = key.removesuffix(".weight")
        keys = {part: f"{base}.{part}" for part in PARTS}
        parts = {part: self._stored.read(key) for part, key in keys.items() if key in self._stored.shapes}
        layer = ClusteredLinear.from_parts(
            parts["codes"],
            parts["codebook"],
            parts.get("scale_in"),
            parts.get("scale_out"),
            None,
            where.shape[0],
        )
        refuse_non_finite([(where.name, layer)])
        clusters, group_size = layer.codebook.shape[1:]
        if ops.has_stray_codes(layer.codes, clusters, num_groups(where.shape[0], group_size)):
            raise ValueError(
                f"{base}.codes names centroids beyond the {clusters} of its codebook: the checkpoint is damaged, or "
                "was made to be. Download or compress it again."
            )
        digest = layer.fingerprint()
        assert digest is not None
        self.fingerprints[where.name] = digest
        self.codebooks[where.name] = value_fingerprint([getattr(layer, name) for name in VALUES])
        if self.adapter is not None and where.name in self.adapter.layers:
            self.adapter.merge(where.name, layer)
        return layer

    def _dtype_of(self, key: str) -> torch.dtype:
        return self.dtype if self._fp32.isdisjoint(key.split(".")) else torch.float32


class Opened(NamedTuple):
    """A model that is about to be exported.

    Args:
        folder (`str`): Of the checkpoint. tokenizer (`str`): Of the tokenizer, which an adapter may bring.
        config: The config of the dense model, in the dtype of the export.
        model (`nn.Module`): The dense model without weights.
        checkpoint ([`MergedCheckpoint`]): Its tensors.
        fingerprint (`str`, *optional*): That the codes must have.
        clustered (`bool`): Whether anything is decoded or merged at all.
    """

    folder: str
    tokenizer: str
    config: Any
    model: Any
    checkpoint: MergedCheckpoint
    fingerprint: str | None
    clustered: bool

    def check(self, fingerprints: Mapping[str, str], codebooks: Mapping[str, str]) -> str | None:
        """Holds the digests of everything that was read against what config.json and the adapter say.

        Returns:
            A warning: the codebooks are not those that the adapter was trained on.

        Raises:
            ValueError: If the codes are not those of the checkpoint.
        """
        order = [name for name, _ in self.model.named_modules() if name in fingerprints]
        found = combine_fingerprints(fingerprints[name] for name in order)
        if self.fingerprint is not None and found != self.fingerprint:
            raise ValueError(
                f"the codes of {self.folder} are not the ones it was saved with (fingerprint {found}, config.json "
                f"says {self.fingerprint}): a file is damaged or belongs to another model. Download or compress it "
                "again."
            )
        adapter = self.checkpoint.adapter
        if adapter is None or adapter.brings_codes or adapter.check_codebooks(codebooks):
            return None
        return (
            "the checkpoint has the codes of the adapter's base but other codebooks: one of the two was merged with "
            "an adapter, or cast. The deltas were added to what is there."
        )


def open_checkpoint(source: str, adapter: str | None = None, dtype: str = "auto") -> Opened:
    """Reads what a model is, and checks all that can be checked by headers; no weight is read.

    Args:
        source (`str`): Folder or hub id of a model, compressed or dense; or the folder of an adapter, which names its
            base.
        adapter (`str`, *optional*): Folder or hub id of an adapter to merge.
        dtype (`str`): Of the dense tensors; "auto" is the model's.

    Raises:
        ValueError: If it is quantised by something else, incomplete or damaged, or the adapter is of another model.
    """
    config_of_adapter = None
    if is_adapter(source):
        if adapter is not None:
            raise ValueError(f"{source} is an adapter itself; give the model, and one adapter with --adapter.")
        adapter = source
        config_of_adapter = read_config(source)
        if config_of_adapter.base_model_name_or_path is None:
            raise ValueError(f"{source} does not name its base; give the base, and the adapter with --adapter.")
        source = config_of_adapter.base_model_name_or_path
    elif adapter is not None:
        config_of_adapter = read_config(adapter)
    check_folder(source)
    patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt"]
    folder = source if os.path.isdir(source) else snapshot_download(source, allow_patterns=patterns)
    config = AutoConfig.from_pretrained(folder)
    quantization = getattr(config, "quantization_config", None)
    if isinstance(quantization, dict) and quantization.get("quant_method") == "cluscomp":
        quantization = ClusCompQuantizationConfig.from_dict(quantization)
    if quantization is not None and not isinstance(quantization, ClusCompQuantizationConfig):
        kind = quantization.get("quant_method") if isinstance(quantization, dict) else type(quantization).__name__
        raise ValueError(f"{source} is quantised by {kind}; export knows checkpoints of ClusComp and dense ones.")
    if quantization is not None:
        del config.quantization_config
    model = empty_model(config, source)
    prefix = str(getattr(model, "base_model_prefix", ""))
    check_generation_config(folder)
    kept = stored_dtype(dtype, config, DenseCheckpoint(folder, prefix))
    specs: dict[str, ClusterSpec] = {}
    if quantization is not None:
        specs = stored_specs(model, quantization)
        layers = {name: model.get_submodule(name) for name in specs}
        check_tensors(weight_files(folder), quantization, layers, specs, prefix)
    merged = None if config_of_adapter is None else Adapter(config_of_adapter, model, specs)
    checkpoint = MergedCheckpoint(folder, model, specs, kept, merged)
    config.dtype = kept
    config.architectures = config.architectures or [type(model).__name__]
    tokenizer = adapter if adapter is not None and _has_tokenizer(adapter) else folder
    fingerprint = None if quantization is None else quantization.fingerprint
    return Opened(folder, tokenizer, config, model, checkpoint, fingerprint, bool(specs) or merged is not None)


def _layer(model: nn.Module, name: str) -> Layer:
    module = model.get_submodule(name)
    assert is_dense_linear(module) or is_dense_embedding(module)
    return Layer(name, weight_shape(module), isinstance(module, Conv1D))


def _has_tokenizer(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, "tokenizer_config.json"))
