"""obs and obsm of a view: rows that follow one another in it and lie anywhere in the store.

::

    positions [0, 2**20) ──► rows of the store ──► by the chunk they lie in ──► each chunk decoded once ──► a window: the parts
                                                                                                            that are stored

Whatever holds a row is decoded whole, so many rows are taken at once and kept for the ranges that follow.  What is kept are the
parts of a column as they are stored, and texts as bytes behind one another: a fifth of what they take as Python's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.conversion.sources.order import RowOrder
from scdl_zarr.conversion.sources.row_readers import bytes_of
from scdl_zarr.errors import CorruptStoreError
from scdl_zarr.reading.plan import Int64Array
from scdl_zarr.reading.row_ranges import KeptPiece
from scdl_zarr.reading.tables import LazyTable

if TYPE_CHECKING:
    import pandas as pd

    from scdl_zarr.conversion.sources.text_chunks import TextChunks
    from scdl_zarr.reading.row_ranges import ElementRows

__all__ = ["GatheredTexts", "ViewArray", "ViewTable", "array_window_bytes", "column_window_bytes"]

WINDOW_ROWS = 1 << 20  # of a column of obs
ARRAY_WINDOW_BYTES = 1 << 25  # of an array of obsm
CHUNK_ROWS = 1 << 16  # of tables that we write
ROW_BYTES = 32  # of a window beside what it holds: the row's number, its place among those of its chunk, and their sort


def column_window_bytes(row_bytes: int, n_rows: int) -> int:
    """Memory of a window of a column whose rows take so many bytes, in a view of so many rows."""
    return min(n_rows, WINDOW_ROWS) * (row_bytes + ROW_BYTES)


def array_window_bytes(width: tuple[int, ...], dtype: np.dtype[Any], n_rows: int) -> int:
    """Memory of a window of an array whose rows have that shape."""
    row = int(np.prod(width)) * dtype.itemsize
    return min(n_rows, _array_height(row)) * (row + ROW_BYTES)


def _array_height(row_bytes: int) -> int:
    return max(min(ARRAY_WINDOW_BYTES // max(row_bytes, 1), WINDOW_ROWS), 1)


class GatheredTexts:
    """Texts by place, put in in any order.

    Parameters
    ----------
    n
        How many there will be.
    """

    def __init__(self, n: int) -> None:
        self._pool = bytearray()
        self._starts, self._lengths = np.empty(n, np.int64), np.empty(n, np.int32)

    @property
    def nbytes(self) -> int:
        return len(self._pool) + self._starts.nbytes + self._lengths.nbytes

    def put(self, places: Int64Array, texts: npt.NDArray[Any]) -> None:
        """Texts, Python's or NumPy's, for these places."""
        listed = texts.tolist()
        joined = "".join(listed)
        encoded = joined.encode()
        parts = listed if len(encoded) == len(joined) else [text.encode() for text in listed]
        self._note(places, np.fromiter(map(len, parts), np.int64, len(parts)))
        self._pool += encoded

    def take(
        self, places: Int64Array, content: npt.NDArray[np.uint8], starts: Int64Array, lengths: npt.NDArray[np.int32]
    ) -> None:
        """Texts that lie in `content`, encoded, for these places."""
        from scdl_zarr.conversion.sources.text_chunks import copy_texts

        first, total = len(self._pool), self._note(places, lengths)
        self._pool += bytes(total)
        copy_texts(content, starts, lengths, np.frombuffer(self._pool, np.uint8)[first:])

    def _note(self, places: Int64Array, lengths: npt.NDArray[np.integer]) -> int:
        stops = np.cumsum(lengths, dtype=np.int64)
        self._starts[places], self._lengths[places] = len(self._pool) + stops - lengths, lengths
        return int(stops[-1]) if len(stops) else 0

    def __getitem__(self, rows: slice) -> npt.NDArray[np.object_]:
        starts, lengths = self._starts[rows], self._lengths[rows]
        found = np.empty(len(starts), object)
        pool = self._pool
        try:
            found[:] = [pool[a:b].decode() for a, b in zip(starts.tolist(), (starts + lengths).tolist(), strict=True)]
        except UnicodeDecodeError as error:
            raise CorruptStoreError(f"a text of the store is no UTF-8: {error}") from error
        return found


class _Window:
    """The parts of some rows of a column, by place."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._parts: list[Any] = []

    def put(self, places: Int64Array, parts: tuple[npt.NDArray[Any], ...]) -> None:
        if not self._parts:
            self._parts = [
                GatheredTexts(self._n) if part.dtype.kind in "OT" else np.empty((self._n, *part.shape[1:]), part.dtype)
                for part in parts
            ]
        for own, part in zip(self._parts, parts, strict=True):
            if isinstance(own, GatheredTexts):
                own.put(places, part)
            else:
                own[places] = part

    def put_texts(self, chunks: TextChunks, rows: Int64Array) -> None:
        """All of them, of a column that is texts and nothing else."""
        gathered = GatheredTexts(self._n)
        for places in by_chunk(rows, chunks.chunk_rows):
            number = int(rows[places[0]]) // chunks.chunk_rows
            content, starts, lengths = chunks.read(number)
            wanted = rows[places] - number * chunks.chunk_rows
            gathered.take(places, content, starts[wanted], lengths[wanted])
        self._parts = [gathered]

    def rows(self, start: int, stop: int) -> tuple[npt.NDArray[Any], ...]:
        return tuple(part[start:stop] for part in self._parts)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self._parts)


