"""What is there of a model before a weight is read: whether a path names one, and what its safetensors files say of
themselves, names, dtypes and shapes of their tensors, and whether they are whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import NamedTuple

from huggingface_hub import constants, hf_hub_download, is_offline_mode
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError, safe_open

__all__ = ["Header", "base_of", "check_folder", "read_header", "read_headers", "weight_bytes", "weight_files"]

_CONFIG, _ADAPTER = "config.json", "adapter_config.json"


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


def _adapter_base(path: str) -> str | None:
    """What the adapter in a folder was trained on, as its config calls it; None for a folder without an adapter.

    Raises:
        ValueError: If the adapter's config cannot be read or does not say.
    """
    file = os.path.join(path, _ADAPTER)
    if not os.path.isfile(file):
        return None
    try:
        with open(file, encoding="utf-8") as opened:
            base = json.load(opened)["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error!r}); save the adapter again.") from error
    if not isinstance(base, str) or not base:
        raise ValueError(f"{path} is an adapter that does not say of which model; give that, and this as --adapter.")
    return base


def base_of(path: str, adapter: str | None) -> tuple[str, str | None]:
    """The model and the adapter on it that are meant by a path, which may be that of an adapter, and an adapter.

    Raises:
        ValueError: If both are adapters, or the config of the first cannot be read.
    """
    base = _adapter_base(path)
    if base is None:
        return path, adapter
    if adapter is not None:
        raise ValueError(f"{path} is an adapter, as --adapter {adapter} is; give the base, {base}.")
    return base, path


def check_folder(path: str) -> None:
    """Raises a ValueError for a path or hub id that is no model, or of which a weight file is cut off or damaged."""
    if os.path.isdir(path):
        _check_is_model(path)
        read_headers(weight_files(path))
    elif os.path.exists(path):
        raise ValueError(f"{path} is a file; give the folder of the model.")
    elif os.path.isabs(path) or path.startswith((".", "~")) or path.count("/") > 1:
        raise ValueError(f"{path} is no folder (and no hub id, which reads like owner/name).")
    else:
        _ask_hub(path)


def _check_is_model(folder: str) -> None:
    if os.path.isfile(os.path.join(folder, _CONFIG)):
        return
    base = _adapter_base(folder)
    if base is not None:
        raise ValueError(f"{folder} is an adapter of {base} and no model; give {base}.")
    inside = sorted(entry.path for entry in os.scandir(folder) if os.path.isfile(os.path.join(entry.path, _CONFIG)))
    cure = f"give {' or '.join(inside[:3])}, which does" if inside else "give the folder that has it"
    raise ValueError(f"{folder} has no {_CONFIG}, so it is no model; {cure}.")


def _ask_hub(name: str) -> None:
    try:
        hf_hub_download(name, _CONFIG)
    except HFValidationError as error:
        raise ValueError(f"{name} is no folder, and no hub id, which reads like owner/name ({error}).") from error
    except LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if is_offline_mode() else " ".join(str(error.__cause__ or error).split())[:100]
        raise ValueError(
            f"{name} is no folder here, and the hub cannot be asked for it ({why}), nor has {constants.HF_HUB_CACHE} "
            f"a copy. Give a folder, or fetch it first where there is a network: hf download {name}"
        ) from error
    except GatedRepoError as error:
        raise ValueError(
            f"{name} is gated: accept its terms at {constants.ENDPOINT}/{name}, and log in by `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{name} is neither a folder here nor a model on the hub; mind the spelling, or log in by `hf auth login` "
            "if it is private."
        ) from error
    except EntryNotFoundError as error:
        raise ValueError(
            f"{name} on the hub has no {_CONFIG}, so it is no model; of an adapter, give the base."
        ) from error
