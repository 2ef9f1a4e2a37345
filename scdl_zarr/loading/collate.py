"""Batches for ``torch.utils.data.DataLoader``.

``DataLoader`` asks a dataset for a whole batch through ``__getitems__`` and hands the answer to ``collate_fn``.  The answer here
is a :class:`RowList`: to any other code a list of the batch's items, to :func:`collate_sparse_matrix_batch` the batch itself, so
that rows are neither taken apart nor put together again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from scdl_zarr.errors import OptionError
from scdl_zarr.reading.batch import RowBatch, import_torch

if TYPE_CHECKING:
    import torch

__all__ = ["RowList", "collate_sparse_matrix_batch", "row_tensor"]


def row_tensor(values: Any, ids: Any) -> torch.Tensor:
    """One row as a tensor of shape (2, stored values): values, then gene ids, both in the dtype of the values.

    float32 holds gene ids exactly up to 2**24 genes.
    """
    torch = import_torch()
    pair = np.empty((2, len(values)), values.dtype)
    pair[0], pair[1] = values, ids
    return torch.from_numpy(pair)


class RowList(list):  # type: ignore[type-arg]
    """A list of row tensors that are made when one is first asked for.

    ``batch`` is the :class:`RowBatch` behind it.  It is a real list because ``torch.stack`` accepts nothing else.
    """

    def __init__(self, batch: RowBatch) -> None:
        super().__init__([None] * len(batch))
        self.batch = batch
        self._made = False

    def _make(self) -> None:
        if not self._made:
            self._made = True
            super().__setitem__(slice(None), [row_tensor(*row) for row in self.batch])

    def __getitem__(self, key: Any) -> Any:
        self._make()
        return super().__getitem__(key)

    def __iter__(self) -> Iterator[Any]:
        self._make()
        return super().__iter__()

    def __reversed__(self) -> Iterator[Any]:
        self._make()
        return super().__reversed__()

    def __add__(self, other: Any) -> Any:
        return list(self) + other

    def copy(self) -> list[Any]:
        return list(iter(self))

    def __reduce__(self) -> Any:
        return list, (list(iter(self)),)


def collate_sparse_matrix_batch(batch: Sequence[torch.Tensor]) -> torch.Tensor:
    """Collate rows into one ``torch.sparse_csr_tensor``.

    Parameters
    ----------
    batch
        What a DataLoader over a :class:`SingleCellZarrDataset` passes, or any list of tensors of shape (2, n): values, then
        gene ids.

    Returns
    -------
    torch.Tensor
        CSR tensor, row pointers int64, ids int32.  Shape (rows, genes of the store) for rows of a dataset; for a plain list
        the width is the largest id + 1, as in BioNeMo-SCDL, so that it varies from batch to batch.
    """
    if isinstance(batch, RowList):
        return batch.batch.to_torch()
    torch = import_torch()
    rows = list(batch)
    for row in rows:
        if not isinstance(row, torch.Tensor) or row.ndim != 2 or row.shape[0] != 2:
            raise OptionError("collate_sparse_matrix_batch takes tensors of shape (2, n): values, then gene ids")
    pointers = torch.zeros(len(rows) + 1, dtype=torch.int64)
    if not rows:
        return torch.sparse_csr_tensor(
            pointers, torch.empty(0, dtype=torch.int32), torch.empty(0), size=(0, 0), check_invariants=False
        )
    pointers[1:] = torch.cumsum(torch.tensor([row.shape[1] for row in rows]), dim=0)
    joined = torch.cat(rows, dim=1)
    ids = joined[1].to(torch.int32)
    width = int(ids.max()) + 1 if len(ids) else 0
    return torch.sparse_csr_tensor(pointers, ids, joined[0], size=(len(rows), width), check_invariants=False)
