"""``write_shard``: one task, alone on its shard, restartable, knowing nothing of Dask.

::

    source rows ──► ids mapped to the vocabulary ──► rows that were sorted, sorted ──► values narrowed, ──► chunks
                    (range checked)                  (stably)                          summed, checked      (encode.py)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.conversion.encode import ShardEncoder
from scdl_zarr.conversion.id_maps import load_ids
from scdl_zarr.conversion.kernels import map_rows, sort_rows
from scdl_zarr.conversion.places import leave_place
from scdl_zarr.conversion.plan import PIECE_VALUES, Part, ShardTask
from scdl_zarr.conversion.problems import blaming
from scdl_zarr.conversion.row_runs import merge_runs, pack_runs, runs_of
from scdl_zarr.conversion.sources import MatrixReader, open_source, read_matrix
from scdl_zarr.conversion.sources.counts import adopted_counts
from scdl_zarr.conversion.sources.h5ad import matrix_name
from scdl_zarr.conversion.stopping import refuse_if_stopped
from scdl_zarr.conversion.transpose import TransposedMatrix
from scdl_zarr.conversion.values import COMPILED_IDS, ValueStats, narrow, surely_exact, take_values
from scdl_zarr.errors import InexactValueError, SourceError
from scdl_zarr.reading.exactness import inexact_positions
from scdl_zarr.storage.schema import ArrayLayout

__all__ = ["DtypeTooNarrowError", "ShardResult", "check_part", "write_shard"]


class DtypeTooNarrowError(Exception):
    """The dtype that `dtype="auto"` started with does not hold a value; the conversion goes on with a wider one."""

    def __init__(self, matrix: str, stats: ValueStats) -> None:
        super().__init__(matrix, stats)
        self.matrix = matrix
        self.stats = stats


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardResult:
    """What a task reports: small, and the same whoever ran it.

    ``checksums`` are (source, partial sum) pairs; ``unsorted`` are runs of store rows, packed (see ``row_runs.py``); only the
    task in which a row starts reports it.
    """

    name: str
    dtype: str
    stats: ValueStats
    checksums: tuple[tuple[int, int], ...] = ()
    unsorted: str = ""
    values: int = 0
    bytes_in: int = 0  # values and ids as they came out of the sources, decoded
    bytes_out: int = 0  # the files written
    seconds: float = 0.0


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
    with ShardEncoder(_path(task, layout), layout, lambda: refuse_if_stopped(task.root, task)) as encoder:
        done = task.start
        for part in task.parts:
            with _opened(part) as matrix:
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
    unsorted: list[npt.NDArray[np.int64]] = []
    written = bytes_in = 0
    buffers = _Buffers()

    def last_moment() -> None:
        refuse_if_stopped(task.root, task)

    with (
        ShardEncoder(_path(task, data), data, last_moment) as data_out,
        ShardEncoder(_path(task, indices), indices, last_moment) as indices_out,
    ):
        for part in task.parts:
            mapping = _Mapping(task.root, part, indices.dtype)
            with _opened(part) as matrix:
                for piece in _pieces(matrix, part):
                    refuse_if_stopped(task.root)
                    values, ids = _elements(matrix, piece, buffers)
                    bytes_in += values.nbytes + ids.nbytes
                    inside = piece.inside(task, part)
                    mapped = buffers.take("mapped", len(ids), indices.dtype)
                    in_order = mapping.map(piece, ids, mapped)
                    unsorted.append(_unsorted_runs(in_order, task, part, piece))
                    narrowed = buffers.take("narrowed", inside.stop - inside.start, data.dtype)
                    found, total = take_values(values[inside], ids[inside], narrowed)
                    if not part.ids.rising:  # the checksum is that of the source's order, what is stored is sorted
                        _sort(piece, in_order, mapped, values, buffers)
                        found, _ = take_values(values[inside], ids[inside], narrowed)
                    sums[part.source] = (sums.get(part.source, 0) + total) % 2**64
                    stats |= found
                    if not surely_exact(values.dtype, found, data.dtype):
                        _check_values(values[inside], stats, task, part, piece, inside)
                        narrowed[:] = narrow(values[inside], data.dtype, truncate=task.truncate)
                    data_out.add(narrowed)
                    indices_out.add(mapped[inside])
                    written += len(narrowed)
        if written != task.stop - task.start:
            raise SourceError(f"{task.name}: the sources gave {written} values, {task.stop - task.start} were planned")
        leave_place()
    return ShardResult(
        name=task.name,
        dtype=data.dtype.name,
        stats=stats,
        checksums=tuple(sorted(sums.items())),
        unsorted=pack_runs(merge_runs(unsorted)),
        values=task.stop - task.start,
        bytes_in=bytes_in,
    )


def check_part(part: Part) -> None:
    """Read a part as the task that writes it does, and write nothing: what is wrong with it is the same error."""
    buffers, dtype = _Buffers(), np.dtype(np.int64)
    mapping = _Mapping("", part, dtype)
    with _opened(part) as matrix:
        for piece in _pieces(matrix, part):
            _, ids = _elements(matrix, piece, buffers)
            mapping.map(piece, ids, buffers.take("mapped", len(ids), dtype))


@contextlib.contextmanager
def _opened(part: Part) -> Iterator[MatrixReader]:
    """The rows of a part's matrix, for as long as its source is open."""
    with blaming(part.spec), open_source(part.spec) as source:
        with adopted_counts(part.counts, (part.spec, part.key)):
            matrix = read_matrix(source, part.key, part.row_stop)
        yield matrix if part.staging is None else TransposedMatrix(matrix, part.staging)


