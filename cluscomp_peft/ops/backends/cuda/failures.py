"""The way from a kernel that fails to a slower one.

Kernels are compiled when they are first called, on devices and by compilers of all versions, so NVRTC, Triton or the
driver may raise anything then. None of that should end a run that the reference could finish.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch

__all__ = ["TransientError", "attempt"]

_Result = TypeVar("_Result")
_failed: set[tuple[str, Hashable]] = set()
_warned: set[str] = set()


class TransientError(RuntimeError):
    """Something that the driver refuses now and may do another time."""


def attempt(kernel: str, case: Hashable, call: Callable[[], _Result]) -> _Result | None:
    """What `call()` returns; None if it raises, and without a try from then on for this kernel and case.

    The first failure of a kernel warns. Running out of memory is raised. What may work another time is tried again: a
    refusal of the moment (`TransientError`), and whatever happens while a CUDA graph is captured, which allows little.
    """
    if (kernel, case) in _failed:
        return None
    try:
        return call()
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        if not isinstance(error, TransientError) and not _captures():
            _failed.add((kernel, case))
        if kernel not in _warned:
            _warned.add(kernel)
            warnings.warn(
                f"the CUDA kernel {kernel!r} fails here ({type(error).__name__}: {error!s:.300}); a slower one takes "
                "its place. A matching pair of torch and Triton, or a newer one, may know the device.",
                stacklevel=2,
            )
        return None


def _captures() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
