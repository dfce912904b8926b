"""The choice of group size and clusters from a budget."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluscomp_peft.codes import ClusterSpec, num_groups
from cluscomp_peft.compress.budget.allocation import Demand, _menu, allocate, choose_spec

pure = settings(deadline=None, max_examples=150, derandomize=True)
widths = st.one_of(st.integers(1, 40), st.integers(41, 6000))


@pure
@given(
    widths,
    widths,
    st.one_of(st.sampled_from([1, 1.5, 2, 3, 4, 8]), st.floats(1, 8)),
    st.booleans(),
    st.sampled_from([2, 4]),
)
def test_the_budget_is_never_exceeded(in_features, out_features, bits, scales, itemsize):
    budget = bits * in_features * out_features / 8
    try:
        spec = choose_spec(in_features, out_features, bits=bits, scales=scales, codebook_itemsize=itemsize)
    except ValueError as error:
        assert f"{out_features} x {in_features} cannot be stored in {bits} true bits" in str(error)
        # Refused only if not even two centroids fit, with the scales where they were asked for.
        for g in range(1, min(16, out_features) + 1):
            if in_features * num_groups(out_features, g) >= 2:
                least = ClusterSpec(g, 2, scale_in=scales, scale_out=scales)
                assert least.num_bytes(in_features, out_features, itemsize) > budget
        return
    assert spec.num_bytes(in_features, out_features, itemsize) <= budget
    assert spec.num_clusters <= in_features * num_groups(out_features, spec.group_size)
    assert spec.group_size <= out_features
    assert spec.num_blocks == 1 and spec.scale_in == spec.scale_out
    if scales is not None:
        assert spec.scale_in == scales


@pytest.mark.parametrize("bits", [2, 2.5, 3, 4, 5])
@pytest.mark.parametrize(
    ("in_features", "out_features"),
    [(4096, 4096), (4096, 1024), (896, 128), (896, 4864), (4864, 896)],
    ids=["square", "k_proj of 8B", "k_proj of 0.5B", "up_proj", "down_proj"],
)
def test_the_budget_is_used(in_features, out_features, bits):
    spec = choose_spec(in_features, out_features, bits=bits)
    assert 0.85 * bits < spec.true_bits(in_features, out_features) <= bits


@pytest.mark.parametrize(("in_features", "out_features"), [(4096, 4096), (896, 128)])
def test_more_bits_give_more_levels_per_weight(in_features, out_features):
    specs = [choose_spec(in_features, out_features, bits=bits, scales=False) for bits in (1, 2, 3, 4, 6, 8)]
    levels = [spec.num_clusters ** (1 / spec.group_size) for spec in specs]
    assert levels == sorted(levels) and len(set(levels)) == len(levels)


def test_a_small_matrix_gets_a_smaller_codebook():
    large, small = choose_spec(4096, 4096, bits=4), choose_spec(896, 128, bits=4)
    assert small.num_clusters * small.group_size < large.num_clusters * large.group_size


def test_scales_are_stored_where_they_are_asked_for():
    assert not choose_spec(4096, 4096, bits=4).scale_in
    assert choose_spec(64, 64, bits=4, scales=True).scale_out
    assert choose_spec(64, 64, group_size=4, num_clusters=64, scales=True).scale_in


def test_where_bits_are_shared_out_scales_are_stored_if_they_are_cheap():
    def scaled(inputs: int, outputs: int, itemsize: int = 2, **settings) -> bool:
        demand = Demand(inputs, outputs, 1.0)
        return allocate({"w": demand}, inputs * outputs // 2, codebook_itemsize=itemsize, **settings)["w"].scale_in

    # 8 · itemsize · (in + out) / (in · out) = 0.05 bits exactly.
    assert scaled(640, 640)
    assert not scaled(640, 639) and not scaled(640, 640, itemsize=4)
    assert scaled(64, 64, scales=True) and not scaled(640, 640, scales=False)


@pytest.mark.parametrize("scales", [False, True])
def test_explicit_numbers_are_taken_as_they_are(scales):
    spec = choose_spec(100, 50, group_size=7, num_clusters=300, scales=scales)
    assert spec == ClusterSpec(7, 300, 1, scales, scales)


def test_explicit_numbers_override_bits():
    assert choose_spec(100, 50, bits=2, group_size=1, num_clusters=500, scales=False) == ClusterSpec(1, 500)


def test_too_many_clusters_are_refused_with_value_limit_and_cure():
    with pytest.raises(ValueError) as caught:
        choose_spec(10, 9, group_size=4, num_clusters=31)
    message = str(caught.value)
    for part in ("num_clusters=31", "30 groups of 4 weights", "9 x 10", "at most 30", "smaller group_size", "bits"):
        assert part in message
    assert choose_spec(10, 9, group_size=4, num_clusters=30).num_clusters == 30


def test_too_many_clusters_are_capped_on_request():
    assert choose_spec(10, 9, group_size=4, num_clusters=31, cap=True, scales=True) == ClusterSpec(
        4, 30, 1, True, True
    )
    assert choose_spec(10, 9, group_size=4, num_clusters=29, cap=True).num_clusters == 29


def test_a_matrix_beyond_any_budget_is_refused_with_a_cure():
    with pytest.raises(ValueError, match=r"3 x 4 cannot be stored in 1 true bits.*exclude_modules"):
        choose_spec(4, 3, bits=1)


# -- allocate


DEMANDS = {
    "attention": Demand(128, 128, 1.0),
    "small": Demand(128, 64, 1.0),
    "wide": Demand(128, 384, 1.0),
}


def spent(specs, demands=DEMANDS):
    return sum(spec.num_bytes(demands[n].in_features, demands[n].out_features) for n, spec in specs.items())


@pytest.mark.parametrize("bits", [1.0, 1.7, 2.5, 3.1, 4.3, 6.0])
def test_a_budget_is_never_exceeded_and_nearly_used(bits):
    budget = int(bits * sum(d.in_features * d.out_features for d in DEMANDS.values()) / 8)
    total = spent(allocate(DEMANDS, budget))
    assert 0.97 * budget <= total <= budget


def test_sensitive_matrices_get_more():
    demands = {**DEMANDS, "twin": Demand(128, 128, 30.0)}
    specs = allocate(demands, 22000)
    bits = {n: s.true_bits(demands[n].in_features, demands[n].out_features) for n, s in specs.items()}
    assert bits["twin"] > bits["attention"] + 1


def test_more_bytes_never_cost_loss():
    # Expected loss as the law has it falls with the budget.
    losses = []
    for budget in range(9000, 40000, 3000):
        specs = allocate(DEMANDS, budget)
        menus = {n: {spec: cost for _, cost, spec in _menu(d, None, 2)} for n, d in DEMANDS.items()}
        losses.append(sum(menus[n][spec] for n, spec in specs.items()))
    assert losses == sorted(losses, reverse=True)


def test_a_budget_below_everything_is_refused():
    with pytest.raises(ValueError, match="the budget is 100; raise it"):
        allocate(DEMANDS, 100)
