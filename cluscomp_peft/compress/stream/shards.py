"""Makes one shard: clusters its matrices, each by itself, measures their errors, and writes all of its tensors.

This needs the dense checkpoint and the shard's description alone, so that any process can do it. The bytes and the
measured errors depend neither on the number of threads nor on which matrices are clustered at the same time.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from ... import ops
from ...linear import ClusteredLinear
from ...progress import Stages
from ..matrix.block import BlockSettings, cluster_for_inputs
from .headers import read_header, weight_files
from .journal import save_tensors
from .source import PARTS, DenseCheckpoint
from .split import Matrix, Shard, read_matrix

__all__ = ["TOGETHER", "Job", "compress_shard", "read_matrices", "small_memory", "trim_memory", "write_shard"]

TOGETHER = 1 << 23  # weights that are clustered at once; K-means takes some 30 bytes for each
_LARGE = 1 << 20  # bytes
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_LARGEST = 4 * 1024 * 1024 * ctypes.sizeof(ctypes.c_long)  # DEFAULT_MMAP_THRESHOLD_MAX of malloc.c
_CHANNELS = 256  # input channels that are decoded at a time to measure errors


@dataclass(frozen=True)
class Job:
    """What is the same for all shards of a run.

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


def compress_shard(
    shard: Shard,
    job: Job,
    device: torch.device,
    progress: Callable[[int], object],
    moments: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, Any]:
    """Clusters the matrices of a shard, each by itself, and writes the file.

    Args:
        shard ([`Shard`]): What the file holds.
        job ([`Job`]): Source, folder and settings.
        device (`torch.device`): Of K-means.
        progress: Called with the number of weights of every matrix that is clustered.
        moments (*optional*): E[x xᵀ] [in, in] of the inputs of some of the layers, by name.

    Returns:
        `dict`: What the journal keeps of it; see [`write_shard`].
    """
    started = time.perf_counter()
    stages = Stages()
    with stages.stage("clustering"):
        layers, matrices = _cluster_alone(shard, job, device, progress, moments or {})
    return write_shard(shard, layers, job, {"matrices": matrices, "stages": stages.seconds}, started)


