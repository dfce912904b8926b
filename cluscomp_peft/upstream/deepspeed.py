"""What DeepSpeed's ZeRO-3 leaves of a parameter in a process, and how to see the whole of it."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

__all__ = ["gather", "shape_of_whole"]


def shape_of_whole(tensor: torch.Tensor) -> torch.Size:
    """The shape of a parameter before ZeRO-3 partitioned it: `parameter.ds_shape`; of all others their own.

    ZeRO-3 leaves an empty tensor in place of a partitioned parameter, and this note. If it is called otherwise, layers
    look empty: adapters get no numbers, and a partitioned weight passes for a whole one.
    """
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))


def gather(parameter: torch.Tensor) -> AbstractContextManager[None]:
    """Inside of this a partitioned parameter is whole, for all processes together:
    `deepspeed.zero.GatheredParameters`, documented, of a parameter that a `zero.Init` or the engine partitioned.

    If the parameter stays empty inside, dense layers are clustered from nothing.
    """
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])
