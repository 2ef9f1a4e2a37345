"""The cells' tables of all sources, joined column by column without ever holding one of them.

::

    source ──► blocks of rows ──► summarize ──► representatives: a few rows with all that the rule of joining looks at
                                                    │
                                   join_frames over the representatives: the joined dtype, categories, what is missing
                                                    │
    source ──► a block of rows ──► appended to its own source's representatives, joined with the others', cut off again

So there is one rule (``frames.py``), and a block comes out as it would from joining the whole tables.  What the rule looks at is
a column's dtype and categories, whether it has a value, whether it misses one and how, how large its integers are, and whether
some are below zero.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.conversion.frames import join_frames
from scdl_zarr.conversion.packed_series import pack_series, unpack_series
from scdl_zarr.conversion.sources import RowArray, TableReader, in_any_order
from scdl_zarr.errors import SourceError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ArraySummary", "BLOCK_ROWS", "ColumnJoin", "TableSummary", "blocks", "summarize", "summarize_array"]

BLOCK_ROWS = 1 << 16
LARGE = 1 << 53  # from here on float64 does not hold every integer
HUGE = 1 << 63  # nor int64 any
TEXT_BYTES = 57  # of a Python text beside its characters, and the pointer to it
FLOATS = ("float16", "float32", "float64")


# ---- what is known of one source's table


@dataclass(frozen=True, slots=True, kw_only=True)
class TableSummary:
    """A table of a source, without its rows."""

    n_rows: int
    index_name: str | None
    index: str  # representatives of the index, as JSON (one object for all sources that have the same)
    columns: dict[str, str]  # and of each column
    digest: str
    block_bytes: int  # of the largest block of one column
    held_bytes: int  # what reading its rows keeps in memory


def summarize(table: TableReader, where: str, *, shared_categories: bool = False) -> TableSummary:
    """Walk a table in blocks of rows, a column at a time.

    Parameters
    ----------
    where
        What messages call the source.
    shared_categories
        The table is a part of one whose categories are those of all parts: its digest then counts only what its own rows hold.

    Raises
    ------
    SourceError
        A column holds what no table of a store can.
    """
    table, order = in_any_order(table)
    walks = {}
    for name in (None, *table.columns):
        walk = _Walk(where, name, shared_categories)
        for start, stop in blocks(table.n_rows):
            walk.add(_column(table, name, start, stop))
        walks[name] = walk
    parts = [walk.digest() for walk in walks.values()]
    described = repr((table.n_rows, table.index_name, table.columns, parts)) + order
    return TableSummary(
        n_rows=table.n_rows,
        index_name=table.index_name,
        index=walks.pop(None).packed(),
        columns={str(name): walk.packed() for name, walk in walks.items()},
        digest=hashlib.blake2b(described.encode(), digest_size=16).hexdigest(),
        block_bytes=max((walk.block_bytes for walk in walks.values()), default=0),
        held_bytes=table.held_bytes,
    )


def _column(table: TableReader, name: str | None, start: int, stop: int) -> pd.Series[Any]:
    return table.names(start, stop).to_series().reset_index(drop=True) if name is None else table.column(name, start, stop)


def blocks(n_rows: int) -> Iterator[tuple[int, int]]:
    """Half-open runs of at most BLOCK_ROWS rows; an empty table is one empty run, for its dtypes."""
    for start in range(0, max(n_rows, 1), BLOCK_ROWS):
        yield start, min(start + BLOCK_ROWS, n_rows)


class _Walk:
    """One column while its rows pass: what is known of it and a digest, both the same whatever the blocks."""

    def __init__(self, where: str, name: str | None, shared_categories: bool) -> None:
        self._where = f"{where}: obs: column {'index' if name is None else name!r}"
        self._shared = shared_categories
        self._empty: pd.Series[Any] | None = None
        self._has_value = False
        self._missing: dict[str, Any] = {}  # one of each kind of missing value, by its type's name
        self._large = False  # it has an integer that float64 need not hold
        self._huge = False  # or one that int64 does not hold
        self._below_zero = False
        self._used: npt.NDArray[np.bool_] | None = None  # which categories rows have
        self._content, self._lengths = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
        self._numbers: npt.NDArray[np.int64] | None = None  # of the categories, by first appearance
        self._seen = 0
        self.block_bytes = 0

    def add(self, series: pd.Series[Any]) -> None:
        """The next rows."""
        if self._empty is None:
            self._empty = series.iloc[:0]
        elif series.dtype != self._empty.dtype:
            raise SourceError(f"{self._where} is {self._empty.dtype} in its first rows and {series.dtype} further down")
        try:
            self._take_in(series)
        except (TypeError, ValueError, UnicodeError) as error:
            raise SourceError(f"{self._where} cannot be stored: {error}") from error
        self._note(series)

    # ---- representatives

    def packed(self) -> str:
        """The representatives as JSON."""
        return sys.intern(json.dumps(pack_series(self.representatives())))

    def representatives(self) -> pd.Series[Any]:
        """A few rows in the column's dtype: a value if it has one, and what is missing; the same for columns of one kind."""
        import pandas as pd

        assert self._empty is not None
        dtype = self._empty.dtype
        if isinstance(dtype, pd.CategoricalDtype):
            codes = (self._typical_codes() if self._has_value else []) + [-1] * bool(self._missing)
            return pd.Series(pd.Categorical.from_codes(codes, dtype=dtype))
        kind = getattr(dtype, "kind", "O")
        number = HUGE if self._huge else 2 * LARGE if self._large else 1
        value = {"O": "a", "b": True, "f": 1.0}.get(kind, number)
        rows = [value] * self._has_value + [-1] * self._below_zero + list(self._missing.values())
        return pd.Series(rows, dtype=dtype) if rows else self._empty.reset_index(drop=True)

    def _typical_codes(self) -> list[int]:
        """A category; of integers the least and the largest that are used."""
        assert self._empty is not None and self._used is not None
        labels = self._empty.array.categories.to_numpy()
        if labels.dtype.kind not in "iu":
            return [0]
        used = np.flatnonzero(self._used)
        return sorted({int(used[np.argmin(labels[used])]), int(used[np.argmax(labels[used])])})

    def _note(self, series: pd.Series[Any]) -> None:
        import pandas as pd

        missing = series.isna().to_numpy(dtype=bool)
        self._has_value = self._has_value or not missing.all()
        if missing.any():
            for value in series.array[np.flatnonzero(missing)] if series.dtype == object else series.array[missing][:1]:
                self._missing.setdefault(type(value).__name__, value)
        if isinstance(series.dtype, pd.CategoricalDtype):
            if self._used is None:
                self._used = np.zeros(len(series.array.categories) + 1, bool)  # the last one is of missing values
            self._used[np.asarray(series.array.codes)] = True
            self._used[-1] = False
        elif getattr(series.dtype, "kind", "O") in "iu" and not missing.all():
            known = series.dropna()
            least, most = int(known.min()), int(known.max())
            self._large = self._large or max(-least, most) > LARGE
            self._huge = self._huge or most >= HUGE
            self._below_zero = self._below_zero or least < 0

    # ---- digest

    def digest(self) -> str:
        """Of the content."""
        assert self._empty is not None
        categories = getattr(self._empty.array, "categories", None)
        described = [str(self._empty.dtype) if categories is None else f"categories {self._empty.array.ordered}"]
        if categories is not None:
            described.append(self._categories_digest())
        return repr((*described, self._content.hexdigest(), self._lengths.hexdigest()))

    def _categories_digest(self) -> str:
        import pandas as pd

        assert self._empty is not None
        labels = self._empty.array.categories
        if self._shared and self._numbers is not None:  # those that are used, in the order of their numbers
            labels = labels[np.argsort(self._numbers[:-1], kind="stable")[len(labels) - self._seen :]]
        walk = _Walk(self._where, None, False)
        walk._take_in(pd.Series(labels.to_numpy()))
        return f"{labels.dtype} {walk._content.hexdigest()} {walk._lengths.hexdigest()}"

    def _take_in(self, series: pd.Series[Any]) -> None:
        import pandas as pd

        values = series.array
        if isinstance(values, pd.Categorical):
            self._take_in_codes(values)
        elif isinstance(values, (pd.arrays.IntegerArray, pd.arrays.BooleanArray, pd.arrays.FloatingArray)):
            own: np.dtype[Any] = getattr(values.dtype, "numpy_dtype")  # noqa: B009
            self._take_in_numbers(self._content, values.to_numpy(dtype=own, na_value=own.type(0)))
            self._take_in_numbers(self._lengths, np.asarray(values.isna()))
        else:
            plain = series.to_numpy()
            if plain.dtype.kind in "biuf":
                self._take_in_numbers(self._content, plain)
            elif plain.dtype == object:
                self._take_in_texts(series, plain)
            else:
                raise TypeError(f"values of dtype {plain.dtype} are neither numbers nor text")

    def _take_in_numbers(self, digest: Any, values: npt.NDArray[Any]) -> None:
        little = np.ascontiguousarray(values.astype(values.dtype.newbyteorder("<"), copy=False))
        self.block_bytes = max(self.block_bytes, little.nbytes)
        digest.update(little.view(np.uint8).data)

    def _take_in_texts(self, series: pd.Series[Any], values: npt.NDArray[np.object_]) -> None:
        missing = series.isna().to_numpy(dtype=bool)
        texts = values.tolist()
        if missing.any():
            texts = ["" if gone else text for text, gone in zip(texts, missing.tolist(), strict=True)]
        if not set(map(type, texts)) <= {str}:
            wrong = next(text for text in texts if type(text) is not str)
            if not isinstance(wrong, str):
                raise TypeError(f"values such as {wrong!r} are neither numbers nor text")
            texts = [str(text) for text in texts]
        lengths = np.fromiter(map(len, texts), np.int64, len(texts))
        encoded = "".join(texts).encode()
        self.block_bytes = max(self.block_bytes, len(encoded) + (TEXT_BYTES + 8) * len(texts))
        self._content.update(encoded)
        lengths[missing] = -1
        self._take_in_numbers(self._lengths, lengths)

    def _take_in_codes(self, values: pd.Categorical) -> None:
        codes = np.asarray(values.codes).astype(np.int64)
        if not self._shared:
            self._take_in_numbers(self._content, codes)
            return
        if self._numbers is None:
            self._numbers = np.full(len(values.categories) + 1, -1, np.int64)  # the last one is of missing values
        found, places = np.unique(codes, return_index=True)
        for code in found[np.argsort(places)].tolist():
            if code >= 0 and self._numbers[code] < 0:
                self._numbers[code] = self._seen
                self._seen += 1
        self._take_in_numbers(self._content, self._numbers[codes])


