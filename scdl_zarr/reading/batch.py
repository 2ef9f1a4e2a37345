"""What reading gives back: a batch of rows as one small CSR matrix, alone or with what else the store has for these rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.errors import MissingDependencyError, OptionError, RowIndexError
from scdl_zarr.reading.plan import Int64Array

if TYPE_CHECKING:
    import scipy.sparse
    import torch

__all__ = ["Batch", "RowBatch", "import_torch"]


def import_torch() -> Any:
    """torch, or an error that names the extra that brings it."""
    try:
        import torch
    except ImportError:
        raise MissingDependencyError(
            "this call gives torch tensors and torch is not installed; pip install 'scdl-zarr[torch]'"
        ) from None
    return torch


class RowBatch:
    """Rows of a store in CSR form, in the order they were asked for.

    The arrays are the batch's own: changing them changes nothing in the store.

    Attributes
    ----------
    data : ndarray of shape (nnz,)
        Stored values, row after row, in the order of the store.
    indices : int32 ndarray of shape (nnz,)
        Their gene ids (columns); int64 where the store has more genes than int32 holds.
    indptr : int64 ndarray of shape (len(batch) + 1,)
        Row k is ``data[indptr[k]:indptr[k + 1]]``.
    shape : tuple of int
        ``(rows in the batch, genes of the store)``.
    rows : int64 ndarray of shape (len(batch),)
        The store's row numbers.

    Examples
    --------
    >>> batch = demo.read_rows([7, 3, 7])
    >>> batch.shape, batch.rows.tolist()
    ((3, 32786), [7, 3, 7])
    >>> values, ids = batch[0]
    >>> len(values) == len(ids)
    True
    """

    __slots__ = ("data", "indices", "indptr", "rows", "shape")

    def __init__(
        self, data: npt.NDArray[Any], indices: npt.NDArray[Any], indptr: Int64Array, n_vars: int, rows: Int64Array
    ) -> None:
        self.data = data
        self.indices = indices
        self.indptr = indptr
        self.shape = (len(rows), n_vars)
        self.rows = rows

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, k: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Values and gene ids of the batch's row `k`: views of the batch's arrays."""
        n = self.shape[0]
        if not -n <= k < n:
            raise RowIndexError(f"row {k} is out of range for a batch of {n} rows")
        start, stop = self.indptr[k % n], self.indptr[k % n + 1]
        return self.data[start:stop], self.indices[start:stop]

    def __iter__(self) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
        return (self[k] for k in range(len(self)))

    def __repr__(self) -> str:
        return f"RowBatch({self.shape[0]} × {self.shape[1]}, {len(self.data)} stored values, {self.data.dtype})"

    def to_scipy(self) -> scipy.sparse.csr_matrix:
        """The batch as ``scipy.sparse.csr_matrix``, with equal index dtypes (int32 where that holds them).

        ``data`` is shared with the batch, ``indices`` too unless it has to be widened.
        """
        import scipy.sparse

        dtype = np.int32 if max(len(self.data), self.shape[1]) < 2**31 else np.int64
        matrix = scipy.sparse.csr_matrix(self.shape, dtype=self.data.dtype)
        matrix.data = self.data
        matrix.indices = self.indices.astype(dtype, copy=False)
        matrix.indptr = self.indptr.astype(dtype)
        return matrix

    def to_dense(self, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """The batch as a dense array of shape `self.shape`; a gene stored twice in a row is summed, as SciPy does.

        Parameters
        ----------
        out
            Array of that shape to fill; its old content is overwritten.
        """
        if out is None:
            out = np.zeros(self.shape, self.data.dtype)
        elif out.shape != self.shape:
            raise OptionError(f"out has shape {out.shape}, the batch {self.shape}")
        else:
            out[...] = 0
        values = self.data.astype(out.dtype, copy=False)
        if out.flags.c_contiguous:  # NumPy adds at positions of one dimension several times as fast
            positions = np.repeat(np.arange(len(self)) * self.shape[1], np.diff(self.indptr))
            positions += self.indices
            np.add.at(out.reshape(-1), positions, values)
        else:
            of_row = np.repeat(np.arange(len(self)), np.diff(self.indptr))
            np.add.at(out, (of_row, self.indices), values)
        return out

    def to_torch(self, *, dense: bool = False, device: Any = None) -> torch.Tensor:
        """The batch as ``torch.sparse_csr_tensor`` (row pointers and ids int64 and int32) or, with `dense`, strided.

        The values' memory is shared with the batch when `device` is the CPU.
        """
        torch = import_torch()
        if dense:
            return torch.from_numpy(self.to_dense()).to(device)
        return torch.sparse_csr_tensor(
            torch.from_numpy(self.indptr),
            torch.from_numpy(self.indices),
            torch.from_numpy(self.data),
            size=self.shape,
            device=device,
            check_invariants=False,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows of X and what was asked for with them, all in the order of the rows.

    Attributes
    ----------
    X : RowBatch
    layers : dict of RowBatch
        By the name of the layer.
    obsm : dict of ndarray of shape (len(batch), ...)
        By the name of the array, in the dtype that is stored.
    obs : dict of ndarray or pandas array of length len(batch)
        By the name of the column: a ``pandas.Categorical`` (its ``codes`` are ints), a nullable array, else an ndarray.
    """

    X: RowBatch
    layers: dict[str, RowBatch] = field(default_factory=dict)
    obsm: dict[str, Any] = field(default_factory=dict)
    obs: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> Int64Array:
        """The store's row numbers."""
        return self.X.rows

    def __len__(self) -> int:
        return len(self.X)

    def __repr__(self) -> str:
        carried = [f"{group}: {', '.join(names)}" for group in ("layers", "obsm", "obs") if (names := getattr(self, group))]
        return f"Batch({'; '.join([f'{len(self)} rows × {self.X.shape[1]} genes', *carried])})"
