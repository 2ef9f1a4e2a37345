"""What a BioNeMo-SCDL archive looks like on disk: file names, dtypes, and the binary header.

::

    data.npy  col_ptr.npy  row_ptr.npy                     CSR; bare values, despite the name (no .npy header)
    neighbor_values.npy  _indices.npy  _indptr.npy         CSR over the archive's rows, where neighbours were loaded
    header.sch                                             dtypes and lengths of the first three (packages from 0.1 on)
    metadata.json  version.json                            rows of the first file, package that wrote it
    var_features/  obs_features/                           tables, one Parquet file for each run of rows (features/ before 0.1)

Nothing here reads more than one small document.  What the numbers in it must agree with is for whoever reads the arrays.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "ARRAY_FILES",
    "ArchiveHeader",
    "NEIGHBOR_DTYPES",
    "VALUE_DTYPES",
    "archive_advice",
    "archive_kind",
    "archives_in",
    "parse_header",
]

ARRAY_FILES = {"DATA": "data.npy", "ROWPTR": "row_ptr.npy", "COLPTR": "col_ptr.npy"}  # by their names in the header
NEIGHBOR_DTYPES = {"neighbor_values.npy": "float32", "neighbor_indices.npy": "uint32", "neighbor_indptr.npy": "uint64"}
VALUE_DTYPES = ("uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64")  # codes 1 to 7
MAGIC = b"SCDL"
NETWORK_ORDER, MEMMAP_BACKEND = 1, 1
LONGEST_NAME = 4096
MARKS = ("header.sch", "row_ptr.npy", "col_ptr.npy")


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchiveHeader:
    """What ``header.sch`` says: the schema's version, and the dtype and length of arrays by file name."""

    version: tuple[int, int, int]
    arrays: dict[str, tuple[str, int]]


def parse_header(document: bytes) -> ArchiveHeader:
    """Read the part of a header that describes the arrays (big endian, whatever the machine).

    Raises
    ------
    ValueError
        Its text completes "header.sch ...".
    """
    reader = _Fields(document)
    magic = reader.take(4)
    if magic != MAGIC:
        raise ValueError(f"starts with {magic!r}, expected {MAGIC!r}")
    major, minor, point, order = reader.numbers("BBBB")
    backend, n_arrays = reader.numbers("II")
    if major > 0:
        raise ValueError(f"has schema version {major}.{minor}.{point}; versions 0.x are known")
    if (order, backend) != (NETWORK_ORDER, MEMMAP_BACKEND):
        raise ValueError(f"has byte order {order} and backend {backend}; 1 and 1 (whole arrays) are known")
    arrays = {}
    for _ in range(n_arrays):  # a count that is too large ends at the end of the document
        name = reader.text()
        length, code, has_shape = reader.numbers("QIB")
        if has_shape:
            (dimensions,) = reader.numbers("I")
            reader.take(4 * dimensions)
        if name in ARRAY_FILES:
            if not 1 <= code <= len(VALUE_DTYPES):
                raise ValueError(f"gives {ARRAY_FILES[name]} the dtype {code}, which is none of numbers")
            arrays[ARRAY_FILES[name]] = (VALUE_DTYPES[code - 1], length)
    missing = set(ARRAY_FILES.values()) - set(arrays)
    if missing:
        raise ValueError(f"does not describe {', '.join(sorted(missing))}")
    return ArchiveHeader(version=(major, minor, point), arrays=arrays)


class _Fields:
    """Reads fields one after another, never past the end."""

    def __init__(self, document: bytes) -> None:
        self._document, self._at = document, 0

    def take(self, n: int) -> bytes:
        if n > len(self._document) - self._at:
            raise ValueError(f"ends after {len(self._document)} bytes, in the middle of a field")
        self._at += n
        return self._document[self._at - n : self._at]

    def numbers(self, layout: str) -> tuple[int, ...]:
        layout = f">{layout}"
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def text(self) -> str:
        (length,) = self.numbers("I")
        if not 0 < length <= LONGEST_NAME:
            raise ValueError(f"has a name of {length} bytes")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise ValueError("has a name that is not text") from None


def archive_kind(path: Path) -> str | None:
    """ "archive", "collection" (a folder of archives), "unfinished" (what a failed conversion leaves), or None."""
    if _is_marked(path):
        return "archive"
    if not os.path.isdir(path) or os.path.exists(path / "zarr.json"):
        return None
    if archives_in(path):
        return "collection"
    return "unfinished" if os.path.isfile(path / "version.json") else None


def _is_marked(path: Path) -> bool:
    return any(os.path.isfile(path / name) for name in MARKS)  # false, not an error, where that may not be asked


def archives_in(path: Path) -> list[Path]:
    """The archives that lie directly in a folder, whole or not, by name; none where no folder there has a whole one's files."""
    try:
        folders = sorted(entry for entry in path.iterdir() if os.path.isdir(entry) and not entry.name.startswith("."))
    except OSError:
        return []
    marked = {folder for folder in folders if _is_marked(folder)}
    return [folder for folder in folders if folder in marked or os.path.isfile(folder / "version.json")] if marked else []


def archive_advice(path: Path) -> str | None:
    """What to say to whoever opens a BioNeMo-SCDL archive as a store; None where it is none."""
    kind = archive_kind(path)
    if kind not in ("archive", "collection"):
        return None
    what = "is a BioNeMo-SCDL archive" if kind == "archive" else "holds BioNeMo-SCDL archives"
    return (
        f"{path} {what}, no Zarr store. Convert once, with scdl-zarr convert {path} STORE or "
        "scdl_zarr.convert(path, store), and open that"
    )
