"""What the output head is given: the second moments of the last hidden states, by which its codes are chosen.

An error of the head goes straight into the logits, and a few channels of what it is given are far larger than the
others. On SmolLM2-135M, at 4 bits, nearly all that clustered embeddings cost is the head's part.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from .blocks import BlockModel

__all__ = ["head_moments"]


@torch.no_grad()
def head_moments(model: BlockModel, windows: Sequence[torch.Tensor]) -> torch.Tensor:
    """E[x xᵀ] [hidden, hidden] fp32 of the inputs x of the output head, in the dense model.

    Args:
        model ([`BlockModel`]): Dense, with an output head.
        windows: Batches of tokens [batch, length].

    Raises:
        ValueError: If the hidden states are NaN or infinite.
    """
    hidden = [model.stem(tokens) for tokens in windows]
    for index in range(len(model)):
        with model.loaded(index):
            hidden = [model.run(index, part) for part in hidden]
    head: nn.Module = model.model.get_output_embeddings()
    total, count = torch.zeros(()), 0

    def note(_: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal total, count
        x = args[0].flatten(0, -2).float()
        total, count = total.to(x.device) + x.t() @ x, count + len(x)
        raise _Enough  # logits are large, and nobody wants them

    handle = head.register_forward_pre_hook(note)
    try:
        for tokens, part in zip(windows, hidden, strict=True):
            with suppress(_Enough):
                model.logits(tokens, part)
    finally:
        handle.remove()
    if not bool(torch.isfinite(total).all()):
        raise ValueError(
            "the last hidden states are NaN or infinite on the calibration text: the model's weights are damaged, or "
            "its dtype is too narrow for it. Compress it with --dtype float32, or calibrate on other text."
        )
    return total / max(count, 1)


class _Enough(Exception):
    """Ends a pass whose rest is of no use."""
