"""Grids of cases of which a share runs in the quick suite, and all of them with `-m slow` as well.

    @grid(dim=quick(range(1, 17), 1, 4, 6, 13))                 four dimensions are quick, twelve are slow
    @grid(case=CASES, dtype=DTYPES, count=[1, 2, 5, 16])        every value of each is in a quick case
    @grid(pairs=True, engine=[…], kind=[…], bias=[…])           every two values that can meet do so in a quick case

The share is chosen by a rule, not by chance: in the order of the product, whichever case has most that is new.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import combinations, product
from typing import Any, NamedTuple

import pytest

__all__ = ["grid", "quick"]


class Values(NamedTuple):
    every: Mapping[str | None, Any] | list[Any]
    quick: tuple[Any, ...]


def quick(every: Iterable[Any] | Mapping[str, Any], *named: Any) -> Values:
    """The values of an argument, of which only the named ones are in quick cases; of a mapping, names are keys."""
    values = Values(every if isinstance(every, Mapping) else list(every), named)
    absent = [one for one in named if one not in values.every]
    if absent or not named:
        raise ValueError(f"{absent or 'nothing'} of {list(values.every)} cannot be the quick share")
    return values


def grid(
    pairs: bool = False, indirect: bool = False, **arguments: Iterable[Any] | Mapping[str, Any] | Values
) -> Callable:
    """Parametrises a test by the product of its arguments; cases outside of the covering share are slow ones.

    Args:
        pairs: Whether each pair of values of two arguments is in a quick case, instead of each value.
        indirect: Whether they are parameters of fixtures, as in `pytest.mark.parametrize`.
        arguments: Their values, as a sequence, as a mapping from ids, or as [`quick`] has them.
    """
    axes = [_axis(values) for values in arguments.values()]
    cases = list(product(*axes))
    size = min(2 if pairs else 1, len(axes))

    def holds(case: tuple) -> set[tuple]:
        return set(combinations([(place, one.key) for place, one in enumerate(case)], size))

    candidates = [case for case in cases if all(one.quick for one in case)]
    missing, chosen = set().union(*map(holds, candidates)), set()
    while missing:
        best = max(candidates, key=lambda case: len(holds(case) & missing))  # the first of them
        missing -= holds(best)
        chosen.add(tuple(one.key for one in best))
    return pytest.mark.parametrize(
        tuple(arguments),
        [
            pytest.param(
                *(one.value for one in case),
                id="-".join(one.name for one in case) if all(one.name for one in case) else None,
                marks=[] if tuple(one.key for one in case) in chosen else [pytest.mark.slow],
            )
            for case in cases
        ],
        indirect=indirect,
    )


class _One(NamedTuple):
    key: int
    value: Any
    name: str | None
    quick: bool


def _axis(given: Iterable[Any] | Mapping[str, Any] | Values) -> list[_One]:
    if not isinstance(given, Values):
        given = Values(given if isinstance(given, Mapping) else list(given), ())
    names = isinstance(given.every, Mapping)
    return [
        _One(
            number,
            given.every[one] if names else one,
            one if names else _name(one),
            not given.quick or one in given.quick,
        )
        for number, one in enumerate(given.every)
    ]


def _name(value: Any) -> str | None:
    """As pytest names it, where the name needs no argument of the test."""
    if value is None or isinstance(value, str | int | float):
        return str(value)
    name = getattr(value, "__name__", None)
    return name if isinstance(name, str) else str(value) if str(value).startswith("torch.") else None
