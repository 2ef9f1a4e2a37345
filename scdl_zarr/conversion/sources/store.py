"""Stores of ours as sources: each file that a store was made of comes out as it was.

A store is as many sources as it has in ``uns/scdl/sources``.  Each has its own rows, its own genes in its own order, and its
recorded name; what is read from it is what was read from its file::

    gene ids of the store ──► of the source (the var table's map, backwards) ──► rows that were sorted there, sorted

so that whatever is made of it (a joined store, a longer one) is what would be made of the files.
"""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.conversion.kernels import map_rows, sort_rows
from scdl_zarr.conversion.sources import MatrixHeader, MatrixReader, Provenance, RowArray, SourceSpec, TableReader
from scdl_zarr.conversion.sources.order import forget_numbers
from scdl_zarr.conversion.sources.passing import passing
from scdl_zarr.conversion.sources.row_readers import LazyArray, StoreTable, WholeArray, row_array_of
from scdl_zarr.errors import CorruptStoreError, ScdlZarrError, SourceError
from scdl_zarr.reading.blocks import Blocks
from scdl_zarr.reading.csr import Columns, open_columns, row_of, value_dtype
from scdl_zarr.reading.local_genes import local_numbers
from scdl_zarr.reading.plan import Int64Array, plan_rows
from scdl_zarr.reading.row_arrays import LazyArrays
from scdl_zarr.reading.tables import LazyTable
from scdl_zarr.storage.location import ROOT_KEY, StoreLocation, locate, read_metadata
from scdl_zarr.storage.metadata import StoreMetadata
from scdl_zarr.storage.remote import RemoteLocation
from scdl_zarr.storage.schema import MatrixLayout

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["OpenedStore", "StoreSource", "forget_stores", "open_kept", "opened_store", "store_specs"]

OPEN_STORES = 16  # kept open between the tasks of a process


def store_specs(path: Path | RemoteLocation) -> list[SourceSpec]:
    """The sources of a committed store, in order."""
    size, mtime_ns, version = _stamp(path)
    opened = open_kept(path, (size, mtime_ns, version))
    remote = path if isinstance(path, RemoteLocation) else None
    return [
        SourceSpec(
            path=str(path), name=name, size=size, mtime_ns=mtime_ns, kind="store", part=part, version=version, remote=remote
        )
        for part, name in enumerate(opened.names)
    ]


def _stamp(path: Path | RemoteLocation) -> tuple[int, int, str]:
    """What identifies the state of a store: its root document's size, and the time or the version of it."""
    if isinstance(path, RemoteLocation):
        found = path.at(ROOT_KEY).head()
        if found is None:
            raise SourceError(f"{path} has no {ROOT_KEY} any more")
        return found.size, 0, found.version
    status = os.stat(path / ROOT_KEY)
    return status.st_size, status.st_mtime_ns, ""


@dataclass(frozen=True, kw_only=True)
class OpenedStore:
    """A store, and what all of its sources share.  Used by several threads."""

    location: StoreLocation
    metadata: StoreMetadata
    blocks: Blocks
    sources: pd.DataFrame
    tables: list[int]

    @property
    def names(self) -> list[str]:
        return [str(name) for name in self.sources["name"]]

    @property
    def obs(self) -> LazyTable:
        return LazyTable(self.location, "obs", self.metadata.nodes, self.metadata.n_obs)

    @functools.cached_property
    def _columns(self) -> dict[str, Columns]:
        return {}

    def columns(self, path: str) -> Columns:
        if path not in self._columns:
            self._columns[path] = passing(open_columns(self.location, self.metadata.matrices[path], threads=1, check="first"))
        return self._columns[path]

    @functools.cached_property
    def kept(self) -> dict[Any, Any]:
        """What its sources found out and share.  Two threads may find out the same thing at once."""
        return {}

    def vocabulary(self) -> pd.DataFrame:
        """The var table of the whole store."""
        return LazyTable(self.location, "var", self.metadata.nodes, self.metadata.n_vars).to_pandas()

    def table(self, number: int) -> pd.DataFrame:
        """A var table: the same object for all sources that have it."""
        if ("table", number) not in self.kept:
            self.kept["table", number] = self.blocks.table(number)
        found: pd.DataFrame = self.kept["table", number]
        return found

    def local_genes(self, number: int) -> tuple[Int64Array, bool] | None:
        """For each gene of the store its number in a var table (-1: not there), and whether that keeps order; None: the same."""
        if ("genes", number) not in self.kept:
            self.kept["genes", number] = local_numbers(self.blocks.table_gene_ids(number), self.metadata.n_vars)
        found: tuple[Int64Array, bool] | None = self.kept["genes", number]
        return found

    def unsorted_rows(self, path: str) -> Int64Array:
        if ("unsorted", path) not in self.kept:
            self.kept["unsorted", path] = self.blocks.unsorted_rows(path)
        found: Int64Array = self.kept["unsorted", path]
        return found

    def rows(self, part: int) -> range:
        """The rows of a source."""
        lengths = np.asarray(self.sources["n_obs"], np.int64)
        stop = int(lengths[: part + 1].sum())
        return range(stop - int(lengths[part]), stop)

    def origins(self) -> pd.DataFrame | None:
        """What ``blocks.origins()`` says."""
        if "origins" not in self.kept:
            self.kept["origins"] = self.blocks.origins()
        found: pd.DataFrame | None = self.kept["origins"]
        return found


@functools.lru_cache(OPEN_STORES)
def open_kept(path: Path | RemoteLocation, _stamp: tuple[int, int, str]) -> OpenedStore:
    """The store at a path as long as its root document is that one, kept open between the tasks of a process."""
    location = locate(path).pinned()
    metadata = read_metadata(location)
    blocks = Blocks(location, metadata)
    return OpenedStore(
        location=location, metadata=metadata, blocks=blocks, sources=blocks.sources(), tables=blocks.tables_of_sources()
    )


def opened_store(spec: SourceSpec) -> OpenedStore:
    """The store that a source is of, which must be as it was when it was described."""
    _require_unchanged(spec)
    return open_kept(spec.remote or Path(spec.path), (spec.size, spec.mtime_ns, spec.version))


def _require_unchanged(spec: SourceSpec) -> None:
    try:
        found = _stamp(spec.remote or Path(spec.path))
    except ScdlZarrError:
        raise
    except OSError as error:
        raise SourceError(f"{spec.path} cannot be read any more: {error.strerror}") from error
    if found != (spec.size, spec.mtime_ns, spec.version):
        raise SourceError(f"{spec.path} changed while it was being converted; run again when nothing writes it")


def _names(listed: str | None, name: str) -> bool:
    """Whether a source is among "a.h5ad, b.h5ad and 1 more"; whether it is the one more nobody knows."""
    if listed is None:
        return True
    named, more, _ = listed.partition(" and ")
    return name in named.split(", ") or bool(more)


def forget_stores() -> None:
    """Let go of the stores that were read, and of views of them: mapped files keep space on the disk even when deleted."""
    open_kept.cache_clear()
    forget_numbers()


