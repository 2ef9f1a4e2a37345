"""Feature-barcode matrices of 10x Genomics as sources: the HDF5 files of Cell Ranger 3 and later, and of Cell Ranger 1 and 2.

::

    /matrix/{barcodes, data, indices, indptr, shape}      since 3: one matrix, and a table of features of several types
    /matrix/features/{id, name, feature_type, genome, ...}
    /GRCh38/{barcodes, genes, gene_names, data, ...}      before: one group, and one source, for each genome

What lies there by columns is features × barcodes, so it is CSR by cells and is read as H5AD files are.  The tables are those that
``scanpy.read_10x_h5`` gives.  Where features are selected by their type, the other values are passed over while reading::

    row of the file        g0 g1 a0 g2 │ g1 a0 a1 │ ...       features of two types
    row of the source      g0 g1    g2 │ g1       │ ...       ids renumbered, values of each row counted once in a process
"""

from __future__ import annotations

import os
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import numpy.typing as npt

from scdl_zarr.conversion.sources import MatrixHeader, MatrixReader, SourceSpec
from scdl_zarr.conversion.sources.counts import RowCounts, forget_counts, row_counts
from scdl_zarr.conversion.sources.h5ad import H5adMatrix, Hdf5Source, SparseParts, reading, refuse_undecodable
from scdl_zarr.conversion.sources.row_readers import WholeArray, WholeTable
from scdl_zarr.conversion.sources.rules import missing_matrix
from scdl_zarr.errors import SourceError
from scdl_zarr.storage.remote import RemoteObject
from scdl_zarr.storage.remote_file import RemoteFile

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["SelectedMatrix", "TenxSource", "feature_types_of", "hdf5_kind", "tenx_specs"]

GENE_EXPRESSION = "Gene Expression"  # the type of every feature of a file that has no types
MATRIX = "matrix"
PARTS = ("barcodes", "data", "indices", "indptr", "shape")
ENOUGH_PARTS = 3  # a group with as many is a matrix of 10x Genomics, if one that lost something
ANNDATA_ROOTS = ("X", "obs", "var")
RENAMED = ("id", "name", "gene_id", "feature_type", "_all_tag_keys")  # of the features: columns under other names, or none
FORMAT_ATTRIBUTES = ("filetype", "version")
COUNTED_ROWS = 1 << 16  # rows of a block of counts
LONGEST_ROW = (1 << 32) - 1
PIECE_VALUES = 1 << 17  # values that are selected from at a time


# ---- which files


def hdf5_kind(path: str | os.PathLike[str]) -> str | None:
    """ "tenx", "h5ad", "other" (HDF5 of another kind), or None for what cannot be opened as HDF5."""
    return _look_at(path)[0]


def tenx_specs(spec: SourceSpec) -> list[SourceSpec]:
    """The sources of a file that is of 10x Genomics by its content, one for each genome; none of another file."""
    if spec.remote is None:
        kind, groups = _look_at(spec.path)
    else:
        kind, groups = _look_at(RemoteFile(spec.remote, RemoteObject(key="", size=spec.size, version=spec.version)))
    if kind != "tenx":
        return []
    if len(groups) == 1:
        return [replace(spec, kind="tenx")]
    return [replace(spec, kind="tenx", part=part, name=f"{spec.name}/{group}") for part, group in enumerate(groups)]


def _look_at(path: str | os.PathLike[str] | RemoteFile) -> tuple[str | None, list[str]]:
    """The kind of a file, and its groups that are matrices.  What has a table of AnnData is H5AD, whatever lies beside it."""
    try:
        with h5py.File(path, "r", locking=None if isinstance(path, RemoteFile) else "best-effort") as file:
            if any(name in file for name in ANNDATA_ROOTS):
                return "h5ad", []
            groups = _matrix_groups(file)
            return ("tenx" if groups else "other"), groups
    except Exception:  # h5py has many errors for bytes that make no sense
        return None, []


def _matrix_groups(file: h5py.File) -> list[str]:
    """Names of the groups that are matrices: "matrix" alone, or all genomes, sorted."""
    found = [name for name in sorted(file) if isinstance(file.get(name), h5py.Group) and _is_matrix(file[name])]
    return [MATRIX] if MATRIX in found else found


def _is_matrix(group: h5py.Group) -> bool:
    return sum(name in group for name in PARTS) >= ENOUGH_PARTS


def feature_types_of(spec: SourceSpec) -> set[str]:
    """The types that a source's features have."""
    with TenxSource(replace(spec, feature_types=())) as source:
        return set(source.feature_types())


# ---- a source


