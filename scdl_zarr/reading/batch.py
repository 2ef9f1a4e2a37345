"""What reading gives back: a batch of rows as one small CSR matrix, alone or with what else the store has for these rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.errors import MissingDependencyError, OptionError, RowIndexError
from scdl_zarr.reading.exactness import cast_exactly, checked_dtype, sum_groups
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

        ``data`` is shared with the batch, ``indices`` too unless it has to be widened.  SciPy has no sparse float16: a batch of
        that dtype is an :class:`OptionError`.
        """
        import scipy.sparse

        if self.data.dtype == np.float16:
            raise OptionError("SciPy holds no sparse float16; read the rows with dtype='float32', or take to_dense()")
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
            Array of that shape to fill, of any dtype that rows can be read in; its old content is overwritten.

        Raises
        ------
        InexactValueError
            A value, or a gene's sum, does not fit the dtype of `out` (by default the batch's).  Floats may round, as in
            ``read_rows``.
        OptionError
            `out` is no writable array of that shape, or shares memory with the batch.
        """
        dtype = self.data.dtype if out is None else self._checked(out)
        at, values = self._distinct(dtype)
        dense = np.zeros(self.shape, dtype) if out is None else out
        if out is not None:
            dense[...] = 0
        if dense.flags.c_contiguous:  # NumPy finds places of one dimension several times as fast
            dense.reshape(-1)[at[0] * self.shape[1] + at[1]] = values
        else:
            dense[at] = values
        return dense

    def _distinct(self, dtype: np.dtype[Any]) -> tuple[tuple[npt.NDArray[Any], npt.NDArray[Any]], npt.NDArray[Any]]:
        """Row and column of every entry, each once, and their values (or sums) in that dtype."""
        of_row = np.repeat(np.arange(len(self)), np.diff(self.indptr))
        at, values = (of_row, self.indices), self.data
        rising = (self.indices[1:] > self.indices[:-1]) | (of_row[1:] != of_row[:-1])
        if not rising.all():
            keys = of_row * self.shape[1] + self.indices
            distinct, place = np.unique(keys, return_inverse=True)
            if len(distinct) < len(keys):
                if dtype.kind == "f":  # added in the dtype asked for
                    values = _cast(values, dtype)
                at, values = np.divmod(distinct, self.shape[1]), sum_groups(values, place, len(distinct))
        return at, _cast(values, dtype)

    def _checked(self, out: Any) -> np.dtype[Any]:
        """The dtype of an array to fill."""
        if not isinstance(out, np.ndarray) or isinstance(out, np.ma.MaskedArray):
            raise OptionError(f"out is {type(out).__name__}, expected an array of shape {self.shape}")
        if out.shape != self.shape:
            raise OptionError(f"out has shape {out.shape}, the batch {self.shape}")
        if not out.flags.writeable or np.may_share_memory(out, self.data) or np.may_share_memory(out, self.indices):
            raise OptionError("out cannot be written, or shares memory with the batch; give an array of its own")
        return checked_dtype(out.dtype)

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


def _cast(values: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    if values.dtype == dtype:
        return values
    cast = np.empty(len(values), dtype)
    cast_exactly(values, cast)
    return cast
