"""Loss and size of a causal language model, the same way for dense, compressed and adapted models."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from ..linear import dense_bits

__all__ = ["Evaluation", "evaluate", "true_bits"]


@dataclass(frozen=True)
class Evaluation:
    """Mean loss in nats per predicted token, its exponential, the tokens predicted, and true bits per weight."""

    loss: float
    perplexity: float
    tokens: int
    true_bits: float


def evaluate(model: Any, windows: list[torch.Tensor], progress: bool = False) -> Evaluation:
    """Mean next-token loss over windows [1, length], each on its own (`token_windows` makes them).

    Args:
        model: A causal language model; a PEFT model is evaluated with its active adapter.
        windows (`list[torch.Tensor]`): Tokens, int64.
        progress (`bool`): Show a bar where a terminal watches.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    with torch.no_grad():
        for window in tqdm(windows, desc="Evaluating", unit="window", disable=None if progress else True):
            window = window.to(device)
            logits = model(input_ids=window, use_cache=False).logits[0, :-1].float()
            total += float(F.cross_entropy(logits, window[0, 1:], reduction="sum"))
            tokens += window.shape[1] - 1
    model.train(was_training)
    loss = total / tokens
    return Evaluation(loss, math.exp(min(loss, 700)), tokens, true_bits(model))


def true_bits(model: nn.Module) -> float:
    """True bits per weight of a model's linear layers, with active ClusComp adapters as they are after merging."""
    total_bytes, weights = dense_bits(model)
    return 8 * total_bytes / weights if weights else 0.0
