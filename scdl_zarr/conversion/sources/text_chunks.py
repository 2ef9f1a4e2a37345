# mypy: allow-untyped-decorators
"""The texts of a column of a store of ours, taken from its chunks as bytes: rows from anywhere without a Python text for each.

::

    chunk, inflated:   n │ length │ bytes │ length │ bytes │ ...        lengths and n are 4 bytes each, little-endian

Only arrays encoded as we encode them (``elements.py``) are read here; whoever finds another one reads it through zarr-python.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import numba as nb
import numpy as np
import numpy.typing as npt
from numcodecs.zstd import Zstd

from scdl_zarr.errors import CorruptStoreError
from scdl_zarr.reading.plan import Int64Array
from scdl_zarr.storage.location import StoreLocation

__all__ = ["TextChunks", "copy_texts"]

TEXT_CODECS = [{"name": "vlen-utf8"}, {"name": "zstd"}, {"name": "crc32c"}]
INDEX_CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
PLACE = 16  # bytes of a shard's index for each chunk: offset and length
MISSING = 2**64 - 1
CHECK = 4  # of a crc32c
TOO_SHORT, NOT_ALL = -1, -2  # what is wrong with a chunk


class TextChunks:
    """An array of texts in a local store, a chunk at a time."""

    def __init__(self, folder: Path, n_rows: int, chunk_rows: int, shard_rows: int) -> None:
        self._folder, self._n_rows = folder, n_rows
        self.chunk_rows = chunk_rows
        self._per_shard = shard_rows // chunk_rows
        self._index: tuple[int, npt.NDArray[np.uint64], int] | None = None  # of the shard used last, and where its chunks end

    @classmethod
    def of(cls, location: StoreLocation, path: str, node: Mapping[str, Any] | None) -> TextChunks | None:
        """None where the array is not one of those that are read here."""
        if (
            location.path is None
            or not node
            or node.get("data_type") != "string"
            or node.get("storage_transformers")
            or node.get("fill_value") != ""
        ):
            return None
        try:
            (n_rows,), (outer,) = node["shape"], node["chunk_grid"]["configuration"]["chunk_shape"]
            codecs = node["codecs"]
            sharded = codecs[0]["name"] == "sharding_indexed"
            inner = codecs[0]["configuration"] if sharded else {"codecs": codecs, "chunk_shape": [outer]}
            (height,) = inner["chunk_shape"]
            usual = (
                [{"name": codec["name"]} for codec in inner["codecs"]] == TEXT_CODECS
                and (not sharded or (len(codecs), inner["index_codecs"], inner["index_location"]) == (1, INDEX_CODECS, "end"))
                and not node.get("storage_transformers")
                and node["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "/"}}
            )
        except (KeyError, TypeError, ValueError, IndexError):
            return None
        if not usual or not all(type(n) is int and n > 0 for n in (n_rows, outer, height)) or outer % height:
            return None
        return cls(location.path.joinpath(*path.split("/"), "c"), n_rows, height, outer if sharded else 0)

    def read(self, number: int) -> tuple[npt.NDArray[np.uint8], Int64Array, npt.NDArray[np.int32]]:
        """A chunk: its bytes, and where each text of it begins and how many bytes it has.

        Raises
        ------
        CorruptStoreError
            It is missing or damaged.
        """
        n = min(self.chunk_rows, self._n_rows - number * self.chunk_rows)
        path, raw = self._raw(number)
        if raw is None:
            return np.empty(0, np.uint8), np.zeros(n, np.int64), np.zeros(n, np.int32)
        if len(raw) < CHECK or google_crc32c.value(raw[:-CHECK]) != int.from_bytes(raw[-CHECK:], "little"):
            raise CorruptStoreError(f"{path}: chunk {number} does not match its checksum")
        try:
            content = np.frombuffer(Zstd().decode(raw[:-CHECK]), np.uint8)
        except (RuntimeError, ValueError) as error:
            raise CorruptStoreError(f"{path}: chunk {number} does not decode: {error}") from error
        starts, lengths = np.empty(n, np.int64), np.empty(n, np.int32)
        if find_texts(content, starts, lengths) < 0:
            raise CorruptStoreError(f"{path}: chunk {number} does not hold the texts that it should")
        return content, starts, lengths

    def _raw(self, number: int) -> tuple[Path, bytes | None]:
        """The file that a chunk is in, and its bytes; None of one that a shard has not, which is filled with empty texts."""
        shard = number // self._per_shard if self._per_shard else number
        path = self._folder / str(shard)
        try:
            with open(path, "rb") as file:
                if not self._per_shard:
                    return path, file.read()
                offset, length = self._place(file, path, shard, number % self._per_shard)
                if offset == length == MISSING:
                    return path, None
                file.seek(offset)
                return path, file.read(length)
        except OSError as error:
            raise CorruptStoreError(f"{path} cannot be read: {error.strerror}") from error

    def _place(self, file: Any, path: Path, shard: int, number: int) -> tuple[int, int]:
        if self._index is None or self._index[0] != shard:
            end = file.seek(0, 2) - PLACE * self._per_shard - CHECK
            if end < 0:
                raise CorruptStoreError(f"{path} is shorter than its index: the file is truncated or not a shard")
            file.seek(end)
            raw = file.read()
            if google_crc32c.value(raw[:-CHECK]) != int.from_bytes(raw[-CHECK:], "little"):
                raise CorruptStoreError(f"{path}: the shard's index does not match its checksum (truncated or damaged file)")
            self._index = shard, np.frombuffer(raw[:-CHECK], "<u8").reshape(-1, 2), end
        _, places, end = self._index
        offset, length = (int(n) for n in places[number])
        if offset + length > end and not offset == length == MISSING:
            raise CorruptStoreError(f"{path}: chunk {number} of the shard lies outside of it")
        return offset, length


@nb.njit(nogil=True, cache=True)
def find_texts(content: npt.NDArray[np.uint8], starts: Int64Array, lengths: npt.NDArray[np.int32]) -> int:
    """Where the first texts of a chunk are; TOO_SHORT where one does not lie in it, NOT_ALL where there are fewer."""
    size = len(content)
    if size < 4:
        return TOO_SHORT
    if number_at(content, 0) < len(starts):
        return NOT_ALL
    at = 4
    for k in range(len(starts)):
        if at + 4 > size:
            return TOO_SHORT
        length = number_at(content, at)
        at += 4
        if length > size - at or length > 0x7FFFFFFF:
            return TOO_SHORT
        starts[k], lengths[k] = at, length
        at += length
    return 0


@nb.njit(nogil=True, inline="always")
def number_at(content: npt.NDArray[np.uint8], at: int) -> Any:
    """Four bytes as a number."""
    return (
        np.int64(content[at]) | np.int64(content[at + 1]) << 8 | np.int64(content[at + 2]) << 16 | np.int64(content[at + 3]) << 24
    )


@nb.njit(nogil=True, cache=True)
def copy_texts(
    content: npt.NDArray[np.uint8], starts: Int64Array, lengths: npt.NDArray[np.int32], out: npt.NDArray[np.uint8]
) -> None:
    """Put these texts behind one another; `out` has as many bytes as they have."""
    k = 0
    for text in range(len(starts)):
        start = starts[text]
        for j in range(lengths[text]):
            out[k] = content[start + j]
            k += 1
