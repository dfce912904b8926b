"""A dense checkpoint on disk becomes clustered shards on disk, one block in memory at a time.

    without calibration    every matrix is read, clustered and written; several at once where cores are idle
    with calibration       measure      sensitivities, one pass forward and one back            (only to allocate bits)
                           per block    targets of the dense block → clustering with error feedback → reconstruction
                                        → shard, activations at the next boundary, journal

Work that ends early, killed or by an error, goes on at the first block that the journal does not name, and ends with
the bytes of a run that was never disturbed: every step depends on settings, weights and stored activations alone.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from ..codes import ClusterSpec, combine_fingerprints
from ..linear import ClusteredLinear, weight_of
from .block import BlockSettings, compress_block
from .blocks import BlockModel, find_blocks
from .cluster import cluster_codes
from .journal import Journal
from .source import DenseCheckpoint
from .streams import Stream

__all__ = ["TOGETHER", "Calibration", "compress_shards", "fingerprint_of"]

TOGETHER = 1 << 23  # weights that are clustered at once; each takes some 30 bytes meanwhile
_SHARD_BYTES = 1 << 26  # of tensors outside the blocks; one tensor may be larger
_ROWS = 256  # that errors are measured of at a time
_BATCH_TOKENS = 4096
_BATCHES = 8  # at least, where there are as many sequences: one of them is held out


@dataclass(frozen=True)
class Calibration:
    """Tokens to compress by.

    Args:
        windows (`torch.Tensor`): [sequences, length] int64.
        device (`torch.device`): Where.
    """

    windows: torch.Tensor
    device: torch.device

    @property
    def batches(self) -> list[torch.Tensor]:
        sequences, length = self.windows.shape
        return list(self.windows.split(max(1, min(_BATCH_TOKENS // length, sequences // _BATCHES))))

    @property
    def held_out(self) -> int:
        """Batches at the end that nothing is fitted to, as long as there are more: an eighth, one at least."""
        return max(1, len(self.batches) // 8)

    @property
    def fitted(self) -> list[torch.Tensor]:
        """The batches that codes and codebooks are fitted to."""
        return self.batches[: max(1, len(self.batches) - self.held_out)]

    def dtype(self, stored: torch.dtype) -> torch.dtype:
        """To compute in: fp32 on CPUs, where half precision is slow and lacks operations."""
        return torch.float32 if self.device.type == "cpu" else stored


@dataclass(frozen=True)
class _Unit:
    """What one shard holds: the keys of the source that go into it; `block` if it is one."""

    keys: list[str]
    block: int | None


def compress_shards(
    model: nn.Module,
    source: DenseCheckpoint,
    specs: dict[str, ClusterSpec],
    journal: Journal,
    *,
    settings: BlockSettings,
    dtype: torch.dtype,
    calibration: Calibration | None = None,
) -> dict[str, Any]:
    """Writes every tensor of the source, clustered where `specs` says so, as shards into the journal's folder.

    Args:
        model: The dense model with its parameters on the meta device, buffers real.
        source ([`DenseCheckpoint`]): Its weights.
        specs: Layer name to spec.
        journal ([`Journal`]): Of the folder; says what is done already.
        settings ([`BlockSettings`]): Of the clustering.
        dtype (`torch.dtype`): Of floating-point tensors that stay dense.
        calibration ([`Calibration`], *optional*): Compress block by block on these tokens.

    Returns:
        `dict`: shards (file name → keys with bytes), matrices, fingerprints, blocks, losses, seconds.
    """
    keys = {name: _weight_key(source, name) for name in specs}
    units = _units(model, source)
    empty = [unit for unit in units if not unit.keys]
    if empty and calibration is not None:
        raise ValueError(
            f"{source.folder} has no weights of its own for {len(empty)} blocks, which share those of others; "
            "compress it without --calibration."
        )
    units = [unit for unit in units if unit.keys]
    names = [f"model-{number + 1:05d}-of-{len(units):05d}.safetensors" for number in range(len(units))]
    done: dict[str, Any] = journal.content.get("done", {})
    weights = {name: math.prod(source.shapes[key]) for name, key in keys.items()}
    found = find_blocks(model)
    blocks = None
    if calibration is not None and "losses" not in journal.content:
        blocks = _Blocks(BlockModel(model, source, calibration.dtype(dtype), calibration.device))
        blocks.open(journal, calibration)
    with tqdm(total=sum(weights.values()), desc="Compressing", unit="weight", unit_scale=True, disable=None) as bar:
        for unit, name in zip(units, names, strict=True):
            own = {layer: specs[layer] for layer, key in keys.items() if key in unit.keys}
            if name in done:
                bar.update(sum(weights[layer] for layer in own))
                continue
            started = time.perf_counter()
            report: dict[str, Any]
            if unit.block is not None and blocks is not None:
                # Also a block that stays dense: the next one needs what it hands on.
                layers, report = blocks.compress(unit.block, own, settings, bar.update)
            else:
                layers, report = _cluster_alone(model, source, own, keys, settings, bar.update), {}
            _measure(report, layers, source, keys, model)
            tensors = _tensors(layers, source, unit.keys, keys, dtype)
            journal.save_tensors(name, tensors)
            report["fingerprints"] = {layer: layers[layer].fingerprint() for layer in own}
            report["keys"] = {key: tensor.numel() * tensor.element_size() for key, tensor in tensors.items()}
            report["seconds"] = time.perf_counter() - started
            report["block"] = None if unit.block is None or found is None else f"{found[0]}.{unit.block}"
            del tensors, layers
            done = {**done, name: report}
            journal.commit(done=done)
            _trim()
    if blocks is not None:
        assert calibration is not None
        # A loss of what is not in blocks, or of text that was fitted to, would not be that of the model.
        whole = all(name.startswith(f"{blocks.model.prefix}.") for name in specs)
        held_out = len(calibration.fitted) < len(calibration.batches)
        journal.commit(losses=blocks.losses(calibration) if whole and held_out else {})
    return _collected([done[name] for name in names], names, journal)


def _collected(reports: list[dict[str, Any]], names: list[str], journal: Journal) -> dict[str, Any]:
    matrices = {layer: entry for report in reports for layer, entry in report.get("matrices", {}).items()}
    fingerprints = {layer: digest for report in reports for layer, digest in report["fingerprints"].items()}
    blocks = {
        report["block"]: {
            "error_before": report["error_before"],
            "error_after": report["error_after"],
            "epochs": report["epochs"],
            "seconds": report["seconds"],
        }
        for report in reports
        if report.get("error_before") is not None
    }
    return {
        "shards": {name: report["keys"] for name, report in zip(names, reports, strict=True)},
        "matrices": matrices,
        "fingerprints": fingerprints,
        "blocks": blocks,
        "losses": journal.content.get("losses", {}),
        "seconds": sum(report["seconds"] for report in reports),
    }


class _Blocks:
    """The blocks and the activations at their boundaries.

    Two files a stream, written in turn: what a block reads is never what it writes, so a block that was interrupted
    finds its inputs as they were.
    """

    def __init__(self, model: BlockModel) -> None:
        self.model = model

    def open(self, journal: Journal, calibration: Calibration) -> None:
        """Finds the activations of an earlier run, or makes those of the first block."""
        batches = calibration.batches
        self.held_out = calibration.held_out
        with torch.no_grad():
            # Also on resuming: the stem notes the arguments of the blocks, which differ by the size of a batch alone.
            example = self.model.stem(batches[0])
            self.model.stem(batches[-1])
        shape = ([len(batch) for batch in batches], *example.shape[1:], self.model.dtype)
        self.dense, self.compressed = (
            [Stream(os.path.join(journal.folder, f"{name}.{turn}"), *shape) for turn in (0, 1)]
            for name in ("dense", "compressed")
        )
        if "blocks_ready" not in journal.content:
            with torch.no_grad():
                for streams in (self.dense, self.compressed):
                    streams[0].write(self.model.stem(batch) for batch in batches)
            journal.commit(blocks_ready=True)

    def compress(
        self, index: int, specs: dict[str, ClusterSpec], settings: BlockSettings, progress: Callable[[int], object]
    ) -> tuple[dict[str, ClusteredLinear], dict[str, Any]]:
        """Block `index`; afterwards the activations behind it are on disk."""
        now, then = index % 2, 1 - index % 2
        model, device = self.model, self.model.device
        with torch.no_grad(), model.loaded(index):
            self.dense[then].write(model.run(index, part.to(device)) for part in self.dense[now])
            layers: dict[str, ClusteredLinear] = {}
            report: dict[str, Any] = {}
            if specs:
                layers, report = compress_block(
                    model,
                    index,
                    specs,
                    self.dense[now],
                    self.compressed[now],
                    self.dense[then],
                    self.held_out,
                    settings,
                    progress,
                )
            self.compressed[then].write(model.run(index, part.to(device)) for part in self.compressed[now])
        return layers, report

    @torch.no_grad()
    def losses(self, calibration: Calibration) -> dict[str, float]:
        """Next-token loss in nats on the batches that are held out, of the dense and the compressed model."""
        turn, batches = len(self.model) % 2, calibration.batches
        result = {}
        # A single block decides in which form the tail wants its output, and may not have run in this process.
        with self.model.loaded(len(self.model) - 1):
            self.model.run(len(self.model) - 1, self.dense[turn][0].to(self.model.device))
        for name, stream in (("dense", self.dense[turn]), ("compressed", self.compressed[turn])):
            total = tokens = 0.0
            for number in range(len(batches) - self.held_out, len(batches)):
                for row, hidden in zip(batches[number], stream[number], strict=True):
                    logits = self.model.logits(row[None], hidden[None].to(self.model.device))[0, :-1].float()
                    total += float(F.cross_entropy(logits, row[1:].to(logits.device), reduction="sum"))
                    tokens += len(row) - 1
            result[name] = total / tokens
            if not math.isfinite(result[name]):
                raise ValueError(
                    f"the loss of the {name} model is NaN or infinite on the calibration text: weights outside the "
                    "blocks are damaged, or the dtype is too narrow. Compress it with --dtype float32, or calibrate "
                    "on other text."
                )
        return result


def _cluster_alone(
    model: nn.Module,
    source: DenseCheckpoint,
    specs: dict[str, ClusterSpec],
    keys: dict[str, str],
    settings: BlockSettings,
    progress: Callable[[int], object],
) -> dict[str, ClusteredLinear]:
    """Clusters matrices by themselves, as many at once as there are cores and `TOGETHER` allows."""
    cores = settings.threads or torch.get_num_threads()
    largest = max((math.prod(source.shapes[keys[name]]) for name in specs), default=1)
    together = max(1, min(cores, len(specs), TOGETHER // largest))

    def work(name: str) -> ClusteredLinear:
        # Held by nobody here, so that it is gone once it is cut into vectors.
        packed, codebook, scale_in, scale_out = cluster_codes(
            _oriented(model, name, source.read(keys[name])),
            specs[name],
            codebook_dtype=settings.codebook_dtype,
            quality=settings.quality,
            seed=settings.seed,
            threads=max(1, cores // together),
            name=name,
        )
        dense = model.get_submodule(name)
        out, inputs = weight_of(dense).shape
        conv1d = isinstance(dense, Conv1D)
        layer = ClusteredLinear.from_parts(packed, codebook, scale_in, scale_out, None, out, conv1d=conv1d)
        progress(out * inputs)
        _trim()
        return layer

    with ThreadPoolExecutor(together) as pool:
        return dict(zip(specs, pool.map(work, specs), strict=True))


def _measure(
    report: dict[str, Any],
    layers: dict[str, ClusteredLinear],
    source: DenseCheckpoint,
    keys: dict[str, str],
    model: nn.Module,
) -> None:
    """Adds shape, spec, bytes, true bits and relative error of every matrix."""
    matrices = report.setdefault("matrices", {})
    for name, layer in layers.items():
        weight = _oriented(model, name, source.read(keys[name]))
        decoded = layer.decode(torch.float32).cpu()
        energy = error = 0.0
        for dense, stored in zip(weight.split(_ROWS), decoded.split(_ROWS), strict=True):
            energy += float(dense.float().square().sum(dtype=torch.float64))
            error += float((dense.float() - stored).square().sum(dtype=torch.float64))
        del weight, decoded
        matrices.setdefault(name, {}).update(
            shape=[layer.out_features, layer.in_features],
            spec=layer.spec.to_dict(),
            bytes=layer.stored_bytes(),
            true_bits=layer.true_bits,
            relative_error=(error / max(energy, 1e-30)) ** 0.5,
            squared_error=error,
            squared_norm=energy,
        )


def _tensors(
    layers: dict[str, ClusteredLinear],
    source: DenseCheckpoint,
    keys: Sequence[str],
    weight_keys: dict[str, str],
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """What the shard holds: clustered matrices under the names of their weights, everything else as it was."""
    clustered = {weight_keys[name]: layer for name, layer in layers.items()}
    tensors = {}
    for key in keys:
        layer = clustered.get(key)
        if layer is None:
            tensors[key] = source.read(key, dtype)
            continue
        base = key.removesuffix(".weight")
        for part in ("codes", "codebook", "scale_in", "scale_out"):
            value = getattr(layer, part)
            if value is not None:
                tensors[f"{base}.{part}"] = value.detach().cpu().contiguous()
    return tensors


def _units(model: nn.Module, source: DenseCheckpoint) -> list[_Unit]:
    """Blocks first, each a unit; then everything else, in pieces."""
    found = find_blocks(model)
    owners: dict[str, int] = {}
    if found is not None:
        prefix, blocks = found
        inside = {
            f"{prefix}.{index}.{name}": index for index, block in enumerate(blocks) for name in block.state_dict()
        }
        for name, index in inside.items():
            key = source.key(name)
            if key is not None:
                owners[key] = index
    units = [_Unit([], index) for index in range(len(found[1]))] if found is not None else []
    rest: list[str] = []
    for key in source.shapes:
        if key in owners:
            units[owners[key]].keys.append(key)
        else:
            rest.append(key)
    size = _SHARD_BYTES
    for key in rest:
        if size + source.num_bytes(key) > _SHARD_BYTES:
            units.append(_Unit([], None))
            size = 0
        units[-1].keys.append(key)
        size += source.num_bytes(key)
    return units


def _weight_key(source: DenseCheckpoint, name: str) -> str:
    key = source.key(f"{name}.weight")
    if key is None:
        raise ValueError(
            f"{source.folder} lacks {name}.weight; it is incomplete, or stores this model under other names: load it "
            "once with from_pretrained and save it with save_pretrained()."
        )
    return key


def _oriented(model: nn.Module, name: str, weight: torch.Tensor) -> torch.Tensor:
    """[out, in]."""
    return weight.t() if isinstance(model.get_submodule(name), Conv1D) else weight


def _trim() -> None:
    """Gives the system what was freed: glibc keeps it, and matrices of many sizes leave holes that add up."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def fingerprint_of(fingerprints: dict[str, str], model: nn.Module) -> str:
    """Digest of all codes, in the order of the model's layers."""
    return combine_fingerprints(fingerprints[name] for name, _ in model.named_modules() if name in fingerprints)