class TenxSource(Hdf5Source):
    """An opened file, or one genome of it.  Use as a context manager, in one thread."""

    def __enter__(self) -> TenxSource:
        super().__enter__()
        try:
            self._open()
        except BaseException:
            self._file.close()
            raise
        return self

    def _open(self) -> None:
        with reading(self.spec.path, "the file"):
            self._groups = _matrix_groups(self._file)
            if self.spec.part >= len(self._groups):
                raise SourceError(f"{self.spec.path} changed while it was being converted: it has fewer matrices now")
            self._group = self._file[self._groups[self.spec.part]]
            self._where = f"{self.spec.path}: {self._group.name}"
            self._has_types = self._group.name == f"/{MATRIX}"
            if self._has_types and not isinstance(self._group.get("features"), h5py.Group):
                raise SourceError(f"{self._where} has no group features, the table of what was counted")
            shape = self._dataset("shape")
            if shape.shape != (2,) or shape.dtype.kind not in "iu":
                raise SourceError(f"{self.spec.path}: {shape.name} is no pair of numbers: features and barcodes")
            self._n_features, self._n_obs = (int(n) for n in shape[()])

    # ---- the matrix

    def matrices(self) -> dict[str, str]:
        return {"X": "csr"}

    def kind(self, key: str) -> str | None:
        return self.matrices().get(key)

    def matrix(self, key: str) -> MatrixReader:
        if key != "X":
            raise missing_matrix(self.spec.path, key, self.matrices())
        with reading(self.spec.path, str(self._group.name), "is not a readable matrix"):
            parts = {name: self._dataset(name) for name in ("data", "indices", "indptr")}
            self._require_length("indptr", self._n_obs + 1, f"{self._n_obs} barcodes")
            self._require_length("indices", len(parts["data"]), f"{len(parts['data'])} values")
            self._require_length("barcodes", self._n_obs, self._shown_shape)  # before as many rows are counted
            matrix = self._sparse(key, self._where, SparseParts(**parts, shape=(self._n_obs, self._n_features)))
        chosen = self._chosen()
        return matrix if chosen is None else SelectedMatrix(matrix, chosen, where=self._where, identity=(self.spec, key))

    # ---- tables and the rest

    def obs(self) -> pd.DataFrame:
        import pandas as pd

        barcodes = self._text("barcodes", self._n_obs)
        columns: dict[str, Any] = {}
        if isinstance(self._group.get("filtered_barcodes"), h5py.Dataset):
            columns["filtered_barcodes"] = self._values("filtered_barcodes", self._n_obs).astype(bool)
        if len(self._groups) > 1:  # which of the file's genomes these are the cells of
            genome = self._groups[self.spec.part]
            columns["genome"] = pd.Categorical.from_codes(np.zeros(self._n_obs, np.int8), categories=[genome])
        return pd.DataFrame(columns, index=pd.Index(barcodes))

    def obs_table(self) -> WholeTable:
        return WholeTable(self.obs())

    def var(self, key: str) -> pd.DataFrame:  # noqa: ARG002 (there is one matrix)
        import pandas as pd

        columns = self._feature_columns()
        frame = pd.DataFrame(columns, index=pd.Index(columns.pop("")))
        chosen = self._chosen()
        return frame if chosen is None else frame[chosen]

    def columns_left_out(self, key: str) -> list[str]:  # noqa: ARG002
        """What lies beside the matrix, under its HDF5 name: groups and datasets of the file, and the file's attributes."""
        with reading(self.spec.path, "the list of its elements"):
            found = [f"attributes/{name}" for name in self._file.attrs if name not in FORMAT_ATTRIBUTES]
            found += [name for name in self._file if name not in self._groups]
            own = {*PARTS, "filtered_barcodes", *(("features",) if self._has_types else ("genes", "gene_names"))}
            within = [(self._group, own)]
            if self._has_types:
                features = self._group["features"]
                within.append((features, {"_all_tag_keys", *(n for n in features if isinstance(features.get(n), h5py.Dataset))}))
            found += [f"{group.name}/{name}".lstrip("/") for group, taken in within for name in group if name not in taken]
        return sorted(found)

    def others(self) -> list[str]:
        return []

    def element(self, path: str) -> Any:
        raise SourceError(f"{self.spec.path} has no {path}: a file of 10x Genomics has a matrix, barcodes and features alone")

    def row_array(self, path: str) -> WholeArray:
        return WholeArray(self.spec.path, path, self.element(path))

    def provenance(self) -> None:
        return None

    def feature_types(self) -> npt.NDArray[Any]:
        """The type of every feature."""
        if not self._has_types:
            return np.full(len(self._text("genes", self._n_features)), GENE_EXPRESSION, object)
        return self._text("features/feature_type", self._n_features)

    # ---- inside

    def _chosen(self) -> npt.NDArray[np.bool_] | None:
        """Which features are taken; None: all."""
        if not self.spec.feature_types:
            return None
        types = self.feature_types().astype(str)
        missing = sorted({*self.spec.feature_types}.difference(types))
        if missing:
            raise SourceError(f"{self.spec.path} changed while it was being converted: no feature is of type {missing[0]!r} now")
        chosen: npt.NDArray[np.bool_] = np.isin(types, self.spec.feature_types)
        return chosen

    def _feature_columns(self) -> dict[str, Any]:
        """The columns of var in scanpy's order, its index under ""."""
        n = self._n_features
        if not self._has_types:
            return {"": self._text("gene_names", n), "gene_ids": self._text("genes", n)}
        features = self._group["features"]
        columns = {"": self._text("features/name", n)}
        if "gene_id" in features:  # a matrix of probes: several for a gene
            columns |= {"gene_ids": self._text("features/gene_id", n), "probe_ids": self._text("features/id", n)}
        else:
            columns["gene_ids"] = self._text("features/id", n)
        columns["feature_types"] = self.feature_types()
        for name in features:
            if name not in RENAMED and isinstance(features.get(name), h5py.Dataset):
                columns[name] = self._column(f"features/{name}", n)
        return columns

    def _column(self, name: str, length: int) -> npt.NDArray[Any]:
        """Flags as they are; anything else as text, as scanpy has it."""
        return self._values(name, length) if self._dataset(name).dtype.kind == "b" else self._text(name, length)

    def _values(self, name: str, length: int) -> npt.NDArray[Any]:
        dataset = self._dataset(name)
        self._require_length(name, length, self._shown_shape)
        with reading(self.spec.path, str(dataset.name)):
            refuse_undecodable(self.spec.path, dataset)
            return np.asarray(dataset[()])

    def _text(self, name: str, length: int) -> npt.NDArray[Any]:
        """A dataset of text as an object array."""
        dataset = self._dataset(name)
        if h5py.check_string_dtype(dataset.dtype) is None:
            return self._values(name, length).astype(str).astype(object)
        self._require_length(name, length, self._shown_shape)
        with reading(self.spec.path, str(dataset.name)):
            refuse_undecodable(self.spec.path, dataset)
            return np.asarray(dataset.asstr("utf-8")[()], object)

    def _dataset(self, name: str) -> h5py.Dataset:
        node = self._group.get(name)
        if not isinstance(node, h5py.Dataset):
            raise SourceError(f"{self._where} has no dataset {name}, which the matrix of a 10x Genomics file has")
        return node

    @property
    def _shown_shape(self) -> str:
        return f"a matrix of {self._n_features} features × {self._n_obs} barcodes"

    def _require_length(self, name: str, length: int, what: str) -> None:
        dataset = self._dataset(name)
        if dataset.shape != (length,):
            raise SourceError(f"{self.spec.path}: {dataset.name} has shape {dataset.shape}, expected ({length},) for {what}")


