"""What compressed models are held against: round to nearest, NF4, HQQ and GPTQ, for the other scripts.

Each function takes a dense transformers model and puts the dequantised weights of a method into the linear layers of
its blocks, in place, so that the model is evaluated like any other. It returns the model and true bits per weight:
8 · bytes / weights over these layers, with codes packed without gaps, as many bits as they need, and scales and zeros
in the precision in which they are stored and in which they have been rounded.

    round_to_nearest    fp16 scale and fp16 minimum of each block: b + 32 / block, or b + (16 + b) / block with
                        zero="packed", an integer of b bits
    nf4                 bitsandbytes' own: 4 + 32 / block; double=True quantises the fp32 absmax: 4.127 at block 64
    hqq                 the library's own quantiser, fp16 scale and zero: b + 32 / block. The library itself packs ten
                        3-bit codes into 32 bits, which would be 3.2 instead of 3
    gptq                written here: b + (16 + b) / block

Tables that belong to a format (NF4's 16 values) count for nobody. bitsandbytes is among the requirements for training;
HQQ needs `DISABLE_CUDA=1 pip install hqq`, which keeps its installer from compiling kernels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from cluscomp_peft.compress.budget.targets import dense_linears
from cluscomp_peft.dense import weight_of
from cluscomp_peft.modes import evaluating

ZEROS = ("fp16", "packed")


def round_to_nearest(model: Any, bits: int, block: int = 64, zero: str = "fp16") -> tuple[Any, float]:
    """The model with every block of `block` inputs of a row rounded between its minimum and maximum; true bits.

    Args:
        zero (`str`): "fp16" stores the minimum, "packed" an integer of `bits` bits, which makes the range include 0.
    """

    def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, int]:
        in_features = weight.shape[1]
        # A last block that is shorter repeats its last input, which changes neither minimum nor maximum.
        missing = -in_features % block
        blocks = torch.cat([weight, weight[:, -1:].expand(-1, missing)], 1).unflatten(1, (-1, block))
        scale, offset = _fit(blocks, bits, zero)
        rounded = _round(blocks, scale[..., None], offset[..., None], bits).flatten(1)[:, :in_features]
        return rounded, _stored_bits(weight, bits, block, zero)

    return _quantise_all(model, quantise)


def nf4(model: Any, block: int = 64, double: bool = False) -> tuple[Any, float]:
    """The model in bitsandbytes' NF4, with the scales quantised as well if `double`; true bits."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, int]:
        # As one row: on a CPU bitsandbytes 0.50 gives back wrong scales where a row is no multiple of the block.
        codes, state = quantize_4bit(weight.reshape(-1), blocksize=block, compress_statistics=double, quant_type="nf4")
        stored = [codes, state.absmax] + ([state.state2.absmax, state.offset] if double else [])
        size = 8 * sum(part.numel() * part.element_size() for part in stored)
        return dequantize_4bit(codes, state).reshape(weight.shape), size

    return _quantise_all(model, quantise)


def hqq(model: Any, bits: int, group: int = 64, axis: int = 1) -> tuple[Any, float]:
    """The model after half-quadratic quantisation (https://mobiusml.github.io/hqq_blog) with its library; true bits.

    Args:
        axis (`int`): 1 makes groups of inputs, which its fast kernels expect; 0 groups of outputs. Groups run on
            into the next row where a row is no multiple of `group`; a matrix has to be one.
    """
    try:
        from hqq.core.quantize import Quantizer
    except ImportError as error:
        raise ImportError(
            "hqq is not installed; `DISABLE_CUDA=1 pip install hqq`, or leave the method out."
        ) from error

    def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, int]:
        codes, meta = Quantizer.quantize(
            weight, nbits=bits, group_size=group, axis=axis, device=str(weight.device), bitpack=False
        )
        scale, zero = meta["scale"].half().float(), meta["zero"].half().float()
        stored = 8 * (_bytes(weight.numel(), bits) + 2 * (scale.numel() + zero.numel()))
        return ((codes.float() - zero) * scale).reshape(weight.shape), stored

    return _quantise_all(model, quantise)


