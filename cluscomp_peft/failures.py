"""What errors of other packages are about, where their words say something else."""

from __future__ import annotations

import errno

__all__ = ["in_words", "ran_out_of_memory"]

# What the loader of shared libraries, LLVM and torch say.
_SHORTAGE = ("cannot allocate memory", "can't allocate memory", "failed to map segment", "out of memory")


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, is about memory: llvmlite calls its library missing where the
    process may not map it."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        if isinstance(one, MemoryError) or (isinstance(one, OSError) and one.errno == errno.ENOMEM):
            return True
        if isinstance(one, (OSError, ImportError, RuntimeError)) and any(
            word in str(one).lower() for word in _SHORTAGE
        ):
            return True
        one = one.__cause__ or one.__context__
    return False


def in_words(error: BaseException, otherwise: str) -> tuple[str, str]:
    """What went wrong while code was compiled, and what to do: `otherwise`, or to raise the limit."""
    if ran_out_of_memory(error):
        return (
            "not enough memory to load or run the compiler",
            "Raise the limit of the process (ulimit -v, or that of the container)",
        )
    return f"{type(error).__name__}: {error}", otherwise
