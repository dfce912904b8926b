"""Making compressed checkpoints and looking into them: what `cluscomp compress` and `cluscomp inspect` do.

A checkpoint is written into a temporary folder beside its place and renamed when it is whole, so a run that fails or
is killed leaves nothing that loads.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

from ..compress.calibration import input_second_moments, read_documents, token_windows
from ..layout import expand
from ..linear import dense_bits
from .config import ClusCompQuantizationConfig

__all__ = [
    "REPORT_NAME",
    "MatrixReport",
    "check_folder",
    "compress_checkpoint",
    "inspect_checkpoint",
    "read_report",
]

REPORT_NAME = "cluscomp_report.json"
_CALIBRATION_LENGTH = 2048


@dataclass(frozen=True)
class MatrixReport:
    """One clustered matrix: its shape, how it is stored, its true bits, and ‖W − Ŵ‖ / ‖W‖ (None if unknown)."""

    name: str
    out_features: int
    in_features: int
    spec: str
    true_bits: float
    relative_error: float | None


def compress_checkpoint(
    source: str,
    target: str,
    config: ClusCompQuantizationConfig,
    *,
    calibration: str | None = None,
    samples: int = 128,
    dtype: str = "auto",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Clusters a dense causal language model and writes a checkpoint that `from_pretrained` loads.

    Args:
        source (`str`): Folder or hub id of the dense model.
        target (`str`): Folder to create.
        config ([`ClusCompQuantizationConfig`]): Bits and settings.
        calibration (`str`, *optional*): Text file; the squared activations on it weight the clustering.
        samples (`int`): Sequences of up to 2048 tokens to take from it.
        dtype (`str`): Of everything that stays dense; "auto" keeps the checkpoint's.
        overwrite (`bool`): Replace `target` if it exists.

    Returns:
        `dict`: true_bits, relative_error, bytes, seconds, matrices.

    Raises:
        ValueError: If `target` exists, `source` is compressed already, or model, text and settings do not fit.
    """
    started = time.perf_counter()
    check_folder(source)
    _check_target(source, target, overwrite)
    if getattr(AutoConfig.from_pretrained(source), "quantization_config", None) is not None:
        raise ValueError(f"{source} is quantised already; compress the dense model.")
    tokenizer = _tokenizer(source)
    if calibration is not None:
        if tokenizer is None:
            raise ValueError(
                f"{source} has no tokenizer, so calibration text cannot be read; leave out --calibration."
            )
        config._importance = _importance(source, tokenizer, calibration, samples, dtype)

    parent = os.path.dirname(os.path.abspath(target))
    os.makedirs(parent, exist_ok=True)
    scratch = tempfile.mkdtemp(prefix=f".{os.path.basename(os.path.abspath(target))}.", dir=parent)
    try:
        with _no_loading_bar():
            model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=dtype)
        matrices = model.hf_quantizer.report
        model.save_pretrained(scratch)
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
        total_bytes, weights = dense_bits(model)
        squares = [(entry["squared_error"], entry["squared_norm"]) for entry in matrices.values()]
        summary = {
            "source": source,
            "true_bits": 8 * total_bytes / weights,
            "relative_error": (sum(error for error, _ in squares) / max(sum(norm for _, norm in squares), 1e-30))
            ** 0.5,
            "bytes": _weight_bytes(scratch),
            "seconds": time.perf_counter() - started,
            "calibration": None if calibration is None else os.path.basename(calibration),
            "dtype": dtype,
        }
        report = {"summary": summary, "matrices": {name: _relative(entry) for name, entry in matrices.items()}}
        with open(os.path.join(scratch, REPORT_NAME), "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
        with open(os.path.join(scratch, "README.md"), "w", encoding="utf-8") as file:
            file.write(_model_card(os.path.basename(os.path.abspath(target)), summary, len(matrices)))
        os.chmod(scratch, 0o755)
        if os.path.isdir(target):
            # Set aside first: at no moment is there neither the old checkpoint nor the new one.
            old = tempfile.mkdtemp(prefix=".old.", dir=parent)
            os.rename(target, os.path.join(old, "checkpoint"))
            os.rename(scratch, target)
            shutil.rmtree(old)
        else:
            os.rename(scratch, target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return {**summary, "matrices": len(matrices)}


def inspect_checkpoint(path: str) -> tuple[list[MatrixReport], dict[str, Any]]:
    """What a compressed checkpoint holds, read from headers; no weight is loaded.

    Args:
        path (`str`): Folder or hub id.

    Returns:
        A [`MatrixReport`] for each clustered matrix, and totals: weights, true_bits, clustered_bytes, dense_bytes,
        total_bytes, relative_error.

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
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
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
    total = _weight_bytes(folder)
    totals = {
        "weights": weights,
        "true_bits": 8 * clustered_bytes / max(weights, 1),
        "clustered_bytes": clustered_bytes,
        "dense_bytes": total - clustered_bytes,
        "total_bytes": total,
        "relative_error": report["summary"].get("relative_error"),
    }
    return matrices, totals


def check_folder(path: str) -> None:
    """Refuses a path that can only be a folder and is none, and weight files that are cut off, by name."""
    if os.path.isdir(path):
        _tensor_shapes(path)
    elif os.path.isabs(path) or path.startswith((".", "~")) or path.count("/") > 1:
        raise ValueError(f"{path} is no folder (and no hub id, which reads like owner/name).")


def read_report(folder: str) -> dict[str, dict[str, Any]]:
    """What `compress` noted of a checkpoint: `summary` and `matrices`, both empty where there is no report.

    Raises:
        ValueError: If the report is damaged.
    """
    path = os.path.join(folder, REPORT_NAME)
    if not os.path.isfile(path):
        return {"summary": {}, "matrices": {}}
    try:
        with open(path, encoding="utf-8") as file:
            report = json.load(file)
        return {"summary": dict(report["summary"]), "matrices": dict(report["matrices"])}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); remove it, it only holds notes.") from error


def _importance(source: str, tokenizer: Any, path: str, samples: int, dtype: str) -> dict[str, torch.Tensor]:
    if samples < 1:
        raise ValueError(f"calibration needs at least one sample, got {samples}.")
    documents = read_documents(path, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    length = min(_CALIBRATION_LENGTH, getattr(model.config, "max_position_embeddings", _CALIBRATION_LENGTH))
    vocabulary = model.get_input_embeddings().weight.shape[0]
    windows = token_windows(documents, tokenizer, length, max_tokens=samples * length, vocab_size=vocabulary)
    return input_second_moments(model, windows)


def _check_target(source: str, target: str, overwrite: bool) -> None:
    if not os.path.exists(target) or (os.path.isdir(target) and not os.listdir(target)):
        return
    if os.path.realpath(source) == os.path.realpath(target):
        raise ValueError(f"{target} is the dense model itself; choose another folder.")
    if not overwrite:
        raise ValueError(f"{target} exists already; choose another folder, or overwrite it with --overwrite.")
    if not os.path.isfile(os.path.join(target, "config.json")):
        raise ValueError(f"{target} holds something that is no model, which --overwrite does not touch; remove it.")


def _tokenizer(source: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, ImportError):
        return None  # a model of token ids alone; only calibration text would need one


@contextmanager
def _no_loading_bar() -> Iterator[None]:
    """Hides transformers' bar over tensors: the quantizer shows its own over weights, whose estimate holds."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def _relative(entry: dict[str, float]) -> dict[str, float]:
    error = (entry["squared_error"] / max(entry["squared_norm"], 1e-30)) ** 0.5
    return {"relative_error": error, "true_bits": entry["true_bits"], "seconds": entry["seconds"]}


def _weight_files(folder: str) -> list[str]:
    return sorted(os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".safetensors"))


def _weight_bytes(folder: str) -> int:
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


def _model_card(name: str, summary: dict[str, Any], matrices: int) -> str:
    calibration = summary["calibration"] or "none"
    return f"""---
library_name: transformers
tags:
- cluscomp
base_model: {summary["source"]}
---
# {name}

`{summary["source"]}`, compressed with ClusComp: {matrices} weight matrices are stored as integer codes and codebooks.

| true bits per weight | relative error of the weights | weight files | calibration text |
|---|---|---|---|
| {summary["true_bits"]:.3f} | {summary["relative_error"]:.4f} | {summary["bytes"] / 1e6:.1f} MB | {calibration} |

True bits count codes, codebooks and scales of the clustered matrices. The relative error is ‖W − Ŵ‖ / ‖W‖ over all of
them; no task was measured.

```python
import cluscomp_peft  # registers the format; without it transformers loads random weights
from peft import get_peft_model
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}")
model = get_peft_model(model, cluscomp_peft.ClusCompConfig(task_type="CAUSAL_LM"))  # to finetune the codebooks
```

Method: ClusComp, Liao et al., "ClusComp: A Simple Paradigm for Model Compression and Efficient Finetuning", Findings
of ACL 2025, arXiv:2503.13089.
"""