class ViewTable:
    """The cells' table of a view, a window of one column at a time.  See ``sources.TableReader``."""

    def __init__(self, table: LazyTable, order: RowOrder, *, told_rows: int | None = None) -> None:
        self._table, self._order = table, order
        self.columns, self.index_name, self.n_rows = table.columns, table.index_name, len(order)
        self.held_bytes = 0
        self._height = WINDOW_ROWS if order.scatters else CHUNK_ROWS
        self._told_rows = min(told_rows or self._height, self.n_rows)  # of the windows that `held_bytes` tells of
        self._opened: tuple[str | None, ElementRows] | None = None
        self._window: tuple[int, _Window] | None = None

    def column(self, name: str, start: int, stop: int) -> pd.Series[Any]:
        import pandas as pd

        return pd.Series(self._rows(name, start, max(stop, start + 1)))[: stop - start]

    def names(self, start: int, stop: int) -> pd.Index:
        import pandas as pd

        return pd.Index(self._rows(None, start, max(stop, start + 1)), name=self.index_name)[: stop - start]

    def in_any_order(self) -> tuple[ViewTable, str]:
        """The same rows in the order in which the store is read fastest, and what tells this order from others."""
        return ViewTable(self._table, self._order.ascending(), told_rows=self._height), self._order.told

    def _rows(self, name: str | None, start: int, stop: int) -> Any:
        """At least a row where the table has one: of none at all, pandas would infer another dtype than of the table."""
        if self._opened is None or self._opened[0] != name:
            self._window = None
            self._opened = name, self._table.open_column(name)
        opened = self._opened[1]
        if not self.n_rows:
            return opened.rows(0, min(1, len(self._table)))
        start = min(start, self.n_rows - 1)
        found = [self._taken(opened, number, low, high) for number, low, high in self._spans(start, min(stop, self.n_rows))]
        if len(found) == 1:
            return opened.values(found[0])
        return opened.values(tuple(np.concatenate(parts) for parts in zip(*found, strict=True)))

    def _spans(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Windows with rows of [start, stop), and which of theirs those are."""
        for number in range(start // self._height, -(-stop // self._height)):
            first = number * self._height
            yield number, max(start - first, 0), min(stop - first, self._height)

    def _taken(self, opened: ElementRows, number: int, low: int, high: int) -> tuple[npt.NDArray[Any], ...]:
        if self._window is None or self._window[0] != number:
            self._window = None  # one at a time
            self._window = number, self._gathered(opened, number)
        return self._window[1].rows(low, high)

    def _gathered(self, opened: ElementRows, number: int) -> _Window:
        """A window: each chunk of the store that has a row of it is read once."""
        start = number * self._height
        rows = self._order.rows(start, min(start + self._height, self.n_rows), len(self._table))
        window = _Window(len(rows))
        chunks = _text_chunks(opened)
        if chunks is not None:
            try:
                window.put_texts(chunks, rows)
            finally:
                opened.location.require_same()
        else:
            for places in by_chunk(rows, CHUNK_ROWS):
                wanted = rows[places]
                low = int(wanted.min())
                parts = opened.parts(low, int(wanted.max()) + 1)
                window.put(places, tuple(part[wanted - low] for part in parts))
        self._note(opened, window, len(rows))
        return window

    def _note(self, opened: ElementRows, window: _Window, n: int) -> None:
        """What a window of the view takes, as far as this one tells."""
        whole = 0 if opened.kept is None else bytes_of(opened.kept)
        self.held_bytes = max(self.held_bytes, whole + column_window_bytes(window.nbytes // max(n, 1), self._told_rows))


class ViewArray:
    """An array with a row for each cell of a view, a window at a time.  See ``sources.RowArray``.

    Parameters
    ----------
    read
        Gives rows of the store by number.
    shape, dtype
        Of the whole array in the store.
    """

    def __init__(
        self, read: Callable[[Int64Array], npt.NDArray[Any]], order: RowOrder, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> None:
        self._read, self._order, self._stored = read, order, shape
        self.shape, self.dtype = (len(order), *shape[1:]), dtype.newbyteorder("=")
        self.held_bytes = array_window_bytes(shape[1:], dtype, len(order))
        height = _array_height(int(np.prod(shape[1:])) * dtype.itemsize) if order.scatters else CHUNK_ROWS
        self.rows = KeptPiece(self._gathered, len(order), height).rows

    def in_any_order(self) -> tuple[ViewArray, str]:
        """As of a :class:`ViewTable`."""
        return ViewArray(self._read, self._order.ascending(), self._stored, self.dtype), self._order.told

    def _gathered(self, start: int, stop: int) -> npt.NDArray[Any]:
        return self._read(self._order.rows(start, stop, self._stored[0])).astype(self.dtype, copy=False)


def _text_chunks(opened: ElementRows) -> TextChunks | None:
    """The chunks of a column that is texts and nothing else, where they are encoded as ours."""
    from scdl_zarr.conversion.sources.text_chunks import TextChunks

    return TextChunks.of(opened.location, opened.path, opened.node) if opened.is_text else None


def by_chunk(rows: Int64Array, height: int) -> Iterator[Int64Array]:
    """The places of rows that lie in the same `height` rows of the store, chunk after chunk, in the order of `rows`."""
    chunks = rows // height
    if len(chunks) and chunks.max() < 1 << 16:
        chunks = chunks.astype(np.uint16)  # which NumPy sorts by counting
    order = np.argsort(chunks, kind="stable")
    borders = np.flatnonzero(np.diff(chunks[order])) + 1
    yield from np.split(order, borders) if len(order) else ()
