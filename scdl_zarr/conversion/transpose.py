"""Columns turned into rows through files, in bounded memory.

::

    columns   ──► pieces ──► entries dealt out to buckets of rows ──► run-0000.bin       one task, one file
              ──► pieces ──► entries dealt out to buckets of rows ──► run-0001.bin
                                                                        │ │
    rows of a bucket  ◄── entries put in their rows, run after run  ◄───┴─┘              read by the tasks of shards

Buckets are runs of rows that hold about a million values each; they follow from what the rows store, so that every process has
the same ones.  A run is an equal share of the elements, wherever in a column it begins.  A file holds the segments of its pieces
one behind the other, then an index by bucket, and at the end what it is; it has its name only when it is whole, so a conversion
that goes on keeps it.  Nothing read from it is believed without its checksum.  What is damaged (the files are not flushed: a
crash of the machine may take their content) is removed and made again by the next run.

Values are carried as their bytes, and every step is stable: rows have their entries in the order of the columns, and those of
one place in the order of the file.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from scdl_zarr.conversion.column_kernels import bucket_borders, checksums, deal_out, place_entries, size_buckets
from scdl_zarr.conversion.files import partial_path
from scdl_zarr.conversion.problems import blaming
from scdl_zarr.conversion.sources import MatrixReader, open_source
from scdl_zarr.conversion.sources.counts import RowCounts, adopted_counts, forget_counts
from scdl_zarr.conversion.sources.csc import ColumnPiece, CscMatrix, changed, column_pieces, compiled_ids
from scdl_zarr.conversion.staging import SEGMENT_BYTES, Staging, TransposeTask, TurnSizes, entry_dtype
from scdl_zarr.conversion.stopping import refuse_if_stopped
from scdl_zarr.errors import CorruptStoreError

__all__ = ["Buckets", "TransposedMatrix", "is_staged", "stage_run"]

_FOOTER = struct.Struct("<8s16sqqqqqI")  # magic, what it is, buckets, pieces, bytes of an entry, start, stop, crc32c of these
_MAGIC = b"scdl-tr1"
_SEGMENT = np.dtype([("offset", "<u8"), ("count", "<u4"), ("crc", "<u4")])
_TABLE_BITS = 16
assert _SEGMENT.itemsize == SEGMENT_BYTES


# ---- buckets


@dataclass(frozen=True, slots=True, kw_only=True)
class Buckets:
    """Runs of rows, the values before each, and a table that leads from a row to its bucket."""

    rows: npt.NDArray[np.int64]  # first row of each bucket, and the end
    values: npt.NDArray[np.int64]
    table: npt.NDArray[np.int32]  # bucket in which each block of 2**shift rows begins, and the last
    shift: int

    @classmethod
    def of(cls, counts: RowCounts, sizes: TurnSizes) -> Buckets:
        n_obs = len(counts.counts)
        # two neighbours hold more values than one may, unless the first is full of rows
        most = 2 * counts.total // sizes.bucket_values + n_obs // sizes.bucket_rows + 2
        rows, values = np.zeros(most + 1, np.int64), np.zeros(most + 1, np.int64)
        n, total = min(n_obs, 1), 0
        for first, piece in counts.pieces():
            n, total = bucket_borders(piece, first, total, sizes.bucket_values, sizes.bucket_rows, n, rows, values)
        rows, values = rows[: n + 1], values[: n + 1]
        rows[n], values[n] = n_obs, total
        shift = max(n_obs.bit_length() - _TABLE_BITS, 0)
        blocks = np.arange(0, n_obs, 1 << shift)
        table = np.append(np.searchsorted(rows[1:], blocks, side="right"), max(n - 1, 0)).astype(np.int32)
        return cls(rows=rows, values=values, table=table, shift=shift)

    def __len__(self) -> int:
        return len(self.rows) - 1


# ---- writing


def stage_run(task: TransposeTask) -> int:
    """Deal out the columns of a task, unless its file is there; how many bytes of values and ids were read, decoded.

    Raises
    ------
    SourceError
        The matrix is not what was counted, or its bytes do not decode.
    """
    if is_staged(task):
        return 0
    staging, (start, stop) = task.staging, task.elements
    with opened_columns(staging) as matrix:
        buckets = Buckets.of(matrix.counts, staging.sizes)
        with _RunWriter(staging, task.number, buckets, matrix) as writer:
            for piece in column_pieces(matrix.columns, matrix.where, start, stop, staging.sizes.piece_values):
                refuse_if_stopped(task.root)
                writer.add(piece)
            refuse_if_stopped(task.root, task)
        stored = matrix.columns.header
        return (stop - start) * (stored.dtype.itemsize + stored.index_dtype.itemsize)


@contextlib.contextmanager
def opened_columns(staging: Staging) -> Iterator[CscMatrix]:
    """The matrix, counted (by this process or another), for as long as its source is open."""
    with blaming(staging.spec), open_source(staging.spec) as source:
        with adopted_counts(staging.counts, (staging.spec, staging.key)):
            matrix = source.matrix(staging.key)
        yield of_staging(matrix, staging)


def of_staging(matrix: MatrixReader, staging: Staging) -> CscMatrix:
    """The matrix, if it is the one that was to be staged."""
    if not isinstance(matrix, CscMatrix) or matrix.header.nnz != staging.nnz:
        raise changed(f"{staging.spec.path}: {staging.key}")
    return matrix


class _RunWriter:
    """Writes one file.  As a context manager: renamed into place on success, removed on an error."""

    def __init__(self, staging: Staging, number: int, buckets: Buckets, matrix: CscMatrix) -> None:
        self._path, self._buckets, self._matrix = staging.path(number), buckets, matrix
        self._identity, self._range = staging.identity, staging.sizes.run(number, staging.nnz)
        stored = matrix.columns.header
        room = min(staging.sizes.piece_values, self._range[1] - self._range[0])
        self._entries = np.empty(room, entry_dtype(stored.n_vars, stored.dtype.itemsize))
        self._room = np.empty(room, stored.dtype), np.empty(room, stored.index_dtype)
        self._segments: list[npt.NDArray[Any]] = []  # of each piece, one for each bucket
        self._offset = 0

    def __enter__(self) -> _RunWriter:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = partial_path(self._path)
        self._file = open(self._temporary, "xb", buffering=0)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            with self._file:
                if kind is None:
                    self._finish()
            if kind is None:
                os.replace(self._temporary, self._path)
        finally:
            self._temporary.unlink(missing_ok=True)

    def add(self, piece: ColumnPiece) -> None:
        """The next elements."""
        buckets, n = self._buckets, piece.stop - piece.start
        values, ids = self._matrix.columns.elements(piece.start, piece.stop, (self._room[0][:n], self._room[1][:n]))
        rows = compiled_ids(ids)
        counts = np.zeros(len(buckets), np.int64)
        if size_buckets(rows, buckets.rows, buckets.table, buckets.shift, counts) >= 0:
            forget_counts(self._matrix.identity)
            raise changed(self._matrix.where)
        stops = np.cumsum(counts)
        entries = self._entries[:n]
        words = values.view(f"u{values.dtype.itemsize}")
        deal_out(
            rows,
            words,
            piece.pointers,
            piece.start,
            piece.column,
            buckets.rows,
            buckets.table,
            buckets.shift,
            stops - counts,
            entries,
        )
        content = entries.view(np.uint8)
        segments = np.empty(len(buckets), _SEGMENT)
        sums = np.empty(len(buckets), np.uint32)
        checksums(content, stops * entries.itemsize, sums)
        segments["offset"] = self._offset + (stops - counts) * entries.itemsize
        segments["count"], segments["crc"] = counts, sums
        self._segments.append(segments)
        self._write(content)
        self._offset += len(content)

    def _write(self, content: Any) -> None:
        view = memoryview(content).cast("B")
        while len(view):
            view = view[self._file.write(view) :]

    def _finish(self) -> None:
        index = np.stack(self._segments, axis=1) if self._segments else np.empty((len(self._buckets), 0), _SEGMENT)
        sums = np.array([google_crc32c.value(row.tobytes()) for row in index], "<u4")
        self._write(index.tobytes())
        self._write(sums.tobytes())
        n_buckets, n_pieces = index.shape
        self._write(footer(self._identity, n_buckets, n_pieces, self._entries.itemsize, *self._range))


def footer(identity: bytes, buckets: int, pieces: int, itemsize: int, start: int, stop: int) -> bytes:
    """The end of a file, which says what it is."""
    plain = _FOOTER.pack(_MAGIC, identity, buckets, pieces, itemsize, start, stop, 0)[:-4]
    return plain + struct.pack("<I", google_crc32c.value(plain))


# ---- reading


class _DamagedRunError(Exception):
    """A file is not there, not whole, or of something else."""


class _RunFile:
    """One opened file, its footer and length checked."""

    def __init__(self, staging: Staging, number: int) -> None:
        try:
            self._file: io.FileIO = open(staging.path(number), "rb", buffering=0)  # noqa: SIM115 (closed by __exit__)
        except OSError as error:
            raise _DamagedRunError(error.strerror) from error

    def __enter__(self) -> _RunFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def check(self, staging: Staging, number: int) -> None:
        """Refuse a file that is not of this run of this matrix, or has not the length that it says."""
        size = os.fstat(self._file.fileno()).st_size
        if size < _FOOTER.size:
            raise _DamagedRunError("it is too short")
        content = bytearray(_FOOTER.size)
        self._read(size - _FOOTER.size, memoryview(content))
        _, _, buckets, pieces, itemsize, start, stop, _ = _FOOTER.unpack(content)
        known = (start, stop) == staging.sizes.run(number, staging.nnz) and min(buckets, pieces, itemsize) >= 0
        if not known or footer(staging.identity, buckets, pieces, itemsize, start, stop) != content:
            raise _DamagedRunError("it is of another matrix, or its end is damaged")
        self._pieces, self._itemsize = pieces, itemsize
        self._data_bytes = (stop - start) * itemsize
        self._sums_at = self._data_bytes + buckets * pieces * SEGMENT_BYTES
        if size != self._sums_at + 4 * buckets + _FOOTER.size:
            raise _DamagedRunError(f"it has {size} bytes")

    def entries(self, bucket: int, room: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The entries that the run has for a bucket, at the beginning of `room`."""
        if room.itemsize != self._itemsize:
            raise _DamagedRunError(f"it has entries of {self._itemsize} bytes")
        segments = np.empty(self._pieces, _SEGMENT)
        self._read(self._data_bytes + bucket * self._pieces * SEGMENT_BYTES, segments.view(np.uint8).data)
        expected = bytearray(4)
        self._read(self._sums_at + 4 * bucket, memoryview(expected))
        if struct.unpack("<I", expected)[0] != google_crc32c.value(segments.tobytes()):
            raise _DamagedRunError("its index does not match its checksum")
        stops = np.cumsum(segments["count"], dtype=np.int64)
        total = int(stops[-1]) if len(stops) else 0
        if total > len(room):
            raise _DamagedRunError(f"it has {total} entries for bucket {bucket}, which has room for {len(room)}")
        entries = room[:total]
        view, done = entries.view(np.uint8).data, 0
        for offset, stop in zip(segments["offset"].tolist(), (stops * self._itemsize).tolist(), strict=True):
            if stop > done:
                self._read(offset, view[done:stop])
            done = stop
        sums = np.empty(len(stops), np.uint32)
        checksums(entries.view(np.uint8), stops * self._itemsize, sums)
        if not (sums == segments["crc"]).all():
            raise _DamagedRunError("entries do not match their checksums")
        return entries

    def _read(self, offset: int, out: memoryview) -> None:
        try:
            self._file.seek(offset)
            done = 0
            while done < len(out):
                got = self._file.readinto(out[done:])
                if not got:
                    raise _DamagedRunError("it ends too early")
                done += got
        except OSError as error:
            raise _DamagedRunError(str(error)) from error


