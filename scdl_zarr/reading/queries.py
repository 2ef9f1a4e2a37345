"""Rows of a store found by what ``obs`` says of them: a query, or the order of a column."""

from __future__ import annotations

import io
import keyword
import tokenize
from typing import TYPE_CHECKING, Any

import numpy as np

from scdl_zarr.errors import FeatureNameError, OptionError
from scdl_zarr.reading.plan import Int64Array

if TYPE_CHECKING:
    from scdl_zarr.reading.tables import LazyTable

__all__ = ["named_columns", "query_rows", "sort_rows_by"]

BACKTICK = "`"


def query_rows(table: LazyTable, query: str) -> Int64Array:
    """The rows for which a query in pandas' syntax holds, ascending; only the columns that it names are read.

    Parameters
    ----------
    query
        As in :meth:`pandas.DataFrame.query`: ``"n_genes > 500 and cell_type in ['B', 'T']"``.  A name that is no Python name
        stands between backticks.  ``index`` is the cells' names.  ``@variables`` are not known here.  Where a condition is
        missing (NA), it does not hold.

    Raises
    ------
    FeatureNameError
        It names a column that is not there; the message lists those that are.
    OptionError
        It is no query, or says nothing of each row.

    Notes
    -----
    Memory: the columns that are named, each whole.
    """
    import pandas as pd

    used, takes_index = named_columns(query, table.columns)
    frame = pd.DataFrame({name: table[name] for name in used}, index=pd.RangeIndex(len(table)))
    if takes_index:
        frame.index = table.names
    try:
        found = frame.eval(query, engine="python", local_dict={}, global_dict={})
    except Exception as error:  # pandas has errors of many kinds for what it does not understand
        raise OptionError(f"rows={query!r} cannot be evaluated: {error}") from error
    if not isinstance(found, pd.Series) or len(found) != len(table) or not pd.api.types.is_bool_dtype(found.dtype):
        raise OptionError(f"rows={query!r} gives {type(found).__name__}, expected a condition that each row fulfils or not")
    return np.flatnonzero(found.fillna(False).to_numpy(bool)).astype(np.int64)


def named_columns(query: str, columns: list[str]) -> tuple[list[str], bool]:
    """The columns that a query names, and whether it asks for the index.  A name of something else is an error."""
    if not query.strip():
        raise OptionError("rows='' is an empty query; leave it out for all rows")
    if "@" in query:
        raise OptionError(f"rows={query!r} names a variable with @; write its value into the query")
    outside, quoted = query.split(BACKTICK)[::2], query.split(BACKTICK)[1::2]
    if len(outside) != len(quoted) + 1:
        raise OptionError(f"rows={query!r} has a backtick without its partner")
    plain = _identifiers(" _ ".join(outside)) - ({"_"} if quoted else set())
    wanted = list(dict.fromkeys([*quoted, *sorted(plain)]))
    takes_index = "index" in plain and "index" not in columns
    missing = [name for name in wanted if name not in columns and not (name == "index" and takes_index)]
    if missing:
        listed = ", ".join(columns) or "none"
        raise FeatureNameError(f"rows={query!r} names {missing[0]!r}, which is no column of obs; it has: {listed}")
    return [name for name in wanted if name in columns], takes_index


def _identifiers(text: str) -> set[str]:
    """Names that stand for themselves: not attributes (what follows a dot), names of arguments, or Python's own words."""
    try:
        tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.string.strip()]
    except (tokenize.TokenError, SyntaxError, IndentationError) as error:
        raise OptionError(f"rows={text!r} is no query: {error}") from error
    found = set()
    for before, token, after in zip([None, *tokens], tokens, [*tokens[1:], None], strict=False):
        own = token.type == tokenize.NAME and (before is None or before.string != ".")
        argument = after is not None and after.string == "=" and before is not None and before.string in ("(", ",")
        if own and not argument and (token.string not in keyword.kwlist):
            found.add(token.string)
    return found


def sort_rows_by(table: LazyTable, column: str, rows: Int64Array | None) -> Int64Array:
    """The rows (None: all) in the order of a column of obs.

    Equal ones stay in their order, categories are in the order that they are listed in, and missing values come last.

    Notes
    -----
    Memory: the column, and 24 bytes a row.
    """
    import pandas as pd

    values: Any = table.lookup(column)
    numbers = np.arange(len(table), dtype=np.int64) if rows is None else rows
    if isinstance(values, pd.Categorical):
        codes = np.asarray(values.codes, np.int64)[numbers]
        codes[codes < 0] = len(values.categories)
        by_code: Int64Array = numbers[np.argsort(codes, kind="stable")]
        return by_code
    series = pd.Series(values).iloc[numbers].reset_index(drop=True)
    try:
        ordered = series.sort_values(kind="stable", na_position="last")
    except TypeError as error:
        raise OptionError(f"order={column!r}: the values of this column have no order: {error}") from error
    by_value: Int64Array = numbers[ordered.index.to_numpy(np.int64)]
    return by_value
