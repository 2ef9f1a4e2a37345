"""Tables of H5AD files as anndata writes them since 0.7, read without anndata.

Importing anndata takes a second and 25 to 30 MB (it brings dask.array, xarray where that is installed, and more), which is a good
part of a small conversion.  The encodings that tables are made of are few and documented; a table with any other is left to
anndata's own reader.  A table can be read whole (:func:`read_frame`) or by ranges of rows (:class:`H5adTable`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import numpy.typing as npt

from scdl_zarr.reading.row_ranges import KeptPiece

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["H5adTable", "dataset_rows", "is_usual", "read_frame"]

_PLAIN = {("array", "0.2.0"), ("string-array", "0.2.0")}
_PARTS = {
    ("categorical", "0.2.0"): ("codes", "categories"),
    ("nullable-integer", "0.1.0"): ("values", "mask"),
    ("nullable-boolean", "0.1.0"): ("values", "mask"),
}


def read_frame(group: h5py.Group) -> pd.DataFrame | None:
    """The table as ``anndata.io.read_elem`` gives it, or None where it has an encoding that is not known here."""
    import pandas as pd

    if not is_usual(group):
        return None
    names, index = _names(group)
    columns = {name: _column(group[name]) for name in names}
    frame = pd.DataFrame(columns, index=_column(group[index]), columns=names or None)
    if index != "_index":
        frame.index.name = index
    return frame


class H5adTable:
    """A table of the usual encodings, read column by column and by ranges of rows.  See ``sources.TableReader``.

    Parameters
    ----------
    group
        A table that :func:`is_usual`.
    reading
        A context manager, entered for every reading: what it makes of errors.
    """

    held_bytes = 0

    def __init__(self, group: h5py.Group, reading: Callable[[], Any]) -> None:
        self._group, self._reading = group, reading
        self.columns, self._index = _names(group)
        self.index_name = None if self._index == "_index" else self._index
        self._opened: dict[bool, tuple[str, Callable[[int, int], Any]]] = {}  # the index, and one column at a time
        self.n_rows = _length(group[self._index])
        for name in self.columns:
            found = _length(group[name])
            if found != self.n_rows:
                raise ValueError(f"column {name!r} has {found} values, the index has {self.n_rows}")

    def column(self, name: str, start: int, stop: int) -> pd.Series[Any]:
        import pandas as pd

        return pd.DataFrame({name: self._rows(name, False, start, stop)})[name]  # as the whole table infers its dtype

    def names(self, start: int, stop: int) -> pd.Index:
        import pandas as pd

        found: pd.Index = pd.DataFrame(index=self._rows(self._index, True, start, stop)).index
        return found.rename(self.index_name)

    def _rows(self, name: str, is_index: bool, start: int, stop: int) -> Any:
        with self._reading():
            opened = self._opened.get(is_index)
            if opened is None or opened[0] != name:
                self._opened.pop(is_index, None)
                opened = self._opened[is_index] = name, _column_rows(self._group[name])
            return opened[1](start, stop)


def is_usual(group: h5py.Group) -> bool:
    """Whether a table has encodings that are known here alone."""
    if _encoding(group) != ("dataframe", "0.2.0"):
        return False
    names, index = _names(group)
    return all(_is_known(group[name]) for name in (*names, index))


def dataset_rows(data: h5py.Dataset) -> Callable[[int, int], npt.NDArray[Any]]:
    """Reads rows [start, stop) of a dataset, in the byte order of this machine."""
    pieces = KeptPiece(lambda start, stop: _native(data[start:stop]), len(data), data.chunks[0] if data.chunks else 1)
    return pieces.rows


def _names(group: h5py.Group) -> tuple[list[str], str]:
    """Names of the columns, and of the index."""
    return [_text(name) for name in group.attrs["column-order"]], _text(group.attrs["_index"])


def _length(node: h5py.Group | h5py.Dataset) -> int:
    if isinstance(node, h5py.Dataset):
        return len(node)
    kind = _encoding(node)
    if kind == ("categorical", "0.2.0"):
        return len(node["codes"])
    if len(node["values"]) != len(node["mask"]):
        raise ValueError(f"{node.name} has {len(node['values'])} values and a mask of {len(node['mask'])}")
    return len(node["values"])


def _column_rows(node: h5py.Group | h5py.Dataset) -> Callable[[int, int], Any]:
    """Reads rows [start, stop) of a column; what all rows share is read now."""
    import pandas as pd

    kind, _ = _encoding(node)
    if kind == "array":
        return dataset_rows(node)
    if kind == "string-array":
        piece = node.chunks[0] if node.chunks else 1
        return KeptPiece(lambda start, stop: _texts(node, slice(start, stop)), len(node), piece).rows
    if kind == "categorical":
        dtype, codes = pd.CategoricalDtype(_column(node["categories"]), bool(node.attrs["ordered"])), dataset_rows(node["codes"])
        return lambda start, stop: pd.Categorical.from_codes(codes(start, stop), dtype=dtype)
    masked = pd.arrays.IntegerArray if kind == "nullable-integer" else pd.arrays.BooleanArray
    values, mask = dataset_rows(node["values"]), dataset_rows(node["mask"])
    return lambda start, stop: masked(values(start, stop), mask(start, stop))


def _native(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return values.astype(values.dtype.newbyteorder("="), copy=False)  # pandas has no other byte order


def _encoding(node: h5py.Group | h5py.Dataset) -> tuple[Any, Any]:
    return _text(node.attrs.get("encoding-type")), _text(node.attrs.get("encoding-version"))


def _text(value: Any) -> Any:
    """An attribute: h5py gives those of fixed length, which other languages write, as bytes."""
    return value.decode() if isinstance(value, bytes) else value


def _is_known(node: h5py.Group | h5py.Dataset) -> bool:
    if isinstance(node, h5py.Dataset):
        return node.ndim == 1 and _encoding(node) in _PLAIN
    parts = _PARTS.get(_encoding(node))
    return parts is not None and all(isinstance(node[part], h5py.Dataset) and _is_known(node[part]) for part in parts)


def _texts(node: h5py.Dataset, rows: slice) -> npt.NDArray[Any]:
    """What ``node.asstr()[rows]`` gives, decoded in one go: no text in HDF5 has a zero character in it."""
    asked = node.asstr()  # an error where it holds something else
    found = node[rows]
    if found.dtype != object or found.ndim != 1 or not len(found):
        return np.asarray(asked[rows], dtype=object)
    out = np.empty(len(found), dtype=object)
    out[:] = b"\0".join(found.tolist()).decode(asked.encoding, asked.errors).split("\0")
    return out


def _column(node: h5py.Group | h5py.Dataset) -> Any:
    import pandas as pd

    kind, _ = _encoding(node)
    if kind == "array":
        return _native(node[()])
    if kind == "string-array":
        return _texts(node, slice(None))
    if kind == "categorical":
        codes, categories = _column(node["codes"]), _column(node["categories"])
        return pd.Categorical.from_codes(codes, categories, ordered=bool(node.attrs["ordered"]))
    masked = pd.arrays.IntegerArray if kind == "nullable-integer" else pd.arrays.BooleanArray
    return masked(_column(node["values"]), _column(node["mask"]))