def is_staged(task: TransposeTask) -> bool:
    """Whether the task's file is there and whole, as far as its end and its length tell."""
    try:
        with _RunFile(task.staging, task.number) as file:
            file.check(task.staging, task.number)
    except _DamagedRunError:
        return False
    return True


class TransposedMatrix:
    """The rows of a matrix that was staged.  See :class:`scdl_zarr.conversion.sources.MatrixReader`.  Not shared between threads.

    One bucket is held as rows, the last one, because the next range usually starts in it.
    """

    def __init__(self, matrix: MatrixReader, staging: Staging) -> None:
        self.header = matrix.header
        self._matrix, self._staging = of_staging(matrix, staging), staging
        self._counts = self._matrix.counts
        self._buckets = Buckets.of(self._counts, staging.sizes)
        self._held: int | None = None
        most = int(np.diff(self._buckets.values).max(initial=0))
        header = self.header
        self._values, self._ids = np.empty(most, header.dtype), np.empty(most, header.index_dtype)
        self._room = np.empty(most, entry_dtype(header.n_vars, header.dtype.itemsize))

    def indptr(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        return self._counts.pointers(start, stop)

    def stored(self, start: int, stop: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Values and row ids of elements [start, stop) in the order of the file."""
        return self._matrix.stored(start, stop)

    def elements(
        self, start: int, stop: int, out: tuple[npt.NDArray[Any], npt.NDArray[Any]] | None = None
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        if out is None:
            n = max(stop - start, 0)
            out = np.empty(n, self.header.dtype), np.empty(n, self.header.index_dtype)
        starts = self._buckets.values
        first = start
        while start < stop:
            bucket = int(np.searchsorted(starts, start, side="right")) - 1
            low, high = int(starts[bucket]), min(int(starts[bucket + 1]), stop)
            if self._held != bucket:
                self._held = None
                self._load(bucket)
                self._held = bucket
            for part, of_bucket in zip(out, (self._values, self._ids), strict=True):
                part[start - first : high - first] = of_bucket[start - low : high - low]
            start = high
        return out

    def _load(self, bucket: int) -> None:
        """Put the entries of all runs into the rows of a bucket."""
        rows, n = self._buckets.rows[bucket : bucket + 2], int(np.diff(self._buckets.values[bucket : bucket + 2])[0])
        pointers = self._counts.pointers(int(rows[0]), int(rows[1]) + 1) - self._buckets.values[bucket]
        at = pointers.copy()
        words, ids = self._values[:n].view(f"u{self._values.itemsize}"), self._ids[:n]
        bad = -1
        for number in range(self._staging.sizes.runs):
            bad = place_entries(self._entries(number, bucket, n), at, words, ids)
            if bad >= 0:
                break
        if bad >= 0 or not (at[:-1] == pointers[1:]).all():
            forget_counts(self._matrix.identity)
            raise changed(self._matrix.where)

    def _entries(self, number: int, bucket: int, n: int) -> npt.NDArray[Any]:
        path = self._staging.path(number)
        try:
            with _RunFile(self._staging, number) as file:
                file.check(self._staging, number)
                return file.entries(bucket, self._room[:n])
        except _DamagedRunError as error:
            path.unlink(missing_ok=True)  # so that the next run makes it again
            raise CorruptStoreError(
                f"{path}, in which a conversion keeps the columns of {self._matrix.where} on their way to rows, was lost or "
                f"damaged ({error}); run the same conversion again, it goes on where it stopped"
            ) from None