class StoreSource:
    """One source of a store.  Use as a context manager."""

    def __init__(self, spec: SourceSpec) -> None:
        self.spec = spec

    def __enter__(self) -> StoreSource:
        self._store = opened_store(self.spec)
        self._rows = self._store.rows(self.spec.part)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None or issubclass(kind, SourceError):
            _require_unchanged(self.spec)

    # ---- matrices

    def matrices(self) -> dict[str, str]:
        return {path: "csr" for path in self._store.metadata.matrices if not path.startswith("obsp/")}

    def kind(self, key: str) -> str | None:
        return "csr" if key in self._store.metadata.matrices else None

    def matrix(self, key: str) -> MatrixReader:
        layout = self._store.metadata.matrices.get(key)
        if layout is None:
            listed = ", ".join(self.matrices())
            raise SourceError(
                f"{self.spec.path} has no matrix {key} (a store keeps raw.X as X, if that was taken); it has: {listed}"
            )
        table = self._store.tables[self.spec.part]
        genes = self._store.local_genes(table)
        if key.startswith("obsp/"):
            return StoreMatrix(self._store, layout, self._rows, len(self._rows), None, first_id=self._rows.start)
        return StoreMatrix(self._store, layout, self._rows, len(self._store.table(table)), genes)

    # ---- tables and the rest

    def obs(self) -> pd.DataFrame:
        return self._store.obs.to_pandas().iloc[self._rows.start : self._rows.stop]

    def obs_table(self) -> TableReader:
        return StoreTable(self._store.obs, self._rows)

    def var(self, key: str) -> pd.DataFrame:  # noqa: ARG002 (all matrices of a store have the same genes)
        return self._store.table(self._store.tables[self.spec.part])

    def columns_left_out(self, key: str) -> list[str]:  # noqa: ARG002
        """What its file had and the store has not, as the store lists it: ``uns/colors``, or ``uns/colors (of a.h5ad)``."""
        listed = [re.fullmatch(r"(.*?)(?: \(of (.*)\))?", str(text)) for text in self._store.metadata.header.get("left_out", [])]
        return [found[1] for found in listed if found and _names(found[2], self.spec.name)]

    def others(self) -> list[str]:
        obsp = [path for path in self._store.metadata.matrices if path.startswith("obsp/")]
        return sorted([*obsp, *(f"obsm/{name}" for name in self._store.metadata.children("obsm"))])  # origins come along

    def element(self, path: str) -> Any:
        group, _, name = path.partition("/")
        nodes, n_obs = self._store.metadata.nodes, self._store.metadata.n_obs
        arrays = LazyArrays(self._store.location, group, self._store.metadata.children(group), nodes, n_obs)
        return arrays.read(name, slice(self._rows.start, self._rows.stop))

    def row_array(self, path: str) -> RowArray:
        group, _, name = path.partition("/")
        nodes, n_obs = self._store.metadata.nodes, self._store.metadata.n_obs
        arrays = LazyArrays(self._store.location, group, self._store.metadata.children(group), nodes, n_obs)
        found = row_array_of(nodes.get(path))
        if found is None:
            return WholeArray(self.spec.path, path, self.element(path))
        (_, *width), dtype = found
        first = self._rows.start

        def rows(start: int, stop: int) -> npt.NDArray[Any]:
            values: npt.NDArray[Any] = arrays.read(name, slice(first + start, first + stop))
            return values

        return LazyArray(rows, (len(self._rows), *width), dtype)

    def origin_rows(self, start: int, stop: int) -> Int64Array:
        """Which rows of the origins that the store records the rows [start, stop) were."""
        found = self._store.blocks.origin_rows(slice(self._rows.start + start, self._rows.start + stop))
        assert found is not None, "asked for where there are some"
        return found

    def provenance(self) -> Provenance:
        row = self._store.sources.iloc[self.spec.part]
        return Provenance(matrix=str(row["matrix"]), size_bytes=int(row["size_bytes"]), checksum=int(row["checksum"]))


class StoreMatrix:
    """One source's part of a matrix, with the gene ids (for an obsp: the row numbers) of the source."""

    def __init__(
        self,
        store: OpenedStore,
        layout: MatrixLayout,
        rows: range,
        n_vars: int,
        genes: tuple[Int64Array, bool] | None,
        first_id: int = 0,
    ) -> None:
        self._store, self._layout, self._rows = store, layout, rows
        self._genes, self._first_id = genes, first_id
        self._columns = store.columns(layout.path)
        self._known: tuple[int, Int64Array] | None = None  # first row and row pointers of the run of rows asked for last
        self._id_dtype = np.dtype(np.int32 if layout.n_vars <= 1 << 31 else np.int64)
        ends = self._bounds(rows[:1]), self._bounds(rows[-1:])
        self._first = int(ends[0][0][0]) if len(rows) else 0
        nnz = int(ends[1][0][0] + ends[1][1][0]) - self._first if len(rows) else 0
        assert layout.data is not None and layout.indices is not None
        self.header = MatrixHeader(
            key=layout.path,
            n_obs=len(rows),
            n_vars=n_vars,
            nnz=nnz,
            # what a file had as floats and the store has as integers comes as floats again
            dtype=value_dtype(layout) if layout.data_dtype.kind in "iu" else layout.data_dtype,
            index_dtype=self._id_dtype,
            chunk_bytes=max(layout.data.chunk_bytes, layout.indices.chunk_bytes),
        )

    def _bounds(self, rows: range) -> tuple[Int64Array, Int64Array]:
        return self._columns.bounds(np.arange(rows.start, rows.stop, dtype=np.int64))

    def indptr(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        pointers: Int64Array = np.empty(stop - start, np.int64)
        rows = self._rows[start : min(stop, len(self._rows))]
        if rows:
            starts, _ = self._bounds(rows)
            pointers[: len(rows)] = starts - self._first
        if len(rows) < stop - start:  # the pointer after the last row
            pointers[-1] = self.header.nnz
        self._known = (start, pointers)
        return pointers

    def elements(
        self, start: int, stop: int, out: tuple[npt.NDArray[Any], npt.NDArray[Any]] | None = None
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        if out is None:
            out = np.empty(stop - start, self.header.dtype), np.empty(stop - start, self.header.index_dtype)
        if stop == start:
            return out
        if self._genes is None:
            self._gather(start, stop, *out)
            if self._first_id:
                out[1][:] -= self._first_id
            self._check_ids(out[1])
            return out
        first_row, pointers = self._rows_of(start, stop)
        low, high = int(pointers[0]), int(pointers[-1])
        whole = out if (low, high) == (start, stop) else (np.empty(high - low, out[0].dtype), np.empty(high - low, out[1].dtype))
        self._gather(low, high, *whole)
        self._localize(first_row, pointers - low, *whole)
        if whole is not out:
            for target, found in zip(out, whole, strict=True):
                target[:] = found[start - low : stop - low]
        return out

    def _gather(self, start: int, stop: int, values: npt.NDArray[Any], ids: npt.NDArray[Any]) -> None:
        plan = plan_rows(np.array([self._first + start], np.int64), np.array([stop - start], np.int64))
        self._columns.gather(plan, values, ids)

    def _localize(self, first_row: int, pointers: Int64Array, values: npt.NDArray[Any], ids: npt.NDArray[Any]) -> None:
        """Ids of the store into ids of the source, in place, and the rows into the order they had there."""
        assert self._genes is not None
        local, rising = self._genes
        mapped, in_order = np.empty_like(ids), np.empty(len(pointers) - 1, np.bool_)
        outside = map_rows(ids, pointers, local, False, mapped, in_order)
        assert outside < 0, "the reader has checked that ids are genes of the store"
        ids[:] = mapped
        self._check_ids(ids)
        if rising:
            return
        unsorted = self._store.unsorted_rows(self._layout.path)
        first = self._rows.start + first_row
        low, high = np.searchsorted(unsorted, [first, first + len(in_order)])
        in_order[:] = True
        in_order[unsorted[low:high] - first] = False
        longest = int(np.diff(pointers).max())
        words = values.view(f"u{values.dtype.itemsize}")
        sort_rows(pointers, in_order, ids, words, np.empty(longest, ids.dtype), np.empty(longest, words.dtype))

    def _check_ids(self, ids: npt.NDArray[Any]) -> None:
        if ids.min() < 0 or ids.max() >= self.header.n_vars:
            what = "names cells of another source" if self._layout.path.startswith("obsp/") else "holds a gene its source has not"
            raise CorruptStoreError(f"{self._store.location}: {self._layout.path} {what} in rows of {self._rows}")

    def _rows_of(self, start: int, stop: int) -> tuple[int, Int64Array]:
        """The whole rows that hold elements [start, stop): the first row's number and their row pointers."""
        if self._known is not None:
            row, pointers = self._known
            if pointers[0] <= start and stop <= pointers[-1]:
                low = int(np.searchsorted(pointers, start, side="right")) - 1
                high = int(np.searchsorted(pointers, stop, side="left"))
                return row + low, pointers[low : high + 1]
        first, last = (
            row_of(self._columns, self._rows, self._first + element) - self._rows.start for element in (start, stop - 1)
        )
        return first, self.indptr(first, last + 2)
