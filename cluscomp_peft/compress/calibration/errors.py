"""Why a model cannot be calibrated."""

from __future__ import annotations

__all__ = ["CannotCalibrate"]


class CannotCalibrate(ValueError):
    """Text cannot calibrate this model: its class, its blocks or its tokenizer are such that it does not work.

    Args:
        reason (`str`): What is the matter, without a full stop.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}; compress it with --calibration none.")
        self.reason = reason
