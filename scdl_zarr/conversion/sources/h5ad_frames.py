"""Tables of H5AD files as anndata writes them since 0.7, read without anndata.

Importing anndata takes a second and 25 to 30 MB (it brings dask.array, xarray where that is installed, and more), which is a good
part of a small conversion.  The encodings that tables are made of are few and documented; a table with any other is left to
anndata's own reader.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import h5py

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["read_frame"]

_PLAIN = {("array", "0.2.0"), ("string-array", "0.2.0")}
_PARTS = {
    ("categorical", "0.2.0"): ("codes", "categories"),
    ("nullable-integer", "0.1.0"): ("values", "mask"),
    ("nullable-boolean", "0.1.0"): ("values", "mask"),
}


def read_frame(group: h5py.Group) -> pd.DataFrame | None:
    """The table as ``anndata.io.read_elem`` gives it, or None where it has an encoding that is not known here."""
    import pandas as pd

    if _encoding(group) != ("dataframe", "0.2.0"):
        return None
    names, index = [_text(name) for name in group.attrs["column-order"]], _text(group.attrs["_index"])
    if not all(_is_known(group[name]) for name in (*names, index)):
        return None
    columns = {name: _column(group[name]) for name in names}
    frame = pd.DataFrame(columns, index=_column(group[index]), columns=names or None)
    if index != "_index":
        frame.index.name = index
    return frame


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


def _column(node: h5py.Group | h5py.Dataset) -> Any:
    import pandas as pd

    kind, _ = _encoding(node)
    if kind == "array":
        values = node[()]
        return values.astype(values.dtype.newbyteorder("="), copy=False)  # pandas has no other byte order
    if kind == "string-array":
        return node.asstr()[()]
    if kind == "categorical":
        codes, categories = _column(node["codes"]), _column(node["categories"])
        return pd.Categorical.from_codes(codes, categories, ordered=bool(node.attrs["ordered"]))
    masked = pd.arrays.IntegerArray if kind == "nullable-integer" else pd.arrays.BooleanArray
    return masked(_column(node["values"]), _column(node["mask"]))
