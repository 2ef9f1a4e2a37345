"""What an archive of BioNeMo-SCDL holds, checked: rows, values, dtypes, runs of rows with one table of genes.

SCDL checks none of its numbers when it opens an archive, and writes some of them late, so that several of its own faults leave
archives that open and read as something else.  Here every number is held against the files before it becomes a length or an
address: what does not add up is a :class:`SourceError` that says which fault it looks like.

::

    rows            var_features' index  =  row pointers - 1  (and no fewer than metadata.json says: joining does not update it)
    stored values   last row pointer     =  entries of data.npy  =  entries of col_ptr.npy
    dtypes          header.sch; without it dtypes.json (0.0.x); without that float32 values, and ids as wide as the files are
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.conversion.sources.scdl_tables import TableFolder, read_document
from scdl_zarr.errors import SourceError
from scdl_zarr.storage.scdl_archive import (
    ARRAY_FILES,
    NEIGHBOR_DTYPES,
    VALUE_DTYPES,
    ArchiveHeader,
    archive_kind,
    parse_header,
)

__all__ = ["ArchiveLayout", "COLPTR", "DATA", "PROBE_VALUES", "ROWPTR", "check_values", "read_layout", "read_values"]

DATA, ROWPTR, COLPTR = ARRAY_FILES["DATA"], ARRAY_FILES["ROWPTR"], ARRAY_FILES["COLPTR"]
LARGEST_HEADER = 64 << 20
PROBE_VALUES = 4096
ENOUGH_VALUES = 8  # that all look like numbers of another kind, before it is no accident
UNSIGNED = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint64"}


@dataclass(frozen=True, kw_only=True)
class ArchiveLayout:
    """An archive whose numbers add up."""

    path: Path
    n_rows: int
    n_values: int
    dtypes: dict[str, np.dtype[Any]]  # by file name
    header: ArchiveHeader | None
    var: TableFolder
    obs: TableFolder | None  # None where SCDL kept nothing of the cells
    neighbor_rows: int | None  # rows that the neighbours cover, from the first on; None without neighbours
    n_neighbors: int

    def file(self, name: str) -> Path:
        return self.path / name


def read_layout(path: Path) -> ArchiveLayout:
    """Look at an archive: small documents, sizes of files, the first and the last row pointer.

    Raises
    ------
    SourceError
        Something is missing, or two numbers contradict each other.
    """
    _require_whole(path)
    var = TableFolder(_var_folder(path))
    _check_metadata(path, var.n_rows)
    header = _header(path)
    dtypes = _dtypes(path, header, var.n_rows)
    n_values = _check_arrays(path, dtypes, var.n_rows, header)
    covered, n_neighbors = _neighbors(path, var.n_rows)
    return ArchiveLayout(
        path=path,
        n_rows=var.n_rows,
        n_values=n_values,
        dtypes=dtypes | {name: np.dtype(dtype) for name, dtype in NEIGHBOR_DTYPES.items()},
        header=header,
        var=var,
        obs=_obs(path, var.n_rows),
        neighbor_rows=covered,
        n_neighbors=n_neighbors,
    )


def read_values(path: Path, dtype: np.dtype[Any], start: int, stop: int) -> npt.NDArray[Any]:
    """Entries [start, stop) of a file of bare values; fewer where it is shorter."""
    with open(path, "rb") as file:
        file.seek(start * dtype.itemsize)
        return np.frombuffer(file.read((stop - start) * dtype.itemsize), dtype)


# ---- what must be there


def _require_whole(path: Path) -> None:
    left = sorted(entry.name for entry in path.glob("*.npy.tmp"))
    if left:
        name = left[0].removesuffix(".tmp")
        raise SourceError(
            f"{path} holds {left[0]}: changing the dtype of {name} did not finish, and {name} lost its values. "
            f"{left[0]} has them, in the dtype of header.sch: rename it to {name} in a copy of the archive"
        )
    missing = [name for name in (*ARRAY_FILES.values(), "metadata.json") if not (path / name).is_file()]
    if missing:
        what = "an archive that was not finished, or an empty collection" if archive_kind(path) == "unfinished" else "not whole"
        raise SourceError(f"{path} is {what}: it has no {', '.join(missing)}; make it again from its H5AD files")


def _var_folder(path: Path) -> Path:
    for name in ("var_features", "features"):
        if (path / name).is_dir():
            return path / name
    raise SourceError(f"{path} has neither var_features nor features: without tables of its genes it cannot be converted")


def _check_metadata(path: Path, n_rows: int) -> None:
    found = read_document(path / "metadata.json")
    said = found.get("num_rows") if isinstance(found, dict) else None
    if type(said) is not int or not 0 <= said <= n_rows:
        raise SourceError(f"{path}: metadata.json has num_rows {said!r}, the tables of its genes cover {n_rows} rows")


def _obs(path: Path, n_rows: int) -> TableFolder | None:
    folder = path / "obs_features"
    obs = TableFolder(folder) if folder.is_dir() else None
    if obs is None or not len(obs):
        return None
    if obs.n_rows != n_rows:
        raise SourceError(f"{path}: the tables of its cells cover {obs.n_rows} rows, those of its genes {n_rows}")
    return obs


# ---- dtypes


def _header(path: Path) -> ArchiveHeader | None:
    where = path / "header.sch"
    try:
        if where.stat().st_size > LARGEST_HEADER:
            raise SourceError(f"{where} has {where.stat().st_size} bytes, more than any header")
        return parse_header(where.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SourceError(f"{where} cannot be read: {error.strerror}") from error
    except ValueError as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(
            f"{where} {error}. Without a header, values are taken for float32; if these are, remove header.sch from a copy"
        ) from error


def _dtypes(path: Path, header: ArchiveHeader | None, n_rows: int) -> dict[str, np.dtype[Any]]:
    if header is not None:
        found = {name: np.dtype(dtype) for name, (dtype, _) in header.arrays.items()}
    elif (path / "dtypes.json").is_file():
        found = _dtypes_document(path / "dtypes.json")
    else:
        found = _guessed_dtypes(path, n_rows)
    for name in (ROWPTR, COLPTR):
        if found[name].kind != "u":
            raise SourceError(f"{path}: {name} is said to hold {found[name]}, expected unsigned integers")
    return found


def _dtypes_document(where: Path) -> dict[str, np.dtype[Any]]:
    found = read_document(where)
    names = {name: found.get(name) if isinstance(found, dict) else None for name in ARRAY_FILES.values()}
    wrong = [f"{name}: {dtype!r}" for name, dtype in names.items() if dtype not in VALUE_DTYPES]
    if wrong:
        raise SourceError(f"{where} has {', '.join(wrong)}; expected one of {', '.join(VALUE_DTYPES)}")
    return {name: np.dtype(dtype) for name, dtype in names.items()}


def _guessed_dtypes(path: Path, n_rows: int) -> dict[str, np.dtype[Any]]:
    """Without a header SCDL reads values as float32; the files' sizes say how wide the others are."""
    size = {name: _size(path / name) for name in ARRAY_FILES.values()}
    pointer = UNSIGNED.get(size[ROWPTR] // (n_rows + 1)) if size[ROWPTR] % (n_rows + 1) == 0 else None
    if pointer is None:
        raise SourceError(f"{path}: row_ptr.npy has {size[ROWPTR]} bytes, which are not the pointers of {n_rows} rows")
    last = read_values(path / ROWPTR, np.dtype(pointer), n_rows, n_rows + 1)
    n_values = int(last[0]) if len(last) else 0
    ids = UNSIGNED.get(size[COLPTR] // n_values) if n_values and size[COLPTR] % n_values == 0 else "uint32"
    return {DATA: np.dtype("float32"), ROWPTR: np.dtype(pointer), COLPTR: np.dtype(ids or "uint32")}


# ---- lengths


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from error


def _check_arrays(path: Path, dtypes: dict[str, np.dtype[Any]], n_rows: int, header: ArchiveHeader | None) -> int:
    """The number of stored values, if row pointers, values and ids agree on it."""
    _check_size(path / ROWPTR, dtypes[ROWPTR], n_rows + 1, f"the row pointers of {n_rows} rows", header)
    first, last = (int(read_values(path / ROWPTR, dtypes[ROWPTR], at, at + 1)[0]) for at in (0, n_rows))
    if first != 0:
        raise SourceError(f"{path}: row_ptr.npy starts at {first}, expected 0")
    for name in (DATA, COLPTR):
        _check_size(path / name, dtypes[name], last, f"the {last} stored values that row_ptr.npy announces", header)
    return last


def _check_size(path: Path, dtype: np.dtype[Any], count: int, what: str, header: ArchiveHeader | None) -> None:
    size = _size(path)
    if size == count * dtype.itemsize:
        return
    text = f"{path} has {size} bytes; {what} take {count * dtype.itemsize} in {dtype}"
    width = size // count if count and size % count == 0 else None
    if header is not None and width in (1, 2, 4, 8):
        raise SourceError(
            f"{text}, the dtype in header.sch. It holds {8 * width}-bit numbers, so the header is older than the file: "
            "BioNeMo-SCDL writes the old one back where an archive is cast or joined after it was opened. Make the archive again"
        )
    if header is None and path.name == DATA and width in (1, 2, 8):
        raise SourceError(f"{text}, and without header.sch nothing says which dtype its {8 * width}-bit numbers have")
    fault = "it was cut off, or the archive was left in the middle of being written"
    if size > count * dtype.itemsize:
        fault = "the row pointers do not know of all; joining archives did not finish, or a version before 0.1 did it wrongly"
    raise SourceError(f"{text}: {fault}. Make the archive again from its H5AD files")


def _neighbors(path: Path, n_rows: int) -> tuple[int | None, int]:
    """Rows that neighbours cover, and how many there are."""
    there = [name for name in NEIGHBOR_DTYPES if (path / name).is_file()]
    if not there:
        return None, 0
    missing = sorted(set(NEIGHBOR_DTYPES) - set(there))
    if missing:
        raise SourceError(f"{path} has {', '.join(there)} without {', '.join(missing)}: its neighbours are not whole")
    sizes = {name: divmod(_size(path / name), np.dtype(dtype).itemsize) for name, dtype in NEIGHBOR_DTYPES.items()}
    counts = {name: count for name, (count, _) in sizes.items()}
    odd = [name for name, (_, rest) in sizes.items() if rest]
    pointers = counts["neighbor_indptr.npy"]
    if odd or not 1 <= pointers <= n_rows + 1 or counts["neighbor_indices.npy"] != counts["neighbor_values.npy"]:
        shown = ", ".join(f"{count} in {name}" for name, count in counts.items())
        raise SourceError(f"{path}: its neighbours contradict each other or its {n_rows} rows: entries are {shown}")
    first, last = (int(read_values(path / "neighbor_indptr.npy", np.dtype("uint64"), at, at + 1)[0]) for at in (0, pointers - 1))
    if first != 0 or last != counts["neighbor_indices.npy"]:
        raise SourceError(
            f"{path}: neighbor_indptr.npy goes from {first} to {last}, neighbor_indices.npy has {counts['neighbor_indices.npy']}"
        )
    return pointers - 1, last


def check_values(values: npt.NDArray[Any], where: str) -> None:
    """Refuse values that are clearly of another dtype of the same width than the header says.

    BioNeMo-SCDL leaves such archives where one is opened and then cast: the header keeps the dtype from before.  Counts read as
    floats are tiny (1 is 1.4e-45); floats read as integers are huge, and counts among them have only zeros in their low bits.
    """
    stored = values[values != 0]
    width = values.dtype.itemsize
    if len(stored) < ENOUGH_VALUES or width == 1:
        return
    if values.dtype.kind == "f":
        other, fault = f"uint{8 * width}", bool((np.abs(stored) < np.finfo(values.dtype).tiny).all())
    else:
        other = f"float{8 * width}"
        floats = stored.view(other)
        fault = bool((np.isfinite(floats) & (floats >= 1) & (floats == np.floor(floats))).all())
        if width > 2:
            fault |= bool(((np.abs(floats) > 1e-9) & (np.abs(floats) < 1e9)).all())
    if fault:
        raise SourceError(
            f"{where} is said to hold {values.dtype}, but values such as {stored[0]} look like {other}: BioNeMo-SCDL leaves the "
            "old header behind where an archive is cast after it was opened. Make the archive again from its H5AD files"
        )
