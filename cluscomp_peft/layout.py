"""Which matrices of a model are clustered, and how: a short table from name patterns to [`ClusterSpec`].

The table goes into `config.json` and into model cards, so the layers of a model share a line wherever they can:

    "model.layers.*.self_attn.k_proj": {"group_size": 3, "num_clusters": 1024}
    "model.layers.7.self_attn.k_proj": {"group_size": 2, "num_clusters": 1024}     an exact name wins over a pattern

`*` stands for one number. Names are matched with and without the model's `base_model_prefix`, because a checkpoint of
`LlamaForCausalLM` ("model.layers…") is also loaded as `LlamaModel` ("layers…").
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from .codes import ClusterSpec

__all__ = ["expand", "summarize", "unmatched"]


def summarize(specs: Mapping[str, ClusterSpec], all_names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The shortest table of patterns that names exactly the clustered matrices.

    Args:
        specs: Module name to spec, of every clustered matrix.
        all_names: Names of every module of the model; a pattern never covers one that is not clustered.

    Returns:
        `dict`: pattern or name to the fields of the spec.
    """
    members: dict[str, list[str]] = {}
    for name in all_names:
        members.setdefault(_pattern(name), []).append(name)
    table: dict[str, dict[str, Any]] = {}
    for name, spec in specs.items():
        pattern = _pattern(name)
        if pattern not in table and all(member in specs for member in members[pattern]):
            kinds = [specs[member] for member in members[pattern]]
            table[pattern] = max(kinds, key=kinds.count).to_dict()
        if table.get(pattern) != spec.to_dict():
            table[name] = spec.to_dict()
    return table


def expand(table: Mapping[str, Mapping[str, Any]], names: Iterable[str], prefix: str = "") -> dict[str, ClusterSpec]:
    """The modules among `names` that the table says are clustered, with their spec.

    Args:
        table: What [`summarize`] returned.
        names: Names of the modules of the model at hand.
        prefix: Its `base_model_prefix`, without the dot.

    Raises:
        ValueError: If an entry of the table is no valid spec.
    """
    try:
        specs = {pattern: ClusterSpec(**entry) for pattern, entry in table.items()}
    except (TypeError, ValueError) as error:
        raise ValueError(f"the layout of the clustered matrices is not readable: {error}") from error
    found = {}
    for name in names:
        key = next((key for key in _keys(name, prefix) if key in specs), None)
        if key is not None:
            found[name] = specs[key]
    return found


def unmatched(table: Mapping[str, Any], names: Iterable[str], prefix: str = "") -> set[str]:
    """Entries of a table that name no module of the model at hand, such as the head of a model of which only the body
    is loaded; arguments as in [`expand`]."""
    return table.keys() - {key for name in names for key in _keys(name, prefix)}


def _keys(name: str, prefix: str) -> list[str]:
    """What a table may call a module, exact names before patterns."""
    spellings = [name]
    if prefix:
        spellings.append(f"{prefix}.{name}")
        spellings.append(name.removeprefix(f"{prefix}."))
    return spellings + [_pattern(spelling) for spelling in spellings]


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
