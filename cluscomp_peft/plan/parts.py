"""What a forecast is made of: parts, bytes of one kind, and jobs, which are lists of them."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BACKWARD", "GIB", "LOSS", "Job", "Part"]

GIB = 1 << 30
BACKWARD, LOSS = "a block goes back", "loss"  # the moments of a training step that may be its peak


@dataclass(frozen=True)
class Part:
    """Bytes of one kind. Parts of different moments are never in memory together; None is always there."""

    name: str
    bytes: int
    moment: str | None = None


@dataclass(frozen=True)
class Job:
    """What one job holds at its peak."""

    name: str
    parts: tuple[Part, ...]

    @property
    def peak(self) -> str | None:
        """The moment that takes the most."""
        moments: dict[str, int] = {}
        for part in self.parts:
            if part.moment is not None:
                moments[part.moment] = moments.get(part.moment, 0) + part.bytes
        return max(moments, key=lambda moment: moments[moment], default=None)

    @property
    def total(self) -> int:
        """Bytes at that moment."""
        return sum(part.bytes for part in self.parts if part.moment in (None, self.peak))
