"""The general path: matrices of any AnnData encoding, codec chain or storage, read through array readers.

Slower than mapped shards and with the same results.  It serves stores that other programs wrote, in-memory stores and platforms
without libblosc2.  Whatever a batch asks for, a chunk of a sparse matrix is decoded once for it, and what is in memory besides
the batch is bounded by ``PIECE_VALUES`` values (or one chunk) per request and ``IN_FLIGHT_BYTES`` of requests.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.errors import CorruptStoreError, OptionError
from scdl_zarr.reading.arrays import MatrixArrays
from scdl_zarr.reading.plan import Int64Array, RowPlan
from scdl_zarr.storage.foreign import chunk_shape
from scdl_zarr.storage.location import StoreLocation
from scdl_zarr.storage.schema import MatrixLayout

__all__ = ["CscColumns", "CsrColumns", "DenseColumns", "Piece", "general_columns", "plan_pieces"]

GAP_VALUES = 1 << 12  # ranges closer than this are fetched as one
PIECE_VALUES = 1 << 22  # values of one request
KEPT_VALUES = 1 << 23  # nonzeros of a dense batch that are kept between its two questions
LARGEST_DENSE_PIECE = 1 << 26  # values: a row of chunks is decoded once up to here, several times above
LARGEST_CSC_BYTES = 8 << 30


def general_columns(location: StoreLocation, layout: MatrixLayout, *, threads: int = 1) -> CsrColumns | CscColumns | DenseColumns:
    """The columns for the matrix's encoding."""
    if layout.encoding == "csr_matrix":
        return CsrColumns(location, layout, threads)
    return (CscColumns if layout.encoding == "csc_matrix" else DenseColumns)(location, layout, threads)


# ---- planning


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Values ``start`` to ``stop`` are read at once; ranges ``first`` to ``last`` (half-open) need some of them."""

    start: int
    stop: int
    first: int
    last: int


def plan_pieces(starts: Int64Array, stops: Int64Array, *, chunk: int, gap: int, largest: int) -> list[Piece]:
    """What to read for ranges that are sorted and not empty, and either equal or apart.

    Ranges that share a chunk, or lie less than `gap` apart, are read together, so that no chunk is decoded twice.  A run longer
    than `largest` is cut at chunk borders::

        chunks   |       |       |       |       |       |
        ranges      ██ ███████ █                   ██
        pieces      └─────────┘                    └┘
    """
    if not len(starts):
        return []
    apart = (starts[1:] > stops[:-1] + gap) & (starts[1:] // chunk != (stops[:-1] - 1) // chunk)
    cuts = np.flatnonzero(apart) + 1
    size = max(largest // chunk, 1) * chunk
    pieces = []
    for low, high in zip(starts[[0, *cuts]].tolist(), stops[[*(cuts - 1), len(stops) - 1]].tolist(), strict=True):
        for start in (low, *range((low // size + 1) * size, high, size)):
            stop = min((start // size + 1) * size, high)
            first = int(np.searchsorted(stops, start, "right"))
            last = int(np.searchsorted(starts, stop, "left"))
            if first < last:  # a gap may fill a piece
                start, stop = max(start, int(starts[first])), min(stop, int(stops[last - 1]))
                pieces.append(Piece(start=start, stop=stop, first=first, last=last))
    return pieces


# ---- stored by rows


class CsrColumns:
    """``bounds`` and ``gather`` of a CSR matrix.

    The row pointers are read whole at the first call (8 bytes a row) and checked once.
    """

    row = pair = visit = None  # a single row is read like a batch

    def __init__(self, location: StoreLocation, layout: MatrixLayout, threads: int = 1) -> None:
        self._location = location
        self._layout = layout
        self._arrays = MatrixArrays(location, layout, threads)
        self._pointers: Int64Array | None = None

    def bounds(self, rows: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Start and length of every row's element range."""
        if self._pointers is None:
            self._pointers = read_pointers(self._arrays, self._layout, self._location)
        starts = self._pointers[rows]
        return starts, self._pointers[rows + 1] - starts

    def gather(self, plan: RowPlan, data: npt.NDArray[Any], indices: npt.NDArray[Any], _helpers: object = None) -> None:
        """Fill both buffers with the plan's ranges."""
        order = plan.order[plan.lengths[plan.order] > 0]
        starts = plan.starts[order]
        stops, offsets = starts + plan.lengths[order], plan.indptr[order]
        jobs = [
            (f"{self._layout.path}/{part}", piece, out)
            for part, out in (("data", data), ("indices", indices))
            for piece in plan_pieces(starts, stops, chunk=self._chunk(part), gap=GAP_VALUES, largest=PIECE_VALUES)
        ]
        found = self._arrays.stream((path, slice(piece.start, piece.stop)) for path, piece, _ in jobs)
        for (path, piece, out), values in zip(jobs, found, strict=True):
            mine = slice(piece.first, piece.last)
            low = np.maximum(starts[mine], piece.start)
            length = np.minimum(stops[mine], piece.stop) - low
            target = offsets[mine] + low - starts[mine]
            if out is indices and not ids_fit(values, self._layout.n_vars):  # what lies in gaps is nobody's
                self._location.require_same()
                for a, n in zip(low.tolist(), length.tolist(), strict=True):
                    wanted = values[a - piece.start : a - piece.start + n]
                    check_ids(wanted, self._layout.n_vars, f"{self._location}: {path}", a)
            for a, n, at in zip((low - piece.start).tolist(), length.tolist(), target.tolist(), strict=True):
                out[at : at + n] = values[a : a + n]

    def _chunk(self, part: str) -> int:
        return chunk_shape(self._layout.nodes[f"{self._layout.path}/{part}"])[0]


