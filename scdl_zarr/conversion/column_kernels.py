# mypy: allow-untyped-decorators
"""The compiled loops that turn columns into rows: counting, dealing entries out to buckets of rows, placing them in their rows.

Everything here releases the GIL, touches only arrays its caller gave it, and checks every number that comes from a file before
it becomes a place in one of them.  Values are moved as words of their size, so that every bit of them survives.  All loops are
stable: what comes first in a column stays before what comes later.
"""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt

from scdl_zarr.reading.kernels.crc32c import crc32c_at  # numba compiles it in, so it takes the function itself

__all__ = ["bucket_borders", "checksums", "count_ids", "deal_out", "place_columns", "place_entries", "size_buckets"]


@nb.njit(nogil=True, cache=True)
def count_ids(ids: Any, counts: npt.NDArray[np.uint32]) -> int:
    """Count each id; -1, or the position of the first that is outside of `counts`."""
    n = np.uint64(len(counts))
    for j in range(len(ids)):
        row = np.uint64(ids[j])  # a negative one is larger than any
        if row >= n:
            return j
        counts[row] += np.uint32(1)
    return -1


@nb.njit(nogil=True, cache=True)
def bucket_borders(
    counts: Any,
    first: int,
    total: int,
    most_values: int,
    most_rows: int,
    found: int,
    rows: npt.NDArray[np.int64],
    values: npt.NDArray[np.int64],
) -> tuple[int, int]:
    """Go on cutting rows into runs of at most so many values (or one row) and rows.

    `counts` are those of the rows from `first` on, which come after `total` values.  `rows` and `values` have the first row of
    each of the `found` runs that were begun and the values before it, and have room for more.  How many are begun now, and the
    values that came so far.
    """
    start, before = rows[found - 1], values[found - 1]
    for k in range(len(counts)):
        count: Any = np.int64(counts[k])
        if first + k > start and (total - before + count > most_values or first + k - start >= most_rows):
            start, before = first + k, total
            rows[found], values[found] = start, before
            found += 1
        total += count
    return found, total


# The two loops below look for the bucket of a row in the same lines: called, or inlined by numba, they were measured at 20 ns an
# element, most of it for counting references to the arrays, instead of 1 to 2.  The rows of a column usually rise, so that the
# next one is in the same bucket: that is asked first.  Otherwise `table` has the buckets in which blocks of 2**shift rows begin,
# usually one or two a block.  Numbers have no sign: a negative row is larger than any, and no index counts from the end.


@nb.njit(nogil=True, cache=True)
def size_buckets(
    ids: Any, borders: npt.NDArray[np.int64], table: npt.NDArray[np.int32], shift: int, sizes: npt.NDArray[np.int64]
) -> int:
    """Add up how many of the ids lie in each bucket; -1, or the position of the first id that is no row."""
    n, one = np.uint64(borders[len(borders) - 1]), np.uint64(1)
    bucket, start, stop, held = np.uint64(0), np.uint64(0), np.uint64(0), 0
    for j in range(len(ids)):
        row = np.uint64(ids[j])
        if row < start or row >= stop:
            if row >= n:
                return j
            sizes[bucket] += held
            held = 0
            bucket = np.uint64(table[row >> np.uint64(shift)])
            high = np.uint64(table[(row >> np.uint64(shift)) + one])
            while bucket < high and row >= np.uint64(borders[bucket + one]):  # the last one that starts at or before the row
                middle = (bucket + high + one) >> one
                if np.uint64(borders[middle]) <= row:
                    bucket = middle
                else:
                    high = middle - one
            start, stop = np.uint64(borders[bucket]), np.uint64(borders[bucket + one])
        held += 1
    sizes[bucket] += held
    return -1


@nb.njit(nogil=True, cache=True)
def deal_out(
    ids: Any,
    words: Any,
    pointers: npt.NDArray[np.int64],
    first: int,
    column: int,
    borders: npt.NDArray[np.int64],
    table: npt.NDArray[np.int32],
    shift: int,
    at: npt.NDArray[np.int64],
    entries: Any,
) -> None:
    """Write elements from number `first` on, bucket by bucket, as entries; `at` says where each bucket's next one goes.

    The elements are those that :func:`size_buckets` found good and counted; `pointers` are those of the columns from `column` on
    that have them.
    """
    done, n, one = 0, len(ids), np.uint64(1)
    bucket, start, stop, k = np.uint64(0), np.uint64(0), np.uint64(0), np.uint64(at[0])
    for c in range(len(pointers) - 1):
        until = min(pointers[c + 1] - first, n)
        for j in range(done, until):
            row = np.uint64(ids[j])
            if row < start or row >= stop:
                at[bucket] = k
                bucket = np.uint64(table[row >> np.uint64(shift)])
                high = np.uint64(table[(row >> np.uint64(shift)) + one])
                while bucket < high and row >= np.uint64(borders[bucket + one]):  # the last one that starts at or before the row
                    middle = (bucket + high + one) >> one
                    if np.uint64(borders[middle]) <= row:
                        bucket = middle
                    else:
                        high = middle - one
                start, stop = np.uint64(borders[bucket]), np.uint64(borders[bucket + one])
                k = np.uint64(at[bucket])
            entry = entries[k]
            entry.row = row - start
            entry.column = column + c
            entry.value = words[j]
            k += one
        done = max(done, until)


@nb.njit(nogil=True, cache=True)
def place_entries(entries: Any, at: npt.NDArray[np.int64], values: Any, ids: Any) -> int:
    """Put entries behind one another in their rows; -1, or the first one for which there is no room.

    `at` has one number more than there are rows: where the next entry of each goes, and the end.  The room of a row ends where
    the next row's began, which its own entries have moved on from: so what a row was too much is found when all are placed (see
    the caller), and here only what would leave the arrays.
    """
    rows, n = len(at) - 1, len(values)
    for j in range(len(entries)):
        entry = entries[j]
        row = np.int64(entry.row)
        if row >= rows:
            return j
        k = at[row]
        if k >= n:
            return j
        at[row] = k + 1
        values[k] = entry.value
        ids[k] = entry.column
    return -1


@nb.njit(nogil=True, cache=True)
def place_columns(
    rows: Any,
    words: Any,
    pointers: npt.NDArray[np.int64],
    first: int,
    column: int,
    at: npt.NDArray[np.int64],
    values: Any,
    ids: Any,
) -> int:
    """As :func:`place_entries`, straight from the columns: elements from number `first` on."""
    n_rows, room = len(at) - 1, len(values)
    done, n = 0, len(rows)
    for c in range(len(pointers) - 1):
        until = min(pointers[c + 1] - first, n)
        for j in range(done, until):
            row = np.int64(rows[j])
            if row < 0 or row >= n_rows:
                return j
            k = at[row]
            if k >= room:
                return j
            at[row] = k + 1
            values[k] = words[j]
            ids[k] = column + c
        done = max(done, until)
    return -1


@nb.njit(nogil=True, cache=True)
def checksums(content: npt.NDArray[np.uint8], stops: npt.NDArray[np.int64], sums: npt.NDArray[np.uint32]) -> None:
    """The crc32c of each piece of `content`; each begins where the one before stops."""
    start = np.int64(0)
    for k in range(len(stops)):
        sums[k] = np.uint32(crc32c_at(np.int64(content.ctypes.data) + start, stops[k] - start))
        start = stops[k]
