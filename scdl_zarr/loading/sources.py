"""What a loader reads from: one dataset, or several as one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from scdl_zarr.errors import OptionError
from scdl_zarr.loading.labels import Label, join_labels, make_label
from scdl_zarr.loading.state import digest_facts, identify_store
from scdl_zarr.reading.buffers import BufferSource
from scdl_zarr.reading.carrying import Carrier, require_names
from scdl_zarr.reading.csr import float_dtype, visit_batch
from scdl_zarr.reading.joining import split_rows_by_part
from scdl_zarr.reading.plan import Int64Array, resolve_rows

if TYPE_CHECKING:
    import pandas as pd

    from scdl_zarr.reading.batch import RowBatch
    from scdl_zarr.reading.csr import CsrReader
    from scdl_zarr.reading.row_blocks import RowVisitor
    from scdl_zarr.reading.tables import LazyTable

__all__ = ["CollectionRows", "DatasetRows", "RowSource", "SourceTable", "chosen_rows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceTable:
    """The rows' table of one dataset, and what the root of its store says."""

    path: str
    obs: LazyTable
    header: Mapping[str, Any]


class Data(Carrier, Protocol):
    """What is taken from a dataset."""

    @property
    def n_obs(self) -> int: ...
    @property
    def n_vars(self) -> int: ...
    @property
    def var_names(self) -> pd.Index: ...
    @property
    def var(self) -> LazyTable: ...
    @property
    def metadata(self) -> dict[str, Any]: ...


class RowSource(Protocol):
    """The questions of a loader."""

    @property
    def path(self) -> str: ...
    @property
    def n_obs(self) -> int: ...
    @property
    def n_vars(self) -> int: ...
    @property
    def threads(self) -> int: ...
    @property
    def remote(self) -> bool: ...

    def identify(self) -> str:
        """A digest of which rows there are."""

    def require(self, layers: Sequence[str], obsm: Sequence[str]) -> None:
        """Refuse layers and arrays that are not there, before anything is read."""

    def read(
        self,
        rows: Int64Array,
        layer: str | None,
        dtype: npt.DTypeLike | None,
        pool: BufferSource,
        helpers: ThreadPoolExecutor | None,
    ) -> RowBatch:
        """Rows of X or of a layer."""

    def visit(
        self,
        rows: Int64Array,
        layer: str | None,
        dtype: npt.DTypeLike | None,
        visitor: RowVisitor,
        pool: BufferSource,
        helpers: ThreadPoolExecutor | None,
    ) -> None:
        """Hand rows of X or of a layer to a visitor."""

    def float_dtype(self, layer: str | None) -> np.dtype[Any]:
        """The float dtype that values come out as: float32 where that holds all of them, else float64."""

    def read_obsm(self, name: str, rows: Int64Array) -> npt.NDArray[Any]:
        """Rows of an array."""

    def label(self, name: str) -> Label:
        """A column of obs, whole."""

    def query(self, query: str) -> Int64Array:
        """The rows for which a query of obs holds."""

    def tables(self) -> list[SourceTable]:
        """The rows' table of each dataset, in the order of the rows."""

    def gene_names(self, key: str | None = None) -> pd.Index:
        """Names of the genes, in order: `var_names`, or a column of var."""

    def readers(self, layer: str | None) -> list[CsrReader]:
        """The matrices behind X or a layer."""

    def locate(self, layer: str | None, rows: Int64Array) -> list[tuple[CsrReader, Int64Array]]:
        """Which of them hold these rows, and their numbers there."""

    def values_per_row(self, layer: str | None) -> float:
        """How many values a row stores, on average; of a dense matrix of another program's store, the number of genes."""

    def stored_dtype(self, layer: str | None) -> np.dtype[Any] | None:
        """The dtype that values are stored in; None where there are several."""


