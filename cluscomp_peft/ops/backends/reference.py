"""The three ops in plain torch, on every device. The other backends are tested against this one.

With V[o, i] = R[o, i] + C[code(i, o // g), o % g] (R: the dense residual, absent on a clustered base):

    decode          W[o, i] = s_out[o] · V[o, i] · s_in[i]          computed in fp32, rounded once to the wanted dtype
    linear          y = x Wᵀ + bias                                 by F.linear, as nn.Linear computes it
    codebook_grad   with G = dL/dW = dyᵀ x, tile by tile over input channels:
                    dL/dC[c]      = Σ over (i, group) with code c   s_out · s_in[i] · G[group, i]
                    dL/ds_in[i]   = Σ_o s_out[o] · V[o, i] · G[o, i]
                    dL/ds_out[o]  = Σ_i s_in[i] · V[o, i] · G[o, i]

G and all sums are fp32 (fp64 for fp64 inputs) whatever the dtype of x: a centroid collects thousands of terms, and a
bf16 sum would lose most of them. The reference code of the paper materialises W in autograd and sums in bf16.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ...codes import block_offsets, unpack
from ..packed_weight import Numbers, PackedWeight

__all__ = ["accumulator", "codebook_grad", "decode", "dense_linear", "effective", "effective_backward", "linear"]

# Weights decoded at once. On a CPU 2 MiB of fp32, which the cache holds and the allocator gives back: tiles eight
# times as large took twice the time and left 100 MB of freed fragments on the heap. On a GPU launches cost more.
_TILE_ELEMENTS = 1 << 19
_DEVICE_TILE_ELEMENTS = 1 << 22


def decode(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """The weight [out, in] in `dtype`, contiguous."""
    # Rounding commutes with the gather, so the small codebook is rounded instead of the weight where nothing follows.
    table = weight.codebook.to(dtype if weight.is_plain else accumulator(dtype)).contiguous()
    decoded = torch.empty(weight.out_features, weight.in_features, dtype=dtype, device=weight.device)
    for start, stop in _tiles(weight):
        tile = _values(weight, table, start, stop)
        if weight.scale_in is not None:
            tile = tile * weight.scale_in[start:stop, None].to(tile.dtype)
        if weight.scale_out is not None:
            tile = tile * weight.scale_out.to(tile.dtype)
        decoded[:, start:stop] = tile.t()
    return decoded


def linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """`x Wᵀ + bias` in the dtype of x."""
    return dense_linear(x, decode(weight, x.dtype), bias)


def dense_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`F.linear` with the bias in the dtype of x, whose result is no view.

    `F.linear` gives a view of its product where x has one dimension, or three, and there is a bias. Autograd would
    refuse to let the caller change that in place.
    """
    y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y  # nothing else refers to its base


