"""BioNeMo-SCDL archives as sources, so that nobody has to go back to the H5AD files.

An archive that was joined from files with different genes is as many sources as it has runs of rows with one table of genes, so
that each keeps its own::

    rows of the archive   0 ───────── 400 ────────────── 1000
    var_features          table 0      table 1                     source "97e_scdl/a.h5ad", source "97e_scdl/b.h5ad"
    obs_features          table 0 ───────── 700 ── table 1         cut to the rows of each source
    neighbours            rows 0 to 399                            BioNeMo-SCDL keeps those of the first file alone

Files are read by ranges, never mapped (one that is cut off meanwhile would kill the process) and never written.  Neighbours are
offered as ``obsp/next_cell_ids``.
"""

from __future__ import annotations

from bisect import bisect_right
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.conversion.sources import MatrixHeader, SourceSpec
from scdl_zarr.conversion.sources.row_readers import WholeArray, WholeTable
from scdl_zarr.conversion.sources.scdl_layout import COLPTR, DATA, PROBE_VALUES, ROWPTR, check_values, read_layout
from scdl_zarr.conversion.sources.scdl_tables import TableFolder, last_part
from scdl_zarr.errors import SourceError, StoreAccessError, StoreNotFoundError
from scdl_zarr.storage.scdl_archive import ARRAY_FILES, NEIGHBOR_DTYPES, archive_kind, archives_in

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["NEIGHBORS", "ScdlMatrix", "ScdlSource", "archive_specs"]

NEIGHBORS = "obsp/next_cell_ids"  # named after SCDL's default neighbor_key; which one was used is not kept
NOT_KEPT = "BioNeMo-SCDL did not keep them"


def archive_specs(path: Path, name: str) -> list[SourceSpec]:
    """The sources of an archive, one for each run of rows with one table of genes, or of all archives in a folder."""
    if archive_kind(path) == "collection":
        return [spec for archive in archives_in(path) for spec in archive_specs(archive, f"{name}/{archive.name}")]
    layout = read_layout(path)
    if not len(layout.var):
        raise SourceError(f"{path} has no cells")
    specs = []
    for part, own in enumerate(_part_names(layout.var, name)):
        size, changed = _state(path, layout.var, part)
        specs.append(SourceSpec(path=str(path), name=own, size=size, mtime_ns=changed, kind="scdl", part=part))
    return specs


def _part_names(var: TableFolder, name: str) -> list[str]:
    """After the files that the parts came from, where the archive says so and they differ."""
    if len(var) == 1:
        return [name]
    files = [last_part(label) for label in var.labels() or []]
    if not all(files) or len(set(files)) < len(var):
        files = [str(part) for part in range(len(var))]
    return [f"{name}/{file}" for file in files]


def _state(path: Path, var: TableFolder, part: int) -> tuple[int, int]:
    """Size and time of change of what a source is read from, as one number each."""
    files = [path / name for name in (*ARRAY_FILES.values(), *NEIGHBOR_DTYPES, "header.sch", "metadata.json")]
    files += [path / "obs_features" / "cumulative_sum_index.npy", var.folder / "cumulative_sum_index.npy", var.path(part)]
    size = changed = 0
    for file in files:
        try:
            status = file.stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        size, changed = size + status.st_size, changed + status.st_mtime_ns
    return size, changed % 2**63


