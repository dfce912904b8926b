"""Loss and size of a causal language model, the same way for dense, compressed and adapted models."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..linear import all_bits, dense_bits
from ..modes import evaluating
from ..progress import Progress

__all__ = ["Evaluation", "evaluate", "true_bits"]


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of a text.

    loss: mean, in nats per predicted token. perplexity: its exponential. tokens: predicted ones. true_bits: per
    weight of the linear layers, and all_bits: with embeddings, head, norms and biases. bits_per_byte: the loss in bits
    per byte of UTF-8, which models with different tokenizers share; None without a tokenizer. kl: Kullback-Leibler
    divergence from the teacher to the model, mean in nats per token, and agreement: the share of tokens that both hold
    to be the likeliest; None without a teacher.
    """

    loss: float
    perplexity: float
    tokens: int
    true_bits: float
    all_bits: float
    bits_per_byte: float | None = None
    kl: float | None = None
    agreement: float | None = None


def evaluate(
    model: Any, windows: list[torch.Tensor], progress: bool = False, *, tokenizer: Any = None, teacher: Any = None
) -> Evaluation:
    """Mean next-token loss over windows [1, length], each on its own (`token_windows` makes them).

    Args:
        model: A causal language model; a PEFT model is evaluated with its active adapter.
        windows (`list[torch.Tensor]`): Tokens, int64.
        progress (`bool`): Show how far it is: a bar in a terminal, a line now and then in a log.
        tokenizer (*optional*): Of the model, to count bytes of text.
        teacher (*optional*): Causal language model to hold it against, mostly the dense one.

    Raises:
        ValueError: If the teacher's vocabulary has another size.
    """
    device = next(model.parameters()).device
    total = divergence = 0.0
    tokens = agreed = size = 0
    bar = Progress("Evaluating", len(windows), unit="window", shown=progress)
    with torch.no_grad(), evaluating(model), bar:
        for number, window in enumerate(windows, 1):
            predicted = window[0, 1:].to(device)
            logits = _logits(model, window)
            total += float(F.cross_entropy(logits, predicted, reduction="sum"))
            tokens += len(predicted)
            if tokenizer is not None:
                text = tokenizer.decode(predicted, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                size += len(text.encode())
            if teacher is not None:
                wanted = _logits(teacher, window).to(device)
                if wanted.shape != logits.shape:
                    raise ValueError(
                        f"the teacher predicts {wanted.shape[1]} tokens, the model {logits.shape[1]}; give the dense "
                        "model that it was made of."
                    )
                agreed += int((wanted.argmax(-1) == logits.argmax(-1)).sum())
                wanted, logits = wanted.log_softmax(-1), logits.log_softmax(-1)
                divergence += float(F.kl_div(logits, wanted, reduction="sum", log_target=True))
            bar.advance()
            bar.step(f"window {number} of {len(windows)}, loss so far {total / tokens:.4f}")
    loss = total / tokens
    bytes_of_all, weights_of_all = all_bits(model)
    return Evaluation(
        loss,
        math.exp(min(loss, 700)),
        tokens,
        true_bits(model),
        8 * bytes_of_all / max(weights_of_all, 1),
        bits_per_byte=total / math.log(2) / size if size else None,
        kl=None if teacher is None else divergence / tokens,
        agreement=None if teacher is None else agreed / tokens,
    )


def _logits(model: Any, window: torch.Tensor) -> torch.Tensor:
    """[length - 1, vocabulary] fp32: what is predicted for all tokens but the first."""
    place = next(model.parameters()).device
    return model(input_ids=window.to(place), use_cache=False).logits[0, :-1].float()


def true_bits(model: nn.Module) -> float:
    """True bits per weight of a model's linear layers, with active ClusComp adapters as they are after merging."""
    total_bytes, weights = dense_bits(model)
    return 8 * total_bytes / weights if weights else 0.0
