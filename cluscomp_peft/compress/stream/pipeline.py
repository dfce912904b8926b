"""A dense checkpoint on disk becomes clustered shards on disk, one block in memory at a time.

    without calibration    every shard is read, clustered and written by itself: as many matrices at once as there are
                           cores, in several processes if the user asks for them                (`shards`, `workers`)
    with calibration       measure      sensitivities, one pass forward and one back            (only to allocate bits)
                           per block    targets of the dense block → clustering with error feedback → reconstruction
                                        → shard, activations at the next boundary, journal      (`calibrated`, `block`)
    with a held-out text   in the end   both models, a block of each at a time                  (`evaluated`)

A run that was killed, or ended by an error, continues with the first shard that the journal does not name. Its bytes
are those of a run that was never disturbed: every step depends on settings, weights and stored activations alone.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from torch import nn

from ...codes import ClusterSpec, combine_fingerprints
from ...progress import Progress, duration
from ..budget.embeddings import head_owner
from ..calibration.head import head_moments
from ..matrix.block import BlockSettings
from .calibrated import CalibratedBlocks, Calibration
from .evaluated import HeldOut, measure_losses
from .journal import Journal
from .shards import TOGETHER, Job, compress_shard, read_matrices, small_memory, trim_memory, write_shard
from .source import DenseCheckpoint
from .split import Shard, split_into_shards
from .workers import Advance, compress_in_workers

__all__ = ["TOGETHER", "Calibration", "compress_shards", "fingerprint_of"]

_HEAD_TOKENS = 8192  # for the second moments of what the output head is given
_LARGEST_HEAD = 1 << 28  # weights; error feedback takes some 30 bytes for each


@small_memory()
def compress_shards(
    model: nn.Module,
    source: DenseCheckpoint,
    specs: dict[str, ClusterSpec],
    journal: Journal,
    *,
    settings: BlockSettings,
    dtype: torch.dtype,
    devices: list[torch.device],
    calibration: Calibration | None = None,
    held_out: HeldOut | None = None,
    workers: int = 1,
) -> dict[str, Any]:
    """Writes every tensor of the source, clustered where `specs` says so, as shards into the journal's folder.

    Args:
        model: The dense model with its parameters on the meta device, buffers real.
        source ([`DenseCheckpoint`]): Its weights.
        specs: Layer name to spec.
        journal ([`Journal`]): Of the folder; says what is done already.
        settings ([`BlockSettings`]): Of the clustering.
        dtype (`torch.dtype`): Of floating-point tensors that stay dense.
        devices (`list[torch.device]`): Where matrices are clustered that are clustered by themselves; worker i takes
            the i-th, counted round.
        calibration ([`Calibration`], *optional*): Compress block by block on these tokens.
        held_out ([`HeldOut`], *optional*): Text to measure the dense and the compressed model on in the end.
        workers (`int`): Processes, without calibration.

    Returns:
        `dict`: shards (file name → keys with bytes), matrices, fingerprints, blocks, losses, evaluation (see
        [`measure_losses`]; None without `held_out`), seconds and stages (seconds of each stage), both of the work that
        the result is made of, whichever run did it, and memory, the bytes that workers held at most.

    Raises:
        ValueError: If the checkpoint lacks weights, or a weight cannot be clustered.
        ChildProcessError: If a worker died.
    """
    shards = split_into_shards(model, source, specs)
    job = Job(source, journal.folder, settings, dtype)
    blocks = None
    memory = 0
    total = sum(shard.weights for shard in shards)
    count = len({shard.index for shard in shards} - {None})
    left = [shard for shard in shards if shard.file not in journal.content.get("done", {})]
    if len(left) < len(shards):
        print(_resumed(left, len(shards), count), file=sys.stderr, flush=True)
    done = total - sum(shard.weights for shard in left)
    with Progress("Compressing", total, done=done, unit="weight", unit_scale=True) as bar:

        def finished(shard: Shard, report: dict[str, Any]) -> None:
            source.refuse_changes()
            journal.commit(done={**journal.content.get("done", {}), shard.file: report})
            trim_memory()
            error = report.get("error_after")
            words = f"{_place(shard, count)} in {duration(report['seconds'])}"
            bar.step(words if error is None else f"{words}, output error {error:.4f}", always=True)

        if calibration is not None and "losses" not in journal.content:
            # What is outside of the blocks comes first: the compressed model begins with its own embeddings.
            outside = [shard for shard in shards if shard.index is None and shard.matrices]
            waiting = [shard for shard in outside if shard in left]
            moments = _moments_of_head(waiting, calibration)
            for shard in waiting:
                finished(shard, compress_shard(shard, job, devices[0], bar.advance, moments))
                left.remove(shard)
            blocks = CalibratedBlocks(journal, calibration, read_matrices(outside, journal.folder))
        if workers > 1 and blocks is None:
            memory = compress_in_workers(left, job, workers, devices, bar.advance, finished)
            left = []
        for shard in left:
            if shard.index is not None and blocks is not None:
                # Also a block that stays dense: the next one needs what it hands on.
                finished(shard, _compress_block(blocks, shard, job, bar.advance))
            else:
                finished(shard, compress_shard(shard, job, devices[0], bar.advance))
    if blocks is not None:
        assert calibration is not None
        # A loss of what is not in blocks, or of text that was fitted to, would not be that of the model.
        unseen = len(calibration.fitted) < len(calibration.batches)
        started = time.perf_counter()
        losses = blocks.losses() if unseen else {}
        journal.commit(losses=losses, losses_seconds=time.perf_counter() - started)
    evaluation = None if held_out is None else measure_losses(held_out, shards, journal)
    reports = journal.content["done"]
    collected = _collected({shard.file: reports[shard.file] for shard in shards}, journal)
    stages = _stages(collected.pop("stages"), journal, evaluation)
    seconds = collected["seconds"] + stages.get("allocating bits", 0.0) + stages.get("evaluating", 0.0)
    return {**collected, "evaluation": evaluation, "stages": stages, "seconds": seconds, "memory": memory}


def fingerprint_of(fingerprints: dict[str, str], model: nn.Module) -> str | None:
    """Digest of all codes, in the order of the model's layers."""
    return combine_fingerprints(fingerprints[name] for name, _ in model.named_modules() if name in fingerprints)


