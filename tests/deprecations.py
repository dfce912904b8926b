"""Finds calls of this project into what other packages deprecate, by warnings or, as transformers does, by its log.

Most libraries warn from their own code, so a filter by module cannot tell a call of ours from one that PEFT makes of
transformers. The stack can: whoever called the package that warned is who has to change.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[1]
CATEGORIES = (DeprecationWarning, FutureWarning)
# TRL's configs have it as their default by its older name, whoever makes them. Triton's compiler makes nodes of
# Python's syntax trees in a way that 3.13 deprecates, in C, without a frame of its own.
THEIRS = (
    "`gradient_checkpointing` is deprecated",
    "`gradient_checkpointing_kwargs` is deprecated",
    "AnnAssign.__init__ missing",
)
LOGGERS = ("accelerate", "peft", "transformers", "trl")

calls: list[str] = []  # found since the last check


def listen() -> None:
    """Notes from now on, in `calls`, what is deprecated and called from here, every time; other packages' own calls of
    what is deprecated are dropped. Ends with the innermost `warnings.catch_warnings`."""
    for category in CATEGORIES:
        warnings.simplefilter("always", category)
    if warnings.showwarning is not _show:
        _show.others = warnings.showwarning
        warnings.showwarning = _show
    for name in LOGGERS:
        if _listener not in logging.getLogger(name).handlers:
            logging.getLogger(name).addHandler(_listener)


def check() -> None:
    """Raises an AssertionError with what was found since the last check."""
    found = "\n".join(calls)
    calls.clear()
    assert not found, found


def _note(message: object) -> None:
    if str(message).startswith(THEIRS):
        return
    frame = _caller(sys._getframe(2))
    if frame is not None:
        path = Path(frame.f_code.co_filename).relative_to(ROOT)
        calls.append(f"{path}:{frame.f_lineno} calls what is deprecated: {message}")


def _caller(frame: FrameType | None) -> FrameType | None:
    """The frame of this project that called the package which warned, None if another package did. torch, which runs
    other packages' modules and wraps their functions, calls nobody of its own accord."""
    warned = None
    while frame is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and "site-packages" not in path.parts:
            return frame
        if package == "_pytest":  # `pytest.warns` gives back what it did not expect, without the stack of who called
            return None
        if package not in sys.stdlib_module_names:
            if warned is None:
                warned = package
            elif package not in (warned, "torch"):
                return None
        frame = frame.f_back
    return None


def _show(message, category, filename, lineno, file=None, line=None) -> None:
    if issubclass(category, CATEGORIES):
        _note(message)
    else:
        _show.others(message, category, filename, lineno, file, line)


class _Listener(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if "deprecat" in record.getMessage().lower():
            _note(record.getMessage())


_listener = _Listener(logging.WARNING)
