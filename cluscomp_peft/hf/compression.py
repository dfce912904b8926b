"""Making compressed checkpoints: what `cluscomp compress` does.

Work goes on in a hidden folder beside its place, which is renamed when it is whole: nothing that loads is ever half
written. A run that was killed or failed leaves that folder, and the same command goes on from there.
"""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import math
import os
import sys
import time
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from .._version import __version__
from ..codes import ClusterSpec
from ..compress.allocation import Demand, allocate
from ..compress.block import BlockSettings
from ..compress.blocks import BlockModel
from ..compress.calibration import calibration_windows
from ..compress.journal import Journal
from ..compress.pipeline import Calibration, compress_shards, fingerprint_of
from ..compress.sensitivity import measure_sensitivity
from ..compress.source import DenseCheckpoint, renaming_of
from ..compress.targets import refuse_linears_of_their_own
from ..compress.workers import peak_memory, visible_devices
from ..layout import summarize
from ..linear import weight_of
from .checkpoint import REPORT_NAME, check_folder, read_report, weight_bytes
from .config import ClusCompQuantizationConfig
from .model_card import model_card
from .quantizer import choose_specs, chosen_layers
from .report_page import render_report
from .target import ONE_NAME, check_target, join_shards, move, write_text

__all__ = ["compress_checkpoint", "write_page"]

PAGE_NAME = "report.html"
_SENSITIVITY_TOKENS = 16384
_MARGIN = 4096  # bytes of a size budget that stay free for what is written last


def compress_checkpoint(
    source: str,
    target: str,
    config: ClusCompQuantizationConfig,
    *,
    size: int | None = None,
    calibration: str | None = None,
    samples: int = 128,
    seqlen: int | None = None,
    feedback: bool = True,
    epochs: int = 8,
    learning_rate: float = 0.003,
    dtype: str = "auto",
    device: str | None = None,
    overwrite: bool = False,
    workers: int = 1,
) -> dict[str, Any]:
    """Clusters a dense causal language model and writes a checkpoint that `from_pretrained` loads.

    One block at a time is in memory, with calibration also its activations; without, as many matrices as are clustered
    at once. The same call goes on where an earlier one ended, and ends with the same bytes.

    Args:
        source (`str`): Folder or hub id of the dense model.
        target (`str`): Folder to create.
        config ([`ClusCompQuantizationConfig`]): Bits and settings. With calibration or `size`, `bits` holds for all
            matrices together, and each gets what lowers the loss most.
        size (`int`, *optional*): Bytes that the whole folder may take, instead of bits.
        calibration (`str`, *optional*): Text file to compress by: sensitivities, error feedback, reconstruction.
        samples (`int`): Sequences to take from it.
        seqlen (`int`, *optional*): Tokens of a sequence; 2048, or what the model takes.
        feedback (`bool`): Error feedback.
        epochs (`int`): Of reconstruction, 0 for none.
        learning_rate (`float`): Of reconstruction, in units of the RMS of what it trains.
        dtype (`str`): Of everything that stays dense; "auto" keeps the checkpoint's.
        device (`str`, *optional*): Where blocks run and matrices are clustered: "cpu", "cuda", "cuda:1"; a GPU if
            there is one.
        overwrite (`bool`): Replace `target` if it exists, and forget an unfinished run with other settings.
        workers (`int`): Processes that make shards at once, without calibration: each takes a block at a time and its
            share of the threads, or one of the GPUs in turn. The bytes are those of one. A script that asks for more
            than one must do so under `if __name__ == "__main__":`, because each imports it.

    Returns:
        `dict`: true_bits, relative_error, bytes, seconds, matrices, losses, and more that the report holds.

    Raises:
        ValueError: If `target` exists, `source` is compressed already, another run is at work, or model, text and
            settings do not fit.
        OSError: If the disk is full, or a worker was killed (ChildProcessError); the same call goes on where this one
            ended.
    """
    _check_workers(workers, calibration)
    devices = visible_devices(device)
    started = time.perf_counter()
    config = copy.deepcopy(config)  # layout and fingerprint are written into it
    check_folder(source)
    check_target(source, target, overwrite)
    model_config = AutoConfig.from_pretrained(source)
    if getattr(model_config, "quantization_config", None) is not None:
        raise ValueError(f"{source} is quantised already; compress the dense model.")
    tokenizer = _tokenizer(source)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(model_config)
    folder = source if os.path.isdir(source) else snapshot_download(source, allow_patterns=["*.safetensors", "*.json"])
    dense = DenseCheckpoint(folder, model.base_model_prefix, renaming_of(model))
    kept = _dtype(dtype, model_config, dense)
    if config.target_modules is None:
        refuse_linears_of_their_own(model)
    layers = chosen_layers(model, config)
    settings = BlockSettings(
        config.dtype, config.quality, config.seed, feedback, epochs, learning_rate, torch.get_num_threads()
    )
    given = None
    if calibration is not None:
        windows = calibration_windows(model, tokenizer, source, calibration, samples, seqlen)
        given = Calibration(windows, devices[0])

    parent, name = os.path.split(os.path.abspath(target))
    job = {
        "source": dense.state(),
        "config": config.to_dict(),
        "size": size,
        "dtype": str(kept),
        "calibration": None if given is None else hashlib.sha256(given.windows.numpy().tobytes()).hexdigest(),
        "sequences": None if given is None else list(given.windows.shape),
        "feedback, epochs or learning rate": None if given is None else [feedback, epochs, learning_rate],
        "device": devices[0].type,  # which sets the engine of K-means and the dtype of stored activations
        "version": __version__,
    }
    work = os.path.join(parent, f".{name}.partial")
    journal = Journal(work, job, anew=overwrite)
    try:
        if journal.content.get("done"):
            print(f"{target}: going on where an earlier run ended", file=sys.stderr)
        if tokenizer is not None:
            tokenizer.save_pretrained(work)
        specs = _specs(model, layers, config, dense, kept, journal, given, size)
        result = compress_shards(
            model,
            dense,
            specs,
            journal,
            settings=settings,
            dtype=kept,
            devices=devices,
            calibration=given,
            workers=workers,
        )
        join_shards(work, result["shards"])
        squares = [(entry["squared_error"], entry["squared_norm"]) for entry in result["matrices"].values()]
        weights = sum(math.prod(entry["shape"]) for entry in result["matrices"].values())
        summary = {
            "source": source,
            "bits": config.bits if size is None else None,
            "size": size,
            "true_bits": 8 * sum(entry["bytes"] for entry in result["matrices"].values()) / weights,
            "relative_error": (sum(one for one, _ in squares) / max(sum(two for _, two in squares), 1e-30)) ** 0.5,
            "bytes": weight_bytes(work),
            "source_bytes": sum(map(dense.num_bytes, dense.shapes)),
            "seconds": result["seconds"] + journal.content.get("measured", 0.0),
            "peak_memory": peak_memory() + result["memory"],
            "calibration": None if calibration is None else os.path.basename(calibration),
            "sequences": None if given is None else given.windows.shape[0],
            "tokens": None if given is None else given.windows.numel(),
            "dtype": dtype,
        }
        model_config.dtype = kept
        _finish(work, name, model, model_config, config, specs, result, summary)
        move(work, os.path.join(parent, name))
    except BaseException as error:
        # What is wrong with model, text or settings stays wrong; a full disk, a signal or a crash does not.
        if isinstance(error, ValueError) or not journal.content.get("done"):
            journal.discard()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                error.errno, f"{parent} is full; make room there and run the same command again, it goes on from there"
            ) from error
        raise
    finally:
        journal.close()
    return {
        **summary,
        "elapsed": time.perf_counter() - started,
        "matrices": len(result["matrices"]),
        "losses": result["losses"],
    }


