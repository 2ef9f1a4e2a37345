"""``write_shard``: one task, alone on its shard, restartable, knowing nothing of Dask.

::

    source rows ──► ids mapped to the vocabulary ──► rows that were sorted, sorted ──► dtype checked ──► chunks
                    (range checked)                  (stably)                          and narrowed     (encode.py)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.conversion.encode import ShardEncoder
from scdl_zarr.conversion.plan import PIECE_VALUES, Part, ShardTask
from scdl_zarr.conversion.sources import MatrixReader, open_source
from scdl_zarr.conversion.sources.h5ad import matrix_name
from scdl_zarr.conversion.stopping import refuse_if_stopped
from scdl_zarr.conversion.values import (
    ValueStats,
    checksum,
    map_rows,
    sort_rows,
    value_stats,
)
from scdl_zarr.errors import InexactValueError, SourceError
from scdl_zarr.reading.exactness import inexact_positions
from scdl_zarr.storage.schema import ArrayLayout

__all__ = ["DtypeTooNarrowError", "ShardResult", "write_shard"]


class DtypeTooNarrowError(Exception):
    """The dtype that `dtype="auto"` started with does not hold a value; the conversion goes on with a wider one."""

    def __init__(self, matrix: str, stats: ValueStats) -> None:
        super().__init__(matrix, stats)
        self.matrix = matrix
        self.stats = stats


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardResult:
    """What a task reports: small, and the same whoever ran it.

    ``checksums`` are (source, partial sum) pairs; ``unsorted`` are half-open runs of store rows; only the task in which a row
    starts reports it.
    """

    name: str
    dtype: str
    stats: ValueStats
    checksums: tuple[tuple[int, int], ...] = ()
    unsorted: tuple[tuple[int, int], ...] = ()
    values: int = 0


def write_shard(task: ShardTask) -> ShardResult:
    """Read the task's source rows and write its shard.

    Raises
    ------
    SourceError
        A gene id outside the source's genes, row pointers that changed, bytes that do not decode.
    InexactValueError
        A value does not survive the dtype that was asked for; the message names source, row and value.
    DtypeTooNarrowError
        A value does not survive the dtype chosen automatically.
    """
    return _write_pointers(task) if task.kind == "indptr" else _write_values(task)


def _write_pointers(task: ShardTask) -> ShardResult:
    (layout,) = task.arrays
    with ShardEncoder(_path(task, layout), layout) as encoder:
        done = task.start
        for part in task.parts:
            with open_source(part.spec) as source:
                matrix = source.matrix(part.key)
                for row in range(part.row_start, part.row_stop, layout.chunk):
                    pointers = matrix.indptr(row, min(row + layout.chunk, part.row_stop)) + part.value_start
                    encoder.add(pointers.astype(layout.dtype))
                    done += len(pointers)
        if done < task.stop:  # the one pointer after the last row
            encoder.add(np.array([task.total], layout.dtype))
    return ShardResult(name=task.name, dtype=layout.dtype.name, stats=ValueStats())


def _write_values(task: ShardTask) -> ShardResult:
    data, indices = task.arrays
    stats = ValueStats()
    sums: dict[int, int] = {}
    unsorted: list[tuple[int, int]] = []
    written = 0
    with ShardEncoder(_path(task, data), data) as data_out, ShardEncoder(_path(task, indices), indices) as indices_out:
        for part in task.parts:
            with open_source(part.spec) as source:
                matrix = source.matrix(part.key)
                for piece in _pieces(matrix, part):
                    refuse_if_stopped(task.root)
                    values, ids = matrix.elements(int(piece.pointers[0]), int(piece.pointers[-1]))
                    if values.dtype == np.float16:  # compiled code has none; float32 holds all of it
                        values = values.astype(np.float32)
                    inside = piece.inside(task, part)
                    sums[part.source] = (sums.get(part.source, 0) + checksum(values[inside], ids[inside])) % 2**64
                    mapped = _map(part, piece, ids, values, task, unsorted)
                    values = values[inside]
                    found = value_stats(values)
                    stats |= found
                    if not _surely_exact(values.dtype, found, data.dtype):
                        _check_values(values, stats, task, part, piece, inside)
                    data_out.add(_narrow(values, data.dtype))
                    indices_out.add(mapped[inside].astype(indices.dtype, copy=False))
                    written += len(values)
        if written != task.stop - task.start:
            raise SourceError(f"{task.name}: the sources gave {written} values, {task.stop - task.start} were planned")
    return ShardResult(
        name=task.name,
        dtype=data.dtype.name,
        stats=stats,
        checksums=tuple(sorted(sums.items())),
        unsorted=tuple(unsorted),
        values=task.stop - task.start,
    )


def _path(task: ShardTask, layout: ArrayLayout) -> Path:
    return Path(task.root, layout.shard_key(task.number))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """Whole source rows [row, row + len(pointers) - 1) and their row pointers."""

    row: int
    pointers: npt.NDArray[np.int64]

    def inside(self, task: ShardTask, part: Part) -> slice:
        """Which of the piece's elements the task owns."""
        first = part.value_start + int(self.pointers[0])
        n = int(self.pointers[-1] - self.pointers[0])
        return slice(max(task.start - first, 0), min(task.stop - first, n))


