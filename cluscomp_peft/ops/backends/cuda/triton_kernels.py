"""Device code of the ops on CUDA: tiles of codes become tiles of weights, and tiles of gradients become sums.

A program reads the packed codes of some input channels × groups, unpacks them, and gathers whole centroids. The
codebooks lie end to end as a table [m n, P], P the next power of two of g: so a centroid is one wide load instead of g
narrow ones, which is what such a gather costs, and Triton's tiles must have sides that are powers of two.

      codes [in, width], uint8             table [m n, P]                weight [out, in], row-major
             groups ►                       ┌─ c ─┐
      chan-  ┌──────┐   unpack, + n·block   │·····│  gather      permute (channels, groups, P) to (groups, P, channels)
      nels ▼ │ tile │ ────────────────────► │·····│ ───────────► so that neighbouring threads write neighbouring
             └──────┘   [channels, groups]  └─────┘              channels; lanes P - g of a group are not written

    decode         as drawn. Residual and scales join after the permutation, in fp32; one rounding.
    fused_linear   A tile of weights, rounded as decode rounds it, is multiplied with x at once and kept nowhere. One
                   token: products add up in fp32 registers, and the channels of a tile are summed at the end. Up to
                   16: tensor cores, tokens padded to 16. Programs along the input channels write partial sums, which
                   `finish` adds in order: no atomics, so a shape and a device always give the same bytes.
    segment_grad   A tile of G = dyᵀ x is accumulated by `tl.dot` over the tokens, never written, and each entry added
                   to the entry of the codebook gradient that its code names.

Sums of segments are 64-bit integers: a term becomes round(term · q), q = 2^61 / bound, with the bound of any such sum
known beforehand (Cauchy-Schwarz; see `backends/cuda`). Integer sums do not depend on their order, so the atomics that
collect them are deterministic, as fp32 atomics are not; and q leaves a usual term some 30 bits, so the sum loses no
digits on the way. Few centroids contend for few addresses, so programs spread over copies of the table of sums.
The gather and the scatter go through L1 and L2, which hold the tables: Triton gives no shared memory to address.
"""

# mypy: disable-error-code="assignment, operator"
# Kernels are typed by Triton.

from __future__ import annotations

import os
import warnings
from typing import Any

triton: Any = None
tl: Any = None
try:
    import triton  # type: ignore[no-redef]
    import triton.language as tl  # type: ignore[no-redef]
except ImportError:  # `cuda.available` says so
    pass
except Exception as error:
    warnings.warn(
        f"Triton cannot be imported ({error!r:.300}); clustered layers run on plain torch on GPUs, much slower. "
        "Install the Triton that this version of torch asks for.",
        stacklevel=2,
    )