class ScdlSource:
    """An opened archive, or the part of one that has one table of genes.  Use as a context manager, in one thread."""

    def __init__(self, spec: SourceSpec) -> None:
        self.spec = spec
        self._path = Path(spec.path)
        self._files: list[FileIO] = []

    def __enter__(self) -> ScdlSource:
        try:
            self._layout = read_layout(self._path)
        except PermissionError as error:
            raise StoreAccessError(f"{self._path} cannot be read: {error.strerror}") from None
        if self.spec.part >= len(self._layout.var):
            raise SourceError(f"{self._path} changed while it was being converted: it has fewer parts now")
        self.row_start, self.row_stop = self._layout.var.run(self.spec.part)
        self._check_unchanged()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in self._files:
            file.close()
        if kind is None or issubclass(kind, SourceError):
            self._check_unchanged()

    def _check_unchanged(self) -> None:
        if _state(self._path, self._layout.var, self.spec.part) != (self.spec.size, self.spec.mtime_ns):
            raise SourceError(f"{self._path} changed while it was being converted; run again when nothing writes it")

    # ---- matrices

    def matrices(self) -> dict[str, str]:
        return {"X": "csr"}

    def kind(self, key: str) -> str | None:
        return "csr" if key == "X" or key in self.others() else None

    def matrix(self, key: str) -> ScdlMatrix:
        if self.kind(key) is None:
            offered = ", ".join(["X", *self.others()])
            raise SourceError(f"{self._path} has no matrix {key}; a BioNeMo-SCDL archive has one matrix, this one has: {offered}")
        return self._neighbors() if key == NEIGHBORS else self._counts()

    def _counts(self) -> ScdlMatrix:
        layout = self._layout
        pointers = _Pointers(self._open(ROWPTR), layout.dtypes[ROWPTR], layout.n_rows, layout.n_values)
        matrix = ScdlMatrix(
            key="X",
            where=f"{self._path}: X",
            rows=(self.row_start, self.row_stop),
            pointers=pointers,
            values=(self._open(DATA), layout.dtypes[DATA]),
            ids=(self._open(COLPTR), layout.dtypes[COLPTR]),
            id_range=(0, layout.var.columns(self.spec.part)[0]),
        )
        n = min(matrix.header.nnz, PROBE_VALUES)
        check_values(matrix.elements(0, n)[0], str(layout.file(DATA)))
        return matrix

    def _neighbors(self) -> ScdlMatrix:
        layout = self._layout
        values, ids, pointers = (self._open(name) for name in NEIGHBOR_DTYPES)
        covered = layout.neighbor_rows or 0
        return ScdlMatrix(
            key=NEIGHBORS,
            where=f"{self._path}: {NEIGHBORS}",
            rows=(self.row_start, self.row_stop),
            pointers=_Pointers(pointers, layout.dtypes["neighbor_indptr.npy"], covered, layout.n_neighbors),
            values=(values, layout.dtypes["neighbor_values.npy"]),
            ids=(ids, layout.dtypes["neighbor_indices.npy"]),
            id_range=(self.row_start, self.row_stop),
        )

    def _open(self, name: str) -> FileIO:
        try:
            file = FileIO(self._layout.file(name))
        except FileNotFoundError:
            raise StoreNotFoundError(f"{self._layout.file(name)} is gone") from None
        self._files.append(file)
        return file

    # ---- tables and the rest

    def obs(self) -> pd.DataFrame:
        obs = self._layout.obs
        if obs is not None:
            return obs.rows(self.row_start, self.row_stop)
        import pandas as pd

        return pd.DataFrame(index=pd.Index([str(row) for row in range(self.row_start, self.row_stop)], dtype=object))

    def obs_table(self) -> WholeTable:
        return WholeTable(self.obs())

    def var(self, key: str) -> pd.DataFrame:  # noqa: ARG002
        return self._layout.var.table(self.spec.part)

    def columns_left_out(self, key: str) -> list[str]:  # noqa: ARG002
        """What SCDL had lost before."""
        obs, var = self._layout.obs, self._layout.var
        lost = []
        if not var.columns(self.spec.part)[2]:
            lost.append(f"var_names ({NOT_KEPT})")
        if obs is None:
            lost.append(f"obs ({NOT_KEPT})")
        elif not obs.is_named(self.row_start, self.row_stop):
            lost.append(f"obs_names ({NOT_KEPT})")
        covered = self._layout.neighbor_rows
        if covered is not None and covered < self._layout.n_rows:
            lost.append(f"neighbours of the rows from {covered} on (BioNeMo-SCDL lost them when it joined archives)")
        return lost

    def others(self) -> list[str]:
        return [] if self._layout.neighbor_rows is None else [NEIGHBORS]

    def provenance(self) -> None:
        return None

    def row_array(self, path: str) -> WholeArray:
        return WholeArray(self.spec.path, path, self.element(path))

    def element(self, path: str) -> Any:
        raise SourceError(f"{self._path} has no {path}; a BioNeMo-SCDL archive has obs, var, one matrix and neighbours")