class DatasetRows:
    """The rows of one dataset."""

    def __init__(self, data: Data, reader: Callable[[str | None], CsrReader], *, threads: int, remote: bool) -> None:
        self._data, self._reader = data, reader
        self.threads, self.remote = threads, remote
        self.path, self.n_obs, self.n_vars = data.path, data.n_obs, data.n_vars

    def identify(self) -> str:
        return identify_store(self._data.metadata, self.n_obs, self.n_vars)

    def require(self, layers: Sequence[str], obsm: Sequence[str]) -> None:
        require_names(self._data, {"layer": layers, "obsm": obsm})

    def read(
        self,
        rows: Int64Array,
        layer: str | None,
        dtype: npt.DTypeLike | None,
        pool: BufferSource,
        helpers: ThreadPoolExecutor | None,
    ) -> RowBatch:
        return self._reader(layer).read(rows, dtype, pool=pool, helpers=helpers)

    def visit(
        self,
        rows: Int64Array,
        layer: str | None,
        dtype: npt.DTypeLike | None,
        visitor: RowVisitor,
        pool: BufferSource,
        helpers: ThreadPoolExecutor | None,
    ) -> None:
        self._reader(layer).visit(rows, visitor, dtype, pool=pool, helpers=helpers)

    def float_dtype(self, layer: str | None) -> np.dtype[Any]:
        return float_dtype(self._reader(layer).layout)

    def read_obsm(self, name: str, rows: Int64Array) -> npt.NDArray[Any]:
        return np.asarray(self._data.obsm.read(name, rows))

    def label(self, name: str) -> Label:
        return make_label(name, self._data.obs.lookup(name))

    def query(self, query: str) -> Int64Array:
        from scdl_zarr.reading.queries import query_rows

        return query_rows(self._data.obs, query)

    def tables(self) -> list[SourceTable]:
        return [SourceTable(path=self.path, obs=self._data.obs, header=self._data.metadata)]

    def gene_names(self, key: str | None = None) -> pd.Index:
        return self._data.var_names if key is None else _names_of(key, self._data.var.lookup(key))

    def readers(self, layer: str | None) -> list[CsrReader]:
        return [self._reader(layer)]

    def locate(self, layer: str | None, rows: Int64Array) -> list[tuple[CsrReader, Int64Array]]:
        return [(self._reader(layer), rows)]

    def values_per_row(self, layer: str | None) -> float:
        layout = self._reader(layer).layout
        return float(self.n_vars) if layout.encoding == "array" else layout.nnz / max(self.n_obs, 1)

    def stored_dtype(self, layer: str | None) -> np.dtype[Any] | None:
        return self._reader(layer).layout.data_dtype


