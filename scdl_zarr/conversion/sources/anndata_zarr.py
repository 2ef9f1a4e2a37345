"""AnnData Zarr stores of other programs as sources: Zarr v2 or v3, sharded or not, consolidated or not.

What opens and decodes them is what reads such stores elsewhere: documents from ``storage/foreign.py``, arrays through TensorStore
or zarr-python (``reading/arrays.py``), tables of every encoding through ``reading/tables.py``.  Here are the matrices seen as a
conversion asks for them, by ranges that follow one another, and the errors in its words.  Pickles are never opened.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.conversion.sources import MatrixHeader, MatrixReader, RowArray, SourceSpec, TableReader
from scdl_zarr.conversion.sources.csc import CscMatrix
from scdl_zarr.conversion.sources.dense import DenseMatrix
from scdl_zarr.conversion.sources.row_readers import LazyArray, StoreTable, WholeArray, row_array_of
from scdl_zarr.conversion.sources.rules import genes_of_raw, matrix_name, missing_matrix, require_convertible, require_rows
from scdl_zarr.errors import CorruptStoreError, NotAStoreError, SourceError, StoreAccessError, StoreReplacedError
from scdl_zarr.reading.arrays import MatrixArrays
from scdl_zarr.reading.row_ranges import ElementRows
from scdl_zarr.reading.tables import LazyTable, read_element, refuse_pickles
from scdl_zarr.reading.tensorstore_arrays import FILES_AT_ONCE
from scdl_zarr.storage.foreign import Nodes, chunk_shape, describe_matrix, open_nodes
from scdl_zarr.storage.location import ROOT_KEY, StoreLocation, locate
from scdl_zarr.storage.metadata import is_ours, node_attributes, parse_root
from scdl_zarr.storage.remote import RemoteLocation
from scdl_zarr.storage.schema import MatrixLayout

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["AnnDataZarrSource", "anndata_zarr_spec"]

ROOT_DOCUMENTS = (ROOT_KEY, ".zgroup", ".zattrs", ".zmetadata")
PIECE_VALUES = 1 << 17  # values read at once, in whole chunks
ASIDE = ("obsm", "varm", "obsp", "varp", "uns")


def anndata_zarr_spec(where: Path | RemoteLocation, name: str | None = None) -> SourceSpec:
    """Describe a folder (or a prefix of an object store) by its root documents."""
    remote = where if isinstance(where, RemoteLocation) else None
    with as_source_errors():
        size, mtime_ns, version = _stamp(where)
        if not size:
            what = "is a folder, expected" if remote is None else "is no object and has no root document of Zarr, expected"
            raise SourceError(f"{where} {what} an H5AD file or an AnnData Zarr store")
        document = locate(where).read(ROOT_KEY)
        if document is not None and is_ours(parse_root(document, str(where))):
            raise SourceError(f"{where} is a store that scdl-zarr made, which this version does not convert; open it as it is")
    return SourceSpec(
        path=str(where),
        name=name or where.name,
        size=size,
        mtime_ns=mtime_ns,
        kind="anndata-zarr",
        version=version,
        remote=remote,
    )


def _stamp(where: Path | RemoteLocation) -> tuple[int, int, str]:
    """Bytes of the root documents, when the last of them was written, and (of objects) their versions."""
    if isinstance(where, RemoteLocation):
        objects = {name: entry for name in ROOT_DOCUMENTS if (entry := where.at(name).head()) is not None}
        return sum(e.size for e in objects.values()), 0, " ".join(f"{name}={e.version}" for name, e in objects.items())
    found = []
    for name in ROOT_DOCUMENTS:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            found.append((where / name).stat())
    return sum(status.st_size for status in found), max((status.st_mtime_ns for status in found), default=0), ""


@contextlib.contextmanager
def as_source_errors() -> Iterator[None]:
    """What reading a store raises, as the errors of a conversion."""
    try:
        yield
    except StoreReplacedError as error:
        raise SourceError(f"{error} (it changed while it was being converted; run again when nothing writes it)") from None
    except (CorruptStoreError, NotAStoreError) as error:
        raise SourceError(str(error)) from error.__cause__
    except PermissionError as error:
        if isinstance(error, StoreAccessError):
            raise
        raise StoreAccessError(f"{error.filename} cannot be read: {error.strerror}") from None


class AnnDataZarrSource:
    """An opened AnnData Zarr store.  Use as a context manager, in one thread."""

    def __init__(self, spec: SourceSpec) -> None:
        self.spec = spec
        self._where = spec.path
        self._place = spec.remote or Path(spec.path)

    def __enter__(self) -> AnnDataZarrSource:
        self._location = locate(self._place).pinned()
        self._check_unchanged()
        with as_source_errors():
            self._nodes: Nodes = open_nodes(self._location)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None or issubclass(kind, SourceError):
            self._check_unchanged()

    def _check_unchanged(self) -> None:
        if _stamp(self._place) != (self.spec.size, self.spec.mtime_ns, self.spec.version):
            raise SourceError(f"{self.spec.path} changed while it was being converted; run again when nothing writes it")

    # ---- matrices

    def matrices(self) -> dict[str, str]:
        keys = ("X", *(f"layers/{name}" for name in self._children("layers")), "raw/X")
        return {key: kind for key in keys if (kind := self.kind(key)) is not None}

    def kind(self, key: str) -> str | None:
        node = self._nodes.get(key)
        if node is None:
            return None
        if node.get("node_type") == "array":
            shape = node.get("shape")
            return "dense" if isinstance(shape, list) and len(shape) == 2 else None
        encoding = node_attributes(self._nodes, key).get("encoding-type")
        return {"csr_matrix": "csr", "csc_matrix": "csc"}.get(str(encoding))

    def matrix(self, key: str) -> MatrixReader:
        kind = self.kind(key)
        if kind is None:
            raise missing_matrix(self._where, key, self.matrices())
        require_convertible(self._where, key, kind)
        with as_source_errors():
            layout = describe_matrix(key, self._nodes, self._where)
            if isinstance(layout, str):
                raise SourceError(f"{self._where}: {matrix_name(key)} cannot be converted: {layout}")
            where = f"{self._where}: {matrix_name(key)}"
            if kind == "csr":
                return ZarrSparseMatrix(self._location, layout)
            if "obs" in self._nodes and (n_rows := self._length("obs")):  # before memory is taken to count them
                require_rows(self._where, matrix_name(key), layout.n_obs, n_rows)
            if kind == "csc":
                return CscMatrix(ZarrSparseMatrix(self._location, layout), where=where, identity=(self.spec, key))
            return DenseMatrix(ZarrRows(self._location, layout), key=key, where=where, identity=(self.spec, key))

    # ---- tables and the rest

    def obs(self) -> pd.DataFrame:
        return self._frame("obs")

    def obs_table(self) -> TableReader:
        table = self._table("obs")
        return StoreTable(table, range(len(table)), as_source_errors)

    def var(self, key: str) -> pd.DataFrame:
        return self._raw_var()[0] if key == "raw/X" else self._frame("var")

    def columns_left_out(self, key: str) -> list[str]:
        return self._raw_var()[1] if key == "raw/X" else []

    def _raw_var(self) -> tuple[pd.DataFrame, list[str]]:
        return genes_of_raw(self._frame("raw/var"), self._frame("var") if "var" in self._nodes else None)

    def others(self) -> list[str]:
        return sorted(f"{group}/{name}" for group in ASIDE for name in self._children(group))

    def element(self, path: str) -> Any:
        with as_source_errors():
            return read_element(self._location, path, self._nodes, whole=False)

    def row_array(self, path: str) -> RowArray:
        found = row_array_of(self._nodes.get(path))
        if found is None or node_attributes(self._nodes, path).get("encoding-type", "array") != "array":
            return WholeArray(self.spec.path, path, self.element(path))
        with as_source_errors():
            opened = ElementRows(self._location, path, self._nodes, whole=False)
        return LazyArray(lambda start, stop: _reading_rows(opened, start, stop), *found)

    def provenance(self) -> None:
        return None

    # ---- inside

    def _children(self, group: str) -> list[str]:
        prefix = f"{group}/"
        names = (path.removeprefix(prefix) for path in self._nodes if path.startswith(prefix))
        return sorted(name for name in names if name and "/" not in name)

    def _frame(self, key: str) -> pd.DataFrame:
        table = self._table(key)
        with as_source_errors():
            return table.to_pandas()

    def _table(self, key: str) -> LazyTable:
        if key not in self._nodes:
            raise SourceError(f"{self._where} has no {key}")
        with as_source_errors():
            refuse_pickles(self._location, {path: node for path, node in self._nodes.items() if path.startswith(f"{key}/")})
            table = LazyTable(self._location, key, self._nodes, self._length(key), whole=False)
            if len(set(table.columns)) != len(table.columns):
                repeated = sorted({name for name in table.columns if table.columns.count(name) > 1})
                raise SourceError(f"{self._where}: {key} has repeated columns: {repeated}")
            return table

    def _length(self, table: str) -> int:
        """As many rows as the index has entries: it may be an array, or a group around one."""
        index = f"{table}/{node_attributes(self._nodes, table).get('_index')}"
        for path in (index, f"{index}/values", f"{index}/codes"):
            shape = (self._nodes.get(path) or {}).get("shape")
            if isinstance(shape, list) and len(shape) == 1 and isinstance(shape[0], int):
                return shape[0]
        return 0  # the table will say what is wrong with its index


def _reading_rows(opened: ElementRows, start: int, stop: int) -> npt.NDArray[Any]:
    with as_source_errors():
        found: npt.NDArray[Any] = opened.rows(start, stop)
        return found


class ZarrSparseMatrix:
    """A sparse matrix of an opened store, by rows or by columns: pointers, and values with the ids of the other axis."""

    def __init__(self, location: StoreLocation, layout: MatrixLayout) -> None:
        self._origin = location, layout
        arrays = MatrixArrays(location, layout, threads=1)
        self._parts = {part: _Part(arrays, f"{layout.path}/{part}", layout) for part in ("data", "indices", "indptr")}
        self.header = MatrixHeader(
            key=layout.path,
            n_obs=layout.n_obs,
            n_vars=layout.n_vars,
            nnz=layout.nnz,
            dtype=layout.data_dtype,
            index_dtype=self._parts["indices"].dtype,
            chunk_bytes=max(part.piece * part.dtype.itemsize for part in self._parts.values()),
        )

    def another(self) -> ZarrSparseMatrix:
        """The same for another thread, which holds pieces of its own."""
        return ZarrSparseMatrix(*self._origin)

    def close(self) -> None:
        """Nothing is held open."""

    def ids(self, start: int, stop: int, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        return self._parts["indices"].read(start, stop, out)

    def indptr(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        return self._parts["indptr"].read(start, stop).astype(np.int64, copy=False)

    def elements(
        self, start: int, stop: int, out: tuple[npt.NDArray[Any], npt.NDArray[Any]] | None = None
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        values, ids = out or (None, None)
        return self._parts["data"].read(start, stop, values), self._parts["indices"].read(start, stop, ids)


class _Part:
    """One array of a sparse matrix, read in pieces of whole chunks; the last one is kept, because the next range starts in it."""

    def __init__(self, arrays: MatrixArrays, path: str, layout: MatrixLayout) -> None:
        node = layout.nodes[path]
        (chunk,) = chunk_shape(node)
        self._arrays, self._path = arrays, path
        self._size = int(node["shape"][0])
        self._held: tuple[int, npt.NDArray[Any]] | None = None
        self.piece = min(max(PIECE_VALUES // chunk, 1) * chunk, max(self._size, 1))
        self.dtype = np.dtype(node.get("data_type", node.get("dtype"))).newbyteorder("=")

    def read(self, start: int, stop: int, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        if out is None:
            out = np.empty(max(stop - start, 0), self.dtype)
        for number in range(start // self.piece, -(-stop // self.piece)):
            first = number * self.piece
            low, high = max(start, first), min(stop, first + self.piece)
            out[low - start : high - start] = self._values(number)[low - first : high - first]
        return out

    def _values(self, number: int) -> npt.NDArray[Any]:
        if self._held is None or self._held[0] != number:
            self._held = None  # one piece at a time
            first = number * self.piece
            with as_source_errors():
                (values,) = self._arrays.stream([(self._path, slice(first, min(first + self.piece, self._size)))])
            self._held = number, values
        return self._held[1]


class ZarrRows:
    """A dense matrix of an opened store.  See :class:`scdl_zarr.conversion.sources.dense.DenseRows`."""

    def __init__(self, location: StoreLocation, layout: MatrixLayout) -> None:
        chunk = chunk_shape(layout.nodes[layout.path])
        self._arrays, self._path = MatrixArrays(location, layout, threads=1), layout.path
        self.n_obs, self.n_vars, self.dtype = layout.n_obs, layout.n_vars, layout.data_dtype
        self.chunk_rows = chunk[0]
        self.scratch_bytes = 2 * FILES_AT_ONCE * math.prod(chunk) * self.dtype.itemsize  # as stored and decoded

    def blocks(self, ranges: Iterable[tuple[int, int]]) -> Iterator[npt.NDArray[Any]]:
        """Rows [start, stop) of each range; one is decoded at a time, since several may be as much as memory holds."""
        for start, stop in ranges:
            if not self.n_vars:
                yield np.empty((stop - start, 0), self.dtype)
                continue
            yield self._rows(start, stop)  # and no name holds it while the next one is made

    def _rows(self, start: int, stop: int) -> npt.NDArray[Any]:
        with as_source_errors():
            (cells,) = self._arrays.stream([(self._path, slice(start, stop))])
        return np.ascontiguousarray(cells, self.dtype)