def read_pointers(arrays: MatrixArrays, layout: MatrixLayout, location: StoreLocation) -> Int64Array:
    """The whole `indptr`: it rises and stays within the stored values."""
    path = f"{layout.path}/indptr"
    pointers = read_whole(arrays, layout, path, np.dtype(np.int64), location)
    if pointers[0] < 0 or pointers[-1] > layout.nnz or (np.diff(pointers) < 0).any():
        raise CorruptStoreError(f"{location}: {path} runs backwards or past the stored values")
    return pointers


def read_whole(
    arrays: MatrixArrays, layout: MatrixLayout, path: str, dtype: np.dtype[Any], location: StoreLocation
) -> npt.NDArray[Any]:
    """A whole array of one dimension, piece by piece."""
    node = layout.nodes[path]
    size = int(node["shape"][0])
    try:
        whole = np.empty(size, dtype)
    except (MemoryError, ValueError):  # the latter where the bytes do not fit a number
        raise CorruptStoreError(f"{location}: {path} claims {size} values, more than memory holds") from None
    (chunk,) = chunk_shape(node)
    borders = np.array([0]), np.array([size])
    pieces = plan_pieces(*borders, chunk=chunk, gap=0, largest=PIECE_VALUES) if size else []
    found = arrays.stream((path, slice(piece.start, piece.stop)) for piece in pieces)
    for piece, values in zip(pieces, found, strict=True):
        whole[piece.start : piece.stop] = values
    return whole


def ids_fit(ids: npt.NDArray[Any], limit: int) -> bool:
    """Whether all ids lie in the matrix."""
    return not len(ids) or bool(ids.min() >= 0 and ids.max() < limit)


def check_ids(ids: npt.NDArray[Any], limit: int, at: str, start: int) -> None:
    """Ids lie in the matrix."""
    if not ids_fit(ids, limit):
        raise CorruptStoreError(f"{at} holds a gene id outside the matrix (values {start} to {start + len(ids) - 1})")


# ---- stored by columns


