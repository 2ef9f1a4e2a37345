"""What a loader gives: a batch in the form that the model wants, and how rows are put into it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from scdl_zarr.errors import CorruptStoreError, MissingDependencyError, OptionError
from scdl_zarr.loading.compiled import run_kernel
from scdl_zarr.reading.batch import RowBatch, import_torch
from scdl_zarr.reading.buffers import BufferSource
from scdl_zarr.reading.plan import Int64Array

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["FORMS", "Form", "LoaderBatch", "MatrixForm", "Tokens", "import_cupy", "say_nothing_of_beta"]

Form = Literal["torch", "scipy", "numpy", "cupy"]
FORMS: tuple[Form, ...] = ("torch", "scipy", "numpy", "cupy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """The cells of a batch as tokens (``tokens=`` of the loader).

    Attributes
    ----------
    ids : int32 or int64 tensor or ndarray of shape (rows, length)
    mask : bool tensor or ndarray of shape (rows, length)
        True where there is a token: an attention mask.
    values : float32 tensor or ndarray of shape (rows, length), or None
        What the scheme gives beside the tokens.
    """

    ids: Any
    mask: Any
    values: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderBatch:
    """Rows of X and what was asked for with them, all in the order of `rows`.

    Attributes
    ----------
    X
        The values, as the loader's ``to`` and ``dense`` say: a ``torch.sparse_csr_tensor`` (row pointers and gene ids int32), a
        ``scipy.sparse.csr_matrix``, a :class:`scdl_zarr.RowBatch`, or a dense tensor or array.  Shape (rows, genes).  None where
        cells come as tokens.
    rows : int64 ndarray of shape (rows,)
        The store's row numbers.  They stay in the host's memory.
    obs : dict of tensor or ndarray of shape (rows,)
        By the name of the column: codes (int64, -1 where missing) of a categorical or text column, else its numbers.
    categories : dict of pandas.Index
        What the codes of a column stand for.
    layers : dict
        As X, by the name of the layer.
    obsm : dict of tensor or ndarray of shape (rows, ...)
        By the name of the array.
    tokens : Tokens or None
        The cells as tokens, where the loader makes some.
    padding : int
        How many rows at the end of this batch fill it up (``tail="pad"``): they were, or will be, in another one of the epoch.
    controls : LoaderBatch or None
        With ``groups=`` and controls: the control of each row, in the same order and form.
    sets : int64 ndarray of shape (sets,), or None
        With ``groups=``: the group of each set, a row of ``loader.groups``.  Sets follow one another and are of one size: the
        rows of set k are ``k * size`` to ``(k + 1) * size``.  They stay in the host's memory.
    """

    X: Any
    rows: Int64Array
    obs: dict[str, Any] = field(default_factory=dict)
    categories: dict[str, pd.Index] = field(default_factory=dict)
    layers: dict[str, Any] = field(default_factory=dict)
    obsm: dict[str, Any] = field(default_factory=dict)
    tokens: Tokens | None = None
    padding: int = 0
    controls: LoaderBatch | None = None
    sets: Int64Array | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        carried = [f"{group}: {', '.join(names)}" for group in ("layers", "obsm", "obs") if (names := getattr(self, group))]
        X, tokens = self.X, self.tokens  # noqa: N806 - AnnData's name
        shape = f"{X.shape[1]} genes" if X is not None else f"{0 if tokens is None else tokens.ids.shape[1]} tokens"
        sets = [] if self.sets is None else [f"{len(self.sets)} sets{'' if self.controls is None else ' with controls'}"]
        return f"LoaderBatch({'; '.join([f'{len(self)} rows × {shape}', *sets, *carried])})"

    def to(self, device: Any, *, non_blocking: bool = False) -> LoaderBatch:
        """The batch with its tensors on a device; what is no tensor stays as it is."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> LoaderBatch:
        """The batch with its tensors in pinned memory (``DataLoader(pin_memory=True)`` calls this)."""
        return self._with_tensors(_pinned)

    def _with_tensors(self, change: Any) -> LoaderBatch:
        torch = import_torch()

        def changed(value: Any) -> Any:
            return change(value) if isinstance(value, torch.Tensor) else value

        def changed_all(values: dict[str, Any]) -> dict[str, Any]:
            return {name: changed(value) for name, value in values.items()}

        tokens = self.tokens
        if tokens is not None:
            tokens = Tokens(ids=changed(tokens.ids), mask=changed(tokens.mask), values=changed(tokens.values))
        controls = None if self.controls is None else self.controls._with_tensors(change)
        dicts: dict[str, Any] = {name: changed_all(getattr(self, name)) for name in ("obs", "layers", "obsm")}
        return replace(self, X=changed(self.X), tokens=tokens, controls=controls, **dicts)