def codebook_grad(
    x: torch.Tensor, grad_output: torch.Tensor, weight: PackedWeight
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of codebook [m, n, g], scale_in [in] and scale_out [out] (empty without scales), fp32 or fp64."""
    # Backward may run inside the user's autocast region, which must not reach the product.
    with torch.autocast(x.device.type, enabled=False):
        return _codebook_grad(x, grad_output, weight)


def _codebook_grad(
    x: torch.Tensor, grad_output: torch.Tensor, weight: PackedWeight
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = accumulator(x.dtype)
    in_features, out_features, group_size = weight.in_features, weight.out_features, weight.group_size
    table = weight.codebook.to(dtype).contiguous()
    grad_output = grad_output.to(dtype)
    grad_codebook = torch.zeros(table.shape[0] * table.shape[1], group_size, dtype=dtype, device=x.device)
    grad_in = torch.zeros(0 if weight.scale_in is None else in_features, dtype=dtype, device=x.device)
    grad_out = torch.zeros(0 if weight.scale_out is None else out_features, dtype=dtype, device=x.device)
    column = None if weight.scale_in is None else weight.scale_in.to(dtype)[:, None]
    row = None if weight.scale_out is None else weight.scale_out.to(dtype)
    for start, stop in _tiles(weight):
        grad = x[:, start:stop].to(dtype).t() @ grad_output
        if column is not None or row is not None:
            # grad · V serves both scales; what is left in grad afterwards is dL/dV
            product = grad * _values(weight, table, start, stop)
            if row is not None:
                grad_out += (product if column is None else product * column[start:stop]).sum(0)
                grad *= row
            if column is not None:
                grad_in[start:stop] = (product if row is None else product * row).sum(1)
                grad *= column[start:stop]
        grad = F.pad(grad, (0, weight.num_groups * group_size - out_features)).view(-1, group_size)
        grad_codebook.index_add_(0, _rows(weight, start, stop), grad)
    return grad_codebook.view(table.shape), grad_in, grad_out


def effective(weight: PackedWeight, numbers: Numbers) -> PackedWeight:
    """The weight with an adapter: codebook and scales as merging would store them, in the codebook's dtype.

        codebook' = round(codebook + unit · numbers)    scale' = round(scale · (1 + scale_unit · numbers))

    The adapter's codebooks must be a multiple of the weight's. Scales that the weight lacks count as 1.
    """
    codebook = weight.codebook
    delta = numbers.codebook.float().view(-1, weight.num_clusters, weight.group_size) * numbers.units[0]
    base = codebook.float()
    if weight.num_blocks not in (1, len(delta)):
        base = base.repeat_interleave(len(delta) // weight.num_blocks, 0)

    def rescale(scale: torch.Tensor | None, change: torch.Tensor | None) -> torch.Tensor | None:
        if change is None:
            return scale
        factor = 1 + change.float() * numbers.units[1]
        return (factor if scale is None else scale.float() * factor).to(codebook.dtype)

    values = (base + delta).to(codebook.dtype)
    scale_in, scale_out = rescale(weight.scale_in, numbers.scale_in), rescale(weight.scale_out, numbers.scale_out)
    return PackedWeight(weight.codes, values, weight.out_features, scale_in, scale_out)


def effective_backward(
    grads: Sequence[torch.Tensor],
    scale_in: torch.Tensor | None,
    scale_out: torch.Tensor | None,
    units: torch.Tensor,
    dtypes: Sequence[torch.dtype | None],
    codebook_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of an adapter's numbers, the rounding in [`effective`] left out.

    Args:
        grads: Of the codebook and the scales that [`effective`] gave, from `codebook_grad`; may be overwritten.
        scale_in, scale_out (`torch.Tensor`, *optional*): The weight's scales without the adapter.
        units (`torch.Tensor`): [2], the adapter's.
        dtypes: Of the numbers for codebook, scale_in and scale_out; None where there are none.
        codebook_dtype (`torch.dtype`): Of the weight's codebook and scales.
    """
    found: list[torch.Tensor | None] = [(grads[0] * units[0]).to(dtypes[0])]
    for grad, scale, dtype in zip(grads[1:], (scale_in, scale_out), dtypes[1:], strict=True):
        factor = units[1] if scale is None else scale.to(units.dtype) * units[1]
        found.append(None if dtype is None else (grad * factor).to(dtype))
    return found[0], found[1], found[2]  # type: ignore[return-value]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _tiles(weight: PackedWeight) -> list[tuple[int, int]]:
    """First input channel of each tile, and the one after its last."""
    elements = _TILE_ELEMENTS if weight.device.type == "cpu" else _DEVICE_TILE_ELEMENTS
    size, in_features = max(1, elements // max(1, weight.out_features)), weight.in_features
    return [(start, min(start + size, in_features)) for start in range(0, in_features, size)]


def _rows(weight: PackedWeight, start: int, stop: int) -> torch.Tensor:
    """Rows of the codebooks laid end to end, for the input channels [start, stop): [channels · groups], int32."""
    blocks, clusters, bits = weight.num_blocks, weight.num_clusters, weight.code_bits
    index = unpack(weight.codes[start:stop], bits, weight.num_groups)
    if clusters < 2**bits:
        index = index.clamp(max=clusters - 1)
    if blocks > 1:
        index = index + block_offsets(weight.in_features, blocks, clusters, weight.device)[start:stop, None]
    return index.reshape(-1)


def _values(weight: PackedWeight, table: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """V of the input channels [start, stop), transposed, from codebooks in the dtype of `table`: [channels, out]."""
    rows = table.view(-1, weight.group_size).index_select(0, _rows(weight, start, stop))
    values = rows.view(stop - start, -1)[:, : weight.out_features]
    if weight.residual is None:
        return values
    return values + weight.residual[:, start:stop].t().to(table.dtype)
