"""Rows, and beside each the row of one of its neighbours, out of one gather.

A row that several others have as their neighbour, or that is itself asked for, is decoded once::

    rows       4  7  9
    neighbors  7  2  7
    decoded    2  4  7  9          the second 7 and the third are copies
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.reading.batch import RowBatch
from scdl_zarr.reading.csr import CsrReader
from scdl_zarr.reading.plan import Int64Array

__all__ = ["NeighborBatch", "as_pair", "read_pairs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NeighborBatch:
    """Rows and a neighbour of each: row k of :attr:`next` belongs to the neighbour of row k of :attr:`current`.

    Attributes
    ----------
    current, next : RowBatch
        Batches of equal length.  Their arrays are views of common ones: changing an entry changes nothing but that entry.
    """

    current: RowBatch
    next: RowBatch

    @property
    def rows(self) -> Int64Array:
        """The store's numbers of the rows."""
        return self.current.rows

    @property
    def neighbors(self) -> Int64Array:
        """The store's numbers of their neighbours; a row's own number where it has none."""
        return self.next.rows

    def __len__(self) -> int:
        return len(self.current)

    def __repr__(self) -> str:
        return f"NeighborBatch({len(self)} rows and a neighbor of each, × {self.current.shape[1]})"


def read_pairs(reader: CsrReader, rows: Int64Array, neighbors: Int64Array, dtype: npt.DTypeLike | None = None) -> NeighborBatch:
    """The rows and their neighbours' rows, each distinct one decoded once."""
    both = reader.read(np.concatenate([rows, neighbors]), dtype, once=True)
    cut = len(rows)
    return NeighborBatch(current=_part(both, slice(0, cut)), next=_part(both, slice(cut, len(both))))


def _part(batch: RowBatch, rows: slice) -> RowBatch:
    """A run of a batch's rows as a batch, without copying entries."""
    indptr = batch.indptr[rows.start : rows.stop + 1]
    entries = slice(int(indptr[0]), int(indptr[-1]))
    return RowBatch(batch.data[entries], batch.indices[entries], indptr - indptr[0], batch.shape[1], batch.rows[rows])


def as_pair(row: int, neighbor: int, current: tuple[Any, Any, Any], other: Any) -> dict[str, Any]:
    """What BioNeMo-SCDL gives for a row (with its features) and a neighbour's."""
    values, var, obs = current
    return {
        "current_cell": values,
        "next_cell": other,
        "current_cell_index": row,
        "next_cell_index": neighbor,
        "var_features": var,
        "obs_features": obs,
    }