class CollectionRows:
    """The rows of several datasets, one after the other, in the genes of their union.

    Parameters
    ----------
    parts
        The datasets' own rows, by name.
    read
        ``read(rows, layer, dtype)``: rows across the datasets.
    genes
        Names of the union's genes.
    """

    def __init__(
        self,
        path: str,
        parts: Mapping[str, DatasetRows],
        read: Callable[[Any, str | None, npt.DTypeLike | None], RowBatch],
        genes: Callable[[], pd.Index],
    ) -> None:
        self.path, self._parts, self._read, self._genes = path, dict(parts), read, genes
        self._sizes = [part.n_obs for part in self._parts.values()]
        self.n_obs = sum(self._sizes)
        self.n_vars = len(genes())
        self.threads = max((part.threads for part in self._parts.values()), default=1)
        self.remote = any(part.remote for part in self._parts.values())

    @property
    def sizes(self) -> list[int]:
        """Rows of each dataset."""
        return list(self._sizes)

    def weights(self, weights: Mapping[str, float] | Sequence[float]) -> list[float]:
        """A weight for each dataset: those of a list, or by name, where a dataset that is not named has none."""
        if not isinstance(weights, Mapping):
            if not hasattr(weights, "__iter__"):
                raise OptionError(f"weights={weights!r}; expected numbers of zero or more, one for each dataset")
            return list(weights)
        unknown = [name for name in weights if name not in self._parts]
        if unknown:
            raise OptionError(f"weights name {unknown[0]!r}, which is none of the datasets: {', '.join(self._parts)}")
        return [weights.get(name, 0.0) for name in self._parts]

    def identify(self) -> str:
        return digest_facts({"parts": [part.identify() for part in self._parts.values()]})

    def require(self, layers: Sequence[str], obsm: Sequence[str]) -> None:
        for part in self._parts.values():
            part.require(layers, obsm)

    def read(
        self,
        rows: Int64Array,
        layer: str | None,
        dtype: npt.DTypeLike | None,
        _pool: BufferSource,
        _helpers: ThreadPoolExecutor | None,
    ) -> RowBatch:
        return self._read(rows, layer, dtype)

    def visit(
        self,
        rows: Int64Array,
        layer: str | None,
        dtype: npt.DTypeLike | None,
        visitor: RowVisitor,
        _pool: BufferSource,
        _helpers: ThreadPoolExecutor | None,
    ) -> None:
        visit_batch(self._read(rows, layer, dtype), visitor)

    def float_dtype(self, layer: str | None) -> np.dtype[Any]:
        found = [part.float_dtype(layer) for part in self._parts.values()]
        return np.result_type(np.float32, *found)

    def read_obsm(self, name: str, rows: Int64Array) -> npt.NDArray[Any]:
        found = [(mine, part.read_obsm(name, own)) for part, mine, own in self._located(rows)]
        shapes = {values.shape[1:] for _, values in found}
        if len(shapes) > 1:
            raise OptionError(f"obsm {name!r} has rows of shapes {', '.join(map(str, sorted(shapes)))} in the datasets")
        if not found:
            return next(iter(self._parts.values())).read_obsm(name, rows)
        out = np.empty((len(rows), *found[0][1].shape[1:]), np.result_type(*(values.dtype for _, values in found)))
        for mine, values in found:
            out[mine] = values
        return out

    def label(self, name: str) -> Label:
        return join_labels(name, [part.label(name) for part in self._parts.values()])

    def query(self, query: str) -> Int64Array:
        starts = np.cumsum([0, *self._sizes[:-1]])
        return np.concatenate([start + part.query(query) for start, part in zip(starts, self._parts.values(), strict=True)])

    def tables(self) -> list[SourceTable]:
        return [table for part in self._parts.values() for table in part.tables()]

    def gene_names(self, key: str | None = None) -> pd.Index:
        if key is not None:
            raise OptionError(
                f"gene_key={key!r}: the genes of a collection are matched by var_names; convert its sources with var_key={key!r}"
            )
        return self._genes()

    def readers(self, layer: str | None) -> list[CsrReader]:
        return [reader for part in self._parts.values() for reader in part.readers(layer)]

    def locate(self, layer: str | None, rows: Int64Array) -> list[tuple[CsrReader, Int64Array]]:
        return [pair for part, _, own in self._located(rows) for pair in part.locate(layer, own)]

    def values_per_row(self, layer: str | None) -> float:
        return sum(part.values_per_row(layer) * part.n_obs for part in self._parts.values()) / max(self.n_obs, 1)

    def stored_dtype(self, _layer: str | None) -> np.dtype[Any] | None:
        return None

    def _located(self, rows: Int64Array) -> list[tuple[DatasetRows, Int64Array, Int64Array]]:
        """Each dataset that has some of the rows, their places among them and their numbers in it."""
        parts = list(self._parts.values())
        return [(parts[k], mine, own) for k, mine, own in split_rows_by_part(self._sizes, rows)]


def _names_of(key: str, column: Any) -> pd.Index:
    """Names of genes out of a column of var."""
    import pandas as pd

    names = pd.Index(pd.Series(column).astype(object))
    odd = [k for k, name in enumerate(names) if not isinstance(name, str)]
    if odd:
        raise OptionError(f"gene_key={key!r}: gene {odd[0]} has {names[odd[0]]!r} there; expected names")
    return names


def chosen_rows(source: RowSource, rows: Any) -> Int64Array | None:
    """The rows that a user chooses: a query of obs, or what selects rows by number.  None: all."""
    if rows is None:
        return None
    return source.query(rows) if isinstance(rows, str) else resolve_rows(rows, source.n_obs)
