"""Some rows of a weight, decoded alone: what an embedding looks up.

Row o of W [out, in] is element o % g of the centroid that group o // g of each input channel names. Codes are packed
along the groups of a channel, so a row takes up to three bytes of every channel; the rest of the matrix is not read:

    channel i of codes   … │ group o//g: b bits, begins in byte (o//g · b) // 8 │ …

The same numbers as rows of `decode`, to the last bit: the steps are those of `backends/reference.py`.
"""

from __future__ import annotations

import torch

from ..codes import block_offsets
from .backends.reference import accumulator
from .checks import check
from .packed_weight import PackedWeight

__all__ = ["decode_rows"]

# Weights decoded at once, which take some 40 bytes each.
_TILE_ELEMENTS = 1 << 20
_DEVICE_TILE_ELEMENTS = 1 << 23


def decode_rows(weight: PackedWeight, rows: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Rows of the weight. Not differentiable.

    Args:
        weight ([`PackedWeight`]): Codes, codebook and scales; without a residual.
        rows (`torch.Tensor`): [n], int32 or int64, each in [0, out); on the device of the weight.
        dtype (`torch.dtype`, *optional*): Of the result; the codebook's by default.

    Returns:
        `torch.Tensor`: [n, in], contiguous; what `decode(weight, dtype)[rows]` is.

    Raises:
        TypeError: If the codes are not uint8, or something else is not floating point.
        ValueError: If tensors are on several devices, shapes do not belong together, or there is a residual.
        IndexError: If a row is out of range, on a CPU; a GPU stops the process, as it does for `nn.Embedding`.
    """
    check(weight)
    if weight.residual is not None:
        raise ValueError("rows of a weight with a residual are not decoded alone; decode the whole weight.")
    dtype = dtype or weight.codebook.dtype
    with torch.no_grad():
        if rows.is_cpu and len(rows) and not torch.compiler.is_compiling():
            low, high = map(int, rows.aminmax())
            if low < 0 or high >= weight.out_features:
                raise IndexError(f"there are {weight.out_features} rows, from 0; got {low if low < 0 else high}.")
        # As in decode: rounding commutes with the gather, so the small codebook is rounded where nothing follows.
        table = weight.codebook.to(dtype if weight.is_plain else accumulator(dtype)).contiguous().view(-1)
        result = torch.empty(len(rows), weight.in_features, dtype=dtype, device=weight.device)
        elements = _TILE_ELEMENTS if weight.device.type == "cpu" else _DEVICE_TILE_ELEMENTS
        step = max(1, elements // weight.in_features)
        for start in range(0, len(rows), step):
            result[start : start + step] = _decode(weight, table, rows[start : start + step].long())
    return result


def _decode(weight: PackedWeight, table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows [n, in] in the dtype of `table`, the codebooks' numbers end to end."""
    bits, group_size = weight.code_bits, weight.group_size
    first = rows // group_size * bits
    byte, shift = first // 8, first % 8
    codes = weight.codes.index_select(1, byte).int() >> shift
    for more in range(1, (bits + 14) // 8):  # a code that begins in the last bit of a byte ends bits + 6 bits later
        # Behind the last byte of a channel there is no code any more: whatever is read there is masked out.
        following = weight.codes.index_select(1, (byte + more).clamp(max=weight.row_bytes - 1)).int()
        codes |= following << (8 * more - shift)
    codes &= 2**bits - 1
    if weight.num_clusters < 2**bits:
        codes = codes.clamp(max=weight.num_clusters - 1)
    if weight.num_blocks > 1:
        blocks, clusters = weight.num_blocks, weight.num_clusters
        codes = codes + block_offsets(weight.in_features, blocks, clusters, weight.device)[:, None]
    values = table[(codes * group_size + rows % group_size).t()]
    if weight.scale_in is not None:
        values = values * weight.scale_in.to(values.dtype)
    if weight.scale_out is not None:
        values = values * weight.scale_out[rows, None].to(values.dtype)
    return values
