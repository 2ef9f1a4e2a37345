"""The compiled loops of batch making: rows spread out densely, and genes chosen.

They run without Python's lock and take nothing on trust: an id out of range ends the loop, and its place is the answer.
"""

# mypy: disallow-untyped-decorators=False

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np

__all__ = ["choose_genes", "count_chosen", "spread"]


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


@nb.njit(nogil=True, cache=True)
def count_chosen(indices: Any, indptr: Any, place: Any, counts: Any) -> int:
    """How many values of each row are of chosen genes (``place[gene] >= 0``).  -1, or the place of an id that is none."""
    for row in range(len(indptr) - 1):
        count = 0
        for k in range(indptr[row], indptr[row + 1]):
            gene = indices[k]
            if gene < 0 or gene >= len(place):
                return k
            count += place[gene] >= 0
        counts[row] = count
    return -1


@nb.njit(nogil=True, cache=True)
def choose_genes(data: Any, indices: Any, indptr: Any, place: Any, rising: Any, chosen: Any, out: Any, ids: Any) -> None:
    """Copy the values of chosen genes, renumbered; where `place` does not rise, sorted by the new numbers, stably."""
    for row in range(len(indptr) - 1):
        at = chosen[row]
        for k in range(indptr[row], indptr[row + 1]):
            new = place[indices[k]]
            if new >= 0:
                out[at] = data[k]
                ids[at] = new
                at += 1
        if not rising:
            first = chosen[row]
            order = np.argsort(ids[first:at], kind="mergesort")
            values, numbers = out[first:at].copy(), ids[first:at].copy()
            for k in range(at - first):
                out[first + k] = values[order[k]]
                ids[first + k] = numbers[order[k]]
