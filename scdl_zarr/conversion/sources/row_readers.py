"""What a source's obs and obsm are read with, by ranges of rows: of stores, and of what can only be read whole.

Those of H5AD files are in ``h5ad_frames.py``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.errors import SourceError
from scdl_zarr.storage.foreign import dtype_name

if TYPE_CHECKING:
    import pandas as pd

    from scdl_zarr.reading.row_ranges import ElementRows
    from scdl_zarr.reading.tables import LazyTable

__all__ = ["LazyArray", "StoreTable", "WholeArray", "WholeTable", "bytes_of", "row_array_of"]


def row_array_of(node: Mapping[str, Any] | None) -> tuple[tuple[int, ...], np.dtype[Any]] | None:
    """Shape and dtype of a dense numeric array with rows, from its document; None of anything else."""
    if not node or node.get("node_type") != "array":
        return None
    shape = node.get("shape")
    try:
        dtype = np.dtype(dtype_name(node))
    except TypeError:
        return None
    if not isinstance(shape, list) or len(shape) < 2 or dtype.kind not in "biuf":
        return None
    if not all(isinstance(n, int) and n >= 0 for n in shape):
        return None
    return tuple(shape), dtype


class WholeTable:
    """A table that was read whole: of a rare encoding, or small.  See ``sources.TableReader``."""

    def __init__(self, frame: pd.DataFrame) -> None:
        self._frame = frame
        self._places = {str(name): place for place, name in enumerate(frame.columns)}
        self.columns = list(self._places)
        self.n_rows = len(frame)
        self.index_name = None if frame.index.name is None else str(frame.index.name)
        self.held_bytes = int(frame.memory_usage(deep=True).sum())

    def column(self, name: str, start: int, stop: int) -> pd.Series[Any]:
        return self._frame.iloc[start:stop, self._places[name]].reset_index(drop=True)

    def names(self, start: int, stop: int) -> pd.Index:
        return self._frame.index[start:stop]


class WholeArray:
    """An array that was read whole.  See ``sources.RowArray``."""

    def __init__(self, where: str, path: str, value: Any) -> None:
        if not isinstance(value, np.ndarray) or value.ndim < 2 or value.dtype.kind not in "biuf":
            raise SourceError(f"{where}: {path} is {type(value).__name__}; dense numeric arrays can be carried")
        self._value: npt.NDArray[Any] = value
        self.shape, self.dtype = value.shape, value.dtype.newbyteorder("=")
        self.held_bytes = int(value.nbytes)

    def rows(self, start: int, stop: int) -> npt.NDArray[Any]:
        return self._value[start:stop].astype(self.dtype, copy=False)


class LazyArray:
    """An array whose rows are read when they are asked for.  See ``sources.RowArray``."""

    held_bytes = 0

    def __init__(self, read: Callable[[int, int], npt.NDArray[Any]], shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._read = read
        self.shape, self.dtype = shape, dtype.newbyteorder("=")

    def rows(self, start: int, stop: int) -> npt.NDArray[Any]:
        return self._read(start, stop).astype(self.dtype, copy=False)


class StoreTable:
    """Rows of the table of a store, ours or another program's.  See ``sources.TableReader``.

    Parameters
    ----------
    table
        The whole table.
    rows
        Which of its rows are the source's.
    reading
        A context manager, entered for every reading: what it makes of errors.
    """

    def __init__(
        self,
        table: LazyTable,
        rows: range,
        reading: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self._table, self._first, self._reading = table, rows.start, reading
        self.columns, self.index_name, self.n_rows = table.columns, table.index_name, len(rows)
        self.held_bytes = 0
        self._opened: dict[bool, tuple[str | None, ElementRows]] = {}  # the index, and one column at a time

    def column(self, name: str, start: int, stop: int) -> pd.Series[Any]:
        import pandas as pd

        return pd.Series(self._rows(name, start, max(stop, start + 1)))[: stop - start]

    def names(self, start: int, stop: int) -> pd.Index:
        import pandas as pd

        return pd.Index(self._rows(None, start, max(stop, start + 1)), name=self.index_name)[: stop - start]

    def _rows(self, name: str | None, start: int, stop: int) -> Any:
        """At least a row where the table has one: of none at all, pandas would infer another dtype than of the table."""
        with self._reading():
            opened = self._opened.get(name is None)
            if opened is None or opened[0] != name:
                self._opened.pop(name is None, None)
                opened = self._opened[name is None] = name, self._table.open_column(name)
                if opened[1].kept is not None:
                    self.held_bytes = max(self.held_bytes, bytes_of(opened[1].kept))
            low = min(self._first + start, max(len(self._table) - 1, 0))
            return opened[1].rows(low, min(self._first + stop, len(self._table)))


def bytes_of(values: Any) -> int:
    """Memory of a column."""
    import pandas as pd

    return int(pd.Series(values).memory_usage(deep=True))
