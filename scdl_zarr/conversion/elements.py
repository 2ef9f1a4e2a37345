"""Tables and small arrays as Zarr objects, in AnnData's encodings.

Written here rather than by anndata so that the bytes of a store do not depend on which anndata is installed, chunks are those of
the format, and every chunk carries a crc32c like the matrices' do.  The objects are made in memory: what is written when is the
commit's business.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np
import numpy.typing as npt
from numcodecs.vlen import VLenUTF8
from numcodecs.zstd import Zstd

from scdl_zarr.errors import SourceError
from scdl_zarr.storage.schema import group_node, is_storable_name

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["EncodedColumn", "EncodedElements", "INDEX", "LEVEL", "encode_column", "encode_rows", "frame_group"]

CHUNK_ROWS = 1 << 16
SHARD_ROWS = 1 << 22
LEVEL = 3  # of zstd
INDEX = "_index"


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedColumn:
    """One column in the encoding that AnnData has for it: its groups, and its arrays as long as the column.

    ``categories`` are a column of their own, of another length.
    """

    groups: dict[str, dict[str, Any]]
    arrays: dict[str, npt.NDArray[Any]]  # by path: numbers, or objects that are texts
    categories: Any = None


def encode_column(path: str, values: Any, *, missing: bool | None = None) -> EncodedColumn:
    """One column; a kind that AnnData cannot hold is a :class:`SourceError`.

    Parameters
    ----------
    values
        An array of pandas or NumPy.
    missing
        Whether texts are missing in the column that `values` are rows of; by default `values` are all of it.
    """
    import pandas as pd

    if isinstance(values, pd.Categorical):
        groups = {path: group_node("categorical", "0.2.0", ordered=bool(values.ordered))}
        arrays = {f"{path}/codes": np.asarray(values.codes)}
        return EncodedColumn(groups=groups, arrays=arrays, categories=values.categories.array)
    if isinstance(values, (pd.arrays.IntegerArray, pd.arrays.BooleanArray)):
        kind = "boolean" if isinstance(values, pd.arrays.BooleanArray) else "integer"
        dtype = _numpy_dtype(values)
        filled = values.to_numpy(dtype=dtype, na_value=dtype.type(0))
        arrays = {f"{path}/values": filled, f"{path}/mask": np.asarray(values.isna())}
        return EncodedColumn(groups={path: group_node(f"nullable-{kind}")}, arrays=arrays)
    if isinstance(values, pd.arrays.FloatingArray):
        return EncodedColumn(groups={}, arrays={path: values.to_numpy(dtype=_numpy_dtype(values), na_value=np.nan)})
    plain = np.asarray(values)
    if plain.dtype.kind in "biuf":
        return EncodedColumn(groups={}, arrays={path: plain})
    return _encode_texts(path, values, missing)


def _encode_texts(path: str, values: Any, missing: bool | None) -> EncodedColumn:
    import pandas as pd

    texts = np.asarray(values, dtype=object)
    absent = np.asarray(pd.isna(texts))
    present = texts[~absent].tolist()
    if not set(map(type, present)) <= {str} and (wrong := [text for text in present if not isinstance(text, str)]):
        raise SourceError(f"{path} holds {wrong[0]!r} ({type(wrong[0]).__name__}); numbers, text and categories can be stored")
    if not (absent.any() if missing is None else missing):
        return EncodedColumn(groups={}, arrays={path: texts})
    # pandas has two kinds of missing text; newer anndata tells them apart by this attribute, older ones do not look
    nan = isinstance(getattr(values, "dtype", None), pd.StringDtype) and values.dtype.na_value is np.nan
    groups = {path: group_node("nullable-string-array", **{"na-value": "NaN" if nan else "NA"})}
    return EncodedColumn(groups=groups, arrays={f"{path}/values": np.where(absent, "", texts), f"{path}/mask": absent})


def frame_group(path: str, names: list[str], index_name: str | None, *, same: bool) -> tuple[dict[str, Any], str | None]:
    """The document of a dataframe, and what its index is stored as: None where a column serves as both.

    `same` says that the column which has the index's name has its content, too; it then serves as both, as in AnnData.
    """
    for name in names:
        if not is_storable_name(name) or name == INDEX:
            raise SourceError(f"a column of {path} is named {name!r}, which no AnnData store can hold; rename it")
    index = INDEX if index_name is None else str(index_name)
    if (index in names and not same) or not is_storable_name(index):
        index = INDEX
    return group_node("dataframe", "0.2.0", **{INDEX: index, "column-order": names}), None if index in names else index


def encode_rows(values: npt.NDArray[Any], length: int) -> bytes:
    """One chunk of an array, filled up to `length` rows: the bytes that zarr-python gives for the codecs of our arrays."""
    if len(values) < length:
        fill: Any = "" if values.dtype == object else values.dtype.type(0)
        rest = np.full((length - len(values), *values.shape[1:]), fill, values.dtype)
        values = np.concatenate([values, rest])
    is_text = values.dtype == object
    raw = VLenUTF8().encode(values) if is_text else np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    content: bytes = Zstd(level=LEVEL).encode(raw)
    check: bytes = google_crc32c.value(content).to_bytes(4, "little")
    return content + check


class EncodedElements:
    """AnnData elements encoded as Zarr v3: metadata documents by path, and the objects that hold chunks."""

    def __init__(self) -> None:
        import zarr
        from zarr.storage import MemoryStore

        self._objects: dict[str, Any] = {}
        self._root = zarr.open_group(MemoryStore(self._objects), mode="w", zarr_format=3)
        self._groups: dict[str, dict[str, Any]] = {}

    def add_frame(self, path: str, frame: pd.DataFrame) -> None:
        """A dataframe: its index, and each column in the encoding that AnnData has for it."""
        names = [str(column) for column in frame.columns]
        name = INDEX if frame.index.name is None else str(frame.index.name)
        same = name in names and list(frame.index) == list(frame.iloc[:, names.index(name)])
        self._groups[path], index = frame_group(path, names, frame.index.name, same=same)
        for position, name in enumerate(names):
            self.add_column(f"{path}/{name}", frame.iloc[:, position].array)
        if index is not None:
            self.add_column(f"{path}/{index}", frame.index.to_series().array)

    def add_group(self, path: str, node: dict[str, Any]) -> None:
        """The document of a group."""
        self._groups[path] = node

    def add_column(self, path: str, values: Any, *, n_rows: int | None = None) -> None:
        """One column; a kind that AnnData cannot hold is a :class:`SourceError`.

        With `n_rows` it is that long, its rows are written elsewhere, and `values` are a few that have all of its kinds.
        """
        column = encode_column(path, values)
        self._groups |= column.groups
        for place, array in column.arrays.items():
            self.add_array(place, array, n_rows=n_rows)
        if column.categories is not None:
            self.add_column(f"{path}/categories", column.categories)

    def add_array(self, path: str, values: npt.NDArray[Any], *, n_rows: int | None = None) -> None:
        """An array of numbers (of any number of dimensions, chunked by rows) or of texts; `n_rows` as for a column."""
        from zarr.codecs import Crc32cCodec, ZstdCodec

        length = len(values) if n_rows is None else n_rows
        small = length <= CHUNK_ROWS
        values, dtype, encoding = _storable(path, values)
        array = self._root.create_array(
            path,
            shape=(length, *values.shape[1:]),
            dtype=dtype,
            chunks=(min(max(length, 1), CHUNK_ROWS), *(max(n, 1) for n in values.shape[1:])),
            shards=None if small else (SHARD_ROWS, *(max(n, 1) for n in values.shape[1:])),
            compressors=[ZstdCodec(level=LEVEL), Crc32cCodec()],
            attributes={"encoding-type": encoding, "encoding-version": "0.2.0"},
            config={"write_empty_chunks": True},
        )
        if n_rows is None and values.size:
            array[...] = values

    def nodes(self) -> dict[str, dict[str, Any]]:
        """Metadata documents of everything that was added, by path (groups above it are not among them)."""
        suffix = "/zarr.json"
        documents = {
            key.removesuffix(suffix): json.loads(value.to_bytes()) for key, value in self._objects.items() if key.endswith(suffix)
        }
        return {path: node for path, node in documents.items() if node["node_type"] == "array"} | self._groups

    def objects(self) -> dict[str, bytes]:
        """The chunks: object key to bytes."""
        return {key: value.to_bytes() for key, value in self._objects.items() if not key.endswith("zarr.json")}


def _storable(path: str, values: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], Any, str]:
    """The array in this machine's byte order, Zarr's dtype for it, and AnnData's name for its encoding."""
    if values.dtype == object:
        return values, np.dtypes.StringDType(), "string-array"
    if values.dtype.kind not in "biuf" or values.dtype.itemsize > 8:
        raise SourceError(f"{path} has dtype {values.dtype}; integers, floats and booleans of up to 8 bytes can be stored")
    native = values.astype(values.dtype.newbyteorder("="), copy=False)
    return native, native.dtype, "array"


def _numpy_dtype(values: Any) -> np.dtype[Any]:
    """NumPy's dtype behind one of pandas' nullable arrays."""
    dtype: np.dtype[Any] = np.dtype(values.dtype.numpy_dtype)
    return dtype