def _cluster_alone(
    shard: Shard,
    job: Job,
    device: torch.device,
    progress: Callable[[int], object],
    moments: Mapping[str, torch.Tensor],
) -> tuple[dict[str, ClusteredLinear], dict[str, dict[str, Any]]]:
    """Clusters as many matrices at once as there are cores and `TOGETHER` allows; one at a time on a GPU.

    Returns:
        Layers, and what was measured of those with moments, by name.
    """
    settings = job.settings
    cores = settings.threads or torch.get_num_threads()
    largest = max((matrix.weights for matrix in shard.matrices), default=1)
    together = max(1, min(cores, len(shard.matrices), TOGETHER // largest)) if device.type == "cpu" else 1

    measured: dict[str, dict[str, Any]] = {}

    def work(matrix: Matrix) -> ClusteredLinear:
        if matrix.name in moments:
            return cluster_for_its_inputs(matrix)
        # No variable holds the weight, so that it is freed once it is cut into vectors.
        layer = settings.policy.cluster(
            matrix.name,
            read_matrix(job.source, matrix).to(device),
            matrix.spec,
            threads=max(1, cores // together),
        )
        progress(matrix.weights)
        trim_memory()
        return layer.cpu()

    def cluster_for_its_inputs(matrix: Matrix) -> ClusteredLinear:
        dense = nn.Linear(*matrix.shape[::-1], bias=False, device="meta")
        weight = read_matrix(job.source, matrix).to(device)
        dense._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        alone = replace(settings, threads=max(1, cores // together))
        found = moments[matrix.name].to(device)
        layer, measured[matrix.name] = cluster_for_inputs(matrix.name, dense, matrix.spec, found, None, alone)
        progress(matrix.weights)
        trim_memory()
        return layer.cpu()

    # The largest first: it needs the most memory, and then the fewest results are held.
    order = sorted(shard.matrices, key=lambda matrix: -matrix.weights)
    with ThreadPoolExecutor(together) as pool:
        made = dict(zip((matrix.name for matrix in order), pool.map(work, order), strict=True))
    return {matrix.name: made[matrix.name] for matrix in shard.matrices}, measured


def write_shard(
    shard: Shard,
    layers: dict[str, ClusteredLinear],
    job: Job,
    report: dict[str, Any],
    started: float,
) -> dict[str, Any]:
    """Writes a shard whose matrices are clustered; `started` is the `perf_counter()` at which work on it began.

    Returns:
        `dict`: `report` with matrices (shape, spec, bytes, true_bits, relative_error and more by layer), fingerprints,
        keys (bytes by tensor of the shard), block, seconds, and in its stages that of writing.
    """
    begun = time.perf_counter()
    _measure(report, shard, layers, job.source)
    tensors = _tensors(shard, layers, job)
    save_tensors(os.path.join(job.folder, shard.file), tensors)
    report["fingerprints"] = {matrix.name: layers[matrix.name].fingerprint() for matrix in shard.matrices}
    report["keys"] = {key: tensor.numel() * tensor.element_size() for key, tensor in tensors.items()}
    report["block"] = shard.block
    report["stages"]["writing"] = time.perf_counter() - begun
    report["seconds"] = time.perf_counter() - started
    return report


def read_matrices(shards: Sequence[Shard], folder: str) -> dict[str, ClusteredLinear]:
    """The clustered matrices of shards that are written, by layer, without their biases; also where a run that was
    killed at its very end has joined shards already."""
    found = {}
    own = [os.path.join(folder, shard.file) for shard in shards]
    files = own if all(map(os.path.exists, own)) else weight_files(folder)
    places = {key: path for path in files for key in read_header(path)}
    for shard in shards:
        for matrix in shard.matrices:
            base = matrix.key.removesuffix(".weight")
            parts = [f"{base}.{part}" for part in PARTS]
            with safe_open(places[parts[0]], framework="pt") as file:
                codes, codebook = (file.get_tensor(part) for part in parts[:2])
                scale_in, scale_out = (file.get_tensor(part) if part in places else None for part in parts[2:])
            out_features = matrix.shape[0]
            found[matrix.name] = ClusteredLinear.from_parts(codes, codebook, scale_in, scale_out, None, out_features)
    return found


def _measure(
    report: dict[str, Any], shard: Shard, layers: dict[str, ClusteredLinear], source: DenseCheckpoint
) -> None:
    """Adds shape, spec, bytes, true bits and relative error of every matrix."""
    matrices = report.setdefault("matrices", {})
    for matrix in shard.matrices:
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


def _tensors(shard: Shard, layers: dict[str, ClusteredLinear], job: Job) -> dict[str, torch.Tensor]:
    """What the shard holds: clustered matrices under the names of their weights, everything else as it was."""
    clustered = {matrix.key: layers[matrix.name] for matrix in shard.matrices}
    tensors = {}
    for key in shard.keys:
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
    """Makes glibc map each large tensor separately and unmap it when it is freed. By default glibc soon keeps freed
    memory in its heap, where tensors of many sizes leave holes.

    Training allocates and frees the same sizes again and again, for which the heap is right: mapping each tensor would
    take a third of the time. So in the end both thresholds are raised to the values at which glibc's own rule arrives
    after the first large tensors; the rule itself cannot be switched on again.
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
    """Returns freed memory of glibc's heap to the system."""
    _libc("malloc_trim", 0)


def _libc(name: str, *arguments: int) -> None:
    if sys.platform == "linux":
        function = getattr(ctypes.CDLL(None), name, None)  # other libraries of C have none of it
        if function is not None:
            function(*arguments)
