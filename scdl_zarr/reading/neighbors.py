"""Neighbours of cells: an n × n CSR matrix of the store, read by row like X is.

Row r lists the cells that are neighbours of cell r and a weight (a distance, a similarity, a difference in pseudotime) for each,
in the order of the source, explicit zeros included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.reading.batch import RowBatch
from scdl_zarr.reading.csr import CsrReader
from scdl_zarr.reading.plan import Int64Array, resolve_rows

__all__ = ["NeighborStats", "Neighbors"]

BLOCK_ROWS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class NeighborStats:
    """How many neighbours the cells have.  All zero for a store without cells."""

    total: int
    fewest: int
    most: int
    mean: float
    cells_without: int


class Neighbors:
    """One ``obsp`` of a store.  May be shared by threads and used after a fork.

    :meth:`scdl_zarr.SingleCellZarrDataset.neighbors` makes one.
    """

    def __init__(self, reader: CsrReader) -> None:
        self._reader = reader

    def __len__(self) -> int:
        return self._reader.layout.n_obs

    def of(self, row: int) -> tuple[Int64Array, npt.NDArray[Any]]:
        """``(neighbours, weights)`` of one cell: its neighbours' row numbers, int64, and a weight for each."""
        batch = self.read(row)
        return batch.indices.astype(np.int64), batch.data

    def read(self, rows: Any) -> RowBatch:
        """Several cells' neighbours (rows as in :meth:`scdl_zarr.SingleCellZarrDataset.read_rows`) as one CSR batch.

        Its ``indices`` are row numbers of the store, its ``data`` the weights.
        """
        return self._reader.read(resolve_rows(rows, len(self)))

    def stats(self) -> NeighborStats:
        """How many neighbours the cells have.  Reads the row pointers once, in blocks; no neighbour is decoded."""
        n, fewest, most, without = len(self), self._reader.layout.nnz, 0, 0
        for start in range(0, n, BLOCK_ROWS):
            counts = self._reader.row_lengths(np.arange(start, min(start + BLOCK_ROWS, n), dtype=np.int64))
            fewest, most = min(fewest, int(counts.min())), max(most, int(counts.max()))
            without += int((counts == 0).sum())
        total = self._reader.layout.nnz
        return NeighborStats(total=total, fewest=fewest, most=most, mean=total / n if n else 0.0, cells_without=without)
