"""The tables of a BioNeMo-SCDL archive: runs of rows, and a Parquet file for each.

A folder of tables (SCDL calls it a feature index) has ``cumulative_sum_index.npy``, which is -1 and then where each run of rows
ends, and ``dataframe_<k>.parquet`` for run k.  For genes, a run's table has one row a gene; for cells, one a cell.  Labels (the
file that a run came from) are read as far as they are plain text: ``labels.npy`` may hold a pickle, which is never opened.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.errors import MissingDependencyError, ScdlZarrError, SourceError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["TableFolder", "last_part", "read_document"]

LARGEST_DOCUMENT = 64 << 20
LARGEST_INDEX = 1 << 30
# the column in which SCDL kept the names, where the table had no other column; "feature_id" before 0.1
NAME_COLUMNS = {"var_feature_id", "obs_feature_id", "feature_id"}
PANDAS_INDEX = "__index_level_0__"


class TableFolder:
    """A folder of tables: which rows each covers, and the tables."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ends = _run_ends(folder / "cumulative_sum_index.npy")

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def n_rows(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def run(self, k: int) -> tuple[int, int]:
        """Rows of run k, half-open."""
        return (int(self.ends[k - 1]) if k else 0), int(self.ends[k])

    def path(self, k: int) -> Path:
        """The file of run k.

        Its number has as many digits as the number of runs has.  A folder that was saved again with more of them may still hold
        files with fewer digits, which SCDL itself takes for tables.
        """
        return self.folder / f"dataframe_{k:0{len(str(len(self)))}d}.parquet"

    def labels(self) -> list[str] | None:
        """The label of each run, where they are known without unpickling."""
        found = _json_labels(self.folder / "labels.json") or _plain_labels(self.folder / "labels.npy")
        return found if found is not None and len(found) == len(self) else None

    # ---- tables

    def columns(self, k: int) -> tuple[int, list[str], bool]:
        """Rows of table k, its columns but for the one that names them, and whether there is such a one."""
        with _reading(self.path(k)) as file:
            names = file.schema_arrow.names
            own = _name_column(names)
            return file.metadata.num_rows, [name for name in names if name != own], own is not None

    def is_named(self, start: int, stop: int) -> bool:
        """Whether SCDL kept the names of all rows [start, stop) of the tables together."""
        return all(self.columns(k)[2] for k in self._overlapping(start, stop))

    def table(self, k: int) -> pd.DataFrame:
        """The whole table of run k, indexed by name; ``attrs["numbered"]`` where SCDL kept no names and they are numbers."""
        with _reading(self.path(k)) as file:
            return _frame(file.read(), 0)

    def rows(self, start: int, stop: int) -> pd.DataFrame:
        """The rows [start, stop) of the tables together, which are one below the other."""
        from scdl_zarr.conversion.frames import join_frames

        frames = []
        for k in self._overlapping(start, stop):
            first, last = self.run(k)
            frames.append(self._part(k, max(start, first) - first, min(stop, last) - first, first))
        if frames:
            return join_frames(frames)
        import pandas as pd

        return pd.DataFrame(index=_numbers(start, stop))

    def _overlapping(self, start: int, stop: int) -> list[int]:
        runs = enumerate(map(self.run, range(len(self))))
        return [k for k, (first, last) in runs if max(start, first) < min(stop, last)]

    def _part(self, k: int, start: int, stop: int, first: int) -> pd.DataFrame:
        """Rows [start, stop) of table k, of which only the row groups that hold them are read."""
        with _reading(self.path(k)) as file:
            expected = self.run(k)[1] - first
            if file.metadata.num_rows != expected:
                raise SourceError(f"{self.path(k)} has {file.metadata.num_rows} rows, the index beside it says {expected}")
            sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
            ends = np.cumsum(sizes, dtype=np.int64)
            groups = [g for g, end in enumerate(ends.tolist()) if end > start and end - sizes[g] < stop]
            skipped = int(ends[groups[0]]) - sizes[groups[0]] if groups else 0
            table = file.read_row_groups(groups).slice(start - skipped, stop - start)
            return _frame(table, first + start)


# ---- small files


def read_document(path: Path) -> Any:
    """A small JSON file.  Raises SourceError."""
    try:
        if path.stat().st_size > LARGEST_DOCUMENT:
            raise SourceError(f"{path} has {path.stat().st_size} bytes, more than any such document")
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not JSON: {error}") from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from error


def _run_ends(path: Path) -> npt.NDArray[np.int64]:
    try:
        found = _read_npy(path, "iu")
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise SourceError(f"{path} cannot be read: {error}") from error
    if found.ndim != 1 or not len(found) or found[0] != -1 or (found[1:] < 0).any() or (np.diff(found[1:]) < 0).any():
        shown = np.array2string(found.ravel()[:5], separator=", ")
        raise SourceError(f"{path} holds {shown}..., expected -1 and then where each run of rows ends, rising")
    return found[1:].astype(np.int64)


def _read_npy(path: Path, kinds: str) -> npt.NDArray[Any]:
    """A .npy file of that kind of dtype, if it is whole; a ValueError where it would be a pickle or anything else."""
    with open(path, "rb") as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"it has .npy version {version}")
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, in_columns, dtype = read_header(file)
        if dtype.hasobject or dtype.kind not in kinds or in_columns:
            raise ValueError(f"it holds {dtype}")
        n, left = int(np.prod(shape, dtype=object)), path.stat().st_size - file.tell()
        if left > LARGEST_INDEX or not 0 <= n <= LARGEST_INDEX or n * dtype.itemsize != left:
            raise ValueError(f"it announces {n} entries of {dtype} and has {left} bytes for them")
        return np.frombuffer(file.read(left), dtype).reshape(shape) if left else np.empty(shape, dtype)