__all__ = ["INTERPRETED", "decode", "finish", "fused_linear", "segment_grad", "triton"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_jit: Any = triton.jit if triton is not None else lambda function: function


@_jit
def _rows(
    codes, i, j, inside, in_features, width, clusters,
    BITS: tl.constexpr, SPAN: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Rows of the table for input channels i [I] and groups j [J]: [I, J], int32."""
    bit = j * BITS
    first = bit >> 3
    byte = codes + i.to(tl.int64)[:, None] * width + first[None, :]
    word = tl.load(byte, mask=inside, other=0).to(tl.int32)
    # The last code of a row may end before the bytes that others of its width reach into.
    if SPAN > 1:
        word |= tl.load(byte + 1, mask=inside & (first + 1 < width)[None, :], other=0).to(tl.int32) << 8
    if SPAN > 2:
        word |= tl.load(byte + 2, mask=inside & (first + 2 < width)[None, :], other=0).to(tl.int32) << 16
    row = (word >> (bit & 7)[None, :]) & (2**BITS - 1)
    row = tl.minimum(row, clusters - 1)  # a code that names no centroid reads as the last one
    if BLOCKS > 1:
        block = (i.to(tl.int64) * BLOCKS) // in_features
        row += block.to(tl.int32)[:, None] * clusters
    return row


@_jit
def decode(
    codes, table, scale_in, scale_out, residual, weight,
    in_features, out_features, groups, width, clusters, residual_row, residual_column,
    G: tl.constexpr, P: tl.constexpr, BITS: tl.constexpr, SPAN: tl.constexpr, BLOCKS: tl.constexpr,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """weight [out, in]; residual strides as given, the rest contiguous. Grid: channels, groups."""
    i = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    j = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    k = tl.arange(0, P)
    channel = i < in_features
    inside = channel[:, None] & (j < groups)[None, :]
    row = _rows(codes, i, j, inside, in_features, width, clusters, BITS, SPAN, BLOCKS)
    value = tl.load(table + (row * P)[:, :, None] + k[None, None, :], mask=inside[:, :, None], other=0.0)
    value = tl.permute(value, (1, 2, 0))

    output = j[:, None] * G + k[None, :]
    written = (k < G)[None, :] & (output < out_features)
    at = written[:, :, None] & channel[None, None, :]
    line = output.to(tl.int64)[:, :, None]
    if residual is not None:
        there = residual + line * residual_row + i.to(tl.int64)[None, None, :] * residual_column
        value = value.to(tl.float32) + tl.load(there, mask=at, other=0.0).to(tl.float32)
    if scale_in is not None:
        scale = tl.load(scale_in + i, mask=channel, other=0.0).to(tl.float32)
        value = value.to(tl.float32) * scale[None, None, :]
    if scale_out is not None:
        scale = tl.load(scale_out + output, mask=written, other=0.0).to(tl.float32)
        value = value.to(tl.float32) * scale[:, :, None]
    tl.store(weight + line * in_features + i[None, None, :], value.to(weight.dtype.element_ty), mask=at)


@_jit
def fused_linear(
    x, codes, table, scale_in, scale_out, bias, y,
    tokens, in_features, out_features, groups, width, clusters, share,
    G: tl.constexpr, P: tl.constexpr, BITS: tl.constexpr, SPAN: tl.constexpr, BLOCKS: tl.constexpr,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """y [splits, tokens, out] from x [tokens, in]: split s sums `share` input channels from s · share on.

    TOKENS is 1, or 16 for `tl.dot`. Grid: groups, splits.
    """
    tile = tl.program_id(0)
    split = tl.program_id(1)
    j = tile * GROUPS + tl.arange(0, GROUPS)
    k = tl.arange(0, P)
    output = j[:, None] * G + k[None, :]
    if scale_out is not None:
        written = (k < G)[None, :] & (output < out_features)
        scale = tl.load(scale_out + output, mask=written, other=0.0).to(tl.float32)
    if TOKENS == 1:
        total = tl.zeros([CHANNELS, GROUPS, P], tl.float32)
    else:
        token = tl.arange(0, TOKENS)
        total = tl.zeros([TOKENS, GROUPS * P], tl.float32)

    first = split * share
    last = tl.minimum(first + share, in_features)
    for start in range(first, last, CHANNELS):
        i = start + tl.arange(0, CHANNELS)
        channel = i < last
        inside = channel[:, None] & (j < groups)[None, :]
        row = _rows(codes, i, j, inside, in_features, width, clusters, BITS, SPAN, BLOCKS)
        value = tl.load(table + (row * P)[:, :, None] + k[None, None, :], mask=inside[:, :, None], other=0.0)
        if scale_in is not None:
            column = tl.load(scale_in + i, mask=channel, other=0.0).to(tl.float32)
            value = value.to(tl.float32) * column[:, None, None]
        if scale_out is not None:
            value = value.to(tl.float32) * scale[None, :, :]
        value = value.to(x.dtype.element_ty)
        if TOKENS == 1:
            given = tl.load(x + i, mask=channel, other=0.0).to(tl.float32)
            total += value.to(tl.float32) * given[:, None, None]
        else:
            there = x + token[:, None] * in_features + i[None, :]
            given = tl.load(there, mask=(token < tokens)[:, None] & channel[None, :], other=0.0)
            # "ieee": fp32 inputs are multiplied as such; 16-bit ones are exact on tensor cores anyway.
            total = tl.dot(given, tl.reshape(value, (CHANNELS, GROUPS * P)), total, input_precision="ieee")

    if TOKENS == 1:
        result = tl.sum(total, 0)
        written = (k < G)[None, :] & (output < out_features)
        if bias is not None:
            result += tl.load(bias + output, mask=written, other=0.0).to(y.dtype.element_ty).to(tl.float32)
        tl.store(y + split.to(tl.int64) * out_features + output, result.to(y.dtype.element_ty), mask=written)
    else:
        lane = tl.arange(0, GROUPS * P)
        feature = (tile * GROUPS + lane // P) * G + lane % P
        written = (lane % P < G) & (feature < out_features)
        if bias is not None:
            offset = tl.load(bias + feature, mask=written, other=0.0).to(y.dtype.element_ty).to(tl.float32)
            total += offset[None, :]
        line = split.to(tl.int64) * tokens + token
        there = y + line[:, None] * out_features + feature[None, :]
        tl.store(there, total.to(y.dtype.element_ty), mask=(token < tokens)[:, None] & written[None, :])


@_jit
def finish(partial, bias, y, size, out_features, splits, BLOCK: tl.constexpr):
    """y [tokens, out], `size` entries: the sum of partial [splits, tokens, out], plus bias."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, splits):
        total += tl.load(partial + at, mask=inside, other=0.0)
        partial += size
    if bias is not None:
        offset = tl.load(bias + at % out_features, mask=inside, other=0.0)
        total += offset.to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)


@_jit
def segment_grad(
    x, grad_output, codes, table, scale_in, scale_out, residual, quantum, sums, sums_in, sums_out,
    tokens, in_features, out_features, width, clusters, residual_row, residual_column, entries, copies, share,
    G: tl.constexpr, BITS: tl.constexpr, SPAN: tl.constexpr, BLOCKS: tl.constexpr,
    CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds to sums [copies, entries], int64; writes sums_in [·, in] and sums_out [·, out], rows by program.

    Grid: channels, outputs, shares of the tokens. Two halves of the outputs one after the other need fewer registers.
    """
    # Programs that run at the same time share tiles of x and of grad_output in L2.
    tile_out, tile_in = tl.swizzle2d(tl.program_id(1), tl.program_id(0), tl.num_programs(1), tl.num_programs(0), 8)
    split = tl.program_id(2)
    i = tile_in * CHANNELS + tl.arange(0, CHANNELS)
    o = tile_out * OUTPUTS + tl.arange(0, OUTPUTS)
    channel = i < in_features
    grad = tl.zeros([CHANNELS, OUTPUTS], tl.float32)
    first = split * share
    last = tl.minimum(first + share, tokens)
    for start in range(first, last, TOKENS):
        token = start + tl.arange(0, TOKENS)
        line = token.to(tl.int64)
        there = x + line[None, :] * in_features + i[:, None]
        left = tl.load(there, mask=(token < last)[None, :] & channel[:, None], other=0.0)
        there = grad_output + line[:, None] * out_features + o[None, :]
        right = tl.load(there, mask=(token < last)[:, None] & (o < out_features)[None, :], other=0.0)
        grad = tl.dot(left, right, grad, input_precision=PRECISION)

    rows = split.to(tl.int64)
    sums += (tile_in + tile_out) % copies * entries
    halves = tl.split(tl.permute(tl.reshape(grad, (CHANNELS, 2, OUTPUTS // 2)), (0, 2, 1)))
    for half in tl.static_range(2):
        _scatter(
            halves[half], i, tile_out * OUTPUTS + half * (OUTPUTS // 2) + tl.arange(0, OUTPUTS // 2),
            codes, table, scale_in, scale_out, residual, quantum, sums,
            sums_in + ((rows * tl.num_programs(1) + tile_out) * 2 + half) * in_features,
            sums_out + (rows * tl.num_programs(0) + tile_in) * out_features,
            in_features, out_features, width, clusters, residual_row, residual_column, G, BITS, SPAN, BLOCKS,
        )  # fmt: skip


@_jit
def _scatter(
    grad, i, o, codes, table, scale_in, scale_out, residual, quantum, sums, sums_in, sums_out,
    in_features, out_features, width, clusters, residual_row, residual_column,
    G: tl.constexpr, BITS: tl.constexpr, SPAN: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """A tile of G [channels i, outputs o]: sums of the scales' gradients to their row, the rest to their code's entry.

    The outputs need not be whole groups: each looks up its own code, so that no g wastes lanes of the product.
    """
    channel = i < in_features
    output = o < out_features
    inside = channel[:, None] & output[None, :]
    j = o // G
    slot = _rows(codes, i, j, inside, in_features, width, clusters, BITS, SPAN, BLOCKS) * G + (o - j * G)[None, :]
    if scale_in is not None or scale_out is not None:
        value = tl.load(table + slot, mask=inside, other=0.0).to(tl.float32)
        if residual is not None:
            there = residual + o.to(tl.int64)[None, :] * residual_row + i.to(tl.int64)[:, None] * residual_column
            value += tl.load(there, mask=inside, other=0.0).to(tl.float32)
        product = grad * value  # serves both scales; what is left in grad afterwards is dL/dV
        if scale_in is not None:
            column = tl.load(scale_in + i, mask=channel, other=0.0).to(tl.float32)[:, None]
            grad *= column
        if scale_out is not None:
            line = tl.load(scale_out + o, mask=output, other=0.0).to(tl.float32)[None, :]
            grad *= line
            terms = product
            if scale_in is not None:
                terms = product * column
                product *= line
            tl.store(sums_out + o, tl.sum(terms, 0), mask=output)
        if scale_in is not None:
            tl.store(sums_in + i, tl.sum(product, 1), mask=channel)
    # Rounded to the nearest: truncation would pull every sum towards 0.
    term = tl.floor(grad * tl.load(quantum) + 0.5).to(tl.int64)
    tl.atomic_add(sums + slot, term, mask=inside, sem="relaxed")