def _pinned(tensor: Any) -> Any:
    torch = import_torch()
    if tensor.layout != torch.sparse_csr:
        return tensor.pin_memory()
    parts = [part.pin_memory() for part in (tensor.crow_indices(), tensor.col_indices(), tensor.values())]
    return torch.sparse_csr_tensor(*parts, size=tensor.shape, check_invariants=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixForm:
    """How rows become X."""

    to: Form
    dense: bool = False

    def __post_init__(self) -> None:
        if self.to not in FORMS:
            raise OptionError(f"to={self.to!r}; choose {', '.join(map(repr, FORMS))}")
        if self.to == "torch":
            say_nothing_of_beta()
        if self.to == "cupy":
            import_cupy()

    def matrix(self, batch: RowBatch, pool: BufferSource) -> Any:
        """Rows in that form.  Sparse ones share the memory of the batch; dense ones take theirs from the pool."""
        if self.dense:
            return self.array(dense_rows(batch, pool))
        if self.to == "torch":
            return sparse_tensor(batch, pool)
        if self.to == "scipy":
            return batch.to_scipy()
        if self.to == "cupy":
            return _cupy_csr(batch)
        return batch

    def array(self, values: npt.NDArray[Any]) -> Any:
        """A plain array in that form."""
        if self.to == "torch":
            return import_torch().from_numpy(values)
        return import_cupy().asarray(values) if self.to == "cupy" else values


def sparse_tensor(batch: RowBatch, pool: BufferSource) -> Any:
    """A CSR tensor that shares the batch's memory; both kinds of index have the dtype that the batch's ids have."""
    torch = import_torch()
    narrow = batch.indices.dtype == np.int32 and len(batch.data) < 1 << 31
    pointers = pool.take(len(batch.indptr), np.dtype(np.int32 if narrow else np.int64))
    pointers[:] = batch.indptr
    ids = batch.indices if narrow else batch.indices.astype(np.int64, copy=False)
    return torch.sparse_csr_tensor(
        torch.from_numpy(pointers), torch.from_numpy(ids), torch.from_numpy(batch.data), size=batch.shape, check_invariants=False
    )


def dense_rows(batch: RowBatch, pool: BufferSource) -> npt.NDArray[Any]:
    """A dense array of a batch, in memory of the pool; a gene stored twice in a row is summed."""
    n, width = batch.shape
    out = pool.take(n * width, batch.data.dtype).reshape(n, width)
    if batch.data.dtype not in (np.float32, np.float64):  # sums of integers are checked, and float16 is not compiled
        return batch.to_dense(out)
    bad = run_kernel("spread", batch.data, batch.indices, batch.indptr, out)
    if bad >= 0:
        raise CorruptStoreError(f"gene id {batch.indices[bad]} is out of range for {width} genes")
    return out


def say_nothing_of_beta() -> None:
    """Torch warns once per process, at its first CSR tensor, which otherwise were one of a thread in the background."""
    torch = import_torch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.zeros(1, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), torch.zeros(0), size=(0, 0))


def import_cupy() -> Any:
    """CuPy, or an error that says where it is from."""
    try:
        import cupy
    except ImportError:
        raise MissingDependencyError(
            "to='cupy' needs CuPy, which is not installed; see https://docs.cupy.dev for your CUDA"
        ) from None
    return cupy


def _cupy_csr(batch: RowBatch) -> Any:
    cupy = import_cupy()
    from cupyx.scipy.sparse import csr_matrix

    parts = (batch.data, batch.indices.astype(np.int32, copy=False), batch.indptr.astype(np.int32))
    return csr_matrix(tuple(cupy.asarray(part) for part in parts), shape=batch.shape)
