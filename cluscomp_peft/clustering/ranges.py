"""The compiled loop of `scalar`: one layer of its dynamic program, for all ends of ranges."""

from __future__ import annotations

from ..jit import njit

__all__ = ["fill_layer"]


@njit(nogil=True)
def fill_layer(base, mass, first, second, least, lowest, known, cuts, best):
    """For each end of ranges, lowest … lowest + count − 1, the best place to begin the last range.

    `mass`, `first` and `second` [M + 1] are sums up to each place, `base` [M + 1] the error of the ranges before it
    less `second`. `known` [count + 1] says where the last range begins, and known[0] that it begins nowhere before;
    `cuts` and `best` [M + 1] get the same and the error, at the ends themselves. `least` [M + 1] are the cuts of the
    layer before, which bound these from below.
    """
    count = len(known) - 1
    step = 1
    while 2 * step <= count:
        step *= 2
    while step > 0:
        for at in range(step, count + 1, 2 * step):
            end = at + lowest - 1
            low, high = max(known[at - step], least[end]), end - 1
            if at + step <= count:
                high = min(high, known[at + step])
            high = max(low, high)  # rounding may cross them where two choices are equally good
            place, error = low, 0.0
            for i in range(low, high + 1):
                inner = first[end] - first[i]
                found = base[i] - inner * inner / (mass[end] - mass[i])
                if i == low or found < error:
                    place, error = i, found
            known[at] = place
            cuts[end] = place
            best[end] = max(error + second[end], 0.0)
        step //= 2
