"""A few values of a column as JSON, with its dtype, its categories and their order, and how values are missing.

What is written comes back equal, whoever reads it; unlike a pickle it can only be values.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["pack_series", "unpack_series"]

_ABSENT = ("None", "nan", "NA", "NaT")  # the kinds of missing values among objects


def pack_series(series: pd.Series[Any]) -> dict[str, Any]:
    """A column as a document; TypeError where it holds what no table of ours can."""
    import pandas as pd

    values = series.array
    if isinstance(values, pd.Categorical):
        return {
            "kind": "categorical",
            "categories": pack_series(pd.Series(values.categories.array)),
            "ordered": bool(values.ordered),
            "codes": _numbers(np.asarray(values.codes)),
        }
    if isinstance(values, (pd.arrays.IntegerArray, pd.arrays.BooleanArray, pd.arrays.FloatingArray)):
        own = np.dtype(getattr(values.dtype, "numpy_dtype"))  # noqa: B009
        filled = values.to_numpy(dtype=own, na_value=own.type(0))
        return {"kind": "masked", "values": _numbers(filled), "mask": _numbers(np.asarray(values.isna()))}
    if isinstance(values.dtype, pd.StringDtype):
        missing = "nan" if values.dtype.na_value is np.nan else "NA"
        texts = [None if gone else str(text) for text, gone in zip(values, values.isna(), strict=True)]
        return {"kind": "string", "storage": values.dtype.storage, "missing": missing, "values": texts}
    plain = series.to_numpy()
    if plain.dtype.kind in "biuf":
        return {"kind": "numbers", "values": _numbers(plain)}
    if plain.dtype != object:
        raise TypeError(f"values of dtype {plain.dtype} are neither numbers nor text")
    return {"kind": "objects", "values": [_object(value) for value in plain.tolist()]}


def unpack_series(packed: Mapping[str, Any]) -> pd.Series[Any]:
    """The column that was packed."""
    import pandas as pd

    kind = packed["kind"]
    if kind == "categorical":
        labels = unpack_series(packed["categories"])
        dtype = pd.CategoricalDtype(pd.Index(labels.array, dtype=labels.dtype), ordered=bool(packed["ordered"]))
        return pd.Series(pd.Categorical.from_codes(_values(packed["codes"]), dtype=dtype))
    if kind == "masked":
        values, mask = _values(packed["values"]), _values(packed["mask"])
        arrays = {"b": pd.arrays.BooleanArray, "f": pd.arrays.FloatingArray}
        return pd.Series(arrays.get(values.dtype.kind, pd.arrays.IntegerArray)(values, mask))
    if kind == "string":
        missing = np.nan if packed["missing"] == "nan" else pd.NA
        return pd.Series(packed["values"], dtype=pd.StringDtype(packed["storage"], na_value=missing))
    if kind == "numbers":
        return pd.Series(_values(packed["values"]))
    absent = dict(zip(_ABSENT, (None, np.nan, pd.NA, pd.NaT), strict=True))
    values = np.empty(len(packed["values"]), object)
    values[:] = [item if isinstance(item, str) else absent[item[0]] for item in packed["values"]]
    return pd.Series(values, dtype=object)


def _object(value: Any) -> Any:
    import pandas as pd

    if isinstance(value, str):
        return str(value)
    if value is None or value is pd.NA or value is pd.NaT:
        return [_ABSENT[0 if value is None else 2 if value is pd.NA else 3]]
    if isinstance(value, float) and value != value:
        return [_ABSENT[1]]
    raise TypeError(f"values such as {value!r} are neither numbers nor text")


def _numbers(values: npt.NDArray[Any]) -> list[str]:
    little = np.ascontiguousarray(values.astype(values.dtype.newbyteorder("<"), copy=False))
    return [little.dtype.str, base64.b64encode(little.tobytes()).decode()]


def _values(packed: list[str]) -> npt.NDArray[Any]:
    dtype, content = packed
    found: npt.NDArray[Any] = np.frombuffer(base64.b64decode(content), np.dtype(dtype))
    return found.astype(found.dtype.newbyteorder("="))
