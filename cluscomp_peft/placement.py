"""Where the numbers of a parameter are: here, on the meta device, or spread over processes."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor

__all__ = ["is_sharded", "is_whole", "shape_of"]


def is_whole(tensor: torch.Tensor) -> bool:
    """Whether all of the tensor is in this process: neither on meta nor spread over processes."""
    return tensor.device.type != "meta" and not is_sharded(tensor)


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether FSDP2 or ZeRO-3 left this process a part of the tensor."""
    return isinstance(tensor, DTensor) or tensor.shape != shape_of(tensor)


def shape_of(tensor: torch.Tensor) -> torch.Size:
    """The shape of the whole: DeepSpeed leaves an empty tensor where a parameter is partitioned, and notes it."""
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))