class _Pointers:
    """The row pointers of all rows of an archive; rows that they do not reach have nothing."""

    def __init__(self, file: FileIO, dtype: np.dtype[Any], n_rows: int, n_values: int) -> None:
        self._file, self._dtype, self._n_rows, self.n_values = file, dtype, n_rows, n_values

    def read(self, start: int, stop: int, where: str) -> npt.NDArray[np.int64]:
        """Pointers [start, stop), each within the values."""
        found = np.full(stop - start, self.n_values, np.uint64)
        there = max(min(stop, self._n_rows + 1) - start, 0)
        if there:
            stored = np.empty(there, self._dtype)
            _read_into(self._file, stored, start, where)
            found[:there] = stored
        if len(found) and found.max() > self.n_values:
            raise SourceError(f"{where} has a row pointer {found.max()}, but {self.n_values} stored values")
        return found.astype(np.int64)

    def at(self, row: int, where: str) -> int:
        return int(self.read(row, row + 1, where)[0])


class ScdlMatrix:
    """A CSR matrix of a run of rows: the values, or the neighbours with ids counted from the run's first row."""

    def __init__(
        self,
        *,
        key: str,
        where: str,
        rows: tuple[int, int],
        pointers: _Pointers,
        values: tuple[FileIO, np.dtype[Any]],
        ids: tuple[FileIO, np.dtype[Any]],
        id_range: tuple[int, int],
    ) -> None:
        self._where, self._rows, self._pointers = where, rows, pointers
        self._values, self._ids, self._id_range = values, ids, id_range
        self._first, last = (pointers.at(row, where) for row in rows)
        if last < self._first:
            raise SourceError(f"{where} has row pointers that run backwards between rows {rows[0]} and {rows[1]}")
        self.header = MatrixHeader(
            key=key,
            n_obs=rows[1] - rows[0],
            n_vars=id_range[1] - id_range[0],
            nnz=last - self._first,
            dtype=values[1],
            index_dtype=ids[1],
            chunk_bytes=0,
        )

    def indptr(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        return self._pointers.read(self._rows[0] + start, self._rows[0] + stop, self._where) - self._first

    def elements(
        self, start: int, stop: int, out: tuple[npt.NDArray[Any], npt.NDArray[Any]] | None = None
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        if not 0 <= start <= stop <= self.header.nnz:
            raise SourceError(f"{self._where} has {self.header.nnz} stored values, {start} to {stop} were asked for")
        values, ids = out or (np.empty(stop - start, self._values[1]), np.empty(stop - start, self._ids[1]))
        _read_into(self._values[0], values, self._first + start, self._where)
        _read_into(self._ids[0], ids, self._first + start, self._where)
        low, high = self._id_range
        if len(ids) and (int(ids.max()) >= high or int(ids.min()) < low):
            self._refuse(ids, self._first + start)
        if low:
            ids -= ids.dtype.type(low)
        return values, ids

    def _refuse(self, ids: npt.NDArray[Any], first: int) -> None:
        """Say which id is outside, and why that happens."""
        low, high = self._id_range
        at = int(np.argmax((ids >= high) | (ids < low)))
        rows = range(*self._rows)
        row = rows[bisect_right(rows, first + at, key=lambda r: self._pointers.at(r, self._where)) - 1]
        if self.header.key == NEIGHBORS:
            raise SourceError(
                f"{self._where}: row {row} has neighbour {ids[at]}, outside the rows {low} to {high - 1} that share its table of "
                "genes; such neighbours cannot be converted, leave them out of obsp= (--obsp)"
            )
        if not high:
            raise SourceError(f"{self._where} has values, but its table of genes is empty: BioNeMo-SCDL kept none of them")
        raise SourceError(
            f"{self._where}: row {row} has gene id {ids[at]}, but its table lists {high} genes. BioNeMo-SCDL takes the table of "
            "var where it takes the values of raw.X, which may have other genes; convert the H5AD file instead"
        )


def _read_into(file: FileIO, out: npt.NDArray[Any], start: int, where: str) -> None:
    """Fill `out` from entry `start` of a file on."""
    room = memoryview(out.view(np.uint8))  # type: ignore[arg-type]
    file.seek(start * out.itemsize)
    while room:
        n = file.readinto(room)
        if not n:
            raise SourceError(f"{where}: {file.name} was cut off while it was being converted")
        room = room[n:]