# ---- joining


class ColumnJoin:
    """How one column of the sources becomes a column of the store.

    Parameters
    ----------
    parts
        The distinct representatives, as JSON.
    of_source
        For each source, which of them is its own; -1 where it has rows and not the column, -2 where it has neither.
    is_index
        They are of the index, whose names are joined as the index of a table.
    """

    def __init__(self, parts: list[str], of_source: list[int], *, is_index: bool = False) -> None:
        self.parts, self.of_source, self._is_index = parts, of_source, is_index
        self._parts = [unpack_series(json.loads(part)) for part in parts]
        self._has_value = [bool(part.notna().any()) for part in self._parts]
        self._frames = {code: self._frame(code) for code in set(of_source)}
        self._chosen = _first_two(of_source)
        self.joined = self._join({})  # the representatives joined: what is true of it is true of the whole column
        self.dtype = self.joined.dtype

    @classmethod
    def of(cls, name: str | None, tables: list[TableSummary]) -> ColumnJoin:
        """The column of that name of those tables, of which some may lack it; None: their index."""
        places: dict[str, int] = {}
        codes = []
        for table in tables:
            part = table.index if name is None else table.columns.get(name)
            codes.append(places.setdefault(part, len(places)) if part is not None else -1 if table.n_rows else -2)
        return cls(list(places), codes, is_index=name is None)

    @property
    def becomes_text(self) -> bool:
        """Whether it is numbers (or booleans) in some sources and text in the store."""
        kinds = {kind_of(part.array) for part, known in zip(self._parts, self._has_value, strict=True) if known}
        return kind_of(self.joined.array) == "text" and "number" in kinds

    @property
    def misses(self) -> bool:
        """Whether the joined column misses a value."""
        return bool(self.joined.isna().any())

    def convert(self, source: int, rows: pd.Series[Any] | None, n_rows: int) -> Any:
        """Rows of a source as they are in the joined column: an array of pandas.

        Parameters
        ----------
        rows
            Rows of the source's column, numbered from 0; None where it has no such column.
        n_rows
            How many rows.
        """
        if len(self.of_source) == 1 and rows is not None:
            return self._single(rows)
        if rows is not None and (quick := self._same_kind(source, rows)) is not None:
            return quick
        own, before = self._own(source, rows, n_rows), 0
        for number in self._chosen:
            before += len(self._frames[self.of_source[number]]) if number < source else 0
        first = before + len(own) - n_rows
        return self._join({source: own}).array[first : first + n_rows]

    def _single(self, rows: pd.Series[Any]) -> Any:
        import pandas as pd

        return pd.Index(rows.array, dtype=rows.dtype).to_series().array if self._is_index else rows.array

    def _same_kind(self, source: int, rows: pd.Series[Any]) -> Any | None:
        """What is surely the outcome, without joining: labels keep theirs, and what has the joined dtype already stays."""
        import pandas as pd

        if isinstance(rows.dtype, pd.CategoricalDtype):
            if self._is_index or not isinstance(self.dtype, pd.CategoricalDtype):
                return None
            return rows.array.set_categories(self.dtype.categories, ordered=self.dtype.ordered)
        if rows.dtype != self.dtype or (rows.dtype == object and not self._has_value[self.of_source[source]]):
            return None  # of objects none of which is there, joining may change how they are missing
        return rows.array

    def _own(self, source: int, rows: pd.Series[Any] | None, n_rows: int) -> pd.DataFrame:
        """The rows behind the representatives of their source, which have all of the column's say in the joining."""
        import pandas as pd

        held = self._frames[self.of_source[source]]
        if rows is None:
            return pd.DataFrame(index=pd.RangeIndex(len(held) + n_rows))
        if self._is_index:
            return pd.DataFrame(index=held.index.append(pd.Index(rows.array, dtype=rows.dtype)))
        return pd.DataFrame({"": pd.concat([held[""], rows], ignore_index=True)})

    def _join(self, own: dict[int, pd.DataFrame]) -> pd.Series[Any]:
        numbers = sorted({*self._chosen, *own})
        frames = [own[number] if number in own else self._frames[self.of_source[number]] for number in numbers]
        whole = join_frames(frames)
        found: pd.Series[Any] = whole.index.to_series().reset_index(drop=True) if self._is_index else whole[""]
        return found

    def _frame(self, code: int) -> pd.DataFrame:
        import pandas as pd

        if code < 0:
            return pd.DataFrame(index=pd.RangeIndex(1 if code == -1 else 0))
        part = self._parts[code]
        return pd.DataFrame(index=pd.Index(part.array, dtype=part.dtype)) if self._is_index else pd.DataFrame({"": part})


