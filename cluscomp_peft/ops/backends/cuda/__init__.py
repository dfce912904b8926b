"""The ops on CUDA devices: who serves what.

    decode          Triton's kernel; the reference's weight, bit for bit.
    linear          Few tokens, which is generation: weights are decoded tile by tile and used on the spot, so the
                    packed codes are all that is read. Where the codebook fits into shared memory, CUDA C++ for up to
                    64 tokens (`table.py`); else Triton's kernel for up to `FUSED_TOKENS`, with the weights of
                    `decode`, bit for bit. The order in which products are added is not cuBLAS's. More tokens, or a
                    dense residual, which must be read anyway: `decode` into a scratch weight, then the call of the
                    reference.
    codebook_grad   Where the codebook fits into shared memory, strips of G = dyᵀ x by cuBLAS, added up by `table.py`.
                    Else a tile of G at a time goes straight from tensor cores into the table of sums, so that a step
                    needs no scratch but the table.

All three are deterministic: what is summed by atomics is summed in integers. With N = in · ⌈out/g⌉ vectors,

    |Σ over (i, o) with one code and one place in the group of s_in[i] · s_out[o] · G[o, i]|
        ≤ √N · ‖diag(s_out) G diag(s_in)‖_F ≤ √N · ‖dy diag(s_out)‖_F · ‖x diag(s_in)‖_F = bound

(Cauchy-Schwarz, twice), so 2^61 / bound scales each term to an integer whose sums fit into 64 bits (Triton's; of
`table.py`'s see `kernels/scatter.cu`). A bound that is
not finite makes the codebook's gradient NaN or infinite, which loss scaling looks for.

The reference serves fp64, devices older than `OLDEST` or AMD's, empty tensors, and all where Triton does not work.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F

from ....codes import code_bits, num_groups
from .. import reference
from . import adapters, table, triton_kernels, triton_tuning
from .triton_kernels import INTERPRETED, triton
from .triton_tuning import OLDEST, Device

__all__ = ["available", "codebook_grad", "decode", "effective", "effective_backward", "linear"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LARGEST = 2**31  # offsets into the table are 32-bit
_FINISH_BLOCK = 512


def available(device: torch.device) -> bool:
    """Whether the kernels run there: on a CUDA device from `OLDEST` on, or anywhere if TRITON_INTERPRET=1 was set."""
    if triton is None:
        return False
    if INTERPRETED:
        return True
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return _device(device).capability >= OLDEST and _works(device)


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
    if not _serves(codes, codebook, (scale_in, scale_out, residual), dtype):
        return reference.decode(codes, codebook, scale_in, scale_out, residual, out_features, dtype)
    layout = _Layout(codes, codebook, out_features)
    plain = scale_in is None and scale_out is None and residual is None
    tile = triton_tuning.decode_tile(layout.padded)
    grid = (_cdiv(in_features, tile.channels), _cdiv(layout.groups, tile.groups))
    with torch.cuda.device_of(codes):  # Triton launches on the current device
        weight = torch.empty(out_features, in_features, dtype=dtype, device=codes.device)
        triton_kernels.decode[grid](
            codes.contiguous(), _padded_table(codebook, dtype if plain else None), _contiguous(scale_in),
            _contiguous(scale_out), residual, weight, in_features, out_features, layout.groups, codes.shape[1],
            layout.clusters, *_strides(residual), layout.group_size, layout.padded, layout.bits, layout.span,
            layout.blocks, tile.channels, tile.groups, num_warps=tile.warps,
        )  # fmt: skip
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
    tokens = math.prod(x.shape[:-1])
    few = 0 < tokens <= table.MAX_TOKENS and residual is None
    if few and _serves(codes, codebook, (scale_in, scale_out, bias), x.dtype):
        flat = x.reshape(tokens, x.shape[-1])
        y = _few_tokens(flat, codes, codebook, scale_in, scale_out, bias, out_features)
        if y is not None:
            return y.view(*x.shape[:-1], out_features)
    weight = decode(codes, codebook, scale_in, scale_out, residual, out_features, x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _few_tokens(
    x: torch.Tensor,
    codes: torch.Tensor,
    codebook: torch.Tensor,
    scale_in: torch.Tensor | None,
    scale_out: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_features: int,
) -> torch.Tensor | None:
    """y [tokens, out] for x [tokens, in]; None where decoding the weight is less work."""
    if not INTERPRETED:
        with torch.cuda.device_of(x):
            parts = (codes.contiguous(), codebook.contiguous(), _contiguous(scale_in), _contiguous(scale_out))
            if (y := table.linear(x.contiguous(), *parts, _contiguous(bias), out_features)) is not None:
                return y
    if x.shape[0] > triton_tuning.FUSED_TOKENS:
        return None
    return _fused_linear(x, codes, codebook, scale_in, scale_out, bias, out_features)


def _fused_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    codebook: torch.Tensor,
    scale_in: torch.Tensor | None,
    scale_out: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_features: int,
) -> torch.Tensor:
    """y [tokens, out] for x [tokens, in], up to 16 tokens."""
    tokens, in_features = x.shape
    layout = _Layout(codes, codebook, out_features)
    tile = triton_tuning.fused_tile(layout.padded, layout.groups, in_features, tokens, _device(x.device))
    splits = _cdiv(in_features, tile.share)
    # A table of numbers of another width is read in another layout, which adds up in another order; a merged layer
    # must not: so scales always meet fp32, and without them x decides.
    width = x.dtype if scale_in is None and scale_out is None else torch.float32
    bias = _contiguous(bias)
    with torch.cuda.device_of(x):
        y = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
        partial = y if splits == 1 else torch.empty(splits, tokens, out_features, device=x.device)
        triton_kernels.fused_linear[_cdiv(layout.groups, tile.groups), splits](
            x.contiguous(), codes.contiguous(), _padded_table(codebook, width), _contiguous(scale_in),
            _contiguous(scale_out), bias if splits == 1 else None, partial, tokens, in_features, out_features,
            layout.groups, codes.shape[1], layout.clusters, tile.share, layout.group_size, layout.padded, layout.bits,
            layout.span, layout.blocks, tile.channels, tile.groups, tile.tokens, num_warps=tile.warps,
            num_stages=tile.stages,
        )  # fmt: skip
        if splits > 1:
            size = tokens * out_features
            triton_kernels.finish[_cdiv(size, _FINISH_BLOCK),](
                partial, bias, y, size, out_features, splits, _FINISH_BLOCK, num_warps=4
            )
    return y


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
    given = (scale_in, scale_out, residual, x, grad_output)
    if not _serves(codes, codebook, given, torch.float32) or x.numel() == 0 or grad_output.numel() == 0:
        # Backward may run inside the user's autocast region; the fp32 sums must stay fp32.
        with torch.autocast(x.device.type, enabled=False):
            return reference.codebook_grad(x, grad_output, codes, codebook, scale_in, scale_out, residual)
    if x.dtype != grad_output.dtype:
        x, grad_output = x.float(), grad_output.float()
    if residual is None and not INTERPRETED:
        with torch.cuda.device_of(x):
            parts = (codes.contiguous(), codebook.contiguous(), _contiguous(scale_in), _contiguous(scale_out))
            grads = table.codebook_grad(x.contiguous(), grad_output.contiguous(), *parts)
        if grads is not None:
            return grads
    (tokens, in_features), out_features, device = x.shape, grad_output.shape[1], x.device
    layout = _Layout(codes, codebook, out_features)
    tile = triton_tuning.grad_tile(tokens, in_features, out_features, x.element_size(), _device(device))
    grid = (_cdiv(in_features, tile.channels), _cdiv(out_features, tile.outputs), _cdiv(tokens, tile.share))
    entries = codebook.numel()
    copies = triton_tuning.copies(entries)
    with torch.cuda.device_of(x):
        quantum = _quantum(x, grad_output, scale_in, scale_out, in_features * layout.groups)
        sums = torch.zeros(copies, entries, dtype=torch.int64, device=device)
        sums_in = torch.empty(0 if scale_in is None else 2 * grid[1] * grid[2], in_features, device=device)
        sums_out = torch.empty(0 if scale_out is None else grid[0] * grid[2], out_features, device=device)
        triton_kernels.segment_grad[grid](
            x.contiguous(), grad_output.contiguous(), codes.contiguous(), codebook.contiguous(),
            _contiguous(scale_in), _contiguous(scale_out), residual, quantum, sums, sums_in, sums_out,
            tokens, in_features, out_features, codes.shape[1], layout.clusters, *_strides(residual), entries, copies,
            tile.share, layout.group_size, layout.bits, layout.span, layout.blocks,
            tile.channels, tile.outputs, tile.tokens, _PRECISION, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        grad_codebook = (sums.sum(0).double() / quantum.double()).float().view_as(codebook)
        grad_in = sums_in.sum(0) if scale_in is not None else sums_in.view(0)
        grad_out = sums_out.sum(0) if scale_out is not None else sums_out.view(0)
    return grad_codebook, grad_in, grad_out


def effective(codebook: torch.Tensor, *others: torch.Tensor | None) -> tuple[torch.Tensor | None, ...] | None:
    """As `adapters.effective`, where its kernels run."""
    if INTERPRETED or not available(codebook.device):
        return None
    with torch.cuda.device_of(codebook):
        return adapters.effective(codebook, *others)  # type: ignore[arg-type]


def effective_backward(
    grads: Sequence[torch.Tensor],
    codebook_dtype: torch.dtype,
    scale_in: torch.Tensor | None,
    scale_out: torch.Tensor | None,
    units: torch.Tensor,
    trained: tuple[bool, bool],
) -> bool:
    """As `adapters.effective_backward`, where its kernels run."""
    if INTERPRETED or not available(units.device):
        return False
    with torch.cuda.device_of(units):
        return adapters.effective_backward(grads, codebook_dtype, scale_in, scale_out, units, trained)


# Three tensor-core products of TF32 halves for a product of fp32 numbers: 21 bits of each instead of 24, and several
# times the speed of fp32 units. 16-bit inputs are exact in either case.
_PRECISION = "tf32x3"


def _quantum(
    x: torch.Tensor,
    grad_output: torch.Tensor,
    scale_in: torch.Tensor | None,
    scale_out: torch.Tensor | None,
    vectors: int,
) -> torch.Tensor:
    """2^61 / bound of the module docstring, [], fp32, without waiting for the device."""
    bound = torch.full((), math.sqrt(vectors), device=x.device)
    for side, scale in ((x, scale_in), (grad_output, scale_out)):
        norms = torch.linalg.vector_norm(side, dim=0, dtype=torch.float32)
        bound = bound * torch.linalg.vector_norm(norms if scale is None else norms * scale.float())
    return 2.0**61 / bound.clamp(min=2.0**-60)  # where all is 0, any finite number does


class _Layout:
    """Numbers that every kernel asks for."""

    def __init__(self, codes: torch.Tensor, codebook: torch.Tensor, out_features: int) -> None:
        self.blocks, self.clusters, self.group_size = codebook.shape
        self.groups = num_groups(out_features, self.group_size)
        self.bits = code_bits(self.clusters)
        # Bytes that a code can touch: it starts at any multiple of bits modulo 8.
        self.span = max((k * self.bits % 8 + self.bits + 7) // 8 for k in range(8))
        self.padded = _padded(self.group_size)


def _padded(group_size: int) -> int:
    return 1 << (group_size - 1).bit_length()


def _padded_table(codebook: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Codebooks end to end, rows padded to a power of two by values that nothing uses: [m n, P]."""
    group_size = codebook.shape[2]
    dtype, padded = dtype or codebook.dtype, _padded(group_size)
    rows = codebook.reshape(-1, group_size)
    if padded == group_size:
        return rows.to(dtype).contiguous()
    table = torch.empty(len(rows), padded, dtype=dtype, device=codebook.device)
    table[:, :group_size] = rows
    return table


