"""A dense matrix seen as CSR: the rules of which cells are stored, and reading it in blocks of rows.

::

    counting, once       block 0 │ block 1 │ block 2 ...   ──► stored values of each row, kept in the process
    elements [a, b)                    └─ the block that holds them, read whole, kept for the next range

What a row stores is known only when it was read.  So the first opening of a matrix reads it whole, a block at a time; later
openings (the survey has several, every shard has its own) find the counts.  A block is as many whole rows of chunks as
``BLOCK_BYTES`` hold.  Where one row of chunks is larger than ``LARGEST_BLOCK_BYTES`` (chunks that are tall and narrow), a block
is a part of it and its chunks are decoded once for each part: slower, and in bounded memory.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from scdl_zarr.conversion.kernels import count_stored, take_stored
from scdl_zarr.conversion.sources import MatrixHeader
from scdl_zarr.conversion.sources.counts import RowCounts, forget_counts, row_counts
from scdl_zarr.errors import SourceError

__all__ = ["DenseMatrix", "DenseRows", "block_height"]

BLOCK_BYTES = 1 << 22
LARGEST_BLOCK_BYTES = 1 << 28


class DenseRows(Protocol):
    """A dense two-dimensional array of a source.  Errors of reading are SourceErrors."""

    n_obs: int
    n_vars: int
    dtype: np.dtype[Any]  # in this machine's byte order
    chunk_rows: int  # rows of a chunk, 1 where there are none
    scratch_bytes: int  # what reading holds for a moment beside the block: chunks, compressed and decoded

    def blocks(self, ranges: Iterable[tuple[int, int]]) -> Iterator[npt.NDArray[Any]]:
        """Rows [start, stop) of each range, C-contiguous, each good until the next is asked for."""


def block_height(rows: DenseRows) -> int:
    """How many rows are read at once."""
    row_bytes = max(rows.n_vars * rows.dtype.itemsize, 1)
    most = max(LARGEST_BLOCK_BYTES // row_bytes, 1)
    if rows.chunk_rows > most:
        return most
    whole = max(BLOCK_BYTES // (row_bytes * rows.chunk_rows), 1) * rows.chunk_rows
    return max(min(whole, rows.n_obs), 1)


class DenseMatrix:
    """See :class:`scdl_zarr.conversion.sources.MatrixReader`.  Not shared between threads.

    A cell is stored if it is not equal to zero, as ``scipy.sparse.csr_matrix`` has it and as a dense matrix of another program's
    store is read: NaN is stored, -0.0 is not.  Ids are sorted.

    Parameters
    ----------
    where
        File and matrix, for messages.
    identity
        What is the same only for the same matrix with the same content.
    """

    def __init__(self, rows: DenseRows, *, key: str, where: str, identity: Hashable) -> None:
        if rows.dtype.kind not in "biuf" or rows.dtype.itemsize > 8:
            raise SourceError(f"{where} has values of dtype {rows.dtype}; integers, floats and booleans can be converted")
        self._rows, self._where, self._identity = rows, where, identity
        self._words = np.dtype(f"u{rows.dtype.itemsize}")
        sign = 1 << (8 * rows.dtype.itemsize - 1) if rows.dtype.kind == "f" else 0
        self._mask = self._words.type(np.iinfo(self._words).max - sign)
        self._counts = row_counts(identity, where, self._fits, self._count)
        self._held: tuple[int, npt.NDArray[Any], npt.NDArray[np.int32]] | None = None
        self._room = self._counts.largest_block + rows.n_vars  # as `take_stored` wants it
        block_bytes = self._counts.height * rows.n_vars * rows.dtype.itemsize
        held = block_bytes + self._room * (rows.dtype.itemsize + 4) + rows.scratch_bytes
        self.header = MatrixHeader(
            key=key,
            n_obs=rows.n_obs,
            n_vars=rows.n_vars,
            nnz=self._counts.total,
            dtype=rows.dtype,
            index_dtype=np.dtype(np.int32),
            chunk_bytes=-(-held // 4),  # plans count four of these a task
            layout="dense",
            counted_bytes=self._counts.nbytes,
        )

    def indptr(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        return self._counts.pointers(start, stop)

    def elements(
        self, start: int, stop: int, out: tuple[npt.NDArray[Any], npt.NDArray[Any]] | None = None
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        if out is None:
            n = max(stop - start, 0)
            out = np.empty(n, self.header.dtype), np.empty(n, self.header.index_dtype)
        starts = self._counts.starts
        while start < stop:
            block = int(np.searchsorted(starts, start, side="right")) - 1
            low, high = int(starts[block]), min(int(starts[block + 1]), stop)
            done = len(out[0]) - (stop - start)
            for part, of_block in zip(out, self._stored(block), strict=True):
                part[done : done + high - start] = of_block[start - low : high - low]
            start = high
        return out

    def _stored(self, block: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32]]:
        """Values and ids of a block; the last one is kept, because the next range usually starts in it."""
        if self._held is None or self._held[0] != block:
            if self._held is None:
                values, ids = np.empty(self._room, self.header.dtype), np.empty(self._room, np.int32)
            else:
                _, values, ids = self._held
            self._held = None
            self._take(block, values, ids)
            self._held = block, values, ids
        return self._held[1], self._held[2]

    def _take(self, block: int, values: npt.NDArray[Any], ids: npt.NDArray[np.int32]) -> None:
        height = self._counts.height
        start = block * height
        (cells,) = self._rows.blocks([(start, min(start + height, self._rows.n_obs))])
        bad = take_stored(cells.view(self._words), self._mask, self._counts.of_block(block), values.view(self._words), ids)
        if bad >= 0:
            forget_counts(self._identity)
            raise SourceError(
                f"{self._where} changed while it was being converted (row {start + bad}); run again when nothing writes it"
            )

    def _fits(self, counts: RowCounts) -> bool:
        """Whether counts are of such a matrix in such blocks; whether they are its own shows in `_take`."""
        return (len(counts.counts), counts.height) == (self._rows.n_obs, block_height(self._rows))

    def _count(self) -> RowCounts:
        rows, height = self._rows, block_height(self._rows)
        counts = np.zeros(rows.n_obs, np.uint16 if rows.n_vars < 1 << 16 else np.uint32)
        blocks = rows.blocks((start, min(start + height, rows.n_obs)) for start in range(0, rows.n_obs, height))
        found = np.empty(height, np.int64)
        for start in range(0, rows.n_obs, height):
            stop = min(start + height, rows.n_obs)
            own = found[: stop - start]
            count_stored(next(blocks).view(self._words), self._mask, own)  # no name holds a block while the next one is made
            counts[start:stop] = own
        return RowCounts.of(counts, height)
