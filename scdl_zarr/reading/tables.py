"""obs and var as lazy tables: a column is read when it is asked for.

The encodings are AnnData's (array, string-array, categorical, nullable-*), decoded here from zarr arrays so that reading a
column never imports anndata.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt

from scdl_zarr.errors import CorruptStoreError, FeatureNameError, NotAStoreError, OptionError, ScdlZarrError
from scdl_zarr.reading.first_use import FIRST_USE
from scdl_zarr.reading.plan import resolve_rows
from scdl_zarr.reading.zarr_arrays import open_part
from scdl_zarr.storage.foreign import dtype_name, needs_pickle
from scdl_zarr.storage.metadata import node_attributes

if TYPE_CHECKING:
    import pandas as pd

    from scdl_zarr.reading.row_ranges import ElementRows
    from scdl_zarr.storage.location import StoreLocation

__all__ = [
    "LazyTable",
    "arrays_of",
    "decode_element",
    "decode_old_categories",
    "nullable_values",
    "read_element",
    "refuse_pickles",
    "require_objects",
    "text_values",
]

COLUMN_PARTS = {  # of the encodings that are groups: the arrays as long as the table
    "categorical": ("codes",),
    "nullable-boolean": ("values", "mask"),
    "nullable-integer": ("values", "mask"),
    "nullable-string-array": ("values", "mask"),
}
SELECTIONS = "expected a column name, a list of names, a row number, a slice, row numbers or a boolean mask"


class LazyTable:
    """A dataframe of the store, read column by column.

    Nothing is read but what is asked for; columns are kept once read.  Copies are handed out, so changing them changes
    neither the table nor the store.

    Examples
    --------
    >>> demo.obs.columns
    ['n_counts', 'n_genes']
    >>> demo.obs["n_genes"].head(2).tolist()
    [2631, 2549]
    >>> demo.obs[5:7].shape
    (2, 2)
    >>> demo.obs[demo.obs["n_genes"] > 2500].shape
    (158, 2)
    """

    def __init__(
        self, location: StoreLocation, path: str, nodes: Mapping[str, Mapping[str, Any]], length: int, *, whole: bool = True
    ) -> None:
        attributes = node_attributes(nodes, path)
        columns, index = attributes.get("column-order"), attributes.get("_index")
        if attributes.get("encoding-type") != "dataframe" or not isinstance(columns, list) or not isinstance(index, str):
            raise CorruptStoreError(f"{location}: {path} is not an AnnData dataframe")
        missing = [name for name in (*columns, index) if not isinstance(name, str) or f"{path}/{name}" not in nodes]
        if missing:
            raise CorruptStoreError(f"{location}: {path} lists columns that are not there: {missing}")
        self._location = location
        self._path = path
        self._nodes = nodes
        self._length = length
        self._whole = whole
        self._columns = [str(name) for name in columns]
        self._index_name = index
        self._kept: dict[str, Any] = {}

    # ---- what it holds

    @property
    def columns(self) -> list[str]:
        """Names of the columns, in order (the index is not among them)."""
        return list(self._columns)

    @property
    def shape(self) -> tuple[int, int]:
        return self._length, len(self._columns)

    @property
    def names(self) -> pd.Index:
        """The index: gene names of ``var``, cell names of ``obs``."""
        import pandas as pd

        names: pd.Index = pd.Index(self._values(self._index_name), name=self.index_name, copy=True)
        return names

    @property
    def index(self) -> pd.Index:
        """The same as :attr:`names`, under pandas' word."""
        return self.names

    def encoding(self, column: str) -> str:
        """How a column is stored: ``"array (float32)"``, ``"categorical"``, ``"string-array"``, ..."""
        self._require(column)
        node = self._nodes[f"{self._path}/{column}"]
        attributes = node_attributes(self._nodes, f"{self._path}/{column}")
        kind = str(attributes.get("encoding-type", "categorical" if "categories" in attributes else "array"))
        return f"array ({dtype_name(node)})" if kind == "array" else kind

    def __len__(self) -> int:
        return self._length

    def __contains__(self, column: object) -> bool:
        return column in self._columns

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __repr__(self) -> str:
        lines = [f"LazyTable {self._path}: {self._length} rows × {len(self._columns)} columns"]
        lines += [f"    {name}: {self.encoding(name)}" for name in self._columns]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{html.escape(self.encoding(name))}</td></tr>" for name in self._columns
        )
        title = f"{html.escape(self._path)}: {self._length} rows × {len(self._columns)} columns"
        return f"<table><caption>{title}</caption><tr><th>column</th><th>stored as</th></tr>{rows}</table>"

    # ---- reading

    @overload
    def __getitem__(self, key: str) -> pd.Series[Any]: ...
    @overload
    def __getitem__(self, key: int | np.integer[Any]) -> pd.Series[Any]: ...
    @overload
    def __getitem__(
        self, key: list[str] | list[int] | list[bool] | slice | npt.NDArray[Any] | pd.Series[Any] | pd.Index
    ) -> pd.DataFrame: ...
    def __getitem__(self, key: Any) -> pd.Series[Any] | pd.DataFrame:
        """Columns by name, or rows by what selects rows.

        ========================================  ====================================================================
        a column's name                           that column, a Series over row numbers
        a list or array of names                  those columns, a DataFrame over row numbers
        an int                                    that row, a Series
        a slice; a list or array of row numbers;  those rows, a DataFrame of all columns, indexed by the names; an empty
        a boolean mask (array or Series)          list selects no rows
        ========================================  ====================================================================

        Rows carry the names as pandas does; a column does not, because the names of a hundred million cells cost more than the
        column.  Rows are selected by position, as in ``read_rows``, whatever the index of a Series says; all columns are read.

        Raises
        ------
        FeatureNameError
            There is no such column.
        RowIndexError
            A row is out of range.
        OptionError
            Anything else, also a mask of another length.
        """
        import pandas as pd

        if isinstance(key, str):
            self._require(key)
            return pd.Series(self._values(key), name=key, copy=True)
        if isinstance(key, (int, np.integer)) and not isinstance(key, bool):
            return self.to_pandas().iloc[int(resolve_rows(key, self._length)[0])]
        if not isinstance(key, slice) and (isinstance(key, tuple) or not hasattr(key, "__len__")):
            raise OptionError(f"{self._path}[{key!r}]: {SELECTIONS}")
        if not isinstance(key, slice) and len(key) and all(isinstance(name, str) for name in key):
            return pd.DataFrame({str(name): self[str(name)] for name in key}, copy=False)
        try:
            rows = resolve_rows(key, self._length)
        except OptionError as error:
            raise OptionError(f"{self._path}[...]: {error}") from None
        return self.to_pandas().iloc[rows]

    def head(self, n: int = 5) -> pd.DataFrame:
        """The first `n` rows of all columns."""
        return self.to_pandas().iloc[:n]

    def to_pandas(self, columns: list[str] | None = None) -> pd.DataFrame:
        """The table (or some columns of it) as a DataFrame indexed by the names, as AnnData has it."""
        import pandas as pd

        chosen = self._columns if columns is None else columns
        frame = pd.DataFrame(index=self.names) if not chosen else pd.DataFrame({name: self[name] for name in chosen})
        frame.index = self.names
        return frame

    def lookup(self, name: str) -> Any:
        """The raw values of a column or, under its own name, of the index (an array; do not change it)."""
        if name not in self._columns and name not in (self._index_name, f"{self._path}_names", f"{self._path}_feature_id"):
            self._require(name)
        return self._values(name if name in self._columns else self._index_name)

    @property
    def index_name(self) -> str | None:
        """What the index is called; None where it has no name of its own."""
        return None if self._index_name == "_index" else self._index_name

    def open_column(self, column: str | None) -> ElementRows:
        """A column (None: the index) opened to be read by ranges of rows; nothing of it is kept here."""
        from scdl_zarr.reading.row_ranges import ElementRows

        path = f"{self._path}/{self._index_name if column is None else column}"
        self._require_readable(path)
        return ElementRows(self._location, path, self._nodes, whole=self._whole)

    def _require(self, column: str) -> None:
        if column not in self._columns:
            raise FeatureNameError(
                f"{self._path} of {self._location} has no column {column!r}; it has: {', '.join(self._columns) or 'none'}"
            )

    def _values(self, column: str) -> Any:
        found = self._kept.get(column)
        if found is None:
            path = f"{self._path}/{column}"
            self._require_readable(path)
            found = read_element(self._location, path, self._nodes, whole=self._whole)
            self._kept[column] = found
        return found

    def _require_readable(self, path: str) -> None:
        refuse_pickles(self._location, {at: node for at, node in self._nodes.items() if f"{at}/".startswith(f"{path}/")})
        self._require_length(path)

    def _require_length(self, path: str) -> None:
        """A column has a value for each row: so its documents say, before memory is taken for what they claim."""
        kind = node_attributes(self._nodes, path).get("encoding-type", "array")
        if self._nodes[path].get("node_type") == "array":
            parts = [path]
        else:
            parts = [f"{path}/{part}" for part in COLUMN_PARTS.get(kind if isinstance(kind, str) else "", ())]
        for part in parts:
            node = self._nodes.get(part) or {}
            if _is_structured(node) or node.get("shape") != [self._length]:
                what = "records" if _is_structured(node) else f"shape {node.get('shape')!r}"
                raise CorruptStoreError(f"{self._location}: {part} has {what}, expected a value for each of {self._length} rows")
        if not parts:
            raise CorruptStoreError(f"{self._location}: {path} is stored as {kind!r}, which is no column of a table")


