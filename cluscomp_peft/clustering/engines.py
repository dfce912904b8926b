"""Which compiled engines work here: those whose package is installed and that have not failed in this process."""

from __future__ import annotations

import importlib.util
import warnings

from ..failures import in_words

__all__ = ["COMPILED", "can_compile", "give_up", "installed"]

COMPILED = {"cpu": "numba", "cuda": "triton"}  # engine: the package that compiles it
_broken: set[str] = set()


def installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # a module without a spec stands in its place
        return False


def can_compile(engine: str) -> bool:
    return engine not in _broken and installed(COMPILED[engine])


def give_up(engine: str, error: Exception) -> None:
    """Marks an engine that failed, so that it is not chosen again in this process, and warns the first time."""
    if engine not in _broken:
        why, cure = in_words(error, f"Reinstall {COMPILED[engine]}")
        warnings.warn(
            f"K-means cannot use its compiled engine {engine!r} ({why}); plain torch does its work, many times "
            f"slower. {cure}, or choose engine='torch' to be spared this.",
            stacklevel=3,
        )
    _broken.add(engine)
