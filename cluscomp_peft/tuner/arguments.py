"""What a config says of an argument that it does not have: the one that is meant, beyond Python's bare TypeError."""

from __future__ import annotations

import difflib
import functools
from dataclasses import fields
from typing import Any, TypeVar

__all__ = ["explains_arguments"]

_Class = TypeVar("_Class", bound=type)
_OF_LORA = {
    "r": "give rank={value}, which trains about as many numbers as LoRA of r={value}",
    "lora_alpha": "leave it out: what is trained is in units for which the rates of LoRA are right (delta_scale)",
    "lora_dropout": "leave it out: deltas of codebooks have no dropout",
}


def explains_arguments(cls: _Class) -> _Class:
    """Decorates a dataclass: an argument that it does not have raises a TypeError that names the one to give instead,
    for those of LoRA by what they mean, for others by how they are spelled."""
    init = cls.__init__  # type: ignore[misc]
    known = [item.name for item in fields(cls)]

    @functools.wraps(init)
    def explained(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in kwargs.keys() - set(known):
            near = difflib.get_close_matches(name, known, n=1)
            cure = f"give {near[0]}=" if near else f"it has {', '.join(known)}"
            cure = _OF_LORA.get(name, cure).format(value=kwargs[name])
            # Python's words, by which PEFT tells arguments of later versions in a saved config, and leaves them out.
            raise TypeError(f"{cls.__name__} got an unexpected keyword argument {name}={kwargs[name]!r}; {cure}.")
        init(self, *args, **kwargs)

    cls.__init__ = explained  # type: ignore[misc]
    return cls
