"""SCDL's collate functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from scdl_zarr.loading.collate import RowList
from scdl_zarr.loading.collate import collate_neighbor_sparse_matrix_batch as collate_pairs
from scdl_zarr.loading.collate import collate_sparse_matrix_batch as collate_rows
from scdl_zarr.reading.batch import RowBatch

if TYPE_CHECKING:
    import torch

__all__ = ["collate_neighbor_sparse_matrix_batch", "collate_sparse_matrix_batch"]


def collate_sparse_matrix_batch(batch: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows as one ``torch.sparse_csr_tensor``, as wide as the largest column id in the batch says."""
    if isinstance(batch, RowList) and batch.batch is not None:
        rows = batch.batch
        width = int(rows.indices.max()) + 1 if len(rows.indices) else 0
        return RowBatch(rows.data, rows.indices, rows.indptr, width, rows.rows).to_torch()
    return collate_rows(batch)


def collate_neighbor_sparse_matrix_batch(batch: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Dicts of ``get_row_with_neighbor`` as one dict: two CSR tensors (float32), two lists of indices, the batch's size."""

    def in_float32(row: Sequence[Any]) -> list[Any]:
        return [np.asarray(part, np.float32) for part in row]

    cells = ("current_cell", "next_cell")
    return collate_pairs([{**item, **{cell: in_float32(item[cell]) for cell in cells}} for item in batch])