def _path(task: ShardTask, layout: ArrayLayout) -> Path:
    return Path(task.root, layout.shard_key(task.number))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """Whole source rows [row, row + len(pointers) - 1) and their row pointers."""

    row: int
    pointers: npt.NDArray[np.int64]

    @property
    def local(self) -> npt.NDArray[np.int64]:
        """The row pointers within the piece."""
        local: npt.NDArray[np.int64] = self.pointers - self.pointers[0]
        return local

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


class _Buffers:
    """Arrays that a task fills again for each piece: memory that was touched once is much faster than fresh one."""

    def __init__(self) -> None:
        self._held: dict[str, npt.NDArray[np.uint8]] = {}

    def take(self, name: str, length: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """The buffer of that name as an array; what it held before is lost."""
        nbytes = length * dtype.itemsize
        held = self._held.get(name)
        if held is None or len(held) < nbytes:
            held = self._held[name] = np.empty(nbytes, np.uint8)
        return held[:nbytes].view(dtype)


def _elements(matrix: MatrixReader, piece: _Piece, buffers: _Buffers) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Values and source ids of a piece."""
    start, stop = int(piece.pointers[0]), int(piece.pointers[-1])
    header = matrix.header
    room = buffers.take("values", stop - start, header.dtype), buffers.take("ids", stop - start, header.index_dtype)
    values, ids = matrix.elements(start, stop, out=room)
    if values.dtype == np.float16:  # compiled code has none; float32 holds all of it
        values = values.astype(np.float32)
    return values, ids


class _Mapping:
    """The source's gene ids to the store's."""

    def __init__(self, root: str, part: Part, dtype: np.dtype[Any]) -> None:
        self._part = part
        ids = load_ids(root, part.ids)
        self._shift = part.ids.first or 0
        self._identity = ids is None
        # of consecutive ids the kernel looks at their number alone
        self._lookup = np.empty(part.ids.length, dtype) if ids is None else ids.astype(dtype)

    def map(self, piece: _Piece, ids: npt.NDArray[Any], out: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Write the store ids of the piece's elements; which of its rows are sorted in the source."""
        part, local = self._part, piece.local
        in_order = np.empty(len(local) - 1, np.bool_)
        usual = ids if ids.dtype in COMPILED_IDS else ids.astype(np.int64)
        row = map_rows(usual, local, self._lookup, self._identity, out, in_order)
        if row >= 0:
            there = usual[local[row] : local[row + 1]]
            bad = ids[local[row] + int(np.argmax((there < 0) | (there >= part.ids.length)))]
            raise SourceError(
                f"{part.spec.path}: row {piece.row + row} of {matrix_name(part.key)} has "
                f"{'neighbor' if part.key.startswith('obsp/') else 'gene id'} {bad}, "
                f"but there are {part.ids.length} {'cells' if part.key.startswith('obsp/') else 'genes'}"
            )
        if self._shift:
            out += out.dtype.type(self._shift)
        return in_order


def _sort(
    piece: _Piece, in_order: npt.NDArray[np.bool_], ids: npt.NDArray[Any], values: npt.NDArray[Any], buffers: _Buffers
) -> None:
    """Sort the rows that were sorted in the source, by store id; values are moved as the words they are."""
    words = values.view(f"u{values.dtype.itemsize}")
    longest = int(np.diff(piece.pointers).max())
    scratch = buffers.take("other ids", longest, ids.dtype), buffers.take("other values", longest, words.dtype)
    sort_rows(piece.local, in_order, ids, words, *scratch)


def _unsorted_runs(in_order: npt.NDArray[np.bool_], task: ShardTask, part: Part, piece: _Piece) -> npt.NDArray[np.int64]:
    """The rows that were not sorted, and start in the task, as runs of store rows."""
    first_row = part.first_row + piece.row - part.row_start
    starts = part.value_start + piece.pointers[:-1]
    return runs_of(first_row + np.flatnonzero(~in_order & (starts >= task.start)))


def _check_values(values: npt.NDArray[Any], stats: ValueStats, task: ShardTask, part: Part, piece: _Piece, inside: slice) -> None:
    """Refuse the first value that does not survive the store's dtype."""
    dtype = task.arrays[0].dtype
    bad = inexact_positions(values, dtype, task.tolerance, truncate=task.truncate)
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
