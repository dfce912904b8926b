"""How much of a model's linear weights is clustered, and what stays dense, by name, share and reason.

linear weights: 5,832 of 8,640 clustered (67.5 %); dense: visual.merger.mlp.* 32.1 % (outside the blocks),
lm_head 0.4 % (output head)
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from torch import nn

from .targets import linear_weights

__all__ = ["coverage_line"]

_SHOWN = 6  # groups of layers; the largest


def coverage_line(
    model: nn.Module,
    chosen: Collection[str],
    *,
    excluded: Collection[str] = (),
    reasons: Mapping[str, str] | None = None,
    done: str = "clustered",
    rest: str = "dense",
) -> str:
    """One line about all linear weights of a model.

    Args:
        model (`nn.Module`): Dense or clustered, with or without adapters; on any device.
        chosen: Names of the layers that are clustered.
        excluded: Names of layers that the user left out.
        reasons (*optional*): Why further layers are left out, by name.
        done (`str`): What the chosen ones are. rest (`str`): What the others are.
    """
    total = covered = 0
    groups: dict[tuple[str, str], int] = {}
    for weight in linear_weights(model):
        name = weight.name.removesuffix(".base_layer")
        total += weight.weights
        if name in chosen:
            covered += weight.weights
        elif weight.weights:
            reason = weight.reason or (reasons or {}).get(name) or "not in target_modules"
            reason = "in exclude_modules" if name in excluded else reason
            key = (re.sub(r"(?<=\.)\d+(?=\.)", "*", name), reason)
            groups[key] = groups.get(key, 0) + weight.weights
    line = f"linear weights: {covered:,} of {total:,} {done} ({_share(covered, total)})"
    if not groups:
        return line
    largest = sorted(groups.items(), key=lambda item: -item[1])
    words = [f"{name} {_share(size, total)} ({reason})" for (name, reason), size in largest[:_SHOWN]]
    if len(largest) > _SHOWN:
        left = sum(size for _, size in largest[_SHOWN:])
        words.append(f"and {len(largest) - _SHOWN} more {_share(left, total)}")
    return f"{line}; {rest}: {', '.join(words)}"


def _share(part: int, total: int) -> str:
    return f"{100 * part / max(total, 1):.1f} %"
