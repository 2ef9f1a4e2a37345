"""Where the bytes of a chunk are: the shard files of one array, mapped when they are first touched.

A shard file is its chunks followed by its index::

    | chunk | chunk | ...            | offset,length  offset,length ... | crc32c |
    0                                data_end = size - 16 * chunks_per_shard - 4

The index's checksum is verified when the shard is mapped; single entries are checked against ``data_end`` by the kernels each
time they are used, so that nothing from the file becomes an address unseen.
"""

from __future__ import annotations

import os

import google_crc32c
import numpy as np
import numpy.typing as npt

from scdl_zarr.errors import CorruptStoreError, StoreAccessError
from scdl_zarr.storage.location import StoreLocation
from scdl_zarr.storage.mapping import MappedFile
from scdl_zarr.storage.schema import ArrayLayout

__all__ = ["LARGEST_TABLE", "MappedShard", "ShardTable", "shard_table"]

LARGEST_TABLE = 1 << 20  # shards of an array that a table is made for


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

    @property
    def watched(self) -> bool:
        return self._file.watched

    def check_size(self) -> None:
        """Refuse a file that was truncated under the mapping (reading past its end would kill the process)."""
        if self._file.truncated(self.path):
            raise CorruptStoreError(f"{self.path} was truncated while it was open; reopen the store after restoring it")

    def drop_pages(self) -> None:
        """Give back the memory of what was read; see :meth:`MappedFile.drop_pages`."""
        self._file.drop_pages()

    def index(self, layout: ArrayLayout) -> npt.NDArray[np.uint64]:
        """A copy of the index: shape (chunks_per_shard, 2), uint64, offset and length."""
        raw = self._file.bytes(self.data_end, self._file.size - 4)
        return np.frombuffer(raw, "<u8").reshape(layout.chunks_per_shard, 2)


class ShardTable:
    """Where the mapped shards of one array are, as arrays that compiled code can read.

    Shards are only ever added, so that an address that was read stays valid for as long as the table is held; what is to be
    unmapped is left out of a new table (:meth:`trimmed`).  Without a lock, because a lock held by another thread during a fork
    would stay locked in the child: the worst a race costs is a shard mapped twice.

    Attributes
    ----------
    addresses, ends, verified, stamps : int64 arrays, one entry a shard
        Address of its first byte (0: not mapped), bytes before its index, address of its bitmap of verified chunks, and when it
        was last used.
    unwatched : int64 array of one entry
        How many of them nobody watches, so that they have to be probed.
    """

    def __init__(self, folder: str, layout: ArrayLayout, location: StoreLocation) -> None:
        self._folder = folder
        self._layout = layout
        self._location = location
        self.addresses, self.ends, self.verified, self.stamps = np.zeros((4, max(layout.n_shards, 1)), np.int64)
        self.unwatched = np.zeros(1, np.int64)
        self._mapped: dict[int, MappedShard] = {}

    def __len__(self) -> int:
        return len(self._mapped)

    def map(self, number: int) -> None:
        """Map shard `number`, if it is not."""
        if self.addresses[number]:  # `_mapped` may know of it first, for ever if a fork came in between
            return
        try:
            shard = MappedShard(self.path(number), self._layout)
        finally:
            self._location.require_same()
        self._add(number, shard)

    def _add(self, number: int, shard: MappedShard) -> None:
        kept = self._mapped.setdefault(number, shard)  # another thread may have been faster: its mapping is the one in use
        self.ends[number] = kept.data_end
        self.verified[number] = kept.verified_address
        self.unwatched += not kept.watched
        self.addresses[number] = kept.address  # last: it says that the others are there

    def mean_chunk_bytes(self, number: int) -> float:
        """How many bytes a chunk of a shard takes, on average; maps the shard."""
        self.map(number)
        return float(self.ends[number]) / self._layout.chunks_in_shard(number)

    def path(self, number: int) -> str:
        return os.path.join(self._folder, str(number))

    def check_sizes(self, numbers: npt.NDArray[np.int64]) -> None:
        """Refuse files that were truncated under their mapping, where the system has no cheaper way to tell."""
        for number in numbers.tolist():
            shard = self._mapped.get(number)
            if shard is not None:
                shard.check_size()

    def drop_pages(self) -> None:
        """Give back the memory of what was read; all shards stay mapped."""
        for shard in list(self._mapped.values()):
            shard.drop_pages()

    def trimmed(self, largest: int) -> ShardTable:
        """A table with the `largest` shards that were used last."""
        table = ShardTable(self._folder, self._layout, self._location)
        for number in sorted(self._mapped, key=lambda number: -self.stamps[number])[:largest]:
            table._add(number, self._mapped[number])
            table.stamps[number] = self.stamps[number]
        return table


def shard_table(location: StoreLocation, layout: ArrayLayout) -> ShardTable:
    """The table of an array's shards in a local store, with none mapped yet."""
    assert location.path is not None
    return ShardTable(os.path.join(location.path, *layout.path.split("/"), "c"), layout, location)
