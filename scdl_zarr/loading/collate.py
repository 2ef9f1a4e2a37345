"""Batches for ``torch.utils.data.DataLoader``.

``DataLoader`` asks a dataset for a whole batch through ``__getitems__`` and hands the answer to ``collate_fn``.  The answer here
is a :class:`RowList`: to any other code a list of the batch's items, to :func:`collate_sparse_matrix_batch` the batch itself, so
that rows are neither taken apart nor put together again.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from scdl_zarr.errors import OptionError
from scdl_zarr.reading.batch import RowBatch, import_torch
from scdl_zarr.reading.pairs import NeighborBatch

if TYPE_CHECKING:
    import torch

__all__ = ["RowList", "collate_neighbor_sparse_matrix_batch", "collate_sparse_matrix_batch", "row_tensor"]


def row_tensor(values: Any, ids: Any) -> torch.Tensor:
    """One row as a tensor of shape (2, stored values): values, then gene ids, both in the dtype of the values.

    float32 holds gene ids exactly up to 2**24 genes.
    """
    torch = import_torch()
    pair = np.empty((2, len(values)), values.dtype)
    pair[0], pair[1] = values, ids
    return torch.from_numpy(pair)


class _Unmade:
    """Stands in a :class:`RowList` for a row that was not made yet.

    torch takes the items of a list without asking the list, but hands a call over to any item that has this protocol.
    """

    __slots__ = ()

    @classmethod
    def __torch_function__(cls, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        lists = [value for value in (*args, *named.values()) if isinstance(value, RowList)]
        if not lists:
            return NotImplemented
        for rows in lists:
            rows.make()
        return function(*args, **named)


_UNMADE = _Unmade()


class RowList(list[Any]):
    """A list of row tensors that are made when one is first asked for, in whatever way.

    It is a real list because ``torch.stack`` accepts nothing else.  What reads a list's memory without asking the list or its
    items sees no tensors: ``torch.nested.nested_tensor(rows)`` does, in its older layout (``layout=torch.jagged`` does not); give
    it ``list(rows)``.

    Attributes
    ----------
    batch : RowBatch or None
        The batch behind it; None once the list was changed, which then is a list like any other.
    """

    def __init__(self, batch: RowBatch) -> None:
        super().__init__([_UNMADE] * len(batch))
        self.batch: RowBatch | None = batch
        self._made = False

    def make(self) -> None:
        """Make the rows, once."""
        if not self._made and self.batch is not None:
            super().__setitem__(slice(None), [row_tensor(*row) for row in self.batch])
            self._made = True

    def __radd__(self, other: list[Any]) -> list[Any]:
        return other + list(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return list, (list(self),)


def _made_first(name: str, *, changes: bool) -> Any:
    """A list's own method, after the rows were made; one that changes the list parts it from its batch."""
    own = getattr(list, name)

    @functools.wraps(own)
    def method(self: RowList, *args: Any, **kwargs: Any) -> Any:
        self.make()
        if changes:
            self.batch = None
        return own(self, *args, **kwargs)

    return method


_READING = ("getitem", "iter", "reversed", "contains", "eq", "ne", "lt", "le", "gt", "ge", "add", "mul", "rmul", "repr")
_CHANGING = ("setitem", "delitem", "iadd", "imul")
for _name in (*(f"__{word}__" for word in _READING), "copy", "count", "index"):
    setattr(RowList, _name, _made_first(_name, changes=False))
for _name in (
    *(f"__{word}__" for word in _CHANGING),
    *("append", "clear", "extend", "insert", "pop", "remove", "reverse", "sort"),
):
    setattr(RowList, _name, _made_first(_name, changes=True))


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
    if isinstance(batch, RowList) and batch.batch is not None:
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


def collate_neighbor_sparse_matrix_batch(batch: NeighborBatch | Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows and their neighbours as two ``torch.sparse_csr_tensor``.

    Parameters
    ----------
    batch
        What ``data.read_rows_with_neighbors`` gives, or a list of what ``data.get_row_with_neighbor`` gives.

    Returns
    -------
    dict
        As in BioNeMo-SCDL: the tensors ``current_cells`` and ``next_cells``, the lists ``current_cell_indices`` and
        ``next_cell_indices`` of row numbers, and ``batch_size``.  Both tensors are as wide as the store has genes; of a list,
        each as wide as its own largest id says (see :func:`collate_sparse_matrix_batch`).
    """
    if isinstance(batch, NeighborBatch):
        return {
            "current_cells": batch.current.to_torch(),
            "next_cells": batch.next.to_torch(),
            "current_cell_indices": batch.rows.tolist(),
            "next_cell_indices": batch.neighbors.tolist(),
            "batch_size": len(batch),
        }
    return {
        "current_cells": collate_sparse_matrix_batch([row_tensor(*item["current_cell"]) for item in batch]),
        "next_cells": collate_sparse_matrix_batch([row_tensor(*item["next_cell"]) for item in batch]),
        "current_cell_indices": [item["current_cell_index"] for item in batch],
        "next_cell_indices": [item["next_cell_index"] for item in batch],
        "batch_size": len(batch),
    }
