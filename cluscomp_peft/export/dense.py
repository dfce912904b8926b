"""A compressed checkpoint as the dense one that it stands for: `cluscomp export DIR OUT --to dense`.

Shard by shard, a block of the model each, so no more than one block is ever dense in memory. As in `cluscomp compress`
a hidden folder takes the target's name when it is complete, and a run that was killed goes on in it.

What is equal: the weights are what `model.dequantize(dtype)` puts in the place of clustered layers, to the last bit.
So the logits are those of the clustered model in the same dtype, to the last bit, wherever that multiplies by decoded
weights: with more than 16 tokens in a call on a CPU, 64 on a GPU, and with any number on the reference backend. Fewer
tokens are multiplied straight from the codes, which adds the same products in another order; so does a Conv1D
(GPT-2) with any number of tokens.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from typing import Any

from torch import nn

from .._version import __version__
from ..compress.architecture import read_tokenizer, write_generation_config
from ..compress.stream.folder import at_work, check_target, move, work_folder, write_index
from ..compress.stream.headers import weight_bytes
from ..compress.stream.joined import join_shards
from ..compress.stream.journal import Journal, disk_errors, save_tensors
from ..compress.stream.shards import small_memory, trim_memory
from ..compress.stream.split import Shard, split_into_shards
from ..progress import Progress
from ..upstream.transformers_experts import as_stored
from .source import MergedCheckpoint, Opened, open_checkpoint

__all__ = ["export_dense"]


@small_memory()
def export_dense(
    source: str, target: str, *, adapter: str | None = None, dtype: str = "auto", overwrite: bool = False
) -> dict[str, Any]:
    """Writes the dense checkpoint that a compressed one, or an adapter on one, stands for.

    Also a dense model with an adapter made on it, whose merged weights are those of `merge_and_unload`. Tokenizer and
    chat template, of the adapter where it has some, and generation settings go along.

    Args:
        source (`str`): Folder or hub id of a model, or the folder of an adapter, which names its base.
        target (`str`): Folder to create.
        adapter (`str`, *optional*): Folder or hub id of an adapter to merge.
        dtype (`str`): "float32", "bfloat16" or "float16"; "auto" is the model's.
        overwrite (`bool`): Replace `target` if it exists, and forget an unfinished run with other settings.

    Returns:
        `dict`: matrices, how many were decoded or merged; bytes of the weight files; dtype; seconds.

    Raises:
        ValueError: If there is nothing to decode or merge, files are damaged, the adapter is of another model, or
            `target` exists.
        OSError: If the disk is full; the same call goes on where this one ended.
    """
    started = time.perf_counter()
    check_target(source, target, overwrite)
    opened = open_checkpoint(source, adapter, dtype)
    if not opened.clustered:
        raise ValueError(f"{source} is dense already; give an adapter to merge, or a compressed checkpoint.")
    for place in (opened.folder, opened.tokenizer):
        check_target(place, target, overwrite)
    checkpoint = opened.checkpoint
    job = {
        "command": "export",
        "source": checkpoint.state(),
        "dtype": str(checkpoint.dtype),
        "version": __version__,
    }
    target = os.path.abspath(target)
    work = work_folder(target)
    journal = Journal(work, job, anew=overwrite)
    with at_work(journal, target, checkpoint):
        check_target(opened.folder, target, overwrite)  # again, as nobody else can be at work any more
        shards = split_into_shards(opened.model, checkpoint, {})
        done = journal.content.setdefault("done", {})
        left = [shard for shard in shards if shard.file not in done]
        if len(left) < len(shards):
            print(f"resuming: {len(shards) - len(left)} of {len(shards)} shards are there", file=sys.stderr)
        with Progress("Exporting", len(shards), done=len(shards) - len(left), unit="shard") as bar:
            for shard in left:
                done[shard.file] = _write(shard, opened.model, checkpoint, work)
                checkpoint.refuse_changes()
                journal.commit()
                trim_memory()
                bar.advance()
                bar.step(f"shard {bar.done} of {len(shards)}")
        warning = opened.check(_joined(done, "fingerprints"), _joined(done, "codebooks"))
        write_index(work, join_shards(work, {shard.file: done[shard.file]["keys"] for shard in shards}))
        _finish(work, opened)
        size = weight_bytes(work)
        check_target(opened.folder, target, overwrite)  # which may have been filled meanwhile
        move(journal, target)
    if warning:
        warnings.warn(warning, stacklevel=2)
    return {
        "matrices": checkpoint.made,
        "bytes": size,
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "seconds": time.perf_counter() - started,
    }


def _write(shard: Shard, model: nn.Module, checkpoint: MergedCheckpoint, work: str) -> dict[str, Any]:
    """Writes a shard; returns what the journal keeps of it: bytes by key, digests by layer."""
    checkpoint.fingerprints.clear()
    checkpoint.codebooks.clear()
    tensors = {}
    for key in shard.keys:
        value, experts = checkpoint.read(key), checkpoint.experts(key)
        tensors.update({key: value} if experts is None else as_stored(model, {experts: value}))
    save_tensors(os.path.join(work, shard.file), tensors)
    return {
        "keys": {key: tensor.numel() * tensor.element_size() for key, tensor in tensors.items()},
        "fingerprints": dict(checkpoint.fingerprints),
        "codebooks": dict(checkpoint.codebooks),
    }


def _joined(done: dict[str, dict[str, Any]], name: str) -> dict[str, str]:
    return {layer: digest for report in done.values() for layer, digest in report[name].items()}


def _finish(work: str, opened: Opened) -> None:
    """Everything but weights."""
    tokenizer = read_tokenizer(opened.tokenizer)
    if tokenizer is not None:
        with disk_errors(work):
            tokenizer.save_pretrained(work)
    opened.config.save_pretrained(work)
    write_generation_config(opened.model, opened.folder, work)
