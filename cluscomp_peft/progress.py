"""How far long work has come: a bar where a terminal watches, else lines in the log.

    Compressing: block 7 of 30 in 12.3 s, output error 0.0412; 23 % done, about 5 min left

What is left is estimated from what this run did itself: work of an earlier run that it goes on with took it no time.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm

__all__ = ["Progress", "Stages", "duration"]

_SELDOM = 30  # seconds between lines that nobody has asked for


def duration(seconds: float) -> str:
    """Seconds as people say them: "12.3 s", "5 min", "2.1 h"."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 20 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class Stages:
    """Seconds of work by the name of its stage, in `seconds`. A stage may come several times, none inside another."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What is done inside of this belongs to the stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


class Progress:
    """Work that is done in steps; a context manager.

    Args:
        what (`str`): What is done: "Compressing".
        total (`int`): All of it, in any unit. done (`int`): What an earlier run did of it.
        unit (`str`): Of the bar.
        shown (`bool`): Print anything.
        **options: Of tqdm.
    """

    def __init__(
        self, what: str, total: int, *, done: int = 0, unit: str = "it", shown: bool = True, **options: Any
    ) -> None:
        self.what, self.total, self.done, self.shown = what, total, done, shown
        self._before, self._started = done, time.perf_counter()
        self._told = self._started
        # disable=None: silent where nobody watches a terminal
        hidden = None if shown else True
        self._bar = tqdm(total=total, initial=done, desc=what, unit=unit, disable=hidden, **options)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def advance(self, amount: int = 1) -> None:
        """So much more of the total is done."""
        self.done += amount
        self._bar.update(amount)

    def step(self, words: str, always: bool = False) -> None:
        """A step is finished: a line about it where there is no bar, twice a minute at most, or `always`."""
        now = time.perf_counter()
        if not self.shown or not self._bar.disable or not (always or now - self._told > _SELDOM):
            return
        self._told = now
        own = self.done - self._before
        line = f"{self.what}: {words}; {100 * self.done / max(self.total, 1):.0f} % done"
        if 0 < own and self.done < self.total:
            line += f", about {duration((now - self._started) * (self.total - self.done) / own)} left"
        print(line, file=sys.stderr, flush=True)
