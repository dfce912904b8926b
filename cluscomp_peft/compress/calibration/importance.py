"""Which inputs of a layer count: E[x²] of its input channels, from one pass of the dense model over a little text.

For a model that is in memory as a whole and is clustered matrix by matrix. An error in a weight moves an output by as
much as the input is large, so K-means weighs it by E[x²]: the cheapest part of what calibration does. On
SmolLM2-135M-Instruct at 4.1 bits, with codebooks in fp16, it loses 0.20 nats on WikiText-2 (8,000 tokens) where
K-means without weights loses 0.56.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...modes import evaluating
from .errors import CannotCalibrate
from .inputs import watched
from .text import calibration_windows

__all__ = ["input_importance"]

_SEQUENCES, _LENGTH = 8, 256  # tokens of the pass: moments of single channels need few
_READ = 4096  # sequences of the text, of which those of the pass are spread evenly


def input_importance(
    model: Any, tokenizer: Any, source: str, layers: Mapping[str, nn.Module], text: str
) -> dict[str, torch.Tensor]:
    """E[x²] of the inputs of linear layers, name to [in] fp32; without those that no token reached.

    Args:
        model: Dense, that predicts next tokens; left as it was.
        tokenizer: Of the model, or None.
        source (`str`): What errors call the model.
        layers: Name to layer, inside the model.
        text (`str`): As in [`calibration_windows`].

    Raises:
        CannotCalibrate: If the tokenizer does not know the text, or the model cannot be run on it.
        ValueError: If the text cannot be read.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    windows = calibration_windows(model, tokenizer, source, text, _READ, min(_LENGTH, limit or _LENGTH))
    chosen = torch.linspace(0, len(windows) - 1, min(_SEQUENCES, len(windows))).round().long()
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def note(name: str, x: torch.Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1])
        sums[name] = sums.get(name, 0.0) + rows.float().square().sum(0)
        counts[name] = counts.get(name, 0) + len(rows)

    device = model.get_input_embeddings().weight.device
    with evaluating(model), watched(layers, note), torch.no_grad():
        for window in windows[chosen]:
            try:
                model(input_ids=window[None].to(device))
            except Exception as error:
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                raise CannotCalibrate(f"{source} cannot be run on text ({reason})") from error
    means = {name: total / max(1, counts[name]) for name, total in sums.items()}
    return {name: mean for name, mean in means.items() if bool(mean.isfinite().all()) and bool((mean > 0).any())}
