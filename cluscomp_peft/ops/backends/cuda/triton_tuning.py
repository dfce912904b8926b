"""Sizes of the tiles that the kernels of `triton_kernels.py` work on, by shape, dtype and device.

Everything here follows from shapes and the device, by rules and never by a stopwatch: another tile adds up in another
order, so an autotuner would give a model other last bits on every machine and in every run. Nor does anything depend
on the dtype in which a codebook is stored, so that a merged layer computes what the unmerged one did.

The numbers are reasoned, not measured: no GPU was at hand. They come from these rules and from the kernels compiled
for sm_80, 86 and 90. A store of 64 channels of 16 bits is a line of L2. A thread holds 32 to 64 numbers of a tile, so
that 4 warps of decode and fused_linear take 56 to 128 registers and spill none. A multiprocessor wants several
programs to hide the latency of gathers. A product's tile of 128 × 128 reads two thirds of what 64 × 128 does from L2
for each multiply-add; its epilogue takes all 255 registers, once for a whole sum over tokens.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "FUSED_TOKENS",
    "OLDEST",
    "DecodeTile",
    "Device",
    "FusedTile",
    "GradTile",
    "copies",
    "decode_tile",
    "fused_tile",
    "grad_tile",
]

OLDEST = (8, 0)  # compute capability: Turing and Volta have no bf16, the reference serves them
FUSED_TOKENS = 16  # up to which `linear` multiplies tiles of weights; above, decoding once and cuBLAS is less work

_DECODED = 8192  # weights of a tile of decode
_FUSED_COLUMNS = 128  # weights of an input channel in a tile of fused_linear
_PROGRAMS = 4  # of fused_linear wanted on each multiprocessor
_TABLE_ENTRIES = 1 << 18  # 2 MiB of sums, which L2 holds along with the rest
_MOST_COPIES = 64


class Device(NamedTuple):
    """What the rules ask of a device: compute capability and multiprocessors."""

    capability: tuple[int, int]
    processors: int


class DecodeTile(NamedTuple):
    channels: int
    groups: int
    warps: int


class FusedTile(NamedTuple):
    """`share`: input channels of a split, a multiple of `channels`."""

    channels: int
    groups: int
    tokens: int
    share: int
    warps: int
    stages: int


class GradTile(NamedTuple):
    """`tokens`: of one `tl.dot`; `share`: tokens of a program, a multiple of that."""

    channels: int
    outputs: int
    tokens: int
    share: int
    warps: int
    stages: int


def decode_tile(padded: int) -> DecodeTile:
    """For groups padded to a power of two."""
    return DecodeTile(64, max(1, _DECODED // (64 * padded)), 4)


def fused_tile(padded: int, groups: int, in_features: int, tokens: int, device: Device) -> FusedTile:
    """For x [tokens, in] and `groups` groups of an input channel, padded to a power of two."""
    tile, channels = max(1, _FUSED_COLUMNS // padded), 32
    least = 128 if tokens == 1 else 512  # partial sums of many tokens cost more bytes
    wanted = _PROGRAMS * device.processors * tile // groups
    share = _share(in_features, max(1, min(wanted, in_features // least)), channels)
    # Pipelining would send the gathered centroids through shared memory, number by number.
    return FusedTile(channels, tile, 1 if tokens == 1 else 16, share, 4, 1)


def grad_tile(tokens: int, in_features: int, out_features: int, itemsize: int, device: Device) -> GradTile:
    """For x [tokens, in] and dL/dy [tokens, out] of `itemsize` bytes a number."""
    # Shared memory of a block: 163 KiB and more on data centre chips, 99 on the others. A stage takes 32 KiB or 16.
    small = device.capability[1] != 0 or device.capability[0] >= 12
    channels, outputs, step = 128, 128, (64 if small else 128) // itemsize
    tiles = -(-in_features // channels) * -(-out_features // outputs)
    splits = max(1, min(2 * device.processors // tiles, tokens // (8 * step)))
    return GradTile(channels, outputs, step, _share(tokens, splits, step), 8, 3)


def copies(entries: int) -> int:
    """Tables of `entries` sums among which programs spread."""
    return max(1, min(_MOST_COPIES, _TABLE_ENTRIES // entries))


def _share(total: int, splits: int, step: int) -> int:
    """The share of each of `splits` parts, a multiple of `step`."""
    return -(-total // (splits * step)) * step
