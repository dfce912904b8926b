"""The door: a dense checkpoint in, a compressed checkpoint out. `cluscomp compress` calls it.

The new checkpoint is written into a hidden folder beside its target, which takes the target's name when it is
complete: no half-written checkpoint can be loaded. A run that was killed or failed leaves the hidden folder, and the
same command continues in it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
import transformers
from huggingface_hub import snapshot_download
from transformers import AutoConfig

from .._version import __version__
from ..codes import ClusterSpec
from ..experts import unfuse
from ..layout import summarize
from ..upstream.transformers import renaming_of
from .architecture import (
    check_generation_config,
    empty_model,
    read_tokenizer,
    refuse_calibration,
    stored_dtype,
    write_generation_config,
)
from .calibration.blocks import BlockModel
from .calibration.errors import CannotCalibrate
from .calibration.text import AUTO, BUILTIN, NONE, calibration_windows, evaluation_windows
from .matrix.block import BlockSettings
from .policy import Policy
from .report.card import license_of, model_card
from .report.page import render_report
from .report.record import PAGE_NAME, REPORT_NAME
from .report.settings import settings_of, true_bits_of
from .specs import specs_of_run
from .stream.evaluated import MOST_TOKENS, HeldOut
from .stream.folder import (
    at_work,
    check_target,
    move,
    work_folder,
    write_index,
    write_text,
)
from .stream.headers import check_folder, weight_bytes
from .stream.joined import join_shards
from .stream.journal import Journal, disk_errors
from .stream.pipeline import Calibration, compress_shards, fingerprint_of
from .stream.source import DenseCheckpoint
from .stream.workers import peak_memory, visible_devices

__all__ = ["QuantizationConfig", "compress_checkpoint"]

_EPOCHS = 8


class QuantizationConfig(Protocol):
    """What the door needs of a `ClusCompQuantizationConfig`, which is transformers' and stands a floor above."""

    layout: dict[str, dict[str, Any]]
    fingerprint: str | None

    @property
    def policy(self) -> Policy: ...

    def to_dict(self) -> dict[str, Any]: ...


