"""Reading a compressed checkpoint by its headers: what `cluscomp inspect` prints, and what is checked before a model
is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoConfig

from ..codes import ClusterSpec
from ..compress.architecture import empty_model
from ..compress.report.record import read_report
from ..compress.stream.headers import check_folder, read_headers, weight_bytes, weight_files
from ..dense import is_dense_linear, weight_shape
from ..embedding import is_dense_embedding
from ..experts import unfuse
from ..layout import expand
from ..upstream.transformers import renaming_of
from .config import ClusCompQuantizationConfig

__all__ = ["MatrixReport", "check_tensors", "inspect_checkpoint", "stored_specs"]

_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


@dataclass(frozen=True)
class MatrixReport:
    """One clustered matrix: its shape, how it is stored, its true bits, and ‖W − Ŵ‖ / ‖W‖ (None if unknown)."""

    name: str
    out_features: int
    in_features: int
    spec: str
    true_bits: float
    relative_error: float | None


def inspect_checkpoint(path: str) -> tuple[list[MatrixReport], dict[str, Any]]:
    """What a compressed checkpoint holds, read from headers; no weight is loaded.

    Args:
        path (`str`): Folder or hub id.

    Returns:
        A [`MatrixReport`] for each clustered matrix, and totals: weights and true_bits of linear layers,
        embedding_bits (None where embeddings are dense), clustered_bytes of both, dense_bytes, total_bytes,
        relative_error, coverage.

    Raises:
        ValueError: If it is no ClusComp checkpoint, or a file is damaged.
    """
    check_folder(path)
    folder = path if os.path.isdir(path) else snapshot_download(path)
    config = AutoConfig.from_pretrained(folder)
    quantization = getattr(config, "quantization_config", None)
    if isinstance(quantization, dict) and quantization.get("quant_method") == "cluscomp":
        quantization = ClusCompQuantizationConfig.from_dict(quantization)
    if not isinstance(quantization, ClusCompQuantizationConfig):
        raise ValueError(f"{path} is no ClusComp checkpoint: its config.json has no cluscomp quantization_config.")
    headers = read_headers(weight_files(folder))
    del config.quantization_config  # the plain model has the names and shapes
    model = empty_model(config, path)
    unfuse(model)
    rename = renaming_of(model)  # checkpoints keep the names that a class had when they were made
    headers = {rename(key): header for key, header in headers.items()}
    layers = dict(model.named_modules())
    report = read_report(folder)
    errors = {name: _error(entry) for name, entry in report["matrices"].items()}
    itemsize = quantization.dtype.itemsize
    matrices = []
    embeddings = quantization.policy.embeddings_of(model).keys()
    sizes: dict[bool, int] = {True: 0, False: 0}  # of embeddings and heads, and of linear layers
    weights = dict(sizes)
    specs = expand(quantization.layout, layers, model.base_model_prefix)
    check_tensors(weight_files(folder), quantization, layers, specs, model.base_model_prefix)
    for name, spec in specs.items():
        if not any(key.endswith(f"{name}.codes") for key in headers):
            raise ValueError(f"{path} lacks {name}.codes; it is incomplete, download or compress it again.")
        out_features, in_features = weight_shape(layers[name])
        size = spec.num_bytes(in_features, out_features, itemsize)
        sizes[name in embeddings] += size
        weights[name in embeddings] += in_features * out_features
        words = f"g={spec.group_size} n={spec.num_clusters}"
        words += f" blocks={spec.num_blocks}" if spec.num_blocks > 1 else ""
        words += " scales" if spec.scale_in or spec.scale_out else ""
        bits = spec.true_bits(in_features, out_features, itemsize)
        matrices.append(MatrixReport(name, out_features, in_features, words, bits, errors.get(name)))
    total, clustered_bytes = weight_bytes(folder), sum(sizes.values())
    totals = {
        "weights": weights[False],
        "true_bits": 8 * sizes[False] / max(weights[False], 1),
        "embedding_bits": 8 * sizes[True] / weights[True] if weights[True] else None,
        "clustered_bytes": clustered_bytes,
        "dense_bytes": total - clustered_bytes,
        "total_bytes": total,
        "relative_error": _error(report["summary"]),
        "coverage": quantization.policy.coverage(model, [matrix.name for matrix in matrices]),
    }
    return matrices, totals


def stored_specs(model: nn.Module, config: ClusCompQuantizationConfig) -> dict[str, ClusterSpec]:
    """Which linear layers and embeddings of a dense model a compressed checkpoint has in codes, and how each is
    stored; experts are some once they are taken apart.

    Raises:
        ValueError: If there are none.
    """
    names = [name for name, module in model.named_modules() if is_dense_linear(module) or is_dense_embedding(module)]
    specs = expand(config.layout, names, getattr(model, "base_model_prefix", ""))
    if not specs:
        raise ValueError(
            f"none of the {len(config.layout)} clustered matrices of this checkpoint is a linear layer of "
            f"{type(model).__name__}; it was made from another architecture, or its config.json is damaged."
        )
    return specs


def check_tensors(
    files: Iterable[str],
    config: ClusCompQuantizationConfig,
    layers: Mapping[str, nn.Module],
    specs: Mapping[str, ClusterSpec],
    prefix: str,
) -> None:
    """Holds the tensors of a compressed checkpoint against its config, by their headers.

    What is absent is left to whoever loads. Nothing is checked where the file calls the layers otherwise than the
    model does, which transformers translates for some architectures.

    Args:
        files: Safetensors files.
        config: What `config.json` says.
        layers: Name to module, in the dense model.
        specs: Of those that are clustered: how each is stored.
        prefix: The model's `base_model_prefix`.

    Raises:
        ValueError: If a tensor is of another shape or dtype than the config says, or one of which it says nothing.
    """
    headers = read_headers(path for path in files if path.endswith(".safetensors"))
    present = {key.removesuffix(".codes") for key in headers if key.endswith(".codes")}
    spelled = {name: _spelling(name, prefix, present) for name in specs}
    if None in spelled.values():
        return
    for name in sorted(present - expand(config.layout, present, prefix).keys()):
        raise ValueError(
            f"the checkpoint has {name}.codes, but its config.json does not say that {name} is clustered: the two do "
            "not belong together. Download or compress it again."
        )
    floats = _DTYPES[config.codebook_dtype]
    for name, spec in specs.items():
        out_features, in_features = weight_shape(layers[name])
        scale_in = floats
        if is_dense_embedding(layers[name]):  # which has it in the dtype of the model, whatever that was
            kept = headers.get(f"{spelled[name]}.scale_in")
            scale_in = kept.dtype if kept is not None and kept.dtype in _DTYPES.values() else floats
        wanted: dict[str, tuple[tuple[int, ...], str] | None] = {
            "codes": ((in_features, spec.code_bytes(out_features)), "U8"),
            "codebook": ((spec.num_blocks, spec.num_clusters, spec.group_size), floats),
            "scale_in": ((in_features,), scale_in) if spec.scale_in else None,
            "scale_out": ((out_features,), floats) if spec.scale_out else None,
            "weight": None,
        }
        for leaf, value in wanted.items():
            found = headers.get(f"{spelled[name]}.{leaf}")
            if found is not None and found[:2] != value:
                says = "no such tensor" if value is None else f"{value[1]} {list(value[0])}"
                raise ValueError(
                    f"{spelled[name]}.{leaf} is {found.dtype} {list(found.shape)} in the checkpoint, but by its "
                    f"config.json there is {says}: the two do not belong together. Download or compress it again."
                )


def _error(entry: Mapping[str, Any]) -> float | None:
    """The relative error that a report notes, if it is a number."""
    value = entry.get("relative_error")
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _spelling(name: str, prefix: str, present: Iterable[str]) -> str | None:
    """What the file calls a layer: with or without the model's prefix; None if it is not there."""
    spellings = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")) if prefix else (name,)
    return next((spelling for spelling in spellings if spelling in present), None)
