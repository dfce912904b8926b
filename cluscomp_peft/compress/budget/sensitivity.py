"""How much the loss minds an error in each matrix: one forward and one backward pass, block by block.

With g = ∂loss / ∂y of a layer's outputs y = W x, an error E of the weight raises the loss of a token by about

    ½ E[(gᵀ E x)²]  ≈  ½ Σ_oi E[g_o²] E[x_i²] E_oi²       (empirical Fisher, factorised; K-FAC, Martens & Grosse 2015)

so a matrix that is stored with the relative squared error D costs sensitivity · D with

    sensitivity = ½ Σ_oi E[g_o²] E[x_i²] W_oi²               nats per token

That holds for small errors only. Attention that is sure of itself has no slope, so the queries behind it seem to cost
nothing, and given next to no bits they ruin the model; [`with_floor`] keeps every matrix above a tenth of the mean.

An expert of a mixture costs that for the tokens that reach it, a share of all.

Inputs of all blocks are kept for the few sequences that this takes, then the blocks are passed in reverse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ...dense import is_dense_linear, weight_of
from ...expert_weights import Expert
from ..calibration.blocks import BlockModel

__all__ = ["measure_sensitivity", "with_floor"]

# Of the mean of all weights. On SmolLM2-135M the expected loss rises by 0.2 % at 2, 3.1 and 4.3 bits; a model of two
# blocks that lost 0.20 nats at 3 bits, because its queries got 2 clusters of 8 weights, loses 0.001.
_FLOOR = 0.1

_NOT_FINITE = (
    "the dense model's {} is NaN or infinite on the calibration text: its weights are damaged, or its dtype is too "
    "narrow for it. Compress it with --dtype float32, or calibrate on other text."
)


def measure_sensitivity(model: BlockModel, windows: Sequence[torch.Tensor]) -> dict[str, float]:
    """Sensitivity in nats per token of every dense linear layer inside the blocks, by its name.

    Args:
        model ([`BlockModel`]): Dense.
        windows: Batches of tokens [batch, length].

    Raises:
        ValueError: If the loss or its slope is NaN or infinite.
    """
    inputs: list[list[torch.Tensor]] = []
    with torch.no_grad():
        hidden = [model.stem(tokens) for tokens in windows]
        for index in range(len(model)):
            inputs.append([part.cpu() for part in hidden])
            with model.loaded(index):
                hidden = [model.run(index, part) for part in hidden]
    slopes = [_tail_slope(model, tokens, part) for tokens, part in zip(windows, hidden, strict=True)]
    result: dict[str, float] = {}
    passed = sum(tokens.numel() for tokens in windows)
    for index in reversed(range(len(model))):
        with model.loaded(index) as block:
            pass_back = _Observed(block)
            for number, part in enumerate(inputs.pop()):
                part = part.to(model.device).requires_grad_()
                with torch.enable_grad():
                    output = model.run(index, part)
                output.backward(slopes[number].to(output.dtype))
                assert part.grad is not None
                slopes[number] = part.grad
            for name, value in pass_back.close(passed).items():
                if not math.isfinite(value):
                    raise ValueError(_NOT_FINITE.format(f"slope at {model.name(index)}.{name}"))
                result[f"{model.name(index)}.{name}"] = value
    return result


def with_floor(sensitivity: Mapping[str, float], weights: Mapping[str, int]) -> dict[str, float]:
    """Sensitivities, each raised to at least a tenth of what a matrix of its size has on average.

    Args:
        sensitivity: Nats per token, by name.
        weights: Numbers of each matrix, by the same names.
    """
    least = _FLOOR * sum(sensitivity.values()) / max(1, sum(weights[name] for name in sensitivity))
    return {name: max(value, least * weights[name]) for name, value in sensitivity.items()}


def _tail_slope(model: BlockModel, tokens: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """∂(summed loss) / ∂(output of the last block)."""
    slopes = []
    for row in range(len(tokens)):  # one sequence at a time: logits are large
        part = hidden[row : row + 1].detach().requires_grad_()
        with torch.enable_grad():
            logits = model.logits(tokens[row : row + 1], part)[:, :-1].flatten(0, 1).float()
            loss = F.cross_entropy(logits, tokens[row, 1:].to(logits.device), reduction="sum")
        if not bool(torch.isfinite(loss)):
            raise ValueError(_NOT_FINITE.format("loss"))
        slopes.append(torch.autograd.grad(loss, part)[0])
    return torch.cat(slopes)


class _Observed:
    """Second moments of inputs and output slopes of the linear layers of a block."""

    def __init__(self, block: nn.Module) -> None:
        self._layers = {name: layer for name, layer in block.named_modules() if is_dense_linear(layer)}
        experts = [f"{name}." for name, module in block.named_modules() if isinstance(module, Expert)]
        self._of_experts = {name for name in self._layers if name.startswith(tuple(experts))}
        self._sums: dict[str, list[torch.Tensor]] = {}
        self._tokens = dict.fromkeys(self._layers, 0)
        self._handles = [
            layer.register_forward_hook(lambda layer, args, output, name=name: self._observe(name, args[0], output))
            for name, layer in self._layers.items()
        ]

    def _observe(self, name: str, x: torch.Tensor, output: torch.Tensor) -> None:
        if not output.requires_grad:
            return
        x = x.detach().flatten(0, -2).float()
        # Some models hand all tokens to every expert, most of them as zeros.
        self._tokens[name] += int((x != 0).any(1).sum()) if name in self._of_experts else len(x)
        self._add(name, 0, x)
        output.register_hook(lambda slope: self._add(name, 1, slope.detach().flatten(0, -2).float()))

    def _add(self, name: str, which: int, values: torch.Tensor) -> None:
        sums = self._sums.setdefault(name, [torch.zeros(()), torch.zeros(())])
        sums[which] = sums[which].to(values.device) + values.double().square().sum(0)

    def close(self, passed: int) -> dict[str, float]:
        """Sensitivities by name, where the block was given `passed` tokens."""
        for handle in self._handles:
            handle.remove()
        result = {}
        for name, (inputs, slopes) in self._sums.items():
            tokens = max(1, self._tokens[name])
            energy = weight_of(self._layers[name]).detach().double().square()
            result[name] = 0.5 * float(((slopes / tokens) @ energy) @ (inputs / tokens))
            if name in self._of_experts:
                result[name] *= tokens / passed
        return result
