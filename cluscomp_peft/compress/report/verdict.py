"""What a compression came to, in a few lines for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["A_LOT", "judge", "verdict"]

A_LOT = 0.3  # nats per token above dense: a perplexity that is a third higher


def verdict(summary: Mapping[str, Any], losses: Mapping[str, float], folder: str) -> tuple[list[str], list[str]]:
    """Lines about sizes and losses, and lines that warn.

    Args:
        summary: Of the report.
        losses: Of the dense and the compressed model on held-out calibration text; empty where not measured.
        folder (`str`): What was written.
    """
    dense_bytes = summary["bytes"] - summary["clustered_bytes"]
    what = "embeddings" if summary.get("embedding_bits") is None else "norms"
    size = (
        f"weight files {summary['source_bytes'] / 1e6:.1f} → {summary['bytes'] / 1e6:.1f} MB, of which "
        f"{dense_bytes / 1e6:.1f} MB are {what} and whatever else stays dense"
    )
    lines, warnings = judge(losses, folder, summary["source"], summary["not_calibrated"], summary.get("evaluation"))
    return [size, *lines], warnings


def judge(
    losses: Mapping[str, float],
    folder: str,
    source: str,
    not_calibrated: str | None,
    evaluation: Mapping[str, Any] | None = None,
) -> tuple[list[str], list[str]]:
    """What the model lost, in lines; and lines that warn: much, or nobody knows.

    Args:
        losses: As for [`verdict`].
        folder, source (`str`): The compressed and the dense model.
        not_calibrated (`str`, *optional*): Why no text calibrated it, although some should have.
        evaluation (*optional*): Of a text of the user's (`--eval`); where there is one, it judges.
    """
    lines, warnings, lost = [], [], []
    for measured, text in ((evaluation or {}, _text_of(evaluation)), (losses, "held-out calibration text")):
        if {"dense", "compressed"} <= measured.keys():
            dense, compressed = measured["dense"], measured["compressed"]
            lost.append(compressed - dense)
            lines.append(
                f"loss on {text}: {compressed:.4f} nats per token, dense {dense:.4f} (perplexity "
                f"{_perplexity(compressed):.2f}, dense {_perplexity(dense):.2f})"
            )
    if lost and lost[0] > A_LOT:
        warnings.append(
            f"The model lost {lost[0]:.2f} nats, which its answers will show. More bits lose less, and "
            "`cluscomp finetune recover` trains the codebooks to speak like the dense model again."
        )
    elif not lost:
        warnings.append(
            "What the model lost was not measured. This does: "
            f"cluscomp evaluate {folder} --teacher {source} --data TEXT"
        )
    if not_calibrated:
        warnings.append(f"Compressed without calibration text, which loses more: {not_calibrated}.")
    return lines, warnings


def _text_of(evaluation: Mapping[str, Any] | None) -> str:
    return f"{evaluation['text']} ({evaluation['tokens']:.0f} tokens)" if evaluation else ""


def _perplexity(loss: float) -> float:
    return math.exp(max(-700.0, min(loss, 700.0)))