def gptq(
    model: Any,
    bits: int,
    block: int,
    windows: list[torch.Tensor],
    act_order: bool = False,
    damping: float = 0.01,
    zero: str = "packed",
) -> tuple[Any, float]:
    """The model after GPTQ (arXiv 2210.17323), our own short implementation; true bits.

    The libraries that have it pin older or newer versions of torch and transformers than this project runs on. In an
    environment of its own llm-compressor 0.14 came to the same losses on a small Llama, 0.02 to 0.002 nats worse.

    Layers are quantised in the order of computation with the full Hessian of their inputs, which come from layers that
    are quantised already, inside a block as well ("true sequential").

    Args:
        windows (`list[torch.Tensor]`): Tokens [1, length] for calibration.
        act_order (`bool`): Inputs of large second moment first. Scales are then fitted before any error is fed back
            ("static groups"), so that no order has to be stored and the true bits stay the same.
        damping (`float`): Share of the Hessian's mean diagonal that is added to its diagonal.
        zero (`str`): As in `round_to_nearest`; "packed" is how GPTQ checkpoints store it.

    Raises:
        ValueError: If linear layers lie outside the model's list of blocks.
    """
    names = {id(layer): name for name, layer in dense_linears(model)}
    blocks = next(
        part
        for part in model.modules()
        if isinstance(part, nn.ModuleList) and any(id(m) in names for m in part.modules())
    )
    outside = set(names) - {id(layer) for layer in blocks.modules()}
    if outside:
        raise ValueError(f"gptq goes from block to block, and {names[outside.pop()]} lies outside of the first list.")
    stored, weights = 0, sum(layer.weight.numel() for _, layer in dense_linears(model))
    with torch.no_grad(), evaluating(model):
        states, calls = _record_calls(model, blocks, windows)
        for part, contexts in zip(tqdm(blocks, desc="GPTQ", unit="block", disable=None), calls, strict=True):
            waiting = [layer for layer in part.modules() if id(layer) in names]
            while waiting:
                ready, hessian = _next_hessian(part, waiting, states, contexts)
                for layer in ready:
                    weight = weight_of(layer)
                    weight.copy_(gptq_matrix(weight.float(), hessian, bits, block, act_order, damping, zero))
                    stored += _stored_bits(weight, bits, block, zero)
                waiting = [layer for layer in waiting if layer not in ready]
            states = [_run(part, state, context) for state, context in zip(states, contexts, strict=True)]
    return model, stored / weights


@torch.no_grad()
def gptq_matrix(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    bits: int,
    block: int,
    act_order: bool = False,
    damping: float = 0.01,
    zero: str = "packed",
) -> torch.Tensor:
    """GPTQ of one matrix [out, in], given sum x xᵀ of its inputs [in, in]; returns the dequantised matrix."""
    weight, hessian = weight.clone(), hessian.to(torch.float64, copy=True)
    in_features = weight.shape[1]
    diagonal = hessian.diagonal()  # a view
    dead = diagonal == 0
    diagonal[dead] = 1
    weight[:, dead] = 0
    order = diagonal.argsort(descending=True) if act_order else torch.arange(in_features, device=weight.device)
    diagonal += damping * diagonal.mean()
    hessian = hessian[order][:, order]
    # The upper triangular U of H⁻¹ = Uᵀ U: row i holds what rounding input i does to the inputs behind it.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    fits = [_fit(part, bits, zero) for part in weight.split(block, 1)] if act_order else []
    weight = weight[:, order]
    for start in range(0, in_features, block):
        stop = min(start + block, in_features)
        part, corner = weight[:, start:stop], factor[start:stop, start:stop]
        errors = torch.empty_like(part)
        here = None if act_order else _fit(part, bits, zero)  # after the errors of all blocks before were fed into it
        for i, column in enumerate(order[start:stop].tolist()):
            rounded = _round(part[:, i], *(here or fits[column // block]), bits)
            errors[:, i] = (part[:, i] - rounded) / corner[i, i]
            part[:, i:] -= errors[:, i : i + 1] * corner[i, i:]
            part[:, i] = rounded
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return weight[:, order.argsort()]


class _Enough(Exception):
    """Ends a forward pass whose rest is of no use."""


def _record_calls(model: Any, blocks: nn.ModuleList, windows: list[torch.Tensor]) -> tuple[list, list[list]]:
    """(hidden states that enter the first block, for each block all other arguments), for every window."""
    states: list[torch.Tensor] = []
    calls: list[list] = [[] for _ in blocks]

    def observe(number: int):
        def hook(part: nn.Module, args: tuple, kwargs: dict) -> None:
            if number == 0:
                states.append(args[0])
            calls[number].append((args[1:], kwargs))

        return hook

    handles = [part.register_forward_pre_hook(observe(i), with_kwargs=True) for i, part in enumerate(blocks)]
    device = next(model.parameters()).device
    try:
        for window in windows:
            model(input_ids=window.to(device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return states, calls


def _run(part: nn.Module, state: torch.Tensor, context: tuple[tuple, dict]) -> torch.Tensor:
    output = part(state, *context[0], **context[1])
    return output[0] if isinstance(output, tuple) else output


def _next_hessian(
    part: nn.Module, waiting: list[nn.Module], states: list[torch.Tensor], contexts: list
) -> tuple[set[nn.Module], torch.Tensor]:
    """The layers of a block that are computed first among those waiting, all that share one input (as q, k and v do),
    and sum x xᵀ of it over all tokens, fp64 [in, in]."""
    ready: set[nn.Module] = set()
    inputs: list[torch.Tensor] = []  # of the pass under way
    hessian: list[torch.Tensor] = []

    def observe(layer: nn.Module, args: tuple) -> None:
        if not inputs:
            inputs.append(args[0])
            x = args[0].flatten(0, -2).float()
            hessian[:] = [sum(hessian, (x.t() @ x).double())]
        elif args[0] is not inputs[0]:
            raise _Enough
        ready.add(layer)

    handles = [layer.register_forward_pre_hook(observe) for layer in waiting]
    try:
        for state, context in zip(states, contexts, strict=True):
            inputs.clear()
            with contextlib.suppress(_Enough):
                _run(part, state, context)
    finally:
        for handle in handles:
            handle.remove()
    if not ready:
        raise ValueError(f"{len(waiting)} linear layers get no input from the calibration text; give more of it.")
    return ready, hessian[0]


def _quantise_all(model: Any, quantise: Callable[[torch.Tensor], tuple[torch.Tensor, int]]) -> tuple[Any, float]:
    """Replaces every linear weight of the blocks by `quantise` of it, [out, in] in fp32; true bits per weight."""
    stored = weights = 0
    with torch.no_grad():
        for _, layer in dense_linears(model):
            weight = weight_of(layer)
            rounded, size = quantise(weight.float())
            weight.copy_(rounded)
            stored, weights = stored + size, weights + weight.numel()
    return model, stored / weights


def _fit(values: torch.Tensor, bits: int, zero: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, offset) over the last dimension, such that values are about scale · code + offset."""
    if zero not in ZEROS:
        raise ValueError(f"zero={zero!r}, should be one of {', '.join(ZEROS)}.")
    low, high = values.amin(-1), values.amax(-1)
    if zero == "packed":
        low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).half().float()
    scale = torch.where(scale > 0, scale, 1.0)
    if zero == "packed":
        return scale, -scale * (-low / scale).round().clamp(0, 2**bits - 1)
    return scale, low.half().float()


def _round(values: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, bits: int) -> torch.Tensor:
    return ((values - offset) / scale).round().clamp(0, 2**bits - 1) * scale + offset


def _stored_bits(weight: torch.Tensor, bits: int, block: int, zero: str) -> int:
    """Of a matrix in blocks of inputs: codes, an fp16 scale and a zero for each block."""
    out_features, in_features = weight.shape
    blocks = out_features * -(-in_features // block)
    return 8 * (_bytes(weight.numel(), bits) + 2 * blocks + _bytes(blocks, 16 if zero == "fp16" else bits))


def _bytes(count: int, bits: int) -> int:
    return -(-count * bits // 8)
