"""A checkpoint as one GGUF file: `cluscomp export DIR OUT.gguf --to gguf`.

Tensors are decoded, quantised and written one after another, so no more than one is dense in memory. The file gets its
name when it is complete. Weights are decoded in fp32 and rounded once, to the type of the file; norms and biases stay
fp32. Types that only llama.cpp makes go through a file in F16, in a folder beside the target.
"""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from typing import Any

import gguf
import numpy as np
from tqdm.auto import tqdm

from ...compress.stream.journal import put_file
from ...compress.stream.shards import small_memory, trim_memory
from ..source import Opened, open_checkpoint
from .architectures import (
    Tensor,
    architecture_of,
    check_architecture,
    list_tensors,
    rope_factors,
    write_metadata,
)
from .requantize import LIBRARY_TYPES, check_library, requantize
from .tokenizer import write_tokenizer

__all__ = ["TYPES", "export_gguf"]

_Type = gguf.GGMLQuantizationType
_OWN = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")  # which the package `gguf` can make
TYPES = (*_OWN, *LIBRARY_TYPES)
_MAGIC = b"GGUF"


@small_memory()
def export_gguf(
    source: str, target: str, *, kind: str = "Q8_0", adapter: str | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Writes the GGUF file of a model, compressed or dense.

    Args:
        source (`str`): Folder or hub id of a model, or the folder of an adapter, which names its base.
        target (`str`): File to create.
        kind (`str`): One of `TYPES`, of the matrices. Rows that do not fill a quantised block are F16 instead.
        adapter (`str`, *optional*): Folder or hub id of an adapter to merge.
        overwrite (`bool`): Replace `target` if it is a GGUF file.

    Returns:
        `dict`: tensors, bytes, seconds.

    Raises:
        ValueError: If the model or its tokenizer has no form in GGUF, files are damaged, llama.cpp's library is needed
            and absent, or `target` exists.
        OSError: If the disk is full; nothing is left then.
    """
    started = time.perf_counter()
    if kind not in TYPES:
        raise ValueError(f"--type must be one of {', '.join(TYPES)}, got {kind!r}.")
    target = os.path.abspath(target)
    _check_target(target, overwrite)
    if kind in LIBRARY_TYPES:
        check_library(kind)
    opened = open_checkpoint(source, adapter)
    check_architecture(opened)
    tensors = list_tensors(opened)
    name = os.path.basename(os.path.abspath(source)) if os.path.isdir(source) else source
    if kind in _OWN:
        put_file(target, lambda path: _write(path, opened, tensors, name, kind))
    else:
        parent, file_name = os.path.split(target)
        with tempfile.TemporaryDirectory(dir=parent, prefix=f".{file_name}.") as scratch:
            whole = os.path.join(scratch, file_name)
            _write(whole, opened, tensors, name, "F16")
            put_file(target, lambda path: requantize(whole, path, kind))
    return {"tensors": len(tensors), "bytes": os.path.getsize(target), "seconds": time.perf_counter() - started}


def _write(path: str, opened: Opened, tensors: list[Tensor], name: str, kind: str) -> None:
    architecture = architecture_of(opened)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_name(name)
    writer.add_file_type(int(gguf.LlamaFileType[{"F32": "ALL_F32"}.get(kind, f"MOSTLY_{kind}")]))
    if kind not in ("F32", "F16", "BF16"):
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    write_metadata(writer, opened)
    write_tokenizer(writer, opened)
    factors = rope_factors(opened)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", tuple(factors.shape), np.dtype(np.float32), factors.nbytes)
    types = {tensor.name: _type_of(tensor, kind) for tensor in tensors}
    for tensor in tensors:
        stored = types[tensor.name]
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, stored) if _is_packed(stored) else tensor.shape
        dtype = np.dtype({_Type.F32: np.float32, _Type.F16: np.float16}.get(stored, np.uint8))
        size = int(np.prod(shape)) * dtype.itemsize
        writer.add_tensor_info(tensor.name, shape, dtype, size, raw_dtype=stored if _is_packed(stored) else None)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors.numpy())
        for tensor in tqdm(tensors, desc="Exporting", unit="tensor", disable=None):
            values = tensor.read(opened).numpy()
            writer.write_tensor_data(gguf.quantize(values, types[tensor.name]))
            del values
            trim_memory()
    finally:
        writer.close()
    opened.checkpoint.refuse_changes()
    warning = opened.check(opened.checkpoint.fingerprints, opened.checkpoint.codebooks)
    if warning:
        warnings.warn(warning, stacklevel=2)


def _type_of(tensor: Tensor, kind: str) -> gguf.GGMLQuantizationType:
    if len(tensor.shape) == 1:
        return _Type.F32
    wanted = getattr(_Type, kind)
    return wanted if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0 else _Type.F16


def _is_packed(stored: gguf.GGMLQuantizationType) -> bool:
    return stored not in (_Type.F32, _Type.F16)


def _check_target(target: str, overwrite: bool) -> None:
    if os.path.isdir(target) or not os.path.isdir(os.path.dirname(target)):
        raise ValueError(f"{target} must be the name of a file in a folder that is there, such as out/model.gguf.")
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise ValueError(f"{target} exists already; choose another file, or overwrite it with --overwrite.")
    if os.path.islink(target) or not os.path.isfile(target) or not _is_gguf(target):
        raise ValueError(f"{target} is no GGUF file, which --overwrite does not touch; remove it.")


def _is_gguf(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC
