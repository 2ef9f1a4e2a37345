"""What a conversion needs to know of a source, whatever kind of file it is.

A source is opened where it is read: what travels is a :class:`SourceSpec`.  A folder that was made of several files (a store of
ours, an archive of BioNeMo-SCDL) is as many sources, so that each keeps its own genes and its name; so is a file of 10x Genomics
with several genomes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from scdl_zarr.storage.remote import RemoteLocation, is_remote, parse_remote
from scdl_zarr.storage.schema import ATTRIBUTE

if TYPE_CHECKING:
    import pandas as pd

    from scdl_zarr.conversion.sources.order import View

__all__ = [
    "ABSENT",
    "EmptyMatrix",
    "MatrixHeader",
    "MatrixReader",
    "Provenance",
    "RowArray",
    "Source",
    "SourceKind",
    "SourceSpec",
    "TableReader",
    "describe_path",
    "in_any_order",
    "open_source",
    "read_matrix",
    "stored_elements",
]

SourceKind = Literal["h5ad", "anndata-zarr", "scdl", "store", "tenx", "view"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSpec:
    """Which file, and what identifies its content.

    ``name`` goes into the store; ``path`` and ``mtime_ns`` never do (the same sources give the same bytes anywhere).  ``part`` is
    which of the sources at that path it is.  ``feature_types`` selects features of a file of 10x Genomics; none: all of them.  Of
    an object there is ``version``, which identifies its content, in the place of ``mtime_ns``, and ``remote`` says how to reach
    it.
    """

    path: str
    name: str
    size: int
    mtime_ns: int
    kind: SourceKind = "h5ad"
    part: int = 0
    feature_types: tuple[str, ...] = ()
    version: str = ""
    remote: RemoteLocation | None = None
    view: View | None = None  # which rows and genes of a store, in which order, for the kind "view"


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What is recorded of a source that comes out of a store: which matrix of its file was taken, and the sum of its values.

    ``checksum`` is None where only a part of the source is there, whose own sum is found out now.
    """

    matrix: str
    size_bytes: int
    checksum: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixHeader:
    """A matrix of a source as CSR, whatever its layout."""

    key: str  # "X", "raw/X", "layers/<name>" or "obsp/<name>"
    n_obs: int
    n_vars: int
    nnz: int
    dtype: np.dtype[Any]
    index_dtype: np.dtype[Any]
    chunk_bytes: int  # decoded bytes of the largest chunk of data or indices
    layout: Literal["csr", "csc", "dense", "selected"] = "csr"  # of all but the first, what rows store has to be counted
    counted_bytes: int = 0  # which takes so much memory


