"""A dense checkpoint on disk, read tensor by tensor: no more than what is asked for is ever in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

import torch
from safetensors import SafetensorError
from torch import nn

from .assembled import Assembly, assemblies_of
from .headers import read_header

__all__ = ["DTYPES", "PARTS", "DenseCheckpoint"]

_ONE_FILE, _INDEX, _CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
PARTS = ("codes", "codebook", "scale_in", "scale_out")  # what takes the place of a weight that is clustered
DTYPES = {  # as safetensors writes them
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class DenseCheckpoint:
    """The safetensors files of a folder.

    Args:
        folder (`str`): Of a model.
        prefix (`str`): The model's `base_model_prefix`; checkpoints have names with and without it.
        rename (`Callable`, *optional*): What a key of the checkpoint is called in the model; see
            `upstream.transformers.renaming_of`.
        model (`nn.Module`, *optional*): As its class makes it. Experts that it keeps in one parameter are found one by
            one then, under the names that they have when it is taken apart.

    Attributes:
        shapes: key → shape of every tensor. dtypes: key → dtype.
        assemblies: name of an expert's weight → how it is read. It is a key like others, but not in `shapes`.
        unread: name of a parameter whose experts cannot be read → reason.

    Raises:
        ValueError: If there is no safetensors file, or one is missing or damaged.
    """

    def __init__(
        self,
        folder: str,
        prefix: str = "",
        rename: Callable[[str], str] | None = None,
        model: nn.Module | None = None,
    ) -> None:
        self.folder, self.prefix = folder, prefix
        self._files: dict[str, str] = {}
        self._begins: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for path in self._paths():
            try:
                for key, header in read_header(path).items():
                    self._files[key], self._begins[key] = path, header.begin
                    self.dtypes[key], self.shapes[key] = DTYPES[header.dtype], header.shape
            except OSError as error:
                raise _unreadable(path, error) from error
            except (SafetensorError, KeyError) as error:
                raise ValueError(f"{path} is damaged or cut off ({error}); download the model again.") from error
        self._begun = self.state()
        self._renamed = {} if rename is None else {rename(key): key for key in self._files}
        self._renamed_parts = {} if rename is None else self._parts_renamed(rename)
        self.assemblies: dict[str, Assembly] = {}
        self.unread: dict[str, str] = {}
        if model is not None:
            known = {key: (self.dtypes[key], shape) for key, shape in self.shapes.items()}
            self.assemblies, self.unread = assemblies_of(model, known)

    def _paths(self) -> list[str]:
        # In transformers' order: hubs hold the weights of some models a second time, under other names.
        index = os.path.join(self.folder, _INDEX)
        if os.path.isfile(os.path.join(self.folder, _ONE_FILE)):
            names = [_ONE_FILE]
        elif os.path.isfile(index):
            try:
                with open(index, encoding="utf-8") as file:
                    names = sorted(set(json.load(file)["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{index} is damaged ({error!r}); download the model again.") from error
        else:
            names = sorted(name for name in os.listdir(self.folder) if name.endswith(".safetensors"))
        # A pipe or socket under such a name would never end.
        missing = [name for name in names if not os.path.isfile(os.path.join(self.folder, name))]
        if missing:
            raise ValueError(f"{self.folder} lacks {', '.join(missing)}, which its index names; download it again.")
        if not names:
            raise ValueError(
                f"{self.folder} has no safetensors files; load the model once and save it with save_pretrained()."
            )
        return [os.path.join(self.folder, name) for name in names]

    def key(self, name: str) -> str | None:
        """The key of a parameter of the model, or None."""
        for key in (name, f"{self.prefix}.{name}", name.removeprefix(f"{self.prefix}.")):
            if key in self._files:
                return key
        return None

    def find(self, name: str) -> str | None:
        """As [`key`], also where loading renames it, and of an expert that other tensors hold its own name."""
        return self.key(name) or self._renamed.get(name) or (name if name in self.assemblies else None)

    def weight_key(self, layer: str) -> str | None:
        """The key of a layer's weight, if codes that are stored in its place under that name are found again."""
        weight = f"{layer}.weight"
        return self.key(weight) or self._renamed_parts.get(layer) or (weight if weight in self.assemblies else None)

    def shape(self, key: str) -> tuple[int, ...]:
        """Of a tensor, or of an expert's weight."""
        return self.assemblies[key].shape if key in self.assemblies else self.shapes[key]

    def keys_of(self, key: str) -> list[str]:
        """Of the tensors that hold a weight: its own, or what it is made of."""
        return self.assemblies[key].keys if key in self.assemblies else [key]

    def _parts_renamed(self, rename: Callable[[str], str]) -> dict[str, str]:
        """Layer → key of its weight, where a renaming takes what a clustered layer stores to the same layer."""
        found = {}
        for name, key in self._renamed.items():
            layer, stored = name.removesuffix(".weight"), key.removesuffix(".weight")
            if layer != name and stored != key and all(rename(f"{stored}.{p}") == f"{layer}.{p}" for p in PARTS):
                found[layer] = key
        return found

    def num_bytes(self, key: str) -> int:
        """Bytes of a tensor as it is stored."""
        return torch.Size(self.shapes[key]).numel() * self.dtypes[key].itemsize

    def read(self, key: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor, or an expert's weight; floating-point ones in `dtype`."""
        tensor = self.assemblies[key].read(self._read) if key in self.assemblies else self._read(key)
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

    def _read(self, key: str, row: int | None = None) -> torch.Tensor:
        """A tensor as it is stored, or [1, …] of it."""
        shape = self.shapes[key] if row is None else (1, *self.shapes[key][1:])
        path, tensor = self._files[key], torch.empty(shape, dtype=self.dtypes[key])
        # Read, not mapped: what a mapping has touched is in memory beside its copy.
        data = tensor.view(-1).view(torch.uint8).numpy()
        try:
            with open(path, "rb") as file:
                file.seek(self._begins[key] + (row or 0) * len(data))
                if file.readinto(data) != len(data):
                    raise EOFError(f"{key} ends early")
        except OSError as error:
            raise _unreadable(path, error) from error
        except EOFError as error:
            raise ValueError(f"{path} is damaged or cut off ({error}); download the model again.") from error
        return tensor

    def state(self) -> list[tuple[str, int, int]]:
        """Name, size and time of change of every file: another state is another model."""
        paths = [*sorted(set(self._files.values())), os.path.join(self.folder, _CONFIG)]
        found = [(path, os.stat(path)) for path in paths if os.path.exists(path)]
        return [(os.path.basename(path), status.st_size, status.st_mtime_ns) for path, status in found]

    def refuse_changes(self) -> None:
        """Raises a ValueError if a file is no longer the one that was opened: what is read of it now would be mixed
        with what was read before."""
        now = self.state()
        if now != self._begun:
            changed = sorted({name for name, *_ in {*now}.symmetric_difference(self._begun)})
            raise ValueError(
                f"{self.folder} was changed while it was read ({', '.join(changed)}), so the result would be a "
                "mixture of two models; start anew with --overwrite."
            )


def _unreadable(path: str, error: OSError) -> OSError:
    """A disk that fails says nothing of what is on it."""
    text = f"{path} cannot be read ({error.strerror or error}); run the same command again."
    return OSError(text) if error.errno is None else OSError(error.errno, text)
