"""The table of clustered matrices and its way back to modules."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluscomp_peft.codes import ClusterSpec
from cluscomp_peft.layout import expand, summarize

MODULES = ["self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj", "mlp.experts.0.up", "mlp.experts.1.up"]
NAMES = [f"model.layers.{i}.{module}" for i in range(4) for module in MODULES] + [
    "",
    "model",
    "model.layers",
    "model.layers.0",
    "model.embed_tokens",
    "visual.blocks.0.0.proj",
    "visual.blocks.0.1.proj",
    "lm_head",
]
SPECS = [ClusterSpec(4, 64), ClusterSpec(3, 1000), ClusterSpec(2, 16, 4, True, True)]

pure = settings(deadline=None, max_examples=150, derandomize=True)
layouts = st.dictionaries(st.sampled_from(NAMES[:-8] + NAMES[-4:]), st.sampled_from(SPECS))


@pure
@given(layouts)
def test_the_table_names_exactly_the_clustered_modules(specs):
    table = summarize(specs, NAMES)
    assert expand(table, NAMES) == specs
    assert expand(json.loads(json.dumps(table)), NAMES) == specs
    assert len(table) <= len(specs)


@pure
@given(layouts)
def test_the_table_is_read_with_the_base_prefix_removed_and_added(specs):
    # A base model has no head and no second tower, so only names below the prefix are compared.
    specs = {name: spec for name, spec in specs.items() if name.startswith("model.")}
    bare_specs = {name.removeprefix("model."): spec for name, spec in specs.items()}
    names = [name for name in NAMES if name.startswith("model.")]
    bare = [name.removeprefix("model.") for name in names]
    assert expand(summarize(specs, names), bare, prefix="model") == bare_specs
    assert expand(summarize(bare_specs, bare), names, prefix="model") == specs


def test_without_a_prefix_names_must_agree():
    table = {"model.layers.*.fc": {"group_size": 4, "num_clusters": 64}}
    assert expand(table, ["layers.0.fc"]) == {}
    assert list(expand(table, ["layers.0.fc"], prefix="model")) == ["layers.0.fc"]
    assert expand(table, ["layers.0.fc"], prefix="transformer") == {}


def test_equal_layers_share_one_line():
    specs = {name: SPECS[0] for name in NAMES if name.endswith("q_proj")}
    assert summarize(specs, NAMES) == {"model.layers.*.self_attn.q_proj": {"group_size": 4, "num_clusters": 64}}


def test_the_commonest_spec_becomes_the_pattern():
    names = [f"layers.{i}.fc" for i in range(4)]
    root = [f"model.{name}" for name in names]
    specs = dict(zip(root, [SPECS[1], SPECS[0], SPECS[0], SPECS[0]], strict=True))
    assert summarize(specs, root) == {
        "model.layers.*.fc": SPECS[0].to_dict(),
        "model.layers.0.fc": SPECS[1].to_dict(),
    }


def test_a_pattern_never_covers_an_unclustered_module():
    specs = {f"model.layers.{i}.self_attn.q_proj": SPECS[0] for i in (0, 1, 3)}
    table = summarize(specs, NAMES)
    assert set(table) == set(specs)
    assert "model.layers.2.self_attn.q_proj" not in expand(table, NAMES)


def test_a_star_stands_for_one_number_only():
    table = {"model.layers.*.fc": SPECS[0].to_dict()}
    near = ["model.layers.fc", "model.layers.a.fc", "model.layers.1.2.fc", "model.layers.1.fc.x", "layers.1.fc"]
    assert list(expand(table, [*near, "model.layers.17.fc"])) == ["model.layers.17.fc"]


def test_an_exact_name_wins_over_a_pattern():
    table = {"model.layers.*.fc": SPECS[0].to_dict(), "model.layers.7.fc": SPECS[1].to_dict()}
    found = expand(table, ["model.layers.6.fc", "model.layers.7.fc"])
    assert found == {"model.layers.6.fc": SPECS[0], "model.layers.7.fc": SPECS[1]}


def test_an_exact_name_wins_under_the_other_spelling():
    table = {"model.layers.*.fc": SPECS[0].to_dict(), "model.layers.7.fc": SPECS[1].to_dict()}
    found = expand(table, ["layers.6.fc", "layers.7.fc"], prefix="model")
    assert found == {"layers.6.fc": SPECS[0], "layers.7.fc": SPECS[1]}


@pytest.mark.parametrize(
    "entry",
    [
        {"group_size": 4},
        {"group_size": 4, "num_clusters": 64, "colour": 1},
        {"group_size": 0, "num_clusters": 64},
        {"group_size": 4, "num_clusters": 2**17},
        {"group_size": "4", "num_clusters": 64},
        {"group_size": None, "num_clusters": 64},
        None,
        7,
    ],
)
def test_an_unreadable_entry_is_refused(entry):
    with pytest.raises(ValueError, match="layout of the clustered matrices"):
        expand({"model.layers.*.fc": entry}, [])