class MatrixReader(Protocol):
    """Reads one matrix of an opened source, by ranges."""

    header: MatrixHeader

    def indptr(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Row pointers [start, stop) as int64."""

    def elements(
        self, start: int, stop: int, out: tuple[npt.NDArray[Any], npt.NDArray[Any]] | None = None
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Values and gene ids of elements [start, stop), in `out` (arrays of that length and the header's dtypes) or new."""


ABSENT = ""  # the key of a matrix that a source does not have and that counts as one without values


@dataclass(slots=True, kw_only=True)
class EmptyMatrix:
    """What is read of a matrix that a source does not have."""

    header: MatrixHeader

    @classmethod
    def of(cls, n_obs: int, n_vars: int) -> EmptyMatrix:
        header = MatrixHeader(
            key=ABSENT,
            n_obs=n_obs,
            n_vars=n_vars,
            nnz=0,
            dtype=np.dtype(np.float32),
            index_dtype=np.dtype(np.int32),
            chunk_bytes=0,
        )
        return cls(header=header)

    def indptr(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        return np.zeros(stop - start, np.int64)

    def elements(
        self,
        start: int,  # noqa: ARG002 (there are none)
        stop: int,  # noqa: ARG002
        out: tuple[npt.NDArray[Any], npt.NDArray[Any]] | None = None,
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        return out or (np.empty(0, self.header.dtype), np.empty(0, self.header.index_dtype))


def read_matrix(source: Source, key: str, n_obs: int) -> MatrixReader:
    """The matrix of a source under a key that a plan names."""
    return source.matrix(key) if key != ABSENT else EmptyMatrix.of(n_obs, n_obs)


def stored_elements(matrix: MatrixReader, start: int, stop: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Values and ids of elements [start, stop) in the order of the file: for whoever does not ask which rows they are of.

    For a matrix stored by columns that is cheap where :meth:`MatrixReader.elements` is not, and its ids are those of rows.
    """
    stored = getattr(matrix, "stored", None)
    return stored(start, stop) if stored is not None else matrix.elements(start, stop)


def in_any_order(reader: Any) -> tuple[Any, str]:
    """A table or an array with its rows in the order in which they are read fastest, and a text that tells its own order apart.

    For whoever asks what there is in it, and not where: a view whose rows lie anywhere in a store is read much faster this way.
    """
    found: tuple[Any, str] = reader.in_any_order() if hasattr(reader, "in_any_order") else (reader, "")
    return found


class TableReader(Protocol):
    """The cells' table of an opened source, by ranges of rows: nothing is as long as the table unless ``held_bytes`` says so.

    What it gives has the dtypes and the categories that the whole table has, so that pieces put together are the table.
    """

    @property
    def columns(self) -> list[str]:
        """Names of the columns, in order; none twice."""

    @property
    def n_rows(self) -> int: ...

    @property
    def index_name(self) -> str | None: ...

    @property
    def held_bytes(self) -> int:
        """Memory it keeps for as long as it is there: that of a table which could only be read whole."""

    def column(self, name: str, start: int, stop: int) -> pd.Series[Any]:
        """Rows [start, stop) of a column, numbered from 0."""

    def names(self, start: int, stop: int) -> pd.Index:
        """Rows [start, stop) of the index."""


class RowArray(Protocol):
    """A dense numeric array with a row for each cell, by ranges of rows."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    @property
    def held_bytes(self) -> int: ...

    def rows(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows [start, stop)."""


class Source(Protocol):
    """An opened source."""

    spec: SourceSpec

    def matrices(self) -> dict[str, str]:
        """Keys of all matrices, with their kind: "csr", "csc" or "dense"."""

    def kind(self, key: str) -> str | None:
        """What is stored under a key, such as "obsp/<name>": "csr", "csc", "dense", or None for anything else and nothing."""

    def matrix(self, key: str) -> MatrixReader:
        """Open a matrix; one that cannot be converted, or is inconsistent, is a SourceError.

        One that is dense or stored by columns is read by the first opening in a process, which counts what its rows store.
        """

    def obs(self) -> pd.DataFrame:
        """The cells' table, indexed by name."""

    def obs_table(self) -> TableReader:
        """The same table, to be read by ranges of rows."""

    def var(self, key: str) -> pd.DataFrame:
        """The genes' table that belongs to that matrix, indexed by name.

        With raw.X that of raw, and the columns that only var has where both list the same genes in the same order.
        """

    def columns_left_out(self, key: str) -> list[str]:
        """Columns that :meth:`var` does not have for that matrix though the source has them: "var/means", ..."""

    def others(self) -> list[str]:
        """Elements beside obs, var and the matrices: "obsm/X_pca", "uns/colors", ..."""

    def element(self, path: str) -> Any:
        """One of those elements, in memory."""

    def row_array(self, path: str) -> RowArray:
        """One of those elements, to be read by ranges of rows; what is no dense numeric array is a SourceError."""

    def provenance(self) -> Provenance | None:
        """What is recorded of it; None for a file, of which it is found out now."""


def describe_path(
    path: str | os.PathLike[str], name: str | None = None, storage_options: Mapping[str, Any] | None = None
) -> list[SourceSpec]:
    """The sources at a path or URL, described without reading them.

    Raises
    ------
    StoreNotFoundError, SourceError
        There is nothing, or nothing that can be converted.
    """
    from scdl_zarr.storage.scdl_archive import archive_kind

    if isinstance(path, str) and is_remote(path):
        from scdl_zarr.conversion.sources.remote import describe_remote

        return describe_remote(parse_remote(path, storage_options), name)
    where = Path(os.path.abspath(os.path.expanduser(path)))
    if is_store(where):
        from scdl_zarr.conversion.sources.store import store_specs

        return store_specs(where)
    if archive_kind(where) is not None:
        from scdl_zarr.conversion.sources.scdl_memmap import archive_specs

        return archive_specs(where, name or where.name)
    if where.is_dir():
        from scdl_zarr.conversion.sources.anndata_zarr import anndata_zarr_spec

        return [anndata_zarr_spec(where, name)]
    from scdl_zarr.conversion.sources.h5ad import h5ad_spec
    from scdl_zarr.conversion.sources.tenx import tenx_specs

    spec = h5ad_spec(where, name)
    return tenx_specs(spec) or [spec]


def is_store(path: Path) -> bool:
    """Whether a folder is a store of ours, finished or damaged."""
    import json

    try:
        return ATTRIBUTE in json.loads((path / "zarr.json").read_bytes())["attributes"]
    except (OSError, ValueError, TypeError, KeyError):
        return False


def open_source(spec: SourceSpec) -> AbstractContextManager[Source]:
    """Open a source for reading."""
    if spec.kind == "store":
        from scdl_zarr.conversion.sources.store import StoreSource

        return StoreSource(spec)
    if spec.kind == "view":
        from scdl_zarr.conversion.sources.view import ViewSource

        return ViewSource(spec)
    if spec.kind == "anndata-zarr":
        from scdl_zarr.conversion.sources.anndata_zarr import AnnDataZarrSource

        return AnnDataZarrSource(spec)
    if spec.kind == "scdl":
        from scdl_zarr.conversion.sources.scdl_memmap import ScdlSource

        return ScdlSource(spec)
    if spec.kind == "tenx":
        from scdl_zarr.conversion.sources.tenx import TenxSource

        return TenxSource(spec)
    from scdl_zarr.conversion.sources.h5ad import H5adSource

    return H5adSource(spec)
