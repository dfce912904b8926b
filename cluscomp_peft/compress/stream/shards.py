"""One unit becomes one shard: its matrices clustered by themselves, measured, and written beside its other tensors.

Needs the checkpoint and the unit alone, so that any process can do it; K-means of a matrix does not depend on how many
threads it is given or which matrices are clustered beside it, and neither does what is measured of it.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ... import ops
from ...linear import ClusteredLinear
from ..matrix.block import BlockSettings
from .journal import save_tensors
from .source import PARTS, DenseCheckpoint
from .units import Matrix, Unit, read_matrix

__all__ = ["TOGETHER", "Job", "compress_unit", "small_memory", "trim_memory", "write_shard"]

TOGETHER = 1 << 23  # weights that are clustered at once; each takes some 30 bytes meanwhile
_LARGE = 1 << 20  # bytes
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_LARGEST = 4 * 1024 * 1024 * ctypes.sizeof(ctypes.c_long)  # DEFAULT_MMAP_THRESHOLD_MAX of malloc.c
_CHANNELS = 256  # of the input that errors are measured of at a time


@dataclass(frozen=True)
class Job:
    """What all units of a run have in common.

    Args:
        source ([`DenseCheckpoint`]): Where tensors come from.
        folder (`str`): Where shards go.
        settings ([`BlockSettings`]): Of the clustering.
        dtype (`torch.dtype`): Of floating-point tensors that stay dense.
    """

    source: DenseCheckpoint
    folder: str
    settings: BlockSettings
    dtype: torch.dtype


def compress_unit(unit: Unit, job: Job, device: torch.device, progress: Callable[[int], object]) -> dict[str, Any]:
    """Clusters the matrices of a unit by themselves and writes its shard.

    Args:
        unit ([`Unit`]): What the shard holds.
        job ([`Job`]): Source, folder and settings.
        device (`torch.device`): Of K-means.
        progress: Called with the number of weights of every matrix that is clustered.

    Returns:
        `dict`: What the journal keeps of it; see [`write_shard`].
    """
    started = time.perf_counter()
    layers = _cluster_alone(unit, job, device, progress)
    return write_shard(unit, layers, job, {}, started)


def _cluster_alone(
    unit: Unit, job: Job, device: torch.device, progress: Callable[[int], object]
) -> dict[str, ClusteredLinear]:
    """Clusters matrices by themselves, as many at once as there are cores and `TOGETHER` allows; one on a GPU."""
    settings = job.settings
    cores = settings.threads or torch.get_num_threads()
    largest = max((matrix.weights for matrix in unit.matrices), default=1)
    together = max(1, min(cores, len(unit.matrices), TOGETHER // largest)) if device.type == "cpu" else 1

    def work(matrix: Matrix) -> ClusteredLinear:
        # Held by nobody here, so that it is gone once it is cut into vectors.
        layer = settings.policy.cluster(
            matrix.name,
            read_matrix(job.source, matrix).to(device),
            matrix.spec,
            threads=max(1, cores // together),
        )
        progress(matrix.weights)
        trim_memory()
        return layer.cpu()

    # The largest first, beside which the fewest results are held.
    order = sorted(unit.matrices, key=lambda matrix: -matrix.weights)
    with ThreadPoolExecutor(together) as pool:
        made = dict(zip((matrix.name for matrix in order), pool.map(work, order), strict=True))
    return {matrix.name: made[matrix.name] for matrix in unit.matrices}


def write_shard(
    unit: Unit,
    layers: dict[str, ClusteredLinear],
    job: Job,
    report: dict[str, Any],
    started: float,
) -> dict[str, Any]:
    """Writes the shard of a unit whose matrices are clustered; `started` is the perf_counter() of its beginning.

    Returns:
        `dict`: `report` with matrices (shape, spec, bytes, true_bits, relative_error and more by layer), fingerprints,
        keys (bytes by tensor of the shard), block and seconds.
    """
    _measure(report, unit, layers, job.source)
    tensors = _tensors(unit, layers, job)
    save_tensors(os.path.join(job.folder, unit.shard), tensors)
    report["fingerprints"] = {matrix.name: layers[matrix.name].fingerprint() for matrix in unit.matrices}
    report["keys"] = {key: tensor.numel() * tensor.element_size() for key, tensor in tensors.items()}
    report["block"] = unit.block
    report["seconds"] = time.perf_counter() - started
    return report


def _measure(report: dict[str, Any], unit: Unit, layers: dict[str, ClusteredLinear], source: DenseCheckpoint) -> None:
    """Adds shape, spec, bytes, true bits and relative error of every matrix."""
    matrices = report.setdefault("matrices", {})
    for matrix in unit.matrices:
        layer, weight = layers[matrix.name], read_matrix(source, matrix)
        energy = error = 0.0
        for first in range(0, layer.in_features, _CHANNELS):
            part = slice(first, first + _CHANNELS)
            dense, stored = weight[:, part].float(), _decode(layer, part)
            energy += _squares(dense)
            error += _squares(dense - stored)
        del weight
        matrices.setdefault(matrix.name, {}).update(
            shape=[layer.out_features, layer.in_features],
            spec=layer.spec.to_dict(),
            bytes=layer.stored_bytes(),
            true_bits=layer.true_bits,
            relative_error=(error / max(energy, 1e-30)) ** 0.5,
            squared_error=error,
            squared_norm=energy,
        )


def _decode(layer: ClusteredLinear, part: slice) -> torch.Tensor:
    """The weight of some input channels, [out, channels] fp32 on the CPU; layers that were just made have one codebook
    for all channels."""
    scale_in = None if layer.scale_in is None else layer.scale_in[part]
    weight = ops.PackedWeight(layer.codes[part], layer.codebook, layer.out_features, scale_in, layer.scale_out)
    return ops.decode(weight, torch.float32).cpu()


def _squares(rows: torch.Tensor) -> float:
    """Sum of squares, row by row: PyTorch splits the sum of a whole tensor by threads, and its last digits follow."""
    return float(rows.square().sum(1, dtype=torch.float64).sum())


def _tensors(unit: Unit, layers: dict[str, ClusteredLinear], job: Job) -> dict[str, torch.Tensor]:
    """What the shard holds: clustered matrices under the names of their weights, everything else as it was."""
    clustered = {matrix.key: layers[matrix.name] for matrix in unit.matrices}
    tensors = {}
    for key in unit.keys:
        layer = clustered.get(key)
        if layer is None:
            tensors[key] = job.source.read(key, job.dtype)
            continue
        base = key.removesuffix(".weight")
        for part in PARTS:
            value = getattr(layer, part)
            if value is not None:
                tensors[f"{base}.{part}"] = value.detach().cpu().contiguous()
    return tensors


@contextmanager
def small_memory() -> Iterator[None]:
    """Lets glibc take each large tensor from the system by itself, and give it back when it is freed; by default it
    soon keeps them in a heap, where tensors of many sizes leave holes.

    Training takes and frees the same tensors again and again, for which that heap is made, and each from the system
    would be a third of its time. So afterwards thresholds are where glibc's own rule ends once a large tensor was
    freed: the rule itself cannot be turned on again.
    """
    global _inside
    with _counting:
        _inside += 1
        _libc("mallopt", _M_MMAP_THRESHOLD, _LARGE)
        _libc("mallopt", _M_TRIM_THRESHOLD, 2 * _LARGE)
    try:
        yield
    finally:
        with _counting:
            _inside -= 1
            if not _inside:
                _libc("mallopt", _M_MMAP_THRESHOLD, _LARGEST)
                _libc("mallopt", _M_TRIM_THRESHOLD, 2 * _LARGEST)


_inside, _counting = 0, threading.Lock()  # runs in several threads of a process


def trim_memory() -> None:
    """Gives the system what else was freed."""
    _libc("malloc_trim", 0)


def _libc(name: str, *arguments: int) -> None:
    if sys.platform == "linux":
        function = getattr(ctypes.CDLL(None), name, None)  # other libraries of C have none of it
        if function is not None:
            function(*arguments)
