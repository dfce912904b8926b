"""Choosing (g, n) for each matrix from a budget of true bits.

One setting for all matrices is wrong: 65,500 centroids of 4 weights cost 4.1 bits on a 4096 × 4096 matrix, 5 bits on
Llama-3-8B's `k_proj` and 40 on Qwen2.5-0.5B's, because a small matrix pays for as large a codebook. Here every matrix
gets the (g, n) with the least expected distortion among those whose codes, codebook and scales fit the budget:

    D(g, n) = J_g · 2π ((g + 2) / g)^((g + 2) / 2) · n^(−2/g)        Zador's high-rate law for a Gaussian source

J_g is the dimensionless second moment of the best known quantiser in g dimensions (Conway & Sloane, "Sphere Packings,
Lattices and Groups", table 2.3; beyond 8 interpolated). The law is asymptotic; it only has to rank neighbours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...codes import MAX_CODE_BITS, ClusterSpec, num_groups, packed_width

__all__ = ["Demand", "allocate", "choose_spec"]

_MAX_GROUP = 16
_SCALE_BITS = 0.05  # scales are free capacity for finetuning where they cost less than this
_SECOND_MOMENT = {1: 1 / 12, 2: 0.08019, 3: 0.07854, 4: 0.07660, 5: 0.07562, 6: 0.07424, 7: 0.07312, 8: 0.07168}


def choose_spec(
    in_features: int,
    out_features: int,
    *,
    bits: float | None = None,
    group_size: int | None = None,
    num_clusters: int | None = None,
    scales: bool = False,
    codebook_itemsize: int = 2,
    cap: bool = False,
    name: str = "the matrix",
) -> ClusterSpec:
    """The spec of one matrix: `group_size` and `num_clusters` if they are given, else the best one within `bits`.

    Args:
        in_features (`int`): in.
        out_features (`int`): out.
        bits (`float`, *optional*): Budget in true bits per weight, never exceeded.
        group_size (`int`, *optional*): g; goes with `num_clusters`, overrides `bits`.
        num_clusters (`int`, *optional*): n.
        scales (`bool`): Store a scale per input and per output channel.
        codebook_itemsize (`int`): Bytes of a number in codebook and scales.
        name (`str`): What errors call the matrix.
        cap (`bool`): Take n = the number of groups where `num_clusters` is larger, instead of refusing.

    Raises:
        ValueError: If n exceeds the number of groups, or nothing fits the budget.
    """
    weights = in_features * out_features
    if group_size is not None and num_clusters is not None:
        vectors = in_features * num_groups(out_features, group_size)
        if num_clusters > vectors:
            if not cap:
                raise ValueError(
                    f"{name}: num_clusters={num_clusters} is more than the {vectors} groups of {group_size} weights "
                    f"in {out_features} x {in_features}; choose at most {vectors}, a smaller group_size, or "
                    "give bits, which fits every matrix by itself."
                )
            num_clusters = max(2, vectors)
        if vectors < 2:
            raise ValueError(
                f"{name}: {out_features} x {in_features} is a single group of {group_size}, which cannot be "
                "clustered; choose a smaller group_size or leave such matrices out with exclude_modules."
            )
        return ClusterSpec(group_size, num_clusters, 1, scales, scales)

    assert bits is not None
    best: tuple[float, ClusterSpec] | None = None
    for g in range(1, min(_MAX_GROUP, out_features) + 1):
        groups = num_groups(out_features, g)
        for b in range(1, MAX_CODE_BITS + 1):
            left = bits * weights / 8 - in_features * packed_width(groups, b)
            left -= codebook_itemsize * (in_features + out_features) * scales
            n = min(2**b, in_features * groups, int(left // (codebook_itemsize * g)) if left > 0 else 0)
            if n <= 2 ** (b - 1) or n < 2:
                continue
            expected = _distortion(g, n)
            if best is None or expected < best[0]:
                best = (expected, ClusterSpec(g, n, 1, scales, scales))
    if best is None:
        raise ValueError(
            f"{name}: {out_features} x {in_features} cannot be stored in {bits} true bits per weight, its codebook "
            "alone costs too much. Raise bits or leave such matrices out with exclude_modules."
        )
    return best[1]


@dataclass(frozen=True)
class Demand:
    """A matrix that wants bytes.

    Args:
        in_features, out_features (`int`): Its shape.
        sensitivity (`float`): Loss in nats that it would cost to lose the whole matrix, as far as the loss is
            quadratic: storing it with relative squared error D costs sensitivity · D.
    """

    in_features: int
    out_features: int
    sensitivity: float


def allocate(
    demands: dict[str, Demand],
    budget: int,
    *,
    scales: bool | None = None,
    codebook_itemsize: int = 2,
) -> dict[str, ClusterSpec]:
    """A spec for every matrix, together within `budget` bytes, with the least expected loss Σ sensitivity · D(g, n).

    Every matrix takes the candidate that is best at one common price of a byte, which is the optimum over all
    choices for the bytes spent (Everett 1963); the price is found by bisection, and what is left is spent where it
    helps most.

    Args:
        demands: By name.
        budget (`int`): Bytes of codes, codebooks and scales.
        scales (`bool`, *optional*): Store a scale per input and per output channel. None: where they cost at most
            0.05 bits per weight.
        codebook_itemsize: As in [`choose_spec`].

    Raises:
        ValueError: If even the smallest candidates exceed the budget.
    """
    names = list(demands)
    menus = {name: _menu(demands[name], scales, codebook_itemsize) for name in names}
    least = sum(menus[name][0][0] for name in names)
    if least > budget:
        raise ValueError(
            f"the clustered matrices take {least} bytes at the very least, the budget is {budget}; raise it, or leave "
            "small matrices out with exclude_modules."
        )

    def choose(price: float) -> dict[str, int]:
        return {
            name: min(range(len(menu)), key=lambda i: menu[i][1] + price * menu[i][0]) for name, menu in menus.items()
        }

    def spent(choice: dict[str, int]) -> int:
        return sum(menus[name][i][0] for name, i in choice.items())

    low, high = 1e-30, 1e30  # price of a byte: too low, and so high that everyone takes the least
    for _ in range(120):
        middle = (low * high) ** 0.5
        if spent(choose(middle)) > budget:
            low = middle
        else:
            high = middle
    choice = choose(high)
    if spent(choice) > budget:
        choice = dict.fromkeys(names, 0)
    left = budget - spent(choice)
    while True:
        best: tuple[float, str, int] | None = None
        for name, menu in menus.items():
            size, cost, _ = menu[choice[name]]
            for i in range(choice[name] + 1, len(menu)):
                if menu[i][0] - size > left:
                    break
                gain = (cost - menu[i][1]) / (menu[i][0] - size)
                if gain > 0 and (best is None or gain > best[0]):
                    best = (gain, name, i)
        if best is None:
            return {name: menus[name][i][2] for name, i in choice.items()}
        _, name, i = best
        left -= menus[name][i][0] - menus[name][choice[name]][0]
        choice[name] = i


def _menu(demand: Demand, scales: bool | None, itemsize: int) -> list[tuple[int, float, ClusterSpec]]:
    """(bytes, expected loss, spec) of the candidates that no other beats in both, from small to large."""
    inputs, outputs = demand.in_features, demand.out_features
    if scales is None:
        scales = 8 * itemsize * (inputs + outputs) / (inputs * outputs) <= _SCALE_BITS
    found = []
    for g in range(1, min(_MAX_GROUP, outputs) + 1):
        vectors = inputs * num_groups(outputs, g)
        for b in range(1, MAX_CODE_BITS + 1):
            for n in sorted({2**b * eighths // 8 for eighths in (5, 6, 7, 8)}):
                if n < 2 or n <= 2 ** (b - 1) or n > vectors // 2:
                    continue
                spec = ClusterSpec(g, n, 1, scales, scales)
                cost = demand.sensitivity * _distortion(g, n) * (1 - n / vectors)
                found.append((spec.num_bytes(inputs, outputs, itemsize), cost, spec))
    if not found:
        raise ValueError(f"a matrix of {outputs} x {inputs} is too small to be clustered; leave it out.")
    found.sort(key=lambda entry: (entry[0], entry[1]))
    menu = found[:1]
    for entry in found[1:]:
        if entry[1] < menu[-1][1]:
            menu.append(entry)
    return menu


def _distortion(g: int, n: int) -> float:
    """Expected squared error per weight of a unit Gaussian; see the module docstring."""
    moment = _SECOND_MOMENT.get(g, 0.07168 - (g - 8) * (0.07168 - 0.06830) / 8)
    return moment * 2 * math.pi * ((g + 2) / g) ** ((g + 2) / 2) * n ** (-2 / g)
