"""numba's compiler, with a cache on disk that is keyed by what the machine code was made from.

numba keeps the code of a function until the file that defines that function changes. What is compiled into it from
other files (inlined functions, loops written as LLVM instructions) may change meanwhile, and users who update would go
on with the old code. Here every file name of the cache carries a digest of all sources of the function's package, and
of the version of LLVM.

A cache only saves time: where there is no place for one (a read-only installation), where it cannot be written (a full
disk) or read (files that were cut off or changed), functions are compiled without it.

Only modules whose functions are compiled import this one; importing it needs numba.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core import sigutils
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.ccallback import CFunc

__all__ = ["callback", "njit"]


def njit(**options: Any) -> Callable[[Callable], Any]:
    """`numba.njit(**options)` with the cache of this module."""

    def decorate(function: Callable) -> Any:
        compiled = numba.njit(**options)(function)
        _keep(compiled, function)
        return compiled

    return decorate


def callback(signature: Any, function: Callable, **options: Any) -> int:
    """The address of a function compiled for C, as `numba.cfunc(signature, **options)` does, with the cache of this
    module. The code lives as long as the process."""
    compiled = CFunc(function, sigutils.normalize_signature(signature), locals={}, options=options)
    _keep(compiled, function)
    compiled.compile()
    _compiled.append(compiled)
    address = compiled.address
    assert address is not None  # it has been compiled
    return address


_compiled: list[CFunc] = []


def _keep(compiled: Any, function: Callable) -> None:
    with suppress(Exception):  # no place that can be written
        compiled._cache = _Cache(function)


@functools.cache
def _digest(folder: Path) -> str:
    """Of all that the code of functions in the modules of a folder may come from."""
    found = hashlib.sha256(f"llvmlite {llvmlite.__version__}".encode())
    for path in (Path(__file__), *sorted(folder.glob("*.py"))):
        source = path.read_bytes()
        found.update(f"\n{path.name} {len(source)}\n".encode() + source)
    return found.hexdigest()


class _Cache(FunctionCache):
    def __init__(self, function: Callable) -> None:
        super().__init__(function)
        digest = _digest(Path(inspect.getfile(function)).parent)
        self._cache_file = _Files(self._cache_path, f"{self._impl.filename_base}-{digest[:16]}", digest)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:
            with suppress(Exception):
                self.flush()  # so that what is compiled now can be saved
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(Exception):
            super().save_overload(sig, data)


class _Files(IndexDataCacheFile):
    """Each file of code begins with its checksum: damaged code must not run."""

    def _save_data(self, name: str, data: Any) -> None:
        content = self._dump(data)
        with self._open_for_write(self._data_path(name)) as file:
            file.write(hashlib.sha256(content).digest() + content)

    def _load_data(self, name: str) -> Any:
        content = Path(self._data_path(name)).read_bytes()
        if hashlib.sha256(content[32:]).digest() != content[:32]:
            raise ValueError(f"{name} is damaged")
        return pickle.loads(content[32:])
