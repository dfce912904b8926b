"""Of a grid of cases a share is quick that covers it; the rest are slow, and none is lost."""

from __future__ import annotations

import pytest

from tests.grids import grid, quick


def shares(mark: pytest.MarkDecorator) -> tuple[list[tuple], list[tuple]]:
    """The values of quick cases, and of slow ones."""
    cases = mark.mark.args[1]
    return [case.values for case in cases if not case.marks], [case.values for case in cases if case.marks]


def test_every_value_is_in_a_quick_case_and_every_case_is_there():
    fast, slow = shares(grid(a=range(5), b="xyz", c=[True, False]))
    assert len(fast) == 5 and len(fast) + len(slow) == len({*fast, *slow}) == 30
    assert [set(column) for column in zip(*fast, strict=True)] == [set(range(5)), set("xyz"), {True, False}]


def test_pairs_are_covered_where_they_are_asked_for():
    fast, slow = shares(grid(pairs=True, a=range(4), b=range(3), c=range(2)))
    assert len({case[:2] for case in fast}) == 12 and len({case[1:] for case in fast}) == 6
    assert len({(case[0], case[2]) for case in fast}) == 8 and len(fast) < 16 and len(fast) + len(slow) == 24


def test_what_is_named_is_quick_and_nothing_else():
    fast, slow = shares(grid(a=quick(range(6), 4, 1), b=[0, 1]))
    assert fast == [(1, 0), (4, 1)] and len(slow) == 10
    mark = grid(a=quick({"one": [1], "two": [2]}, "two"))
    assert [(case.id, bool(case.marks)) for case in mark.mark.args[1]] == [("one", True), ("two", False)]
    with pytest.raises(ValueError, match="cannot be the quick share"):
        quick([1, 2], 3)