def _place(shard: Shard, count: int) -> str:
    """A shard as people call it."""
    return "what is outside of the blocks" if shard.index is None else f"block {shard.index + 1} of {count}"


def _resumed(left: list[Shard], shards: int, count: int) -> str:
    if not left:
        return f"resuming: all {shards} parts are there"
    return f"resuming at {_place(left[0], count)}: {shards - len(left)} of {shards} parts are there"


def _moments_of_head(shards: list[Shard], calibration: Calibration) -> dict[str, torch.Tensor]:
    """Second moments of what the output head is given, if it is among these shards and not too large for them."""
    assert calibration.blocks is not None
    owner = head_owner(calibration.blocks.model)
    sizes = {matrix.name: matrix.weights for shard in shards for matrix in shard.matrices}
    if owner is None or not 0 < sizes.get(owner, 0) <= _LARGEST_HEAD:
        return {}
    enough = -(-_HEAD_TOKENS // calibration.batches[0].numel())
    return {owner: head_moments(calibration.blocks, calibration.fitted[:enough])}


def _compress_block(blocks: CalibratedBlocks, shard: Shard, job: Job, progress: Advance) -> dict[str, Any]:
    started = time.perf_counter()
    assert shard.index is not None
    specs = {matrix.name: matrix.spec for matrix in shard.matrices}
    layers, report = blocks.compress(shard.index, specs, job.settings, progress)
    return write_shard(shard, layers, job, report, started)


def _stages(
    of_shards: list[dict[str, float]], journal: Journal, evaluation: dict[str, Any] | None
) -> dict[str, float]:
    """Seconds of each stage, in the order of the stages, as far as there are some."""
    names = ("calibrating", "clustering", "reconstructing", "writing")
    losses = journal.content.get("losses_seconds", 0.0) + (evaluation["seconds"] if evaluation else 0.0)
    stages = {
        "allocating bits": journal.content.get("measured", 0.0),
        **{name: sum(stages.get(name, 0.0) for stages in of_shards) for name in names},
        "evaluating": losses,
    }
    return {name: seconds for name, seconds in stages.items() if seconds}


def _collected(reports: dict[str, dict[str, Any]], journal: Journal) -> dict[str, Any]:
    matrices = {layer: entry for report in reports.values() for layer, entry in report["matrices"].items()}
    fingerprints = {layer: digest for report in reports.values() for layer, digest in report["fingerprints"].items()}
    kept = ("error_before", "error_after", "epochs", "seconds")
    blocks = {
        report["block"]: {key: report[key] for key in kept}
        for report in reports.values()
        if report.get("error_before") is not None
    }
    return {
        "shards": {name: report["keys"] for name, report in reports.items()},
        "matrices": matrices,
        "fingerprints": fingerprints,
        "blocks": blocks,
        "losses": journal.content.get("losses", {}),
        "stages": [report.get("stages", {}) for report in reports.values()],
        "seconds": sum(report["seconds"] for report in reports.values()),
    }
