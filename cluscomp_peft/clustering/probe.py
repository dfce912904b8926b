"""The compiled step of `search`: one vector after another through the cells of a codebook."""

from __future__ import annotations

import numpy as np

from ..jit import njit
from .cells import MARGIN

__all__ = ["probe_cells"]


@njit(nogil=True, fastmath={"reassoc", "contract", "nsz"})
def probe_cells(x, centers, radii, bounds, places, names, codes):
    """Writes the name of the nearest of `places` for each of x.

    x [N, d]; centers [d, cells]; radii [cells], largest distance of a place of the cell to its center;
    bounds [cells + 1], where the cells begin in places [d, n] and names [n]. Transposed, so that loops run over lanes.
    """
    dim, cells = centers.shape
    away = np.empty(cells, np.float32)
    widest = 0
    for k in range(cells):
        widest = max(widest, bounds[k + 1] - bounds[k])
    near = np.empty(widest, np.float32)
    for i in range(len(x)):
        away[:] = 0
        for j in range(dim):
            value, row = x[i, j], centers[j]
            for k in range(cells):
                step = value - row[k]
                away[k] += step * step
        first = int(np.argmin(away))
        best, found, root = np.float32(np.inf), 0, np.float32(0)
        for turn in range(-1, cells):
            k = first if turn < 0 else turn
            if turn >= 0:
                # No place of the cell is nearer than |x − center| − radius.
                reach = radii[k] + root
                if away[k] > reach * reach * MARGIN or k == first:
                    continue
            a, b = bounds[k], bounds[k + 1]
            near[: b - a] = 0
            for j in range(dim):
                value, row = x[i, j], places[j, a:b]
                for p in range(b - a):
                    step = value - row[p]
                    near[p] += step * step
            for p in range(b - a):
                if near[p] < best or (near[p] == best and names[a + p] < found):
                    best, found = near[p], names[a + p]
            root = np.sqrt(best)
        codes[i] = found
