"""Where the bytes of a chunk are: the shard files of one array, mapped when they are first touched.

A shard file is its chunks followed by its index::

    | chunk | chunk | ...            | offset,length  offset,length ... | crc32c |
    0                                data_end = size - 16 * chunks_per_shard - 4

The index's checksum is verified when the shard is mapped; single entries are checked against ``data_end`` by the kernels each
time they are used, so that nothing from the file becomes an address unseen.
"""

from __future__ import annotations

import os
from pathlib import Path

import google_crc32c
import numpy as np
import numpy.typing as npt

from scdl_zarr.errors import CorruptStoreError, StoreAccessError
from scdl_zarr.storage.mapping import MappedFile
from scdl_zarr.storage.schema import ArrayLayout

__all__ = ["MappedShard", "MappedShards"]

LARGEST_MAPPINGS = 16_384  # per array; a Linux process may hold 65,530 in all


class MappedShard:
    """One mapped shard.

    Attributes
    ----------
    address, data_end : int
        Where its first byte is, and how many bytes lie before the index.
    verified : uint8 array
        A bit per chunk: set once the chunk's checksum was found right (under ``check="first"``).
    """

    __slots__ = ("_file", "address", "data_end", "path", "verified", "verified_address")

    def __init__(self, path: str, layout: ArrayLayout) -> None:
        self.path = path
        try:
            self._file = MappedFile(path)
        except FileNotFoundError:
            raise CorruptStoreError(f"{path} is missing: the store has lost a shard") from None
        except PermissionError as error:
            raise StoreAccessError(f"{path} cannot be read: {error.strerror}") from None
        size, index_bytes = self._file.size, layout.index_bytes
        if size < index_bytes:
            raise CorruptStoreError(
                f"{path} has {size} bytes, fewer than its index of {index_bytes}: the file is truncated or not a shard"
            )
        index = self._file.bytes(size - index_bytes, size)
        if google_crc32c.value(index[:-4]) != int.from_bytes(index[-4:], "little"):
            raise CorruptStoreError(f"{path}: the shard's index does not match its checksum (truncated or damaged file)")
        self.address = self._file.address
        self.data_end = size - index_bytes
        self.verified: npt.NDArray[np.uint8] = np.zeros(-(-layout.chunks_per_shard // 8), np.uint8)
        self.verified_address = self.verified.ctypes.data

    def check_size(self) -> None:
        """Refuse a file that was truncated under the mapping (reading past its end would kill the process)."""
        if self._file.truncated(self.path):
            raise CorruptStoreError(f"{self.path} was truncated while it was open; reopen the store after restoring it")

    def index(self, layout: ArrayLayout) -> npt.NDArray[np.uint64]:
        """A copy of the index: shape (chunks_per_shard, 2), uint64, offset and length."""
        raw = self._file.bytes(self.data_end, self._file.size - 4)
        return np.frombuffer(raw, "<u8").reshape(layout.chunks_per_shard, 2)


class MappedShards:
    """The mapped shards of one array, least recently used dropped first.

    Works without a lock, because a lock held by another thread during a fork would stay locked in the child: each step on the
    dictionary is atomic, and the worst a race costs is a shard mapped twice.
    """

    def __init__(self, root: Path, layout: ArrayLayout, largest: int = LARGEST_MAPPINGS) -> None:
        self.layout = layout
        self._folder = os.path.join(os.fspath(root), *layout.path.split("/"), "c")
        self._largest = largest
        self._mapped: dict[int, MappedShard] = {}

    def __len__(self) -> int:
        return len(self._mapped)

    def shard(self, number: int) -> MappedShard:
        """Shard `number`, mapped now if it was not; a known one has its file's size rechecked."""
        found = self._mapped.pop(number, None)
        if found is None:
            found = MappedShard(os.path.join(self._folder, str(number)), self.layout)
        else:
            found.check_size()
        self._mapped[number] = found  # the youngest is last
        while len(self._mapped) > self._largest:
            try:
                self._mapped.pop(next(iter(self._mapped)), None)
            except (StopIteration, RuntimeError):  # another thread changed the dictionary: its turn to shrink it
                break
        return found
