"""What DeepSpeed's ZeRO-3 leaves of a parameter in a process, how to see the whole of it, and ZeRO's defaults."""

from __future__ import annotations

import contextlib
import sys
from contextlib import AbstractContextManager

import torch

__all__ = ["gather", "shape_of_whole", "zero_defaults"]


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


def zero_defaults() -> tuple[int, int, int]:
    """What `zero_optimization` is where nobody sets it, in numbers of elements: reduce_bucket_size, and of stage 3
    param_persistence_threshold and max_reuse_distance, from `deepspeed.runtime.zero.config.DeepSpeedZeroConfig`.

    If they are called otherwise, plans count with the values of the version that `plan/installed.py` names.
    """
    # Its logger keeps the stream that it finds here, and at once says something: standard output is for plans.
    with contextlib.redirect_stdout(sys.__stderr__):
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

        config = DeepSpeedZeroConfig(stage=3)
    return config.reduce_bucket_size, config.param_persistence_threshold, config.max_reuse_distance
