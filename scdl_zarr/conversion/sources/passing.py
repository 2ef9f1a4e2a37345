"""The rows of a store on their way into another one: what was read of its mapped files is given back.

Pages of a mapped file that were read count as memory of the process for as long as there is memory, so that a shuffled copy of a
store would look as large as the store, and be the first to be ended where a cluster limits memory.
"""

from __future__ import annotations

import contextlib
from collections import deque
from typing import Any

import numpy.typing as npt

from scdl_zarr.reading.csr import Columns
from scdl_zarr.reading.plan import Int64Array, RowPlan

__all__ = ["Passing", "passing"]

KEPT_VALUES = 1 << 18  # read before pages are given back: random rows touch up to 100 bytes of pages a value


def passing(columns: Columns) -> Columns:
    """The same columns; mapped ones give back the pages that were read."""
    return Passing(columns) if hasattr(columns, "drop_pages") else columns


class Passing:
    """Mapped columns for several threads: what any of them has read is given back by whoever is first past the limit."""

    row = pair = None

    def __init__(self, columns: Any) -> None:
        self._columns = columns
        self._read: deque[RowPlan] = deque()  # append and popleft are atomic
        self._values = 0

    def bounds(self, rows: Int64Array) -> tuple[Int64Array, Int64Array]:
        found: tuple[Int64Array, Int64Array] = self._columns.bounds(rows)
        return found

    def gather(self, plan: RowPlan, data: npt.NDArray[Any], indices: npt.NDArray[Any]) -> None:
        self._columns.gather(plan, data, indices)
        self._read.append(plan)
        self._values += plan.total
        if self._values < KEPT_VALUES:
            return
        self._values, plans = 0, []
        with contextlib.suppress(IndexError):  # none is left
            while True:
                plans.append(self._read.popleft())
        self._columns.drop_pages(plans)