class CscColumns:
    """``bounds`` and ``gather`` of a CSC matrix, which is turned into rows once, in memory, at the first read.

    The rows then stay in memory (the values' and ids' own size and 8 bytes a row); turning needs about twice that.  A matrix that
    would need more than ``LARGEST_CSC_BYTES`` is refused.
    """

    row = pair = visit = None  # a single row is read like a batch

    def __init__(self, location: StoreLocation, layout: MatrixLayout, threads: int = 1) -> None:
        self._location = location
        self._layout = layout
        self._threads = threads
        self._rows: tuple[Int64Array, npt.NDArray[Any], npt.NDArray[Any]] | None = None

    def bounds(self, rows: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Start and length of every row's element range."""
        pointers = self._turned()[0]
        starts = pointers[rows]
        return starts, pointers[rows + 1] - starts

    def gather(self, plan: RowPlan, data: npt.NDArray[Any], indices: npt.NDArray[Any], _helpers: object = None) -> None:
        """Fill both buffers with the plan's ranges."""
        _, values, ids = self._turned()
        self._location.require_same()  # memory holds what was there; what else is read of the store would not go with it
        for start, n, at in zip(plan.starts.tolist(), plan.lengths.tolist(), plan.indptr[:-1].tolist(), strict=True):
            data[at : at + n] = values[start : start + n]
            indices[at : at + n] = ids[start : start + n]

    def _turned(self) -> tuple[Int64Array, npt.NDArray[Any], npt.NDArray[Any]]:
        if self._rows is None:
            self._rows = self._turn()
        return self._rows

    def _turn(self) -> tuple[Int64Array, npt.NDArray[Any], npt.NDArray[Any]]:
        import scipy.sparse

        layout, where = self._layout, self._location
        needed = layout.nnz * (2 * layout.data_dtype.itemsize + 32) + 16 * (layout.n_obs + layout.n_vars)
        if needed > LARGEST_CSC_BYTES:
            raise OptionError(
                f"{where}: {layout.path} is stored by columns (csc_matrix); turning its {layout.nnz} values into rows would take "
                f"about {needed / 1e9:,.0f} GB of memory, more than {LARGEST_CSC_BYTES / 1e9:,.0f} GB. "
                f"Store it by rows: read it with anndata, take adata.{layout.path}.tocsr() and write it again"
            )
        arrays = MatrixArrays(where, layout, self._threads)
        pointers = read_pointers(arrays, layout, where)
        if pointers[0] != 0 or pointers[-1] != layout.nnz:
            raise CorruptStoreError(f"{where}: {layout.path}/indptr does not rise from 0 to {layout.nnz}")
        rows = read_whole(arrays, layout, f"{layout.path}/indices", np.dtype(np.int64), where)
        if len(rows) and (rows.min() < 0 or rows.max() >= layout.n_obs):
            raise CorruptStoreError(f"{where}: {layout.path}/indices holds a row outside the matrix")
        # positions travel instead of values: SciPy turns no float16
        shape = (layout.n_obs, layout.n_vars)
        turned = scipy.sparse.csc_matrix((np.arange(layout.nnz), rows, pointers), shape).tocsr()
        values = read_whole(arrays, layout, f"{layout.path}/data", layout.data_dtype, where)
        return turned.indptr.astype(np.int64), values[turned.data], turned.indices


# ---- stored whole


@dataclass(frozen=True, slots=True)
class Nonzeros:
    """The nonzeros of some distinct rows, as CSR."""

    rows: Int64Array  # ascending
    indptr: Int64Array
    data: npt.NDArray[Any]
    indices: Int64Array


class DenseColumns:
    """``bounds`` and ``gather`` of a dense matrix: a row stores what is not equal to zero, as ``scipy.sparse.csr_matrix`` has it.

    So NaN is stored, and -0.0 is not.  An element's position is row × genes + gene.  Lengths are known once rows are read, so
    what ``bounds`` found is kept for the ``gather`` that follows in the same thread, up to ``KEPT_VALUES``; above, rows are read
    twice.
    """

    row = pair = visit = None  # a single row is read like a batch

    def __init__(self, location: StoreLocation, layout: MatrixLayout, threads: int = 1) -> None:
        self._location = location
        self._layout = layout
        self._arrays = MatrixArrays(location, layout, threads)
        self._kept = threading.local()
        self._count: int | None = None

    def bounds(self, rows: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Start and length of every row's element range."""
        distinct, place = np.unique(rows, return_inverse=True)
        counted = np.empty(len(distinct), np.int64)
        found: list[Nonzeros] | None = []
        kept = at = 0
        for block in self._read(distinct):
            counted[at : at + len(block.rows)] = np.diff(block.indptr)
            at += len(block.rows)
            kept += len(block.data)
            if kept > KEPT_VALUES:
                found = None
            if found is not None:
                found.append(block)
        starts = rows * self._layout.n_vars
        self._kept.batch = starts, found
        return starts, counted[place]

    def gather(self, plan: RowPlan, data: npt.NDArray[Any], indices: npt.NDArray[Any], _helpers: object = None) -> None:
        """Fill both buffers with the plan's ranges."""
        starts, found = getattr(self._kept, "batch", (None, None))
        self._kept.batch = None, None
        if not plan.total:
            return
        order = plan.order[plan.lengths[plan.order] > 0]
        rows = plan.starts[order] // self._layout.n_vars
        for block in found if found is not None and starts is plan.starts else self._read(np.unique(rows)):
            if not len(block.rows):
                continue
            mine = slice(*np.searchsorted(rows, [block.rows[0], block.rows[-1] + 1]).tolist())
            at = np.searchsorted(block.rows, rows[mine])
            low, length = block.indptr[at], block.indptr[at + 1] - block.indptr[at]
            if not np.array_equal(length, plan.lengths[order[mine]]):
                self._location.require_same()
                raise CorruptStoreError(f"{self._location}: {self._layout.path} changed while it was read")
            for a, n, to in zip(low.tolist(), length.tolist(), plan.indptr[order[mine]].tolist(), strict=True):
                data[to : to + n] = block.data[a : a + n]
                indices[to : to + n] = block.indices[a : a + n]

    def count(self) -> int:
        """How many values the whole matrix stores: it is read once, then known."""
        if self._count is None:
            rows, step = self._layout.n_obs, 1 << 16
            self._count = sum(
                len(block.data)
                for start in range(0, rows, step)
                for block in self._read(np.arange(start, min(start + step, rows), dtype=np.int64))
            )
        return self._count

    def _read(self, rows: Int64Array) -> Iterator[Nonzeros]:
        """The nonzeros of distinct ascending rows, block by block."""
        if not self._layout.n_vars:
            nothing = np.empty(0, np.int64)
            yield Nonzeros(rows, np.zeros(len(rows) + 1, np.int64), np.empty(0, self._layout.data_dtype), nothing)
            return
        blocks = self._blocks(rows)
        found = self._arrays.stream((self._layout.path, _selection(block)) for block in blocks)
        for block, values in zip(blocks, found, strict=True):
            at, genes = np.nonzero(values != 0)  # != 0 as SciPy has it: NaN is stored
            indptr = np.zeros(len(block) + 1, np.int64)
            np.cumsum(np.bincount(at, minlength=len(block)), out=indptr[1:])
            yield Nonzeros(block, indptr, values[at, genes], genes.astype(np.int64, copy=False))

    def _blocks(self, rows: Int64Array) -> list[Int64Array]:
        """Rows that are read at once: those of one row of chunks, unless they are too many."""
        n_vars = self._layout.n_vars
        height = chunk_shape(self._layout.nodes[self._layout.path])[0]
        values = max(PIECE_VALUES, min(height * n_vars, LARGEST_DENSE_PIECE))
        most = max(values // n_vars, 1)
        together = max(most // height, 1) * height if most >= height else height
        runs = np.split(rows, np.flatnonzero(np.diff(rows // together)) + 1) if len(rows) else []
        return [run[k : k + most] for run in runs for k in range(0, len(run), most)]


def _selection(rows: Int64Array) -> slice | Int64Array:
    """Rows as a slice where they follow one another, which readers like better."""
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first + 1 == len(rows) else rows