def compress_checkpoint(
    source: str,
    target: str,
    config: QuantizationConfig,
    *,
    size: int | None = None,
    calibration: str = "auto",
    samples: int = 128,
    seqlen: int | None = None,
    feedback: bool = True,
    epochs: int | None = None,
    learning_rate: float = 0.003,
    evaluate: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    overwrite: bool = False,
    workers: int = 1,
) -> dict[str, Any]:
    """Compresses a dense model, of the class that its config names, to a checkpoint that `from_pretrained` loads.

    With calibration one block and its activations are in memory at a time; without, the matrices that are clustered at
    once. The same call continues where an earlier one ended, and the bytes are those of a run without an interruption.

    Args:
        source (`str`): Folder or hub id of the dense model.
        target (`str`): Folder to create.
        config ([`ClusCompQuantizationConfig`]): Bits and settings. With calibration or `size`, `bits` holds for all
            matrices together, and each gets what lowers the loss most.
        size (`int`, *optional*): Bytes that the whole folder may take, instead of bits.
        calibration (`str`): Text to compress by: sensitivities, error feedback, reconstruction. A file or hub id, see
            [`read_documents`]; "builtin", the text that comes with the package; "none", to cluster every matrix by
            itself; or "auto", which is "builtin" for models that continue text, else "none" with the reason in the
            summary, under "not_calibrated".
        samples (`int`): Sequences to take from it.
        seqlen (`int`, *optional*): Tokens of a sequence; 2048 (512 of the built-in text), or what the model takes.
        feedback (`bool`): Error feedback.
        epochs (`int`, *optional*): Of reconstruction, 0 for none. 8, but none with the built-in text: on a CPU they
            take longer than all the rest.
        learning_rate (`float`): Of reconstruction, in units of the RMS of what it trains.
        evaluate (`str`, *optional*): Text to measure the loss of the dense and the compressed model on in the end,
            block by block: a file or hub id, see [`read_documents`], of which at most 65,536 tokens are taken. It
            must not be the calibration text.
        dtype (`str`): Of everything that stays dense; "auto" keeps the checkpoint's.
        device (`str`, *optional*): Where blocks run and matrices are clustered: "cpu", "cuda", "cuda:1"; a GPU if
            there is one.
        overwrite (`bool`): Replace `target` if it exists, and forget an unfinished run with other settings.
        workers (`int`): Processes that make shards at once, with calibration "none": each takes a block at a time and
            its share of the threads, or one of the GPUs in turn. The bytes are those of one. A script that asks for
            more than one must do so under `if __name__ == "__main__":`, because each imports it.

    Returns:
        `dict`: true_bits and relative_error of the linear layers, embedding_bits (None where embeddings stay dense),
            bytes, seconds, matrices, losses, evaluation, and more that the report holds.

    Raises:
        ValueError: If `target` exists, `source` is compressed already, another run is at work, or model, text and
            settings do not fit.
        OSError: If the disk is full, or a worker was killed (ChildProcessError); the same call goes on where this one
            ended.
    """
    _check_workers(workers, calibrated=calibration not in (AUTO, NONE))
    devices = visible_devices(device)
    started = time.perf_counter()
    config = copy.deepcopy(config)  # layout and fingerprint are written into it
    check_folder(source)
    check_target(source, target, overwrite)
    model_config = AutoConfig.from_pretrained(source)
    if getattr(model_config, "quantization_config", None) is not None:
        raise ValueError(f"{source} is quantised already; compress the dense model.")
    model = empty_model(model_config, source)
    tokenizer = read_tokenizer(source)
    folder = source if os.path.isdir(source) else snapshot_download(source, allow_patterns=["*.safetensors", "*.json"])
    dense = DenseCheckpoint(folder, model.base_model_prefix, renaming_of(model), model)
    unfuse(model, dense.unread)
    check_generation_config(folder)
    kept = stored_dtype(dtype, model_config, dense)
    policy = replace(config.policy, size=size)
    if policy.target_modules is None:
        _refuse_unread(dense)
    layers = policy.targets(model)
    epochs = (0 if calibration in (AUTO, BUILTIN) else _EPOCHS) if epochs is None else epochs
    settings = BlockSettings(policy, feedback, epochs, learning_rate, torch.get_num_threads())
    given, reason = None, None
    text = BUILTIN if calibration == AUTO else calibration
    if calibration != NONE:
        try:
            refuse_calibration(model, source)
            windows = calibration_windows(model, tokenizer, source, text, samples, seqlen)
            given = Calibration(windows, _blocks(model, dense, kept, devices[0], windows.split(1)))
        except CannotCalibrate as error:
            if calibration != AUTO:
                raise
            reason = error.reason
    _check_workers(workers, calibrated=given is not None)
    held_out = None
    if evaluate is not None:

        def blocks(windows: list[torch.Tensor]) -> BlockModel:
            own = None if given is None else given.blocks
            return own or _blocks(model, dense, kept, devices[0], windows)

        calibrated = None if given is None else text
        held_out = _held_out(evaluate, calibrated, model, tokenizer, source, blocks)

    target = os.path.abspath(target)
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
    work = work_folder(target)
    journal = Journal(work, job, anew=overwrite)
    with at_work(journal, target, dense, measured=given is not None):
        check_target(source, target, overwrite)  # again, as nobody else can be at work any more
        if tokenizer is not None:
            with disk_errors(work):
                tokenizer.save_pretrained(work)
        specs = specs_of_run(model, layers, policy, dense, kept, journal, given)
        result = compress_shards(
            model,
            dense,
            specs,
            journal,
            settings=settings,
            dtype=kept,
            devices=devices,
            calibration=given,
            held_out=held_out,
            workers=workers,
        )
        dense.refuse_changes()
        result["shards"] = join_shards(work, result["shards"])
        embeddings = policy.embeddings_of(model).keys()
        linear = [entry for name, entry in result["matrices"].items() if name not in embeddings]
        squares = [(entry["squared_error"], entry["squared_norm"]) for entry in linear]
        summary = {
            "source": source,
            "bits": policy.bits if size is None else None,
            "size": size,
            "true_bits": true_bits_of(linear),
            "embedding_bits": true_bits_of([result["matrices"][name] for name in embeddings]),
            "relative_error": (sum(one for one, _ in squares) / max(sum(two for _, two in squares), 1e-30)) ** 0.5,
            "bytes": weight_bytes(work),
            "clustered_bytes": sum(entry["bytes"] for entry in result["matrices"].values()),
            "source_bytes": sum(map(dense.num_bytes, dense.shapes)),
            "seconds": result["seconds"],
            "stages": result["stages"],
            "peak_memory": peak_memory() + result["memory"],
            "calibration": None if given is None else os.path.basename(text),
            "not_calibrated": reason,
            "sequences": None if given is None else given.windows.shape[0],
            "tokens": None if given is None else given.windows.numel(),
            "evaluation": result["evaluation"],
            "dtype": dtype,
            "coverage": policy.coverage(model, specs),
            "settings": settings_of(policy, dtype, None if given is None else text, given, feedback, epochs, evaluate),
            "versions": {
                "cluscomp_peft": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }
        pooled = [name for name, entry in result["matrices"].items() if entry.get("pooled")]
        if pooled:  # experts that too few tokens reached
            summary["pooled"] = pooled
        model_config.dtype = kept
        _finish(work, os.path.basename(target), folder, model, model_config, config, specs, result, summary)
        check_target(source, target, overwrite)  # which may have been filled meanwhile
        move(journal, target)
    return {
        **summary,
        "elapsed": time.perf_counter() - started,
        "matrices": len(result["matrices"]),
        "losses": result["losses"],
    }


def _finish(
    work: str,
    name: str,
    folder: str,
    model: Any,
    model_config: Any,
    config: QuantizationConfig,
    specs: dict[str, ClusterSpec],
    result: dict[str, Any],
    summary: dict[str, Any],
) -> None:
    """Everything but the shards: index, configs, report, page and card."""
    config.layout = summarize(specs, [name for name, _ in model.named_modules()])
    config.fingerprint = fingerprint_of(result["fingerprints"], model)
    model_config.quantization_config = config.to_dict()
    model_config.architectures = model_config.architectures or [type(model).__name__]
    model_config.save_pretrained(work)
    write_generation_config(model, folder, work)
    shards = result["shards"]
    matrices = {
        layer: {key: value for key, value in entry.items() if key not in ("squared_error", "squared_norm")}
        for layer, entry in result["matrices"].items()
    }
    report = {"summary": summary, "matrices": matrices, "blocks": result["blocks"], "losses": result["losses"]}
    texts = {
        REPORT_NAME: json.dumps(report, indent=1),
        PAGE_NAME: render_report(name, report),
        "README.md": model_card(name, summary, len(matrices), report["losses"], license_of(summary["source"])),
    }
    write_index(work, shards)
    for file_name, text in texts.items():
        write_text(os.path.join(work, file_name), text)


def _blocks(
    model: Any, dense: DenseCheckpoint, dtype: torch.dtype, device: torch.device, windows: Sequence[torch.Tensor]
) -> BlockModel:
    """The dense model block by block; two sequences [1, length] have shown that it can be taken apart."""
    blocks = BlockModel(model, dense, _dtype_on(device, dtype), device)
    with torch.no_grad():
        for sequence in (windows[0], windows[-1]):
            blocks.stem(sequence)
    return blocks


def _held_out(path: str, calibrated: str | None, model: Any, tokenizer: Any, source: str, blocks: Any) -> HeldOut:
    """The text to measure the models on in the end.

    Raises:
        ValueError: If it is the calibration text, or the model cannot be measured on text block by block.
    """
    if calibrated is not None and os.path.abspath(path) == os.path.abspath(calibrated):
        raise ValueError(
            f"{path} is the calibration text, so the loss on it would look better than it is; give another --eval."
        )
    try:
        refuse_calibration(model, source)
        windows = evaluation_windows(model, tokenizer, source, path, MOST_TOKENS)
        return HeldOut(os.path.basename(path), windows, blocks(windows))
    except CannotCalibrate as error:
        raise ValueError(f"--eval {path} cannot be measured: {error.reason}; leave it out.") from error


def _dtype_on(device: torch.device, stored: torch.dtype) -> torch.dtype:
    """To compute in: fp32 on CPUs, where half precision is slow and lacks operations."""
    return torch.float32 if device.type == "cpu" else stored


def _refuse_unread(dense: DenseCheckpoint) -> None:
    """Raises a ValueError if experts of the source cannot be read one by one."""
    for name, reason in dense.unread.items():
        raise ValueError(
            f"the experts {name} of {dense.folder} cannot be clustered: {reason}. Save the model in bfloat16 with "
            "transformers first, or name the linear layers to cluster in target_modules, which leaves experts dense."
        )


def _check_workers(workers: int, calibrated: bool) -> None:
    if type(workers) is not int or workers < 1:
        raise ValueError(f"workers must be a whole number of at least 1, got {workers!r}.")
    if workers > 1 and calibrated:
        raise ValueError(
            f"workers={workers} and calibration do not go together: each block is fitted to what the compressed ones "
            "before it hand on, so blocks come one after another, and one process uses all cores for each. Leave out "
            "--workers, or give --calibration none."
        )
