"""Tables and small arrays as Zarr objects, in AnnData's encodings.

Written here rather than by anndata so that the bytes of a store do not depend on which anndata is installed, chunks are those of
the format, and every chunk carries a crc32c like the matrices' do.  The objects are made in memory: what is written when is the
commit's business.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.errors import SourceError
from scdl_zarr.storage.schema import group_node

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["EncodedElements"]

CHUNK_ROWS = 1 << 16
SHARD_ROWS = 1 << 22
INDEX = "_index"


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
        for name in names:
            if not name or "/" in name or name in (".", "..", INDEX):
                raise SourceError(f"a column of {path} is named {name!r}, which no AnnData store can hold; rename it")
        index = str(frame.index.name) if frame.index.name is not None else INDEX
        same = index in names and list(frame.index) == list(frame.iloc[:, names.index(index)])
        if (index in names and not same) or not index or "/" in index or index in (".", ".."):
            index = INDEX
        self._groups[path] = group_node("dataframe", "0.2.0", **{INDEX: index, "column-order": names})
        for position, name in enumerate(names):
            self.add_column(f"{path}/{name}", frame.iloc[:, position].array)
        if index not in names:  # a column of the index's name and content serves as both, as in AnnData
            self.add_column(f"{path}/{index}", frame.index.to_series().array)

    def add_column(self, path: str, values: Any) -> None:
        """One column; a kind that AnnData cannot hold is a :class:`SourceError`."""
        import pandas as pd

        if isinstance(values, pd.Categorical):
            self._groups[path] = group_node("categorical", "0.2.0", ordered=bool(values.ordered))
            self._array(f"{path}/codes", np.asarray(values.codes))
            self.add_column(f"{path}/categories", values.categories.array)
        elif isinstance(values, (pd.arrays.IntegerArray, pd.arrays.BooleanArray)):
            kind = "boolean" if isinstance(values, pd.arrays.BooleanArray) else "integer"
            dtype = _numpy_dtype(values)
            self._groups[path] = group_node(f"nullable-{kind}")
            self._array(f"{path}/values", values.to_numpy(dtype=dtype, na_value=dtype.type(0)))
            self._array(f"{path}/mask", np.asarray(values.isna()))
        elif isinstance(values, pd.arrays.FloatingArray):
            self._array(path, values.to_numpy(dtype=_numpy_dtype(values), na_value=np.nan))
        else:
            self._plain_column(path, values)

    def _plain_column(self, path: str, values: Any) -> None:
        import pandas as pd

        plain = np.asarray(values)
        if plain.dtype.kind in "biuf":
            self._array(path, plain)
            return
        texts = np.asarray(values, dtype=object)
        missing = np.asarray(pd.isna(texts))
        wrong = [text for text in texts[~missing] if not isinstance(text, str)]
        if wrong:
            raise SourceError(
                f"{path} holds {wrong[0]!r} ({type(wrong[0]).__name__}); numbers, text and categories can be stored"
            )
        if missing.any():
            # pandas has two kinds of missing text; newer anndata tells them apart by this attribute, older ones do not look
            nan = isinstance(getattr(values, "dtype", None), pd.StringDtype) and values.dtype.na_value is np.nan
            self._groups[path] = group_node("nullable-string-array", **{"na-value": "NaN" if nan else "NA"})
            self._strings(f"{path}/values", np.where(missing, "", texts))
            self._array(f"{path}/mask", missing)
        else:
            self._strings(path, texts)

    def add_array(self, path: str, values: npt.NDArray[Any]) -> None:
        """A dense numeric array of any number of dimensions, chunked by rows."""
        self._array(path, values)

    def _array(self, path: str, values: npt.NDArray[Any]) -> None:
        if values.dtype.kind not in "biuf" or values.dtype.itemsize > 8:
            raise SourceError(f"{path} has dtype {values.dtype}; integers, floats and booleans of up to 8 bytes can be stored")
        native = values.astype(values.dtype.newbyteorder("="), copy=False)
        self._create(path, native, native.dtype, "array")

    def _strings(self, path: str, texts: npt.NDArray[Any]) -> None:
        self._create(path, texts, np.dtypes.StringDType(), "string-array")

    def _create(self, path: str, values: npt.NDArray[Any], dtype: Any, encoding: str) -> None:
        from zarr.codecs import Crc32cCodec, ZstdCodec

        rows = max(len(values), 1)
        small = rows <= CHUNK_ROWS
        array = self._root.create_array(
            path,
            shape=values.shape,
            dtype=dtype,
            chunks=(min(rows, CHUNK_ROWS), *(max(n, 1) for n in values.shape[1:])),
            shards=None if small else (SHARD_ROWS, *(max(n, 1) for n in values.shape[1:])),
            compressors=[ZstdCodec(level=3), Crc32cCodec()],
            attributes={"encoding-type": encoding, "encoding-version": "0.2.0"},
            config={"write_empty_chunks": True},
        )
        if values.size:
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


def _numpy_dtype(values: Any) -> np.dtype[Any]:
    """NumPy's dtype behind one of pandas' nullable arrays."""
    dtype: np.dtype[Any] = np.dtype(values.dtype.numpy_dtype)
    return dtype
