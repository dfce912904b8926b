"""Activations of all calibration sequences at one place of the model, on disk: batches in, batches out.

Plain reads and writes instead of a mapping: a full disk is an error that can be handled, and what lies on disk takes
no memory but the operating system's cache.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import torch

__all__ = ["Stream"]


class Stream(Sequence[torch.Tensor]):
    """Batches [batch, length, hidden] of one dtype; the last one may have fewer sequences.

    Args:
        path (`str`): File.
        batches (`list[int]`): Sequences of each batch.
        length (`int`): Tokens of a sequence.
        hidden (`int`): Numbers of a token.
        dtype (`torch.dtype`): Of the numbers.
    """

    def __init__(self, path: str, batches: list[int], length: int, hidden: int, dtype: torch.dtype) -> None:
        self.path, self.batches, self.dtype = path, batches, dtype
        self._shape = (length, hidden)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index):  # type: ignore[override]
        width = self._shape[0] * self._shape[1] * self.dtype.itemsize
        with open(self.path, "rb") as file:
            file.seek(sum(self.batches[:index]) * width)
            data = bytearray(file.read(self.batches[index] * width))
        return torch.frombuffer(data, dtype=self.dtype).view(self.batches[index], *self._shape)

    def write(self, values: Iterator[torch.Tensor]) -> None:
        """Replaces the content."""
        with open(self.path, "wb") as file:
            for value in values:
                value = value.detach().to("cpu", self.dtype).contiguous()
                file.write(value.view(-1).view(torch.uint8).numpy().tobytes())

    def bytes(self) -> int:
        return os.path.getsize(self.path)
