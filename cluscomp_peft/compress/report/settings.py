"""What makes a compressed checkpoint again, and the bits of some of its matrices, as its report has them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ..calibration.text import NONE
from ..policy import Policy
from ..stream.calibrated import Calibration

__all__ = ["settings_of", "true_bits_of"]


def true_bits_of(matrices: Iterable[Mapping[str, Any]]) -> float | None:
    """True bits per weight of matrices that the journal describes; None without any."""
    entries = list(matrices)
    weights = sum(math.prod(entry["shape"]) for entry in entries)
    return 8 * sum(entry["bytes"] for entry in entries) / weights if weights else None


def settings_of(
    policy: Policy,
    dtype: str,
    text: str | None,
    given: Calibration | None,
    feedback: bool,
    epochs: int,
    evaluate: str | None,
) -> dict[str, Any]:
    """What makes this checkpoint again, by the names of the command's flags; arguments as of `compress_checkpoint`."""
    settings = {
        "bits": policy.bits if policy.size is None else None,
        "size": policy.size,
        **{name: getattr(policy, name) for name in ("group_size", "num_clusters", "scales", "embeddings")},
        **{name: getattr(policy, name) for name in ("codebook_dtype", "quality", "seed")},
        "dtype": dtype,
        "calibration": text or NONE,
    }
    if given is not None:
        samples, seqlen = given.windows.shape
        settings |= {"samples": samples, "seqlen": seqlen, "feedback": feedback, "epochs": epochs}
    settings["eval"] = evaluate
    return {name: value for name, value in settings.items() if value is not None}