def _pieces(matrix: MatrixReader, part: Part) -> Iterator[_Piece]:
    """The part's rows in runs of at most PIECE_VALUES elements (or one longer row)."""
    block = 1 << 16
    for low in range(part.row_start, part.row_stop, block):
        high = min(low + block, part.row_stop)
        pointers = matrix.indptr(low, high + 1)
        row = 0
        while row < high - low:
            stop = int(np.searchsorted(pointers, pointers[row] + PIECE_VALUES, side="right")) - 1
            stop = min(max(stop, row + 1), high - low)
            if pointers[stop] > pointers[row]:
                yield _Piece(row=low + row, pointers=pointers[row : stop + 1])
            row = stop


def _map(
    part: Part, piece: _Piece, ids: npt.NDArray[Any], values: npt.NDArray[Any], task: ShardTask, unsorted: list[tuple[int, int]]
) -> npt.NDArray[np.int64]:
    """Store ids of the piece's elements; `values` are permuted along where rows are sorted."""
    local = piece.pointers - piece.pointers[0]
    mapped = np.empty(len(ids), np.int64)
    in_order = np.empty(len(local) - 1, np.bool_)
    bad = map_rows(ids, local, part.lookup, mapped, in_order)
    if bad >= 0:
        row = int(np.searchsorted(local, bad, side="right")) - 1
        raise SourceError(
            f"{part.spec.path}: row {piece.row + row} of {matrix_name(part.key)} has "
            f"{'neighbor' if part.key.startswith('obsp/') else 'gene id'} {ids[bad]}, "
            f"but there are {len(part.lookup)} {'cells' if part.key.startswith('obsp/') else 'genes'}"
        )
    if not part.rising:
        sort_rows(local, in_order, mapped, values)
    first_row = part.first_row + piece.row - part.row_start
    starts = part.value_start + piece.pointers[:-1]
    owned = ~in_order & (starts >= task.start)
    for row in (first_row + np.flatnonzero(owned)).tolist():
        if unsorted and unsorted[-1][1] == row:
            unsorted[-1] = (unsorted[-1][0], row + 1)
        else:
            unsorted.append((row, row + 1))
    return mapped


def _surely_exact(source: np.dtype[Any], stats: ValueStats, dtype: np.dtype[Any]) -> bool:
    """Whether values of that dtype and these stats survive without looking at each (NumPy calls int64 to float64 safe)."""
    if dtype.kind != "f":
        info = np.iinfo(dtype)
        return stats.integral and info.min <= stats.low and stats.high <= info.max
    if source.kind == "f":
        return source.itemsize <= dtype.itemsize or stats.float32_exact
    return max(-stats.low, stats.high) <= 1 << (24 if dtype.itemsize == 4 else 53)


def _check_values(values: npt.NDArray[Any], stats: ValueStats, task: ShardTask, part: Part, piece: _Piece, inside: slice) -> None:
    """Refuse the first value that does not survive the store's dtype."""
    dtype = task.arrays[0].dtype
    bad = inexact_positions(values, dtype, task.tolerance)
    if not len(bad):
        return
    if not task.exact_dtype and dtype != np.float64:
        raise DtypeTooNarrowError(task.matrix, stats)
    at = int(piece.pointers[0]) + inside.start + int(bad[0])
    row = int(np.searchsorted(piece.pointers, at, side="right")) - 1
    if task.exact_dtype:
        options = f"dtype_tolerance= (--dtype-tolerance, now {task.tolerance})"
        advice = f"ask for a wider dtype, for dtype='auto' (--dtype auto, always exact), or use {options}"
    else:
        advice = "and no dtype holds all values exactly; convert into two stores, or give dtype= and dtype_tolerance="
    raise InexactValueError(
        f"{part.spec.path}: row {piece.row + row} of {matrix_name(part.key)} holds {values[bad[0]].item()!r}, "
        f"which does not survive dtype {dtype.name}; {advice}"
    )


def _narrow(values: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """The values, which were checked, in the store's dtype (what a tolerance allowed is rounded to the nearest)."""
    if dtype.kind in "iu" and values.dtype.kind == "f":
        values = np.rint(values)
    return values.astype(dtype, copy=False)
