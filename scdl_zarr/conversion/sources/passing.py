"""The rows of a store on their way into another one: what was read of its mapped files is given back.

Pages of a mapped file that were read count as memory of the process for as long as there is memory, so that a shuffled copy of a
store would look as large as the store, and be the first to be ended where a cluster limits memory.
"""

from __future__ import annotations

import functools
import itertools
import os
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.reading.csr import Columns
from scdl_zarr.reading.plan import Int64Array, RowPlan, plan_rows

__all__ = ["passing", "passing_bytes"]

PAGES_BYTES = 3 << 24  # of mapped files in memory, beside what was there before
AROUND_BYTES = 1 << 16  # a page that is read comes with those around it, where the system has them in memory
POINTER_ROWS = 1 << 12  # whose row pointers are asked for at once
BATCH_ROWS = 1 << 6  # between two looks at how much there is


def passing(columns: Columns) -> Columns:
    """The same columns; mapped ones give back the pages that were read."""
    return _Passing(columns) if hasattr(columns, "drop_pages") else columns


def passing_bytes(threads: int) -> int:
    """What the pages take at most in a process in which so many threads read."""
    return PAGES_BYTES + threads * 2 * AROUND_BYTES * BATCH_ROWS


class _Passing:
    """Mapped columns for several threads."""

    row = pair = visit = None

    def __init__(self, columns: Any) -> None:
        self._columns = columns
        self._pages = _pages()
        self._pages.watch(columns)

    def bounds(self, rows: Int64Array) -> tuple[Int64Array, Int64Array]:
        if len(rows) <= POINTER_ROWS:
            return self._bounds(rows)
        starts, lengths = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
        order = np.argsort(rows, kind="stable")  # many rows lie on every page of the row pointers: on few of them at a time
        for first in range(0, len(rows), POINTER_ROWS):
            some = order[first : first + POINTER_ROWS]
            starts[some], lengths[some] = self._bounds(rows[some])
        return starts, lengths

    def _bounds(self, rows: Int64Array) -> tuple[Int64Array, Int64Array]:
        found: tuple[Int64Array, Int64Array] = self._columns.bounds(rows)
        self._pages.note(len(rows) // BATCH_ROWS)
        return found

    def gather(self, plan: RowPlan, data: npt.NDArray[Any], indices: npt.NDArray[Any], _helpers: object = None) -> None:
        for first in range(0, len(plan.starts), BATCH_ROWS):
            part = plan_rows(plan.starts[first : first + BATCH_ROWS], plan.lengths[first : first + BATCH_ROWS])
            low = int(plan.indptr[first])
            self._columns.gather(part, data[low : low + part.total], indices[low : low + part.total])
            self._pages.note(len(part.starts))


class _Pages:
    """The mapped pages of a process: whoever notices that there are too many gives back those of all columns that pass."""

    def __init__(self) -> None:
        self._columns: dict[int, weakref.ref[Any]] = {}  # by a number for each: all that is done to it is one step
        self._numbers = itertools.count()
        self._before = self._resident() or 0
        self._rows = 0

    def watch(self, columns: Any) -> None:
        number = next(self._numbers)
        self._columns[number] = weakref.ref(columns, lambda _: self._columns.pop(number, None))

    def note(self, rows: int) -> None:
        """So many rows were read."""
        self._rows += rows
        resident = self._resident()
        found = 2 * AROUND_BYTES * self._rows if resident is None else resident - self._before
        if found > PAGES_BYTES:
            self._rows = 0
            for known in list(self._columns.values()):
                columns = known()
                if columns is not None:
                    columns.drop_pages()
            now = self._resident() or 0  # with what other threads have read by now, or libraries that came
            self._before = max(min(self._before, now), now - PAGES_BYTES // 2)

    @staticmethod
    def _resident() -> int | None:
        """Bytes of files that are mapped and in memory; None where the system does not say."""
        try:
            with open("/proc/self/statm", "rb", buffering=0) as file:
                return int(file.read(256).split()[2]) * os.sysconf("SC_PAGESIZE")
        except (OSError, ValueError, IndexError):
            return None


@functools.cache
def _pages() -> _Pages:
    return _Pages()
