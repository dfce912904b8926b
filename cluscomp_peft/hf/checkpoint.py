"""Looking into compressed checkpoints: what `cluscomp inspect` does."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from ..compress.source import renaming_of
from ..layout import expand
from .architecture import empty_model
from .choice import coverage_of
from .config import ClusCompQuantizationConfig

__all__ = [
    "REPORT_NAME",
    "MatrixReport",
    "check_folder",
    "inspect_checkpoint",
    "read_report",
    "weight_bytes",
]

REPORT_NAME = "cluscomp_report.json"


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
        A [`MatrixReport`] for each clustered matrix, and totals: weights, true_bits, clustered_bytes, dense_bytes,
        total_bytes, relative_error, coverage.

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
    shapes = _tensor_shapes(folder)
    del config.quantization_config  # the plain model has the names and shapes
    model = empty_model(config, path)
    rename = renaming_of(model)  # checkpoints keep the names that a class had when they were made
    shapes = {rename(key): shape for key, shape in shapes.items()}
    layers = dict(model.named_modules())
    report = read_report(folder)
    errors = {name: entry["relative_error"] for name, entry in report["matrices"].items()}
    itemsize = quantization.dtype.itemsize
    matrices = []
    clustered_bytes = weights = 0
    for name, spec in expand(quantization.layout, layers, model.base_model_prefix).items():
        stored = [shapes[key] for key in shapes if key.endswith(f"{name}.codes")]
        if not stored:
            raise ValueError(f"{path} lacks {name}.codes; it is incomplete, download or compress it again.")
        weight = layers[name].weight.shape
        out_features, in_features = weight if stored[0][0] == weight[1] else (weight[1], weight[0])
        size = spec.num_bytes(in_features, out_features, itemsize)
        clustered_bytes += size
        weights += in_features * out_features
        words = f"g={spec.group_size} n={spec.num_clusters}"
        words += f" blocks={spec.num_blocks}" if spec.num_blocks > 1 else ""
        words += " scales" if spec.scale_in or spec.scale_out else ""
        bits = spec.true_bits(in_features, out_features, itemsize)
        matrices.append(MatrixReport(name, out_features, in_features, words, bits, errors.get(name)))
    total = weight_bytes(folder)
    totals = {
        "weights": weights,
        "true_bits": 8 * clustered_bytes / max(weights, 1),
        "clustered_bytes": clustered_bytes,
        "dense_bytes": total - clustered_bytes,
        "total_bytes": total,
        "relative_error": report["summary"].get("relative_error"),
        "coverage": coverage_of(model, quantization, [matrix.name for matrix in matrices]),
    }
    return matrices, totals


def check_folder(path: str) -> None:
    """Refuses a path that can only be a folder and is none, and weight files that are cut off, by name."""
    if os.path.isdir(path):
        _tensor_shapes(path)
    elif os.path.isabs(path) or path.startswith((".", "~")) or path.count("/") > 1:
        raise ValueError(f"{path} is no folder (and no hub id, which reads like owner/name).")


def read_report(folder: str) -> dict[str, dict[str, Any]]:
    """What `compress` noted of a checkpoint: `summary`, `matrices`, and with calibration `blocks` and `losses`, all
    empty where there is no report.

    Raises:
        ValueError: If the report is damaged.
    """
    path = os.path.join(folder, REPORT_NAME)
    if not os.path.isfile(path):
        return {"summary": {}, "matrices": {}, "blocks": {}, "losses": {}}
    try:
        with open(path, encoding="utf-8") as file:
            report = json.load(file)
        return {
            "summary": dict(report["summary"]),
            "matrices": dict(report["matrices"]),
            "blocks": dict(report.get("blocks") or {}),
            "losses": dict(report.get("losses") or {}),
        }
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); remove it, it only holds notes.") from error


def _weight_files(folder: str) -> list[str]:
    return sorted(os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".safetensors"))


def weight_bytes(folder: str) -> int:
    """Bytes of the safetensors files of a folder."""
    return sum(os.path.getsize(path) for path in _weight_files(folder))


def _tensor_shapes(folder: str) -> dict[str, list[int]]:
    shapes = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():
                    shapes[key] = file.get_slice(key).get_shape()
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged or cut off ({error}); download or compress it again.") from error
    return shapes
