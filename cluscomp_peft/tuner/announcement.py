"""What a user is told when an adapter has been made."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterable

from torch import nn

from ..compress.budget.called import computed_with, handed_to_kernels
from ..compress.budget.coverage import coverage_line
from ..compress.policy import WITH_MOMENTS, WITHOUT_TEXT
from ..dense import is_dense_linear
from .clustering import Importance
from .config import ClusCompConfig

__all__ = ["announce"]


def announce(
    model: nn.Module,
    config: ClusCompConfig,
    names: Collection[str],
    replaced: Iterable[nn.Module],
    importance: Importance,
) -> None:
    """Says, once on a machine, which linear layers are adapted and why the others are not, and whether dense ones were
    clustered without calibration text.

    Args:
        model: With its adapter.
        config: Of the adapter.
        names: Of the layers that it adapts.
        replaced: The layers that stood in their places.
        importance ([`Importance`]): What they were clustered by.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    adapted = {name.removesuffix(".base_layer") for name in names}
    reasons = {**computed_with(model), **handed_to_kernels(model)}
    if config.base == "clustered" and any(is_dense_linear(layer) for layer in replaced):
        said = WITH_MOMENTS if importance.missing is None else f"{WITHOUT_TEXT} ({importance.missing})"
        print(said, file=sys.stderr)
    print(coverage_line(model, adapted, reasons=reasons, done="adapted", rest="not adapted"), file=sys.stderr)
