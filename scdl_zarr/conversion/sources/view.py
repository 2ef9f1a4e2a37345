"""Rows of a store of ours in an order, and genes of it, as a source.

::

    positions of the view ──► rows of the store ──► random reads of the store ──► ids mapped, what is not in the view
         (order.py)              (any order)           (reading/csr.py)           dropped, rows that were sorted sorted again

A view is either of one source of the store (then it has that source's own genes, and is what the source would be with fewer rows)
or of the whole store.  Row pointers are sums of row lengths, of which one is kept for each block of 65,536 rows; the others are
found again from the row pointers of the store.  Where values are dropped, rows have the lengths that somebody counted before
(``rewrite.py``); a row that turns out to keep another number of them is an error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.conversion.kernels import drop_unmapped, map_rows, sort_rows
from scdl_zarr.conversion.sources import MatrixHeader, Provenance, RowArray, SourceSpec
from scdl_zarr.conversion.sources.order import RowOrder, View, open_numbers
from scdl_zarr.conversion.sources.row_readers import WholeArray, row_array_of
from scdl_zarr.conversion.sources.store import OpenedStore, StoreSource
from scdl_zarr.conversion.sources.view_rows import ViewArray, ViewTable
from scdl_zarr.errors import CorruptStoreError, FeatureNameError, SourceError
from scdl_zarr.reading.plan import Int64Array, plan_rows
from scdl_zarr.reading.row_arrays import LazyArrays
from scdl_zarr.storage.schema import MatrixLayout

if TYPE_CHECKING:
    import pandas as pd


__all__ = ["ViewMatrix", "ViewSource", "gene_numbers"]

BLOCK_ROWS = 1 << 16
BATCH_VALUES = 1 << 19  # read at once where some of them are dropped
KEPT_BLOCKS = 2  # of row pointers: a piece of a task may lie in two


def gene_numbers(names: pd.Index, wanted: tuple[str, ...]) -> Int64Array:
    """For each gene that is wanted its number among `names`, or -1 where there is none of that name.

    Raises
    ------
    FeatureNameError
        A name that is wanted is there several times.
    """
    if not names.is_unique:
        repeated = set(names[names.duplicated()])
        for name in wanted:
            if name in repeated:
                found = np.flatnonzero(names == name)
                at = ", ".join(map(str, found[:10].tolist())) + (", ..." if len(found) > 10 else "")
                raise FeatureNameError(
                    f"gene {name!r} is there {len(found)} times, at {at}: its name does not say which is meant"
                )
        places = {name: place for place, name in reversed(list(enumerate(names)))}
        return np.array([places.get(name, -1) for name in wanted], np.int64)
    return np.asarray(names.get_indexer(list(wanted)), np.int64)


class ViewSource(StoreSource):
    """Some rows, and perhaps genes, of a store.  Use as a context manager."""

    def __init__(self, spec: SourceSpec) -> None:
        super().__init__(spec)
        assert spec.view is not None
        self._view: View = spec.view

    @property
    def _n_stored(self) -> int:
        return self._store.metadata.n_obs

    # ---- matrices

    def matrix(self, key: str) -> ViewMatrix:
        layout = self._store.metadata.matrices.get(key)
        if layout is None:
            raise SourceError(f"{self.spec.path} has no matrix {key}; it has: {', '.join(self._store.metadata.matrices)}")
        if key.startswith("obsp/"):
            return ViewMatrix(self._store, layout, self._view, len(self._view.order), self._neighbours())
        if self._view.source is not None:
            table = self._store.tables[self._view.source]
            genes = self._store.local_genes(table)
            unsorted = None if genes is None or genes[1] else self._store.unsorted_rows(key)
            columns = None if genes is None else _Columns(lookup=genes[0].__getitem__, rising=genes[1], unsorted=unsorted)
            return ViewMatrix(self._store, layout, self._view, len(self._store.table(table)), columns)
        if self._view.genes is None:
            return ViewMatrix(self._store, layout, self._view, self._store.metadata.n_vars, None)
        return ViewMatrix(self._store, layout, self._view, len(self._view.genes), self._chosen_genes())

    def _chosen_genes(self) -> _Columns | None:
        numbers = self._gene_numbers()
        n_vars = self._store.metadata.n_vars
        there = np.flatnonzero(numbers >= 0)
        lookup = np.full(n_vars, -1, np.int64)
        lookup[numbers[there]] = there
        if np.array_equal(lookup, np.arange(n_vars)):
            return None
        return _Columns(lookup=lookup.__getitem__, rising=bool((np.diff(numbers[there]) > 0).all()))

    def _gene_numbers(self) -> Int64Array:
        assert self._view.genes is not None
        key = ("gene numbers", self._view.genes)
        if key not in self._store.kept:
            self._store.kept[key] = gene_numbers(self._vocabulary().index, self._view.genes)
        found: Int64Array = self._store.kept[key]
        return found

    def _neighbours(self) -> _Columns | None:
        order = self._view.order
        if order.file is None and order.permutation is None and len(order) == self._n_stored:
            return None
        return _Columns(lookup=order.positions, rising=order.file is None and order.permutation is None)

    # ---- tables and the rest

    def obs(self) -> pd.DataFrame:
        rows = self._view.order.rows(0, len(self._view.order), self._n_stored)
        return self._store.obs.to_pandas().iloc[rows]

    def obs_table(self) -> ViewTable:
        return ViewTable(self._store.obs, self._view.order)

    def _vocabulary(self) -> pd.DataFrame:
        if "vocabulary" not in self._store.kept:
            self._store.kept["vocabulary"] = self._store.vocabulary()
        found: pd.DataFrame = self._store.kept["vocabulary"]
        return found

    def var(self, key: str) -> pd.DataFrame:
        if self._view.source is not None:
            return super().var(key)
        if self._view.genes is None:
            return self._vocabulary()
        key_of = ("chosen var", self._view.genes)
        if key_of not in self._store.kept:
            self._store.kept[key_of] = _take_genes(self._vocabulary(), self._gene_numbers(), self._view.genes)
        found: pd.DataFrame = self._store.kept[key_of]
        return found

    def columns_left_out(self, key: str) -> list[str]:
        if self._view.source is not None:
            return super().columns_left_out(key)
        return list(self._store.metadata.left_out)

    def element(self, path: str) -> Any:
        return self._arrays(path).read(path.partition("/")[2], self._view.order.rows(0, len(self._view.order), self._n_stored))

    def row_array(self, path: str) -> RowArray:
        found = row_array_of(self._store.metadata.nodes.get(path))
        if found is None:
            return WholeArray(self.spec.path, path, self.element(path))
        read = functools.partial(self._arrays(path).read, path.partition("/")[2])
        return ViewArray(read, self._view.order, *found)

    def origin_rows(self, start: int, stop: int) -> Int64Array:
        """Which rows of the origins the rows [start, stop) were: of those that the store records, or of all its rows."""
        if self._store.origins() is None:
            return self._view.order.rows(start, stop, self._n_stored)
        found: Int64Array = self._recorded_origins.rows(start, stop)
        return found

    @functools.cached_property
    def _recorded_origins(self) -> ViewArray:
        def read(rows: Int64Array) -> Int64Array:
            found = self._store.blocks.origin_rows(rows)
            assert found is not None
            return found

        return ViewArray(read, self._view.order, (self._n_stored,), np.dtype(np.int64))

    def _arrays(self, path: str) -> LazyArrays:
        group = path.partition("/")[0]
        children, nodes = self._store.metadata.children(group), self._store.metadata.nodes
        return LazyArrays(self._store.location, group, children, nodes, self._n_stored)

    def provenance(self) -> Provenance | None:  # type: ignore[override]  # the whole store is a file like any other
        if self._view.source is None:
            return None
        recorded = super().provenance()
        whole = len(self._view.order) == len(self._rows)
        return recorded if whole else Provenance(matrix=recorded.matrix, size_bytes=recorded.size_bytes, checksum=None)


def _take_genes(var: pd.DataFrame, numbers: Int64Array, names: tuple[str, ...]) -> pd.DataFrame:
    """The rows of a var table; genes that it has not have a name and nothing else."""
    import pandas as pd

    from scdl_zarr.conversion.frames import nullable

    index = pd.Index(np.array(names, object), name=var.index.name)
    if (numbers >= 0).all():
        return var.iloc[numbers].set_axis(index)
    plain = {str(name): nullable(var[name].reset_index(drop=True)).array.take(numbers, allow_fill=True) for name in var.columns}
    return pd.DataFrame(plain, index=index)


# ---- matrices


@dataclass(frozen=True, slots=True, kw_only=True)
class _Columns:
    """What becomes of the ids of the store: ids of the view, or -1 where an entry is not in it."""

    lookup: Callable[[npt.NDArray[Any]], Int64Array]
    rising: bool  # rows that are sorted stay sorted
    unsorted: Int64Array | None = None  # rows that count as not sorted, whatever their ids look like


class ViewMatrix:
    """A matrix of the view, by ranges."""

    def __init__(self, store: OpenedStore, layout: MatrixLayout, view: View, n_vars: int, columns: _Columns | None) -> None:
        assert layout.data is not None and layout.indices is not None
        self._store, self._layout, self._view, self._map = store, layout, view, columns
        self._order: RowOrder = view.order
        self._columns = store.columns(layout.path)
        self._id_dtype = np.dtype(np.int32 if max(layout.n_vars, n_vars) <= 1 << 31 else np.int64)
        self._blocks: dict[int, Int64Array] = {}
        self._borders = self._known_borders()
        read = layout.data_dtype.itemsize + self._id_dtype.itemsize + 32  # bytes for each: values, ids, and what maps them
        self.header = MatrixHeader(
            key=layout.path,
            n_obs=len(view.order),
            n_vars=n_vars,
            nnz=int(self._borders[-1]),
            dtype=layout.data_dtype,
            index_dtype=self._id_dtype,
            # four of these are counted for each task; a batch of values that are not all kept is one more
            chunk_bytes=max(layout.data.chunk_bytes, layout.indices.chunk_bytes) + (BATCH_VALUES * read // 4 if columns else 0),
        )

    # ---- where rows start

    def _bounds(self, start: int, stop: int) -> tuple[Int64Array, Int64Array]:
        """Where rows [start, stop) of the view are in the store, and how long they are there."""
        return self._columns.bounds(self._order.rows(start, stop, self._layout.n_obs))

    def _lengths(self, start: int, stop: int) -> Int64Array:
        """How many values the rows [start, stop) have in the view."""
        if self._layout.path not in self._view.counted:
            return self._bounds(start, stop)[1]
        path = self._view.counts_path(self._layout.path)
        counts = open_numbers(path)
        found: Int64Array = np.array(counts[self._view.first + start : self._view.first + stop])
        if len(found) != stop - start or (len(found) and found.min() < 0):
            raise SourceError(f"{path} does not say how many values every row keeps")
        return found

    def _known_borders(self) -> Int64Array:
        """How many values come before each block of rows, and in all."""
        key = ("borders", self._layout.path, self._view)
        if key not in self._store.kept:
            n = len(self._order)
            sums = [int(self._lengths(k, min(k + BLOCK_ROWS, n)).sum()) for k in range(0, n, BLOCK_ROWS)]
            self._store.kept[key] = np.concatenate([[0], np.cumsum(np.array(sums, np.int64))]).astype(np.int64)
        found: Int64Array = self._store.kept[key]
        return found

    def _block(self, number: int) -> Int64Array:
        """The row pointers of a block, with the one after it."""
        found = self._blocks.get(number)
        if found is None:
            start = number * BLOCK_ROWS
            lengths = self._lengths(start, min(start + BLOCK_ROWS, len(self._order)))
            found = np.empty(len(lengths) + 1, np.int64)
            found[0] = self._borders[number]
            np.cumsum(lengths, out=found[1:])
            found[1:] += found[0]
            if found[-1] != self._borders[number + 1]:
                raise SourceError(f"{self._store.location}: the row lengths of {self._layout.path} changed while they were read")
            while len(self._blocks) >= KEPT_BLOCKS:
                del self._blocks[next(iter(self._blocks))]
            self._blocks[number] = found
        return found

    def indptr(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        pointers: Int64Array = np.empty(stop - start, np.int64)
        n = len(self._order)
        for number in range(start // BLOCK_ROWS, -(-min(stop, n) // BLOCK_ROWS)):
            low, high = max(start, number * BLOCK_ROWS), min(stop, n, (number + 1) * BLOCK_ROWS)
            pointers[low - start : high - start] = self._block(number)[low - number * BLOCK_ROWS : high - number * BLOCK_ROWS]
        if stop > n:  # the pointer after the last row
            pointers[-1] = self.header.nnz
        return pointers

    def _row_of(self, element: int) -> int:
        """The row that an element is of."""
        number = int(np.searchsorted(self._borders, element, side="right")) - 1
        return number * BLOCK_ROWS + int(np.searchsorted(self._block(number), element, side="right")) - 1

    # ---- what is in them

    def elements(
        self, start: int, stop: int, out: tuple[npt.NDArray[Any], npt.NDArray[Any]] | None = None
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        if out is None:
            out = np.empty(stop - start, self.header.dtype), np.empty(stop - start, self.header.index_dtype)
        if stop == start:
            return out
        first, last = self._row_of(start), self._row_of(stop - 1)
        pointers = self.indptr(first, last + 2)
        starts, lengths = self._bounds(first, last + 1)
        if self._map is None:
            skipped = start - int(pointers[0])  # the first and the last row may be asked for in part
            starts[0] += skipped
            lengths[0] -= skipped
            lengths[-1] -= int(pointers[-1]) - stop
            self._columns.gather(plan_rows(starts, lengths), *out)
            return out
        for a, b in _batches(lengths):
            low, high = int(pointers[a]), int(pointers[b])
            wanted = self._order.rows(first + a, first + b, self._layout.n_obs)
            values, ids = self._kept(wanted, starts[a:b], lengths[a:b], np.diff(pointers[a : b + 1]))
            begin, end = max(low, start), min(high, stop)
            if begin < end:
                out[0][begin - start : end - start] = values[begin - low : end - low]
                out[1][begin - start : end - start] = ids[begin - low : end - low]
        return out

    def _kept(
        self, rows: Int64Array, starts: Int64Array, lengths: Int64Array, expected: Int64Array
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """The values and ids of whole rows as the view has them."""
        assert self._map is not None
        values, mapped, in_order, pointers = self._read_mapped(starts, lengths)
        kept = np.empty(len(rows), np.int64)
        total = drop_unmapped(values.view(f"u{values.dtype.itemsize}"), mapped, pointers, kept)
        if not np.array_equal(kept, expected):
            odd = int(np.flatnonzero(kept != expected)[0])
            raise CorruptStoreError(
                f"{self._store.location}: row {rows[odd]} of {self._layout.path} has {kept[odd]} values of this view, "
                f"and {expected[odd]} were counted"
            )
        values, mapped = values[:total], mapped[:total]
        if not self._map.rising and total:
            if self._map.unsorted is not None:
                in_order = ~np.isin(rows, self._map.unsorted)
            pointers = np.concatenate([[0], np.cumsum(kept)]).astype(np.int64)
            words = values.view(f"u{values.dtype.itemsize}")
            longest = int(kept.max())
            sort_rows(pointers, in_order, mapped, words, np.empty(longest, mapped.dtype), np.empty(longest, words.dtype))
        return values, mapped

    def _read_mapped(
        self, starts: Int64Array, lengths: Int64Array
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[np.bool_], Int64Array]:
        """Values, ids of the view (-1: not in it), which rows are sorted in the store, and row pointers."""
        assert self._map is not None
        plan = plan_rows(starts, lengths)
        values, ids = np.empty(plan.total, self.header.dtype), np.empty(plan.total, self._id_dtype)
        self._columns.gather(plan, values, ids)
        in_order = np.empty(len(starts), np.bool_)
        outside = map_rows(ids, plan.indptr, np.empty(self._layout.n_vars, np.bool_), True, np.empty_like(ids), in_order)
        assert outside < 0, "the reader has checked that ids are columns of the store"
        mapped = self._map.lookup(ids).astype(self._id_dtype)
        return values, mapped, in_order, plan.indptr

    def kept_counts(self, start: int, stop: int) -> Int64Array:
        """How many values of the rows [start, stop) are in the view: read, not looked up."""
        starts, lengths = self._bounds(start, stop)
        if self._map is None:
            return lengths
        counts: Int64Array = np.empty(stop - start, np.int64)
        for a, b in _batches(lengths):
            values, mapped, _, pointers = self._read_mapped(starts[a:b], lengths[a:b])
            drop_unmapped(values.view(f"u{values.dtype.itemsize}"), mapped, pointers, counts[a:b])
        return counts


def _batches(lengths: Int64Array) -> Iterator[tuple[int, int]]:
    """Runs of rows of at most BATCH_VALUES values, or one longer row."""
    done = np.cumsum(lengths)
    start = 0
    while start < len(lengths):
        before = int(done[start - 1]) if start else 0
        stop = max(int(np.searchsorted(done, before + BATCH_VALUES, side="right")), start + 1)
        yield start, stop
        start = stop