def kind_of(values: Any) -> str:
    """What the values of a column are, or its categories: "number" or "text"."""
    kind = getattr(getattr(values, "categories", values).dtype, "kind", "O")
    return "number" if kind in "biuf" else "text"


def _first_two(codes: list[int]) -> list[int]:
    """Sources enough to stand for all: of each kind the first, which has its place, and a second, so that two are not one."""
    count: dict[int, int] = {}
    chosen = []
    for number, code in enumerate(codes):
        count[code] = count.get(code, 0) + 1
        if count[code] <= 2:
            chosen.append(number)
    return chosen


# ---- arrays with a row for each cell


@dataclass(frozen=True, slots=True, kw_only=True)
class ArraySummary:
    """A dense array of a source, without its rows."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    digest: str
    exact_in: tuple[str, ...]  # the floating dtypes that hold every value (asked of integers alone)
    held_bytes: int


def summarize_array(array: RowArray) -> ArraySummary:
    """Walk an array in blocks of rows."""
    held_bytes = array.held_bytes
    array, order = in_any_order(array)
    digest = hashlib.blake2b((repr((array.dtype.str, array.shape)) + order).encode(), digest_size=16)
    exact = {name for name in FLOATS if array.dtype.kind in "iu"}
    for start, stop in blocks(array.shape[0]):
        values = np.ascontiguousarray(array.rows(start, stop))
        digest.update(values.reshape(-1).view(np.uint8).data)
        exact -= {name for name in exact if not _holds(np.dtype(name), values)}
    return ArraySummary(
        shape=array.shape,
        dtype=array.dtype,
        digest=digest.hexdigest(),
        exact_in=tuple(sorted(exact)),
        held_bytes=held_bytes,
    )


def _holds(dtype: np.dtype[Any], values: npt.NDArray[Any]) -> bool:
    with np.errstate(all="ignore"):
        return bool(np.array_equal(values.astype(dtype).astype(values.dtype), values))
