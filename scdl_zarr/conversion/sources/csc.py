"""A matrix stored by columns seen as CSR: counting its rows, reading it column by column, and turning a small one in memory.

::

    counting, once     row ids ──► stored values of each row, kept in the process: with them the rows have pointers
    small matrices     columns ──► rows, in memory, once for each opening
    larger ones        columns ──► buckets of rows in files ──► rows          (conversion/transpose.py)

The rows come out as ``scipy.sparse.csc_matrix.tocsr`` has them: entries of a row in the order of the columns, those of one place
in the order of the file; nothing is summed, sorted or left out.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from scdl_zarr.conversion.column_kernels import count_ids, place_columns
from scdl_zarr.conversion.sources import MatrixHeader
from scdl_zarr.conversion.sources.counts import RowCounts, row_counts
from scdl_zarr.conversion.staging import HEIGHT, POINTERS, TurnSizes, column_ids_dtype, is_small, turning_bytes
from scdl_zarr.errors import SourceError
from scdl_zarr.resources import usable_cores

__all__ = [
    "ColumnPiece",
    "ColumnReader",
    "CscMatrix",
    "changed",
    "column_pieces",
    "compiled_ids",
]

COUNT_VALUES = 1 << 18  # row ids counted at a time
COUNT_ROOM_BYTES = 1 << 26  # of the threads' own counts together: a matrix of many rows is counted by fewer


class ColumnReader(Protocol):
    """The arrays of a matrix stored by columns, by ranges.  Errors of reading are SourceErrors.  Not shared between threads."""

    header: MatrixHeader  # of the arrays as they are: `index_dtype` is that of the row ids

    def indptr(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Column pointers [start, stop) as int64."""

    def ids(self, start: int, stop: int, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """Row ids of elements [start, stop), in `out` or new."""

    def elements(
        self, start: int, stop: int, out: tuple[npt.NDArray[Any], npt.NDArray[Any]] | None = None
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Values and row ids of elements [start, stop), in `out` or new."""

    def another(self) -> ColumnReader:
        """The same for another thread."""

    def close(self) -> None:
        """Let go of what it holds."""


# ---- columns


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnPiece:
    """Elements [start, stop), and the pointers of the columns from `column` on that have them."""

    start: int
    stop: int
    column: int
    pointers: npt.NDArray[np.int64]


def column_pieces(reader: ColumnReader, where: str, start: int, stop: int, most: int) -> Iterator[ColumnPiece]:
    """Elements [start, stop) in pieces of at most `most`, which may begin and end anywhere in a column.

    Raises
    ------
    SourceError
        Column pointers that do not start at 0, run backwards or do not end with the elements.
    """
    nnz, block = reader.header.nnz, _block_of(reader, start)
    done = start
    while done < stop:
        low = block * POINTERS
        high = min(low + POINTERS, reader.header.n_vars)
        if low >= high:
            raise SourceError(f"{where} has column pointers that end at {done}, but {nnz} stored values")
        pointers = reader.indptr(low, high + 1)
        check_pointers(pointers, where, low, nnz)
        if not pointers[0] <= done:
            raise SourceError(f"{where} has column pointers that start at {pointers[0]} in column {low}, expected {done} or less")
        while done < min(stop, int(pointers[-1])):
            until = min(done + most, stop, int(pointers[-1]))
            first = int(np.searchsorted(pointers, done, side="right")) - 1
            last = int(np.searchsorted(pointers, until, side="left"))
            yield ColumnPiece(start=done, stop=until, column=low + first, pointers=pointers[first : last + 1])
            done = until
        block += 1


def _block_of(reader: ColumnReader, element: int) -> int:
    """The block of pointers that has an element, if they rise; no more is read of the others than one pointer of a few."""
    low, high = 0, max(-(-reader.header.n_vars // POINTERS) - 1, 0)
    while low < high:
        middle = (low + high + 1) // 2
        if int(reader.indptr(middle * POINTERS, middle * POINTERS + 1)[0]) <= element:
            low = middle
        else:
            high = middle - 1
    return low


def check_pointers(pointers: npt.NDArray[np.int64], where: str, column: int, nnz: int) -> None:
    """Refuse pointers that are outside of the elements or run backwards; `column` is that of the first one."""
    falls = pointers[1:] < pointers[:-1]  # a difference could wrap around
    if falls.any():
        raise SourceError(f"{where} has column pointers that run backwards at column {column + int(np.argmax(falls))}")
    if pointers[0] < 0 or pointers[-1] > nnz:
        bad = pointers[0] if pointers[0] < 0 else pointers[-1]
        raise SourceError(f"{where} has a column pointer {bad}, but {nnz} stored values")


def check_all_pointers(reader: ColumnReader, where: str) -> None:
    """Refuse column pointers that do not lead through all elements."""
    n_vars, nnz, previous = reader.header.n_vars, reader.header.nnz, 0
    for start in range(0, max(n_vars, 1), POINTERS):
        pointers = reader.indptr(start, min(start + POINTERS, n_vars) + 1)
        if pointers[0] != previous:
            raise SourceError(f"{where} has column pointers that start at {pointers[0]}, expected {previous}")
        check_pointers(pointers, where, start, nnz)
        previous = int(pointers[-1])
    if previous != nnz:
        raise SourceError(f"{where} has column pointers that end at {previous}, but {nnz} stored values")


def compiled_ids(ids: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Ids in a dtype that compiled code is made for; those too large for any become negative, which are refused as well."""
    return ids if ids.dtype in (np.dtype(np.int32), np.dtype(np.int64)) else ids.astype(np.int64)


def changed(where: str) -> SourceError:
    """The error for a matrix that is not what was counted."""
    return SourceError(f"{where} changed while it was being converted; run again when nothing writes it")


# ---- counting


def count_rows(reader: ColumnReader, where: str, threads: int | None = None) -> RowCounts:
    """How many values each row stores.

    Each thread counts pieces of its own, into counts of its own while those are small; a matrix of so many rows that they are
    not is counted by one.

    Raises
    ------
    SourceError
        A row id that is no row, pointers that make no sense, bytes that do not decode.
    """
    check_all_pointers(reader, where)
    n_obs, nnz = reader.header.n_obs, reader.header.nnz
    pieces = -(-nnz // COUNT_VALUES)
    most = max(COUNT_ROOM_BYTES // (4 * max(n_obs, 1)), 1)
    threads = max(min(usable_cores() if threads is None else threads, most, pieces), 1)
    alone = threads == 1
    counts = _count_pieces(reader, where, iter(range(pieces))) if alone else _count_apart(reader, where, pieces, threads)
    if int(counts.sum(dtype=np.uint64)) != nnz:  # a count of 32 bits ran over
        raise SourceError(f"{where} has a row of more than {2**32 - 1} stored values")
    return RowCounts.of(counts, HEIGHT)


def _count_apart(reader: ColumnReader, where: str, pieces: int, threads: int) -> npt.NDArray[np.uint32]:
    todo = _Numbers(pieces)
    readers = [reader.another() for _ in range(threads)]
    try:
        with ThreadPoolExecutor(threads, thread_name_prefix="scdl-zarr-count") as pool:
            jobs = [pool.submit(_count_or_stop, own, where, todo) for own in readers]
            try:
                counts = jobs[0].result()
                for job in jobs[1:]:
                    counts += job.result()
            finally:
                todo.stop()  # an error, or Ctrl-C: the others need not go on
    finally:
        for own in readers:
            own.close()
    return counts


def _count_or_stop(reader: ColumnReader, where: str, todo: _Numbers) -> npt.NDArray[np.uint32]:
    try:
        return _count_pieces(reader, where, todo)
    except BaseException:
        todo.stop()  # nobody wants what the others count
        raise


class _Numbers:
    """Numbers of pieces, each given to one thread."""

    def __init__(self, pieces: int) -> None:
        self._numbers = iter(range(pieces))
        self._stopped = False

    def __iter__(self) -> _Numbers:
        return self

    def __next__(self) -> int:
        if self._stopped:
            raise StopIteration
        return next(self._numbers)  # of a range: one step of the interpreter, which no other thread comes between

    def stop(self) -> None:
        self._stopped = True


def _count_pieces(reader: ColumnReader, where: str, pieces: Iterator[int]) -> npt.NDArray[np.uint32]:
    n_obs, nnz = reader.header.n_obs, reader.header.nnz
    counts = np.zeros(n_obs, np.uint32)
    room = np.empty(min(COUNT_VALUES, nnz), reader.header.index_dtype)
    for piece in pieces:
        start, stop = piece * COUNT_VALUES, min((piece + 1) * COUNT_VALUES, nnz)
        ids = reader.ids(start, stop, room[: stop - start])
        bad = count_ids(compiled_ids(ids), counts)
        if bad >= 0:
            raise _no_row(reader, where, start + bad, ids[bad], n_obs)
    return counts


def _no_row(reader: ColumnReader, where: str, element: int, found: Any, n_obs: int) -> SourceError:
    piece = next(column_pieces(reader, where, element, element + 1, 1))
    return SourceError(f"{where}: column {piece.column} has row id {found}, but there are {n_obs} rows")


# ---- the matrix


class CscMatrix:
    """See :class:`scdl_zarr.conversion.sources.MatrixReader`.  Not shared between threads.

    Parameters
    ----------
    where
        File and matrix, for messages.
    identity
        What is the same only for the same matrix with the same content.
    threads
        How many count, where that is to be done; as many as there are cores if not given.
    """

    def __init__(
        self,
        reader: ColumnReader,
        *,
        where: str,
        identity: Hashable,
        threads: int | None = None,
    ) -> None:
        self.columns, self.where, self.identity = reader, where, identity
        self.counts = row_counts(identity, where, self._fits, lambda: count_rows(reader, where, threads))
        stored = reader.header
        self.small = is_small(stored)
        self._turned: tuple[npt.NDArray[Any], npt.NDArray[Any]] | None = None
        self.header = replace(
            stored,
            layout="csc",
            index_dtype=column_ids_dtype(stored.n_vars),
            chunk_bytes=stored.chunk_bytes + -(-self._held_bytes(stored) // 4),  # plans count four of these a task
            counted_bytes=self.counts.nbytes,
        )

    def _held_bytes(self, stored: MatrixHeader) -> int:
        """What reading rows takes beside the chunks."""
        if not self.small:
            return turning_bytes(stored, TurnSizes.of(stored.nnz), self.counts.longest)
        piece = min(COUNT_VALUES, stored.nnz) * (stored.dtype.itemsize + stored.index_dtype.itemsize + 8)
        rows = stored.nnz * (stored.dtype.itemsize + column_ids_dtype(stored.n_vars).itemsize)
        return rows + piece + 3 * 8 * (stored.n_obs + 1)

    def _fits(self, counts: RowCounts) -> bool:
        """Whether counts may be of this matrix; whether they are shows when its columns are placed."""
        return (len(counts.counts), counts.total) == (self.columns.header.n_obs, self.columns.header.nnz)

    def indptr(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        return self.counts.pointers(start, stop)

    def stored(self, start: int, stop: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Values and row ids of elements [start, stop) in the order of the file."""
        return self.columns.elements(start, stop)

    def elements(
        self, start: int, stop: int, out: tuple[npt.NDArray[Any], npt.NDArray[Any]] | None = None
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        if not self.small:
            raise RuntimeError(f"{self.where} is stored by columns and was not staged: its rows are read from a TransposedMatrix")
        if self._turned is None:
            self._turned = self._turn()
        values, ids = self._turned
        if out is None:
            return values[start:stop].copy(), ids[start:stop].copy()
        out[0][:], out[1][:] = values[start:stop], ids[start:stop]
        return out

    def _turn(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """All values and column ids, row by row."""
        stored = self.columns.header
        at = self.indptr(0, stored.n_obs + 1).copy()
        ends = at[1:].copy()
        values, ids = np.empty(stored.nnz, stored.dtype), np.empty(stored.nnz, self.header.index_dtype)
        words = f"u{stored.dtype.itemsize}"
        for piece in column_pieces(self.columns, self.where, 0, stored.nnz, COUNT_VALUES):
            found, rows = self.columns.elements(piece.start, piece.stop)
            bad = place_columns(
                compiled_ids(rows), found.view(words), piece.pointers, piece.start, piece.column, at, values.view(words), ids
            )
            if bad >= 0:
                raise changed(self.where)
        if not (at[:-1] == ends).all():
            raise changed(self.where)
        return values, ids
