"""An adapter and its base as one checkpoint: `cluscomp merge ADAPTER OUT`.

On a compressed base the result is compressed too: its codes are those of the base, to the byte, and its codebooks and
scales are the sums that the adapted model computed with, so its logits are those of the adapted model to the last bit.
On a dense base it is what `cluscomp export --to dense` writes, block by block.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from typing import Any

from huggingface_hub import snapshot_download
from peft import PeftModel
from transformers import AutoConfig

from ..compress.architecture import model_class, read_tokenizer
from ..compress.report.card import license_of, merged_card
from ..compress.report.record import PAGE_NAME, REPORT_NAME, read_report, write_page
from ..compress.stream.folder import check_target, free_name, write_text
from ..compress.stream.headers import check_folder, weight_bytes
from ..compress.stream.journal import disk_errors
from ..hf.evaluate import true_bits
from ..linear import ClusteredLinear
from .adapter import is_adapter, read_config
from .dense import export_dense

__all__ = ["merge_adapter", "write_merged"]

CARD_NAME = "README.md"
MERGED = "An adapter was merged into it, exactly: this is the adapted model to the last bit."
_SHARD = "5GB"  # what the hub's own tools write


def merge_adapter(
    source: str, target: str, *, adapter: str | None = None, dtype: str = "auto", overwrite: bool = False
) -> dict[str, Any]:
    """Writes the checkpoint that an adapter makes of its base, with tokenizer, report and card.

    Args:
        source (`str`): Folder of an adapter, which names its base; or the base, folder or hub id.
        target (`str`): Folder to create.
        adapter (`str`, *optional*): Folder or hub id of the adapter, where `source` is the base.
        dtype (`str`): Of everything that is not clustered; "auto" is the model's.
        overwrite (`bool`): Replace `target` if it is a model.

    Returns:
        `dict`: base_bits and true_bits, per weight of the linear layers, of the base and of the result; bytes of the
            weight files; seconds.

    Raises:
        ValueError: If the adapter is of another method or another model, would bring NaN, or `target` exists.
    """
    started = time.perf_counter()
    if is_adapter(source):
        if adapter is not None:
            raise ValueError(f"{source} is an adapter itself; give its base, or leave out --adapter {adapter}.")
        source, adapter = read_config(source).base_model_name_or_path or "", source
        if not source:
            raise ValueError(f"{adapter} does not name its base; give that, and the adapter with --adapter.")
    elif adapter is None:
        raise ValueError(f"{source} is no adapter; give the folder of one, or its base with --adapter ADAPTER.")
    else:
        read_config(adapter)
    check_folder(source)
    for place in (source, adapter):
        check_target(place, target, overwrite)
    config = AutoConfig.from_pretrained(source)
    if getattr(config, "quantization_config", None) is None:
        done = export_dense(source, target, adapter=adapter, dtype=dtype, overwrite=overwrite)
        name = os.path.basename(os.path.abspath(target))
        write_text(os.path.join(target, CARD_NAME), merged_card(name, {}, 0, MERGED, license_of(source)))
        bits = 32.0 if done["dtype"] == "float32" else 16.0
        return {"base_bits": bits, "true_bits": bits, "bytes": done["bytes"], "seconds": done["seconds"]}
    base: Any = model_class(config, source).from_pretrained(source, dtype=dtype)
    base_bits = true_bits(base)
    merged = PeftModel.from_pretrained(base, adapter).merge_and_unload(safe_merge=True)
    tokenizer = read_tokenizer(adapter) or read_tokenizer(source)
    parent, name = os.path.split(os.path.abspath(target))
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{name}.") as scratch:
        work = os.path.join(scratch, name)
        os.mkdir(work)
        write_merged(merged, tokenizer, work, name, source, MERGED)
        check_target(source, target, overwrite)  # which may have been filled meanwhile
        _move(work, os.path.abspath(target))
    return {
        "base_bits": base_bits,
        "true_bits": true_bits(merged),
        "bytes": weight_bytes(target),
        "seconds": time.perf_counter() - started,
    }


def write_merged(
    model: Any, tokenizer: Any, folder: str, name: str, base: str, story: str, section: str = "", **notes: Any
) -> None:
    """Writes a model that an adapter was merged into: weights, tokenizer, report, page and card.

    Args:
        model: What `merge_and_unload` gave.
        tokenizer: Of the model; None if it has none.
        folder (`str`): Where to.
        name (`str`): That the folder will have in the end.
        base (`str`): Folder or hub id of the compressed model, whose report goes on.
        story, section (`str`): How it was trained, see [`merged_card`].
        **notes: What the report's summary shall also say.
    """
    with disk_errors(folder):
        model.save_pretrained(folder, max_shard_size=_SHARD)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    report = read_report(base if os.path.isdir(base) else snapshot_download(base, allow_patterns=["*.json"]))
    clustered = [layer for layer in model.modules() if isinstance(layer, ClusteredLinear)]
    summary, matrices = report["summary"], report["matrices"]
    for layer_name, entry in matrices.items():
        layer = model.get_submodule(layer_name)
        # The distance to the dense weights has changed, and nobody measured it.
        entry.update(
            relative_error=None, true_bits=layer.true_bits, spec=layer.spec.to_dict(), bytes=layer.stored_bytes()
        )
    if clustered:
        summary.update(
            relative_error=None,
            true_bits=true_bits(model),
            bytes=weight_bytes(folder),
            clustered_bytes=sum(entry["bytes"] for entry in matrices.values()),
            evaluation=None,
            **notes,
        )
        # What was measured of blocks and losses was measured before.
        content = {"summary": summary, "matrices": matrices, "blocks": {}, "losses": {}}
        write_text(os.path.join(folder, REPORT_NAME), json.dumps(content, indent=1))
        if matrices:
            write_page(folder, os.path.join(folder, PAGE_NAME), name)
    card = merged_card(name, summary, len(clustered), story, license_of(base), section)
    write_text(os.path.join(folder, CARD_NAME), card)


def _move(work: str, target: str) -> None:
    """The finished folder takes the target's place; what was there goes only when it has, and comes back if it
    cannot."""
    aside = free_name(target) if os.path.isdir(target) else None
    if aside is not None:
        os.rename(target, aside)
    try:
        os.rename(work, target)
    except BaseException:
        if aside is not None:
            os.rename(aside, target)
        raise
    if aside is not None:
        shutil.rmtree(aside)
