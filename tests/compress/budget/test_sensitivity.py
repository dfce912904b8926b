"""What keeps a matrix from being starved because the loss seems not to mind."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluscomp_peft.compress.budget.sensitivity import with_floor

matrices = st.dictionaries(
    st.text(min_size=1), st.tuples(st.floats(0, 1e6), st.integers(1, 10**8)), min_size=1, max_size=20
)


@given(matrices)
def test_no_matrix_falls_below_a_tenth_of_the_mean(given_matrices):
    sensitivity = {name: value for name, (value, _) in given_matrices.items()}
    weights = {name: size for name, (_, size) in given_matrices.items()}
    mean = sum(sensitivity.values()) / sum(weights.values())
    floored = with_floor(sensitivity, weights)
    assert floored.keys() == sensitivity.keys()
    for name, value in floored.items():
        assert value == pytest.approx(max(sensitivity[name], 0.1 * mean * weights[name]))


def test_what_is_measured_above_stays():
    assert with_floor({"q": 0.0, "v": 3.0}, {"q": 100, "v": 200}) == {"q": pytest.approx(0.1), "v": 3.0}
