"""Where the numbers of a parameter are: here, on the meta device, or spread over processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed.tensor import DTensor

from .upstream.deepspeed import gather, shape_of_whole

__all__ = ["gathered", "is_partitioned", "is_sharded", "is_whole", "shape_of"]


def is_whole(tensor: torch.Tensor) -> bool:
    """Whether all of the tensor is in this process: neither on meta nor spread over processes."""
    return tensor.device.type != "meta" and not is_sharded(tensor)


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether FSDP2 or ZeRO-3 left this process a part of the tensor."""
    return isinstance(tensor, DTensor) or is_partitioned(tensor)


def is_partitioned(tensor: torch.Tensor) -> bool:
    """Whether ZeRO-3 left this process a part of the tensor."""
    return tensor.shape != shape_of(tensor)


def shape_of(tensor: torch.Tensor) -> torch.Size:
    """The shape of the whole: DeepSpeed leaves an empty tensor where a parameter is partitioned, and notes it."""
    return shape_of_whole(tensor)


@contextmanager
def gathered(parameter: torch.Tensor) -> Iterator[None]:
    """While this lasts, a parameter that ZeRO-3 partitioned is whole; all processes have to enter together."""
    if not is_partitioned(parameter):
        yield
        return
    with gather(parameter):
        yield
