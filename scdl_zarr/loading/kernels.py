"""The compiled loop of batch making: rows spread out densely.

It runs without Python's lock and takes nothing on trust: an id out of range ends the loop, and its place is the answer.
"""

# mypy: disallow-untyped-decorators=False

from __future__ import annotations

from typing import Any

import numba as nb

__all__ = ["spread"]


@nb.njit(nogil=True, cache=True)
def spread(data: Any, indices: Any, indptr: Any, out: Any) -> int:
    """Add the values of each row to a row of `out` (zeroed here).  -1, or the place of an id that is none."""
    n_vars = out.shape[1]
    for row in range(len(indptr) - 1):
        line = out[row]
        line[:] = 0
        for k in range(indptr[row], indptr[row + 1]):
            gene = indices[k]
            if gene < 0 or gene >= n_vars:
                return k
            line[gene] += data[k]
    return -1
