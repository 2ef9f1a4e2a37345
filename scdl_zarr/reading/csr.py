"""Rows of one CSR matrix: what to read is planned, then one of two paths reads it.

``MappedColumns`` (local shards, our codecs, libblosc2 at hand) or the columns of the general path (everything else) fill the same
buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from scdl_zarr.errors import OptionError
from scdl_zarr.reading.batch import RowBatch
from scdl_zarr.reading.buffers import BufferPool, BufferSource
from scdl_zarr.reading.exactness import cast_exactly, checked_dtype
from scdl_zarr.reading.first_use import FIRST_USE
from scdl_zarr.reading.plan import Int64Array, ReadCost, RowPlan, copy_repeats, plan_once, plan_rows
from scdl_zarr.reading.row_blocks import RowBlock, RowVisitor
from scdl_zarr.storage.location import StoreLocation
from scdl_zarr.storage.schema import MatrixLayout
from scdl_zarr.storage.shards import LARGEST_TABLE

__all__ = ["Columns", "CsrReader", "float_dtype", "open_columns", "row_of", "value_dtype", "visit_batch"]

Buffers = tuple[npt.NDArray[Any], npt.NDArray[Any]]
Row = tuple[npt.NDArray[Any], npt.NDArray[Any]]


class Columns(Protocol):
    """The questions a CSR matrix answers."""

    @property
    def row(self) -> Callable[[int, np.dtype[Any], np.dtype[Any]], Row] | None:
        """``row(row, dtype, id_dtype)``: values and ids of one row.  None where the other two are the shortest way."""

    @property
    def pair(self) -> Callable[[int, np.dtype[Any]], npt.NDArray[Any]] | None:
        """``pair(row, dtype)``: the same as one array of shape (2, stored values).  There where `row` is."""

    @property
    def visit(self) -> Callable[..., None] | None:
        """``visit(plan, dtype, id_dtype, visitor, helpers)``: the plan's rows to a visitor, a block at a time.  None as `row`."""

    def bounds(self, rows: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Start and length of every row's element range, checked against the number of stored values."""

    def gather(
        self, plan: RowPlan, data: npt.NDArray[Any], indices: npt.NDArray[Any], helpers: ThreadPoolExecutor | None = None, /
    ) -> None:
        """Fill both buffers with the plan's ranges; threads of `helpers` may take a part."""


def open_columns(location: StoreLocation, layout: MatrixLayout, *, threads: int, check: str, cache_bytes: int = 0) -> Columns:
    """The fastest path that can read this matrix."""
    if location.path is not None and _mappable(layout):
        from scdl_zarr.reading import kernels, mapped

        loaded = kernels.load()
        if loaded is not None:
            return mapped.MappedColumns(location, layout, loaded, threads=threads, check=check, cache_bytes=cache_bytes)
    from scdl_zarr.reading.general import general_columns

    return general_columns(location, layout, threads=threads)


def row_of(columns: Columns, rows: range, position: int) -> int:
    """Which of these rows holds a stored value: the last one that starts at it or before."""
    low, high = rows.start, rows.stop
    while high - low > 1:
        middle = (low + high) // 2
        starts, _ = columns.bounds(np.array([middle], np.int64))
        low, high = (middle, high) if starts[0] <= position else (low, middle)
    return low


def _mappable(layout: MatrixLayout) -> bool:
    return layout.mappable and all(
        part is not None and part.n_shards <= LARGEST_TABLE for part in (layout.data, layout.indices, layout.indptr)
    )


def value_dtype(layout: MatrixLayout) -> np.dtype[Any]:
    """The dtype values come out as: float32 where it holds every one exactly, else float64 or the 64-bit integer stored."""
    stored = layout.data_dtype
    if stored == np.float32 or stored.itemsize < 4 or layout.float32_exact:
        return np.dtype(np.float32)
    return stored if stored.kind in "iu" and stored.itemsize == 8 else np.dtype(np.float64)


def float_dtype(layout: MatrixLayout) -> np.dtype[Any]:
    """:func:`value_dtype`, with float64 in place of 64-bit integers."""
    dtype = value_dtype(layout)
    return np.dtype(np.float64) if dtype.kind in "iu" else dtype


class CsrReader:
    """Reads rows of one matrix of a store into :class:`RowBatch`.

    Nothing is opened before the first read.  May be shared by threads and used after a fork.
    """

    def __init__(self, location: StoreLocation, layout: MatrixLayout, *, threads: int, check: str, cache_bytes: int = 0) -> None:
        self.layout = layout
        self._location = location
        self._options: dict[str, Any] = {"threads": threads, "check": check, "cache_bytes": cache_bytes}
        self._columns: Columns | None = None
        self._read_before = False  # what is compiled or imported at the first read is there
        self._dtype = value_dtype(layout)
        self._id_dtype = np.dtype(np.int32 if layout.n_vars <= 1 << 31 else np.int64)
        self._buffers = BufferPool()

    @property
    def columns(self) -> Columns:
        if self._columns is None:
            with FIRST_USE:
                self._columns = self._columns or open_columns(self._location, self.layout, **self._options)
        return self._columns

    def read(
        self,
        rows: Int64Array,
        dtype: npt.DTypeLike | None = None,
        out: Buffers | None = None,
        *,
        once: bool = False,
        pool: BufferSource | None = None,
        helpers: ThreadPoolExecutor | None = None,
    ) -> RowBatch:
        """The rows (numbers already checked) as a batch; see :meth:`SingleCellZarrDataset.read_rows`.

        Parameters
        ----------
        once
            A row that is given several times is decoded once and copied, which pays where many are.
        pool
            Where the batch's memory comes from, if not from this reader's own.
        helpers
            Threads that may take a part of a large batch, if not this reader's own.
        """
        wanted = self._dtype if dtype is None else checked_dtype(dtype)
        if self._read_before:
            return self._read(rows, wanted, out, once, pool, helpers)
        with FIRST_USE:
            batch = self._read(rows, wanted, out, once, pool, helpers)
        self._read_before = True
        return batch

    def read_one(self, row: int, dtype: np.dtype[Any] | None = None) -> Row:
        """Values and ids of one row (a number already checked), as new arrays."""
        columns, wanted = self._columns, self._dtype if dtype is None else dtype
        direct = wanted is self._dtype or wanted == self.layout.data_dtype
        if self._read_before and direct and columns is not None and columns.row is not None:
            return columns.row(row, wanted, self._id_dtype)
        batch = self.read(np.array([row], np.int64), dtype)
        return batch.data, batch.indices

    def read_pair(self, row: int) -> npt.NDArray[Any]:
        """Values and ids of one row in one new array of shape (2, stored values) and the values' dtype."""
        columns = self._columns
        if self._read_before and self._dtype.kind == "f" and columns is not None and columns.pair is not None:
            return columns.pair(row, self._dtype)
        values, ids = self.read_one(row)
        pair = np.empty((2, len(values)), values.dtype)
        pair[0], pair[1] = values, ids
        return pair

    def _read(
        self,
        rows: Int64Array,
        wanted: np.dtype[Any],
        out: Buffers | None,
        once: bool,
        pool: BufferSource | None,
        helpers: ThreadPoolExecutor | None,
    ) -> RowBatch:
        plan = plan_rows(*self.columns.bounds(rows))
        # a path fills a buffer of the natural dtype, or of the stored one, at once
        native = wanted if wanted in (self._dtype, self.layout.data_dtype) else self._dtype
        data, indices = self._outputs(plan.total, wanted, out, pool or self._buffers)
        target = data if data.dtype == native else np.empty(plan.total, native)
        if once:
            first, *repeats = plan_once(plan)
            self.columns.gather(first, target, indices, helpers)
            copy_repeats(plan, *repeats, target, indices)
        else:
            self.columns.gather(plan, target, indices, helpers)
        if target is not data:
            cast_exactly(target, data)
        return RowBatch(data, indices, plan.indptr, self.layout.n_vars, rows)

    def visit(
        self,
        rows: Int64Array,
        visitor: RowVisitor,
        dtype: npt.DTypeLike | None = None,
        *,
        pool: BufferSource | None = None,
        helpers: ThreadPoolExecutor | None = None,
    ) -> None:
        """Hand rows (numbers already checked) to a visitor, some at a time where that spares memory; see :meth:`read`."""
        wanted = self._dtype if dtype is None else checked_dtype(dtype)
        if not self._read_before:  # and not under its lock: a visitor may have something of its own to compile, in other threads
            self.read(rows[:1], wanted)
        visit = self.columns.visit if wanted in (self._dtype, self.layout.data_dtype) else None
        if visit is None:
            visit_batch(self._read(rows, wanted, None, False, pool, helpers), visitor)
        else:
            visit(plan_rows(*self.columns.bounds(rows)), wanted, self._id_dtype, visitor, helpers)

    def row_lengths(self, rows: Int64Array) -> Int64Array:
        """How many values each row stores."""
        return self.columns.bounds(rows)[1]

    def cost(self, rows: Int64Array) -> tuple[int, ReadCost | None]:
        """How many values these rows store, and what reading them takes where that is known; reads row pointers only."""
        plan = plan_rows(*self.columns.bounds(rows))
        cost = getattr(self.columns, "cost", None)
        return plan.total, None if cost is None else cost(plan)

    def counters(self) -> dict[str, int]:
        """Chunks decoded and chunks found in memory since it was opened; zeros where another path reads, which counts none."""
        counters = getattr(self._columns, "counters", None)
        found: dict[str, int] = counters() if counters is not None else {"decoded": 0, "hits": 0}
        return found

    def count_values(self) -> int:
        """How many values the matrix stores.  A dense matrix is read whole for that, once."""
        if self.layout.encoding != "array":
            return self.layout.nnz
        from scdl_zarr.reading.general import DenseColumns

        with FIRST_USE:
            columns = self.columns
        assert isinstance(columns, DenseColumns)
        return columns.count()

    def _outputs(self, total: int, wanted: np.dtype[Any], out: Buffers | None, pool: BufferSource) -> Buffers:
        if out is None:
            return pool.take(total, wanted), pool.take(total, self._id_dtype)
        if not isinstance(out, (tuple, list)) or len(out) != 2:
            raise OptionError(f"out is {type(out).__name__}, expected two arrays: (data, indices)")
        data, indices = _buffer("data", out[0], wanted, total), _buffer("indices", out[1], self._id_dtype, total)
        if np.may_share_memory(data, indices):
            raise OptionError("out: the data and the indices buffer share memory; give each its own")
        return data, indices


def visit_batch(batch: RowBatch, visitor: RowVisitor) -> None:
    """All rows of a batch as one block."""
    visitor.begin(batch.indptr, batch.data.dtype, batch.indices.dtype)
    visitor.visit(RowBlock(places=np.arange(len(batch)), data=batch.data, ids=batch.indices, indptr=batch.indptr.copy()))


def _buffer(name: str, buffer: Any, expected: np.dtype[Any], total: int) -> npt.NDArray[Any]:
    """As much of a buffer of the caller's as is filled, as a plain array."""
    if not isinstance(buffer, np.ndarray) or isinstance(buffer, np.ma.MaskedArray):
        raise OptionError(f"out: the {name} buffer is {type(buffer).__name__}, expected an array of {expected}")
    if buffer.ndim != 1 or buffer.dtype != expected or not buffer.flags.carray:
        raise OptionError(
            f"out: the {name} buffer is {buffer.dtype} of shape {buffer.shape}, "
            f"expected a contiguous writable 1-D array of {expected}"
        )
    if len(buffer) < total:
        raise OptionError(f"out: the {name} buffer has {len(buffer)} entries, these rows store {total} values")
    return np.asarray(buffer[:total])