def _serves(
    codes: torch.Tensor, codebook: torch.Tensor, others: Iterable[torch.Tensor | None], dtype: torch.dtype
) -> bool:
    """Whether the kernels take this: see the module docstring."""
    dtypes = {dtype, codebook.dtype, *(other.dtype for other in others if other is not None)}
    entries = codebook.shape[0] * codebook.shape[1] * _padded(codebook.shape[2])
    return dtypes.issubset(_DTYPES) and 0 < entries < _LARGEST and codes.numel() > 0 and available(codes.device)


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _strides(residual: torch.Tensor | None) -> tuple[int, int]:
    return (0, 0) if residual is None else (residual.stride(0), residual.stride(1))


def _cdiv(total: int, part: int) -> int:
    return -(-total // part)


@functools.cache
def _device(device: torch.device) -> Device:
    if device.type != "cuda":
        return Device((9, 0), 4)  # of the interpreter: few programs
    properties = torch.cuda.get_device_properties(device)
    return Device((properties.major, properties.minor), properties.multi_processor_count)


@functools.cache
def _works(device: torch.device) -> bool:
    """Whether a small kernel compiles and runs there; warns once if not."""
    try:
        with torch.cuda.device_of(given := torch.ones(1, device=device)):
            triton_kernels.finish[1,](given, None, given, 1, 1, 1, 16)
        return bool(given == 1)
    except Exception as error:  # no C compiler, no driver, a device that this Triton does not know: each its own type
        warnings.warn(
            f"Triton cannot run on {device} ({error!r:.300}); clustered layers run on plain torch there, much "
            "slower. Triton needs a C compiler at run time, and a version that knows the device.",
            stacklevel=2,
        )
        return False
