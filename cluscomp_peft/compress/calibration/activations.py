"""Activations of all calibration sequences at one place of the model, on disk: batches in, batches out.

Plain reads and writes instead of a mapping: a full disk is an error that can be handled, and what lies on disk takes
no memory but the operating system's cache.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

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
        rows = self.batches[index]
        value = torch.empty(rows, *self._shape, dtype=self.dtype)
        data = value.view(-1).view(torch.uint8).numpy()
        with open(self.path, "rb") as file:
            file.seek(sum(self.batches[:index]) * (value.nbytes // rows))
            found = file.readinto(data)
        if found != len(data):
            raise OSError(f"{self.path} is cut off; start anew with --overwrite.")
        return value

    def write(self, values: Iterable[torch.Tensor]) -> None:
        """Replaces the content, and brings it to the disk."""
        with open(self.path, "wb") as file:
            for value in values:
                value = value.detach().to("cpu", self.dtype).contiguous()
                file.write(value.view(-1).view(torch.uint8).numpy())
            file.flush()
            os.fsync(file.fileno())
