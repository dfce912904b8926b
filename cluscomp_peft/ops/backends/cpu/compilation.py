"""Whether there are compiled kernels, and the way back to the reference where there are not.

A function under `with_kernels` asks `compiled()` for the kernels, and leaves the work to the reference where that
gives None. If a kernel cannot be compiled half-way, the function is called once more, and gets None then.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from ....failures import in_words

__all__ = ["compiled", "with_kernels"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


class KernelsFailed(Exception):
    """A kernel could not be compiled: from now on [`compiled`] gives None."""


def compiled() -> Any:
    """The names of `kernels.py`; None without numba, and from the moment when one of them could not be compiled.

    A function of it that fails raises `KernelsFailed`, which [`with_kernels`] catches.
    """
    return None if _failed else _kernels()


@functools.cache
def _kernels() -> Any:
    try:
        if importlib.util.find_spec("numba") is None:
            return None
        from . import kernels
    except MemoryError:
        raise
    except Exception as error:
        _give_up(error)
        return None
    return _Guarded(kernels)


class _Guarded:
    """A module whose functions raise nothing but `KernelsFailed` and `MemoryError`.

    They compile when they are called, and anything may go wrong there: a broken numba, a machine that LLVM does not
    know.
    """

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if callable(value) and not isinstance(value, type):
            value = self._guard(value)
        setattr(self, name, value)
        return value

    def _guard(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            try:
                return function(*args)
            except MemoryError:
                raise
            except Exception as error:
                _give_up(error)
                raise KernelsFailed from error

        return call


_failed: list[str] = []


def _give_up(error: Exception) -> None:
    if not _failed:
        why, cure = in_words(error, "Reinstall numba and llvmlite")
        warnings.warn(
            f"the CPU kernels cannot be compiled ({why}); plain torch does their work, several times slower. {cure}, "
            "or remove numba to be spared this message.",
            stacklevel=2,
        )
    _failed.append(str(error))


def with_kernels(function: _Function) -> _Function:
    """The function, called a second time, now without kernels, if one could not be compiled the first time."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        try:
            return function(*args)
        except KernelsFailed:
            return function(*args)

    return call  # type: ignore[return-value]
