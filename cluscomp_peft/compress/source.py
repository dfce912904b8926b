"""A dense checkpoint on disk, read tensor by tensor: no more than what is asked for is ever in memory."""

from __future__ import annotations

import json
import os

import torch
from safetensors import SafetensorError, safe_open

__all__ = ["DenseCheckpoint"]

_ONE_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {
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

    Attributes:
        shapes: key → shape of every tensor. dtypes: key → dtype.

    Raises:
        ValueError: If there is no safetensors file, or one is missing or damaged.
    """

    def __init__(self, folder: str, prefix: str = "") -> None:
        self.folder, self.prefix = folder, prefix
        self._files: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for path in self._paths():
            try:
                with safe_open(path, framework="pt") as file:
                    for key in file.keys():
                        part = file.get_slice(key)
                        self._files[key] = path
                        self.shapes[key] = tuple(part.get_shape())
                        self.dtypes[key] = _DTYPES[part.get_dtype()]
            except (SafetensorError, OSError, KeyError) as error:
                raise ValueError(f"{path} is damaged or cut off ({error}); download the model again.") from error

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

    def num_bytes(self, key: str) -> int:
        """Bytes of a tensor as it is stored."""
        return torch.Size(self.shapes[key]).numel() * self.dtypes[key].itemsize

    def read(self, key: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A copy of a tensor; floating-point ones in `dtype`."""
        try:
            # Opened for each tensor: what a mapping has touched stays resident until it is closed.
            with safe_open(self._files[key], framework="pt") as file:
                tensor = file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{self._files[key]} is damaged or cut off ({error}); download the model again."
            ) from error
        return tensor.to(dtype, copy=True) if dtype is not None and tensor.is_floating_point() else tensor.clone()

    def state(self) -> list[tuple[str, int, int]]:
        """Name, size and time of change of every file: another state is another model."""
        paths = sorted(set(self._files.values()))
        return [(os.path.basename(path), os.path.getsize(path), os.stat(path).st_mtime_ns) for path in paths]
