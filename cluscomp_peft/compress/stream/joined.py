"""The shards of a run that is done, joined to files of the hub's usual size.

    model-00001-of-00083   one for each block, so that a run can go on at any
    model-00002-of-00083   ─┐
    …                       ├─ tensors copied, not decoded ─►  model-00001-of-00006   5 GB at most, or one larger shard
    model-00014-of-00083   ─┘

A joined file gets its name when it is whole and on the disk, and only then its parts are removed. So a run that is
killed here goes on with the first file that is missing, and no more than one file, 5 GB, lies on the disk twice. Of
the model 16 MB are in memory at a time. It costs reading and writing the compressed model once: for 1 GB some 4 s of a
core.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from functools import partial
from typing import IO

from .headers import Header, read_header
from .journal import replace_file
from .source import DTYPES

__all__ = ["INDEX_NAME", "ONE_NAME", "join_shards"]

ONE_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
_MOST = 5 * 10**9  # bytes of a file: `max_shard_size="5GB"` of the hub's own tools
_PIECE = 1 << 24  # bytes that are copied at a time

Keys = Mapping[str, int]


def join_shards(work: str, shards: Mapping[str, Keys]) -> dict[str, dict[str, int]]:
    """Joins neighbouring shards until another one would not fit.

    Args:
        work (`str`): Folder of the shards.
        shards: File name → bytes by key, in the order of the model.

    Returns:
        The same of the files that there are now.
    """
    groups = _groups(shards)
    if len(groups) == len(shards) > 1:
        return {name: dict(keys) for name, keys in shards.items()}
    result = {}
    for number, names in enumerate(groups, 1):
        name = ONE_NAME if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        target = os.path.join(work, name)
        parts = [os.path.join(work, part) for part in names]
        if not os.path.exists(target):
            if len(parts) == 1:
                os.replace(parts[0], target)
            else:
                replace_file(target, partial(_join, parts))
        for part in parts:
            if os.path.exists(part):
                os.remove(part)
        result[name] = {key: size for part in names for key, size in shards[part].items()}
    return result


def _groups(shards: Mapping[str, Keys]) -> list[list[str]]:
    """Names of the shards that go into a file each."""
    groups: list[list[str]] = []
    total = 0
    for name, keys in shards.items():
        size = sum(keys.values())
        if not groups or total + size > _MOST:
            groups.append([])
            total = 0
        groups[-1].append(name)
        total += size
    return groups


def _join(parts: Iterable[str], target: str) -> None:
    """Writes the tensors of safetensors files into one."""
    found = {key: (path, header) for path in parts for key, header in read_header(path).items()}
    # The widest numbers first: each tensor then begins at a multiple of its own, which reading without a copy takes.
    order = sorted(found, key=lambda key: (-DTYPES[found[key][1].dtype].itemsize, key))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key in order:
        header = found[key][1]
        begin, end = end, end + _num_bytes(header)
        entries[key] = {"dtype": header.dtype, "shape": list(header.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(target, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            path, header = found[key]
            with open(path, "rb") as part:
                part.seek(header.begin)
                _copy(part, file, _num_bytes(header))


def _num_bytes(header: Header) -> int:
    count = DTYPES[header.dtype].itemsize
    for size in header.shape:
        count *= size
    return count


def _copy(source: IO[bytes], target: IO[bytes], count: int) -> None:
    while count:
        piece = source.read(min(count, _PIECE))
        if not piece:
            raise OSError(f"{source.name} is cut off; start anew with --overwrite.")
        target.write(piece)
        count -= len(piece)
