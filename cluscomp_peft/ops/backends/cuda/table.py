"""CUDA C++ kernels for codebooks that fit into a multiprocessor's shared memory: `kernels/linear.cu`, `scatter.cu`.

A gather from shared memory takes a fraction of one through L1, and few tokens are multiplied by tensor cores while
the weights are in registers. A function returns None for a case that it does not take; Triton's kernels do then.

    linear          Up to 64 tokens in bf16 or fp16. Scales of the inputs are multiplied into x, which is rounded
                    again, and those of the outputs into the sums; so few tokens of a scaled matrix see weights that
                    are not rounded.
    codebook_grad   From G = dyᵀ x, which cuBLAS makes in strips that L2 holds, to the gradients of codebook and
                    scales. Sums are 32-bit integers in shared memory, each block of threads with a quantum of its own.

Measured on an H100, matrices of Llama-3-8B: one token takes a fifth to a third of what Triton's kernels take, a
gradient half. A decode kernel of this kind was slower than Triton's, because it wrote 32 bytes of a row at a time, and
is gone
(recipes/benchmarks/gpu/README.md).
"""

from __future__ import annotations

import torch

from ...packed_weight import PackedWeight
from .failures import attempt
from .plans import DTYPES, MAX_TOKENS, WARPS, Case, kind, plan_linear, plan_scatter, planned, pointer

__all__ = ["MAX_TOKENS", "codebook_grad", "linear"]


def linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor | None:
    """y [tokens, out] for x [tokens, in], all contiguous and on the current device, without a residual; None if the
    kernels do not take the case."""
    tokens = x.shape[0]
    if tokens > MAX_TOKENS or x.dtype not in (torch.bfloat16, torch.float16):
        return None
    if x.dtype == torch.float16 and weight.scale_in is not None:  # x times a scale may leave fp16's range
        return None
    case = Case.of(weight, x.dtype)
    return attempt("table_linear", (case, tokens), lambda: _linear(x, weight, bias, case))


def _linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, case: Case) -> torch.Tensor | None:
    codes, codebook, out_features, scale_in, scale_out, _ = weight
    tokens = x.shape[0]
    plan = planned(plan_linear, case, tokens)
    if plan is None:
        return None
    y = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    sums = torch.empty(plan.slots, tokens, plan.outputs, dtype=torch.float32, device=x.device)
    at = sums.data_ptr()
    plan.multiply(
        (plan.parts, 1), 32 * WARPS, plan.shared,
        x.data_ptr(), codes.data_ptr(), codebook.data_ptr(), pointer(scale_in), at,
        tokens, case.in_features, codes.shape[1], case.num_clusters, case.num_blocks, plan.tiles, plan.units,
        DTYPES[codebook.dtype], kind(scale_in),
    )  # fmt: skip
    plan.finish(
        (-(-tokens * out_features // 256), 1), 256, 0,
        at, pointer(scale_out), pointer(bias), y.data_ptr(),
        tokens, out_features, case.num_blocks, plan.tiles, plan.units, plan.parts, kind(scale_out), kind(bias),
    )  # fmt: skip
    return y


def codebook_grad(
    x: torch.Tensor, grad_output: torch.Tensor, weight: PackedWeight
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Gradients of codebook and scales for x and grad_output of one dtype, all contiguous and on the current device,
    without a residual; None if the kernels do not take the case."""
    case = Case.of(weight, x.dtype)
    return attempt("scatter", case, lambda: _codebook_grad(x, grad_output, weight, case))


def _codebook_grad(
    x: torch.Tensor, grad_output: torch.Tensor, weight: PackedWeight, case: Case
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    codes, codebook, _, scale_in, scale_out, _ = weight
    plan = planned(plan_scatter, case)
    if plan is None:
        return None
    device, out_features, columns, threads = x.device, case.out_features, plan.columns, plan.threads
    lanes = columns * threads // 32 if scale_in is not None else 0
    sums_in = torch.empty(case.in_features, lanes, device=device)
    total = torch.empty(case.num_blocks, case.group_size, case.num_clusters, device=device)
    total_out = torch.zeros(out_features if scale_out is not None else 0, device=device)
    for strip in plan.strips:
        gradient = _product(x[:, strip.row : strip.row + strip.rows].t(), grad_output)
        if not strip.add:
            shape = (strip.blocks, strip.pieces * columns, case.group_size, case.num_clusters)
            partial = torch.empty(shape, device=device)
            sums_out = torch.empty(strip.blocks * strip.pieces, len(total_out), device=device)
        plan.scatter(
            (columns, strip.blocks * strip.pieces), threads, plan.shared,
            gradient.data_ptr(), codes.data_ptr(), codebook.data_ptr(), pointer(scale_in), pointer(scale_out),
            partial.data_ptr(), sums_in.data_ptr(), sums_out.data_ptr(),
            strip.row, strip.rows, strip.share, strip.pieces, strip.block, case.in_features,
            out_features, case.num_groups, codes.shape[1], case.num_clusters, DTYPES[codebook.dtype], kind(scale_in),
            kind(scale_out), case.num_blocks, strip.add,
        )  # fmt: skip
        if strip.last:
            torch.sum(partial, 1, out=total[strip.block : strip.block + strip.blocks])
            if scale_out is not None:
                total_out += sums_out.sum(0)
    grad_codebook = total.transpose(1, 2).contiguous()
    return grad_codebook, sums_in.sum(1) if scale_in is not None else sums_in.view(0), total_out


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right in fp32, whatever their dtype."""
    with torch.autocast("cuda", enabled=False):
        if left.dtype == torch.float32:
            return left @ right
        return torch.mm(left, right, out_dtype=torch.float32)