# ---- some of the features


@dataclass(slots=True, kw_only=True)
class _Position:
    """Where a range of selected values ended: the next one usually starts there."""

    selected: int
    stored: int


class SelectedMatrix:
    """The columns of a CSR matrix that were chosen, renumbered.  See :class:`scdl_zarr.conversion.sources.MatrixReader`.

    Like a dense matrix it is read whole, in pieces, by the first opening in a process, which counts what its rows keep.
    """

    def __init__(self, matrix: H5adMatrix, chosen: npt.NDArray[np.bool_], *, where: str, identity: Hashable) -> None:
        self._matrix, self._where, self._identity = matrix, where, identity
        self._numbers = np.where(chosen, np.cumsum(chosen) - 1, -1).astype(np.int32)
        self._counts = row_counts(identity, where, lambda counts: len(counts.counts) == matrix.header.n_obs, self._count)
        self._reached: _Position | None = None
        whole = matrix.header
        piece = PIECE_VALUES * (whole.dtype.itemsize + whole.index_dtype.itemsize + 4 + 8)  # and new ids, and positions
        self.header = MatrixHeader(
            key=whole.key,
            n_obs=whole.n_obs,
            n_vars=int(chosen.sum()),
            nnz=self._counts.total,
            dtype=whole.dtype,
            index_dtype=np.dtype(np.int32),
            layout="selected",
            chunk_bytes=whole.chunk_bytes + -(-piece // 4),  # plans count four of these a task
            counted_bytes=self._counts.nbytes,
        )

    def indptr(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        return self._counts.pointers(start, stop)

    def elements(
        self, start: int, stop: int, out: tuple[npt.NDArray[Any], npt.NDArray[Any]] | None = None
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        if out is None:
            n = max(stop - start, 0)
            out = np.empty(n, self.header.dtype), np.empty(n, np.int32)
        if start >= stop:
            return out
        position = self._before(start)
        while position.selected < stop:
            position = self._take(position, start, out)
        self._reached = position
        return out

    def _take(self, position: _Position, start: int, out: tuple[npt.NDArray[Any], npt.NDArray[Any]]) -> _Position:
        """Read the piece at a position and put what is chosen of it where it belongs; the position after that."""
        low, high = position.stored, min(position.stored + PIECE_VALUES, self._matrix.header.nnz)
        if low >= high:
            forget_counts(self._identity)
            raise SourceError(f"{self._where} changed while it was being converted; run again when nothing writes it")
        values, ids = self._matrix.elements(low, high)
        numbers = self._numbers[self._checked(ids, low)]
        kept = np.flatnonzero(numbers >= 0)[: start + len(out[0]) - position.selected]
        skipped = min(max(start - position.selected, 0), len(kept))
        wanted = kept[skipped:]
        first = position.selected + skipped - start
        out[0][first : first + len(wanted)] = values[wanted]
        out[1][first : first + len(wanted)] = numbers[wanted]
        done = position.selected + len(kept)
        return _Position(selected=done, stored=low + int(kept[-1]) + 1 if done == start + len(out[0]) else high)

    def _before(self, start: int) -> _Position:
        """Where to read on for the selected value `start`: where the last range ended, or at the start of its row."""
        if self._reached is not None and self._reached.selected == start:
            return self._reached
        block = int(np.searchsorted(self._counts.starts, start, side="right")) - 1
        row = block * self._counts.height
        pointers = self.indptr(row, min(row + self._counts.height, self.header.n_obs) + 1)
        row += (within := int(np.searchsorted(pointers, start, side="right")) - 1)
        return _Position(selected=int(pointers[within]), stored=int(self._matrix.indptr(row, row + 1)[0]))

    def _checked(self, ids: npt.NDArray[Any], first: int) -> npt.NDArray[Any]:
        """The ids, which are addresses from here on."""
        if len(ids) and (ids.min() < 0 or ids.max() >= len(self._numbers)):
            bad = int(np.argmax((ids < 0) | (ids >= len(self._numbers))))
            raise SourceError(
                f"{self._where}/indices names feature {ids[bad]} at element {first + bad}, there are {len(self._numbers)}"
            )
        return ids

    def _count(self) -> RowCounts:
        n_obs = self._matrix.header.n_obs
        counts = np.zeros(n_obs, np.uint32)
        last = 0
        for row in range(0, n_obs, COUNTED_ROWS):
            pointers = self._matrix.indptr(row, min(row + COUNTED_ROWS, n_obs) + 1)
            self._check_pointers(pointers, row, last)
            last = int(pointers[-1])
            found = self._kept_of_rows(pointers)
            if found.max(initial=0) > np.iinfo(np.uint32).max:
                raise SourceError(
                    f"{self._where} has a row of {found.max()} values; rows of up to {np.iinfo(np.uint32).max} can be"
                )
            counts[row : row + len(found)] = found
        if last != self._matrix.header.nnz:
            raise SourceError(f"{self._where}/indptr ends at {last}, but there are {self._matrix.header.nnz} stored values")
        return RowCounts.of(counts, COUNTED_ROWS)

    def _check_pointers(self, pointers: npt.NDArray[np.int64], row: int, last: int) -> None:
        if pointers[0] != last:
            raise SourceError(f"{self._where}/indptr has {pointers[0]} at row {row}, expected {last}")
        if (pointers[1:] < pointers[:-1]).any():
            bad = row + int(np.argmax(pointers[1:] < pointers[:-1]))
            raise SourceError(f"{self._where}/indptr runs backwards at row {bad}")
        if pointers[-1] > self._matrix.header.nnz:
            raise SourceError(
                f"{self._where}/indptr reaches {pointers[-1]}, but there are {self._matrix.header.nnz} stored values"
            )

    def _kept_of_rows(self, pointers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """How many chosen values each row of a block has; rows may be cut by the pieces that are read."""
        found: npt.NDArray[np.int64] = np.zeros(len(pointers) - 1, np.int64)
        for low in range(int(pointers[0]), int(pointers[-1]), PIECE_VALUES):
            high = min(low + PIECE_VALUES, int(pointers[-1]))
            kept = self._numbers[self._checked(self._matrix.ids(low, high), low)] >= 0
            before = np.concatenate([[0], np.cumsum(kept)])  # chosen values before each element of the piece
            first, stop = np.searchsorted(pointers, [low, high], side="right") - [1, 0]
            rows = slice(int(first), min(int(stop), len(found)))
            inside = np.clip(pointers[rows.start : rows.stop + 1], low, high) - low
            found[rows] += np.diff(before[inside])
        return found