def read_element(location: StoreLocation, path: str, nodes: Mapping[str, Mapping[str, Any]], *, whole: bool = True) -> Any:
    """One AnnData element (a column, an array) as numpy or pandas values.

    Parameters
    ----------
    nodes
        The metadata documents of the store by path: only those of the element are looked at.
    whole
        Whether the writer left out no chunk, so that one that is not there is damage (as in every store of ours).  Otherwise it
        equals the fill value, as Zarr has it.

    Raises
    ------
    CorruptStoreError
        A chunk does not match its checksum or does not decode, or the parts of the element contradict each other.
    NotAStoreError
        The element is stored in pickles: they are never opened, because they run whatever code they hold.
    StoreReplacedError
        Another store has taken its place since it was opened.
    """
    try:
        return _read_element(location, path, nodes, whole)
    finally:
        location.require_same()


def _read_element(location: StoreLocation, path: str, nodes: Mapping[str, Mapping[str, Any]], whole: bool) -> Any:
    try:
        with FIRST_USE:
            root = open_part(location, path, nodes)
            element = root[path]
            arrays = list(arrays_of(element))
            refuse_pickles(location, {array.path: array.metadata.to_dict() for array in arrays})
            for array in arrays if whole else ():
                require_objects(location, array)
            if "categories" in element.attrs and hasattr(element, "chunks"):
                return decode_old_categorical(location, nodes, element, path)
            return decode_element(element)
    except ScdlZarrError:
        raise
    except Exception as error:  # zarr, numcodecs, pandas and anndata have errors of many kinds for bytes that make no sense
        raise CorruptStoreError(f"{location}: {path} cannot be read: {error}") from error


