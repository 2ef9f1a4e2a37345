"""H5AD files as sources: sparse and dense matrices in X, raw.X and layers, written by any anndata from 0.6 on.

Files are opened read-only.  Tables are read here, those of the usual encodings (``h5ad_frames.py``) and the compound ones that
anndata wrote before 0.7; anndata is imported only for what is neither.  What any other HDF5 file needs as a source is here, too:
opening it (:class:`Hdf5Source`) and reading three datasets as a CSR matrix (:class:`H5adMatrix`).
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import h5py
import numpy as np
import numpy.typing as npt

from scdl_zarr.conversion.hdf5_chunks import ElementReader, RowReader, filter_advice, unavailable_filters
from scdl_zarr.conversion.sources import MatrixHeader, MatrixReader, RowArray, SourceSpec, TableReader
from scdl_zarr.conversion.sources.counts import known_counts
from scdl_zarr.conversion.sources.csc import CscMatrix
from scdl_zarr.conversion.sources.dense import DenseMatrix
from scdl_zarr.conversion.sources.h5ad_frames import H5adTable, dataset_rows, is_usual, read_frame
from scdl_zarr.conversion.sources.row_readers import LazyArray, WholeArray, WholeTable
from scdl_zarr.conversion.sources.rules import genes_of_raw, matrix_name, missing_matrix, require_convertible, require_rows
from scdl_zarr.errors import ScdlZarrError, SourceError, StoreAccessError, StoreNotFoundError, StoreReplacedError
from scdl_zarr.storage.remote import RemoteLocation, RemoteObject
from scdl_zarr.storage.remote_file import RemoteFile

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["H5adMatrix", "H5adSource", "Hdf5Source", "h5ad_spec", "matrix_name", "reading", "refuse_undecodable"]

_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"


def h5ad_spec(path: str | os.PathLike[str], name: str | None = None) -> SourceSpec:
    """Describe a file without opening it as HDF5."""
    where = Path(os.path.abspath(os.path.expanduser(path)))
    try:
        status = where.stat()
    except FileNotFoundError:
        raise StoreNotFoundError(f"no source file at {where}") from None
    except OSError as error:
        raise SourceError(f"{where} cannot be read: {error.strerror}") from error
    if where.is_dir():
        raise SourceError(f"{where} is a folder, expected an H5AD file")
    return SourceSpec(path=str(where), name=name or where.name, size=status.st_size, mtime_ns=status.st_mtime_ns)


class Hdf5Source:
    """An opened HDF5 file.  Use as a context manager, in one thread."""

    def __init__(self, spec: SourceSpec) -> None:
        self.spec = spec
        self._readers: list[H5adMatrix] = []
        self._remote: RemoteFile | None = None

    def __enter__(self) -> Self:
        if self.spec.remote is not None:
            self._open_remote(self.spec.remote)
            return self
        path = self.spec.path
        try:
            with open(path, "rb") as file:
                signature = file.read(len(_HDF5_SIGNATURE))
            if signature != _HDF5_SIGNATURE and not h5py.is_hdf5(path):
                raise SourceError(f"{path} is not an HDF5 file (it starts with {signature!r}); an H5AD file is expected")
            self._check_unchanged()
            self._file = h5py.File(path, "r", locking="best-effort")
        except FileNotFoundError:
            raise StoreNotFoundError(f"no source file at {path}") from None
        except PermissionError as error:
            raise StoreAccessError(f"{path} cannot be read: {error.strerror}") from None
        except OSError as error:
            raise SourceError(f"{path} cannot be opened, it is truncated or damaged: {error}") from error
        return self

    @property
    def held_bytes(self) -> int:
        """Memory that it keeps for as long as it is open."""
        return 0 if self._remote is None else self._remote.held_bytes

    def _open_remote(self, location: RemoteLocation) -> None:
        """Through HDF5's driver for file objects; every answer is checked to come from the object that was described."""
        self._remote = RemoteFile(location, RemoteObject(key="", size=self.spec.size, version=self.spec.version))
        signature = b""
        try:
            signature = bytes(self._remote.read(len(_HDF5_SIGNATURE)) or b"")
            self._file = h5py.File(self._remote, "r")
        except Exception as error:
            self._raise_failure()
            if signature != _HDF5_SIGNATURE:
                raise SourceError(
                    f"{self.spec.path} is not an HDF5 file (it starts with {signature!r}); an H5AD file is expected"
                ) from error
            raise SourceError(f"{self.spec.path} cannot be opened, it is truncated or damaged: {error}") from error

    def _raise_failure(self) -> None:
        """What kept a remote file from being read says more than what HDF5 made of it."""
        failure = None if self._remote is None else self._remote.failure
        if isinstance(failure, StoreReplacedError):
            raise SourceError(
                f"{self.spec.path} changed while it was being converted; run again when nothing writes it"
            ) from None
        if failure is not None:
            raise failure from None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for reader in self._readers:
            reader.close()
        self._file.close()
        if self._remote is not None:
            self._raise_failure()
            self._remote.close()
            return
        if kind is None or issubclass(kind, SourceError):
            self._check_unchanged()

    def _check_unchanged(self) -> None:
        status = os.stat(self.spec.path)
        if (status.st_size, status.st_mtime_ns) != (self.spec.size, self.spec.mtime_ns):
            raise SourceError(f"{self.spec.path} changed while it was being converted; run again when nothing writes it")

    def _sparse(self, key: str, where: str, parts: SparseParts, *, by_columns: bool = False) -> H5adMatrix:
        matrix = H5adMatrix(self.spec.path, key, where, parts, by_columns=by_columns)
        self._readers.append(matrix)
        return matrix


