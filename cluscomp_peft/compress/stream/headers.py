"""What safetensors files say of themselves: names, dtypes and shapes of their tensors, and whether they are whole.

No weight is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

__all__ = ["Header", "check_folder", "read_header", "read_headers", "weight_bytes", "weight_files"]


class Header(NamedTuple):
    """Of one tensor: its shape, its dtype as safetensors writes it ("F16"), and the byte of the file it begins at."""

    shape: tuple[int, ...]
    dtype: str
    begin: int


def weight_files(folder: str) -> list[str]:
    """Paths of the safetensors files of a folder."""
    return sorted(os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".safetensors"))


def weight_bytes(folder: str) -> int:
    """Bytes of the safetensors files of a folder."""
    return sum(os.path.getsize(path) for path in weight_files(folder))


def read_header(path: str) -> dict[str, Header]:
    """Name to header of every tensor of a safetensors file.

    Raises:
        SafetensorError: If the file is cut off or damaged.
        OSError: If it cannot be read.
    """
    with safe_open(path, framework="pt"):
        pass  # says whether the file is whole
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(size))
    return {
        key: Header(tuple(entry["shape"]), entry["dtype"], 8 + size + entry["data_offsets"][0])
        for key, entry in entries.items()
        if key != "__metadata__"
    }


def read_headers(files: Iterable[str]) -> dict[str, Header]:
    """Name to header of every tensor of several files.

    Raises:
        ValueError: If one is no file, damaged, or cut off.
    """
    found: dict[str, Header] = {}
    for path in files:
        if not os.path.isfile(path):
            raise ValueError(f"{path} is no file (a pipe, say, would be waited for); remove it.")
        try:
            found |= read_header(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged or cut off ({error}); download or compress it again.") from error
    return found


def check_folder(path: str) -> None:
    """Raises a ValueError for a path that can only be a folder and is none, and for a folder of which a weight file is
    cut off or damaged."""
    if os.path.isdir(path):
        read_headers(weight_files(path))
    elif os.path.isabs(path) or path.startswith((".", "~")) or path.count("/") > 1:
        raise ValueError(f"{path} is no folder (and no hub id, which reads like owner/name).")
