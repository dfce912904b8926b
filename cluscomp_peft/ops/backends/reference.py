"""The maths of the three ops in plain torch: right on every device, the judge of every faster backend.

With V[o, i] = R[o, i] + C[code(i, o // g), o % g] (R: the dense residual, absent on a clustered base):

    decode          W[o, i] = s_out[o] · V[o, i] · s_in[i]          computed in fp32, rounded once to the wanted dtype
    linear          y = x Wᵀ + bias                                 the very call of nn.Linear, so merging is exact
    codebook_grad   with G = dL/dW = dyᵀ x, tile by tile over input channels:
                    dL/dC[c]      = Σ over (i, group) with code c   s_out · s_in[i] · G[group, i]
                    dL/ds_in[i]   = Σ_o s_out[o] · V[o, i] · G[o, i]
                    dL/ds_out[o]  = Σ_i s_in[i] · V[o, i] · G[o, i]

G and all sums are fp32 (fp64 for fp64 inputs) whatever the dtype of x: a centroid collects thousands of terms, and a
bf16 sum would lose most of them. The reference code of the paper materialises W in autograd and sums in bf16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...codes import block_offsets, code_bits, num_groups, unpack

__all__ = ["codebook_grad", "decode", "linear"]

# Weights decoded at once. On a CPU 2 MiB of fp32, which the cache holds and the allocator gives back: tiles eight
# times as large took twice the time and left 100 MB of freed fragments on the heap. On a GPU launches cost more.
_TILE_ELEMENTS = 1 << 19
_DEVICE_TILE_ELEMENTS = 1 << 22


def decode(
    codes: torch.Tensor,
    codebook: torch.Tensor,
    scale_in: torch.Tensor | None,
    scale_out: torch.Tensor | None,
    residual: torch.Tensor | None,
    out_features: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The weight [out, in] in `dtype`; see `cluscomp_peft.ops.decode` for the arguments."""
    in_features = codes.shape[0]
    plain = scale_in is None and scale_out is None and residual is None
    # Rounding commutes with the gather, so without scales the small codebook is rounded instead of the weight.
    table = codebook.to(dtype) if plain else codebook.to(_accumulator(dtype))
    weight = torch.empty(out_features, in_features, dtype=dtype, device=codes.device)
    for start, stop in _tiles(codes, out_features):
        tile = _values(codes, table, residual, out_features, start, stop)
        if scale_in is not None:
            tile = tile * scale_in[start:stop, None].to(tile.dtype)
        if scale_out is not None:
            tile = tile * scale_out.to(tile.dtype)
        weight[:, start:stop] = tile.t()
    return weight


def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    codebook: torch.Tensor,
    scale_in: torch.Tensor | None,
    scale_out: torch.Tensor | None,
    residual: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_features: int,
) -> torch.Tensor:
    """`x Wᵀ + bias` in the dtype of x."""
    weight = decode(codes, codebook, scale_in, scale_out, residual, out_features, x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def codebook_grad(
    x: torch.Tensor,
    grad_output: torch.Tensor,
    codes: torch.Tensor,
    codebook: torch.Tensor,
    scale_in: torch.Tensor | None,
    scale_out: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of codebook [m, n, g], scale_in [in] and scale_out [out] (empty without scales), fp32 or fp64."""
    dtype = _accumulator(x.dtype)
    blocks, clusters, group_size = codebook.shape
    in_features, out_features = x.shape[1], grad_output.shape[1]
    groups = num_groups(out_features, group_size)
    table = codebook.to(dtype)
    grad_output = grad_output.to(dtype)
    grad_codebook = torch.zeros(blocks * clusters, group_size, dtype=dtype, device=x.device)
    grad_in = torch.zeros(0 if scale_in is None else in_features, dtype=dtype, device=x.device)
    grad_out = torch.zeros(0 if scale_out is None else out_features, dtype=dtype, device=x.device)
    column = None if scale_in is None else scale_in.to(dtype)[:, None]
    row = None if scale_out is None else scale_out.to(dtype)
    for start, stop in _tiles(codes, out_features):
        grad = x[:, start:stop].to(dtype).t() @ grad_output
        if column is not None or row is not None:
            # grad · V serves both scales; what is left in grad afterwards is dL/dV
            product = grad * _values(codes, table, residual, out_features, start, stop)
            if row is not None:
                grad_out += (product if column is None else product * column[start:stop]).sum(0)
                grad *= row
            if column is not None:
                grad_in[start:stop] = (product if row is None else product * row).sum(1)
                grad *= column[start:stop]
        grad = F.pad(grad, (0, groups * group_size - out_features)).view(-1, group_size)
        grad_codebook.index_add_(0, _indices(codes, codebook, groups, start, stop), grad)
    return grad_codebook.view(blocks, clusters, group_size), grad_in, grad_out


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _tiles(codes: torch.Tensor, out_features: int) -> list[tuple[int, int]]:
    in_features = codes.shape[0]
    elements = _TILE_ELEMENTS if codes.device.type == "cpu" else _DEVICE_TILE_ELEMENTS
    size = max(1, elements // max(1, out_features))
    return [(start, min(start + size, in_features)) for start in range(0, in_features, size)]


def _indices(codes: torch.Tensor, codebook: torch.Tensor, groups: int, start: int, stop: int) -> torch.Tensor:
    """Rows of the codebooks laid end to end, for the input channels [start, stop): [channels · groups], int32."""
    blocks, clusters = codebook.shape[0], codebook.shape[1]
    bits = code_bits(clusters)
    index = unpack(codes[start:stop], bits, groups)
    if clusters < 2**bits:
        index = index.clamp(max=clusters - 1)
    if blocks > 1:
        index = index + block_offsets(codes.shape[0], blocks, clusters, codes.device)[start:stop, None]
    return index.reshape(-1)


def _values(
    codes: torch.Tensor,
    table: torch.Tensor,
    residual: torch.Tensor | None,
    out_features: int,
    start: int,
    stop: int,
) -> torch.Tensor:
    """V of the input channels [start, stop), transposed: [channels, out]."""
    group_size = table.shape[2]
    index = _indices(codes, table, num_groups(out_features, group_size), start, stop)
    values = table.view(-1, group_size).index_select(0, index).view(stop - start, -1)[:, :out_features]
    return values if residual is None else values + residual[:, start:stop].t().to(table.dtype)