class H5adSource(Hdf5Source):
    """An opened H5AD file.  Use as a context manager, in one thread."""

    # ---- matrices

    def matrices(self) -> dict[str, str]:
        with reading(self.spec.path, "the file"):
            return self._matrices()

    def _matrices(self) -> dict[str, str]:
        found = {}
        for key in ("X", *(f"layers/{name}" for name in self._group_keys("layers")), "raw/X"):
            node = self._node(key)
            kind = None if node is None else _kind(node)
            if kind is not None:
                found[key] = kind
        return found

    def kind(self, key: str) -> str | None:
        node = self._node(key)
        return None if node is None else _kind(node)

    def matrix(self, key: str) -> MatrixReader:
        node = self._node(key)
        kind = None if node is None else _kind(node)
        if node is None or kind is None:
            raise missing_matrix(self.spec.path, key, self.matrices())
        require_convertible(self.spec.path, key, kind)
        shown, where = matrix_name(key), f"{self.spec.path}: {matrix_name(key)}"
        if kind != "csr":
            self._require_rows_of_obs(key, node, kind)
        if kind == "dense":
            with reading(self.spec.path, shown):
                refuse_unreadable(where, node, self._file)
                return DenseMatrix(RowReader(node, where), key=key, where=where, identity=(self.spec, key))
        with reading(self.spec.path, shown, f"is not a readable {kind.upper()} matrix"):
            matrix = self._sparse(key, where, _sparse_parts(node), by_columns=kind == "csc")
        return CscMatrix(matrix, where=where, identity=(self.spec, key)) if kind == "csc" else matrix

    def _require_rows_of_obs(self, key: str, node: h5py.Group | h5py.Dataset, kind: str) -> None:
        """Refuse a matrix that is to be counted and says that it has other rows than obs, before memory is taken for them."""
        if known_counts((self.spec, key)) is None and self._node("obs") is not None:
            shown = matrix_name(key)
            with reading(self.spec.path, shown, f"is not a readable {kind.upper()} matrix"):
                n_obs = int(node.shape[0]) if kind == "dense" else _sparse_parts(node).shape[0]
            require_rows(self.spec.path, shown, n_obs, self.obs_table().n_rows)

    # ---- tables and the rest

    def obs(self) -> pd.DataFrame:
        return self._frame("obs")

    def obs_table(self) -> TableReader:
        node = self._node("obs")
        if not isinstance(node, h5py.Group):
            return WholeTable(self._frame("obs"))
        with reading(self.spec.path, "obs"):
            refuse_undecodable(self.spec.path, node)
            if not is_usual(node):
                return WholeTable(self._frame("obs"))
            table = H5adTable(node, lambda: reading(self.spec.path, "obs"))
            self._require_distinct("obs", table.columns)
            return table

    def var(self, key: str) -> pd.DataFrame:
        return self._raw_var()[0] if key == "raw/X" else self._frame("var")

    def columns_left_out(self, key: str) -> list[str]:
        return self._raw_var()[1] if key == "raw/X" else []

    def _raw_var(self) -> tuple[pd.DataFrame, list[str]]:
        return genes_of_raw(self._frame("raw/var"), None if self._node("var") is None else self._frame("var"))

    def others(self) -> list[str]:
        with reading(self.spec.path, "the list of its elements"):
            return self._others()

    def _others(self) -> list[str]:
        found = [f"{group}/{name}" for group in ("obsm", "varm", "obsp", "varp", "uns") for name in self._group_keys(group)]
        found += [f"obsp/{name}" for name in self._old_neighbors()]
        labels = {f"uns/{column}_categories" for table in ("obs", "var", "raw.var") for column in self._compound_columns(table)}
        return sorted(set(found) - labels)

    def element(self, path: str) -> Any:
        from anndata.io import read_elem

        group, _, name = path.partition("/")
        with reading(self.spec.path, path):
            node = self._file.get(group)
            if isinstance(node, h5py.Dataset):  # a compound table, one field an entry
                return np.asarray(node[name])
            refuse_undecodable(self.spec.path, self._file[path])
            return read_elem(self._file[path])

    def row_array(self, path: str) -> RowArray:
        with reading(self.spec.path, path):
            node = self._file.get(path)
            usual = isinstance(node, h5py.Dataset) and _text(node.attrs.get("encoding-type", "array")) == "array"
            if usual and node.ndim >= 2 and node.dtype.kind in "biuf":
                refuse_undecodable(self.spec.path, node)
                return LazyArray(self._reading(dataset_rows(node), path), node.shape, node.dtype)
        return WholeArray(self.spec.path, path, self.element(path))

    def provenance(self) -> None:
        return None

    # ---- inside

    def _reading(self, read: Callable[[int, int], npt.NDArray[Any]], what: str) -> Callable[[int, int], npt.NDArray[Any]]:
        def rows(start: int, stop: int) -> npt.NDArray[Any]:
            with reading(self.spec.path, what):
                return read(start, stop)

        return rows

    def _old_neighbors(self) -> list[str]:
        """Matrices that belong to obsp and lie in ``uns/neighbors``, where scanpy put them before anndata 0.7."""
        group, there = self._node("uns/neighbors"), self._group_keys("obsp")
        if not isinstance(group, h5py.Group):
            return []
        return [name for name in group if (_kind(group[name]) or "") in ("csr", "csc") and name not in there]

    def _node(self, key: str) -> h5py.Group | h5py.Dataset | None:
        """The node under a key; "raw/X" is "raw.X" in files of anndata 0.6, "obsp/<name>" may be "uns/neighbors/<name>"."""
        for name in (key, key.replace("raw/", "raw."), *([f"uns/neighbors/{key[5:]}"] if key.startswith("obsp/") else [])):
            try:
                return self._file[name]
            except KeyError:
                continue
        return None

    def _compound_columns(self, table: str) -> tuple[str, ...]:
        """Columns of a table of anndata 0.6, whose categories lie in uns."""
        node = self._file.get(table)
        return tuple(node.dtype.names or ()) if isinstance(node, h5py.Dataset) else ()

    def _group_keys(self, name: str) -> list[str]:
        node = self._file.get(name)
        if isinstance(node, h5py.Dataset):
            return list(node.dtype.names or ())
        return list(node) if node is not None else []

    def _frame(self, key: str) -> pd.DataFrame:
        import pandas as pd

        node = self._node(key)
        if node is None:
            raise SourceError(f"{self.spec.path} has no {key}")
        with reading(self.spec.path, key):
            refuse_undecodable(self.spec.path, node)
            frame = _compound_frame(node, self._file.get("uns")) if isinstance(node, h5py.Dataset) else _group_frame(node)
        if not isinstance(frame, pd.DataFrame):
            raise SourceError(f"{self.spec.path}: {key} is not a dataframe")
        self._require_distinct(key, list(frame.columns))
        return frame

    def _require_distinct(self, key: str, columns: list[str]) -> None:
        if len(set(columns)) < len(columns):
            repeated = sorted({name for name in columns if columns.count(name) > 1})
            raise SourceError(f"{self.spec.path}: {key} has repeated columns: {repeated}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseParts:
    """What a sparse matrix of an opened HDF5 file consists of, as found."""

    data: h5py.Dataset
    indices: h5py.Dataset
    indptr: h5py.Dataset
    shape: tuple[int, int]  # cells, genes


def _sparse_parts(group: h5py.Group) -> SparseParts:
    """The parts of a sparse matrix that anndata wrote."""
    n_obs, n_vars = (int(n) for n in (group.attrs["shape"] if "shape" in group.attrs else group.attrs["h5sparse_shape"]))
    return SparseParts(data=group["data"], indices=group["indices"], indptr=group["indptr"], shape=(n_obs, n_vars))


class H5adMatrix:
    """A sparse matrix of an opened HDF5 file, by rows or by columns: pointers, and values with the ids of the other axis.

    It is checked as far as headers go; `where` is file and matrix, for messages.
    """

    def __init__(self, path: str, key: str, where: str, parts: SparseParts, *, by_columns: bool = False) -> None:
        data, indices, indptr, (n_obs, n_vars) = parts.data, parts.indices, parts.indptr, parts.shape
        self._axis, there = ("column", "row") if by_columns else ("row", "gene")
        for part in (data, indices, indptr):
            if not isinstance(part, h5py.Dataset) or part.ndim != 1:
                kind = "CSC" if by_columns else "CSR"
                raise SourceError(f"{where} is not a {kind} matrix: {part.name} should be one-dimensional")
            refuse_unreadable(where, part, data.file)
        if data.dtype.kind not in "biuf" or data.dtype.itemsize > 8:
            raise SourceError(f"{where} has values of dtype {data.dtype}; integers, floats and booleans can be converted")
        if indices.dtype.kind not in "iu" or indptr.dtype.kind not in "iu":
            raise SourceError(
                f"{where} has ids of dtype {indices.dtype} and {self._axis} pointers of {indptr.dtype}, expected integers"
            )
        if len(data) != len(indices):
            raise SourceError(f"{where} has {len(data)} values and {len(indices)} {there} ids")
        n_pointers = (n_vars if by_columns else n_obs) + 1
        if min(n_obs, n_vars) < 0:
            raise SourceError(f"{where} has shape {n_obs} × {n_vars}")
        if len(indptr) != n_pointers:
            raise SourceError(f"{where} has {len(indptr)} {self._axis} pointers for {n_pointers - 1} {self._axis}s")
        self._where, self._path = where, path
        self._parts = data, indices, indptr
        self._data, self._indices = ElementReader(data, path), ElementReader(indices, path)
        self.header = MatrixHeader(
            key=key,
            n_obs=n_obs,
            n_vars=n_vars,
            nnz=len(data),
            dtype=np.dtype(bool) if data.dtype.kind == "b" else self._data.dtype,
            index_dtype=self._indices.dtype,
            chunk_bytes=max(self._data.chunk_bytes, self._indices.chunk_bytes),
        )

    def another(self) -> H5adMatrix:
        """The same for another thread, which holds chunks of its own; it closes it."""
        same = copy.copy(self)
        same._data, same._indices = (ElementReader(part, self._path) for part in self._parts[:2])
        return same

    def close(self) -> None:
        self._data.close()
        self._indices.close()

    def indptr(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        with reading(self._where, f"{self._axis} pointers {start} to {stop - 1}"):
            return np.asarray(self._parts[2][start:stop]).astype(np.int64, copy=False)

    def ids(self, start: int, stop: int, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """The ids of elements [start, stop) alone."""
        return self._indices.read(start, stop, out)

    def elements(
        self, start: int, stop: int, out: tuple[npt.NDArray[Any], npt.NDArray[Any]] | None = None
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        values, ids = out or (None, None)
        return self._data.read(start, stop, values), self._indices.read(start, stop, ids)


def refuse_unreadable(where: str, part: h5py.Dataset, file: h5py.File) -> None:
    """Refuse a dataset that lies in another file, or is compressed in a way that is not known here."""
    if part.file.filename != file.filename or part.is_virtual:
        raise SourceError(f"{where}: {part.name} lies in another file ({part.file.filename}); copy it into one file first")
    refuse_undecodable(where, part)


def refuse_undecodable(where: str, node: h5py.Group | h5py.Dataset) -> None:
    """Refuse a dataset, or a group with one, that is compressed in a way that is not known here."""
    if isinstance(node, h5py.Group):
        node.visititems(lambda _, inner: refuse_undecodable(where, inner) if isinstance(inner, h5py.Dataset) else None)
        return
    missing = unavailable_filters(node)
    if missing:
        raise SourceError(f"{where}: {node.name} is compressed with {', '.join(missing)}, {filter_advice()}")


@contextlib.contextmanager
def reading(where: str, what: str, fault: str = "cannot be read") -> Iterator[None]:
    """Whatever h5py and anndata raise for bytes that make no sense, as a :class:`SourceError`."""
    try:
        yield
    except ScdlZarrError:
        raise
    except Exception as error:
        raise SourceError(f"{where}: {what} {fault}: {error}") from error


def _kind(node: h5py.Group | h5py.Dataset) -> str | None:
    """ "csr", "csc", "dense", or None for something else."""
    if isinstance(node, h5py.Dataset):
        return "dense" if node.ndim == 2 else None
    encoding = _text(node.attrs.get("encoding-type", node.attrs.get("h5sparse_format", "")))
    return {"csr_matrix": "csr", "csc_matrix": "csc", "csr": "csr", "csc": "csc"}.get(encoding)


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _group_frame(group: h5py.Group) -> Any:
    frame = read_frame(group)
    if frame is None:
        from anndata.io import read_elem

        return read_elem(group)
    return frame


def _texts(values: npt.NDArray[Any], what: str) -> npt.NDArray[np.object_]:
    """Text as it is in the file: a byte that is replaced may make one cell of two."""
    texts: npt.NDArray[np.object_] = np.empty(len(values), object)
    for number, value in enumerate(values.tolist()):
        try:
            texts[number] = value.decode() if isinstance(value, bytes) else str(value)
        except UnicodeDecodeError as error:
            raise ValueError(f"row {number} of {what} is {value!r}, which is not UTF-8 ({error.reason})") from None
    return texts


def _compound_frame(node: h5py.Dataset, uns: Mapping[str, Any] | None) -> pd.DataFrame:
    """A table that anndata 0.6 stored as one compound dataset, its categories in ``uns/<column>_categories``."""
    import pandas as pd

    records = node[()]
    names = list(records.dtype.names or ())
    if not names:
        raise ValueError("neither a dataframe nor a compound table")
    columns = {}
    for name in names:
        values = records[name]
        if values.dtype.kind in "SO":
            values = _texts(values, name)
        categories = None if uns is None else uns.get(f"{name}_categories")
        if categories is not None and values.dtype.kind in "iu":
            labels = np.atleast_1d(categories[()])
            if labels.dtype.kind in "SO":
                labels = _texts(labels, f"uns/{name}_categories")
            values = pd.Categorical.from_codes(values.astype(np.int64), categories=pd.Index(labels))
        columns[name] = values
    index = next((name for name in ("_index", "index") if name in columns), names[0])
    labels = pd.Index(columns.pop(index), dtype=object)
    return pd.DataFrame(columns, index=labels)
