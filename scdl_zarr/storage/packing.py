"""Tables packed into one pool of bytes: how a store keeps every distinct var table of its sources in two arrays.

A thousand sources may have a thousand var tables with columns of their own; as Zarr arrays they would be many thousands of
small objects.  Instead each column's parts (values, codes, categories, mask) are byte ranges of one ``pool``, equal parts are
stored once, and a directory lists them::

    directory row:  table  column  part  encoding  ordered  length  start  stop

``length`` counts entries, ``start`` and ``stop`` bytes.  ``encoding`` is NumPy's little-endian code, or ``"string"``: length + 1
int64 offsets into the UTF-8 that follows them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.errors import CorruptStoreError, SourceError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["DIRECTORY_COLUMNS", "TablePacker", "unpack_table"]

DIRECTORY_COLUMNS = ("table", "column", "part", "encoding", "ordered", "length", "start", "stop")
INDEX_COLUMN = ""  # the name under which the directory lists a table's index
STRING = "string"


class TablePacker:
    """Collects tables; equal tables get the same number, equal parts the same bytes."""

    def __init__(self) -> None:
        self.directory: dict[str, list[Any]] = {name: [] for name in DIRECTORY_COLUMNS}
        self.lengths: list[int] = []
        self.index_names: list[str] = []
        self._pool: list[bytes] = []
        self._size = 0
        self._parts: dict[bytes, tuple[int, int]] = {}
        self._tables: dict[bytes, int] = {}
        self.digests: list[str] = []  # of each table's content

    def add(self, frame: pd.DataFrame, where: str, *, check: Callable[[], object] | None = None) -> int:
        """The number of a table; a column of a kind that cannot be packed is a :class:`SourceError`.

        `check` is called before a table is taken that was not there; its errors leave everything as it was.
        """
        parts: list[tuple[str, str, str, bool, int, bytes]] = []
        for name, series in ((INDEX_COLUMN, frame.index.to_series()), *((str(c), frame[c]) for c in frame.columns)):
            try:
                parts += [(name, *part) for part in _column_parts(series)]
            except (TypeError, ValueError, UnicodeError) as error:
                raise SourceError(f"{where}: column {name or 'index'!r} cannot be stored: {error}") from error
        index_name = "" if frame.index.name is None else str(frame.index.name)
        digest = hashlib.sha256(repr((index_name, len(frame))).encode())
        for *described, raw in parts:
            digest.update(repr((described, len(raw))).encode() + raw)
        known = self._tables.get(digest.digest())
        if known is not None:
            return known
        if check is not None:
            check()
        number = self._tables[digest.digest()] = len(self._tables)
        self.digests.append(digest.hexdigest())
        self.lengths.append(len(frame))
        self.index_names.append(index_name)
        for *described, raw in parts:
            for key, value in zip(DIRECTORY_COLUMNS, (number, *described, *self._keep(raw)), strict=True):
                self.directory[key].append(value)
        return number

    def pool(self) -> npt.NDArray[np.uint8]:
        return np.frombuffer(b"".join(self._pool), np.uint8)

    def _keep(self, raw: bytes) -> tuple[int, int]:
        key = hashlib.sha256(raw).digest()
        if key not in self._parts:
            self._parts[key] = (self._size, self._size + len(raw))
            self._pool.append(raw)
            self._size += len(raw)
        return self._parts[key]


def _column_parts(series: pd.Series[Any]) -> list[tuple[str, str, bool, int, bytes]]:
    """(part, dtype, ordered, length, bytes) of a column."""
    import pandas as pd

    n, values = len(series), series.array
    if isinstance(values, pd.Categorical):
        labels = _column_parts(pd.Series(values.categories.to_numpy()))
        if len(labels) != 1:
            raise TypeError("its categories have missing values")
        _, dtype, _, n_labels, raw = labels[0]
        codes = np.asarray(values.codes).astype("<i4").tobytes()
        ordered = bool(values.ordered)
        return [("codes", "<i4", ordered, n, codes), ("categories", dtype, ordered, n_labels, raw)]
    missing = np.asarray(series.isna())
    if isinstance(values, (pd.arrays.IntegerArray, pd.arrays.BooleanArray, pd.arrays.FloatingArray)):
        own: np.dtype[Any] = getattr(values.dtype, "numpy_dtype")  # noqa: B009
        filled = values.to_numpy(dtype=own, na_value=own.type(0))
        little = filled.astype(filled.dtype.newbyteorder("<"))
        return [("values", little.dtype.str, False, n, little.tobytes()), ("mask", "|b1", False, n, missing.tobytes())]
    plain = series.to_numpy()
    if plain.dtype.kind in "biuf":
        little = plain.astype(plain.dtype.newbyteorder("<"))
        return [("values", little.dtype.str, False, n, little.tobytes())]
    texts = plain.tolist()
    if missing.any():
        texts = ["" if gone else text for text, gone in zip(texts, missing.tolist(), strict=True)]
    wrong = [text for text in texts if not isinstance(text, str)]
    if wrong:
        raise TypeError(f"values such as {wrong[0]!r} are neither numbers nor text")
    joined = "".join(texts)
    lengths = map(len, texts if joined.isascii() else [text.encode() for text in texts])
    offsets = np.zeros(n + 1, "<i8")
    np.cumsum(np.fromiter(lengths, np.int64, n), out=offsets[1:])
    parts = [("values", STRING, False, n, offsets.tobytes() + joined.encode())]
    return [*parts, ("mask", "|b1", False, n, missing.tobytes())] if missing.any() else parts


def unpack_table(
    directory: Mapping[str, Any], pool: npt.NDArray[np.uint8], number: int, length: int, index_name: str
) -> pd.DataFrame:
    """Table `number` as it was added.

    Raises
    ------
    CorruptStoreError
        The directory points outside the pool, or parts have other lengths than the table.
    """
    import pandas as pd

    columns: dict[str, dict[str, Any]] = {}
    for k in np.flatnonzero(np.asarray(directory["table"]) == number).tolist():
        start, stop = int(directory["start"][k]), int(directory["stop"][k])
        if not 0 <= start <= stop <= len(pool):
            raise CorruptStoreError(f"var table {number} points outside its pool of {len(pool)} bytes")
        part = str(directory["part"][k])
        count = int(directory["length"][k])
        if part != "categories" and count != length:
            raise CorruptStoreError(f"var table {number} has a column of {count} entries, expected {length}")
        found = columns.setdefault(str(directory["column"][k]), {})
        found[part] = _part(pool[start:stop].tobytes(), str(directory["encoding"][k]), count, number)
        found["ordered"] = bool(directory["ordered"][k])
    if INDEX_COLUMN not in columns:
        raise CorruptStoreError(f"var table {number} has no index")
    arrays = {name: _column(parts, number) for name, parts in columns.items()}
    index = pd.Index(arrays.pop(INDEX_COLUMN), name=index_name or None)
    return pd.DataFrame(arrays, index=index)


def _part(raw: bytes, dtype: str, count: int, number: int) -> npt.NDArray[Any]:
    try:
        if dtype != STRING:
            if np.dtype(dtype).kind not in "biuf":
                raise ValueError(f"dtype {dtype!r}")
            values = np.frombuffer(raw, dtype)
            values = values.astype(values.dtype.newbyteorder("="))
        else:
            values = _texts(raw, count)
    except (ValueError, TypeError, IndexError, UnicodeError) as error:
        raise CorruptStoreError(f"var table {number} does not decode: {error}") from error
    if len(values) != count:
        raise CorruptStoreError(f"var table {number} has a part of {len(values)} entries, expected {count}")
    return values


def _texts(raw: bytes, length: int) -> npt.NDArray[Any]:
    offsets = np.frombuffer(raw, "<i8", count=length + 1)
    body = raw[8 * (length + 1) :]
    if offsets[0] != 0 or offsets[-1] != len(body) or (np.diff(offsets) < 0).any():
        raise ValueError("text offsets run backwards")
    texts = np.empty(length, object)
    texts[:] = [body[a:b].decode() for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]
    return texts


def _column(parts: dict[str, Any], number: int) -> Any:
    import pandas as pd

    try:
        if "codes" in parts:
            return pd.Categorical.from_codes(parts["codes"], categories=pd.Index(parts["categories"]), ordered=parts["ordered"])
        values, mask = parts["values"], parts.get("mask")
        if mask is None:
            return values
        if values.dtype.kind == "b":
            return pd.arrays.BooleanArray(values, mask)
        if values.dtype.kind in "iu":
            return pd.arrays.IntegerArray(values, mask)
        if values.dtype.kind == "f":
            return pd.arrays.FloatingArray(values, mask)
        values[mask] = None
        return values
    except (KeyError, ValueError, TypeError) as error:
        raise CorruptStoreError(f"var table {number} does not decode: {error}") from error
