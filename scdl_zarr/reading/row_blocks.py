"""Rows handed over a few at a time, in memory that the processor still has at hand, to whoever makes something else of them.

What is made of rows is often smaller than they are (a few genes of each, say).  Written out whole, and read again, rows would
cost more than that::

    chunks ── decode ──► scratch (a block of rows) ── visitor ──► its own output
                         ▲                          │
                         └────── used again ────────┘
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from scdl_zarr.reading.plan import Int64Array, RowPlan

__all__ = ["BLOCK_VALUES", "RowBlock", "RowVisitor", "cut_plan"]

BLOCK_VALUES = 1 << 18  # 2 MB of float32 and int32: less, and Python's own time shows; more, and the scratch leaves the cache


@dataclass(slots=True, kw_only=True)
class RowBlock:
    """Some rows in CSR form.  The arrays are the visitor's to change: values may be dropped, and ids be others afterwards.

    Attributes
    ----------
    places : int64 ndarray of shape (rows,)
        Which rows of the batch these are.
    data, ids : ndarray
        Values and gene ids.
    indptr : int64 ndarray of shape (rows + 1,)
        Row k is ``data[indptr[k]:indptr[k + 1]]``.
    checked
        Whoever read them has held the ids against the number of genes.
    notes
        What one step has found out for a later one.
    """

    places: Int64Array
    data: npt.NDArray[Any]
    ids: npt.NDArray[Any]
    indptr: Int64Array
    checked: bool = False
    notes: dict[Any, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.places)

    @property
    def values(self) -> npt.NDArray[Any]:
        """The values of all rows, one after the other."""
        return self.data[self.indptr[0] : self.indptr[-1]]


class RowVisitor(Protocol):
    """Who makes something of rows."""

    def begin(self, indptr: Int64Array, dtype: np.dtype[Any], id_dtype: np.dtype[Any]) -> None:
        """How many values each row of the batch stores, before any of them comes, and the dtypes of values and ids."""

    def visit(self, block: RowBlock) -> None:
        """Take some rows.  Blocks come in any order, in several threads at once, each row once."""


def cut_plan(plan: RowPlan, order: Int64Array) -> Iterator[tuple[Int64Array, RowPlan]]:
    """Runs of rows of about :data:`BLOCK_VALUES` values, in the order given: their places, and a plan of their own."""
    done = np.cumsum(plan.lengths[order])
    begin = 0
    while begin < len(order):
        before = done[begin - 1] if begin else 0
        end = max(int(np.searchsorted(done, before + BLOCK_VALUES, side="right")), begin + 1)
        places = order[begin:end]
        indptr = np.zeros(len(places) + 1, np.int64)
        np.cumsum(plan.lengths[places], out=indptr[1:])
        yield (
            places,
            RowPlan(starts=plan.starts[places], lengths=plan.lengths[places], indptr=indptr, order=np.arange(len(places))),
        )
        begin = end
