"""What a forecast is made of: a part is bytes of one kind, a job is a list of parts."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BACKWARD", "GIB", "LOSS", "Job", "Part"]

GIB = 1 << 30
BACKWARD, LOSS = "a block goes back", "loss"  # the moments of a training step that may be its peak


@dataclass(frozen=True)
class Part:
    """Bytes of one kind. `moment` says when they are held, None all the time; two moments never overlap."""

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
        """The moment that takes the most; None if no part belongs to one."""
        moments: dict[str, int] = {}
        for part in self.parts:
            if part.moment is not None:
                moments[part.moment] = moments.get(part.moment, 0) + part.bytes
        return max(moments, key=lambda moment: moments[moment], default=None)

    @property
    def total(self) -> int:
        """Bytes at the peak: of the parts of that moment, and of those that are always held."""
        return sum(part.bytes for part in self.parts if part.moment in (None, self.peak))
