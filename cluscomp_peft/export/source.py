"""A checkpoint read as the dense model that it stands for, tensor by tensor: decoded, and with an adapter merged.

    model.layers.0.mlp.up_proj.codes, .codebook, .scale_in, .scale_out     what a compressed checkpoint holds
                     └───────────── adapter ─────────────┘
    model.layers.0.mlp.up_proj.weight                                      what is read here

    model.layers.0.mlp.experts.3.up_proj.codes, …                          of each expert of a mixture
    model.layers.0.mlp.experts.up_proj                                     the parameter that holds all of them

It answers as the [`DenseCheckpoint`] of the dense model does, so whatever reads that can read this: no more than the
tensor that is asked for is ever dense.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoConfig

from .. import ops
from ..clustered_weight import VALUES
from ..codes import ClusterSpec, combine_fingerprints, num_groups, value_fingerprint
from ..compress.architecture import check_generation_config, empty_model, stored_dtype
from ..compress.stream.headers import check_folder, weight_files
from ..compress.stream.source import PARTS, DenseCheckpoint
from ..experts import fuse, unfuse
from ..hf.config import ClusCompQuantizationConfig
from ..hf.reading import check_tensors, stored_specs
from ..hf.refusals import refuse_non_finite
from ..linear import ClusteredLinear
from ..upstream.transformers import kept_in_fp32, renaming_of
from .adapter import Adapter, is_adapter, read_config
from .made import Layer, Made, tensors_made

__all__ = ["MergedCheckpoint", "Opened", "open_checkpoint"]


class MergedCheckpoint(DenseCheckpoint):
    """The tensors of the dense model that a checkpoint, and perhaps an adapter on it, stand for.

    Args:
        folder (`str`): Of the checkpoint, compressed or dense.
        model (`nn.Module`): The dense model without weights, experts fused.
        made (`list[Made]`): Its tensors that hold weights which are clustered, or which the adapter changes.
        clustered (`list[str]`): Names of the clustered layers, in the order of the model; none of a dense checkpoint.
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
        made: Iterable[Made],
        clustered: Sequence[str],
        dtype: torch.dtype,
        adapter: Adapter | None = None,
    ) -> None:
        rename = renaming_of(model)
        self.dtype, self.adapter = dtype, adapter
        self.clustered = dict.fromkeys(clustered)
        prefix = str(getattr(model, "base_model_prefix", ""))
        super().__init__(folder, prefix, rename)
        # As it is: with parts, and the tensors of which the weights of dense experts are made.
        self._stored = DenseCheckpoint(folder, prefix, rename, None if clustered else model)
        self.fingerprints: dict[str, str] = {}
        self.codebooks: dict[str, str] = {}
        self._fp32 = kept_in_fp32(model, dtype)
        self._made: dict[str, Made] = {}
        self._bases: dict[str, str] = {}  # of the parts of a clustered layer: their name in the file
        places, hidden = {}, set()
        for tensor in made:
            key, sources = self._sources(tensor)
            self._made[key], self._files[key] = tensor, self._files[sources[0]]
            self._renamed[rename(key)] = key
            places[sources[0]] = key
            hidden |= {*sources}
        # Each in the place of the first that it is made of.
        self.shapes = {
            places.get(key, key): shape for key, shape in self.shapes.items() if key in places or key not in hidden
        }
        self.shapes |= {key: tensor.shape for key, tensor in self._made.items()}
        self.dtypes |= {key: self._dtype_of(key) for key in self._made}
        strays = [key for key in self.shapes if key.endswith(".codes")]
        if strays:
            raise ValueError(
                f"{folder} holds {strays[0]}, which are the codes of no layer of {type(model).__name__}; it was made "
                "from another architecture, or its config.json is damaged."
            )
        self._names: dict[str, str] = {}
        if adapter is not None:
            keys = {name: self.find(name) for name, _ in model.named_parameters()}
            self._names = {known: name for name, known in keys.items() if known is not None}
            adapter.refuse_rest(self._names.values())

    def _sources(self, tensor: Made) -> tuple[str, list[str]]:
        """The key that a tensor has here, and those of what it is made of."""
        sources = []
        for layer in tensor.layers:
            if layer.name in self.clustered:
                codes = self.find(f"{layer.name}.codes")
                if codes is None:
                    raise ValueError(
                        f"{self.folder} lacks {layer.name}.codes; it is incomplete, download or compress it again."
                    )
                self._bases[layer.name] = codes.removesuffix(".codes")
                sources += [f"{self._bases[layer.name]}.{part}" for part in PARTS]
            else:
                dense = self._stored.find(f"{layer.name}.weight")
                if dense is None:
                    raise ValueError(
                        f"{self.folder} lacks {layer.name}.weight, which the adapter changes; it is of another model."
                    )
                sources += self._stored.keys_of(dense)
        if tensor.stacked:
            return tensor.name, sources
        base = self._bases.get(tensor.layers[0].name)
        return sources[0] if base is None else f"{base}.weight", sources

    def read(self, key: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor of the dense model; floating-point ones in `dtype`, by default that of the whole.

        Raises:
            ValueError: If codes or codebooks are damaged, or the adapter was trained on others.
        """
        wanted = dtype or self._dtype_of(key)
        with torch.no_grad():
            if key in self._made:
                tensor = self._made[key]
                return tensor.of(self._weight(layer, tensor.transposed, wanted) for layer in tensor.layers)
            value = super().read(key, wanted)
            return value if self.adapter is None else self.adapter.replaced(self._names.get(key, key), value)

    def experts(self, key: str) -> str | None:
        """The name in the model of a tensor that holds the weights of all experts of a stack; None for others."""
        tensor = self._made.get(key)
        return tensor.name if tensor is not None and tensor.stacked else None

    @property
    def made(self) -> int:
        """How many weights are decoded or merged."""
        return sum(len(tensor.layers) for tensor in self._made.values())

    def state(self) -> list[tuple[str, int, int]]:
        """As of the checkpoint alone, with the adapter's file."""
        return super().state() + ([] if self.adapter is None else self.adapter.state())

    def _weight(self, layer: Layer, transposed: bool, dtype: torch.dtype) -> torch.Tensor:
        """The weight [out, in] of a layer, decoded or merged, in `dtype`."""
        if layer.name in self.clustered:
            return self._merged(layer).decode(dtype)
        key = self._stored.find(f"{layer.name}.weight")
        assert key is not None and self.adapter is not None
        dense = self._stored.read(key, dtype)
        if transposed and key not in self._stored.assemblies:
            dense = dense.t()
        return self.adapter.weight(layer.name, dense, dtype) if layer.name in self.adapter.layers else dense

    def _merged(self, where: Layer) -> ClusteredLinear:
        """A clustered layer as it is stored, with the adapter merged."""
        base = self._bases[where.name]
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
        model (`nn.Module`): The dense model without weights, experts fused.
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
        found = combine_fingerprints(fingerprints[name] for name in self.checkpoint.clustered)
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
    stacks = unfuse(model)
    specs: dict[str, ClusterSpec] = {}
    if quantization is not None:
        specs = stored_specs(model, quantization)
        layers = {name: model.get_submodule(name) for name in specs}
        check_tensors(weight_files(folder), quantization, layers, specs, prefix)
    merged = None if config_of_adapter is None else Adapter(config_of_adapter, model, specs)
    changed = [*specs, *(merged.layers if merged is not None and merged.brings_codes else ())]
    made = tensors_made(model, stacks, changed)
    fuse(model)
    checkpoint = MergedCheckpoint(folder, model, made, list(specs), kept, merged)
    config.dtype = kept
    config.architectures = config.architectures or [type(model).__name__]
    tokenizer = adapter if adapter is not None and _has_tokenizer(adapter) else folder
    fingerprint = None if quantization is None else quantization.fingerprint
    return Opened(folder, tokenizer, config, model, checkpoint, fingerprint, bool(specs) or merged is not None)


def _has_tokenizer(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, "tokenizer_config.json"))
