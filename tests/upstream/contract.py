"""What a contract test is: one for each name of `cluscomp_peft.upstream`, which fails with what that name is for."""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

# (file of `cluscomp_peft.upstream`, name in it), of every contract test that has been imported.
HELD: set[tuple[str, str]] = set()


def contract(room: ModuleType, *names: str, says: str | None = None) -> Callable[[Callable], Callable]:
    """Makes a test hold names of a file of `cluscomp_peft.upstream`: whatever goes wrong in it, its failure names the
    library, its version, the name, and what breaks.

    Args:
        room: The file.
        names: What it exports.
        says (`str`, *optional*): What breaks, by default the docstring of the first name.
    """
    file = room.__name__.rpartition(".")[2]
    library = file.partition("_")[0]
    HELD.update((file, name) for name in names)
    text = says or inspect.getdoc(getattr(room, names[0]))

    def hold(test: Callable) -> Callable:
        @functools.wraps(test)
        def held(*args: Any, **kwargs: Any) -> None:
            try:
                test(*args, **kwargs)
            except Exception as error:
                raise AssertionError(
                    f"{library} {importlib.metadata.version(library)} is not as cluscomp_peft/upstream/{file}.py "
                    f"relies on: {', '.join(names)}.\n{text}\n{type(error).__name__}: {error}"
                ) from error

        return held

    return hold