def write_page(path: str, page: str) -> None:
    """Writes the report of a compressed checkpoint as an HTML page with plots.

    Raises:
        ValueError: If the checkpoint has no report.
    """
    folder = path if os.path.isdir(path) else snapshot_download(path, allow_patterns=["*.json"])
    report = read_report(folder)
    if not report["matrices"]:
        raise ValueError(f"{path} has no {REPORT_NAME}, which the page is drawn from; compress the model again.")
    write_text(page, render_report(os.path.basename(os.path.abspath(path)), report))


def _specs(
    model: Any,
    layers: dict[str, Any],
    config: ClusCompQuantizationConfig,
    dense: DenseCheckpoint,
    dtype: torch.dtype,
    journal: Journal,
    given: Calibration | None,
    size: int | None,
) -> dict[str, ClusterSpec]:
    """How every matrix is stored: what an earlier run chose, what the settings say, or the best allocation."""
    if "specs" in journal.content:
        return {name: ClusterSpec(**fields) for name, fields in journal.content["specs"].items()}
    started = time.perf_counter()
    if size is None and (given is None or config.group_size is not None):
        specs = choose_specs(model, config)
    else:
        shapes = {name: tuple(weight_of(layer).shape) for name, layer in layers.items()}
        weights = {name: out * inputs for name, (out, inputs) in shapes.items()}
        sensitivity: dict[str, float] = {name: float(weight) for name, weight in weights.items()}
        if given is not None:
            enough = -(-_SENSITIVITY_TOKENS // given.batches[0].numel())
            blocks = BlockModel(model, dense, given.dtype(dtype), given.device)
            measured = measure_sensitivity(blocks, given.fitted[:enough])
            sensitivity = {name: measured.get(name, min(measured.values(), default=1.0)) for name in layers}
        demands = {name: Demand(inputs, out, sensitivity[name]) for name, (out, inputs) in shapes.items()}
        if size is not None:
            budget = size - _other_bytes(model, layers, dense, dtype, journal.folder)
        else:
            assert config.bits is not None
            budget = int(config.bits * sum(weights.values()) / 8)
        try:
            specs = allocate(demands, budget, scales=config.scales, codebook_itemsize=config.dtype.itemsize)
        except ValueError as error:
            if size is None:
                raise
            raise ValueError(
                f"a size of {size} bytes is out of reach: {size - budget} bytes are taken by tensors that stay dense "
                f"(--dtype can narrow them), tokenizer and reports, and {error}"
            ) from error
    journal.commit(
        specs={name: spec.to_dict() for name, spec in specs.items()}, measured=time.perf_counter() - started
    )
    return specs


def _other_bytes(model: Any, layers: dict[str, Any], dense: DenseCheckpoint, dtype: torch.dtype, work: str) -> int:
    """Bytes of the folder that are no clustered matrix: dense tensors, file headers, tokenizer, config, reports."""
    clustered = {dense.key(f"{name}.weight") for name in layers}
    total = 0
    for key, shape in dense.shapes.items():
        itemsize = dtype.itemsize if dense.dtypes[key].is_floating_point else dense.dtypes[key].itemsize
        total += 0 if key in clustered else math.prod(shape) * itemsize
    total += sum(entry.stat().st_size for entry in os.scandir(work) if entry.name not in ("journal.json", "lock"))
    entry = {
        "shape": [65536, 65536],
        "spec": {"group_size": 16, "num_clusters": 65536, "scale_in": True, "scale_out": True},
        "bytes": 10**9, "true_bits": 1 / 3, "relative_error": 1 / 3, "squared_error": 1 / 3, "squared_norm": 1 / 3,
        "output_error": {"clustered": 1 / 3, "feedback": 1 / 3},
    }  # fmt: skip
    report = {"summary": {"true_bits": 1 / 3}, "matrices": dict.fromkeys(layers, entry)}
    # Headers of safetensors name each tensor once, the index again.
    names = sum(len(key) + 130 for key in dense.shapes) + sum(3 * len(name) + 700 for name in layers)
    return total + names + len(json.dumps(report, indent=1)) + len(render_report("x", report)) + 3 * _MARGIN


def _finish(
    work: str,
    name: str,
    model: Any,
    model_config: Any,
    config: ClusCompQuantizationConfig,
    specs: dict[str, ClusterSpec],
    result: dict[str, Any],
    summary: dict[str, Any],
) -> None:
    """Everything but the shards: index, configs, report, page and card."""
    config.layout = summarize(specs, [name for name, _ in model.named_modules()])
    config.fingerprint = fingerprint_of(result["fingerprints"], model)
    model_config.quantization_config = config.to_dict()
    model_config.architectures = [type(model).__name__]
    model_config.save_pretrained(work)
    try:
        GenerationConfig.from_pretrained(summary["source"]).save_pretrained(work)
    except (OSError, ValueError):
        model.generation_config.save_pretrained(work)
    shards = result["shards"]
    places = {key: shard for shard, keys in shards.items() for key in keys}
    total = sum(map(sum, (keys.values() for keys in shards.values())))
    report = {key: result[key] for key in ("matrices", "blocks", "losses")}
    for entry in report["matrices"].values():
        del entry["squared_error"], entry["squared_norm"]
    report = {"summary": summary, **report}
    texts = {
        REPORT_NAME: json.dumps(report, indent=1),
        PAGE_NAME: render_report(name, report),
        "README.md": model_card(name, summary, len(report["matrices"]), report["losses"]),
    }
    if not os.path.exists(os.path.join(work, ONE_NAME)):
        index = {"metadata": {"total_size": total}, "weight_map": places}
        texts["model.safetensors.index.json"] = json.dumps(index, indent=1)
    for file_name, text in texts.items():
        write_text(os.path.join(work, file_name), text)


def _check_workers(workers: int, calibration: str | None) -> None:
    if type(workers) is not int or workers < 1:
        raise ValueError(f"workers must be a whole number of at least 1, got {workers!r}.")
    if workers > 1 and calibration is not None:
        raise ValueError(
            f"workers={workers} and calibration do not go together: each block is fitted to what the compressed ones "
            "before it hand on, so blocks come one after another, and one process uses all cores for each. Leave out "
            "--workers, or --calibration."
        )


def _dtype(dtype: str, model_config: Any, dense: DenseCheckpoint) -> torch.dtype:
    if dtype != "auto":
        return getattr(torch, dtype)
    named = getattr(model_config, "dtype", None)
    if isinstance(named, torch.dtype):
        return named
    sizes: dict[torch.dtype, int] = {}
    for key, kind in dense.dtypes.items():
        if kind.is_floating_point:
            sizes[kind] = sizes.get(kind, 0) + dense.num_bytes(key)
    return max(sizes, key=lambda kind: sizes[kind])


def _tokenizer(source: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, ImportError):
        return None  # a model of token ids alone; only calibration text would need one
