"""Rows as their own sources had them: gene ids of the store turned into those of each row's var block."""

from __future__ import annotations

import numpy as np

from scdl_zarr.errors import CorruptStoreError
from scdl_zarr.reading.batch import RowBatch
from scdl_zarr.reading.blocks import Blocks
from scdl_zarr.reading.plan import Int64Array
from scdl_zarr.reading.recent import Recent

__all__ = ["LocalGenes", "local_numbers"]

KEPT_BYTES = 1 << 28  # of maps, 8 bytes a gene and block


def local_numbers(ids: Int64Array, n_vars: int) -> tuple[Int64Array, bool] | None:
    """For each gene of the store its number in a source (-1: not there), and whether that keeps order; None: the same numbers.

    `ids` has, for each gene of the source, its id in the store.
    """
    if np.array_equal(ids, np.arange(n_vars)):
        return None
    local = np.full(n_vars, -1, np.int64)
    local[ids] = np.arange(len(ids))
    return local, bool((np.diff(ids) > 0).all())


def _weight(known: tuple[Int64Array, bool] | None) -> int:
    return 64 if known is None else known[0].nbytes


class LocalGenes:
    """Gene ids of the store as those of each row's own source, in that source's order."""

    def __init__(self, blocks: Blocks, n_vars: int) -> None:
        self._blocks = blocks
        self._n_vars = n_vars
        self._known: Recent[int, tuple[Int64Array, bool] | None] = Recent(KEPT_BYTES, _weight)
        self._unsorted: Int64Array | None = None

    def keeps(self, row: int) -> bool:
        """Whether a row has in its source the ids, and so the order, that it has in the store."""
        return self._known.get(self._blocks.block_of(row) if len(self._blocks) > 1 else 0, self._map) is None

    def localized(self, batch: RowBatch) -> RowBatch:
        """The batch, its ids and the order within its rows changed in place."""
        blocks = [self._blocks.block_of(row) for row in batch.rows.tolist()] if len(self._blocks) > 1 else [0] * len(batch)
        for k, block in enumerate(blocks):
            known = self._known.get(block, self._map)
            if known is None:
                continue
            local, rising = known
            values, ids = batch[k]
            ids[:] = local[ids]
            if len(ids) and ids.min() < 0:
                raise CorruptStoreError(f"row {batch.rows[k]} holds a gene that its source has not")
            if not rising and not self._is_unsorted(int(batch.rows[k])):
                order = np.argsort(ids, kind="stable")
                ids[:], values[:] = ids[order], values[order]
        return batch

    def _map(self, block: int) -> tuple[Int64Array, bool] | None:
        return local_numbers(self._blocks.gene_ids(block), self._n_vars)

    def _is_unsorted(self, row: int) -> bool:
        if self._unsorted is None:
            self._unsorted = self._blocks.unsorted_rows("X")
        at = int(np.searchsorted(self._unsorted, row))
        return at < len(self._unsorted) and self._unsorted[at] == row
