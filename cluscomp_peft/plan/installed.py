"""Defaults of the packages that do the training, asked of those that are installed.

A package that is missing, or has another name for a default by now, leaves the value that its version named here has.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import NamedTuple

import torch
from torch.nn.parallel import DistributedDataParallel

from ..upstream.deepspeed import zero_defaults

__all__ = ["Zero", "ddp_copies_gradients", "nf4_bits", "states_of_8bit", "zero"]


class Zero(NamedTuple):
    """DeepSpeed's `zero_optimization`, in numbers of elements. The values here are those of 0.19.

    Args:
        bucket (`int`): reduce_bucket_size: a buffer of gradients, allocated in full, whatever is trained.
        persistent (`int`): stage3_param_persistence_threshold: tensors of at most so many numbers stay whole.
        reuse (`int`): stage3_max_reuse_distance: what is needed again within so many numbers stays gathered.
    """

    bucket: int = 500_000_000
    persistent: int = 100_000
    reuse: int = 1_000_000_000


@cache
def zero() -> Zero:
    """What DeepSpeed does where nobody sets anything."""
    try:
        return Zero(*map(int, zero_defaults()))
    except Exception:  # its import looks for compilers and devices, and fails in many ways where there are none
        return Zero()


def ddp_copies_gradients() -> bool:
    """Whether DDP's buckets are a copy of the gradients (torch 2.13: yes), or the gradients lie in them."""
    views = inspect.signature(DistributedDataParallel).parameters.get("gradient_as_bucket_view")
    return views is None or not views.default


@cache
def states_of_8bit(numel: int) -> int:
    """Bytes of bitsandbytes' states of 8-bit AdamW for a tensor of `numel` numbers, tables of values not counted.

    In 0.50 tensors of less than 4096 numbers have two fp32 moments, larger ones two bytes a number and an fp32 scale
    of both moments for every 256.
    """
    try:
        from bitsandbytes.optim import AdamW8bit

        parameter = torch.nn.Parameter(torch.empty(numel, device="meta"))
        optimizer = AdamW8bit([parameter])
        optimizer.init_state(optimizer.param_groups[0], parameter, 0, 0)
        found = optimizer.state[parameter]
        names = [name for name in found if name.startswith(("state", "absmax"))]
        return sum(found[name].nbytes for name in names) if len(names) > 1 else _states_of_8bit(numel)
    except Exception:  # not installed, or another way to make states
        return _states_of_8bit(numel)


def _states_of_8bit(numel: int) -> int:
    return 8 * numel if numel < 4096 else 2 * numel + 8 * -(-numel // 256)


@cache
def nf4_bits() -> float:
    """Bits that a weight takes in bitsandbytes' NF4 with doubly quantised scales. In 0.50: 4, 8 for each block of 64,
    and 32 for each 256 blocks.
    """
    weights = 64 * 256 * 16
    try:
        from bitsandbytes.functional import quantize_4bit

        # Not zeros, which end the process in 0.48: they have no scale.
        numbers = torch.linspace(-1, 1, weights)
        codes, state = quantize_4bit(numbers, compress_statistics=True, quant_type="nf4")
        return 8 * (codes.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes) / weights
    except Exception:  # not installed, or no kernels for this device
        return 4 + 8 / 64 + 32 / (64 * 256)