def _is_structured(node: Mapping[str, Any]) -> bool:
    """Whether an array's elements have fields."""
    return isinstance(node.get("dtype"), list) or dtype_name(node) in ("struct", "structured")


def refuse_pickles(location: StoreLocation, nodes: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse before anything is read: an object array in pickles runs whatever code it holds."""
    for path, node in nodes.items():
        if needs_pickle(node):
            raise NotAStoreError(f"{location}: {path} is stored in pickles, which are never opened")


def arrays_of(element: Any) -> Iterator[Any]:
    """The arrays that an element is made of."""
    if hasattr(element, "chunks"):
        yield element
    else:
        for _, part in element.members():
            yield from arrays_of(part)


def require_objects(location: StoreLocation, array: Any) -> None:
    """Refuse an array of which a chunk is gone: zarr would make up fill values, and the writer left none out."""
    pieces = array.shards or array.chunks
    counts = [range(-(-n // size)) for n, size in zip(array.shape, pieces, strict=True)]
    for place in itertools.product(*counts):
        key = "/".join(map(str, (array.path, "c", *place)))
        if not location.exists(key):
            raise CorruptStoreError(f"{location}: {key} is missing: the store has lost a part")


def decode_old_categorical(location: StoreLocation, nodes: Mapping[str, Mapping[str, Any]], codes: Any, path: str) -> Any:
    """A categorical of anndata 0.7: codes with an attribute that names the array of categories in the same table."""
    import pandas as pd

    categories, ordered = decode_old_categories(location, nodes, codes, path)
    return pd.Categorical.from_codes(np.asarray(codes[...]), categories=categories, ordered=ordered)


def decode_old_categories(
    location: StoreLocation, nodes: Mapping[str, Mapping[str, Any]], codes: Any, path: str
) -> tuple[Any, bool]:
    """The categories that the codes of an anndata 0.7 column name, and whether they are ordered."""
    name = str(codes.attrs["categories"])
    table = path.split("/")[0]
    if not name.startswith("__categories/") or ".." in name:
        raise CorruptStoreError(f"{location}: {path} has its categories at {name!r}, expected a place in __categories")
    categories = read_element(location, f"{table}/{name}", nodes, whole=False)
    return categories, bool(node_attributes(nodes, f"{table}/{name}").get("ordered", False))


def decode_element(element: Any) -> Any:
    import pandas as pd

    kind = element.attrs.get("encoding-type", "array")
    if kind == "array":
        return np.asarray(element[...])
    if kind == "string-array":
        return text_values(element[...])
    if kind == "categorical":
        codes = np.asarray(element["codes"][...])
        return pd.Categorical.from_codes(
            codes, categories=decode_element(element["categories"]), ordered=bool(element.attrs.get("ordered", False))
        )
    if kind in ("nullable-integer", "nullable-boolean", "nullable-string-array"):
        return nullable_values(kind, np.asarray(element["values"][...]), element["mask"][...])
    from anndata.io import read_elem

    return read_elem(element)


def nullable_values(kind: str, values: npt.NDArray[Any], mask: npt.NDArray[Any]) -> Any:
    """One of pandas' arrays that may miss values, of the parts that are stored."""
    import pandas as pd

    mask = np.asarray(mask, bool)
    if kind == "nullable-integer":
        return pd.arrays.IntegerArray(values, mask)
    if kind == "nullable-boolean":
        return pd.arrays.BooleanArray(np.asarray(values, bool), mask)
    texts = text_values(values)
    texts[mask] = pd.NA
    return pd.array(texts, dtype="string")


def text_values(values: Any) -> npt.NDArray[np.object_]:
    """Texts as Python's, in a new array."""
    return np.asarray(values).astype(object)
