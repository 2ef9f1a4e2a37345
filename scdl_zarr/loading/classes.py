"""Columns of obs as classes of rows: a number for each row, and for each number the values it stands for."""

from __future__ import annotations

import keyword
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.errors import OptionError
from scdl_zarr.reading.plan import Int64Array

if TYPE_CHECKING:
    import pandas as pd

    from scdl_zarr.loading.labels import Label
    from scdl_zarr.loading.sources import RowSource

__all__ = ["Classes", "codes_of", "compact", "sorted_by"]

TABLE_SIZE = 1 << 20  # numbers below that, or below that of the rows, are counted in a table and not sorted


@dataclass(frozen=True, slots=True, kw_only=True)
class Classes:
    """The distinct combinations of values of some columns among some rows.

    Attributes
    ----------
    codes
        The class of each row.
    columns
        For each column, the code of its value in each class.
    tables
        For each column, what its codes stand for.
    """

    codes: Int64Array
    columns: dict[str, Int64Array]
    tables: dict[str, Any]

    @classmethod
    def of(cls, source: RowSource, names: Sequence[str], rows: Int64Array | None, option: str) -> Classes:
        """The classes of chosen rows (None: all) by columns of obs.

        Raises
        ------
        OptionError
            A column has missing values in these rows; the message says how many rows, and a query that leaves them out.
        """
        n = source.n_obs if rows is None else len(rows)
        codes, columns, tables = np.zeros(n, np.int64), dict[str, Int64Array](), dict[str, Any]()
        missing = np.zeros(n, bool)
        gaps = list[str]()
        for name in names:
            own, tables[name] = codes_of(source.label(name), rows)
            if (own < 0).any():
                gaps.append(name)
                missing |= own < 0
            if gaps:
                continue
            width = max(len(tables[name]), 1)
            codes, found = compact(codes * width + own, width * max(len(next(iter(columns.values()), [0])), 1))
            earlier, columns_own = np.divmod(found, width)
            columns = {**{other: values[earlier] for other, values in columns.items()}, name: columns_own}
        if gaps:
            query = " and ".join(f"{_quoted(name)}.notna()" for name in gaps)
            raise OptionError(
                f"{option}: {', '.join(map(repr, gaps))} of obs misses values in {int(missing.sum())} of {n} rows, which are "
                f"of no class; leave them out with rows={query!r}"
            )
        return cls(codes=codes, columns=columns, tables=tables)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def frame(self) -> pd.DataFrame:
        """The values of each class."""
        import pandas as pd

        return pd.DataFrame({name: self.tables[name][codes] for name, codes in self.columns.items()})

    def name(self, number: int) -> str:
        """What a class is, in words."""
        return ", ".join(f"{name}={_plain(self.tables[name][codes[number]])!r}" for name, codes in self.columns.items())


def codes_of(label: Label, rows: Int64Array | None) -> tuple[Int64Array, Any]:
    """A column's values in these rows as codes, -1 where missing, and what these stand for."""
    values = label.values if rows is None else label.values[rows]
    if label.categories is not None:
        return values.astype(np.int64), label.categories
    if values.dtype.kind == "b":
        return values.astype(np.int64), np.array([False, True])
    table, codes = np.unique(values, return_inverse=True)  # NaN is its last value
    codes = codes.astype(np.int64, copy=False).reshape(-1)
    if table.dtype.kind == "f" and len(table) and np.isnan(table[-1]):
        codes[codes == len(table) - 1] = -1
        table = table[:-1]
    return codes, table


def compact(codes: Int64Array, size: int) -> tuple[Int64Array, Int64Array]:
    """Numbers in [0, size) as numbers of those that are there, ascending, and those."""
    if size > max(TABLE_SIZE, len(codes)):
        found, places = np.unique(codes, return_inverse=True)
        return places.astype(np.int64, copy=False).reshape(-1), found
    there = np.zeros(size, bool)
    there[codes] = True
    return (np.cumsum(there) - 1)[codes], np.flatnonzero(there)


def sorted_by(codes: Int64Array, n_classes: int, rows: Int64Array | None, n_obs: int) -> tuple[npt.NDArray[Any], Int64Array]:
    """Row numbers (of chosen rows, or all) by class, and where each class begins and the last one ends."""
    order = np.argsort(codes, kind="stable")
    found = order if rows is None else rows[order]
    starts = np.zeros(n_classes + 1, np.int64)
    np.cumsum(np.bincount(codes, minlength=n_classes), out=starts[1:])
    return found.astype(np.uint32 if n_obs <= 1 << 32 else np.int64), starts


def _quoted(name: str) -> str:
    """A column's name in a query."""
    return name if name.isidentifier() and not keyword.iskeyword(name) else f"`{name}`"


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