def _json_labels(path: Path) -> list[str] | None:
    try:
        found = read_document(path)
    except SourceError:
        return None
    whole = isinstance(found, list) and all(isinstance(label, str) for label in found)
    return found if whole else None


def _plain_labels(path: Path) -> list[str] | None:
    try:
        return [str(label) for label in _read_npy(path, "U").ravel()]
    except (OSError, ValueError):
        return None


def last_part(label: str) -> str:
    """The file's name in a label, which is a path on the machine that made the archive."""
    return re.split(r"[\\/]", label.rstrip("\\/"))[-1]


# ---- Parquet


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """The opened Parquet file; what pyarrow raises for damage is a SourceError."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise MissingDependencyError(
            "BioNeMo-SCDL archives keep their tables in Parquet, which needs pyarrow: pip install 'scdl-zarr[scdl]'"
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except ScdlZarrError:
        raise
    except FileNotFoundError:
        raise SourceError(f"{path} is missing") from None
    except Exception as error:
        raise SourceError(f"{path} cannot be read: {error}") from error


def _name_column(names: list[str]) -> str | None:
    if PANDAS_INDEX in names:
        return PANDAS_INDEX
    return names[0] if len(names) == 1 and names[0] in NAME_COLUMNS else None


def _frame(table: Any, first: int) -> pd.DataFrame:
    """A table with its names, or with numbers from `first` on in their place."""
    import pandas as pd

    names = table.column_names
    if len(set(names)) < len(names):
        raise ValueError(f"columns repeat: {sorted({name for name in names if names.count(name) > 1})}")
    columns = {name: _values(table.column(name)) for name in names}
    own = _name_column(names)
    if own is not None:
        index = pd.Index([None if label is None else str(label) for label in columns.pop(own)], dtype=object)
    else:
        index = _numbers(first, first + table.num_rows)
    frame = pd.DataFrame(columns, index=index)
    frame.attrs["numbered"] = own is None
    return frame


def _numbers(start: int, stop: int) -> pd.Index:
    import pandas as pd

    return pd.Index([str(k) for k in range(start, stop)], dtype=object)


def _values(column: Any) -> Any:
    """A column as a dataframe holds it: numbers as they are, nullable ones where some are missing, anything else as text."""
    import pandas as pd
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind):
        if not column.null_count:
            return column.to_numpy()
        masked = pd.arrays.BooleanArray if pa.types.is_boolean(kind) else pd.arrays.IntegerArray
        filled = column.fill_null(pa.scalar(value=False, type=kind) if pa.types.is_boolean(kind) else pa.scalar(0, type=kind))
        return masked(np.array(filled.to_numpy()), np.array(column.is_null().to_numpy()))
    if pa.types.is_floating(kind):
        return column.to_numpy()
    if pa.types.is_null(kind):
        return np.full(len(column), None, object)
    return (column if pa.types.is_string(kind) else column.cast(pa.string())).to_numpy()
