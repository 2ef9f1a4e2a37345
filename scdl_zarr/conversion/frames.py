"""Tables of several sources joined: the union of their columns, nothing changed that both can hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["as_stored", "join_columns", "join_frames", "nullable"]


def join_columns(parts: list[pd.Series[Any]]) -> pd.Series[Any]:
    """Concatenate one column of several sources: categories united in order of appearance, numbers widened.

    Integers stay integers.  Columns of kinds that have no common one (text and numbers, booleans and fractions, large integers
    and fractions, integers below zero and from 2**63 on) become text.
    """
    import pandas as pd
    from pandas.api.types import union_categoricals

    parts = _without_say([part for part in parts if len(part)] or parts[:1])  # an empty source has no say in the dtype
    if len(parts) == 1:
        only: pd.Series[Any] = parts[0]
        return only
    index = parts[0].index.append([part.index for part in parts[1:]])
    if all(isinstance(part.dtype, pd.CategoricalDtype) for part in parts):
        same = all(part.cat.categories.equals(parts[0].cat.categories) for part in parts)
        if same and all(part.cat.ordered for part in parts):  # an order that all agree on stays
            return pd.Series(union_categoricals([part.array for part in parts]), index=index)
        if len({part.cat.categories.dtype for part in parts}) == 1:
            return pd.Series(union_categoricals([part.cat.as_unordered().array for part in parts]), index=index)
    plain = [_without_categories(part) for part in parts]
    kinds = {getattr(part.dtype, "kind", "O") for part in plain}
    if "b" in kinds and kinds & set("iu"):
        plain = [part.astype("Int64" if part.isna().any() else "int64") if part.dtype.kind == "b" else part for part in plain]
    if kinds <= set("biu"):
        plain = _with_one_sign(plain)
    if {"b", "f"} <= kinds:  # which pandas makes 1.0 of True for
        plain = [_as_text(part) if part.dtype.kind == "b" else part for part in plain]
    joined: pd.Series[Any] = pd.concat(plain)
    if getattr(joined.dtype, "kind", "O") == "f" and any(_rounds(part) for part in plain):
        joined = pd.concat([_as_text(part) for part in plain])
    if joined.dtype == object and not all(isinstance(v, str) for v in joined.dropna()):
        joined = joined.map(str, na_action="ignore")
    return joined


def _without_say(parts: list[pd.Series[Any]]) -> list[pd.Series[Any]]:
    """Columns that hold no value at all take the dtype of the first that holds one.

    Files write a column of missing values as NaN, or as categories of which there are none, whatever it was meant to hold.
    """
    having = next((part for part in parts if part.notna().any()), None)
    if having is None:
        return parts
    like = nullable(having.iloc[:0].reset_index(drop=True))
    return [
        part
        if part.dtype == having.dtype or part.notna().any() or _has_categories(part)
        else like.reindex(range(len(part))).set_axis(part.index)
        for part in parts
    ]


def _has_categories(part: pd.Series[Any]) -> bool:
    import pandas as pd

    return isinstance(part.dtype, pd.CategoricalDtype) and len(part.cat.categories) > 0


def _as_text(part: pd.Series[Any]) -> pd.Series[Any]:
    return part.astype(object).map(str, na_action="ignore")


def _without_categories(part: pd.Series[Any]) -> pd.Series[Any]:
    """A categorical column as its labels; integers that may be missing stay integers."""
    import pandas as pd

    if not isinstance(part.dtype, pd.CategoricalDtype):
        return part
    labels = nullable(pd.Series(part.cat.categories.to_numpy()))
    return pd.Series(labels.array.take(part.cat.codes.to_numpy(), allow_fill=True), index=part.index)


def _with_one_sign(parts: list[pd.Series[Any]]) -> list[pd.Series[Any]]:
    """Integers in dtypes that have a common one: beside uint64, the others are what holds them all, if there is such a one.

    Of uint64 and a signed dtype NumPy and pandas make float64, which is neither what a column of numbers was nor exact.
    """
    signs = {part.dtype.kind for part in parts if part.dtype.kind == "i" or part.dtype.itemsize == 8}
    if not {"i", "u"} <= signs:
        return parts
    known = [values for part in parts if len(values := part.dropna())]
    least = min((int(values.min()) for values in known), default=0)
    most = max((int(values.max()) for values in known), default=0)
    if least < 0 and most >= 1 << 63:
        return parts
    name = "Int64" if most < 1 << 63 else "UInt64"
    return [part.astype(name.lower() if isinstance(part.dtype, np.dtype) else name) for part in parts]


def _rounds(part: pd.Series[Any]) -> bool:
    """Whether float64 would change an integer of the column."""
    if getattr(part.dtype, "kind", "O") not in "iu":
        return False
    known = part.dropna()  # of a column without any, pandas gives no number as the least
    return len(known) > 0 and any(abs(int(value)) > 1 << 53 for value in (known.min(), known.max()))


def join_frames(frames: list[pd.DataFrame]) -> pd.DataFrame:
    """obs tables one below the other: the union of the columns, missing where a source lacks one.

    Integers and booleans with missing values become pandas' nullable ones, so that they stay what they were.
    """
    import pandas as pd

    if len(frames) == 1:
        return frames[0]
    names = np.concatenate([frame.index.to_numpy(dtype=object) for frame in frames])
    columns: dict[str, Any] = {}
    for name in dict.fromkeys(column for frame in frames for column in frame.columns):
        having = [frame[name] for frame in frames if name in frame.columns]
        if len(having) < len(frames):
            like = nullable(having[0].iloc[:0])
            parts = [nullable(f[name]) if name in f.columns else like.reindex(f.index) for f in _numbered(frames)]
        else:
            parts = having
        columns[name] = join_columns(parts).array
    index_names = {frame.index.name for frame in frames}
    return pd.DataFrame(columns, index=pd.Index(names, name=index_names.pop() if len(index_names) == 1 else None))


def as_stored(frame: pd.DataFrame) -> pd.DataFrame:
    """The table as it comes out of a store: fractions that may be missing are NaN, text that may be is pandas' text."""
    import pandas as pd

    columns: dict[str, Any] = {}
    for name in frame.columns:
        values = frame[name].array
        if isinstance(values, pd.arrays.FloatingArray):
            values = values.to_numpy(dtype=getattr(values.dtype, "numpy_dtype"), na_value=np.nan)  # noqa: B009
        elif getattr(values.dtype, "kind", "") == "O" and not isinstance(values.dtype, pd.CategoricalDtype):
            missing = pd.isna(values)
            values = pd.array(values, dtype="string") if missing.any() else values
        columns[name] = values
    return pd.DataFrame(columns, index=frame.index)


def _numbered(frames: list[pd.DataFrame]) -> list[pd.DataFrame]:
    """The frames under row numbers, because names may repeat and a repeated index cannot be reindexed."""
    return [frame.reset_index(drop=True) for frame in frames]


def nullable(series: pd.Series[Any]) -> pd.Series[Any]:
    """The series in a dtype that can miss values: pandas' nullable ones for integers and booleans."""
    dtype = series.dtype
    if not isinstance(dtype, np.dtype) or dtype.kind not in "iub":
        return series
    name = "boolean" if dtype.kind == "b" else f"{'U' if dtype.kind == 'u' else ''}Int{8 * dtype.itemsize}"
    return series.astype(name)
