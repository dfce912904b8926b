"""Ctrl-C that is not lost, nor ends the process half-way through an import.

torch and Triton initialise libraries in C++ while they are imported, where an exception of Python's ends the process
or is passed over. Until an import is over the signal waits; everywhere else it is raised at once, as always.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["wait_for_imports"]

_AGAIN = 0.1  # seconds
_IMPORTING = "<frozen importlib._bootstrap>"


@contextmanager
def wait_for_imports() -> Iterator[None]:
    """Ctrl-C is raised as soon as nothing is being imported. Does nothing outside of the main thread, or where signals
    are handled in another way already."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _handle(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename == _IMPORTING:
            again = threading.Timer(_AGAIN, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
            return
        frame = frame.f_back
    raise KeyboardInterrupt
